//! Where programs are (RFC 1833, 3), and the handles of exports (RFC 1813, appendix I).

use std::fmt;

use super::{Answer, FileHandle};
use crate::nfs::xdr::{Reader, Writer, Xdr, XdrError, xdr_newtype, xdr_struct};

xdr_struct! {
    /// `mapping`: the arguments of GETPORT.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Mapping {
        /// Which program.
        pub program: u32,
        /// In which version.
        pub version: u32,
        /// Over which protocol: [`Mapping::TCP`].
        pub protocol: u32,
        /// 0.
        pub port: u32,
    }
}

impl Mapping {
    /// `IPPROTO_TCP`.
    pub const TCP: u32 = 6;

    /// Asks for a program over TCP.
    pub const fn of(program: u32, version: u32) -> Self {
        Self {
            program,
            version,
            protocol: Self::TCP,
            port: 0,
        }
    }
}

/// `dirpath`: the path of an export.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct MountPath(pub Vec<u8>);

impl MountPath {
    /// Longest path, in bytes (`MNTPATHLEN`).
    pub const BYTES_MAX: usize = 1024;
}

impl Xdr for MountPath {
    fn put(&self, writer: &mut Writer) {
        writer.opaque(&self.0);
    }

    fn read(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        Ok(Self(reader.opaque(Self::BYTES_MAX)?.to_vec()))
    }
}

/// `mountres3_ok`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountResult {
    /// The directory that is exported.
    pub handle: FileHandle,
    /// Flavors of credentials that are taken: 1 is `AUTH_SYS`. None: any.
    pub flavors: Vec<u32>,
}

const FLAVORS_MAX: usize = 64;

impl Xdr for MountResult {
    fn put(&self, writer: &mut Writer) {
        self.handle.put(writer);
        writer.array(&self.flavors);
    }

    fn read(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        Ok(Self {
            handle: Xdr::read(reader)?,
            flavors: reader.array(FLAVORS_MAX)?,
        })
    }
}

impl Answer<'_> for MountResult {
    type Status = MountStatus;

    const OK: MountStatus = MountStatus::OK;
}

xdr_newtype! {
    /// `mountstat3`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct MountStatus(pub u32);
}

impl MountStatus {
    /// Done.
    pub const OK: Self = Self(0);
    /// Not for this user.
    pub const PERM: Self = Self(1);
    /// There is no such directory.
    pub const NOENT: Self = Self(2);
    /// The directory is not exported, or not to this host.
    pub const ACCES: Self = Self(13);
    /// It is no directory.
    pub const NOTDIR: Self = Self(20);
}

impl fmt::Display for MountStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            0 => "MNT3_OK",
            1 => "MNT3ERR_PERM",
            2 => "MNT3ERR_NOENT",
            5 => "MNT3ERR_IO",
            13 => "MNT3ERR_ACCES",
            20 => "MNT3ERR_NOTDIR",
            22 => "MNT3ERR_INVAL",
            63 => "MNT3ERR_NAMETOOLONG",
            10_004 => "MNT3ERR_NOTSUPP",
            10_006 => "MNT3ERR_SERVERFAULT",
            other => return write!(f, "status {other}"),
        })
    }
}

/// `exports`: what a server exports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exports(pub Vec<Export>);

/// `exportnode`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// The directory.
    pub path: MountPath,
    /// To whom; nobody: to anybody.
    pub groups: Vec<Vec<u8>>,
}

/// Most exports that are read, and most groups of one.
const EXPORTS_MAX: usize = 4096;
const GROUP_BYTES_MAX: usize = 255;

impl Xdr for Exports {
    fn put(&self, writer: &mut Writer) {
        for export in &self.0 {
            writer.boolean(true);
            export.path.put(writer);
            for group in &export.groups {
                writer.boolean(true);
                writer.opaque(group);
            }
            writer.boolean(false);
        }
        writer.boolean(false);
    }

    fn read(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        let exports = list(reader, |reader| {
            Ok(Export {
                path: Xdr::read(reader)?,
                groups: list(reader, |reader| Ok(reader.opaque(GROUP_BYTES_MAX)?.to_vec()))?,
            })
        });
        Ok(Self(exports?))
    }
}

/// A linked list, each of whose elements says that there is one.
fn list<'a, T>(
    reader: &mut Reader<'a>,
    mut element: impl FnMut(&mut Reader<'a>) -> Result<T, XdrError>,
) -> Result<Vec<T>, XdrError> {
    let mut elements = Vec::new();
    while reader.boolean()? {
        if elements.len() == EXPORTS_MAX {
            return Err(XdrError::Long {
                len: u32::MAX,
                len_max: EXPORTS_MAX,
            });
        }
        elements.push(element(reader)?);
    }
    Ok(elements)
}
