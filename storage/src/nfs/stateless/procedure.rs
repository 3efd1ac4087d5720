//! What a conversation with a server is made of: see [`crate::remote::procedure`].

use std::time::Duration;

use crate::nfs::rpc::{self, RpcError};
use crate::nfs::v3::{self, FileHandle, MountStatus, Status};
use crate::nfs::xdr::{Reader, Wire, Writer, Xdr, XdrError};
use crate::remote::procedure;

/// What a procedure asks for.
#[derive(Debug)]
pub(super) enum Ask {
    /// The answer is [`Answer::Record`].
    Call(Call),
    /// READs are of this file. The answer is [`Answer::Done`].
    Aim(FileHandle),
    /// Time to pass. The answer is [`Answer::Done`].
    Sleep(Duration),
}

/// What a procedure is told.
#[derive(Debug)]
pub(super) enum Answer {
    Done,
    Record(Vec<u8>),
}

/// A call, but for its number and who makes it.
#[derive(Clone, Debug)]
pub(super) struct Call {
    pub(super) program: u32,
    pub(super) version: u32,
    pub(super) procedure: u32,
    pub(super) arguments: Vec<u8>,
}

/// A conversation that is under way, and ends with a `T`.
pub(super) type Procedure<T> = procedure::Procedure<Ask, Answer, T>;
/// How far one has come.
pub(super) type Progress<T> = procedure::Progress<Ask, T>;
/// The procedure's end of the conversation.
pub(super) type Port = procedure::Port<Ask, Answer>;

/// The answer to a call.
#[derive(Debug)]
pub(super) struct Reply(Vec<u8>);

/// Why a call has no result.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(in crate::nfs) enum CallError {
    /// It was not carried out at all.
    #[error(transparent)]
    Rpc(#[from] RpcError),
    /// The answer makes no sense.
    #[error("its answer makes no sense: {0}")]
    Malformed(#[from] XdrError),
    /// NFS says no.
    #[error("the server says {0}")]
    Nfs(Status),
    /// MOUNT says no.
    #[error("the server says {0}")]
    Mount(MountStatus),
}

impl From<Status> for CallError {
    fn from(status: Status) -> Self {
        Self::Nfs(status)
    }
}

impl From<MountStatus> for CallError {
    fn from(status: MountStatus) -> Self {
        Self::Mount(status)
    }
}

impl Call {
    /// A call of a procedure of NFS.
    pub(super) fn nfs(procedure: u32, arguments: &impl Xdr) -> Self {
        Self::of(rpc::program::NFS, v3::NFS_VERSION, procedure, arguments)
    }

    /// A call of a procedure of MOUNT.
    pub(super) fn mount(procedure: u32, arguments: &impl Xdr) -> Self {
        Self::of(rpc::program::MOUNT, v3::MOUNT_VERSION, procedure, arguments)
    }

    /// A call of a procedure of PORTMAP.
    pub(super) fn portmap(procedure: u32, arguments: &impl Xdr) -> Self {
        Self::of(rpc::program::PORTMAP, v3::PORTMAP_VERSION, procedure, arguments)
    }

    fn of(program: u32, version: u32, procedure: u32, arguments: &impl Xdr) -> Self {
        let mut writer = Writer::default();
        arguments.put(&mut writer);
        Self {
            program,
            version,
            procedure,
            arguments: writer.into_bytes(),
        }
    }
}

impl Reply {
    /// The result, of a procedure that has a status before it.
    pub(super) fn answer<'a, T>(&'a self) -> Result<T, CallError>
    where
        T: v3::Answer<'a>,
        CallError: From<T::Status>,
    {
        Ok(T::parse(self.results()?)??)
    }

    /// The result, of a procedure that has none.
    pub(super) fn value<'a, T: Wire<'a>>(&'a self) -> Result<T, CallError> {
        Ok(v3::parse(self.results()?)?)
    }

    /// Whether NFS was called, and wants to be called again after a while.
    pub(super) fn is_put_off(&self) -> bool {
        let mut results = Reader::new(self.results().unwrap_or_default());
        Status::read(&mut results) == Ok(Status::JUKEBOX)
    }

    fn results(&self) -> Result<&[u8], CallError> {
        let mut reader = Reader::new(&self.0);
        rpc::Reply::parse(&mut reader)?.outcome?;
        Ok(reader.rest())
    }
}

impl Port {
    /// Asks for a call.
    pub(super) async fn call(&self, call: Call) -> Reply {
        match self.ask(Ask::Call(call)).await {
            Answer::Record(record) => Reply(record),
            Answer::Done => panic!("a call was answered by nothing"),
        }
    }

    /// Says which file READs are of.
    pub(super) async fn aim(&self, handle: FileHandle) {
        self.ask(Ask::Aim(handle)).await;
    }

    /// Lets so much time pass.
    pub(super) async fn sleep(&self, time: Duration) {
        self.ask(Ask::Sleep(time)).await;
    }
}
