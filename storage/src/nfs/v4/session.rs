//! The arguments and results of what makes and keeps sessions (RFC 8881, 18.34, 18.36 and 18.46).

use super::{ClientId, SessionId};
use crate::nfs::rpc::SysCredential;
use crate::nfs::xdr::{Reader, Writer, Xdr, XdrError, xdr_enum, xdr_struct};

/// `CREATE_SESSION4args`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateSession {
    /// Whose it is to be.
    pub client_id: ClientId,
    /// What the EXCHANGE_ID said, and one more each time after.
    pub sequence_id: u32,
    /// [`CreateSession::PERSIST`] and [`CreateSession::CONN_BACK_CHAN`].
    pub flags: u32,
    /// From us to the server.
    pub fore_channel: ChannelAttributes,
    /// From the server to us.
    pub back_channel: ChannelAttributes,
    /// The program that it calls.
    pub callback_program: u32,
    /// As whom it may call.
    pub callback_security: Vec<CallbackSecurity>,
}

impl CreateSession {
    /// `CREATE_SESSION4_FLAG_PERSIST`: answers outlive a restart of the server.
    pub const PERSIST: u32 = 1;
    /// `CREATE_SESSION4_FLAG_CONN_BACK_CHAN`: the server calls on this connection.
    pub const CONN_BACK_CHAN: u32 = 2;

    const CALLBACK_SECURITY_MAX: usize = 8;
}

impl Xdr for CreateSession {
    fn put(&self, writer: &mut Writer) {
        self.client_id.put(writer);
        writer.u32(self.sequence_id);
        writer.u32(self.flags);
        self.fore_channel.put(writer);
        self.back_channel.put(writer);
        writer.u32(self.callback_program);
        writer.array(&self.callback_security);
    }

    fn read(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        Ok(Self {
            client_id: Xdr::read(reader)?,
            sequence_id: reader.u32()?,
            flags: reader.u32()?,
            fore_channel: Xdr::read(reader)?,
            back_channel: Xdr::read(reader)?,
            callback_program: reader.u32()?,
            callback_security: reader.array(Self::CALLBACK_SECURITY_MAX)?,
        })
    }
}

xdr_struct! {
    /// `CREATE_SESSION4resok`.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct CreateSessionResult {
        /// What it is called.
        pub session_id: SessionId,
        /// As it was asked.
        pub sequence_id: u32,
        /// What of the flags the server grants.
        pub flags: u32,
        /// What of the attributes the server grants.
        pub fore_channel: ChannelAttributes,
        /// The same.
        pub back_channel: ChannelAttributes,
    }
}

/// `channel_attrs4`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChannelAttributes {
    /// Padding before data of a WRITE, in bytes; only RDMA needs it.
    pub header_pad_size: u32,
    /// Longest call with its header, in bytes.
    pub max_request_size: u32,
    /// Longest reply with its header, in bytes.
    pub max_response_size: u32,
    /// Longest reply that is kept for a replay, in bytes.
    pub max_response_size_cached: u32,
    /// Most operations of a compound.
    pub max_operations: u32,
    /// Slots.
    pub max_requests: u32,
    /// `ca_rdma_ird`.
    pub rdma_ird: Option<u32>,
}

impl Xdr for ChannelAttributes {
    fn put(&self, writer: &mut Writer) {
        for word in [
            self.header_pad_size,
            self.max_request_size,
            self.max_response_size,
            self.max_response_size_cached,
            self.max_operations,
            self.max_requests,
        ] {
            writer.u32(word);
        }
        // An array of up to one is written as what is optional is.
        writer.optional(self.rdma_ird.as_ref());
    }

    fn read(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        Ok(Self {
            header_pad_size: reader.u32()?,
            max_request_size: reader.u32()?,
            max_response_size: reader.u32()?,
            max_response_size_cached: reader.u32()?,
            max_operations: reader.u32()?,
            max_requests: reader.u32()?,
            rdma_ird: reader.optional()?,
        })
    }
}

/// `callback_sec_parms4`, without RPCSEC_GSS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CallbackSecurity {
    /// `AUTH_NONE`.
    None,
    /// `AUTH_SYS`.
    Sys(SysCredential),
}

impl Xdr for CallbackSecurity {
    fn put(&self, writer: &mut Writer) {
        match self {
            Self::None => writer.u32(0),
            Self::Sys(credential) => {
                writer.u32(1);
                credential.put(writer);
            }
        }
    }

    fn read(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        match reader.u32()? {
            0 => Ok(Self::None),
            1 => Ok(Self::Sys(Xdr::read(reader)?)),
            value => Err(XdrError::Value {
                field: "cb_secflavor",
                value,
            }),
        }
    }
}

xdr_struct! {
    /// `BIND_CONN_TO_SESSION4args`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct BindConnToSession {
        /// Which session.
        pub session_id: SessionId,
        /// What this connection is to be for.
        pub direction: ChannelFromClient,
        /// `bctsa_use_conn_in_rdma_mode`.
        pub use_rdma: bool,
    }
}

xdr_struct! {
    /// `BIND_CONN_TO_SESSION4resok`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct BindConnToSessionResult {
        /// Which session.
        pub session_id: SessionId,
        /// What this connection is for.
        pub direction: ChannelFromServer,
        /// `bctsr_use_conn_in_rdma_mode`.
        pub use_rdma: bool,
    }
}

xdr_enum! {
    /// `channel_dir_from_client4`.
    pub enum ChannelFromClient("channel_dir_from_client4") {
        /// Calls of the client.
        Fore = 1,
        /// Calls of the server.
        Back = 2,
        /// The first, and the second if the server likes.
        ForeOrBoth = 3,
        /// The second, and the first if the server likes.
        BackOrBoth = 7,
    }
}

xdr_enum! {
    /// `channel_dir_from_server4`.
    pub enum ChannelFromServer("channel_dir_from_server4") {
        /// Calls of the client.
        Fore = 1,
        /// Calls of the server.
        Back = 2,
        /// Both.
        Both = 3,
    }
}

xdr_struct! {
    /// `SEQUENCE4args`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Sequence {
        /// Which session.
        pub session_id: SessionId,
        /// One more than the slot's last.
        pub sequence_id: u32,
        /// Which slot.
        pub slot_id: u32,
        /// The highest slot that is in use.
        pub highest_slot_id: u32,
        /// Whether the whole answer is to be kept for a replay.
        pub cache_this: bool,
    }
}

xdr_struct! {
    /// `SEQUENCE4resok`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct SequenceResult {
        /// As it was asked.
        pub session_id: SessionId,
        /// As it was asked.
        pub sequence_id: u32,
        /// As it was asked.
        pub slot_id: u32,
        /// The highest slot that the server takes now.
        pub highest_slot_id: u32,
        /// The highest that it would like to be used.
        pub target_highest_slot_id: u32,
        /// What else it has to say: the constants.
        pub status_flags: u32,
    }
}

impl SequenceResult {
    /// `SEQ4_STATUS_CB_PATH_DOWN`.
    pub const CB_PATH_DOWN: u32 = 0x0001;
    /// `SEQ4_STATUS_EXPIRED_ALL_STATE_REVOKED`.
    pub const EXPIRED_ALL_STATE_REVOKED: u32 = 0x0008;
    /// `SEQ4_STATUS_EXPIRED_SOME_STATE_REVOKED`.
    pub const EXPIRED_SOME_STATE_REVOKED: u32 = 0x0010;
    /// `SEQ4_STATUS_ADMIN_STATE_REVOKED`.
    pub const ADMIN_STATE_REVOKED: u32 = 0x0020;
    /// `SEQ4_STATUS_RECALLABLE_STATE_REVOKED`.
    pub const RECALLABLE_STATE_REVOKED: u32 = 0x0040;
    /// `SEQ4_STATUS_LEASE_MOVED`.
    pub const LEASE_MOVED: u32 = 0x0080;
    /// `SEQ4_STATUS_RESTART_RECLAIM_NEEDED`.
    pub const RESTART_RECLAIM_NEEDED: u32 = 0x0100;
    /// `SEQ4_STATUS_CB_PATH_DOWN_SESSION`.
    pub const CB_PATH_DOWN_SESSION: u32 = 0x0200;
    /// `SEQ4_STATUS_BACKCHANNEL_FAULT`.
    pub const BACKCHANNEL_FAULT: u32 = 0x0400;
}
