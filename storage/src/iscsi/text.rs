//! Text segments: `key=value` pairs with a zero byte behind each (RFC 7143, 6.1).

use std::fmt;

/// Longest key, in bytes (6.1: a standard-label).
pub const KEY_BYTES_MAX: usize = 63;
/// Longest value, in bytes: 1024 bytes of binary in hexadecimal digits are the longest that a key allows.
pub const VALUE_BYTES_MAX: usize = 2 + 2 * BINARY_BYTES_MAX;
/// Most pairs in one text. A target that has more targets than that is asked for one of them.
pub const PAIRS_MAX: usize = 4096;
/// Longest binary value (12.1.3), in bytes.
pub const BINARY_BYTES_MAX: usize = 1024;

/// Answer to a key that nobody here knows (6.2).
pub const NOT_UNDERSTOOD: &str = "NotUnderstood";

/// A key and its value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pair<'a> {
    /// The name, as the standard spells it.
    pub key: &'a str,
    /// Everything behind the first `=`.
    pub value: &'a str,
}

/// Why bytes are no text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TextError {
    /// Bytes that are no UTF-8.
    #[error("its text is not UTF-8")]
    Encoding,
    /// Something without `=`, or with an impossible key before it.
    #[error("its text has something that is no key=value")]
    Pair,
    /// A value that is longer than any may be.
    #[error("its text has a value of more than {VALUE_BYTES_MAX} bytes")]
    Long,
    /// More pairs than anybody needs.
    #[error("its text has more than {PAIRS_MAX} keys")]
    Many,
}

/// The pairs of a whole text, in their order; keys may come more than once.
///
/// # Errors
///
/// Whatever is not written as 6.1 says, but for empty pairs: some targets pad with zeros.
pub fn pairs(text: &[u8]) -> Result<Vec<Pair<'_>>, TextError> {
    let text = str::from_utf8(text).map_err(|_| TextError::Encoding)?;
    let mut pairs = Vec::new();
    for pair in text.split('\0').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').ok_or(TextError::Pair)?;
        if !is_key(key) {
            return Err(TextError::Pair);
        }
        if value.len() > VALUE_BYTES_MAX {
            return Err(TextError::Long);
        }
        if pairs.len() == PAIRS_MAX {
            return Err(TextError::Many);
        }
        pairs.push(Pair { key, value });
    }
    Ok(pairs)
}

/// A text to be sent.
#[derive(Debug, Default)]
pub struct Text(Vec<u8>);

impl Text {
    /// Goes on with a pair. Neither may have a zero byte, and the key no `=`: what is sent was parsed at an edge.
    pub fn put(&mut self, key: &str, value: impl fmt::Display) {
        debug_assert!(is_key(key), "{key:?} is no key");
        let pair = format!("{key}={value}");
        debug_assert!(!pair.contains('\0'), "{key} has a value with a zero byte");
        self.0.extend_from_slice(pair.as_bytes());
        self.0.push(0);
    }

    /// The bytes of it, zero bytes and all.
    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }
}

/// A numerical value: decimal, or hexadecimal behind `0x` (6.1).
pub fn number(value: &str) -> Option<u64> {
    let (digits, radix) = match hexadecimal(value) {
        Some(digits) => (digits, 16),
        None => (value, 10),
    };
    // The standard library would take a sign.
    let are_digits = digits.chars().all(|c| c.is_digit(radix));
    are_digits.then(|| u64::from_str_radix(digits, radix).ok())?
}

/// A boolean value.
pub fn boolean(value: &str) -> Option<bool> {
    match value {
        "Yes" => Some(true),
        "No" => Some(false),
        _ => None,
    }
}

/// A boolean value, as it is written.
pub const fn yes(value: bool) -> &'static str {
    if value { "Yes" } else { "No" }
}

/// The values of a list, the preferred one first.
pub fn list(value: &str) -> impl Iterator<Item = &str> {
    value.split(',')
}

/// A large binary value: hexadecimal behind `0x`, or base64 behind `0b` (6.1).
pub fn binary(value: &str) -> Option<Vec<u8>> {
    let bytes = match hexadecimal(value) {
        Some(digits) => from_hexadecimal(digits)?,
        None => from_base64(value.strip_prefix("0b").or_else(|| value.strip_prefix("0B"))?)?,
    };
    (bytes.len() <= BINARY_BYTES_MAX).then_some(bytes)
}

/// A large binary value, as it is written here.
#[derive(Clone, Copy, Debug)]
pub struct Hexadecimal<'a>(pub &'a [u8]);

impl fmt::Display for Hexadecimal<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("0x")?;
        for byte in self.0 {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

fn is_key(key: &str) -> bool {
    let is_of_a_key = |c: char| c.is_ascii_alphanumeric() || ".-+@_#".contains(c);
    // Keys of vendors begin with a letter as well: `X-…`.
    (1..=KEY_BYTES_MAX).contains(&key.len())
        && key.starts_with(|c: char| c.is_ascii_alphabetic())
        && key.chars().all(is_of_a_key)
}

fn hexadecimal(value: &str) -> Option<&str> {
    value.strip_prefix("0x").or_else(|| value.strip_prefix("0X"))
}

fn from_hexadecimal(digits: &str) -> Option<Vec<u8>> {
    let digits: Vec<u8> = digits
        .chars()
        .map(|c| c.to_digit(16).and_then(|digit| u8::try_from(digit).ok()))
        .collect::<Option<_>>()?;
    if digits.is_empty() {
        return None;
    }
    // It is a number: a digit that is missing is the first.
    let (odd, even) = digits.split_at(digits.len() % 2);
    let pairs = even.chunks_exact(2).map(|pair| match pair {
        [high, low] => high << 4 | low,
        _ => unreachable!("chunks of two have two"),
    });
    Some(odd.iter().copied().chain(pairs).collect())
}

/// RFC 4648, 4, with its padding.
fn from_base64(text: &str) -> Option<Vec<u8>> {
    let digits = text.trim_end_matches('=');
    let padding = text.len() - digits.len();
    if text.is_empty() || !text.len().is_multiple_of(4) || padding > 2 {
        return None;
    }
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut bits_count) = (0_u32, 0);
    for c in digits.bytes() {
        bits = bits << 6 | u32::from(base64_digit(c)?);
        bits_count += 6;
        if bits_count >= 8 {
            bits_count -= 8;
            let [.., byte] = (bits >> bits_count).to_be_bytes();
            bytes.push(byte);
            bits &= (1 << bits_count) - 1;
        }
    }
    Some(bytes)
}

fn base64_digit(c: u8) -> Option<u8> {
    match c {
        b'A'..=b'Z' => Some(c - b'A'),
        b'a'..=b'z' => Some(c - b'a' + 26),
        b'0'..=b'9' => Some(c - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_text_is_read_as_it_was_written(
            expected in prop::collection::vec(("[A-Z][A-Za-z0-9.@_-]{0,62}", "[^\0]{0,60}"), 0..20),
        ) {
            let mut text = Text::default();
            for (key, value) in &expected {
                text.put(key, value);
            }
            let text = text.into_bytes();
            let read = pairs(&text).map(|pairs| {
                pairs.iter().map(|pair| (pair.key.to_owned(), pair.value.to_owned())).collect()
            });
            prop_assert_eq!(read, Ok(expected));
        }

        #[test]
        fn a_binary_value_is_read_as_it_was_written(bytes in prop::collection::vec(any::<u8>(), 1..1025)) {
            prop_assert_eq!(binary(&Hexadecimal(&bytes).to_string()), Some(bytes));
        }

        #[test]
        fn no_value_is_too_strange_to_be_looked_at(value in "(0x|0b|)[0-9A-Za-z=+/~é-]{0,30}") {
            let _ = (number(&value), boolean(&value), binary(&value), list(&value).count());
        }
    }

    #[test]
    fn what_is_no_pair_is_refused() {
        assert_eq!(pairs(b"A=\xff\0"), Err(TextError::Encoding));
        for wrong in ["A\0", "=b\0", "1=b\0", "A b=c\0", "A=b\0c\0"] {
            assert_eq!(pairs(wrong.as_bytes()), Err(TextError::Pair), "{wrong:?}");
        }
        let key = "K".repeat(KEY_BYTES_MAX + 1);
        assert_eq!(pairs(format!("{key}=v\0").as_bytes()), Err(TextError::Pair));
        let value = "v".repeat(VALUE_BYTES_MAX + 1);
        assert_eq!(pairs(format!("K={value}\0").as_bytes()), Err(TextError::Long));
        assert_eq!(
            pairs("K=\0".repeat(PAIRS_MAX + 1).as_bytes()),
            Err(TextError::Many)
        );
        assert_eq!(
            pairs("K=\0".repeat(PAIRS_MAX).as_bytes()).map(|it| it.len()),
            Ok(PAIRS_MAX)
        );
    }

    #[test]
    fn zeros_behind_a_text_are_padding() {
        let expected = Pair {
            key: "A",
            value: "b=c",
        };
        assert_eq!(pairs(b"A=b=c\0\0\0\0"), Ok(vec![expected]));
        assert_eq!(pairs(b"A=b=c"), Ok(vec![expected]));
    }

    #[test]
    fn a_number_is_decimal_or_hexadecimal_and_nothing_else() {
        assert_eq!(number("262144"), Some(262_144));
        assert_eq!(number("0x4000"), Some(0x4000));
        assert_eq!(number("0Xff"), Some(255));
        assert_eq!(number("18446744073709551615"), Some(u64::MAX));
        for wrong in ["", "0x", "+1", "-1", "1 ", "0x+1", "18446744073709551616", "0b11"] {
            assert_eq!(number(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn a_binary_value_is_hexadecimal_or_base64() {
        assert_eq!(binary("0x1fF"), Some(vec![1, 0xff]));
        for (text, bytes) in [
            ("0bZg==", "f"),
            ("0bZm8=", "fo"),
            ("0bZm9v", "foo"),
            ("0BZm9vYg==", "foob"),
            ("0bZm9vYmE=", "fooba"),
            ("0bZm9vYmFy", "foobar"),
        ] {
            assert_eq!(binary(text).as_deref(), Some(bytes.as_bytes()));
        }
        for wrong in [
            "",
            "0x",
            "0xg0",
            "0b",
            "0bZg=",
            "0bZg",
            "0bZ===",
            "0bZm=v",
            "0bZm9v====",
            "17",
        ] {
            assert_eq!(binary(wrong), None, "{wrong:?}");
        }
        assert_eq!(binary(&Hexadecimal(&[7; BINARY_BYTES_MAX + 1]).to_string()), None);
    }
}
