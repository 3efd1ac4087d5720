//! The arguments and results of opens and locks (RFC 8881, 18.2, 18.10, 18.12, 18.16 and 18.48).

mod open;

use super::{StateOwner, Stateid, Status};
use crate::nfs::xdr::{Reader, Writer, Xdr, XdrError, xdr_enum, xdr_struct};

pub use open::{
    CreateHow, Delegation, Open, OpenClaim, OpenHow, OpenResult, ShareAccess, ShareDeny, WhyNone,
};

xdr_struct! {
    /// `CLOSE4args`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Close {
        /// Not looked at.
        pub seqid: u32,
        /// The open.
        pub open_stateid: Stateid,
    }
}

xdr_enum! {
    /// `nfs_lock_type4`.
    pub enum LockType("nfs_lock_type4") {
        /// `READ_LT`: others may read.
        Read = 1,
        /// `WRITE_LT`: nobody may.
        Write = 2,
        /// `READW_LT`: the same; the client will ask again.
        ReadWaiting = 3,
        /// `WRITEW_LT`.
        WriteWaiting = 4,
    }
}

xdr_struct! {
    /// `LOCK4args`.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct Lock {
        /// What others may.
        pub lock_type: LockType,
        /// Whether it was held before the server restarted.
        pub reclaim: bool,
        /// From here on, in bytes.
        pub offset: u64,
        /// So far, in bytes; all ones: to the end, wherever that is.
        pub length: u64,
        /// Who.
        pub locker: Locker,
    }
}

/// `locker4`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Locker {
    /// An owner that has no lock of the file yet.
    New {
        /// Not looked at.
        open_seqid: u32,
        /// The open under which it locks.
        open_stateid: Stateid,
        /// Not looked at.
        lock_seqid: u32,
        /// Who.
        lock_owner: LockOwner,
    },
    /// One that has.
    Existing {
        /// The locks that it has.
        lock_stateid: Stateid,
        /// Not looked at.
        lock_seqid: u32,
    },
}

/// `lock_owner4`.
pub type LockOwner = StateOwner;

impl Xdr for Locker {
    fn put(&self, writer: &mut Writer) {
        match self {
            Self::New {
                open_seqid,
                open_stateid,
                lock_seqid,
                lock_owner,
            } => {
                writer.boolean(true);
                writer.u32(*open_seqid);
                open_stateid.put(writer);
                writer.u32(*lock_seqid);
                lock_owner.put(writer);
            }
            Self::Existing {
                lock_stateid,
                lock_seqid,
            } => {
                writer.boolean(false);
                lock_stateid.put(writer);
                writer.u32(*lock_seqid);
            }
        }
    }

    fn read(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        Ok(if reader.boolean()? {
            Self::New {
                open_seqid: reader.u32()?,
                open_stateid: Xdr::read(reader)?,
                lock_seqid: reader.u32()?,
                lock_owner: Xdr::read(reader)?,
            }
        } else {
            Self::Existing {
                lock_stateid: Xdr::read(reader)?,
                lock_seqid: reader.u32()?,
            }
        })
    }
}

xdr_struct! {
    /// `LOCK4denied`: the lock in the way.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct LockDenied {
        /// From here on, in bytes.
        pub offset: u64,
        /// So far, in bytes.
        pub length: u64,
        /// What others may.
        pub lock_type: LockType,
        /// Whose it is.
        pub owner: LockOwner,
    }
}

xdr_struct! {
    /// `LOCKU4args`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Locku {
        /// What others may.
        pub lock_type: LockType,
        /// Not looked at.
        pub seqid: u32,
        /// The locks.
        pub lock_stateid: Stateid,
        /// From here on, in bytes.
        pub offset: u64,
        /// So far, in bytes.
        pub length: u64,
    }
}

/// Most states of one TEST_STATEID.
const STATES_MAX: usize = 64;

/// `TEST_STATEID4args`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stateids(pub Vec<Stateid>);

impl Xdr for Stateids {
    fn put(&self, writer: &mut Writer) {
        writer.array(&self.0);
    }

    fn read(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        Ok(Self(reader.array(STATES_MAX)?))
    }
}

/// `TEST_STATEID4resok`: what is the matter with each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Statuses(pub Vec<Status>);

impl Xdr for Statuses {
    fn put(&self, writer: &mut Writer) {
        writer.array(&self.0);
    }

    fn read(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        Ok(Self(reader.array(STATES_MAX)?))
    }
}
