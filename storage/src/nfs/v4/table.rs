//! The one table of operations: what each is called, its number (RFC 8881, 16.2.3; RFC 7862, 15), its arguments and its
//! results.
//!
//! A row makes a constant of [`Operation`], a method of [`Compound`] that asks for it, one of [`CompoundReply`] that
//! pulls its result, and a variant of [`Arguments`] and of [`Results`] for a server.

use std::fmt;

use super::attributes::Attributes;
use super::{
    Access, AccessResult, Allocation, BindConnToSession, BindConnToSessionResult, Bitmap, ChangeInfo,
    ClientId, CloneRange, Close, Commit, Compound, CompoundReply, CreateSession, CreateSessionResult,
    ExchangeId, ExchangeIdResult, FileHandle, Lock, Locku, Name, Open, OpenResult, Read, ReadPlusResult,
    ReadResult, Readdir, ReaddirResult, Rename, RenameResult, ReplyError, SecInfoFlavors, SecInfoStyle, Seek,
    SeekResult, Sequence, SequenceResult, SessionId, Setattr, Stateid, Stateids, Statuses, Verifier, Write,
    WriteResult,
};
use crate::nfs::xdr::{Reader, Wire, Writer, XdrError, xdr_newtype};

xdr_newtype! {
    /// `nfs_opnum4`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Operation(pub u32);
}

macro_rules! operations {
    ($(
        $(#[$doc:meta])*
        $constant:ident $variant:ident = $number:literal,
        $method:ident($($argument:ident: $argument_type:ty)?) -> ($($result:ident: $result_type:ty)?);
    )*) => {
        impl Operation {
            $($(#[$doc])* pub const $constant: Self = Self($number);)*
        }

        impl fmt::Display for Operation {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match *self {
                    $(Self::$constant => f.write_str(stringify!($constant)),)*
                    Self(other) => write!(f, "operation {other}"),
                }
            }
        }

        impl<'a> Compound<'a> {
            $($(#[$doc])* pub fn $method(&mut self $(, $argument: &$argument_type)?) {
                self.begin(Operation::$constant);
                $(Wire::write_to($argument, self.writer());)?
            })*
        }

        impl<'a> CompoundReply<'a> {
            $(
                $(#[$doc])*
                ///
                /// # Errors
                ///
                /// What the server says instead, or that it says nothing of the kind.
                pub fn $method(&mut self) -> Result<one_type!($($result_type)?), ReplyError> {
                    self.begin(Operation::$constant)?;
                    Ok(one_value!($(self.wire::<$result_type>()?)?))
                }
            )*
        }

        /// `nfs_argop4`: an operation that a server is asked for.
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub enum Arguments<'a> {
            $($(#[$doc])* $variant $(($argument_type))?,)*
            /// An operation that is not in the table. Nothing that follows can be read.
            Unknown(Operation),
        }

        impl<'a> Arguments<'a> {
            /// Which operation it is.
            pub const fn operation(&self) -> Operation {
                match self {
                    $(Self::$variant $((one_pattern!($argument)))? => Operation::$constant,)*
                    Self::Unknown(operation) => *operation,
                }
            }

            pub(super) fn read(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
                Ok(match Operation(reader.u32()?) {
                    $(Operation::$constant => Self::$variant $((Wire::read_from(reader).map(|$argument| $argument)?))?,)*
                    unknown => Self::Unknown(unknown),
                })
            }

            /// Writes it, with the number of the operation.
            pub fn put(&self, writer: &mut Writer) {
                writer.u32(self.operation().0);
                match self {
                    $(Self::$variant $(($argument))? => { $(Wire::write_to($argument, writer);)? })*
                    Self::Unknown(_) => {}
                }
            }
        }

        /// `nfs_resop4` of an operation that has succeeded.
        #[derive(Clone, Debug, PartialEq, Eq)]
        #[expect(clippy::large_enum_variant, reason = "a compound has few, and they live for one call")]
        pub enum Results<'a> {
            $($(#[$doc])* $variant $(($result_type))?,)*
        }

        impl<'a> Results<'a> {
            /// Which operation it is.
            pub const fn operation(&self) -> Operation {
                match self {
                    $(Self::$variant $((one_pattern!($result)))? => Operation::$constant,)*
                }
            }

            pub(super) fn pull(
                operation: Operation,
                reply: &mut CompoundReply<'a>,
            ) -> Result<Option<Self>, ReplyError> {
                Ok(Some(match operation {
                    $(Operation::$constant => {
                        let result = reply.$method()?;
                        of_one!(Self::$variant, result $(, $result)?)
                    })*
                    _ => return Ok(None),
                }))
            }

            pub(super) fn put(&self, writer: &mut Writer) {
                match self {
                    $(Self::$variant $(($result))? => { $(Wire::write_to($result, writer);)? })*
                }
            }
        }
    };
}

macro_rules! one_type {
    () => {
        ()
    };
    ($type:ty) => {
        $type
    };
}

macro_rules! one_value {
    () => {
        ()
    };
    ($value:expr) => {
        $value
    };
}

macro_rules! one_pattern {
    ($name:ident) => {
        _
    };
}

macro_rules! of_one {
    ($variant:expr, $result:ident) => {{
        let () = $result;
        $variant
    }};
    ($variant:expr, $result:ident, $name:ident) => {
        $variant($result)
    };
}

operations! {
    /// What the user may do with the current file.
    ACCESS Access = 3, access(access: Access) -> (granted: AccessResult);
    /// Gives an open up.
    CLOSE Close = 4, close(close: Close) -> (stateid: Stateid);
    /// Makes what was written last.
    COMMIT Commit = 5, commit(commit: Commit) -> (verifier: Verifier);
    /// Gives a delegation back.
    DELEGRETURN Delegreturn = 8, delegreturn(stateid: Stateid) -> ();
    /// Attributes of the current file.
    GETATTR Getattr = 9, getattr(wanted: Bitmap) -> (attributes: Attributes);
    /// The handle of the current file.
    GETFH Getfh = 10, get_fh() -> (handle: FileHandle);
    /// Locks a range of the current file; [`ReplyError::Denied`] if somebody else has it.
    LOCK Lock = 12, lock(lock: Lock) -> (stateid: Stateid);
    /// Unlocks one.
    LOCKU Locku = 14, locku(unlock: Locku) -> (stateid: Stateid);
    /// Makes a file in the current directory the current one.
    LOOKUP Lookup = 15, lookup(name: Name) -> ();
    /// Opens a file, and makes it the current one.
    OPEN Open = 18, open(open: Open) -> (opened: OpenResult);
    /// Makes the file of that handle the current one.
    PUTFH Putfh = 22, put_fh(handle: FileHandle) -> ();
    /// Makes the root of the server the current directory.
    PUTROOTFH Putrootfh = 24, put_root_fh() -> ();
    /// Bytes of the current file.
    READ Read = 25, read(read: Read) -> (bytes: ReadResult<'a>);
    /// Entries of the current directory.
    READDIR Readdir = 26, readdir(readdir: Readdir) -> (entries: ReaddirResult);
    /// Removes a file from the current directory.
    REMOVE Remove = 28, remove(name: Name) -> (change_info: ChangeInfo);
    /// Moves a file from the saved directory to the current one.
    RENAME Rename = 29, rename(rename: Rename) -> (change_infos: RenameResult);
    /// Makes the saved file the current one.
    RESTOREFH Restorefh = 31, restore_fh() -> ();
    /// Saves the current file.
    SAVEFH Savefh = 32, save_fh() -> ();
    /// Sets attributes of the current file.
    SETATTR Setattr = 34, setattr(setattr: Setattr) -> (attributes_set: Bitmap);
    /// Goes on only if the current file has these attributes.
    VERIFY Verify = 37, verify(attributes: Attributes) -> ();
    /// Writes to the current file bytes that are few enough to be copied.
    WRITE Write = 38, write_copied(write: Write<'a>) -> (written: WriteResult);
    /// Makes this connection one of a session.
    BIND_CONN_TO_SESSION BindConnToSession = 41,
    bind_conn_to_session(bind: BindConnToSession) -> (bound: BindConnToSessionResult);
    /// Says who we are.
    EXCHANGE_ID ExchangeId = 42, exchange_id(exchange: ExchangeId) -> (exchanged: ExchangeIdResult);
    /// Makes a session.
    CREATE_SESSION CreateSession = 43, create_session(create: CreateSession) -> (created: CreateSessionResult);
    /// Ends a session.
    DESTROY_SESSION DestroySession = 44, destroy_session(session_id: SessionId) -> ();
    /// Gives up all locks of a lock owner.
    FREE_STATEID FreeStateid = 45, free_stateid(stateid: Stateid) -> ();
    /// Which credentials are taken.
    SECINFO_NO_NAME SecinfoNoName = 52, secinfo_no_name(style: SecInfoStyle) -> (flavors: SecInfoFlavors);
    /// Takes a slot of a session, for this compound.
    SEQUENCE Sequence = 53, sequence(sequence: Sequence) -> (slot: SequenceResult);
    /// What is the matter with states.
    TEST_STATEID TestStateid = 55, test_stateid(stateids: Stateids) -> (statuses: Statuses);
    /// Gives up everything that a client holds.
    DESTROY_CLIENTID DestroyClientid = 57, destroy_client_id(client_id: ClientId) -> ();
    /// Says that nothing more will be reclaimed; `true`: of the current file system.
    RECLAIM_COMPLETE ReclaimComplete = 58, reclaim_complete(one_fs: bool) -> ();
    /// Reserves room for a range.
    ALLOCATE Allocate = 59, allocate(allocation: Allocation) -> ();
    /// Frees the room of a range, which reads as zeros then.
    DEALLOCATE Deallocate = 62, deallocate(allocation: Allocation) -> ();
    /// Bytes of the current file, or where they are zeros that need no room.
    READ_PLUS ReadPlus = 68, read_plus(read: Read) -> (contents: ReadPlusResult<'a>);
    /// Where bytes or zeros begin.
    SEEK Seek = 69, seek(seek: Seek) -> (found: SeekResult);
    /// Makes a range of the current file share that of the saved one.
    CLONE Clone = 71, clone_range(clone: CloneRange) -> ();
}

impl Operation {
    /// What a server calls an operation that it does not have a number for.
    pub const ILLEGAL: Self = Self(10_044);
}
