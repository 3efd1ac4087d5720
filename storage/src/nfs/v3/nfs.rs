//! The arguments and results of the procedures (RFC 1813, 3.3).

use super::{Answer, Status};
use crate::nfs::v4::{self, Name};
use crate::nfs::xdr::{Reader, Wire, Writer, Xdr, XdrError, padding_bytes, xdr_enum, xdr_struct};

/// `nfs_fh3`: a file, in the server's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileHandle(v4::FileHandle);

impl FileHandle {
    /// Longest handle, in bytes (`NFS3_FHSIZE`).
    pub const BYTES_MAX: usize = 64;

    /// A handle of those bytes; `None` if they are too many.
    pub fn new(handle: &[u8]) -> Option<Self> {
        let is_one = handle.len() <= Self::BYTES_MAX;
        is_one.then(|| v4::FileHandle::new(handle).map(Self))?
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        self.0.bytes()
    }
}

impl Xdr for FileHandle {
    fn put(&self, writer: &mut Writer) {
        writer.opaque(self.bytes());
    }

    fn read(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        let handle = reader.opaque(Self::BYTES_MAX)?;
        Ok(Self::new(handle).expect("it was read with that bound"))
    }
}

xdr_enum! {
    /// `ftype3`.
    pub enum FileType("ftype3") {
        /// A file with bytes.
        Regular = 1,
        /// A directory.
        Directory = 2,
        /// A block device.
        Block = 3,
        /// A character device.
        Character = 4,
        /// A symbolic link.
        Link = 5,
        /// A socket.
        Socket = 6,
        /// A pipe.
        Fifo = 7,
    }
}

xdr_struct! {
    /// `nfstime3`.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Time {
        /// Since 1970.
        pub seconds: u32,
        /// And these.
        pub nseconds: u32,
    }
}

xdr_struct! {
    /// `fattr3`: the attributes of a file.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Attributes {
        /// What kind of file it is.
        pub file_type: FileType,
        /// Permission bits.
        pub mode: u32,
        /// How many names it has.
        pub nlink: u32,
        /// Whose it is.
        pub uid: u32,
        /// Whose group's it is.
        pub gid: u32,
        /// Length, in bytes.
        pub size: u64,
        /// Room that it takes, in bytes.
        pub used: u64,
        /// Which device it is.
        pub rdev: [u8; 8],
        /// Which file system it is in.
        pub fsid: u64,
        /// Which file of it.
        pub fileid: u64,
        /// When it was read.
        pub atime: Time,
        /// When its bytes changed.
        pub mtime: Time,
        /// When its attributes changed.
        pub ctime: Time,
    }
}

impl Answer<'_> for Attributes {
    type Status = Status;

    const OK: Status = Status::OK;
}

xdr_struct! {
    /// `LOOKUP3args`.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct Lookup {
        /// In which directory.
        pub directory: FileHandle,
        /// Which file.
        pub name: Name,
    }
}

xdr_struct! {
    /// `LOOKUP3resok`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct LookupResult {
        /// The file.
        pub handle: FileHandle,
        /// What it is like, if the server says that.
        pub attributes: Option<Attributes>,
        /// The same of the directory.
        pub directory_attributes: Option<Attributes>,
    }
}

/// No attributes of the file that it was about.
fn put_no_attributes(writer: &mut Writer) {
    writer.boolean(false);
}

impl Answer<'_> for LookupResult {
    type Status = Status;

    const OK: Status = Status::OK;

    fn put_failure(writer: &mut Writer) {
        put_no_attributes(writer);
    }
}

xdr_struct! {
    /// `READ3args`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Read {
        /// Of which file.
        pub handle: FileHandle,
        /// From here on, in bytes.
        pub offset: u64,
        /// So far at most, in bytes.
        pub count: u32,
    }
}

/// `READ3resok`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadResult<'a> {
    /// What the file is like, if the server says that.
    pub attributes: Option<Attributes>,
    /// Whether the file ends there.
    pub eof: bool,
    /// The bytes, which may be fewer than were asked for.
    pub data: &'a [u8],
}

/// What stands before the data of a READ.
pub(super) struct ReadHead {
    pub(super) attributes: Option<Attributes>,
    pub(super) eof: bool,
    pub(super) data_len: u32,
}

impl ReadHead {
    pub(super) fn read(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        let attributes = reader.optional()?;
        let count = reader.u32()?;
        let eof = reader.boolean()?;
        let data_len = reader.u32()?;
        if count != data_len {
            return Err(XdrError::Value {
                field: "count",
                value: count,
            });
        }
        Ok(Self {
            attributes,
            eof,
            data_len,
        })
    }
}

impl<'a> Wire<'a> for ReadResult<'a> {
    fn write_to(&self, writer: &mut Writer) {
        writer.optional(self.attributes.as_ref());
        writer.len(self.data.len());
        writer.boolean(self.eof);
        writer.opaque(self.data);
    }

    fn read_from(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
        let head = ReadHead::read(reader)?;
        let data_len = usize::try_from(head.data_len).unwrap_or(usize::MAX);
        let data = reader.take(data_len)?;
        reader.take(padding_bytes(data_len))?;
        Ok(Self {
            attributes: head.attributes,
            eof: head.eof,
            data,
        })
    }
}

impl<'a> Answer<'a> for ReadResult<'a> {
    type Status = Status;

    const OK: Status = Status::OK;

    fn put_failure(writer: &mut Writer) {
        put_no_attributes(writer);
    }
}

/// `FSINFO3args`: a file of the file system.
pub type Fsinfo = FileHandle;

xdr_struct! {
    /// `FSINFO3resok`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct FsinfoResult {
        /// What the file is like, if the server says that.
        pub attributes: Option<Attributes>,
        /// Most data of a READ, in bytes.
        pub rtmax: u32,
        /// As much as is best.
        pub rtpref: u32,
        /// A multiple of this.
        pub rtmult: u32,
        /// Most data of a WRITE, in bytes.
        pub wtmax: u32,
        /// As much as is best.
        pub wtpref: u32,
        /// A multiple of this.
        pub wtmult: u32,
        /// The best size of a READDIR, in bytes.
        pub dtpref: u32,
        /// Length of the longest file, in bytes.
        pub maxfilesize: u64,
        /// How exact times are.
        pub time_delta: Time,
        /// `FSF3_…`.
        pub properties: u32,
    }
}

impl Answer<'_> for FsinfoResult {
    type Status = Status;

    const OK: Status = Status::OK;

    fn put_failure(writer: &mut Writer) {
        put_no_attributes(writer);
    }
}
