//! Percent-encoding (RFC 3986, 2.1).

use std::fmt::{self, Write};

/// The text behind its escapes. `None` if one is broken, or hides what is no text or a control character.
pub(crate) fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, behind)) = rest.split_first() {
        rest = behind;
        if first == b'%' {
            let (escape, behind) = rest.split_first_chunk()?;
            bytes.push(escaped(*escape)?);
            rest = behind;
        } else {
            bytes.push(first);
        }
    }
    let decoded = String::from_utf8(bytes).ok()?;
    (!decoded.contains(char::is_control)).then_some(decoded)
}

/// Whether something is escaped that needs no escape.
pub(crate) fn has_needless_escapes(text: &str) -> bool {
    text.split('%').skip(1).any(|behind| {
        let escape = behind.as_bytes().first_chunk();
        escape
            .and_then(|escape| escaped(*escape))
            .is_some_and(|byte| is_unreserved(byte.into()))
    })
}

/// A text with escapes where something else would be meant.
pub(crate) struct Encoded<'a> {
    text: &'a str,
    kept: &'static str,
}

impl<'a> Encoded<'a> {
    /// A text in which every delimiter is escaped.
    pub(crate) fn name(text: &'a str) -> Self {
        Self { text, kept: "" }
    }

    /// A text behind the host, where some delimiters mean nothing.
    pub(crate) fn path(text: &'a str) -> Self {
        Self { text, kept: ":/" }
    }
}

impl fmt::Display for Encoded<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.text.chars() {
            if is_unreserved(c) || self.kept.contains(c) {
                f.write_char(c)?;
                continue;
            }
            for byte in c.encode_utf8(&mut [0; 4]).bytes() {
                write!(f, "%{byte:02X}")?;
            }
        }
        Ok(())
    }
}

fn is_unreserved(c: char) -> bool {
    c.is_ascii_alphanumeric() || "-._~".contains(c)
}

fn escaped(digits: [u8; 2]) -> Option<u8> {
    let [high, low] = digits.map(|digit| char::from(digit).to_digit(16));
    u8::try_from(high? << 4 | low?).ok()
}
