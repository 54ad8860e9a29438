//! The lines of a chat file: what is accepted, and the one form it is kept in.

use bitnet_format::chat_template::{Message, Role};
use serde_json::{Map, Value};

use crate::source::jsonl::kind;

/// A conversation in the form in which it is hashed and split: a JSON list of
/// `[role, content]`; empty for a conversation without messages. Accepts
/// `messages` with `role` and `content`, and `conversations` with `from` and
/// `value` (ShareGPT's); other fields are not looked at.
///
/// # Errors
/// Says which message and field is not as expected.
pub(crate) fn canonical(mut object: Map<String, Value>) -> Result<String, String> {
    let forms = [("messages", "role", "content"), ("conversations", "from", "value")];
    let Some((list, role, content)) =
        forms.into_iter().find(|(list, ..)| object.contains_key(*list))
    else {
        let fields: Vec<&str> = object.keys().map(String::as_str).collect();
        return Err(format!("no field `messages` or `conversations` among {}", fields.join(", ")));
    };
    let messages = match object.remove(list) {
        Some(Value::Array(messages)) => messages,
        other => {
            let found = other.as_ref().map_or("nothing", kind);
            return Err(format!("field `{list}`: expected an array, found {found}"));
        }
    };
    let mut turns = Vec::with_capacity(messages.len());
    for (number, message) in (1..).zip(&messages) {
        let text = |field: &str| match &message[field] {
            Value::String(text) => Ok(text.as_str()),
            other => Err(format!(
                "message {number}, field `{field}`: expected a string, found {}",
                kind(other)
            )),
        };
        let name = text(role)?;
        let role = role_of(name).ok_or_else(|| {
            format!(
                "message {number}, field `{role}`: `{name}` is none of system, user (human), \
                 assistant (gpt), tool"
            )
        })?;
        turns.push((role.name(), text(content)?));
    }
    if turns.is_empty() {
        return Ok(String::new());
    }
    serde_json::to_string(&turns).map_err(|e| e.to_string())
}

fn role_of(name: &str) -> Option<Role> {
    Some(match name {
        "system" => Role::System,
        "user" | "human" => Role::User,
        "assistant" | "gpt" => Role::Assistant,
        "tool" => Role::Tool,
        _ => return None,
    })
}

/// Takes the [`canonical`] form apart.
pub(crate) fn messages(canonical: &str) -> Result<Vec<Message>, String> {
    let turns: Vec<(String, String)> =
        serde_json::from_str(canonical).map_err(|e| e.to_string())?;
    turns
        .into_iter()
        .map(|(role, content)| {
            let role = role_of(&role).ok_or_else(|| format!("unknown role `{role}`"))?;
            Ok(Message { role, content })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> Result<String, String> {
        canonical(serde_json::from_str(line).unwrap())
    }

    #[test]
    fn both_forms_are_one() {
        let expected = r#"[["system","Be brief."],["user","Hi"],["assistant","Hello."]]"#;
        for line in [
            r#"{"messages": [{"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}"#,
            r#"{"id": 7, "conversations": [{"from": "system", "value": "Be brief."},
                {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}"#,
        ] {
            assert_eq!(read(line).unwrap(), expected);
        }
        let back = messages(expected).unwrap();
        assert_eq!(back[2], Message { role: Role::Assistant, content: "Hello.".into() });
        assert_eq!(read(r#"{"messages": []}"#).unwrap(), "");
    }

    #[test]
    fn errors_name_the_message_and_the_field() {
        for (line, expected) in [
            (r#"{"text": "x"}"#, "no field `messages` or `conversations` among text"),
            (r#"{"messages": "x"}"#, "field `messages`: expected an array, found a string"),
            (
                r#"{"messages": [{"role": "user"}]}"#,
                "message 1, field `content`: expected a string",
            ),
            (
                r#"{"messages": [{"role": "narrator", "content": ""}]}"#,
                "message 1, field `role`: `narrator` is none of system",
            ),
        ] {
            let e = read(line).unwrap_err();
            assert!(e.contains(expected), "{e}");
        }
    }
}
