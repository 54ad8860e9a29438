//! The byte-level alphabet of GPT-2: tokens are strings in which one character
//! stands for each byte. Source: `bytes_to_unicode` of openai/gpt-2's encoder.py.

/// The byte that a character of a byte-level token stands for.
///
/// Printable bytes stand for themselves; the other 68, in order, are U+0100 on.
#[must_use]
pub fn byte_of(c: char) -> Option<u8> {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if let Ok(byte) = u8::try_from(u32::from(c)) {
        return printable(byte).then_some(byte);
    }
    let nth = usize::try_from(u32::from(c).checked_sub(0x100)?).ok()?;
    (0..=255u8).filter(|&b| !printable(b)).nth(nth)
}

/// The bytes that a byte-level token stands for; none where a character of it
/// stands for no byte.
#[must_use]
pub fn bytes_of(token: &str) -> Option<Vec<u8>> {
    token.chars().map(byte_of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_one_character() {
        let mut seen = [0; 256];
        for c in (0..=0x400).filter_map(char::from_u32) {
            if let Some(byte) = byte_of(c) {
                seen[usize::from(byte)] += 1;
            }
        }
        assert_eq!(seen, [1; 256]);
    }

    #[test]
    fn known_characters() {
        assert_eq!(bytes_of("Ġthe").unwrap(), b" the");
        assert_eq!(bytes_of("Ċ").unwrap(), b"\n");
        assert_eq!(bytes_of("âĤ¬").unwrap(), "€".as_bytes());
        assert_eq!(byte_of('Ń'), Some(173));
        assert_eq!(bytes_of("a b"), None);
    }
}
