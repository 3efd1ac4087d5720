//! The source: what is left of it when its guest runs elsewhere, a memory that is fetched from it.
//!
//! ```text
//!   calling ──the target tells what is absent──► serving ──it has everything──► over
//!      ▲  │                                         │
//!      │  └── nobody is there: in a second again    │
//!      └────────────────────────────────────────────┘ a connection is lost
//!      └── nobody was there for too long: lost
//! ```
//!
//! Two threads serve: one answers who waits, the other sends the rest in the order of addresses, from behind the page that was
//! asked for last.

use std::io;
use std::net::Shutdown;
use std::num::NonZeroU64;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use coracle_devices::virtio::device::Notice;
use coracle_storage::threads::{self, Kind as ThreadKind};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vm_memory::GuestMemoryMmap;

use super::super::call::Way;
use super::super::join::Token;
use super::super::pages::Ordered;
use super::super::progress::Progress;
use super::super::send::SendError;
use super::super::stream::Stream;
use super::super::streams::Pace;
use super::super::tls::TlsFiles;
use super::super::wire::{Kind, Wire, WireError};
use super::frames::{Asked, FrameError, hear, hear_absent, send_pages};
use super::rejoin::{Lane, Pair, Rejoin};
use crate::snapshot::memory::{PAGE_BYTES, PageSet};

/// How long the target may be silent when it has been sent everything.
const SILENCE_MAX: Duration = Duration::from_secs(10);
/// How often it is called.
const CALL_PERIOD: Duration = Duration::from_secs(1);
/// How often it is looked what else has happened.
const LOOK: Duration = Duration::from_millis(100);
/// How many pages are pushed in one frame: a page that somebody waits for stands in line behind no more than that on a link.
const PUSHED_PAGES: u64 = 16;

/// How the target is called.
#[derive(Clone, Debug)]
pub struct Line {
    /// HOST:PORT of the target.
    pub to: String,
    /// The name that its certificate has to have, if it is not that of `to`.
    pub name: Option<String>,
    /// Ours.
    pub tls: TlsFiles,
}

/// What is kept.
pub struct Remainder {
    /// The memory of a guest that runs elsewhere: nobody writes it.
    pub memory: Arc<GuestMemoryMmap>,
    /// Where.
    pub line: Line,
    /// What the target knows us by.
    pub token: Token,
    /// How many bytes are sent per second at most, beside those that somebody waits for.
    pub bandwidth_limit: Option<NonZeroU64>,
    /// How long nobody may be there.
    pub wait: Duration,
    /// Rings at the end.
    pub notice: Notice,
}

/// Why the memory was not fetched.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the text of an error is its documentation")]
pub enum KeepError {
    #[error(
        "the target `{to}` has not been there for {} s, and {left_mib} MiB of the guest's memory are of no use any more: look \
         whether the guest still runs there, and boot it from its disks if not", .wait.as_secs()
    )]
    Abandoned {
        to: String,
        wait: Duration,
        left_mib: u64,
    },
    #[error("the guest is lost at the target `{to}`, and boots from its disks: {why}")]
    Lost { to: String, why: String },
}

/// Why it cannot be called elsewhere.
#[derive(Debug, thiserror::Error)]
#[error("the target `{to}` is there, and nothing has to be recovered")]
pub struct Connected {
    /// Where.
    pub to: String,
}

/// The control end of the thread that keeps the memory. Dropped, it ends the thread, and the memory is lost.
pub struct Keeper {
    shared: Arc<Shared>,
    ended: Receiver<Result<(), KeepError>>,
}

struct Shared {
    state: Mutex<State>,
    /// Something has changed for whoever waits to call again.
    changed: Condvar,
    is_connected: AtomicBool,
    left_pages: AtomicU64,
}

struct State {
    line: Line,
    is_dropped: bool,
    /// What is cut when it is dropped.
    calls: Arc<Progress>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder panics")
    }
}

impl Keeper {
    /// Begins to call the target, and to serve it.
    ///
    /// # Errors
    ///
    /// When the host has no thread to give.
    pub fn start(remainder: Remainder, left_pages: u64) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                line: remainder.line.clone(),
                is_dropped: false,
                calls: Arc::default(),
            }),
            changed: Condvar::new(),
            is_connected: AtomicBool::new(false),
            left_pages: AtomicU64::new(left_pages),
        });
        let (sender, ended) = channel();
        let keeping = Keeping {
            ordered: Ordered::new(Arc::clone(&remainder.memory)),
            size_bytes: left_of(&remainder.memory),
            token: remainder.token,
            bandwidth_limit: remainder.bandwidth_limit,
            wait: remainder.wait,
            shared: Arc::clone(&shared),
        };
        let notice = remainder.notice;
        threads::spawn(ThreadKind::Mover, "mover", move || {
            // Whoever wanted it may be gone.
            if sender.send(keeping.run()).is_ok() {
                notice.ring();
            }
        })?;
        Ok(Self { shared, ended })
    }

    /// What it has come to, once.
    pub fn poll(&self) -> Option<Result<(), KeepError>> {
        match self.ended.try_recv() {
            Ok(ended) => Some(ended),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => panic!("a thread that panics ends the process"),
        }
    }

    /// How much has not been sent, in bytes.
    pub fn left_bytes(&self) -> u64 {
        self.shared.left_pages.load(Ordering::Relaxed) * PAGE_BYTES as u64
    }

    /// Whether the target is there.
    pub fn is_connected(&self) -> bool {
        self.shared.is_connected.load(Ordering::Relaxed)
    }

    /// Where the target is called.
    pub fn line(&self) -> Line {
        self.shared.state().line.clone()
    }

    /// Has the target be called elsewhere, at once.
    ///
    /// # Errors
    ///
    /// When it is there.
    pub fn call_at(&self, line: Line) -> Result<(), Connected> {
        let mut state = self.shared.state();
        if self.is_connected() {
            let to = state.line.to.clone();
            return Err(Connected { to });
        }
        state.line = line;
        // Whoever is being called where it was before.
        state.calls.cancel();
        self.shared.changed.notify_all();
        Ok(())
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        state.is_dropped = true;
        state.calls.cancel();
        self.shared.changed.notify_all();
    }
}

fn left_of(memory: &GuestMemoryMmap) -> u64 {
    use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
    memory.iter().map(GuestMemoryRegion::len).sum()
}

/// What the thread has.
struct Keeping {
    ordered: Ordered,
    size_bytes: u64,
    token: Token,
    bandwidth_limit: Option<NonZeroU64>,
    wait: Duration,
    shared: Arc<Shared>,
}

/// How a target was served.
enum Served {
    /// It has everything.
    Whole,
    /// It needs nothing any more.
    Lost(String),
}

/// What both threads that serve look at.
struct Serving {
    left: Mutex<PageSet>,
    /// Where the rest goes on.
    cursor: AtomicU64,
    is_over: AtomicBool,
    /// Nothing is left to be pushed, or nobody to push it to.
    is_pushed: AtomicBool,
}

impl Keeping {
    fn run(&self) -> Result<(), KeepError> {
        let mut attempt = 0;
        let mut until = Instant::now() + self.wait;
        let mut is_told = false;
        loop {
            let line = {
                let mut state = self.shared.state();
                if state.is_dropped {
                    return Ok(());
                }
                state.calls = Arc::default();
                state.line.clone()
            };
            attempt += 1;
            match self.call(&line, attempt) {
                Ok(pair) => {
                    let served = self.serve(pair);
                    self.shared.is_connected.store(false, Ordering::Relaxed);
                    let error = match served {
                        Ok(Served::Whole) => return Ok(()),
                        Ok(Served::Lost(why)) => return Err(KeepError::Lost { to: line.to, why }),
                        Err(error) => error,
                    };
                    log::warn!(
                        "migration: the guest at {} has lost its source: {}; it is called again every second, and {} MiB of \
                         its memory are here",
                        line.to,
                        crate::api::chain(&error),
                        self.left_mib()
                    );
                    until = Instant::now() + self.wait;
                    is_told = false;
                }
                Err(error) if !is_told => {
                    log::warn!(
                        "migration: {}; it is called again for {} s: if it is elsewhere, say so (`coraclectl migrate \
                         --recover`)",
                        crate::api::chain(&error),
                        until.saturating_duration_since(Instant::now()).as_secs()
                    );
                    is_told = true;
                }
                Err(error) => log::debug!("migration: {}", crate::api::chain(&error)),
            }
            if Instant::now() >= until {
                return Err(KeepError::Abandoned {
                    to: line.to,
                    wait: self.wait,
                    left_mib: self.left_mib(),
                });
            }
            self.rest(&line);
        }
    }

    fn left_mib(&self) -> u64 {
        (self.shared.left_pages.load(Ordering::Relaxed) * PAGE_BYTES as u64) >> 20
    }

    /// Waits until it is time to call again, or the target is said to be elsewhere.
    fn rest(&self, called: &Line) {
        let state = self.shared.state();
        let is_same = |state: &mut State| !state.is_dropped && state.line.to == called.to;
        drop(
            self.shared
                .changed
                .wait_timeout_while(state, CALL_PERIOD, is_same)
                .expect("no holder panics"),
        );
    }

    fn call(&self, line: &Line, attempt: u32) -> Result<Pair, SendError> {
        let calls = Arc::clone(&self.shared.state().calls);
        let way = Way::new(&line.to, line.name.as_deref(), &line.tls, &calls)?;
        let call = |lane| -> Result<Wire<Stream>, SendError> {
            let mut wire = way.call()?;
            let rejoin = Rejoin {
                token: self.token,
                attempt,
                lane,
            };
            let body = postcard::to_stdvec(&rejoin).expect("plain data can be written");
            wire.send(Kind::Rejoin, &[&body])?;
            wire.flush()?;
            Ok(wire)
        };
        Ok(Pair {
            wanted: call(Lane::Wanted)?,
            pushed: call(Lane::Pushed)?,
        })
    }

    /// Serves until the target has everything.
    fn serve(&self, pair: Pair) -> Result<Served, FrameError> {
        let Pair { mut wanted, pushed } = pair;
        let left = hear_absent(&mut wanted, self.size_bytes)?;
        self.shared.left_pages.store(left.count(), Ordering::Relaxed);
        self.shared.is_connected.store(true, Ordering::Relaxed);
        log::info!(
            "migration: the target fetches {} MiB of the guest's memory",
            self.left_mib()
        );
        let serving = Serving {
            left: Mutex::new(left),
            cursor: AtomicU64::default(),
            is_over: AtomicBool::new(false),
            is_pushed: AtomicBool::new(false),
        };
        let sockets = [&wanted, &pushed].map(|wire| wire.stream_ref().socket().try_clone());
        let [ours, other] = sockets;
        let (ours, other) = (ours.map_err(WireError::Io)?, other.map_err(WireError::Io)?);
        thread::scope(|scope| {
            let thread = thread::Builder::new().name("mover".to_owned());
            let pushing = thread.spawn_scoped(scope, || {
                let pushed = self.push(pushed, &serving);
                serving.is_pushed.store(true, Ordering::Relaxed);
                if pushed.is_err() {
                    // One without the other is of no use. It may be cut already.
                    let _ = ours.shutdown(Shutdown::Both);
                }
                pushed
            });
            let pushing = pushing.map_err(FrameError::Host)?;
            let answered = self.answer(&mut wanted, &serving);
            serving.is_over.store(true, Ordering::Relaxed);
            let _ = other.shutdown(Shutdown::Both);
            let pushed = pushing.join().expect("a thread that panics ends the process");
            match answered {
                Ok(Served::Whole) => {
                    // Only now: what has arrived may not have been counted yet by whoever has pushed it.
                    self.shared.left_pages.store(0, Ordering::Relaxed);
                    Ok(Served::Whole)
                }
                Ok(served) => Ok(served),
                // The first that failed says why.
                Err(error) => Err(pushed.err().map_or(error, FrameError::from)),
            }
        })
    }

    /// Answers who waits, until the target has everything.
    fn answer(&self, wire: &mut Wire<Stream>, serving: &Serving) -> Result<Served, FrameError> {
        let pages = self.size_bytes / PAGE_BYTES as u64;
        let mut buffer = Vec::new();
        let mut heard = Instant::now();
        loop {
            if !wire.stream_ref().has_unread() && !is_readable(wire) {
                if !serving.is_pushed.load(Ordering::Relaxed) {
                    heard = Instant::now();
                } else if heard.elapsed() > SILENCE_MAX {
                    return Err(WireError::Io(io::ErrorKind::TimedOut.into()).into());
                }
                continue;
            }
            match hear(wire, pages)? {
                Asked::Want(page) => {
                    send_pages(wire, &self.ordered, (page, 1), &mut buffer)?;
                    serving.cursor.store(page + 1, Ordering::Relaxed);
                    let mut left = serving.left.lock().expect(NO_PANIC);
                    if left.contains(page) {
                        left.remove(page, page + 1);
                        self.shared.left_pages.fetch_sub(1, Ordering::Relaxed);
                    }
                }
                Asked::Whole => {
                    // Whether it hears that changes nothing here.
                    let told = wire.send(Kind::Whole, &[]).and_then(|()| wire.flush());
                    if let Err(error) = told {
                        log::debug!("migration: the target does not hear the end: {error}");
                    }
                    return Ok(Served::Whole);
                }
                Asked::Lost(why) => return Ok(Served::Lost(why)),
            }
            heard = Instant::now();
        }
    }

    /// Sends one page after the other.
    fn push(&self, mut wire: Wire<Stream>, serving: &Serving) -> Result<(), WireError> {
        let calls = Arc::clone(&self.shared.state().calls);
        let pace = Pace::new(self.bandwidth_limit, &calls);
        let mut buffer = Vec::new();
        while !serving.is_over.load(Ordering::Relaxed) {
            let Some((first, count)) = serving.next() else {
                break;
            };
            let before = wire.sent_bytes();
            send_pages(&mut wire, &self.ordered, (first, count), &mut buffer)?;
            self.shared.left_pages.fetch_sub(count, Ordering::Relaxed);
            pace.keep(super::super::pages::Sent {
                pages: count,
                bytes: wire.sent_bytes() - before,
            })?;
        }
        Ok(())
    }
}

const NO_PANIC: &str = "no holder of a set of pages panics";

impl Serving {
    /// The pages that are pushed next, which are left no more.
    fn next(&self) -> Option<(u64, u64)> {
        let mut left = self.left.lock().expect(NO_PANIC);
        let from = self.cursor.load(Ordering::Relaxed);
        let run = left
            .next_run(from, PUSHED_PAGES)
            .or_else(|| left.next_run(0, PUSHED_PAGES))?;
        left.remove(run.start, run.end);
        // Somebody may have asked for another page meanwhile: then it goes on behind that.
        let (set, fetch) = (Ordering::Relaxed, Ordering::Relaxed);
        let _ = self.cursor.compare_exchange(from, run.end, set, fetch);
        Some((run.start, run.end - run.start))
    }
}

/// Waits a while for something to come.
fn is_readable(wire: &Wire<Stream>) -> bool {
    let socket = wire.stream_ref().socket().as_fd();
    let mut fds = [PollFd::from_borrowed_fd(socket, PollFlags::IN)];
    let limit = Timespec::try_from(LOOK).expect("it is short");
    poll(&mut fds, Some(&limit)).is_ok_and(|ready| ready > 0)
}
