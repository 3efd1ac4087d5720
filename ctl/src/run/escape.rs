//! The key that speaks to `coraclectl` instead of the guest: Ctrl-A.
//!
//! ```text
//! Plain --(Ctrl-A)--> Escaped --(x)-------> Plain, stop
//!                        |-----(Ctrl-A)--> Plain, passes one Ctrl-A
//!                        `-----(other)---> Plain, passes both keys
//! ```

const CTRL_A: u8 = 0x01;

/// Whether the last key was Ctrl-A.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Escape {
    /// It was not.
    #[default]
    Plain,
    /// It was, and the next key says what it means.
    Escaped,
}

/// What keys are for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Keys {
    /// What the guest gets.
    pub(super) for_guest: Vec<u8>,
    /// How often the user has asked to stop the machine.
    pub(super) stops: usize,
}

impl Escape {
    /// Sorts the keys in `input`.
    pub(super) fn sort(&mut self, input: &[u8]) -> Keys {
        let mut keys = Keys::default();
        for &key in input {
            match (std::mem::take(self), key) {
                (Self::Plain, CTRL_A) => *self = Self::Escaped,
                (Self::Escaped, b'x' | b'X') => keys.stops += 1,
                (Self::Plain, _) | (Self::Escaped, CTRL_A) => keys.for_guest.push(key),
                (Self::Escaped, _) => keys.for_guest.extend([CTRL_A, key]),
            }
        }
        keys
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sorted(reads: &[&[u8]]) -> (Vec<u8>, usize) {
        let mut escape = Escape::default();
        let keys: Vec<Keys> = reads.iter().map(|input| escape.sort(input)).collect();
        let for_guest = keys.iter().flat_map(|keys| keys.for_guest.clone()).collect();
        (for_guest, keys.iter().map(|keys| keys.stops).sum())
    }

    #[test]
    fn the_guest_gets_every_key_but_the_escape() {
        assert_eq!(sorted(&[b"ls\r\x03\x04"]), (b"ls\r\x03\x04".to_vec(), 0));
        assert_eq!(sorted(&[b"a\x01\x01b"]), (b"a\x01b".to_vec(), 0));
        assert_eq!(sorted(&[b"a\x01cb"]), (b"a\x01cb".to_vec(), 0));
    }

    #[test]
    fn the_escape_works_across_reads_and_twice() {
        assert_eq!(sorted(&[b"a\x01", b"xb"]), (b"ab".to_vec(), 1));
        assert_eq!(sorted(&[b"\x01x\x01X"]), (Vec::new(), 2));
        assert_eq!(sorted(&[b"x\x01"]), (b"x".to_vec(), 0));
    }
}
