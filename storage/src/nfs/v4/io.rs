//! The arguments and results of what is done with the bytes of a file (RFC 8881, 18.3, 18.22 and 18.32; RFC 7862, 15).

use super::{DATA_BYTES_MAX, Stateid, Verifier};
use crate::nfs::xdr::{Reader, Wire, Writer, Xdr, XdrError, xdr_enum, xdr_struct};

xdr_struct! {
    /// `READ4args` and `READ_PLUS4args`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Read {
        /// The open or the lock.
        pub stateid: Stateid,
        /// From here on, in bytes.
        pub offset: u64,
        /// So far at most, in bytes.
        pub count: u32,
    }
}

/// `READ4resok`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadResult<'a> {
    /// Whether the file ends there.
    pub eof: bool,
    /// The bytes, which may be fewer than were asked for.
    pub data: &'a [u8],
}

impl<'a> Wire<'a> for ReadResult<'a> {
    fn write_to(&self, writer: &mut Writer) {
        writer.boolean(self.eof);
        writer.opaque(self.data);
    }

    fn read_from(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
        Ok(Self {
            eof: reader.boolean()?,
            data: reader.opaque(DATA_BYTES_MAX)?,
        })
    }
}

xdr_enum! {
    /// `stable_how4`.
    pub enum Stability("stable_how4") {
        /// `UNSTABLE4`: a COMMIT makes it last.
        Unstable = 0,
        /// `DATA_SYNC4`: the bytes last, and what finds them.
        DataSync = 1,
        /// `FILE_SYNC4`: everything of the file lasts.
        FileSync = 2,
    }
}

/// `WRITE4args`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Write<'a> {
    /// The open or the lock.
    pub stateid: Stateid,
    /// From here on, in bytes.
    pub offset: u64,
    /// When it is done.
    pub stability: Stability,
    /// The bytes.
    pub data: &'a [u8],
}

impl<'a> Wire<'a> for Write<'a> {
    fn write_to(&self, writer: &mut Writer) {
        Self::put_head(writer, self.stateid, self.offset, self.stability);
        writer.opaque(self.data);
    }

    fn read_from(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
        Ok(Self {
            stateid: Xdr::read(reader)?,
            offset: reader.u64()?,
            stability: Xdr::read(reader)?,
            data: reader.opaque(DATA_BYTES_MAX)?,
        })
    }
}

impl Write<'_> {
    /// Everything before the length of the data.
    pub(super) fn put_head(writer: &mut Writer, stateid: Stateid, offset: u64, stability: Stability) {
        Xdr::put(&stateid, writer);
        writer.u64(offset);
        Xdr::put(&stability, writer);
    }
}

xdr_struct! {
    /// `WRITE4resok`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct WriteResult {
        /// How many of the bytes, which may not be all.
        pub count: u32,
        /// When they last.
        pub committed: Stability,
        /// Another one than before: what was not committed may be lost.
        pub verifier: Verifier,
    }
}

xdr_struct! {
    /// `COMMIT4args`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Commit {
        /// From here on, in bytes.
        pub offset: u64,
        /// So far, in bytes; 0: to the end.
        pub count: u32,
    }
}

xdr_struct! {
    /// `ALLOCATE4args` and `DEALLOCATE4args`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Allocation {
        /// The open or the lock.
        pub stateid: Stateid,
        /// From here on, in bytes.
        pub offset: u64,
        /// So far, in bytes.
        pub length: u64,
    }
}

xdr_enum! {
    /// `data_content4`.
    pub enum Content("data_content4") {
        /// Bytes.
        Data = 0,
        /// Zeros that need no room.
        Hole = 1,
    }
}

xdr_struct! {
    /// `SEEK4args`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Seek {
        /// The open or the lock.
        pub stateid: Stateid,
        /// From here on, in bytes.
        pub offset: u64,
        /// The next of what.
        pub what: Content,
    }
}

xdr_struct! {
    /// `SEEK4resok`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct SeekResult {
        /// Whether there is none.
        pub eof: bool,
        /// Where it is, in bytes.
        pub offset: u64,
    }
}

xdr_struct! {
    /// `CLONE4args`: from the saved file to the current one.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct CloneRange {
        /// The open or the lock of the saved file.
        pub source_stateid: Stateid,
        /// That of the current one.
        pub destination_stateid: Stateid,
        /// From here on, in bytes.
        pub source_offset: u64,
        /// To here.
        pub destination_offset: u64,
        /// So far, in bytes; 0: to the end.
        pub count: u64,
    }
}

/// `read_plus_res4`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadPlusResult<'a> {
    /// Whether the file ends there.
    pub eof: bool,
    /// What there is, in the order of the file.
    pub contents: Vec<ReadPlusContent<'a>>,
}

/// `read_plus_content`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadPlusContent<'a> {
    /// Bytes.
    Data {
        /// From here on, in bytes.
        offset: u64,
        /// These.
        data: &'a [u8],
    },
    /// Zeros.
    Hole {
        /// From here on, in bytes.
        offset: u64,
        /// So far, in bytes.
        length: u64,
    },
}

/// Most pieces of one result.
const CONTENTS_MAX: usize = 4096;

impl<'a> Wire<'a> for ReadPlusResult<'a> {
    fn write_to(&self, writer: &mut Writer) {
        writer.boolean(self.eof);
        writer.len(self.contents.len());
        for content in &self.contents {
            match *content {
                ReadPlusContent::Data { offset, data } => {
                    Xdr::put(&Content::Data, writer);
                    writer.u64(offset);
                    writer.opaque(data);
                }
                ReadPlusContent::Hole { offset, length } => {
                    Xdr::put(&Content::Hole, writer);
                    writer.u64(offset);
                    writer.u64(length);
                }
            }
        }
    }

    fn read_from(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
        let eof = reader.boolean()?;
        let len = reader.len(CONTENTS_MAX)?;
        let contents = (0..len).map(|_| {
            Ok(match Xdr::read(reader)? {
                Content::Data => ReadPlusContent::Data {
                    offset: reader.u64()?,
                    data: reader.opaque(DATA_BYTES_MAX)?,
                },
                Content::Hole => ReadPlusContent::Hole {
                    offset: reader.u64()?,
                    length: reader.u64()?,
                },
            })
        });
        Ok(Self {
            eof,
            contents: contents.collect::<Result<_, _>>()?,
        })
    }
}
