//! Remote procedure calls over TCP (RFC 5531): records, the headers of calls and replies, who calls.
//!
//! ```text
//! record:  mark (4) | fragment | mark (4) | last fragment
//! call:    xid | CALL | 2 | program | version | procedure | credential | verifier | arguments
//! reply:   xid | REPLY | MSG_ACCEPTED | verifier | SUCCESS | results
//! ```

mod credential;
mod record;
mod reply;

pub use credential::{AUTH_BODY_BYTES_MAX, Credential, GROUPS_MAX, MACHINE_NAME_BYTES_MAX, SysCredential};
pub use record::{RECORD_MARK_BYTES, Record, RecordError, RecordMark};
pub use reply::{Reply, RpcError};

use super::xdr::{Reader, Writer, Xdr, XdrError};

const CALL: u32 = 0;
const REPLY: u32 = 1;
const RPC_VERSION: u32 = 2;

/// Programs (RFC 1833, 1813 and 8881).
pub mod program {
    /// Which port a program has.
    pub const PORTMAP: u32 = 100_000;
    /// NFS, each version.
    pub const NFS: u32 = 100_003;
    /// What gives the file handles of exports for NFSv3.
    pub const MOUNT: u32 = 100_005;
}

/// The header of a call (9). Its arguments follow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call<C = Credential> {
    /// Which call it is: its reply says the same.
    pub xid: u32,
    /// Which program is called.
    pub program: u32,
    /// In which version.
    pub version: u32,
    /// And which procedure of it.
    pub procedure: u32,
    /// Who calls.
    pub credential: C,
}

impl Call<&Credential> {
    /// Writes the header.
    pub fn put(&self, writer: &mut Writer) {
        for word in [
            self.xid,
            CALL,
            RPC_VERSION,
            self.program,
            self.version,
            self.procedure,
        ] {
            writer.u32(word);
        }
        self.credential.put(writer);
        Credential::None.put(writer);
    }
}

impl Call {
    /// Reads the header.
    ///
    /// # Errors
    ///
    /// [`CallError::Version`] is to be answered, anything else is no call.
    pub fn parse(reader: &mut Reader<'_>) -> Result<Self, CallError> {
        let xid = reader.u32()?;
        expect("direction", reader.u32()?, CALL)?;
        let rpc_version = reader.u32()?;
        if rpc_version != RPC_VERSION {
            return Err(CallError::Version { xid, rpc_version });
        }
        let (program, version, procedure) = (reader.u32()?, reader.u32()?, reader.u32()?);
        let credential = Credential::read(reader)?;
        skip_verifier(reader)?;
        Ok(Self {
            xid,
            program,
            version,
            procedure,
            credential,
        })
    }

    /// The same, as it is written.
    pub const fn as_ref(&self) -> Call<&Credential> {
        Call {
            xid: self.xid,
            program: self.program,
            version: self.version,
            procedure: self.procedure,
            credential: &self.credential,
        }
    }
}

/// Why a record is no call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// It is not written as one.
    #[error("what was received is no RPC call")]
    Malformed(#[from] XdrError),
    /// It is of another version of RPC; the answer is [`RpcError::RpcMismatch`].
    #[error("a call of version {rpc_version} of RPC")]
    Version {
        /// Which call.
        xid: u32,
        /// Of which version.
        rpc_version: u32,
    },
}

/// Which way a record goes, as its second word says: to be known before it is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Somebody calls.
    Call,
    /// Somebody answers.
    Reply,
}

impl Direction {
    /// Of the record that begins with `bytes`.
    ///
    /// # Errors
    ///
    /// [`XdrError::Short`] until both words are there.
    pub fn of(bytes: &[u8]) -> Result<Self, XdrError> {
        let mut reader = Reader::new(bytes);
        let _xid = reader.u32()?;
        match reader.u32()? {
            CALL => Ok(Self::Call),
            REPLY => Ok(Self::Reply),
            value => Err(XdrError::Value {
                field: "direction",
                value,
            }),
        }
    }
}

/// Nothing is said by the verifiers of `AUTH_NONE` and `AUTH_SYS`.
fn skip_verifier(reader: &mut Reader<'_>) -> Result<(), XdrError> {
    let _flavor = reader.u32()?;
    reader.opaque(AUTH_BODY_BYTES_MAX).map(drop)
}

fn expect(field: &'static str, value: u32, expected: u32) -> Result<(), XdrError> {
    let wrong = XdrError::Value { field, value };
    (value == expected).then_some(()).ok_or(wrong)
}

#[cfg(test)]
mod tests;
