//! The beginning of each session: who the server is, what the file is, and whose it is.

use std::sync::Arc;
use std::time::Duration;

use crate::backend::Access;
use crate::lease::Lock;
use crate::remote::dialogue;

use super::callback::CALLBACK_PROGRAM;
use super::command::Target;
use super::error::{NfsError, Refusal};
use super::fence::{self, Tenure};
use super::plan::Plan;
use super::procedure::{CallError, Port, Reply};
use super::rpc::RpcError;
use super::session::{Manner, Terms};
use super::url::Version;
use super::v4::attributes::{FileType, number};
use super::v4::status::{Verdict, verdict};
use super::v4::{
    Allocation, Arguments, Attributes, BindConnToSession, Bitmap, CallbackSecurity, ChannelAttributes,
    ChannelFromClient, ClientId, ClientOwner, CreateSession, ExchangeId, FileHandle, Name, Operations,
    SessionId, StateProtect, Stateid, Status, Verifier,
};
use super::xid::SLOTS_MAX;

/// What earlier sessions have left behind.
#[derive(Clone, Debug, Default)]
pub(super) struct Past {
    /// The file as it was.
    pub(super) file: Option<File>,
    /// The lease as it was.
    pub(super) tenure: Option<Tenure>,
    /// The session that may go on.
    pub(super) session: Option<SessionId>,
    /// What is open and locked may be so no more.
    pub(super) is_doubtful: bool,
    /// The session is not to be gone on with.
    pub(super) is_spent: bool,
    /// What this client has itself may be in its way: it begins another life, by which the server drops that.
    pub(super) is_tangled: bool,
    /// It was closed to be handed over.
    pub(super) was_yielded: bool,
}

/// The file of an image, and what the server lets be done with it.
#[derive(Clone, Debug)]
pub(super) struct File {
    pub(super) handle: FileHandle,
    /// The directory that it is in.
    pub(super) directory: FileHandle,
    /// Who this client is to the server, and in which of its lives.
    pub(super) client_id: ClientId,
    pub(super) verifier: Verifier,
    /// The file is open.
    pub(super) open: Stateid,
    /// And locked.
    pub(super) lock: Option<Stateid>,
    pub(super) size_bytes: u64,
    /// Most data of a READ.
    pub(super) read_bytes_max: u32,
    /// Most data of a WRITE.
    pub(super) write_bytes_max: u32,
    /// Ranges can be freed.
    pub(super) can_deallocate: bool,
    /// The server says where data begin and end.
    pub(super) can_seek: bool,
    /// What the server said of its life when the session began, if the file is written.
    pub(super) life: Option<Verifier>,
    /// How the server is talked to.
    pub(super) manner: Manner,
}

/// A session that can be used.
#[derive(Debug)]
pub(super) struct Up {
    pub(super) file: File,
    pub(super) tenure: Option<Tenure>,
    /// The session of the last connection goes on: what was sent there has been sent again.
    pub(super) goes_on: bool,
}

/// Why there is none.
pub(super) type Stop = dialogue::Stop<NfsError>;

/// So many requests may be under way; one more is for procedures and signs of life.
const REQUESTS_MAX: u32 = 64;
/// One of the first kind, and that one.
const REQUESTS_MIN: u32 = 2;
/// Data of a READ or WRITE at most.
const DATA_BYTES_MAX: u32 = 1 << 20;
/// At least so much is to fit into one, and a page of a directory into an answer.
const DATA_BYTES_MIN: u32 = 32 << 10;
const BLOCK_BYTES: u32 = 4 << 10;
/// What stands around them in a record at most.
const HEADER_BYTES_MAX: u32 = 4 << 10;
/// An answer that is kept for a replay: those of procedures, whose compounds are short.
const CACHED_BYTES_MAX: u32 = 4 << 10;
const OPERATIONS_MAX: u32 = 16;
/// The lease of a server that does not say.
const LEASE: Duration = Duration::from_secs(30);
/// How long a server is waited for that has something else to do.
const DELAY: Duration = Duration::from_millis(50);
const DELAYS_MAX: u32 = 200;
/// The same after it has restarted.
const GRACE_WAIT: Duration = Duration::from_millis(200);
const GRACE_WAITS_MAX: u32 = 75;

impl File {
    /// What commands are for, and by which right.
    pub(super) fn target(&self) -> Target {
        Target {
            handle: self.handle,
            stateid: self.lock.unwrap_or(self.open).latest(),
        }
    }

    /// Whether it is written to by the same right as `other`, so that the server cannot tell the one's WRITEs from the other's.
    pub(super) fn has_right_of(&self, other: &Self) -> bool {
        self.target().stateid.other == other.target().stateid.other
    }

    /// Who has it to the server.
    pub(super) fn client(&self) -> Arrival {
        Arrival {
            manner: self.manner.clone(),
            client_id: self.client_id,
            read_bytes_max: self.read_bytes_max,
            write_bytes_max: self.write_bytes_max,
        }
    }

    /// The same in another session, which may take less at a time.
    fn as_of(&self, arrival: Arrival, verifier: Verifier) -> Self {
        Self {
            client_id: arrival.client_id,
            verifier,
            life: None,
            manner: arrival.manner,
            read_bytes_max: self.read_bytes_max.min(arrival.read_bytes_max),
            write_bytes_max: self.write_bytes_max.min(arrival.write_bytes_max),
            ..self.clone()
        }
    }
}

/// A client that has a session, and how much data its calls carry.
#[derive(Clone, Debug)]
pub(super) struct Arrival {
    pub(super) manner: Manner,
    pub(super) client_id: ClientId,
    read_bytes_max: u32,
    write_bytes_max: u32,
}

/// Goes on with the session that there was, or makes one, and has the file open and leased in it.
pub(super) async fn bring_up(port: Port, plan: Arc<Plan>, past: Past) -> Result<Up, Stop> {
    if let (Some(session), Some(file)) = (past.session, &past.file)
        && binds(&port, &file.manner, session).await?
    {
        if past.is_spent || past.was_yielded {
            end_session(&port, &file.manner, session).await?;
        } else {
            port.rejoin().await;
            return go_on(&port, &plan, file, &past).await;
        }
    }
    let (mut file, tenure) = match &past.file {
        Some(before) if past.was_yielded => {
            // What the last attempt may have left open is closed by another life.
            let verifier = Verifier(random());
            let arrival = enter(&port, &plan, verifier).await?;
            complete(&port).await?;
            let before = before.as_of(arrival, verifier);
            fence::come_back(&port, &plan, &before, past.tenure.as_ref()).await?
        }
        Some(before) => {
            let verifier = if past.is_tangled {
                Verifier(random())
            } else {
                before.verifier
            };
            let arrival = enter(&port, &plan, verifier).await?;
            let is_known = arrival.client_id == before.client_id;
            let before = before.as_of(arrival, verifier);
            if is_known {
                complete(&port).await?;
                let (file, tenure) = fence::prove(&port, &plan, &before, past.tenure.as_ref()).await?;
                let is_renewed = !file.has_right_of(&before);
                let file = if is_renewed {
                    file
                } else {
                    fence::renew(&port, &plan, file).await?
                };
                (file, tenure)
            } else {
                fence::recover(&port, &plan, &before, past.tenure.as_ref()).await?
            }
        }
        None => {
            // Another life for each attempt: what the last one may have left open is closed by that.
            let verifier = Verifier(random());
            let arrival = enter(&port, &plan, verifier).await?;
            complete(&port).await?;
            let found = find(&port, &plan).await;
            let file = match found {
                Ok(found) => found.of(arrival, verifier),
                Err(stop) => {
                    fence::leave(&port, &arrival).await;
                    return Err(stop);
                }
            };
            fence::claim(&port, &plan, file).await?
        }
    };
    let tenure = fence::raise(&port, &plan, &file, tenure).await?;
    if plan.access == Access::ReadWrite && file.life.is_none() {
        // Zeros that are made by DEALLOCATE come without a verifier: from when on they may be forgotten is to be known before. A
        // server that does not commit now may read, and says what is the matter when it is asked to flush.
        file.life = fence::commit(&port, &file).await.ok();
    }
    port.aim(file.target()).await;
    Ok(Up {
        file,
        tenure,
        goes_on: false,
    })
}

/// Goes on with a session that this connection has joined.
async fn go_on(port: &Port, plan: &Plan, file: &File, past: &Past) -> Result<Up, Stop> {
    let (file, tenure) = if past.is_doubtful {
        fence::prove(port, plan, file, past.tenure.as_ref()).await?
    } else {
        (file.clone(), past.tenure.clone())
    };
    let tenure = fence::raise(port, plan, &file, tenure).await?;
    port.aim(file.target()).await;
    port.replay().await;
    Ok(Up {
        file,
        tenure,
        goes_on: true,
    })
}

/// A session of a client that has nothing open, for whoever looks after an image.
pub(super) async fn arrive(port: &Port, plan: &Plan) -> Result<Arrival, Stop> {
    let arrival = enter(port, plan, Verifier(random())).await?;
    complete(port).await?;
    Ok(arrival)
}

/// Whether there still is a session: then this connection carries it.
async fn binds(port: &Port, manner: &Manner, session_id: SessionId) -> Result<bool, Stop> {
    let bind = BindConnToSession {
        session_id,
        direction: ChannelFromClient::ForeOrBoth,
        use_rdma: false,
    };
    let bind = Operations::new().then(&Arguments::BindConnToSession(bind));
    let reply = call(port, manner, bind).await?;
    match reply
        .results()
        .and_then(|mut results| Ok(results.bind_conn_to_session()?))
    {
        Ok(_) => Ok(true),
        Err(error) => match error.status().map(verdict) {
            Some(Verdict::SessionLost | Verdict::ClientLost) => Ok(false),
            _ => Err(failed("go on with a session", error)),
        },
    }
}

/// Ends a session that this connection carries. Afterwards nothing that was sent in it is carried out any more: a server that
/// is still at it says so.
async fn end_session(port: &Port, manner: &Manner, session_id: SessionId) -> Result<(), Stop> {
    let destroy = Operations::new().then(&Arguments::DestroySession(session_id));
    let reply = call(port, manner, destroy).await?;
    let ended = reply
        .results()
        .and_then(|mut results| Ok(results.destroy_session()?));
    match ended {
        Ok(()) => Ok(()),
        Err(error) => match error.status().map(verdict) {
            Some(Verdict::SessionLost | Verdict::ClientLost) => Ok(()),
            _ => Err(failed("end the last session", error)),
        },
    }
}

/// Makes a client known, and a session of it.
pub(super) async fn enter(port: &Port, plan: &Plan, verifier: Verifier) -> Result<Arrival, Stop> {
    let (manner, client_id, sequence_id) = exchange_id(port, plan, verifier).await?;
    let channel = |max_requests| ChannelAttributes {
        header_pad_size: 0,
        max_request_size: DATA_BYTES_MAX + HEADER_BYTES_MAX,
        max_response_size: DATA_BYTES_MAX + HEADER_BYTES_MAX,
        max_response_size_cached: CACHED_BYTES_MAX,
        max_operations: OPERATIONS_MAX,
        max_requests,
        rdma_ird: None,
    };
    let create = CreateSession {
        client_id,
        sequence_id,
        flags: CreateSession::CONN_BACK_CHAN,
        fore_channel: channel(REQUESTS_MAX + 1),
        back_channel: ChannelAttributes {
            max_request_size: HEADER_BYTES_MAX,
            max_response_size: HEADER_BYTES_MAX,
            ..channel(1)
        },
        callback_program: CALLBACK_PROGRAM,
        callback_security: vec![CallbackSecurity::None],
    };
    let reply = call(
        port,
        &manner,
        Operations::new().then(&Arguments::CreateSession(create)),
    )
    .await?;
    let made = reply
        .results()
        .and_then(|mut results| Ok(results.create_session()?));
    let made = made.map_err(|error| failed("make a session", error))?;
    let granted = made.fore_channel;
    // Whole blocks.
    let data_bytes_max =
        |granted: u32| granted.saturating_sub(HEADER_BYTES_MAX).min(DATA_BYTES_MAX) & !(BLOCK_BYTES - 1);
    let arrival = Arrival {
        manner: manner.clone(),
        client_id,
        read_bytes_max: data_bytes_max(granted.max_response_size),
        write_bytes_max: data_bytes_max(granted.max_request_size),
    };
    if granted.max_requests < REQUESTS_MIN
        || arrival.read_bytes_max < DATA_BYTES_MIN
        || arrival.write_bytes_max < DATA_BYTES_MIN
    {
        end_session(port, &manner, made.session_id).await?;
        return Err(Stop::Later(NfsError::Narrow {
            requests: granted.max_requests,
            request_bytes: granted.max_request_size.min(granted.max_response_size),
        }));
    }
    port.begin(Terms {
        id: made.session_id,
        manner,
        slots: usize::try_from(granted.max_requests).unwrap_or(SLOTS_MAX),
        lease: LEASE,
        patience: Duration::ZERO,
    })
    .await;
    port.set_lease(lease(port).await?).await;
    Ok(arrival)
}

async fn exchange_id(port: &Port, plan: &Plan, verifier: Verifier) -> Result<(Manner, ClientId, u32), Stop> {
    let minor_versions: &[u32] = match plan.version {
        None => &[2, 1],
        Some(Version::V42) => &[2],
        Some(Version::V41) => &[1],
        Some(Version::V3) => unreachable!("NFSv3 has no sessions"),
    };
    let exchange = ExchangeId {
        client_owner: ClientOwner {
            verifier,
            owner_id: plan.client.clone(),
        },
        flags: ExchangeId::USE_NON_PNFS,
        state_protect: StateProtect::None,
        implementation: None,
    };
    let exchange = Operations::new().then(&Arguments::ExchangeId(exchange));
    for minor_version in minor_versions {
        let manner = Manner {
            credential: Arc::clone(&plan.credential),
            minor_version: *minor_version,
        };
        let reply = call(port, &manner, exchange.clone()).await?;
        match reply.results().and_then(|mut results| Ok(results.exchange_id()?)) {
            Ok(known) => return Ok((manner, known.client_id, known.sequence_id)),
            Err(error) if error.status() == Some(Status::MINOR_VERS_MISMATCH) => {}
            Err(CallError::Rpc(RpcError::ProgramMismatch { low, high })) => {
                return Err(too_old(plan, Some((low, high))));
            }
            Err(CallError::Rpc(error)) => return Err(Stop::Never(error.into())),
            Err(error) => return Err(failed("make this client known", error)),
        }
    }
    Err(too_old(plan, None))
}

fn too_old(plan: &Plan, range: Option<(u32, u32)>) -> Stop {
    Stop::Never(NfsError::Version {
        wanted: match plan.version {
            Some(Version::V42) => "4.2",
            _ => "4.1",
        },
        range,
    })
}

/// How long the server keeps what a client has that gives no sign of life.
async fn lease(port: &Port) -> Result<Duration, Stop> {
    let ask = Operations::new()
        .then(&Arguments::Putrootfh)
        .then(&Arguments::Getattr(Bitmap::of(&[number::LEASE_TIME])));
    let reply = run(port, ask).await?;
    let told = reply.results().and_then(|mut results| {
        results.put_root_fh()?;
        Ok(results.getattr()?)
    });
    let told = told.map_err(|error| failed("ask for the lease time", error))?;
    match told.lease_time {
        None => Ok(LEASE),
        // It is not made longer, or something would be written behind its end.
        Some(0) => Err(Stop::Later(NfsError::NoLease)),
        Some(seconds) => Ok(Duration::from_secs(seconds.into())),
    }
}

/// Says that nothing more will be reclaimed.
pub(super) async fn complete(port: &Port) -> Result<(), Stop> {
    let reply = run(port, Operations::new().then(&Arguments::ReclaimComplete(false))).await?;
    match reply
        .results()
        .and_then(|mut results| Ok(results.reclaim_complete()?))
    {
        Ok(()) => Ok(()),
        Err(error) if error.status() == Some(Status::COMPLETE_ALREADY) => Ok(()),
        Err(error) => Err(failed("say that nothing is reclaimed", error)),
    }
}

/// A file that was found.
pub(super) struct Found {
    handle: FileHandle,
    directory: FileHandle,
    size_bytes: u64,
    read_bytes_max: u32,
    write_bytes_max: u32,
}

impl Found {
    /// The same, to be opened by this client.
    pub(super) fn of(self, arrival: Arrival, verifier: Verifier) -> File {
        let bytes_max = |file: u32, session: u32| file.min(session) & !(BLOCK_BYTES - 1);
        File {
            handle: self.handle,
            directory: self.directory,
            client_id: arrival.client_id,
            verifier,
            open: Stateid::ANONYMOUS,
            lock: None,
            size_bytes: self.size_bytes,
            read_bytes_max: bytes_max(self.read_bytes_max, arrival.read_bytes_max),
            write_bytes_max: bytes_max(self.write_bytes_max, arrival.write_bytes_max),
            can_deallocate: false,
            // Until it has refused to.
            can_seek: arrival.manner.minor_version >= 2,
            life: None,
            manner: arrival.manner,
        }
    }
}

/// Looks for the file, and at it.
pub(super) async fn find(port: &Port, plan: &Plan) -> Result<Found, Stop> {
    let (name, _) = plan.path.file_and_directories();
    let at = Place::of_image(port, plan).await?;
    let (handle, attributes) = at.look(port, plan, name).await?;
    check_kind(&plan.path.to_string(), attributes.file_type)?;
    let size_bytes = attributes.size.unwrap_or(0);
    check_size(size_bytes)?;
    let bytes_max = |told: Option<u64>| {
        let told = told.and_then(|told| u32::try_from(told).ok());
        // A server that says less than one block means something else.
        told.unwrap_or(DATA_BYTES_MAX).max(BLOCK_BYTES)
    };
    Ok(Found {
        handle,
        directory: at.handle,
        size_bytes,
        read_bytes_max: bytes_max(attributes.maxread),
        write_bytes_max: bytes_max(attributes.maxwrite),
    })
}

/// The directory that the file is in, or is to be.
pub(super) async fn directory(port: &Port, plan: &Plan) -> Result<FileHandle, Stop> {
    Ok(Place::of_image(port, plan).await?.handle)
}

/// Bytes that nobody else has.
pub(super) fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    crate::lease::fill_random(&mut bytes);
    bytes
}

/// Whether ranges of the file, which is open and leased, can be freed: one behind its end is tried.
pub(super) async fn can_deallocate(port: &Port, file: &File) -> Result<bool, Stop> {
    if file.manner.minor_version < 2 {
        return Ok(false);
    }
    let behind = Allocation {
        stateid: file.target().stateid,
        offset: file.size_bytes,
        length: 1,
    };
    let ask = Operations::new()
        .then(&Arguments::Putfh(file.handle))
        .then(&Arguments::Deallocate(behind));
    let reply = run(port, ask).await?;
    let done = reply.results().and_then(|mut results| {
        results.put_fh()?;
        Ok(results.deallocate()?)
    });
    match done {
        Ok(()) => Ok(true),
        // Nothing is there, and so nothing can be freed; but it is known how.
        Err(error) if error.status() == Some(Status::INVAL) => Ok(true),
        Err(error) if error.status().is_some() => Ok(false),
        Err(error) => Err(failed("ask whether ranges can be freed", error)),
    }
}

/// A directory on the way to the image.
struct Place {
    handle: FileHandle,
    /// For messages.
    path: String,
}

impl Place {
    /// The directory of the image.
    async fn of_image(port: &Port, plan: &Plan) -> Result<Self, Stop> {
        let (_, directories) = plan.path.file_and_directories();
        let mut at = Self::root(port).await?;
        for directory in directories {
            at = at.enter(port, plan, directory).await?;
        }
        Ok(at)
    }

    async fn root(port: &Port) -> Result<Self, Stop> {
        let ask = Operations::new()
            .then(&Arguments::Putrootfh)
            .then(&Arguments::Getfh);
        let reply = run(port, ask).await?;
        let handle = reply.results().and_then(|mut results| {
            results.put_root_fh()?;
            Ok(results.get_fh()?)
        });
        Ok(Self {
            handle: handle.map_err(|error| failed("look at the root of the server", error))?,
            path: "/".to_owned(),
        })
    }

    async fn enter(self, port: &Port, plan: &Plan, name: &Name) -> Result<Self, Stop> {
        let (handle, attributes) = match self.lookup(port, name).await? {
            Ok(found) => found,
            Err(Status::NOENT) => {
                return Err(Stop::Never(NfsError::NoDirectory {
                    name: name.to_string(),
                    parent: self.path,
                }));
            }
            Err(status) => return Err(self.refused(plan, name, status)),
        };
        let path = format!("{}/{name}", self.path.trim_end_matches('/'));
        match attributes.file_type {
            Some(FileType::Directory) | None => Ok(Self { handle, path }),
            Some(kind) => Err(not_a_file(
                &path,
                kind,
                "what stands before the last part of the path is a directory",
            )),
        }
    }

    async fn look(&self, port: &Port, plan: &Plan, name: &Name) -> Result<(FileHandle, Attributes), Stop> {
        match self.lookup(port, name).await? {
            Ok(found) => Ok(found),
            Err(Status::NOENT) => Err(Stop::Never(NfsError::Missing {
                name: name.to_string(),
                parent: self.path.clone(),
            })),
            Err(status) => Err(self.refused(plan, name, status)),
        }
    }

    fn refused(&self, plan: &Plan, name: &Name, status: Status) -> Stop {
        let path = format!("{}/{name}", self.path.trim_end_matches('/'));
        match status {
            Status::ACCESS | Status::PERM | Status::WRONGSEC => plan.denied("to look for", path),
            Status::NOTDIR | Status::SYMLINK => not_a_file(&path, FileType::Link, LINK_ADVICE),
            status => failed("look for the image", CallError::of_status(status)),
        }
    }

    async fn lookup(
        &self,
        port: &Port,
        name: &Name,
    ) -> Result<Result<(FileHandle, Attributes), Status>, Stop> {
        let wanted = [number::TYPE, number::SIZE, number::MAXREAD, number::MAXWRITE];
        let ask = Operations::new()
            .then(&Arguments::Putfh(self.handle))
            .then(&Arguments::Lookup(name.clone()))
            .then(&Arguments::Getfh)
            .then(&Arguments::Getattr(Bitmap::of(&wanted)));
        let reply = run(port, ask).await?;
        let found = reply.results().and_then(|mut results| {
            results.put_fh()?;
            results.lookup()?;
            Ok((results.get_fh()?, results.getattr()?))
        });
        match found {
            Ok(found) => Ok(Ok(found)),
            Err(error) => match error.status() {
                Some(status) => Ok(Err(status)),
                None => Err(failed("look for the image", error)),
            },
        }
    }
}

const LINK_ADVICE: &str = "write the path that it leads to";

fn check_kind(path: &str, kind: Option<FileType>) -> Result<(), Stop> {
    match kind {
        Some(FileType::Regular) | None => Ok(()),
        Some(FileType::Link) => Err(not_a_file(path, FileType::Link, LINK_ADVICE)),
        Some(kind) => Err(not_a_file(path, kind, "an image is a regular file")),
    }
}

fn not_a_file(path: &str, kind: FileType, advice: &'static str) -> Stop {
    Stop::Never(NfsError::NotAFile {
        name: path.to_owned(),
        kind: match kind {
            FileType::Regular => "a file",
            FileType::Directory => "a directory",
            FileType::Link => "a symbolic link",
            _ => "neither a file nor a directory",
        },
        advice,
    })
}

/// Whether a disk can have that size.
pub(super) fn check_size(size_bytes: u64) -> Result<(), Stop> {
    const SECTOR_BYTES: u64 = 512;
    if size_bytes < SECTOR_BYTES {
        return Err(Stop::Never(NfsError::TooSmall { size_bytes }));
    }
    if !size_bytes.is_multiple_of(SECTOR_BYTES) {
        return Err(Stop::Never(NfsError::PartialSector { size_bytes }));
    }
    Ok(())
}

/// What is opened and locked for a plan.
pub(super) fn has_lock(plan: &Plan) -> bool {
    plan.lock == Lock::Exclusive && plan.access == Access::ReadWrite
}

/// Asks for a compound outside of any session, until the server has time for it.
async fn call(port: &Port, manner: &Manner, operations: Operations) -> Result<Reply, Stop> {
    for _ in 0..DELAYS_MAX {
        let reply = port.call(manner, operations.clone()).await;
        if reply.status() != Some(Status::DELAY) {
            return Ok(reply);
        }
        port.sleep(DELAY).await;
    }
    Err(failed("begin a session", CallError::of_status(Status::DELAY)))
}

/// Asks for a compound in the session, until the server has time for it.
pub(super) async fn run(port: &Port, operations: Operations) -> Result<Reply, Stop> {
    for _ in 0..DELAYS_MAX {
        let reply = port.call_in_session(operations.clone()).await;
        if reply.status() != Some(Status::DELAY) {
            return Ok(reply);
        }
        port.sleep(DELAY).await;
    }
    Err(failed(
        "have something done by the server",
        CallError::of_status(Status::DELAY),
    ))
}

/// The same of one that a server refuses until all who had something open before it restarted have come back.
pub(super) async fn run_after_grace(port: &Port, operations: Operations) -> Result<Reply, Stop> {
    for _ in 0..GRACE_WAITS_MAX {
        let reply = run(port, operations.clone()).await?;
        if reply.status() != Some(Status::GRACE) {
            return Ok(reply);
        }
        port.sleep(GRACE_WAIT).await;
    }
    Err(Stop::Later(NfsError::Grace))
}

/// That a compound did not end well, and may next time.
pub(super) fn failed(action: &'static str, error: CallError) -> Stop {
    Stop::Later(NfsError::Call {
        action,
        source: Refusal(error.into()),
    })
}
