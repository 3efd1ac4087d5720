//! Compounds as a server sees them: what it is asked for, and how it answers (RFC 8881, 16.2).

use super::{Arguments, Bitmap, LockDenied, OPERATIONS_MAX, Operation, Results, Status, TAG_BYTES_MAX};
use crate::nfs::xdr::{Reader, Reserved, Writer, Xdr, XdrError};

/// A compound that was received. Its data are those of the record that it was read from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallCompound<'a> {
    /// What the answer repeats.
    pub tag: &'a [u8],
    /// Of NFSv4.
    pub minor_version: u32,
    /// In their order. It ends with the first that is [`Arguments::Unknown`].
    pub operations: Vec<Arguments<'a>>,
}

impl<'a> CallCompound<'a> {
    /// Reads what stands behind the header of the call.
    ///
    /// # Errors
    ///
    /// Whatever the standard does not allow: `GARBAGE_ARGS` or `NFS4ERR_BADXDR` is to be answered.
    pub fn parse(arguments: &'a [u8]) -> Result<Self, XdrError> {
        let mut reader = Reader::new(arguments);
        let tag = reader.opaque(TAG_BYTES_MAX)?;
        let minor_version = reader.u32()?;
        let mut operations = Vec::new();
        for _ in 0..reader.len(OPERATIONS_MAX)? {
            let operation = Arguments::read(&mut reader)?;
            let is_unknown = matches!(operation, Arguments::Unknown(_));
            operations.push(operation);
            if is_unknown {
                return Ok(Self {
                    tag,
                    minor_version,
                    operations,
                });
            }
        }
        reader.end()?;
        Ok(Self {
            tag,
            minor_version,
            operations,
        })
    }
}

/// The answer to a compound that is being written behind the header of the reply.
#[derive(Debug)]
pub struct ReplyWriter<'a> {
    writer: &'a mut Writer,
    status_at: Reserved,
    status: Status,
    count_at: Reserved,
    count: u32,
}

impl<'a> ReplyWriter<'a> {
    /// Begins one. It is OK unless something fails.
    pub fn new(writer: &'a mut Writer, tag: &[u8]) -> Self {
        let status_at = writer.reserve();
        writer.opaque(tag);
        Self {
            status_at,
            status: Status::OK,
            count_at: writer.reserve(),
            writer,
            count: 0,
        }
    }

    /// The result of the next operation, which has succeeded.
    pub fn put(&mut self, results: &Results<'_>) {
        self.begin(results.operation().0, Status::OK);
        results.put(self.writer);
    }

    /// Ends the answer with an operation that has failed.
    pub fn failed(mut self, operation: Operation, status: Status) {
        self.begin(operation.0, status);
        if operation == Operation::SETATTR {
            // The only one that says something all the same: that nothing was set (18.30.2).
            Bitmap::EMPTY.put(self.writer);
        }
        self.finish();
    }

    /// Ends the answer with a LOCK that somebody else's lock does not allow.
    pub fn denied(mut self, denied: &LockDenied) {
        self.begin(Operation::LOCK.0, Status::DENIED);
        denied.put(self.writer);
        self.finish();
    }

    /// Ends the answer of a compound that is refused as a whole.
    pub fn refused(mut self, status: Status) {
        self.status = status;
        self.finish();
    }

    /// Ends the answer.
    pub fn finish(self) {
        self.writer.fill(self.status_at, self.status.0);
        self.writer.fill(self.count_at, self.count);
    }

    pub(super) fn begin(&mut self, operation: u32, status: Status) {
        self.count += 1;
        self.status = status;
        self.writer.u32(operation);
        status.put(self.writer);
    }

    pub(super) fn writer(&mut self) -> &mut Writer {
        self.writer
    }
}
