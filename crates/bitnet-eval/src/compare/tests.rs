use super::*;

fn figures(label: &str, scale: f64) -> Figures {
    let rate = |x: f64| Rate { median: x, min: 0.9 * x, max: 1.1 * x };
    Figures {
        label: label.into(),
        model: format!("{label}.gguf"),
        form: "f16".into(),
        parameters: 4_000_000,
        file_bytes: (8e6 * scale) as u64,
        bits_per_weight: 16.0 * scale,
        bytes_per_token: (6e6 * scale) as u64,
        memory_bytes: Some((2e7 * scale) as u64),
        load_seconds: 0.01,
        prefill: rate(1000.0 / scale),
        decode: rate(200.0 / scale),
        joules_per_prefill_token: None,
        joules_per_decode_token: None,
        quality: Some(Quality { nats: 3.0, perplexity: 20.0 / scale, bits_per_byte: Some(1.5) }),
        tasks: Vec::new(),
    }
}

fn comparison() -> Comparison {
    let conditions = Conditions {
        isa: "avx2".into(),
        threads: 2,
        kv: "f32".into(),
        prompt: 128,
        generate: 32,
        repeats: 5,
        text: Some("val".into()),
        text_hash: Some("0123456789abcdef0123".into()),
        mode: Some("windows".into()),
        context: Some(256),
        tokens: Some(1024),
        one_tokenizer: true,
    };
    let models = vec![figures("twin", 1.0), figures("a|<b>", 0.25)];
    Comparison { conditions, models, energy: None }
}

/// Nothing in the page makes a browser load something.
fn assert_self_contained(page: &str) {
    for bad in ["http:", "https:", "src=", "url(", "@import", "<script", "<iframe"] {
        assert!(!page.contains(bad), "{bad}");
    }
}

#[test]
fn every_figure_is_against_the_first() {
    let table = comparison().table();
    for line in [
        "| | twin | a\\|<b> |",
        "| linear weights | f16 | f16 |",
        "| file | 8.00 MB | **2.00 MB** (0.25×) |",
        "| decode, tokens/s | 200 | **800** (4.00×) |",
        "| perplexity | **20.000** | 80.000 (4.00×) |",
        "| bits per byte | 1.500 | 1.500 (1.00×) |",
        "a|<b> against twin: file 4.00× smaller, decodes 4.00× faster, prefills 4.00× faster, \
         300.0 % higher perplexity.",
    ] {
        assert!(table.contains(line), "{line} is not in\n{table}");
    }
    assert!(!table.contains("energy"), "{table}");
}

#[test]
fn the_story_is_told_in_a_sentence() {
    let mut comparison = comparison();
    let summary = |c: &Comparison| c.summary();
    assert_eq!(
        summary(&comparison),
        "No other model has perplexity within 5 % of twin; the fastest, a|<b>, has 300.0 % \
         higher perplexity."
    );
    // A slower one that reads as well is the story, not the fastest.
    comparison.models.push(figures("half", 0.5));
    comparison.models[2].quality = comparison.models[0].quality;
    assert_eq!(
        summary(&comparison),
        "half decodes 2.00× faster than twin, from a file 2.00× smaller, at the same perplexity."
    );
    assert!(page(&comparison).unwrap().contains("<p class=\"summary\">half decodes 2.00× faster"));
    assert!(comparison.table().contains("\nhalf decodes 2.00× faster than twin"));
    comparison.models[2].quality.as_mut().unwrap().perplexity = 19.0;
    assert!(summary(&comparison).ends_with("smaller, at 5.0 % lower perplexity."));
    comparison.models[2].file_bytes = 8_000_000;
    comparison.models[2].decode.median = 200.0;
    comparison.conditions.one_tokenizer = false;
    comparison.models[1].quality = None;
    assert_eq!(
        summary(&comparison),
        "half decodes as fast as twin, from a file of the same size, at the same bits per byte."
    );
    comparison.models.iter_mut().for_each(|m| m.quality = None);
    assert_eq!(
        summary(&comparison),
        "a|<b> decodes 4.00× faster than twin, from a file 4.00× smaller."
    );
}

#[test]
fn what_is_missing_is_left_out_or_a_dash() {
    let mut comparison = comparison();
    comparison.models[0].memory_bytes = None;
    comparison.models[1].joules_per_decode_token = Some(0.02);
    comparison.models[1].tasks =
        vec![TaskScore { task: "piqa".into(), metric: "acc".into(), value: 0.625, stderr: None }];
    let table = comparison.table();
    for line in [
        "| memory | - | 5.00 MB |",
        "| energy, J per decoded token | - | 0.0200 |",
        "| piqa, acc | - | 62.5 % |",
    ] {
        assert!(table.contains(line), "{line} is not in\n{table}");
    }
    // Perplexities of tokens of two tokenizers do not compare.
    comparison.conditions.one_tokenizer = false;
    let table = comparison.table();
    assert!(!table.contains("| perplexity") && table.contains("tokenizers differ"), "{table}");
    let page = page(&comparison).unwrap();
    assert!(page.contains("bits per byte against decode speed"));
    comparison.models.iter_mut().for_each(|m| m.quality = None);
    let page = super::page(&comparison).unwrap();
    assert!(!page.contains("quality against speed") && page.contains("aria-label=\"file\""));
}

#[test]
fn the_page_is_whole_and_loads_nothing() {
    let mut comparison = comparison();
    comparison.energy = Some(EnergyReport {
        available: false,
        reason: Some("none".into()),
        counters: vec![],
        idle_watts: None,
    });
    let page = page(&comparison).unwrap();
    assert_self_contained(&page);
    for text in [
        "aria-label=\"perplexity against decode speed\"",
        "aria-label=\"decode, tokens/s\"",
        "a|&lt;b&gt;",
        "300.0 % higher perplexity",
        "Energy unavailable: none",
        "0123456789abcdef…",
        "<td class=\"best\">2.00 MB",
    ] {
        assert!(page.contains(text), "{text}");
    }
    assert!(!page.contains("<b>a|<b>"));
    // A circle a model, and a bar a model and chart: file, memory, prefill, decode,
    // perplexity.
    assert_eq!((page.matches("<circle").count(), page.matches("<rect").count()), (2, 10));
}
