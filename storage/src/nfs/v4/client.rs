//! The arguments and results of what makes a client known (RFC 8881, 18.35).

use super::{Bitmap, ClientId, ClientOwner, OWNER_BYTES_MAX};
use crate::nfs::xdr::{Reader, Writer, Xdr, XdrError, xdr_struct};

/// `EXCHANGE_ID4args`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExchangeId {
    /// Who we are.
    pub client_owner: ClientOwner,
    /// What we are: `USE_…`.
    pub flags: u32,
    /// Who may touch our state; we ask for [`StateProtect::None`].
    pub state_protect: StateProtect,
    /// What this program is.
    pub implementation: Option<ImplementationId>,
}

impl ExchangeId {
    /// `EXCHGID4_FLAG_USE_NON_PNFS`.
    pub const USE_NON_PNFS: u32 = 0x0001_0000;
    /// `EXCHGID4_FLAG_CONFIRMED_R`, in an answer: the client has a session already.
    pub const CONFIRMED_R: u32 = 0x8000_0000;
}

impl Xdr for ExchangeId {
    fn put(&self, writer: &mut Writer) {
        self.client_owner.put(writer);
        writer.u32(self.flags);
        self.state_protect.put(writer);
        self.implementation.put(writer);
    }

    fn read(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        Ok(Self {
            client_owner: Xdr::read(reader)?,
            flags: reader.u32()?,
            state_protect: Xdr::read(reader)?,
            implementation: Xdr::read(reader)?,
        })
    }
}

/// `EXCHANGE_ID4resok`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExchangeIdResult {
    /// What we are called from now on.
    pub client_id: ClientId,
    /// What the next CREATE_SESSION has to say.
    pub sequence_id: u32,
    /// What the server is, and [`ExchangeId::CONFIRMED_R`].
    pub flags: u32,
    /// Who may touch our state.
    pub state_protect: StateProtect,
    /// `so_minor_id`: with `so_major_id` which server it is.
    pub server_minor_id: u64,
    /// `so_major_id`.
    pub server_major_id: Vec<u8>,
    /// Where its names and handles hold.
    pub server_scope: Vec<u8>,
    /// What its program is.
    pub implementation: Option<ImplementationId>,
}

impl Xdr for ExchangeIdResult {
    fn put(&self, writer: &mut Writer) {
        self.client_id.put(writer);
        writer.u32(self.sequence_id);
        writer.u32(self.flags);
        self.state_protect.put(writer);
        writer.u64(self.server_minor_id);
        writer.opaque(&self.server_major_id);
        writer.opaque(&self.server_scope);
        self.implementation.put(writer);
    }

    fn read(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        Ok(Self {
            client_id: Xdr::read(reader)?,
            sequence_id: reader.u32()?,
            flags: reader.u32()?,
            state_protect: Xdr::read(reader)?,
            server_minor_id: reader.u64()?,
            server_major_id: reader.opaque(OWNER_BYTES_MAX)?.to_vec(),
            server_scope: reader.opaque(OWNER_BYTES_MAX)?.to_vec(),
            implementation: Xdr::read(reader)?,
        })
    }
}

/// `state_protect4_a` and `state_protect4_r`; `SP4_SSV`, which has no place without RPCSEC_GSS, is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateProtect {
    /// `SP4_NONE`.
    None,
    /// `SP4_MACH_CRED`: some operations need the credential of the machine.
    MachineCredential {
        /// Those that do.
        must_enforce: Bitmap,
        /// Those that it may be used for besides.
        must_allow: Bitmap,
    },
}

impl Xdr for StateProtect {
    fn put(&self, writer: &mut Writer) {
        match self {
            Self::None => writer.u32(0),
            Self::MachineCredential {
                must_enforce,
                must_allow,
            } => {
                writer.u32(1);
                must_enforce.put(writer);
                must_allow.put(writer);
            }
        }
    }

    fn read(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        match reader.u32()? {
            0 => Ok(Self::None),
            1 => Ok(Self::MachineCredential {
                must_enforce: Xdr::read(reader)?,
                must_allow: Xdr::read(reader)?,
            }),
            value => Err(XdrError::Value {
                field: "state_protect_how4",
                value,
            }),
        }
    }
}

/// `nfs_impl_id4`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImplementationId {
    /// Who made the program.
    pub domain: Vec<u8>,
    /// Which one it is.
    pub name: Vec<u8>,
    /// Since when it is.
    pub date: Time,
}

impl Xdr for ImplementationId {
    fn put(&self, writer: &mut Writer) {
        writer.opaque(&self.domain);
        writer.opaque(&self.name);
        self.date.put(writer);
    }

    fn read(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        Ok(Self {
            domain: reader.opaque(OWNER_BYTES_MAX)?.to_vec(),
            name: reader.opaque(OWNER_BYTES_MAX)?.to_vec(),
            date: Xdr::read(reader)?,
        })
    }
}

xdr_struct! {
    /// `nfstime4`.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Time {
        /// Since 1970, as the two's complement of 64 bits.
        pub seconds: u64,
        /// And these.
        pub nseconds: u32,
    }
}
