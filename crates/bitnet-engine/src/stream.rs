//! Text in pieces: bytes that are not yet a character, and characters that may
//! be the beginning of a stop string, are held back.

/// Turns bytes into text without ever splitting a character.
///
/// The text of all pieces is [`String::from_utf8_lossy`] of all bytes.
#[derive(Debug, Default)]
pub struct Utf8Stream {
    /// The beginning of a character: at most three bytes.
    held: Vec<u8>,
}

impl Utf8Stream {
    /// Adds bytes; appends the characters that are complete to `out`. Bytes that
    /// no character begins with become U+FFFD.
    pub fn push(&mut self, bytes: &[u8], out: &mut String) {
        self.held.extend_from_slice(bytes);
        let mut rest = &self.held[..];
        loop {
            match std::str::from_utf8(rest) {
                Ok(text) => {
                    out.push_str(text);
                    rest = &[];
                    break;
                }
                Err(e) => {
                    let (valid, bad) = rest.split_at(e.valid_up_to());
                    // Valid by the error's own word, so nothing is replaced.
                    out.push_str(&String::from_utf8_lossy(valid));
                    match e.error_len() {
                        Some(len) => {
                            out.push(char::REPLACEMENT_CHARACTER);
                            rest = &bad[len..];
                        }
                        None => {
                            rest = bad;
                            break;
                        }
                    }
                }
            }
        }
        let done = self.held.len() - rest.len();
        self.held.drain(..done);
    }

    /// Ends the text: a character that was not completed becomes U+FFFD.
    pub fn finish(&mut self, out: &mut String) {
        if !self.held.is_empty() {
            out.push(char::REPLACEMENT_CHARACTER);
            self.held.clear();
        }
    }
}

/// Looks for stop strings in text that comes in pieces.
#[derive(Debug, Default)]
pub struct StopFilter {
    stops: Vec<String>,
    /// Text that may be the beginning of a stop string.
    held: String,
    stopped: bool,
}

impl StopFilter {
    /// Looks for any of `stops`; empty ones are left out.
    #[must_use]
    pub fn new(stops: &[String]) -> Self {
        let stops = stops.iter().filter(|s| !s.is_empty()).cloned().collect();
        Self { stops, ..Self::default() }
    }

    /// Adds text; appends to `out` what cannot be part of a stop string. Returns
    /// true once a stop string was found: the text before the first is out, and
    /// everything from it on is dropped.
    pub fn push(&mut self, text: &str, out: &mut String) -> bool {
        if self.stopped {
            return true;
        }
        self.held.push_str(text);
        if let Some(at) = self.stops.iter().filter_map(|s| self.held.find(s.as_str())).min() {
            out.push_str(&self.held[..at]);
            self.held.clear();
            self.stopped = true;
            return true;
        }
        let keep = self.stops.iter().map(|s| overlap(&self.held, s)).max().unwrap_or(0);
        let free = self.held.len() - keep;
        out.push_str(&self.held[..free]);
        self.held.drain(..free);
        false
    }

    /// Ends the text: what was held back comes out after all.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
    }
}

/// Bytes of the longest end of `text` that `stop` begins with.
fn overlap(text: &str, stop: &str) -> usize {
    let longest = text.len().min(stop.len() - 1);
    (1..=longest)
        .rev()
        .find(|&n| text.as_bytes()[text.len() - n..] == stop.as_bytes()[..n])
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_text_does_not_depend_on_the_pieces(
            bytes in prop_oneof![
                proptest::collection::vec(any::<u8>(), 0..40),
                "\\PC{0,20}".prop_map(String::into_bytes),
            ],
            cuts in proptest::collection::vec(1usize..5, 1..50),
        ) {
            let (mut stream, mut text, mut rest) = (Utf8Stream::default(), String::new(), &bytes[..]);
            for &cut in cuts.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (piece, tail) = rest.split_at(cut.min(rest.len()));
                stream.push(piece, &mut text);
                rest = tail;
            }
            stream.finish(&mut text);
            prop_assert_eq!(text, String::from_utf8_lossy(&bytes).into_owned());
        }

        #[test]
        fn stops_are_found_across_pieces(
            text in "[abc\u{e9}]{0,30}",
            stops in proptest::collection::vec("[abc\u{e9}]{1,4}", 0..3),
            cut in 1usize..4,
        ) {
            let mut filter = StopFilter::new(&stops);
            let (mut out, mut stopped) = (String::new(), false);
            let chars: Vec<char> = text.chars().collect();
            for piece in chars.chunks(cut) {
                let piece: String = piece.iter().collect();
                stopped = filter.push(&piece, &mut out);
                if stopped {
                    break;
                }
            }
            filter.finish(&mut out);
            // The first stop that is complete ends the text; with one string
            // inside another, which is first can depend on the piece.
            let found: Vec<usize> = stops.iter().filter_map(|s| text.find(s.as_str())).collect();
            prop_assert_eq!(stopped, !found.is_empty());
            if !stopped {
                prop_assert_eq!(out, text);
            } else if stops.len() == 1 {
                prop_assert_eq!(&out, &text[..found[0]]);
            } else {
                prop_assert!(text.starts_with(&out) && found.contains(&out.len()));
            }
        }
    }

    #[test]
    fn holds_back_what_may_become_a_stop() {
        let mut filter = StopFilter::new(&["</s>".to_owned(), String::new()]);
        let mut out = String::new();
        assert!(!filter.push("one <", &mut out));
        assert_eq!(out, "one ");
        assert!(!filter.push("b> <", &mut out));
        assert_eq!(out, "one <b> ");
        assert!(!filter.push("/s", &mut out));
        assert!(filter.push("> two", &mut out));
        filter.finish(&mut out);
        assert_eq!(out, "one <b> ");
    }

    #[test]
    fn holds_back_the_bytes_of_a_character() {
        let (mut stream, mut out) = (Utf8Stream::default(), String::new());
        let euro = "€".as_bytes();
        stream.push(&euro[..1], &mut out);
        stream.push(&euro[1..2], &mut out);
        assert_eq!(out, "");
        stream.push(&euro[2..], &mut out);
        assert_eq!(out, "€");
        stream.push(b"a\xff", &mut out);
        assert_eq!(out, "€a\u{fffd}");
    }
}
