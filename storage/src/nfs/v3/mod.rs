//! NFSv3 (RFC 1813) as far as reading an image takes it, with the programs that tell where it is: in both directions.
//!
//! ```text
//! portmap GETPORT -> mount MNT -> NFS LOOKUP … -> FSINFO, GETATTR -> READ …
//! ```

mod mount;
mod nfs;
mod prefix;
mod status;

use super::xdr::{Reader, Wire, Writer, XdrError};

pub use mount::{Export, Exports, Mapping, MountPath, MountResult, MountStatus};
pub use nfs::{
    Attributes, FileHandle, FileType, Fsinfo, FsinfoResult, Lookup, LookupResult, Read, ReadResult, Time,
};
pub use prefix::{PREFIX_BYTES_MAX, ReadPayload, ReadPrefix, read_prefix};
pub use status::{Status, verdict};

/// The version of the program NFS.
pub const NFS_VERSION: u32 = 3;
/// That of the program MOUNT that goes with it.
pub const MOUNT_VERSION: u32 = 3;
/// That of the program that knows the ports (RFC 1833, 3).
pub const PORTMAP_VERSION: u32 = 2;
/// Its port.
pub const PORTMAP_PORT: u16 = 111;

/// Procedures of PORTMAP.
pub mod portmap_procedure {
    /// Which port a program has: a [`Mapping`](super::Mapping) is answered with a number, 0 where it has none.
    pub const GETPORT: u32 = 3;
}

/// Procedures of MOUNT.
pub mod mount_procedure {
    /// The handle of an export: a [`MountPath`](super::MountPath) is answered with a [`MountResult`](super::MountResult) or
    /// a [`MountStatus`](super::MountStatus).
    pub const MNT: u32 = 1;
    /// Takes that back.
    pub const UMNT: u32 = 3;
    /// All exports: answered with [`Exports`](super::Exports).
    pub const EXPORT: u32 = 5;
}

/// Procedures of NFS. Each is answered with its result or a [`Status`].
pub mod procedure {
    /// Nothing.
    pub const NULL: u32 = 0;
    /// The attributes of a file: a [`FileHandle`](super::FileHandle) is answered with [`Attributes`](super::Attributes).
    pub const GETATTR: u32 = 1;
    /// A file in a directory: [`Lookup`](super::Lookup) is answered with [`LookupResult`](super::LookupResult).
    pub const LOOKUP: u32 = 3;
    /// Bytes of a file: [`Read`](super::Read) is answered with [`ReadResult`](super::ReadResult).
    pub const READ: u32 = 6;
    /// What the server can do: a [`FileHandle`](super::FileHandle) is answered with [`FsinfoResult`](super::FsinfoResult).
    pub const FSINFO: u32 = 19;
}

/// What is answered with a status before it: its result, and what stands instead where it has failed.
pub trait Answer<'a>: Wire<'a> {
    /// The status.
    type Status: Copy + Eq + super::xdr::Xdr;
    /// The one with which a result comes.
    const OK: Self::Status;

    /// What stands behind any other.
    fn put_failure(_: &mut Writer) {}

    /// Reads the status and the result; everything behind the header of the reply.
    ///
    /// # Errors
    ///
    /// When they are not as the standard says.
    fn parse(results: &'a [u8]) -> Result<Result<Self, Self::Status>, XdrError> {
        let mut reader = Reader::new(results);
        let status = super::xdr::Xdr::read(&mut reader)?;
        if status != Self::OK {
            // What stands behind it says nothing that anybody asked for.
            return Ok(Err(status));
        }
        let result = Self::read_from(&mut reader)?;
        reader.end()?;
        Ok(Ok(result))
    }

    /// Writes the status and the result.
    fn answer(outcome: Result<&Self, Self::Status>, writer: &mut Writer) {
        match outcome {
            Ok(result) => {
                super::xdr::Xdr::put(&Self::OK, writer);
                result.write_to(writer);
            }
            Err(status) => {
                super::xdr::Xdr::put(&status, writer);
                Self::put_failure(writer);
            }
        }
    }
}

/// Reads arguments, or results that have no status before them: everything behind the header.
///
/// # Errors
///
/// When they are not as the standard says.
pub fn parse<'a, T: Wire<'a>>(bytes: &'a [u8]) -> Result<T, XdrError> {
    let mut reader = Reader::new(bytes);
    let value = T::read_from(&mut reader)?;
    reader.end()?;
    Ok(value)
}

#[cfg(test)]
mod tests;
