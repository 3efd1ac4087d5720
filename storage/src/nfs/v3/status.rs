//! What became of a procedure (RFC 1813, 2.6).

use std::fmt;

use crate::nfs::v4;
use crate::nfs::v4::status::Verdict;
use crate::nfs::xdr::xdr_newtype;

xdr_newtype! {
    /// `nfsstat3`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Status(pub u32);
}

macro_rules! statuses {
    ($($name:ident = $number:literal,)*) => {
        #[expect(missing_docs, reason = "each is what the standard says of its name")]
        impl Status {
            $(pub const $name: Self = Self($number);)*
        }

        impl fmt::Display for Status {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                if *self == Self::OK {
                    return f.write_str("NFS3_OK");
                }
                match *self {
                    $(Self::$name => f.write_str(concat!("NFS3ERR_", stringify!($name))),)*
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
    ACCES = 13,
    EXIST = 17,
    XDEV = 18,
    NODEV = 19,
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
    REMOTE = 71,
    BADHANDLE = 10_001,
    NOT_SYNC = 10_002,
    BAD_COOKIE = 10_003,
    NOTSUPP = 10_004,
    TOOSMALL = 10_005,
    SERVERFAULT = 10_006,
    BADTYPE = 10_007,
    JUKEBOX = 10_008,
}

/// What is to be done about a procedure that was answered with `status`: as about the same code of NFSv4, which has kept
/// them.
pub fn verdict(status: Status) -> Verdict {
    v4::status::verdict(v4::Status(status.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::Failure;

    #[test]
    fn codes_that_both_versions_have_are_the_same() {
        for (status, code, kind) in [
            (Status::OK, v4::Status::OK, Verdict::Good),
            (Status::JUKEBOX, v4::Status::DELAY, Verdict::Later),
            (Status::STALE, v4::Status::STALE, Verdict::FileLost),
            (
                Status::ACCES,
                v4::Status::ACCESS,
                Verdict::Failed(Failure::Host(libc::EACCES)),
            ),
        ] {
            assert_eq!((status.0, verdict(status)), (code.0, kind), "{status}");
        }
        assert_eq!(verdict(Status::REMOTE), Verdict::Failed(Failure::Host(libc::EIO)));
        assert_eq!(Status::JUKEBOX.to_string(), "NFS3ERR_JUKEBOX");
        assert_eq!(Status::OK.to_string(), "NFS3_OK");
    }
}
