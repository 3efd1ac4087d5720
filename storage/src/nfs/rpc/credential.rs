//! Who calls (RFC 5531, 8.2 and appendix A).

use crate::nfs::xdr::{Reader, Writer, Xdr, XdrError};

/// Longest body of a credential or verifier, in bytes (8.2).
pub const AUTH_BODY_BYTES_MAX: usize = 400;
/// Most groups besides the first (appendix A).
pub const GROUPS_MAX: usize = 16;
/// Longest name of a machine, in bytes (appendix A).
pub const MACHINE_NAME_BYTES_MAX: usize = 255;

const AUTH_NONE: u32 = 0;
const AUTH_SYS: u32 = 1;

/// Who calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Credential {
    /// `AUTH_NONE`: nobody.
    None,
    /// `AUTH_SYS`: a user of this machine.
    Sys(SysCredential),
    /// Another flavor, whose body is not looked at.
    Other(u32),
}

/// A user of a machine, on its word (`authsys_parms`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SysCredential {
    /// An arbitrary number.
    pub stamp: u32,
    /// The name of the machine.
    pub machine_name: Vec<u8>,
    /// The user.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// Its other groups; up to [`GROUPS_MAX`].
    pub gids: Vec<u32>,
}

impl Xdr for Credential {
    fn put(&self, writer: &mut Writer) {
        match self {
            Self::None => {
                writer.u32(AUTH_NONE);
                writer.len(0);
            }
            Self::Sys(credential) => {
                writer.u32(AUTH_SYS);
                let body = writer.reserve();
                credential.put(writer);
                let body_bytes = writer.bytes_behind(&body);
                writer.fill(body, u32::try_from(body_bytes).expect("its parts have bounds"));
            }
            Self::Other(flavor) => {
                writer.u32(*flavor);
                writer.len(0);
            }
        }
    }

    fn read(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        let flavor = reader.u32()?;
        let body = reader.opaque(AUTH_BODY_BYTES_MAX)?;
        Ok(match flavor {
            AUTH_NONE => Self::None,
            AUTH_SYS => {
                let mut reader = Reader::new(body);
                let credential = SysCredential::read(&mut reader)?;
                reader.end()?;
                Self::Sys(credential)
            }
            other => Self::Other(other),
        })
    }
}

impl Xdr for SysCredential {
    fn put(&self, writer: &mut Writer) {
        debug_assert!(
            self.machine_name.len() <= MACHINE_NAME_BYTES_MAX && self.gids.len() <= GROUPS_MAX,
            "whoever made the credential knows the bounds"
        );
        writer.u32(self.stamp);
        writer.opaque(&self.machine_name);
        writer.u32(self.uid);
        writer.u32(self.gid);
        writer.array(&self.gids);
    }

    fn read(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        Ok(Self {
            stamp: reader.u32()?,
            machine_name: reader.opaque(MACHINE_NAME_BYTES_MAX)?.to_vec(),
            uid: reader.u32()?,
            gid: reader.u32()?,
            gids: reader.array(GROUPS_MAX)?,
        })
    }
}
