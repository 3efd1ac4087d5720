//! Keys as text (RFC 7468), as openssl writes them.

use zeroize::Zeroizing;

/// What stands between a first and a last line.
pub(super) struct Block<'a> {
    /// What the lines call it.
    pub(super) label: &'a str,
    /// Its bytes, of which nothing is left when they are dropped.
    pub(super) der: Zeroizing<Vec<u8>>,
}

/// Why a text has no keys that can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the text of an error is its documentation")]
pub enum PemError {
    #[error("it is no text")]
    NotText,
    #[error("line {line} begins a key that does not end")]
    Open { line: usize },
    #[error("line {line} is none of a key")]
    Line { line: usize },
    #[error("the key that begins in line {line} is longer than any that is known here")]
    Long { line: usize },
}

/// Longest key in a list, in bytes: an Ed25519 key has 48 at most.
const DER_BYTES_MAX: usize = 128;
const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// The keys in `text`, in their order. What stands around them is for people.
pub(super) fn blocks(text: &[u8]) -> Result<Vec<Block<'_>>, PemError> {
    let text = std::str::from_utf8(text).map_err(|_| PemError::NotText)?;
    let mut lines = (1..).zip(text.lines().map(str::trim));
    let mut blocks = Vec::new();
    while let Some((first, line)) = lines.next() {
        let Some(label) = label(line, "-----BEGIN ") else {
            continue;
        };
        blocks.push(Block {
            label,
            der: body(label, first, &mut lines)?,
        });
    }
    Ok(blocks)
}

fn label<'a>(line: &'a str, start: &str) -> Option<&'a str> {
    line.strip_prefix(start)?.strip_suffix("-----")
}

/// The bytes of the key `name`, which begins in the line `first`.
fn body<'a>(
    name: &str,
    first: usize,
    lines: &mut impl Iterator<Item = (usize, &'a str)>,
) -> Result<Zeroizing<Vec<u8>>, PemError> {
    // Room for all of it from the start: a vector that grows leaves its old bytes behind.
    let mut der = Zeroizing::new(Vec::with_capacity(DER_BYTES_MAX));
    let mut decoder = Decoder::default();
    for (number, line) in lines {
        let wrong = PemError::Line { line: number };
        if let Some(end) = label(line, "-----END ") {
            return (end == name && decoder.is_whole()).then_some(der).ok_or(wrong);
        }
        for character in line.bytes() {
            if let Some(byte) = decoder.take(character).map_err(|Wrong| wrong)? {
                if der.len() == DER_BYTES_MAX {
                    return Err(PemError::Long { line: first });
                }
                der.push(byte);
            }
        }
    }
    Err(PemError::Open { line: first })
}

/// Base64 (RFC 4648, 4), a character at a time.
#[derive(Default)]
struct Decoder {
    /// What is no whole byte yet.
    bits: u32,
    bit_count: u32,
    characters: usize,
    padding: usize,
}

struct Wrong;

impl Decoder {
    fn take(&mut self, character: u8) -> Result<Option<u8>, Wrong> {
        self.characters += 1;
        if character == b'=' {
            self.padding += 1;
            return Ok(None);
        }
        let value = ALPHABET.iter().position(|known| *known == character);
        let value = value.filter(|_| self.padding == 0).ok_or(Wrong)?;
        self.bits = self.bits << 6 | u32::try_from(value).map_err(|_| Wrong)?;
        self.bit_count += 6;
        if self.bit_count < 8 {
            return Ok(None);
        }
        self.bit_count -= 8;
        let byte = self.bits >> self.bit_count;
        self.bits &= (1 << self.bit_count) - 1;
        u8::try_from(byte).map(Some).map_err(|_| Wrong)
    }

    /// Whether what was taken is whole, and written as it has to be.
    fn is_whole(&self) -> bool {
        self.characters.is_multiple_of(4) && self.padding <= 2 && self.bits == 0 && self.bit_count < 6
    }
}

/// `bytes` in Base64.
pub(super) fn encoded(bytes: &[u8]) -> String {
    let of_three = |three: &[u8]| {
        let mut padded = [0; 4];
        for (to, from) in padded.iter_mut().skip(1).zip(three) {
            *to = *from;
        }
        let bits = u32::from_be_bytes(padded);
        (0..4)
            .map(move |place| (bits, place))
            .map(|(bits, place)| bits >> (18 - 6 * place) & 63)
    };
    let mut text = String::new();
    for three in bytes.chunks(3) {
        let values = of_three(three).take(three.len() + 1);
        text.extend(
            values.filter_map(|value| Some(char::from(*ALPHABET.get(usize::try_from(value).ok()?)?))),
        );
        text.extend(std::iter::repeat_n('=', 3 - three.len()));
    }
    text
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

    use proptest::prelude::*;

    use super::*;

    fn only(text: &str) -> Result<Vec<u8>, PemError> {
        let mut blocks = blocks(text.as_bytes())?;
        assert_eq!(blocks.len(), 1);
        Ok(blocks.pop().unwrap().der.to_vec())
    }

    proptest! {
        #[test]
        fn what_was_encoded_is_read_back(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let text = format!("# mine\n-----BEGIN A KEY-----\n{}\n-----END A KEY-----\n", encoded(&bytes));
            prop_assert_eq!(only(&text).unwrap(), bytes);
        }

        #[test]
        fn no_text_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = blocks(&bytes);
            let _ = blocks(&[b"-----BEGIN A-----\n".as_slice(), &bytes, b"\n-----END A-----\n"].concat());
        }
    }

    #[test]
    fn base64_is_that_of_the_standard() {
        for (bytes, text) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(encoded(bytes.as_bytes()), text);
        }
    }

    #[test]
    fn what_is_no_key_is_told_by_its_line() {
        let of = |body: &str| only(&format!("-----BEGIN K-----\n{body}")).unwrap_err();
        assert_eq!(of("Zm9v"), PemError::Open { line: 1 });
        assert_eq!(of("Zm9v\n-----END L-----"), PemError::Line { line: 3 });
        for body in ["Zm9", "Zg=", "Zh==", "Z===", "Zg==Zg==", "Zm9v-", "=Zg="] {
            let end = of(&format!("{body}\n-----END K-----"));
            assert!(matches!(end, PemError::Line { .. }), "{body}: {end}");
        }
        let long = of(&format!("{}\n-----END K-----", "Zm9v".repeat(50)));
        assert_eq!(long, PemError::Long { line: 1 });
        assert!(matches!(blocks(&[0xff]), Err(PemError::NotText)));
    }
}
