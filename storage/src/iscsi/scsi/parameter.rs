//! Parameter data as a unit sends them: big-endian fields at the offsets of the standard's tables.

/// Why parameter data say nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParameterError {
    /// Too little to be read.
    #[error("the unit's {what} end after {bytes} bytes, before all that is needed was said")]
    Short {
        /// What was read.
        what: &'static str,
        /// How much of it there is.
        bytes: usize,
    },
    /// The answer to another question.
    #[error(
        "the unit was asked for page {expected:#04x} of its vital product data and sent page {found:#04x}"
    )]
    OtherPage {
        /// The one that was asked for.
        expected: u8,
        /// The one that came.
        found: u8,
    },
    /// A block that no device here can show.
    #[error("the unit has blocks of {0} bytes: only powers of two from 512 to 65536 can be used")]
    BlockBytes(u32),
    /// More bytes than a disk can have.
    #[error("the unit says that it has {blocks} blocks of {block_bytes} bytes, more than any disk can have")]
    Size {
        /// How many blocks.
        blocks: u128,
        /// As long as each is.
        block_bytes: u32,
    },
}

/// The bytes, with a name for errors.
#[derive(Clone, Copy)]
pub(super) struct Parameter<'a> {
    what: &'static str,
    bytes: &'a [u8],
}

impl<'a> Parameter<'a> {
    /// `what` names the data in the plural.
    pub(super) fn new(what: &'static str, bytes: &'a [u8]) -> Self {
        Self { what, bytes }
    }

    /// The same, without what lies from byte `len` on.
    pub(super) fn cut(self, len: usize) -> Self {
        Self {
            bytes: self.bytes.get(..len).unwrap_or(self.bytes),
            ..self
        }
    }

    /// What lies from byte `at` on; nothing if there is less.
    pub(super) fn rest(self, at: usize) -> &'a [u8] {
        self.bytes.get(at..).unwrap_or_default()
    }

    pub(super) fn u8(self, at: usize) -> Result<u8, ParameterError> {
        self.array(at).map(u8::from_be_bytes)
    }

    pub(super) fn u16(self, at: usize) -> Result<u16, ParameterError> {
        self.array(at).map(u16::from_be_bytes)
    }

    pub(super) fn u32(self, at: usize) -> Result<u32, ParameterError> {
        self.array(at).map(u32::from_be_bytes)
    }

    pub(super) fn u64(self, at: usize) -> Result<u64, ParameterError> {
        self.array(at).map(u64::from_be_bytes)
    }

    /// The bytes `at..at + len`.
    pub(super) fn slice(self, at: usize, len: usize) -> Result<&'a [u8], ParameterError> {
        self.rest(at).get(..len).ok_or(ParameterError::Short {
            what: self.what,
            bytes: self.bytes.len(),
        })
    }

    fn array<const N: usize>(self, at: usize) -> Result<[u8; N], ParameterError> {
        let bytes = self.slice(at, N)?;
        Ok(bytes.try_into().expect("the slice has the length of the array"))
    }
}

/// A length of 32 bits that a unit has sent, for comparison with what is there.
pub(super) fn len(bytes: u32) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

/// Text of a fixed width (SPC-4, 4.3.1), without what fills it up; what cannot be printed becomes a question mark.
pub(super) fn text(bytes: &[u8]) -> String {
    let printable = |&byte: &u8| match byte {
        b' '..=b'~' => char::from(byte),
        _ => '?',
    };
    let end = bytes
        .iter()
        .rposition(|byte| *byte != 0)
        .map_or(0, |last| last + 1);
    let text: String = bytes.iter().take(end).map(printable).collect();
    text.trim().to_owned()
}
