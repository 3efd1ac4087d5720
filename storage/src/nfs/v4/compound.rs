//! The compounds that a client asks for, operation by operation (RFC 8881, 16.2).

use super::{Arguments, Operation, Stability, Stateid, Write};
use crate::nfs::xdr::{Reserved, Writer};

/// A compound that is being written behind the header of its call. The operations are methods of it, see
/// [`table`](super::table).
///
/// ```text
/// tag | minor version | number of operations | operation | arguments | operation | …
/// ```
#[derive(Debug)]
pub struct Compound<'a> {
    writer: &'a mut Writer,
    count_at: Reserved,
    count: u32,
}

impl<'a> Compound<'a> {
    /// Begins one.
    pub fn new(writer: &'a mut Writer, tag: &str, minor_version: u32) -> Self {
        writer.opaque(tag.as_bytes());
        writer.u32(minor_version);
        Self {
            count_at: writer.reserve(),
            writer,
            count: 0,
        }
    }

    /// WRITE of `data_len` bytes, as the last operation: they are to be sent behind what the writer has then, and
    /// [`padding_bytes`](crate::nfs::xdr::padding_bytes) of zeros behind them.
    pub fn write(mut self, stateid: Stateid, offset: u64, stability: Stability, data_len: u32) {
        self.begin(Operation::WRITE);
        Write::put_head(self.writer, stateid, offset, stability);
        self.writer.u32(data_len);
        self.finish();
    }

    /// Operations that were written before.
    pub fn append(&mut self, operations: &Operations) {
        self.count += operations.count;
        self.writer.append(operations.writer.bytes());
    }

    /// Ends it.
    pub fn finish(self) {
        self.writer.fill(self.count_at, self.count);
    }

    pub(super) fn begin(&mut self, operation: Operation) {
        self.count += 1;
        self.writer.u32(operation.0);
    }

    pub(super) fn writer(&mut self) -> &mut Writer {
        self.writer
    }
}

/// Operations with their arguments, in the order in which they are to be carried out, until it is known in which compound.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Operations {
    writer: Writer,
    count: u32,
}

impl Operations {
    /// None.
    pub fn new() -> Self {
        Self::default()
    }

    /// The same, and one more.
    #[must_use]
    pub fn then(mut self, arguments: &Arguments<'_>) -> Self {
        arguments.put(&mut self.writer);
        self.count += 1;
        self
    }
}
