//! The names of clients, sessions, states and files (RFC 8881, 3.2 and 3.3).

use std::fmt;

use super::OWNER_BYTES_MAX;
use crate::nfs::xdr::{Reader, Writer, Xdr, XdrError, xdr_newtype, xdr_struct};

xdr_struct! {
    /// `stateid4`: an open, a lock or a delegation.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Stateid {
        /// Which version of the state; 0: the latest.
        pub seqid: u32,
        /// Which state.
        pub other: [u8; 12],
    }
}

impl Stateid {
    /// No state: as anybody reads and writes (8.2.3).
    pub const ANONYMOUS: Self = Self {
        seqid: 0,
        other: [0; 12],
    };
    /// No state, and no lock in the way of reading.
    pub const READ_BYPASS: Self = Self {
        seqid: u32::MAX,
        other: [0xff; 12],
    };
    /// That which an operation before in the same compound has given.
    pub const CURRENT: Self = Self {
        seqid: 1,
        other: [0; 12],
    };
    /// Never one.
    pub const INVALID: Self = Self {
        seqid: u32::MAX,
        other: [0; 12],
    };

    /// The latest version of the same state, whichever that is.
    #[must_use]
    pub const fn latest(self) -> Self {
        Self { seqid: 0, ..self }
    }
}

xdr_newtype! {
    /// `sessionid4`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct SessionId(pub [u8; 16]);
}

xdr_newtype! {
    /// `clientid4`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct ClientId(pub u64);
}

xdr_newtype! {
    /// `verifier4`: of a life of a client or a server, of an exclusive create, of a directory's cookies.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Verifier(pub [u8; 8]);
}

/// `nfs_fh4`: a file, in the server's words.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct FileHandle {
    len: u8,
    /// Zeros behind `len`, so that equal handles are equal.
    bytes: [u8; Self::BYTES_MAX],
}

impl FileHandle {
    /// Longest handle, in bytes (`NFS4_FHSIZE`).
    pub const BYTES_MAX: usize = 128;

    /// A handle of those bytes; `None` if they are too many.
    pub fn new(handle: &[u8]) -> Option<Self> {
        let mut bytes = [0; Self::BYTES_MAX];
        bytes.get_mut(..handle.len())?.copy_from_slice(handle);
        Some(Self {
            len: u8::try_from(handle.len()).ok()?,
            bytes,
        })
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        let bytes = self.bytes.get(..usize::from(self.len));
        bytes.expect("the length was checked when it was made")
    }
}

impl fmt::Debug for FileHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FileHandle(")?;
        for byte in self.bytes() {
            write!(f, "{byte:02x}")?;
        }
        f.write_str(")")
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

/// `client_owner4`: a life of a client.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ClientOwner {
    /// Which life.
    pub verifier: Verifier,
    /// Which client; up to [`OWNER_BYTES_MAX`].
    pub owner_id: Vec<u8>,
}

impl Xdr for ClientOwner {
    fn put(&self, writer: &mut Writer) {
        self.verifier.put(writer);
        writer.opaque(&self.owner_id);
    }

    fn read(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        Ok(Self {
            verifier: Verifier::read(reader)?,
            owner_id: reader.opaque(OWNER_BYTES_MAX)?.to_vec(),
        })
    }
}

/// `state_owner4`: who has opens or locks.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct StateOwner {
    /// Its client; servers of 4.1 do not look at it.
    pub client_id: ClientId,
    /// Who it is within the client; up to [`OWNER_BYTES_MAX`].
    pub owner: Vec<u8>,
}

impl Xdr for StateOwner {
    fn put(&self, writer: &mut Writer) {
        self.client_id.put(writer);
        writer.opaque(&self.owner);
    }

    fn read(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        Ok(Self {
            client_id: ClientId::read(reader)?,
            owner: reader.opaque(OWNER_BYTES_MAX)?.to_vec(),
        })
    }
}
