//! Chat templates: the Jinja dialect that Hugging Face models carry.
//!
//! A template comes from a model file, so it is not trusted: it reaches nothing
//! but the conversation, and its steps are counted.

use anyhow::Context;
use bitnet_core::ExitError;
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Error, ErrorKind, Value, context};

/// Steps a template may take: some milliseconds of work; real ones take
/// hundreds per message.
const FUEL: u64 = 5_000_000;

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    System,
    User,
    Assistant,
}

impl Role {
    /// The name that templates know.
    fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }
}

/// What was said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) role: Role,
    pub(crate) content: String,
}

/// A template, parsed.
#[derive(Debug)]
pub(crate) struct Template {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

impl Template {
    /// Parses a template; `bos` and `eos` are the names it may use.
    ///
    /// # Errors
    /// A template that is no Jinja (exit code 3).
    pub(crate) fn new(source: &str, bos: String, eos: String) -> anyhow::Result<Self> {
        let mut environment = Environment::new();
        // As transformers sets them.
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?;
        environment.set_syntax(syntax);
        environment.set_fuel(Some(FUEL));
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment
            .add_template_owned("chat", source.to_owned())
            .map_err(ExitError::bad_input)
            .context("not a template that can be read")?;
        Ok(Self { environment, bos, eos })
    }

    /// The prompt for the next answer.
    ///
    /// # Errors
    /// What the template raises (exit code 3).
    pub(crate) fn render(&self, messages: &[Message]) -> anyhow::Result<String> {
        let messages: Vec<Value> = messages
            .iter()
            .map(|m| context! { role => m.role.name(), content => m.content.as_str() })
            .collect();
        let values = context! {
            messages => messages,
            bos_token => self.bos.as_str(),
            eos_token => self.eos.as_str(),
            add_generation_prompt => true,
        };
        self.environment
            .get_template("chat")
            .and_then(|t| t.render(values))
            .map_err(ExitError::bad_input)
            .context("the model's chat template refuses the conversation")
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

    fn render(source: &str) -> anyhow::Result<String> {
        let messages = [
            Message { role: Role::User, content: " Hi ".into() },
            Message { role: Role::Assistant, content: "Hello.".into() },
            Message { role: Role::User, content: "Bye".into() },
        ];
        Template::new(source, "<B>".into(), "<E>".into())?.render(&messages)
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
            let text = bitnet_core::exit::chain(error.as_ref());
            assert!(text.contains(part), "{text}");
            assert_eq!(bitnet_core::exit::code_of(error.as_ref()).code(), 3);
        }
    }
}
