//! What a server says to a call before its results (RFC 5531, 9).

use super::{Credential, REPLY, expect, skip_verifier};
use crate::nfs::xdr::{Reader, Writer, Xdr, XdrError};

const MSG_ACCEPTED: u32 = 0;
const MSG_DENIED: u32 = 1;

const SUCCESS: u32 = 0;
const PROG_UNAVAIL: u32 = 1;
const PROG_MISMATCH: u32 = 2;
const PROC_UNAVAIL: u32 = 3;
const GARBAGE_ARGS: u32 = 4;
const SYSTEM_ERR: u32 = 5;

const RPC_MISMATCH: u32 = 0;
const AUTH_ERROR: u32 = 1;

/// The header of a reply. The results of a call that was carried out follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply {
    /// Which call it is for.
    pub xid: u32,
    /// Whether it was carried out.
    pub outcome: Result<(), RpcError>,
}

/// Why a call was not carried out at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RpcError {
    /// `RPC_MISMATCH`.
    #[error(
        "the server speaks versions {low} to {high} of RPC, and not 2: is this the port of an NFS server?"
    )]
    RpcMismatch {
        /// From.
        low: u32,
        /// To.
        high: u32,
    },
    /// `AUTH_ERROR`, with its `auth_stat`.
    #[error("the server does not take our credential ({}): {AUTH_ADVICE}", auth_words(*.0))]
    Auth(u32),
    /// `PROG_UNAVAIL`.
    #[error(
        "the server does not have the program that was called: is this the port of an NFS server, and is it running?"
    )]
    ProgramUnavailable,
    /// `PROG_MISMATCH`.
    #[error(
        "the server has versions {low} to {high} of the program that was called: name one of them in the URL (`version=`)"
    )]
    ProgramMismatch {
        /// From.
        low: u32,
        /// To.
        high: u32,
    },
    /// `PROC_UNAVAIL`.
    #[error("the server does not have the procedure that was called: it is no whole NFS server")]
    ProcedureUnavailable,
    /// `GARBAGE_ARGS`.
    #[error("the server could not read the arguments of a call: its log may say why")]
    GarbageArguments,
    /// `SYSTEM_ERR`.
    #[error("the server has failed inside, of memory for instance: its log may say why")]
    System,
}

const AUTH_ADVICE: &str =
    "the export has to allow AUTH_SYS (`sec=sys`), this host and the user of the URL (`uid=`, `gid=`)";

fn auth_words(auth_stat: u32) -> &'static str {
    match auth_stat {
        1 => "AUTH_BADCRED",
        2 => "AUTH_REJECTEDCRED",
        3 => "AUTH_BADVERF",
        4 => "AUTH_REJECTEDVERF",
        5 => "AUTH_TOOWEAK",
        6 => "AUTH_INVALIDRESP",
        7 => "AUTH_FAILED",
        13 => "RPCSEC_GSS_CREDPROBLEM",
        14 => "RPCSEC_GSS_CTXPROBLEM",
        _ => "for an unknown reason",
    }
}

impl Reply {
    /// Reads the header.
    ///
    /// # Errors
    ///
    /// When it is none.
    pub fn parse(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        let xid = reader.u32()?;
        expect("direction", reader.u32()?, REPLY)?;
        let outcome = match reader.u32()? {
            MSG_ACCEPTED => accepted(reader)?,
            MSG_DENIED => Err(denied(reader)?),
            value => {
                return Err(XdrError::Value {
                    field: "reply_stat",
                    value,
                });
            }
        };
        Ok(Self { xid, outcome })
    }

    /// Writes the header.
    pub fn put(&self, writer: &mut Writer) {
        writer.u32(self.xid);
        writer.u32(REPLY);
        let (stat, words) = match self.outcome {
            Err(RpcError::RpcMismatch { low, high }) => {
                return put(writer, &[MSG_DENIED, RPC_MISMATCH, low, high]);
            }
            Err(RpcError::Auth(auth_stat)) => {
                return put(writer, &[MSG_DENIED, AUTH_ERROR, auth_stat]);
            }
            Ok(()) => (SUCCESS, None),
            Err(RpcError::ProgramUnavailable) => (PROG_UNAVAIL, None),
            Err(RpcError::ProgramMismatch { low, high }) => (PROG_MISMATCH, Some([low, high])),
            Err(RpcError::ProcedureUnavailable) => (PROC_UNAVAIL, None),
            Err(RpcError::GarbageArguments) => (GARBAGE_ARGS, None),
            Err(RpcError::System) => (SYSTEM_ERR, None),
        };
        writer.u32(MSG_ACCEPTED);
        Credential::None.put(writer);
        writer.u32(stat);
        put(writer, words.as_ref().map_or(&[], |words| words));
    }
}

fn accepted(reader: &mut Reader<'_>) -> Result<Result<(), RpcError>, XdrError> {
    skip_verifier(reader)?;
    Ok(Err(match reader.u32()? {
        SUCCESS => return Ok(Ok(())),
        PROG_UNAVAIL => RpcError::ProgramUnavailable,
        PROG_MISMATCH => RpcError::ProgramMismatch {
            low: reader.u32()?,
            high: reader.u32()?,
        },
        PROC_UNAVAIL => RpcError::ProcedureUnavailable,
        GARBAGE_ARGS => RpcError::GarbageArguments,
        SYSTEM_ERR => RpcError::System,
        value => {
            return Err(XdrError::Value {
                field: "accept_stat",
                value,
            });
        }
    }))
}

fn denied(reader: &mut Reader<'_>) -> Result<RpcError, XdrError> {
    match reader.u32()? {
        RPC_MISMATCH => Ok(RpcError::RpcMismatch {
            low: reader.u32()?,
            high: reader.u32()?,
        }),
        AUTH_ERROR => Ok(RpcError::Auth(reader.u32()?)),
        value => Err(XdrError::Value {
            field: "reject_stat",
            value,
        }),
    }
}

fn put(writer: &mut Writer, words: &[u32]) {
    for word in words {
        writer.u32(*word);
    }
}
