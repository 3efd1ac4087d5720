//! What a server answers to a compound, result by result (RFC 8881, 16.2.4).

use super::{LockDenied, OPERATIONS_MAX, Operation, Results, Status, TAG_BYTES_MAX};
use crate::nfs::xdr::{Reader, Wire, Xdr, XdrError};

/// The answer to a compound, whose results are pulled in the order in which they were asked for. The pulls are methods of
/// it, see [`table`](super::table).
///
/// ```text
/// status | tag | number of results | operation | status | result | operation | …
/// ```
#[derive(Clone, Debug)]
pub struct CompoundReply<'a> {
    status: Status,
    left: usize,
    reader: Reader<'a>,
}

/// Why there is no result.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReplyError {
    /// The operation was not done.
    #[error("the server answered {operation} with {status}")]
    Status {
        /// Which one.
        operation: Operation,
        /// Why.
        status: Status,
    },
    /// LOCK was not done: somebody else has a lock.
    #[error("the server answered LOCK with {}: bytes from {} on are locked", Status::DENIED, .0.offset)]
    Denied(LockDenied),
    /// The answer is none to what was asked.
    #[error("the server's answer is not as the standard says")]
    Malformed(#[from] MalformedReply),
}

impl ReplyError {
    /// What the server says, if it says something.
    pub const fn status(&self) -> Option<Status> {
        match self {
            Self::Status { status, .. } => Some(*status),
            Self::Denied(_) => Some(Status::DENIED),
            Self::Malformed(_) => None,
        }
    }
}

/// What is wrong with an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MalformedReply {
    /// It is not written as it should.
    #[error(transparent)]
    Xdr(#[from] XdrError),
    /// It answers something else.
    #[error("{found} was answered where {expected} was asked for")]
    Operation {
        /// What was asked for.
        expected: Operation,
        /// What was answered.
        found: Operation,
    },
    /// It ends without an error before everything is answered.
    #[error("{0} was not answered")]
    Missing(Operation),
    /// An operation has failed, and the compound has not.
    #[error("{0} has failed, and its compound has another status")]
    Inconsistent(Operation),
}

impl From<XdrError> for ReplyError {
    fn from(error: XdrError) -> Self {
        Self::Malformed(error.into())
    }
}

impl<'a> CompoundReply<'a> {
    /// Reads what stands before the results; `results` is everything behind the header of the reply.
    ///
    /// # Errors
    ///
    /// When that is not as the standard says.
    pub fn parse(results: &'a [u8]) -> Result<Self, XdrError> {
        Self::of_reader(Reader::new(results))
    }

    pub(super) fn of_reader(mut reader: Reader<'a>) -> Result<Self, XdrError> {
        let status = Xdr::read(&mut reader)?;
        reader.opaque(TAG_BYTES_MAX)?;
        Ok(Self {
            status,
            left: reader.len(OPERATIONS_MAX)?,
            reader,
        })
    }

    /// What became of the compound: the status of the last operation that was tried.
    pub const fn status(&self) -> Status {
        self.status
    }

    /// The next result, whatever was asked for; `None` behind the last.
    ///
    /// # Errors
    ///
    /// What the server says instead, or that it says nothing of the kind.
    pub fn results(&mut self) -> Result<Option<Results<'a>>, ReplyError> {
        if self.left == 0 {
            self.reader.end()?;
            return Ok(None);
        }
        let found = Operation(self.reader.clone().u32()?);
        match Results::pull(found, self)? {
            Some(results) => Ok(Some(results)),
            None => {
                // Only an error can be understood of an operation that nobody here knows.
                self.begin(found)?;
                Err(MalformedReply::Missing(found).into())
            }
        }
    }

    /// Nothing is left to be pulled.
    ///
    /// # Errors
    ///
    /// When something is.
    pub fn end(&self) -> Result<(), ReplyError> {
        match self.left {
            0 => Ok(self.reader.end()?),
            left => Err(XdrError::Trailing(left).into()),
        }
    }

    /// Reads what stands before the result of the operation that was asked for next.
    pub(super) fn begin(&mut self, expected: Operation) -> Result<(), ReplyError> {
        let Some(left) = self.left.checked_sub(1) else {
            // A compound that is refused as a whole may have no results at all.
            return Err(match self.status {
                Status::OK => MalformedReply::Missing(expected).into(),
                status => ReplyError::Status {
                    operation: expected,
                    status,
                },
            });
        };
        self.left = left;
        let found = Operation(self.reader.u32()?);
        let status: Status = self.wire()?;
        if found != expected && !(found == Operation::ILLEGAL && status != Status::OK) {
            return Err(MalformedReply::Operation { expected, found }.into());
        }
        if status == Status::OK {
            return Ok(());
        }
        if status != self.status || left != 0 {
            return Err(MalformedReply::Inconsistent(expected).into());
        }
        if (found, status) == (Operation::LOCK, Status::DENIED) {
            return Err(ReplyError::Denied(self.wire()?));
        }
        Err(ReplyError::Status {
            operation: expected,
            status,
        })
    }

    pub(super) fn wire<T: Wire<'a>>(&mut self) -> Result<T, XdrError> {
        T::read_from(&mut self.reader)
    }

    /// How many results have not been pulled.
    pub(super) const fn left(&self) -> usize {
        self.left
    }

    pub(super) const fn reader(&self) -> &Reader<'a> {
        &self.reader
    }
}
