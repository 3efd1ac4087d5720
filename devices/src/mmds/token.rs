//! Session tokens: an end and a number, and a sum that only this process can make. Nothing is kept of those that were given out.

use std::fmt::Write as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ring::hmac;
use ring::rand::SystemRandom;

/// When it ends, in seconds, and its number.
const CLAIM_BYTES: usize = 16;
const TAG_BYTES: usize = 32;
const TOKEN_BYTES: usize = CLAIM_BYTES + TAG_BYTES;

/// Longest life of a token, in seconds: six hours.
pub(super) const TTL_S_MAX: u32 = 21_600;

/// Who makes tokens and knows them again.
#[derive(Debug)]
pub(super) struct Tokens {
    key: hmac::Key,
    made: u64,
}

impl Tokens {
    pub(super) fn new() -> Self {
        let key = hmac::Key::generate(hmac::HMAC_SHA256, &SystemRandom::new());
        Self {
            key: key.expect("the kernel has random bytes once it has booted"),
            made: 0,
        }
    }

    /// One that is good for so long.
    pub(super) fn make(&mut self, ttl: Duration, now: SystemTime) -> String {
        let end_s = seconds(now).saturating_add(ttl.as_secs());
        self.made += 1;
        let claim = [end_s.to_be_bytes(), self.made.to_be_bytes()].concat();
        let tag = hmac::sign(&self.key, &claim);
        let mut token = String::with_capacity(2 * TOKEN_BYTES);
        for byte in claim.iter().chain(tag.as_ref()) {
            write!(token, "{byte:02x}").expect("a string takes all");
        }
        token
    }

    /// Whether it is one of these, and not over.
    pub(super) fn knows(&self, token: &str, now: SystemTime) -> bool {
        let Some(bytes) = bytes(token) else {
            return false;
        };
        let (claim, tag) = bytes.split_at(CLAIM_BYTES);
        let end_s = claim.first_chunk().copied().map_or(0, u64::from_be_bytes);
        hmac::verify(&self.key, claim, tag).is_ok() && seconds(now) < end_s
    }
}

fn seconds(at: SystemTime) -> u64 {
    at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn bytes(token: &str) -> Option<[u8; TOKEN_BYTES]> {
    let mut bytes = [0; TOKEN_BYTES];
    let digits = token.as_bytes();
    if digits.len() != 2 * TOKEN_BYTES || !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn a_token_is_known_until_its_end_and_to_nobody_else() {
        let (mut tokens, others) = (Tokens::new(), Tokens::new());
        let now = SystemTime::now();
        let token = tokens.make(MINUTE, now);
        assert_ne!(token, tokens.make(MINUTE, now));
        assert!(tokens.knows(&token, now));
        assert!(!tokens.knows(&token, now + MINUTE));
        assert!(!others.knows(&token, now));
    }

    #[test]
    fn what_was_changed_is_no_token() {
        let mut tokens = Tokens::new();
        let now = SystemTime::now();
        let token = tokens.make(MINUTE, now);
        for at in 0..token.len() {
            let mut wrong = token.clone();
            let digit = if wrong.get(at..=at) == Some("0") { "1" } else { "0" };
            wrong.replace_range(at..=at, digit);
            assert!(!tokens.knows(&wrong, now), "{wrong}");
        }
        for wrong in ["", "+1", "é", token.get(2..).unwrap_or_default()] {
            assert!(!tokens.knows(wrong, now));
        }
    }
}
