//! What a server asks of a client on its back channel (RFC 8881, 20), in both directions.

use super::{Bitmap, FileHandle, OPERATIONS_MAX, ReplyWriter, SessionId, Stateid, Status, TAG_BYTES_MAX};
use crate::nfs::xdr::{Reader, Writer, Xdr, XdrError, xdr_struct};

/// The procedure that does nothing (20.1).
pub const PROCEDURE_CB_NULL: u32 = 0;
/// The procedure that does everything (20.2).
pub const PROCEDURE_CB_COMPOUND: u32 = 1;
/// The version of the program, whose number is the client's choice.
pub const CALLBACK_VERSION: u32 = 1;

const CB_RECALL: u32 = 4;
const CB_RECALL_ANY: u32 = 8;
const CB_RECALL_SLOT: u32 = 10;
const CB_SEQUENCE: u32 = 11;
const CB_ILLEGAL: u32 = 10_044;
/// Operations that the standards have: 3 to 14, and 15 (RFC 7862).
const CB_KNOWN: std::ops::RangeInclusive<u32> = 3..=15;

/// `CB_COMPOUND4args`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallbackCompound<'a> {
    /// What the answer repeats.
    pub tag: &'a [u8],
    /// Of NFSv4.
    pub minor_version: u32,
    /// In their order. It ends with the first that is [`Callback::Unknown`].
    pub operations: Vec<Callback>,
}

/// `nfs_cb_argop4`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Callback {
    /// Takes a slot of the back channel, for this compound.
    Sequence(CbSequence),
    /// Asks for a delegation back.
    Recall(CbRecall),
    /// Asks for delegations back, whichever.
    RecallAny(CbRecallAny),
    /// Asks to use no higher slot of the fore channel.
    RecallSlot {
        /// Than that.
        target_highest_slot_id: u32,
    },
    /// Something that is not done here. Nothing that follows can be read.
    Unknown(u32),
}

xdr_struct! {
    /// `CB_RECALL4args`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct CbRecall {
        /// The delegation.
        pub stateid: Stateid,
        /// Whether the file is about to be truncated.
        pub truncate: bool,
        /// The file.
        pub handle: FileHandle,
    }
}

xdr_struct! {
    /// `CB_RECALL_ANY4args`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct CbRecallAny {
        /// How many may be kept.
        pub objects_to_keep: u32,
        /// Of which types.
        pub types: Bitmap,
    }
}

/// `CB_SEQUENCE4args`. The calls that a callback is about are not kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CbSequence {
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

xdr_struct! {
    /// `CB_SEQUENCE4resok`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct CbSequenceResult {
        /// As it was asked.
        pub session_id: SessionId,
        /// As it was asked.
        pub sequence_id: u32,
        /// As it was asked.
        pub slot_id: u32,
        /// The highest slot that the client takes now.
        pub highest_slot_id: u32,
        /// The highest that it would like to be used.
        pub target_highest_slot_id: u32,
    }
}

/// Most lists of calls, and most calls of a list.
const REFERRING_MAX: usize = 1024;

impl Xdr for CbSequence {
    fn put(&self, writer: &mut Writer) {
        self.session_id.put(writer);
        writer.u32(self.sequence_id);
        writer.u32(self.slot_id);
        writer.u32(self.highest_slot_id);
        writer.boolean(self.cache_this);
        writer.len(0);
    }

    fn read(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        let sequence = Self {
            session_id: Xdr::read(reader)?,
            sequence_id: reader.u32()?,
            slot_id: reader.u32()?,
            highest_slot_id: reader.u32()?,
            cache_this: reader.boolean()?,
        };
        for _ in 0..reader.len(REFERRING_MAX)? {
            SessionId::read(reader)?;
            for _ in 0..reader.len(REFERRING_MAX)? {
                let _sequence_id_and_slot_id = reader.u64()?;
            }
        }
        Ok(sequence)
    }
}

impl Callback {
    /// Its number.
    pub const fn operation(&self) -> u32 {
        match self {
            Self::Sequence(_) => CB_SEQUENCE,
            Self::Recall(_) => CB_RECALL,
            Self::RecallAny(_) => CB_RECALL_ANY,
            Self::RecallSlot { .. } => CB_RECALL_SLOT,
            Self::Unknown(operation) => *operation,
        }
    }
}

impl Xdr for Callback {
    fn put(&self, writer: &mut Writer) {
        writer.u32(self.operation());
        match self {
            Self::Sequence(sequence) => sequence.put(writer),
            Self::Recall(recall) => recall.put(writer),
            Self::RecallAny(recall) => recall.put(writer),
            Self::RecallSlot {
                target_highest_slot_id,
            } => writer.u32(*target_highest_slot_id),
            Self::Unknown(_) => {}
        }
    }

    fn read(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        Ok(match reader.u32()? {
            CB_SEQUENCE => Self::Sequence(Xdr::read(reader)?),
            CB_RECALL => Self::Recall(Xdr::read(reader)?),
            CB_RECALL_ANY => Self::RecallAny(Xdr::read(reader)?),
            CB_RECALL_SLOT => Self::RecallSlot {
                target_highest_slot_id: reader.u32()?,
            },
            unknown => Self::Unknown(unknown),
        })
    }
}

impl<'a> CallbackCompound<'a> {
    /// Reads what stands behind the header of the call.
    ///
    /// # Errors
    ///
    /// Whatever the standard does not allow: `GARBAGE_ARGS` is to be answered.
    pub fn parse(arguments: &'a [u8]) -> Result<Self, XdrError> {
        let mut reader = Reader::new(arguments);
        let tag = reader.opaque(TAG_BYTES_MAX)?;
        let minor_version = reader.u32()?;
        // `callback_ident` means something to NFSv4.0 only.
        reader.u32()?;
        let mut operations = Vec::new();
        let len = reader.len(OPERATIONS_MAX)?;
        while operations.len() < len && !matches!(operations.last(), Some(Callback::Unknown(_))) {
            operations.push(Callback::read(&mut reader)?);
        }
        if !matches!(operations.last(), Some(Callback::Unknown(_))) {
            reader.end()?;
        }
        Ok(Self {
            tag,
            minor_version,
            operations,
        })
    }

    /// Writes the arguments of a call.
    pub fn put(&self, writer: &mut Writer) {
        writer.opaque(self.tag);
        writer.u32(self.minor_version);
        writer.u32(0);
        writer.array(&self.operations);
    }
}

impl ReplyWriter<'_> {
    /// The result of a CB_SEQUENCE that has succeeded.
    pub fn cb_sequence(&mut self, result: &CbSequenceResult) {
        self.begin(CB_SEQUENCE, Status::OK);
        result.put(self.writer());
    }

    /// The result of any other callback that has succeeded.
    pub fn cb_done(&mut self, callback: &Callback) {
        self.begin(callback.operation(), Status::OK);
    }

    /// Ends the answer with a callback that has failed.
    pub fn cb_failed(mut self, callback: &Callback, status: Status) {
        self.begin(callback.operation(), status);
        self.finish();
    }

    /// Ends the answer with a callback that is not done here: NFS4ERR_NOTSUPP if the standards have it (20.2.3).
    pub fn cb_unknown(mut self, operation: u32) {
        if CB_KNOWN.contains(&operation) {
            self.begin(operation, Status::NOTSUPP);
        } else {
            self.begin(CB_ILLEGAL, Status::OP_ILLEGAL);
        }
        self.finish();
    }
}

/// `CB_COMPOUND4res`, as a server reads it: its status, and what CB_SEQUENCE says if it was done.
///
/// # Errors
///
/// When it is none.
pub fn callback_reply(results: &[u8]) -> Result<(Status, Option<CbSequenceResult>), XdrError> {
    let mut reader = Reader::new(results);
    let status = Status::read(&mut reader)?;
    reader.opaque(TAG_BYTES_MAX)?;
    if reader.len(OPERATIONS_MAX)? == 0 {
        return Ok((status, None));
    }
    let is_sequence = reader.u32()? == CB_SEQUENCE && Status::read(&mut reader)? == Status::OK;
    let sequence = is_sequence.then(|| Xdr::read(&mut reader)).transpose()?;
    Ok((status, sequence))
}
