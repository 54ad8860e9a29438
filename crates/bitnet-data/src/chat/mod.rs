//! Conversations as training data: lines of `{"messages": [{"role", "content"},
//! …]}` rendered with a chat template, and for each token whether the loss is
//! taken over it.
//!
//! The loss is taken over what the assistant says and the token that ends its
//! turn. Which part of the text that is, the template tells by itself: the
//! conversation up to an answer, rendered with the beginning of an answer, is
//! where the answer begins; the conversation with the answer is where it ends.
//! White space that a template puts behind the end of a turn is not learned.
//!
//! The parts are tokenised one by one, as they are when a model runs: the prompt
//! is encoded as a whole, and the answer begins with a token of its own.

mod lines;

use std::path::{Path, PathBuf};

use bitnet_core::exit::chain;
use bitnet_format::chat_template::{Message, Role, Template};
use serde_json::Value;

pub(crate) use self::lines::canonical;
use crate::error::DataError;
use crate::shard::{FLAG_BEGINS, FLAG_LOSS};
use crate::tokenizer::Tokenizer;

/// The template used where none is given and the tokenizer brings none: that of
/// microsoft/bitnet-b1.58-2B-4T with the tokenizer's own end token.
pub const DEFAULT_TEMPLATE: &str = "{% for message in messages %}\
    {{ message['role'] | capitalize + ': ' + message['content'] | trim + eos_token }}\
    {% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}";

/// How conversations are rendered and packed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChatOptions {
    /// Inputs in a window. A conversation of up to `context + 1` tokens is in one
    /// window whole; a longer one is cut.
    pub context: usize,
    /// A file with a Jinja chat template. By default that of the tokenizer's
    /// folder (`chat_template.jinja`, or `chat_template` in
    /// `tokenizer_config.json`), then [`DEFAULT_TEMPLATE`].
    pub template: Option<PathBuf>,
}

/// Finds the template's source, and says where it is from.
pub(crate) fn find_template(
    options: &ChatOptions,
    tokenizer: &Path,
) -> Result<(String, String), DataError> {
    let read = |path: &Path| std::fs::read_to_string(path).map_err(DataError::read(path));
    if let Some(path) = &options.template {
        return Ok((read(path)?, path.display().to_string()));
    }
    let folder = tokenizer.parent().unwrap_or(Path::new("."));
    let path = folder.join("chat_template.jinja");
    if path.is_file() {
        return Ok((read(&path)?, path.display().to_string()));
    }
    let path = folder.join("tokenizer_config.json");
    if path.is_file() {
        let config: Value = serde_json::from_str(&read(&path)?)
            .map_err(|e| DataError::file(&path, format!("is not JSON: {e}")))?;
        let template = match &config["chat_template"] {
            Value::Array(named) => {
                &named.iter().find(|t| t["name"] == "default").ok_or_else(|| {
                    DataError::file(&path, "chat_template: none is called `default`")
                })?["template"]
            }
            template => template,
        };
        if let Some(source) = template.as_str() {
            return Ok((source.to_owned(), format!("{}: chat_template", path.display())));
        }
    }
    Ok((DEFAULT_TEMPLATE.to_owned(), "the default (the tokenizer brings none)".into()))
}

/// A conversation as tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Conversation {
    pub(crate) tokens: Vec<u32>,
    /// See [`crate::shard`].
    pub(crate) flags: Vec<u8>,
    pub(crate) truncated: bool,
}

/// What becomes of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Encoded {
    Conversation(Conversation),
    /// A message holds the name of a special token, which would become that token.
    SpecialInText,
    /// There is nothing to learn in it, or nothing before the cut.
    WithoutAnswer,
}

/// Renders and tokenises conversations.
pub(crate) struct Encoder<'a> {
    tokenizer: &'a Tokenizer,
    template: Template,
    special: Vec<(u32, String)>,
    eos_id: u32,
    row: usize,
}

impl<'a> Encoder<'a> {
    /// # Errors
    /// [`DataError::Option`] for a template that cannot be read and a tokenizer
    /// that cannot encode a text in parts.
    pub(crate) fn new(
        template: &str,
        context: usize,
        tokenizer: &'a Tokenizer,
        eos_id: u32,
    ) -> Result<Self, DataError> {
        if !tokenizer.is_byte_level() {
            let what = "conversations are encoded in parts, which only a byte-level tokenizer can";
            return Err(DataError::option("--tokenizer", what));
        }
        let name = |id: Option<u32>| {
            let bytes = id.map(|id| tokenizer.token_bytes(id)).unwrap_or_default();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let template = Template::new(template, name(tokenizer.bos_id()), name(Some(eos_id)))
            .map_err(|e| DataError::option("--template", chain(&e)))?;
        let special = tokenizer.special_tokens();
        Ok(Self { tokenizer, template, special, eos_id, row: context + 1 })
    }

    /// Encodes a conversation in [`canonical`] form; `name` is what errors call it.
    ///
    /// # Errors
    /// [`DataError::Conversation`] where the template refuses it or cannot tell
    /// where an answer begins and ends.
    pub(crate) fn encode(&self, name: &str, canonical: &str) -> Result<Encoded, DataError> {
        let bad = |what: String| DataError::Conversation { name: name.to_owned(), what };
        let messages = lines::messages(canonical).map_err(bad)?;
        let has_special =
            |m: &Message| self.special.iter().any(|(_, s)| m.content.contains(s.as_str()));
        if messages.iter().any(has_special) {
            return Ok(Encoded::SpecialInText);
        }
        let render = |messages: &[Message], prompt: bool| {
            self.template.render(messages, prompt).map_err(|e| bad(chain(&e)))
        };
        let whole = render(&messages, false)?;
        let (mut tokens, mut flags) = (Vec::new(), Vec::new());
        let mut push = |text: &str, answer: bool| -> Result<bool, DataError> {
            let ids = self.tokenizer.encode_with_special(text)?;
            let learned = if answer { self.learned(&ids) } else { 0 };
            flags.extend((0..ids.len()).map(|i| if i < learned { FLAG_LOSS } else { 0 }));
            tokens.extend_from_slice(&ids);
            Ok(learned > 0 && self.is_special(ids[learned - 1]))
        };
        let (mut at, mut ended) = (0, true);
        for (i, message) in messages.iter().enumerate() {
            if message.role != Role::Assistant {
                continue;
            }
            let (begin, end) = (render(&messages[..i], true)?, render(&messages[..=i], false)?);
            if begin.len() < at || !end.starts_with(&begin) || !whole.starts_with(&end) {
                return Err(bad(format!(
                    "message {}: the chat template renders the conversation up to here otherwise \
                     than as the beginning of the whole, so that the answer cannot be told apart",
                    i + 1
                )));
            }
            push(&whole[at..begin.len()], false)?;
            ended = push(&whole[begin.len()..end.len()], true)?;
            at = end.len();
        }
        push(&whole[at..], false)?;
        // Without a token that ends it, no model would learn where to stop.
        if !ended && messages.last().is_some_and(|m| m.role == Role::Assistant) {
            tokens.push(self.eos_id);
            flags.push(FLAG_LOSS);
        }
        Ok(self.finish(tokens, flags))
    }

    fn finish(&self, mut tokens: Vec<u32>, mut flags: Vec<u8>) -> Encoded {
        let truncated = tokens.len() > self.row;
        tokens.truncate(self.row);
        flags.truncate(self.row);
        // Nothing predicts the first token.
        if let Some(first) = flags.first_mut() {
            *first = FLAG_BEGINS;
        }
        if flags.iter().all(|f| f & FLAG_LOSS == 0) {
            return Encoded::WithoutAnswer;
        }
        Encoded::Conversation(Conversation { tokens, flags, truncated })
    }

    /// How many of an answer's tokens are learned: those up to its last special
    /// token where only white space follows, all of them otherwise.
    fn learned(&self, ids: &[u32]) -> usize {
        let Some(last) = ids.iter().rposition(|&id| self.is_special(id)) else {
            return ids.len();
        };
        let behind = self.tokenizer.decode(&ids[last + 1..]);
        if behind.trim().is_empty() { last + 1 } else { ids.len() }
    }

    fn is_special(&self, id: u32) -> bool {
        self.special.iter().any(|(special, _)| *special == id)
    }
}

#[cfg(test)]
mod tests;
