//! NFSv4.1 and 4.2 (RFC 8881, RFC 7862) as values: compounds, their operations and what answers them, in both directions.
//!
//! A client writes a [`Compound`] operation by operation and pulls the results out of a [`CompoundReply`] in the same order;
//! a server reads a [`CallCompound`] and answers it with a [`ReplyWriter`]. [`table`] has the operations, each with its
//! arguments and results. Payload is never copied on its way to or from a guest: [`Compound::write`] ends where the data
//! are to follow, and [`read_prefix`] says where those of a READ begin.

pub mod attributes;
mod call;
pub mod callback;
mod client;
mod compound;
mod file;
mod identity;
mod io;
mod prefix;
mod reply;
mod session;
mod state;
pub mod status;
pub mod table;

pub use attributes::{Attributes, Bitmap};
pub use call::{CallCompound, ReplyWriter};
pub use client::{ExchangeId, ExchangeIdResult, ImplementationId, StateProtect, Time};
pub use compound::{Compound, Operations};
pub use file::{
    Access, AccessResult, ChangeInfo, DirectoryEntry, GuardedName, Name, Readdir, ReaddirResult, Rename,
    RenameResult, SecInfo, SecInfoFlavors, SecInfoStyle, Setattr,
};
pub use identity::{ClientId, ClientOwner, FileHandle, SessionId, StateOwner, Stateid, Verifier};
pub use io::{
    Allocation, CloneRange, Commit, Content, Read, ReadPlusContent, ReadPlusResult, ReadResult, Seek,
    SeekResult, Stability, Write, WriteResult,
};
pub use prefix::{PREFIX_BYTES_MAX, ReadPayload, ReadPrefix, read_prefix};
pub use reply::{CompoundReply, MalformedReply, ReplyError};
pub use session::{
    BindConnToSession, BindConnToSessionResult, CallbackSecurity, ChannelAttributes, ChannelFromClient,
    ChannelFromServer, CreateSession, CreateSessionResult, Sequence, SequenceResult,
};
pub use state::{
    Close, CreateHow, Delegation, Lock, LockDenied, LockOwner, LockType, Locker, Locku, Open, OpenClaim,
    OpenHow, OpenResult, ShareAccess, ShareDeny, Stateids, Statuses, WhyNone,
};
pub use status::Status;
pub use table::{Arguments, Operation, Results};

/// The procedure that does nothing (RFC 8881, 16.1).
pub const PROCEDURE_NULL: u32 = 0;
/// The procedure that does everything (16.2).
pub const PROCEDURE_COMPOUND: u32 = 1;
/// The version of the program.
pub const VERSION: u32 = 4;
/// Longest tag of a compound that is read, in bytes; ours are empty, and an answer repeats them.
pub const TAG_BYTES_MAX: usize = 128;
/// Most operations of a compound that is read.
pub const OPERATIONS_MAX: usize = 32;
/// Longest name of an owner, in bytes (`NFS4_OPAQUE_LIMIT`).
pub const OWNER_BYTES_MAX: usize = 1024;
/// Most data of one READ or WRITE, in bytes.
pub const DATA_BYTES_MAX: usize = 1 << 24;

#[cfg(test)]
mod tests;
