use super::*;

/// ChatML, with a system prompt of its own where there is none.
const CHATML: &str = "{% for message in messages %}\
    {{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}\
    {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// Byte-level, with ChatML's special tokens.
fn tokenizer() -> Tokenizer {
    let trained = Tokenizer::train(&["Hello there, general. Be brief.".repeat(20)], 280).unwrap();
    let mut json: Value = serde_json::from_str(trained.to_json()).unwrap();
    let size = trained.vocab_size();
    for (i, name) in ["<|im_start|>", "<|im_end|>"].into_iter().enumerate() {
        let mut token = json["added_tokens"][0].clone();
        token["id"] = (size as usize + i).into();
        token["content"] = name.into();
        json["added_tokens"].as_array_mut().unwrap().push(token);
    }
    Tokenizer::from_json(json.to_string()).unwrap()
}

fn encode(template: &str, context: usize, turns: &[(&str, &str)]) -> Result<Encoded, DataError> {
    let tokenizer = tokenizer();
    let eos = tokenizer.eos_id().unwrap();
    let encoder = Encoder::new(template, context, &tokenizer, eos)?;
    encoder.encode("x.jsonl:3", &serde_json::to_string(turns).unwrap())
}

/// Runs of tokens with the same mask, decoded.
fn runs(encoded: Encoded) -> Vec<(bool, String)> {
    let Encoded::Conversation(c) = encoded else { panic!("left out: {encoded:?}") };
    let tokenizer = tokenizer();
    let pairs: Vec<(bool, u32)> =
        c.flags.iter().map(|f| f & FLAG_LOSS != 0).zip(c.tokens).collect();
    pairs
        .chunk_by(|a, b| a.0 == b.0)
        .map(|run| {
            let ids: Vec<u32> = run.iter().map(|(_, id)| *id).collect();
            (run[0].0, tokenizer.decode(&ids))
        })
        .collect()
}

#[test]
fn the_mask_is_on_the_answers_and_the_ends_of_their_turns() {
    let turns = [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello there."),
        ("user", "Bye"),
        ("assistant", "Bye, general."),
    ];
    let found = runs(encode(CHATML, 999, &turns).unwrap());
    let expected = [
        (
            false,
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n\
             <|im_start|>assistant\n",
        ),
        (true, "Hello there.<|im_end|>"),
        (false, "\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"),
        (true, "Bye, general.<|im_end|>"),
        (false, "\n"),
    ];
    assert_eq!(found, expected.map(|(mask, text)| (mask, text.to_owned())));
}

#[test]
fn the_mask_token_by_token() {
    let t = tokenizer();
    let Encoded::Conversation(c) =
        encode(CHATML, 999, &[("user", "a"), ("assistant", "b c")]).unwrap()
    else {
        panic!("left out")
    };
    let prompt = t.encode_with_special("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n");
    let answer = t.encode_with_special("b c").unwrap();
    let (end, line) = (t.token_id("<|im_end|>").unwrap(), t.encode("\n").unwrap());
    let prompt = prompt.unwrap();
    assert_eq!(c.tokens, [&prompt[..], &answer, &[end], &line].concat());
    let mut flags = vec![0; prompt.len()];
    flags[0] = FLAG_BEGINS;
    flags.extend(vec![FLAG_LOSS; answer.len() + 1]);
    flags.extend(vec![0; line.len()]);
    assert_eq!(c.flags, flags);
    assert!(!c.truncated);
}

#[test]
fn an_answer_that_nothing_ends_gets_the_end_token() {
    let template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}\
        {% if add_generation_prompt %}assistant: {% endif %}";
    let found = runs(encode(template, 999, &[("user", "a"), ("assistant", "b")]).unwrap());
    let expected = [(false, "user: a\nassistant: "), (true, "b\n<|endoftext|>")];
    assert_eq!(found, expected.map(|(mask, text)| (mask, text.to_owned())));
    // The default template ends every turn with it.
    let turns = [("user", "a"), ("assistant", " b "), ("user", "c")];
    let found = runs(encode(DEFAULT_TEMPLATE, 999, &turns).unwrap());
    let expected = [
        (false, "User: a<|endoftext|>Assistant: "),
        (true, "b<|endoftext|>"),
        (false, "User: c<|endoftext|>"),
    ];
    assert_eq!(found, expected.map(|(mask, text)| (mask, text.to_owned())));
}

#[test]
fn what_is_too_long_is_cut_and_what_teaches_nothing_left_out() {
    let turns = [("user", "Hi"), ("assistant", "Hello there, general.")];
    let Encoded::Conversation(whole) = encode(CHATML, 999, &turns).unwrap() else {
        panic!("left out")
    };
    let len = whole.tokens.len();
    // A row has one token more than the context.
    assert_eq!(encode(CHATML, len - 1, &turns).unwrap(), Encoded::Conversation(whole.clone()));
    let Encoded::Conversation(cut) = encode(CHATML, len - 3, &turns).unwrap() else {
        panic!("left out")
    };
    assert!(cut.truncated);
    assert_eq!(cut.tokens, whole.tokens[..len - 2]);
    assert_eq!(encode(CHATML, 4, &turns).unwrap(), Encoded::WithoutAnswer);
    assert_eq!(encode(CHATML, 99, &turns[..1]).unwrap(), Encoded::WithoutAnswer);
    let smuggled = [("user", "Say <|im_end|>"), ("assistant", "No.")];
    assert_eq!(encode(CHATML, 999, &smuggled).unwrap(), Encoded::SpecialInText);
}

#[test]
fn templates_that_cannot_be_used_are_refused() {
    let turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")];
    for (template, expected) in [
        ("{% for %}", "--template: not a template that can be read"),
        ("{{ raise_exception('only one turn') }}", "x.jsonl:3: the model's chat template refuses"),
        ("{{ messages | length }}: {{ messages[0].content }}", "x.jsonl:3: message 2: the chat"),
    ] {
        let e = encode(template, 99, &turns).unwrap_err().to_string();
        assert!(e.contains(expected), "{e}");
    }
}

#[test]
fn the_tokenizers_folder_may_bring_a_template() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = dir.path().join("tokenizer.json");
    let mut options = ChatOptions { context: 8, template: None };
    let find = |options: &ChatOptions| find_template(options, &tokenizer).unwrap().0;
    assert_eq!(find(&options), DEFAULT_TEMPLATE);
    let config = dir.path().join("tokenizer_config.json");
    std::fs::write(
        &config,
        r#"{"chat_template": [{"name": "rag", "template": "r"},
        {"name": "default", "template": "listed"}]}"#,
    )
    .unwrap();
    assert_eq!(find(&options), "listed");
    std::fs::write(&config, r#"{"chat_template": "plain"}"#).unwrap();
    assert_eq!(find(&options), "plain");
    std::fs::write(dir.path().join("chat_template.jinja"), "jinja").unwrap();
    assert_eq!(find(&options), "jinja");
    let given = dir.path().join("given");
    std::fs::write(&given, "given").unwrap();
    options.template = Some(given);
    assert_eq!(find(&options), "given");
}
