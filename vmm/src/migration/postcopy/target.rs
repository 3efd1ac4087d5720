//! The target: a thread that fetches what is absent of the memory of a guest that runs.
//!
//! ```text
//!   cut ──a pair of connections──► up ──nothing is absent──► whole ──the source has heard it──► over
//!    ▲                              │                          │
//!    └──────────────────────────────┴── one of them is lost ───┘
//!    └── nobody has come back for too long, or nobody waits any more: the guest ends
//! ```
//!
//! The thread never touches guest memory by its address: it hands whole pages to the kernel. The threads of the monitor need no
//! page that is absent: what KVM touches for them goes along with the state.

use std::fmt;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use coracle_storage::threads::{self, Kind as ThreadKind};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::super::door::{Caller, Door, Latch};
use super::super::join::Token;
use super::super::stream::Stream;
use super::super::wire::{Kind, Wire, WireError};
use super::absent;
use super::filling::Filling;
use super::frames::{FrameError, Heard, take_frame};
use super::rejoin::{Pair, Pairing, Rejoin};
use crate::end::{End, Ending};
use crate::memory::pager::Remains;
use crate::snapshot::memory::PAGE_BYTES;
use crate::state::whole;

/// How long a connection may be silent while something is absent.
const SILENCE_MAX: Duration = Duration::from_secs(10);
/// How often the clock is looked at, if nothing happens.
const LOOK: Duration = Duration::from_millis(500);
/// How long the thread may take to end once it was told to.
const END_MAX: Duration = Duration::from_secs(2);
/// How many frames are taken in before it is looked who waits.
const FRAMES_MAX: usize = 8;

/// What a fetcher begins with.
pub struct Prepared {
    /// The memory.
    pub filling: Filling,
    /// Where the source calls.
    pub door: Arc<Door>,
    /// What it shows.
    pub token: Token,
    /// How long it may be away.
    pub wait: Duration,
    /// Where it is announced that it was away for longer.
    pub ending: Ending,
}

/// The control end of the thread. Dropped, it ends the thread, within a limit; memory that is not all there by then stays guarded
/// for as long as the process lives. To be dropped as a pager is.
pub struct Fetcher {
    status: Arc<Status>,
    orders: Orders,
    ended: Receiver<Remains>,
    has_ended: bool,
    door: Mutex<Kept>,
    token: Token,
}

/// A door that is kept open on another thread.
struct Kept {
    door: Arc<Door>,
    latch: Arc<Latch>,
}

/// How far it is.
#[derive(Debug)]
pub struct Status {
    left_pages: AtomicU64,
    is_connected: AtomicBool,
    has_run: AtomicBool,
}

/// Why the guest is not given up.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the text of an error is its documentation")]
pub enum FetcherError {
    #[error("the source is there, and {left_mib} MiB of the guest's memory are still on their way from it")]
    Connected { left_mib: u64 },
    #[error("the host has nothing left for it")]
    Host(#[from] io::Error),
}

enum Order {
    Caller(Box<(Rejoin, Wire<Stream>)>),
    GiveUp,
    Stop,
}

#[derive(Clone)]
struct Orders {
    queue: Sender<Order>,
    bell: Arc<OwnedFd>,
}

impl Orders {
    fn tell(&self, order: Order) {
        // Who has ended by itself has told so.
        let _ = self.queue.send(order);
        // It can only fail for having rung more often than anybody could count.
        let _ = rustix::io::write(&*self.bell, &1_u64.to_ne_bytes());
    }
}

impl Status {
    /// How much is absent, in bytes.
    pub fn left_bytes(&self) -> u64 {
        self.left_pages.load(Ordering::Relaxed) * PAGE_BYTES as u64
    }

    /// Whether the source is there.
    pub fn is_connected(&self) -> bool {
        self.is_connected.load(Ordering::Relaxed)
    }
}

impl Fetcher {
    /// Begins to fetch, as soon as the source calls.
    ///
    /// # Errors
    ///
    /// When the host has no thread or descriptor to give.
    pub fn start(prepared: Prepared) -> io::Result<Self> {
        let Prepared {
            filling,
            door,
            token,
            wait,
            ending,
        } = prepared;
        let status = Arc::new(Status {
            left_pages: AtomicU64::new(filling.left()),
            is_connected: AtomicBool::new(false),
            has_run: AtomicBool::new(false),
        });
        let (queue, inbox) = channel();
        let bell = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let orders = Orders { queue, bell };
        let fetching = Fetching {
            filling,
            inbox,
            bell: Arc::clone(&orders.bell),
            status: Arc::clone(&status),
            wait,
            pairing: Pairing::default(),
            link: Link::cut(),
            is_whole: false,
        };
        let (ended_outbox, ended) = channel();
        let latch = keep(&door, token, &orders)?;
        threads::spawn(ThreadKind::Pager, "fetcher", move || {
            // Whoever would like to know may have given up.
            let _ = ended_outbox.send(fetching.run(&ending));
        })?;
        Ok(Self {
            status,
            orders,
            ended,
            has_ended: false,
            door: Mutex::new(Kept { door, latch }),
            token,
        })
    }

    /// The guest runs: from now on the source need not keep what a guest that has ended has left.
    pub fn guest_runs(&self) {
        self.status.has_run.store(true, Ordering::Relaxed);
    }

    /// How far it is.
    pub fn status(&self) -> &Arc<Status> {
        &self.status
    }

    /// Where the source is to call.
    pub fn listen(&self) -> Option<String> {
        let kept = self.door.lock().expect(NO_PANIC);
        Some(kept.door.listener.local_addr().ok()?.to_string())
    }

    /// Has the source call at `listener` from now on.
    ///
    /// # Errors
    ///
    /// When the host has no thread to give, and it is to call where it did before.
    pub fn listen_at(&self, listener: TcpListener) -> io::Result<()> {
        let mut kept = self.door.lock().expect(NO_PANIC);
        let door = Arc::new(Door {
            listener,
            identity: Arc::clone(&kept.door.identity),
            from: kept.door.from.clone(),
        });
        let latch = keep(&door, self.token, &self.orders)?;
        kept.latch.shut();
        *kept = Kept { door, latch };
        Ok(())
    }

    /// Ends the guest, of which a part is at a source that is not there.
    ///
    /// # Errors
    ///
    /// When it is.
    pub fn give_up(&self) -> Result<(), FetcherError> {
        if self.status.is_connected() {
            let left_mib = self.status.left_bytes() >> 20;
            return Err(FetcherError::Connected { left_mib });
        }
        self.orders.tell(Order::GiveUp);
        Ok(())
    }

    /// Ends the thread, and says what it leaves behind. The vCPUs and the devices of the machine are gone.
    pub fn end(mut self) -> Remains {
        self.stop()
    }

    fn stop(&mut self) -> Remains {
        if std::mem::replace(&mut self.has_ended, true) {
            return Remains::Nothing;
        }
        self.door.lock().expect(NO_PANIC).latch.shut();
        self.orders.tell(Order::Stop);
        match self.ended.recv_timeout(END_MAX) {
            Ok(remains) => remains,
            Err(RecvTimeoutError::Disconnected) => panic!("a fetcher tells its end"),
            Err(RecvTimeoutError::Timeout) => {
                // It keeps what it uses, and the memory guarded.
                log::error!("the thread `fetcher` does not end; it is left behind");
                Remains::Waiters
            }
        }
    }
}

const NO_PANIC: &str = "no holder of a door panics";

impl Drop for Fetcher {
    fn drop(&mut self) {
        self.stop();
    }
}

impl fmt::Debug for Fetcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fetcher({:?})", self.status)
    }
}

/// Has whoever calls at `door` with `token` go on to the thread that fetches.
fn keep(door: &Arc<Door>, token: Token, orders: &Orders) -> io::Result<Arc<Latch>> {
    let latch = Arc::new(Latch::new()?);
    let (kept, at, orders) = (Arc::clone(door), Arc::clone(&latch), orders.clone());
    let meet = move |mut caller: Caller| {
        let said = (caller.kind == Kind::Rejoin).then(|| whole::<Rejoin>(&caller.body).ok());
        match said.flatten().filter(|rejoin| rejoin.token == token) {
            Some(rejoin) => orders.tell(Order::Caller(Box::new((rejoin, caller.wire)))),
            None => caller.refuse("a guest runs here already, and this is no connection of its migration"),
        }
    };
    threads::spawn(ThreadKind::Mover, "mover", move || kept.stay(&at, meet))?;
    Ok(latch)
}

/// What the thread has.
struct Fetching {
    filling: Filling,
    inbox: Receiver<Order>,
    bell: Arc<OwnedFd>,
    status: Arc<Status>,
    wait: Duration,
    pairing: Pairing,
    link: Link,
    /// Nothing is absent, and the memory not guarded.
    is_whole: bool,
}

enum Link {
    Cut {
        /// For how long it has been looked for the source. Time in which this process stood still does not count: it may have
        /// called meanwhile.
        away: Duration,
        looked: Instant,
    },
    Up {
        pair: Box<Pair>,
        /// When something has come last.
        heard: Instant,
    },
}

impl Link {
    /// Nobody is there, from now on.
    fn cut() -> Self {
        Self::Cut {
            away: Duration::ZERO,
            looked: Instant::now(),
        }
    }
}

/// Why the thread does not go on.
enum Stop {
    /// All memory is there, and the source knows.
    Over,
    /// It was told to.
    Told,
    /// The guest's memory will never be there.
    Lost(String),
}

/// What keeps it from fetching.
#[derive(Debug, thiserror::Error)]
enum FetchError {
    /// Another pair of connections may go on.
    #[error("the connection to the source was lost")]
    Cut(#[source] FrameError),
    /// Nothing may.
    #[error("the host does not take a page of the guest's memory")]
    Host(#[source] io::Error),
}

impl From<FrameError> for FetchError {
    fn from(error: FrameError) -> Self {
        match error {
            FrameError::Host(error) => Self::Host(error),
            other => Self::Cut(other),
        }
    }
}

impl From<WireError> for FetchError {
    fn from(error: WireError) -> Self {
        Self::Cut(error.into())
    }
}

impl Fetching {
    fn run(mut self, ending: &Ending) -> Remains {
        let stop = loop {
            match self.step() {
                Ok(None) => {}
                Ok(Some(stop)) => break stop,
                Err(FetchError::Host(error)) => {
                    break Stop::Lost(crate::api::chain(&FetchError::Host(error)));
                }
                Err(error) => self.cut(&error),
            }
        };
        match stop {
            Stop::Over => {}
            // A guest that has ended needs no page: the source is not to wait for anything.
            Stop::Told if self.status.has_run.load(Ordering::Relaxed) => self.say(Kind::Whole, &[]),
            Stop::Told => {}
            Stop::Lost(reason) => {
                log::error!("migration: {reason}");
                self.say(Kind::Refused, reason.as_bytes());
                ending.announce(End::MemoryLost { reason });
            }
        }
        if self.is_whole {
            return Remains::Nothing;
        }
        let is_waited_for = !self.filling.wanted().is_empty();
        let new = self.filling.take_faults();
        // What is absent is never to be taken for zeros.
        std::mem::forget(self.filling);
        match new {
            Ok(new) if new.is_empty() && !is_waited_for => Remains::Nothing,
            _ => Remains::Waiters,
        }
    }

    fn step(&mut self) -> Result<Option<Stop>, FetchError> {
        // First: whoever tells something after this rings again.
        let mut count = [0; 8];
        let _ = rustix::io::read(&*self.bell, &mut count);
        self.status
            .left_pages
            .store(self.filling.left(), Ordering::Relaxed);
        while let Ok(order) = self.inbox.try_recv() {
            match order {
                Order::Caller(caller) => self.meet(caller.0, caller.1)?,
                Order::Stop => return Ok(Some(Stop::Told)),
                Order::GiveUp => return Ok(self.lost("nobody waits for it any more")),
            }
        }
        if !self.is_whole {
            let new = self.filling.take_faults().map_err(FetchError::Host)?;
            self.want(new)?;
        }
        let limit = self.look_at_the_clock()?;
        if let Link::Cut { away, looked } = &mut self.link {
            *away += looked.elapsed().min(LOOK * 2);
            *looked = Instant::now();
            if *away > self.wait {
                let away = format!("it has not come back for {} s", self.wait.as_secs());
                return Ok(self.lost(&away));
            }
        }
        let readable = self.wait_for_something(limit);
        if self.take_in(readable)? {
            return Ok(Some(Stop::Over));
        }
        if self.filling.left() == 0 && !self.is_whole {
            self.filling.release().map_err(FetchError::Host)?;
            self.is_whole = true;
            // Before the source hears it, whom somebody may ask at once.
            self.status.left_pages.store(0, Ordering::Relaxed);
            log::info!("migration: all of the guest's memory is here");
            self.tell_whole()?;
        }
        Ok(None)
    }

    /// Another connection has come.
    fn meet(&mut self, rejoin: Rejoin, wire: Wire<Stream>) -> Result<(), FetchError> {
        let socket = wire.stream_ref().socket();
        let prepared = socket
            .set_read_timeout(Some(SILENCE_MAX))
            .and_then(|()| socket.set_write_timeout(Some(SILENCE_MAX)));
        prepared.map_err(|error| FetchError::from(WireError::Io(error)))?;
        let Some(pair) = self.pairing.add(rejoin.attempt, rejoin.lane, wire) else {
            return Ok(());
        };
        self.link = Link::Up {
            pair: Box::new(pair),
            heard: Instant::now(),
        };
        self.status.is_connected.store(true, Ordering::Relaxed);
        log::info!(
            "migration: the source is there, and {} MiB of the guest's memory are still to come",
            self.status.left_bytes() >> 20
        );
        let Link::Up { pair, .. } = &mut self.link else {
            return Ok(());
        };
        absent::send(&mut pair.wanted, self.filling.absent())?;
        let waited_for = self.filling.wanted().iter().copied().collect();
        self.want(waited_for)?;
        if self.is_whole {
            self.tell_whole()?;
        }
        Ok(())
    }

    /// Asks for pages that somebody waits for.
    fn want(&mut self, pages: Vec<u64>) -> Result<(), FetchError> {
        if let (Link::Up { pair, .. }, false) = (&mut self.link, pages.is_empty()) {
            for page in pages {
                pair.wanted.send(Kind::Want, &[&page.to_le_bytes()])?;
            }
            pair.wanted.flush()?;
        }
        Ok(())
    }

    fn tell_whole(&mut self) -> Result<(), FetchError> {
        if let Link::Up { pair, .. } = &mut self.link {
            pair.wanted.send(Kind::Whole, &[])?;
            pair.wanted.flush()?;
        }
        Ok(())
    }

    /// Says what is the last. The source may be gone.
    fn say(&mut self, kind: Kind, body: &[u8]) {
        if let Link::Up { pair, .. } = &mut self.link {
            let said = pair.wanted.send(kind, &[body]);
            if let Err(error) = said.and_then(|()| pair.wanted.flush()) {
                log::debug!("migration: the source does not hear the end: {error}");
            }
        }
    }

    /// How long nothing may happen. A source that is silent for too long is not there.
    fn look_at_the_clock(&self) -> Result<Duration, FetchError> {
        match &self.link {
            Link::Cut { .. } => Ok(LOOK),
            Link::Up { pair, .. } if has_unread(pair) => Ok(Duration::ZERO),
            Link::Up { heard, .. } if heard.elapsed() > SILENCE_MAX => {
                Err(WireError::Io(io::ErrorKind::TimedOut.into()).into())
            }
            Link::Up { .. } => Ok(LOOK),
        }
    }

    /// Says which of the two connections have something.
    fn wait_for_something(&self, limit: Duration) -> [bool; 2] {
        let limit = Timespec::try_from(limit).expect("it is short");
        let mut fds = vec![PollFd::from_borrowed_fd(self.bell.as_fd(), PollFlags::IN)];
        if !self.is_whole {
            let userfault = self.filling.userfault().as_fd();
            fds.insert(0, PollFd::from_borrowed_fd(userfault, PollFlags::IN));
        }
        let others = fds.len();
        if let Link::Up { pair, .. } = &self.link {
            for wire in [&pair.wanted, &pair.pushed] {
                let socket = wire.stream_ref().socket().as_fd();
                fds.push(PollFd::from_borrowed_fd(socket, PollFlags::IN));
            }
        }
        // Whatever woke it, everything is looked at.
        let _ = poll(&mut fds, Some(&limit));
        let is_readable = |at: usize| fds.get(others + at).is_some_and(|fd| !fd.revents().is_empty());
        [is_readable(0), is_readable(1)]
    }

    /// Takes in what has come, and says whether the source has heard that all is here.
    fn take_in(&mut self, readable: [bool; 2]) -> Result<bool, FetchError> {
        let Link::Up { pair, heard } = &mut self.link else {
            return Ok(false);
        };
        let Pair { wanted, pushed } = &mut **pair;
        for (wire, is_readable) in [(wanted, readable[0]), (pushed, readable[1])] {
            let mut is_readable = is_readable;
            for _ in 0..FRAMES_MAX {
                if !is_readable && !wire.stream_ref().has_unread() {
                    break;
                }
                is_readable = false;
                let outcome = take_frame(wire, &mut self.filling)?;
                *heard = Instant::now();
                match outcome {
                    Heard::Pages => {}
                    Heard::Whole if self.is_whole => return Ok(true),
                    Heard::Whole => {
                        let found = Kind::Whole;
                        return Err(WireError::Unexpected { found }.into());
                    }
                }
            }
        }
        Ok(false)
    }

    fn cut(&mut self, error: &FetchError) {
        self.status.is_connected.store(false, Ordering::Relaxed);
        if let Link::Up { .. } = self.link {
            log::warn!(
                "migration: {}; {} MiB of the guest's memory are absent, and the source has {} s to come back",
                crate::api::chain(error),
                self.status.left_bytes() >> 20,
                self.wait.as_secs()
            );
            self.link = Link::cut();
        }
    }

    /// What becomes of a guest whose source is not there.
    fn lost(&self, why: &str) -> Option<Stop> {
        match &self.link {
            _ if self.is_whole => Some(Stop::Over),
            Link::Up { .. } => None,
            Link::Cut { .. } => Some(Stop::Lost(format!(
                "{} MiB of it are at the source of the migration, and {why}",
                (self.status.left_bytes() >> 20).max(1)
            ))),
        }
    }
}

fn has_unread(pair: &Pair) -> bool {
    pair.wanted.stream_ref().has_unread() || pair.pushed.stream_ref().has_unread()
}
