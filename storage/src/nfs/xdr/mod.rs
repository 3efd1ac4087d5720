//! External data representation (RFC 4506): what every field of RPC and NFS is written in.
//!
//! Whatever has a length of its own is read with a bound, and nothing is allocated for more than was received.

mod declare;

pub(super) use declare::{xdr_enum, xdr_newtype, xdr_struct};

/// Why bytes are not what they should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum XdrError {
    /// The bytes end in the middle of something.
    #[error("it ends too early")]
    Short,
    /// Something has more bytes or elements than any may have.
    #[error("it has something with {len} bytes or elements, where at most {len_max} are allowed")]
    Long {
        /// How many.
        len: u32,
        /// How many at most.
        len_max: usize,
    },
    /// A field with a value that the standard does not allow.
    #[error("its {field} is {value}, which is not allowed")]
    Value {
        /// What the standard calls the field.
        field: &'static str,
        /// What it said.
        value: u32,
    },
    /// Bytes behind the last field.
    #[error("it has {0} bytes too many")]
    Trailing(usize),
}

/// What can be written and read as it is. What is read is written as it was read.
pub trait Xdr: Sized {
    /// Writes it behind what there is.
    fn put(&self, writer: &mut Writer);

    /// Reads it from the front of what is left.
    ///
    /// # Errors
    ///
    /// Whatever the standard does not allow.
    fn read(reader: &mut Reader<'_>) -> Result<Self, XdrError>;
}

/// What can be written, and read from bytes that it goes on to borrow. Whatever is [`Xdr`] is this too.
pub trait Wire<'a>: Sized {
    /// Writes it behind what there is.
    fn write_to(&self, writer: &mut Writer);

    /// Reads it from the front of what is left.
    ///
    /// # Errors
    ///
    /// Whatever the standard does not allow.
    fn read_from(reader: &mut Reader<'a>) -> Result<Self, XdrError>;
}

impl<T: Xdr> Wire<'_> for T {
    fn write_to(&self, writer: &mut Writer) {
        Xdr::put(self, writer);
    }

    fn read_from(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        Xdr::read(reader)
    }
}

/// Zeros that follow opaque bytes up to the next multiple of four (3).
pub const fn padding_bytes(len: usize) -> usize {
    len.wrapping_neg() % UNIT_BYTES
}

const UNIT_BYTES: usize = 4;

/// Bytes that were received, and how far they have been read.
#[derive(Clone, Debug)]
pub struct Reader<'a> {
    rest: &'a [u8],
    read_bytes: usize,
}

impl<'a> Reader<'a> {
    /// A reader of all of `bytes`.
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self {
            rest: bytes,
            read_bytes: 0,
        }
    }

    /// How many bytes have been read.
    pub const fn read_bytes(&self) -> usize {
        self.read_bytes
    }

    /// What has not been read.
    pub const fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// Takes what is as long as `len` says.
    ///
    /// # Errors
    ///
    /// When there is less.
    pub fn take(&mut self, len: usize) -> Result<&'a [u8], XdrError> {
        let (taken, rest) = self.rest.split_at_checked(len).ok_or(XdrError::Short)?;
        self.rest = rest;
        self.read_bytes += len;
        Ok(taken)
    }

    /// Opaque data of a fixed length (4.9), with the padding.
    ///
    /// # Errors
    ///
    /// When there is less.
    pub fn fixed<const LEN: usize>(&mut self) -> Result<[u8; LEN], XdrError> {
        let taken = self.take(LEN)?;
        self.take(padding_bytes(LEN))?;
        let fixed = taken.try_into();
        Ok(fixed.expect("as many were taken as the array has"))
    }

    /// An unsigned integer (4.2).
    ///
    /// # Errors
    ///
    /// When there is less.
    pub fn u32(&mut self) -> Result<u32, XdrError> {
        Ok(u32::from_be_bytes(self.fixed()?))
    }

    /// An unsigned hyper integer (4.5).
    ///
    /// # Errors
    ///
    /// When there is less.
    pub fn u64(&mut self) -> Result<u64, XdrError> {
        Ok(u64::from_be_bytes(self.fixed()?))
    }

    /// A boolean (4.4).
    ///
    /// # Errors
    ///
    /// When it is neither.
    pub fn boolean(&mut self) -> Result<bool, XdrError> {
        match self.u32()? {
            0 => Ok(false),
            1 => Ok(true),
            value => Err(XdrError::Value {
                field: "boolean",
                value,
            }),
        }
    }

    /// The length of an array or of opaque data, of which there may be `len_max`.
    ///
    /// # Errors
    ///
    /// When it is larger.
    pub fn len(&mut self, len_max: usize) -> Result<usize, XdrError> {
        let len = self.u32()?;
        let bounded = usize::try_from(len).ok().filter(|len| *len <= len_max);
        bounded.ok_or(XdrError::Long { len, len_max })
    }

    /// Opaque data or a string of a variable length (4.10, 4.11), with the padding.
    ///
    /// # Errors
    ///
    /// When there is less, or it may not be so long.
    pub fn opaque(&mut self, len_max: usize) -> Result<&'a [u8], XdrError> {
        let len = self.len(len_max)?;
        let taken = self.take(len)?;
        self.take(padding_bytes(len))?;
        Ok(taken)
    }

    /// An array of a variable length (4.13).
    ///
    /// # Errors
    ///
    /// When an element is wrong, or there may not be so many.
    pub fn array<T: Xdr>(&mut self, len_max: usize) -> Result<Vec<T>, XdrError> {
        let len = self.len(len_max)?;
        (0..len).map(|_| T::read(self)).collect()
    }

    /// Optional data (4.19).
    ///
    /// # Errors
    ///
    /// When it is there and wrong.
    pub fn optional<T: Xdr>(&mut self) -> Result<Option<T>, XdrError> {
        self.boolean()?.then(|| T::read(self)).transpose()
    }

    /// Nothing is left.
    ///
    /// # Errors
    ///
    /// When something is.
    pub const fn end(&self) -> Result<(), XdrError> {
        match self.rest.len() {
            0 => Ok(()),
            len => Err(XdrError::Trailing(len)),
        }
    }
}

/// Bytes to be sent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Writer(Vec<u8>);

impl Writer {
    /// A writer that goes on behind `bytes`, whose allocation it uses.
    pub const fn behind(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }

    /// How many bytes there are.
    pub const fn len_bytes(&self) -> usize {
        self.0.len()
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// The bytes, for good.
    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    /// Bytes that are written as they are.
    pub fn append(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// An unsigned integer (4.2).
    pub fn u32(&mut self, value: u32) {
        self.0.extend_from_slice(&value.to_be_bytes());
    }

    /// An unsigned hyper integer (4.5).
    pub fn u64(&mut self, value: u64) {
        self.0.extend_from_slice(&value.to_be_bytes());
    }

    /// A boolean (4.4).
    pub fn boolean(&mut self, value: bool) {
        self.u32(u32::from(value));
    }

    /// A length.
    ///
    /// # Panics
    ///
    /// When it is one that no field can say: what is sent has bounds that are lower by far.
    pub fn len(&mut self, len: usize) {
        self.u32(u32::try_from(len).expect("what is sent is shorter than 4 GiB"));
    }

    /// Opaque data of a fixed length (4.9), with the padding.
    pub fn fixed(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
        self.pad(bytes.len());
    }

    /// Opaque data or a string of a variable length (4.10, 4.11), with the padding.
    pub fn opaque(&mut self, bytes: &[u8]) {
        self.len(bytes.len());
        self.fixed(bytes);
    }

    /// An array of a variable length (4.13).
    pub fn array<T: Xdr>(&mut self, elements: &[T]) {
        self.len(elements.len());
        for element in elements {
            element.put(self);
        }
    }

    /// Optional data (4.19).
    pub fn optional<T: Xdr>(&mut self, value: Option<&T>) {
        self.boolean(value.is_some());
        if let Some(value) = value {
            value.put(self);
        }
    }

    /// The padding of opaque data of that length.
    pub fn pad(&mut self, len: usize) {
        self.0.resize(self.0.len() + padding_bytes(len), 0);
    }

    /// Leaves room for a number that is known later.
    pub fn reserve(&mut self) -> Reserved {
        let at = self.0.len();
        self.u32(0);
        Reserved { at }
    }

    /// Writes that number.
    ///
    /// # Panics
    ///
    /// When the room is in another writer.
    pub fn fill(&mut self, reserved: Reserved, value: u32) {
        let room = self.0.get_mut(reserved.at..reserved.at + UNIT_BYTES);
        room.expect("a writer only grows")
            .copy_from_slice(&value.to_be_bytes());
    }

    /// How many bytes there are behind the room.
    pub const fn bytes_behind(&self, reserved: &Reserved) -> usize {
        self.0.len() - reserved.at - UNIT_BYTES
    }
}

/// Room for a number in a [`Writer`].
#[derive(Debug)]
pub struct Reserved {
    at: usize,
}

impl Xdr for () {
    fn put(&self, _: &mut Writer) {}

    fn read(_: &mut Reader<'_>) -> Result<Self, XdrError> {
        Ok(())
    }
}

impl Xdr for u32 {
    fn put(&self, writer: &mut Writer) {
        writer.u32(*self);
    }

    fn read(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        reader.u32()
    }
}

impl Xdr for u64 {
    fn put(&self, writer: &mut Writer) {
        writer.u64(*self);
    }

    fn read(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        reader.u64()
    }
}

impl Xdr for bool {
    fn put(&self, writer: &mut Writer) {
        writer.boolean(*self);
    }

    fn read(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        reader.boolean()
    }
}

impl<const LEN: usize> Xdr for [u8; LEN] {
    fn put(&self, writer: &mut Writer) {
        writer.fixed(self);
    }

    fn read(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        reader.fixed()
    }
}

impl<T: Xdr> Xdr for Option<T> {
    fn put(&self, writer: &mut Writer) {
        writer.optional(self.as_ref());
    }

    fn read(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        reader.optional()
    }
}

#[cfg(test)]
mod tests;
