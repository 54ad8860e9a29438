//! Words: what perplexity per word and the clean-up of WikiText count and change.

use regex::Regex;

/// Whether Python's `\s` matches it: Unicode white space and the four separators
/// U+001C to U+001F.
#[must_use]
pub fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// The words of a document as lm-evaluation-harness counts them, the length of
/// `re.split(r"\s+", text)`: one more than there are runs of white space.
#[must_use]
pub fn count_words(text: &str) -> u64 {
    let mut runs = 0;
    let mut inside = false;
    for c in text.chars() {
        runs += u64::from(is_space(c) && !inside);
        inside = is_space(c);
    }
    runs + 1
}

/// How many words begin in `text`, where `after_space` says whether white space
/// (or the begin of a text) stands before it.
#[must_use]
pub fn count_begun(text: &str, after_space: bool) -> u64 {
    let (mut words, mut space) = (0, after_space);
    for c in text.chars() {
        words += u64::from(space && !is_space(c));
        space = is_space(c);
    }
    words
}

/// Undoes WikiText's tokenisation, as the `wikitext` task of lm-evaluation-harness
/// does before it scores a page: spaces before punctuation, ` @-@ `, `= =`.
#[derive(Debug)]
pub struct WikitextDetokenizer {
    patterns: Vec<(Regex, &'static str)>,
}

impl WikitextDetokenizer {
    /// The rules, compiled.
    ///
    /// # Panics
    /// Never: the patterns are fixed.
    #[must_use]
    pub fn new() -> Self {
        let patterns = [
            // A slip of the original, kept: it inserts its own pattern.
            (r"/' [0-9]/", "/'[0-9]/"),
            (r"\(\s*([^\)]*?)\s*\)", "(${1})"),
            (r"\[\s*([^\]]*?)\s*\]", "[${1}]"),
            (r"\{\s*([^}]*?)\s*\}", "{${1}}"),
            (r#""\s*([^"]*?)\s*""#, "\"${1}\""),
            (r"'\s*([^']*?)\s*'", "'${1}'"),
        ];
        let patterns = patterns
            .into_iter()
            .map(|(pattern, with)| (Regex::new(pattern).expect("a fixed pattern"), with))
            .collect();
        Self { patterns }
    }

    /// The page as running text.
    #[must_use]
    pub fn apply(&self, page: &str) -> String {
        const BEFORE: [(&str, &str); 10] = [
            ("s '", "s'"),
            (" @-@ ", "-"),
            (" @,@ ", ","),
            (" @.@ ", "."),
            (" : ", ": "),
            (" ; ", "; "),
            (" . ", ". "),
            (" ! ", "! "),
            (" ? ", "? "),
            (" , ", ", "),
        ];
        const AFTER: [(&str, &str); 8] = [
            ("= = = =", "===="),
            ("= = =", "==="),
            ("= =", "=="),
            (" \u{b0} ", "\u{b0}"),
            (" \n", "\n"),
            ("\n ", "\n"),
            (" N ", " 1 "),
            (" 's", "'s"),
        ];
        let replace = |text: String, rules: &[(&str, &str)]| {
            rules.iter().fold(text, |text, (from, to)| text.replace(from, to))
        };
        let mut text = replace(page.to_owned(), &BEFORE);
        for (pattern, with) in &self.patterns {
            text = pattern.replace_all(&text, *with).into_owned();
        }
        replace(text, &AFTER)
    }
}

impl Default for WikitextDetokenizer {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_those_of_python() {
        // Python: len(re.split(r"\s+", text))
        for (text, words) in [
            ("", 1),
            ("a", 1),
            ("a b", 2),
            (" a  b\n", 4),
            ("a\u{a0}b\u{2003}c\u{1c}d", 4),
            ("  ", 2),
            ("ein\tzwei\r\ndrei", 3),
        ] {
            assert_eq!(count_words(text), words, "{text:?}");
        }
    }

    #[test]
    fn begun_words_add_up_over_pieces() {
        let text = " One two,  three\nfour ";
        assert_eq!(count_begun(text, true), 4);
        for cut in 0..=text.len() {
            let (first, rest) = text.split_at(cut);
            let space = first.chars().next_back().is_none_or(is_space);
            let words = count_begun(first, true) + count_begun(rest, space);
            assert_eq!(words, 4, "cut at {cut}");
        }
        assert_eq!(count_begun("tail of a word", false), 3);
    }

    #[test]
    fn a_page_becomes_running_text() {
        // What wikitext_detokenizer (lm-evaluation-harness 0.4.13) returns for it.
        let page = " = Homarus gammarus = \n \n It is ( up to ) 60 @.@ 5 cm , \" blue \" : 1 @,@ 000 \
                    of the dogs ' food @-@ chain [ a ] . \n = = Size = = \n 5 \u{b0} N of it 's\n";
        let expected = " = Homarus gammarus =\n\nIt is (up to) 60.5 cm, \"blue\": 1,000 of the \
                        dogs'food-chain [a].\n== Size ==\n5\u{b0}N of it's\n";
        assert_eq!(WikitextDetokenizer::new().apply(page), expected);
    }
}
