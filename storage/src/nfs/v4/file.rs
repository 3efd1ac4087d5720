//! The arguments and results of what is done with names and attributes (RFC 8881, 18.1, 18.7, 18.23, 18.25, 18.26, 18.30
//! and 18.45).

use std::fmt;

use super::{Attributes, Bitmap, Stateid, Verifier};
use crate::nfs::xdr::{Reader, Writer, Xdr, XdrError, xdr_enum, xdr_newtype, xdr_struct};

/// `component4`: the name of a file in its directory. Servers mean UTF-8, but it may be anything.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Name(Vec<u8>);

impl Name {
    /// Longest name, in bytes.
    pub const BYTES_MAX: usize = 255;

    /// A name of a file; `None` if it is empty, too long, `.` or `..`, or has a `/` or a zero byte.
    pub fn new(name: impl Into<Vec<u8>>) -> Option<Self> {
        let name = name.into();
        let is_name = (1..=Self::BYTES_MAX).contains(&name.len())
            && name != b"."
            && name != b".."
            && !name.iter().any(|byte| matches!(byte, 0 | b'/'));
        is_name.then_some(Self(name))
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0.escape_ascii(), f)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Name({self})")
    }
}

impl Xdr for Name {
    fn put(&self, writer: &mut Writer) {
        writer.opaque(&self.0);
    }

    fn read(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        let name = reader.opaque(Self::BYTES_MAX)?;
        Self::new(name).ok_or(XdrError::Value {
            field: "component4",
            value: u32::try_from(name.len()).unwrap_or(u32::MAX),
        })
    }
}

xdr_newtype! {
    /// `ACCESS4_…`, a set.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Access(pub u32);
}

impl Access {
    /// `ACCESS4_READ`.
    pub const READ: Self = Self(0x01);
    /// `ACCESS4_LOOKUP`.
    pub const LOOKUP: Self = Self(0x02);
    /// `ACCESS4_MODIFY`.
    pub const MODIFY: Self = Self(0x04);
    /// `ACCESS4_EXTEND`.
    pub const EXTEND: Self = Self(0x08);
    /// `ACCESS4_DELETE`.
    pub const DELETE: Self = Self(0x10);
    /// `ACCESS4_EXECUTE`.
    pub const EXECUTE: Self = Self(0x20);

    /// Both sets.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all of `other` is in it.
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

xdr_struct! {
    /// `ACCESS4resok`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct AccessResult {
        /// What the server can say something about.
        pub supported: Access,
        /// What is allowed.
        pub access: Access,
    }
}

xdr_struct! {
    /// `change_info4`: a directory before and after.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct ChangeInfo {
        /// Whether nothing else happened in between.
        pub atomic: bool,
        /// Its `change` before.
        pub before: u64,
        /// And after.
        pub after: u64,
    }
}

xdr_struct! {
    /// `RENAME4args`: from the saved directory to the current one.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct Rename {
        /// What it is called.
        pub old_name: Name,
        /// What it shall be called.
        pub new_name: Name,
    }
}

xdr_struct! {
    /// `RENAME4resok`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct RenameResult {
        /// Of the saved directory.
        pub source: ChangeInfo,
        /// Of the current one.
        pub target: ChangeInfo,
    }
}

xdr_struct! {
    /// `SETATTR4args`.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct Setattr {
        /// The open or the lock by which the size may be set.
        pub stateid: Stateid,
        /// What is to be set.
        pub attributes: Attributes,
    }
}

xdr_struct! {
    /// `READDIR4args`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Readdir {
        /// Behind which entry; 0: from the first on.
        pub cookie: u64,
        /// What came with it.
        pub cookie_verifier: Verifier,
        /// Most names, in bytes; a hint.
        pub dir_count: u32,
        /// Longest result, in bytes.
        pub max_count: u32,
        /// What is to be said of each.
        pub attributes: Bitmap,
    }
}

/// `READDIR4resok`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReaddirResult {
    /// What has to come with the cookies.
    pub cookie_verifier: Verifier,
    /// The next entries.
    pub entries: Vec<DirectoryEntry>,
    /// Whether there are no more.
    pub eof: bool,
}

xdr_struct! {
    /// `entry4`.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct DirectoryEntry {
        /// Where it stands.
        pub cookie: u64,
        /// What it is called.
        pub name: GuardedName,
        /// What was to be said of it.
        pub attributes: Attributes,
    }
}

/// What a directory says that a file in it is called. A name that nobody could ask for is no reason to refuse the others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuardedName(pub Option<Name>);

impl Xdr for GuardedName {
    fn put(&self, writer: &mut Writer) {
        writer.opaque(self.0.as_ref().map_or(&[], Name::bytes));
    }

    fn read(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        // Some servers have names of more bytes; nothing of ours is called so.
        let name = reader.opaque(4 * Name::BYTES_MAX)?;
        Ok(Self(Name::new(name)))
    }
}

/// Most entries of one result: a reply has no room for more.
const ENTRIES_MAX: usize = 65_536;

impl Xdr for ReaddirResult {
    fn put(&self, writer: &mut Writer) {
        self.cookie_verifier.put(writer);
        for entry in &self.entries {
            writer.optional(Some(entry));
        }
        writer.boolean(false);
        writer.boolean(self.eof);
    }

    fn read(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        let cookie_verifier = Xdr::read(reader)?;
        let mut entries = Vec::new();
        while let Some(entry) = reader.optional()? {
            if entries.len() == ENTRIES_MAX {
                return Err(XdrError::Long {
                    len: u32::MAX,
                    len_max: ENTRIES_MAX,
                });
            }
            entries.push(entry);
        }
        Ok(Self {
            cookie_verifier,
            entries,
            eof: reader.boolean()?,
        })
    }
}

xdr_enum! {
    /// `secinfo_style4`.
    pub enum SecInfoStyle("secinfo_style4") {
        /// How the current file may be used.
        CurrentFh = 0,
        /// How its directory may be used.
        Parent = 1,
    }
}

/// `SECINFO4resok`: the flavors of credentials that are taken, the preferred one first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SecInfoFlavors(pub Vec<SecInfo>);

/// `secinfo4`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SecInfo {
    /// `RPCSEC_GSS`, whichever.
    Gss,
    /// Another flavor: 0 is `AUTH_NONE`, 1 is `AUTH_SYS`.
    Flavor(u32),
}

const FLAVORS_MAX: usize = 32;
const RPCSEC_GSS: u32 = 6;
const OID_BYTES_MAX: usize = 128;

impl Xdr for SecInfoFlavors {
    fn put(&self, writer: &mut Writer) {
        writer.array(&self.0);
    }

    fn read(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        Ok(Self(reader.array(FLAVORS_MAX)?))
    }
}

impl Xdr for SecInfo {
    fn put(&self, writer: &mut Writer) {
        match self {
            Self::Gss => {
                writer.u32(RPCSEC_GSS);
                writer.opaque(b"");
                // `qop` and `service`.
                writer.u64(0);
            }
            Self::Flavor(flavor) => writer.u32(*flavor),
        }
    }

    fn read(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        let flavor = reader.u32()?;
        if flavor != RPCSEC_GSS {
            return Ok(Self::Flavor(flavor));
        }
        reader.opaque(OID_BYTES_MAX)?;
        reader.u64()?;
        Ok(Self::Gss)
    }
}
