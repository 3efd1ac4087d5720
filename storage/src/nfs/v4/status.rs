//! What became of an operation (RFC 8881, 15; RFC 7862, 11), and the one table that says what is to be done.
//!
//! [`verdict`] is the only place that looks at codes. Whoever sent the operation knows the kinds.

use std::fmt;

use crate::nfs::xdr::xdr_newtype;
use crate::request::Failure;

xdr_newtype! {
    /// `nfsstat4`. Its constants have the names of the standard, without `NFS4ERR_`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Status(pub u32);
}

macro_rules! statuses {
    ($($name:ident = $number:literal,)*) => {
        #[expect(missing_docs, reason = "each is what the standard says of its name")]
        impl Status {
            $(pub const $name: Self = Self($number);)*

            /// All of them.
            #[cfg(test)]
            pub(super) const ALL: &'static [Self] = &[$(Self::$name,)*];
        }

        impl fmt::Display for Status {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                if *self == Self::OK {
                    return f.write_str("NFS4_OK");
                }
                match *self {
                    $(Self::$name => f.write_str(concat!("NFS4ERR_", stringify!($name))),)*
                    Self(other) => write!(f, "status {other}"),
                }
            }
        }
    };
}

statuses! {
    OK = 0,
    PERM = 1,
    NOENT = 2,
    IO = 5,
    NXIO = 6,
    ACCESS = 13,
    EXIST = 17,
    XDEV = 18,
    NOTDIR = 20,
    ISDIR = 21,
    INVAL = 22,
    FBIG = 27,
    NOSPC = 28,
    ROFS = 30,
    MLINK = 31,
    NAMETOOLONG = 63,
    NOTEMPTY = 66,
    DQUOT = 69,
    STALE = 70,
    BADHANDLE = 10_001,
    BAD_COOKIE = 10_003,
    NOTSUPP = 10_004,
    TOOSMALL = 10_005,
    SERVERFAULT = 10_006,
    BADTYPE = 10_007,
    DELAY = 10_008,
    SAME = 10_009,
    DENIED = 10_010,
    EXPIRED = 10_011,
    LOCKED = 10_012,
    GRACE = 10_013,
    FHEXPIRED = 10_014,
    SHARE_DENIED = 10_015,
    WRONGSEC = 10_016,
    CLID_INUSE = 10_017,
    RESOURCE = 10_018,
    MOVED = 10_019,
    NOFILEHANDLE = 10_020,
    MINOR_VERS_MISMATCH = 10_021,
    STALE_CLIENTID = 10_022,
    STALE_STATEID = 10_023,
    OLD_STATEID = 10_024,
    BAD_STATEID = 10_025,
    BAD_SEQID = 10_026,
    NOT_SAME = 10_027,
    LOCK_RANGE = 10_028,
    SYMLINK = 10_029,
    RESTOREFH = 10_030,
    LEASE_MOVED = 10_031,
    ATTRNOTSUPP = 10_032,
    NO_GRACE = 10_033,
    RECLAIM_BAD = 10_034,
    RECLAIM_CONFLICT = 10_035,
    BADXDR = 10_036,
    LOCKS_HELD = 10_037,
    OPENMODE = 10_038,
    BADOWNER = 10_039,
    BADCHAR = 10_040,
    BADNAME = 10_041,
    BAD_RANGE = 10_042,
    LOCK_NOTSUPP = 10_043,
    OP_ILLEGAL = 10_044,
    DEADLOCK = 10_045,
    FILE_OPEN = 10_046,
    ADMIN_REVOKED = 10_047,
    CB_PATH_DOWN = 10_048,
    BADIOMODE = 10_049,
    BADLAYOUT = 10_050,
    BAD_SESSION_DIGEST = 10_051,
    BADSESSION = 10_052,
    BADSLOT = 10_053,
    COMPLETE_ALREADY = 10_054,
    CONN_NOT_BOUND_TO_SESSION = 10_055,
    DELEG_ALREADY_WANTED = 10_056,
    BACK_CHAN_BUSY = 10_057,
    LAYOUTTRYLATER = 10_058,
    LAYOUTUNAVAILABLE = 10_059,
    NOMATCHING_LAYOUT = 10_060,
    RECALLCONFLICT = 10_061,
    UNKNOWN_LAYOUTTYPE = 10_062,
    SEQ_MISORDERED = 10_063,
    SEQUENCE_POS = 10_064,
    REQ_TOO_BIG = 10_065,
    REP_TOO_BIG = 10_066,
    REP_TOO_BIG_TO_CACHE = 10_067,
    RETRY_UNCACHED_REP = 10_068,
    UNSAFE_COMPOUND = 10_069,
    TOO_MANY_OPS = 10_070,
    OP_NOT_IN_SESSION = 10_071,
    HASH_ALG_UNSUPP = 10_072,
    CLIENTID_BUSY = 10_074,
    PNFS_IO_HOLE = 10_075,
    SEQ_FALSE_RETRY = 10_076,
    BAD_HIGH_SLOT = 10_077,
    DEADSESSION = 10_078,
    ENCR_ALG_UNSUPP = 10_079,
    PNFS_NO_LAYOUT = 10_080,
    NOT_ONLY_OP = 10_081,
    WRONG_CRED = 10_082,
    WRONG_TYPE = 10_083,
    DIRDELEG_UNAVAIL = 10_084,
    REJECT_DELEG = 10_085,
    RETURNCONFLICT = 10_086,
    DELEG_REVOKED = 10_087,
    PARTNER_NOTSUPP = 10_088,
    PARTNER_NO_AUTH = 10_089,
    UNION_NOTSUPP = 10_090,
    OFFLOAD_DENIED = 10_091,
    WRONG_LFS = 10_092,
    BADLABEL = 10_093,
    OFFLOAD_NO_REQS = 10_094,
}

/// What is to be done about an operation that was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is done.
    Good,
    /// It was not done and may be sent again after a while.
    Later,
    /// It was not done: the server has restarted, and what was held before is to be reclaimed first.
    Grace,
    /// The session, or this connection's part in it, is not what it was: bind or make anew, then replay as the slots say.
    SessionLost,
    /// The server does not know the client: EXCHANGE_ID, and reclaim.
    ClientLost,
    /// It does not know the open or the lock, or has given it to others. Look whose the image is before opening anew.
    StateLost,
    /// There is nothing to reclaim, or no longer: the same.
    NoGrace,
    /// Another one has the image.
    Denied,
    /// The file is not there, or is another one.
    FileLost,
    /// It was not done, and a second time would not help.
    Failed(Failure),
}

/// What is to be done about an operation that was answered with `status`. This is the one table of codes.
pub fn verdict(status: Status) -> Verdict {
    match status {
        // The latter is the answer to a RECLAIM_COMPLETE that was sent twice.
        Status::OK | Status::COMPLETE_ALREADY => Verdict::Good,
        Status::DELAY
        | Status::RESOURCE
        | Status::LAYOUTTRYLATER
        | Status::BACK_CHAN_BUSY
        | Status::CLIENTID_BUSY => Verdict::Later,
        Status::GRACE => Verdict::Grace,
        Status::BADSESSION
        | Status::DEADSESSION
        | Status::CONN_NOT_BOUND_TO_SESSION
        | Status::BADSLOT
        | Status::BAD_HIGH_SLOT
        | Status::SEQ_MISORDERED
        | Status::SEQ_FALSE_RETRY
        | Status::RETRY_UNCACHED_REP => Verdict::SessionLost,
        Status::STALE_CLIENTID => Verdict::ClientLost,
        Status::BAD_STATEID
        | Status::OLD_STATEID
        | Status::STALE_STATEID
        | Status::EXPIRED
        | Status::ADMIN_REVOKED
        | Status::DELEG_REVOKED => Verdict::StateLost,
        Status::NO_GRACE | Status::RECLAIM_BAD | Status::RECLAIM_CONFLICT => Verdict::NoGrace,
        Status::SHARE_DENIED | Status::DENIED | Status::LOCKED | Status::LOCK_NOTSUPP => Verdict::Denied,
        Status::STALE | Status::FHEXPIRED | Status::NOENT => Verdict::FileLost,
        _ => Verdict::Failed(failure(status)),
    }
}

fn failure(status: Status) -> Failure {
    Failure::Host(match status {
        Status::ROFS => return Failure::ReadOnly,
        Status::NOTSUPP | Status::UNION_NOTSUPP | Status::OP_ILLEGAL => return Failure::Unsupported,
        Status::PERM => libc::EPERM,
        Status::ACCESS | Status::WRONGSEC | Status::WRONG_CRED => libc::EACCES,
        Status::OPENMODE => libc::EBADF,
        // Another user has the same owner, or somebody has what is to be removed.
        Status::CLID_INUSE | Status::FILE_OPEN => libc::EBUSY,
        Status::BADHANDLE => libc::ESTALE,
        Status::NXIO => libc::ENXIO,
        Status::EXIST => libc::EEXIST,
        Status::XDEV => libc::EXDEV,
        Status::NOTDIR => libc::ENOTDIR,
        Status::ISDIR => libc::EISDIR,
        Status::INVAL | Status::BAD_RANGE => libc::EINVAL,
        Status::FBIG => libc::EFBIG,
        Status::NOSPC => libc::ENOSPC,
        Status::DQUOT => libc::EDQUOT,
        Status::MLINK => libc::EMLINK,
        Status::NAMETOOLONG => libc::ENAMETOOLONG,
        Status::NOTEMPTY => libc::ENOTEMPTY,
        Status::SYMLINK => libc::ELOOP,
        _ => libc::EIO,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_status_has_its_name_and_number() {
        for (status, name, number) in [
            (Status::OK, "NFS4_OK", 0),
            (Status::DELAY, "NFS4ERR_DELAY", 10_008),
            (Status::GRACE, "NFS4ERR_GRACE", 10_013),
            (Status::SHARE_DENIED, "NFS4ERR_SHARE_DENIED", 10_015),
            (Status::BAD_STATEID, "NFS4ERR_BAD_STATEID", 10_025),
            (Status::OP_ILLEGAL, "NFS4ERR_OP_ILLEGAL", 10_044),
            (Status::BADSESSION, "NFS4ERR_BADSESSION", 10_052),
            (Status::SEQ_MISORDERED, "NFS4ERR_SEQ_MISORDERED", 10_063),
            (Status::DEADSESSION, "NFS4ERR_DEADSESSION", 10_078),
            (Status::DELEG_REVOKED, "NFS4ERR_DELEG_REVOKED", 10_087),
            (Status::OFFLOAD_NO_REQS, "NFS4ERR_OFFLOAD_NO_REQS", 10_094),
        ] {
            assert_eq!((status.to_string().as_str(), status.0), (name, number));
        }
        assert_eq!(Status(99).to_string(), "status 99");
        let mut numbers: Vec<u32> = Status::ALL.iter().map(|status| status.0).collect();
        assert!(numbers.is_sorted(), "as the standard has them");
        numbers.dedup();
        assert_eq!(numbers.len(), Status::ALL.len());
    }

    #[test]
    fn only_what_is_done_is_good_and_what_nobody_knows_has_failed() {
        for status in Status::ALL {
            let is_done = [Status::OK, Status::COMPLETE_ALREADY].contains(status);
            assert_eq!(verdict(*status) == Verdict::Good, is_done, "{status}");
        }
        assert_eq!(verdict(Status(99)), Verdict::Failed(Failure::Host(libc::EIO)));
    }

    #[test]
    fn each_code_has_its_kind() {
        for (status, kind) in [
            (Status::DELAY, Verdict::Later),
            (Status::GRACE, Verdict::Grace),
            (Status::BADSESSION, Verdict::SessionLost),
            (Status::SEQ_MISORDERED, Verdict::SessionLost),
            (Status::STALE_CLIENTID, Verdict::ClientLost),
            (Status::EXPIRED, Verdict::StateLost),
            (Status::NO_GRACE, Verdict::NoGrace),
            (Status::SHARE_DENIED, Verdict::Denied),
            (Status::NOENT, Verdict::FileLost),
            (Status::NOSPC, Verdict::Failed(Failure::Host(libc::ENOSPC))),
            (Status::ROFS, Verdict::Failed(Failure::ReadOnly)),
            (Status::NOTSUPP, Verdict::Failed(Failure::Unsupported)),
        ] {
            assert_eq!(verdict(status), kind, "{status}");
        }
    }
}
