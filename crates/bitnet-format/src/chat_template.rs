//! Chat templates: the Jinja dialect that Hugging Face models carry.
//!
//! A template comes from a model file, so it is not trusted: it reaches nothing
//! but the conversation, and its steps are counted.

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Error, ErrorKind, Value, context};

/// Steps a template may take: some milliseconds of work; real ones take
/// hundreds per message.
const FUEL: u64 = 5_000_000;

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// What the model is told before the conversation.
    System,
    /// Who asks.
    User,
    /// The model.
    Assistant,
    /// What a tool answers.
    Tool,
}

impl Role {
    /// The name that templates know.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
        }
    }
}

/// What was said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// By whom.
    pub role: Role,
    /// The text.
    pub content: String,
}

/// A template that cannot be used, or that refuses a conversation.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// No Jinja.
    #[error("not a template that can be read")]
    Parse(#[source] Error),
    /// What the template raised, or that it takes too many steps.
    #[error("the model's chat template refuses the conversation")]
    Render(#[source] Error),
}

/// A template, parsed.
#[derive(Debug)]
pub struct Template {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

impl Template {
    /// Parses a template; `bos` and `eos` are the names it may use.
    ///
    /// # Errors
    /// [`TemplateError::Parse`].
    pub fn new(source: &str, bos: String, eos: String) -> Result<Self, TemplateError> {
        let mut environment = Environment::new();
        // As transformers sets them.
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        let syntax = syntax.map_err(TemplateError::Parse)?;
        environment.set_syntax(syntax);
        environment.set_fuel(Some(FUEL));
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_template_owned("chat", source.to_owned()).map_err(TemplateError::Parse)?;
        Ok(Self { environment, bos, eos })
    }

    /// The conversation as text; with `prompt`, up to where the next answer begins.
    ///
    /// # Errors
    /// [`TemplateError::Render`].
    pub fn render(&self, messages: &[Message], prompt: bool) -> Result<String, TemplateError> {
        let messages: Vec<Value> = messages
            .iter()
            .map(|m| context! { role => m.role.name(), content => m.content.as_str() })
            .collect();
        let values = context! {
            messages => messages,
            bos_token => self.bos.as_str(),
            eos_token => self.eos.as_str(),
            add_generation_prompt => prompt,
        };
        self.environment
            .get_template("chat")
            .and_then(|t| t.render(values))
            .map_err(TemplateError::Render)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The template of microsoft/bitnet-b1.58-2B-4T (tokenizer_config.json).
    const BITNET: &str = "{% set loop_messages = messages %}{% for message in loop_messages %}\
        {% set content = message['role'] | capitalize + ': '+ message['content'] | trim + \
        '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}\
        {% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}\
        {% endif %}";

    fn render(source: &str) -> Result<String, TemplateError> {
        let messages = [
            Message { role: Role::User, content: " Hi ".into() },
            Message { role: Role::Assistant, content: "Hello.".into() },
            Message { role: Role::User, content: "Bye".into() },
        ];
        Template::new(source, "<B>".into(), "<E>".into())?.render(&messages, true)
    }

    #[test]
    fn renders_a_conversation() {
        assert_eq!(
            render(BITNET).unwrap(),
            "<B>User: Hi<|eot_id|>Assistant: Hello.<|eot_id|>User: Bye<|eot_id|>Assistant: "
        );
    }

    #[test]
    fn knows_python_methods_and_trims_blocks() {
        let source = "{% for m in messages %}\n  {% if m.role == 'user' %}\n\
            {{ m['content'].strip() }}{{ eos_token }}\n  {% endif %}\n{% endfor %}";
        assert_eq!(render(source).unwrap(), "Hi<E>\nBye<E>\n");
    }

    #[test]
    fn broken_raising_and_endless_templates_are_bad_input() {
        for (source, part) in [
            ("{% for %}", "not a template"),
            ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
            (
                "{% for a in range(9999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}",
                "fuel",
            ),
        ] {
            let error = render(source).unwrap_err();
            let text = bitnet_core::exit::chain(&error);
            assert!(text.contains(part), "{text}");
        }
    }
}
