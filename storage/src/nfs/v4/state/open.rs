//! OPEN (RFC 8881, 18.16).

use crate::nfs::v4::{Attributes, Bitmap, ChangeInfo, Name, StateOwner, Stateid, Verifier};
use crate::nfs::xdr::{Reader, Writer, Xdr, XdrError, xdr_enum, xdr_newtype, xdr_struct};

xdr_struct! {
    /// `OPEN4args`.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct Open {
        /// Not looked at.
        pub seqid: u32,
        /// What the opener will do.
        pub share_access: ShareAccess,
        /// What others may not.
        pub share_deny: ShareDeny,
        /// Who opens.
        pub owner: StateOwner,
        /// Whether the file may be made.
        pub how: OpenHow,
        /// Which file it is, and by which right.
        pub claim: OpenClaim,
    }
}

xdr_newtype! {
    /// `OPEN4_SHARE_ACCESS_…`, a set.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct ShareAccess(pub u32);
}

impl ShareAccess {
    /// To read.
    pub const READ: Self = Self(1);
    /// To write.
    pub const WRITE: Self = Self(2);
    /// To read and write.
    pub const BOTH: Self = Self(3);

    /// The same, with the wish for no delegation (`OPEN4_SHARE_ACCESS_WANT_NO_DELEG`).
    #[must_use]
    pub const fn without_delegation(self) -> Self {
        Self(self.0 & !0xff00 | 0x0400)
    }

    /// The same, without any wish.
    #[must_use]
    pub const fn alone(self) -> Self {
        Self(self.0 & Self::BOTH.0)
    }
}

xdr_enum! {
    /// `OPEN4_SHARE_DENY_…`.
    pub enum ShareDeny("share_deny") {
        /// Others may do anything.
        None = 0,
        /// Nobody else may read.
        Read = 1,
        /// Nobody else may write.
        Write = 2,
        /// Neither.
        Both = 3,
    }
}

/// `openflag4`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(
    clippy::large_enum_variant,
    reason = "an OPEN has one, and there are few of them"
)]
pub enum OpenHow {
    /// The file is there.
    NoCreate,
    /// It may be made.
    Create(CreateHow),
}

/// `createhow4`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CreateHow {
    /// `UNCHECKED4`: if it is not there.
    Unchecked(Attributes),
    /// `GUARDED4`: it must not be there.
    Guarded(Attributes),
    /// `EXCLUSIVE4`: it must not be there, unless the same verifier has made it.
    Exclusive(Verifier),
    /// `EXCLUSIVE4_1`: the same, with attributes.
    Exclusive41(Verifier, Attributes),
}

impl Xdr for OpenHow {
    fn put(&self, writer: &mut Writer) {
        match self {
            Self::NoCreate => writer.u32(0),
            Self::Create(how) => {
                writer.u32(1);
                how.put(writer);
            }
        }
    }

    fn read(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        match reader.u32()? {
            0 => Ok(Self::NoCreate),
            1 => Ok(Self::Create(Xdr::read(reader)?)),
            value => Err(XdrError::Value {
                field: "opentype4",
                value,
            }),
        }
    }
}

impl Xdr for CreateHow {
    fn put(&self, writer: &mut Writer) {
        match self {
            Self::Unchecked(attributes) => {
                writer.u32(0);
                attributes.put(writer);
            }
            Self::Guarded(attributes) => {
                writer.u32(1);
                attributes.put(writer);
            }
            Self::Exclusive(verifier) => {
                writer.u32(2);
                verifier.put(writer);
            }
            Self::Exclusive41(verifier, attributes) => {
                writer.u32(3);
                verifier.put(writer);
                attributes.put(writer);
            }
        }
    }

    fn read(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        match reader.u32()? {
            0 => Ok(Self::Unchecked(Xdr::read(reader)?)),
            1 => Ok(Self::Guarded(Xdr::read(reader)?)),
            2 => Ok(Self::Exclusive(Xdr::read(reader)?)),
            3 => Ok(Self::Exclusive41(Xdr::read(reader)?, Xdr::read(reader)?)),
            value => Err(XdrError::Value {
                field: "createmode4",
                value,
            }),
        }
    }
}

/// `open_claim4`, without those of delegations.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OpenClaim {
    /// `CLAIM_NULL`: the file of that name in the current directory.
    Null(Name),
    /// `CLAIM_PREVIOUS`: the current file, which was open before the server restarted, with that type of delegation.
    Previous(u32),
    /// `CLAIM_FH`: the current file.
    Fh,
}

const CLAIM_NULL: u32 = 0;
const CLAIM_PREVIOUS: u32 = 1;
const CLAIM_FH: u32 = 4;

impl Xdr for OpenClaim {
    fn put(&self, writer: &mut Writer) {
        match self {
            Self::Null(name) => {
                writer.u32(CLAIM_NULL);
                name.put(writer);
            }
            Self::Previous(delegation) => {
                writer.u32(CLAIM_PREVIOUS);
                writer.u32(*delegation);
            }
            Self::Fh => writer.u32(CLAIM_FH),
        }
    }

    fn read(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        match reader.u32()? {
            CLAIM_NULL => Ok(Self::Null(Xdr::read(reader)?)),
            CLAIM_PREVIOUS => Ok(Self::Previous(reader.u32()?)),
            CLAIM_FH => Ok(Self::Fh),
            value => Err(XdrError::Value {
                field: "open_claim_type4",
                value,
            }),
        }
    }
}

xdr_struct! {
    /// `OPEN4resok`.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct OpenResult {
        /// The open.
        pub stateid: Stateid,
        /// What became of the directory.
        pub change_info: ChangeInfo,
        /// `OPEN4_RESULT_…`.
        pub result_flags: u32,
        /// Which attributes the new file was given.
        pub attributes_set: Bitmap,
        /// What came with it.
        pub delegation: Delegation,
    }
}

/// `open_delegation4`; who else could open the file by the server's word (`nfsace4`) and how much may be written before
/// the server is told (`nfs_space_limit4`) are not kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delegation {
    /// `OPEN_DELEGATE_NONE`.
    None,
    /// `OPEN_DELEGATE_READ`.
    Read {
        /// Which.
        stateid: Stateid,
        /// Whether it is to be given back at once.
        recall: bool,
    },
    /// `OPEN_DELEGATE_WRITE`.
    Write {
        /// Which.
        stateid: Stateid,
        /// Whether it is to be given back at once.
        recall: bool,
    },
    /// `OPEN_DELEGATE_NONE_EXT`.
    NoneExt(WhyNone),
}

/// `open_none_delegation4`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WhyNone {
    /// `why_no_delegation4`.
    pub why: u32,
    /// Whether the server will say when there can be one; for two of the reasons.
    pub server_will: Option<bool>,
}

impl WhyNone {
    const CONTENTION: u32 = 1;
    const RESOURCE: u32 = 2;
}

impl Xdr for WhyNone {
    fn put(&self, writer: &mut Writer) {
        writer.u32(self.why);
        if let Some(server_will) = self.server_will {
            writer.boolean(server_will);
        }
    }

    fn read(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        let why = reader.u32()?;
        let server_will = match why {
            Self::CONTENTION | Self::RESOURCE => Some(reader.boolean()?),
            _ => None,
        };
        Ok(Self { why, server_will })
    }
}

const NFS_LIMIT_SIZE: u32 = 1;
const NFS_LIMIT_BLOCKS: u32 = 2;

impl Xdr for Delegation {
    fn put(&self, writer: &mut Writer) {
        match self {
            Self::None => writer.u32(0),
            Self::Read { stateid, recall } => {
                writer.u32(1);
                stateid.put(writer);
                writer.boolean(*recall);
                put_ace_of_nobody(writer);
            }
            Self::Write { stateid, recall } => {
                writer.u32(2);
                stateid.put(writer);
                writer.boolean(*recall);
                writer.u32(NFS_LIMIT_SIZE);
                writer.u64(0);
                put_ace_of_nobody(writer);
            }
            Self::NoneExt(why) => {
                writer.u32(3);
                why.put(writer);
            }
        }
    }

    fn read(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        match reader.u32()? {
            0 => Ok(Self::None),
            1 => {
                let (stateid, recall) = (Xdr::read(reader)?, reader.boolean()?);
                skip_ace(reader)?;
                Ok(Self::Read { stateid, recall })
            }
            2 => {
                let (stateid, recall) = (Xdr::read(reader)?, reader.boolean()?);
                skip_space_limit(reader)?;
                skip_ace(reader)?;
                Ok(Self::Write { stateid, recall })
            }
            3 => Ok(Self::NoneExt(Xdr::read(reader)?)),
            value => Err(XdrError::Value {
                field: "open_delegation_type4",
                value,
            }),
        }
    }
}

fn skip_space_limit(reader: &mut Reader<'_>) -> Result<(), XdrError> {
    match reader.u32()? {
        // A size, or two numbers.
        NFS_LIMIT_SIZE | NFS_LIMIT_BLOCKS => reader.u64().map(drop),
        value => Err(XdrError::Value {
            field: "limit_by4",
            value,
        }),
    }
}

const WHO_BYTES_MAX: usize = 1024;

fn skip_ace(reader: &mut Reader<'_>) -> Result<(), XdrError> {
    let _type_flags_and_mask = reader.take(3 * 4)?;
    reader.opaque(WHO_BYTES_MAX).map(drop)
}

fn put_ace_of_nobody(writer: &mut Writer) {
    writer.fixed(&[0; 3 * 4]);
    writer.opaque(b"");
}
