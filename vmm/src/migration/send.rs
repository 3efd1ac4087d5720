//! The source: a thread that sends, and asks the `vmm` thread for whatever only that can do.

use std::io;
use std::num::NonZeroU64;
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use coracle_devices::virtio::blk::{DriveConfig, DriveError};
use coracle_devices::virtio::device::Notice;
use coracle_storage::copy::OriginalError;
use coracle_storage::lease::Owner;
use rustix::time::{ClockId, clock_gettime};
use vm_memory::GuestMemoryMmap;

use super::call::Way;
use super::converge::{Judge, Round, Terms, Verdict};
use super::disks::{Copied, Sending};
use super::hello::{Answer, Hello, ImageOffer};
use super::join::Token;
use super::pages::{Ordered, Sent};
use super::postcopy::absent;
use super::postcopy::source::{Keeper, Line, Remainder};
use super::progress::Progress;
use super::standstill::{Overdue, Standstill};
use super::stream::Stream;
use super::streams::{Pace, Share, Streams};
use super::tls::{TlsError, TlsFiles};
use super::wire::{Kind, Wire, WireError};
use crate::config::Compression;
use crate::snapshot::memory::{PAGE_BYTES, PageSet};
use crate::state::whole;

/// What a migration needs.
pub struct Job {
    /// HOST:PORT of the target.
    pub to: String,
    /// The name that its certificate has to have, if it is not that of `to`.
    pub name: Option<String>,
    /// Ours.
    pub tls: TlsFiles,
    /// What is said first, but for the images.
    pub hello: Hello,
    /// The drives whose images are looked at for that.
    pub images: Vec<DriveConfig>,
    /// As whom.
    pub owner: Owner,
    /// The guest's memory.
    pub memory: Arc<GuestMemoryMmap>,
    /// The drives that go along, as they are offered.
    pub copies: Vec<Copied>,
    /// When the guest stands still, and how far it is slowed down until then.
    pub terms: Terms,
    /// How many bytes are sent per second at most.
    pub bandwidth_limit: Option<NonZeroU64>,
    /// Whether memory is packed.
    pub compression: Compression,
    /// What keeps the memory of a guest that goes on without: there from the moment at which it may.
    pub keeper: Arc<Mutex<Option<Keeper>>>,
    /// How long nobody may fetch it.
    pub postcopy_wait: Duration,
    /// The other end of it.
    pub desk: Desk,
    /// How far it is.
    pub progress: Arc<Progress>,
}

/// Where the `vmm` thread is asked.
pub struct Desk {
    /// What is wanted.
    pub wants: Sender<Want>,
    /// What is given; closed when there is no more.
    pub given: Receiver<Given>,
    /// Rings when something is wanted.
    pub notice: Notice,
}

/// What only the `vmm` thread can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// That what is written is recorded from now on.
    Rounds,
    /// What was written since.
    Round,
    /// That the guest runs for so many thousandths of the time.
    Slow(u32),
    /// That the guest stands still, with everything on its media.
    Stop,
    /// That the fences come down.
    Yield,
}

/// The answer to it.
#[derive(Debug)]
pub enum Given {
    /// Pages that are to be sent.
    Pages(PageSet),
    /// The guest runs as it was wanted.
    Slowed,
    /// The last of them, those among all pages that KVM needs for the state, and that.
    Last(PageSet, PageSet, Vec<u8>),
    /// The fences are down.
    Yielded,
}

/// Why the guest is not known to run at the target.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// Nobody is there.
    #[error("cannot connect to the target `{to}`: is a receiver listening there?")]
    Connect {
        /// As asked.
        to: String,
        /// What the host says.
        #[source]
        source: io::Error,
    },
    /// Somebody else is.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// It is gone, or talks nonsense.
    #[error("the target was lost")]
    Wire(#[from] WireError),
    /// It has said what it will take, and nobody can tell what.
    #[error("what the target answers cannot be read")]
    Answer(#[from] postcard::Error),
    /// It has reasons.
    #[error("the target refuses: {0}")]
    Refused(String),
    /// The host is full.
    #[error("this host has no thread left for a stream")]
    Host(#[source] io::Error),
    /// A disk that goes along.
    #[error(transparent)]
    Original(#[from] OriginalError),
    /// Something at the source.
    #[error("the source cannot go on with it")]
    Source,
    /// The guest writes faster than the connection takes it.
    #[error(
        "the guest writes memory, or a disk that goes along, faster than it is sent: {left_mib} MiB are left after {rounds} \
         rounds; give it a longer downtime_ms or timeout_s, or have the guest stop for as long as it takes (on_timeout)"
    )]
    TooSlow {
        /// How much.
        left_mib: u64,
        /// After how many.
        rounds: u64,
    },
    /// An image of the guest's cannot be looked at any more.
    #[error(transparent)]
    Image(#[from] DriveError),
    /// It was predicted to stand still for less.
    #[error(transparent)]
    Overdue(#[from] Overdue),
    /// Somebody wanted it no more.
    #[error("the migration was cancelled")]
    Cancelled,
}

/// What comes after a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Round,
    /// The guest stands still until the rest is sent.
    Last,
    /// It does not.
    PostCopy,
}

/// What is sent of a guest that stands still.
struct Rest {
    /// Pages that the target does not have.
    set: PageSet,
    /// Those that it needs for the state.
    needed: PageSet,
    state: Vec<u8>,
    /// What whoever fetches the others is known by, if they are fetched.
    fetched_by: Option<Token>,
}

/// Most rounds of disks before memory is sent.
const DISK_ROUNDS_MAX: u32 = 8;
/// How long the target may be silent before the guest stands still.
pub(super) const SILENCE_MAX: Duration = Duration::from_secs(10);
/// And when it has everything.
const START_MAX: Duration = Duration::from_secs(3);

impl Job {
    /// Does it all. When it returns well, the guest runs at the target.
    ///
    /// # Errors
    ///
    /// [`SendError`]: once the fences are down, the leases say what has become of it.
    pub fn run(self) -> Result<(), SendError> {
        let sent = self.send();
        match sent {
            Err(SendError::Wire(_)) if self.progress.is_cancelled() => Err(SendError::Cancelled),
            sent => sent,
        }
    }

    fn send(&self) -> Result<(), SendError> {
        let way = Way::new(&self.to, self.name.as_deref(), &self.tls, &self.progress)?;
        let (mut streams, answer) = self.begin(&way)?;
        let mut disks = Sending::begin(&self.copies);
        let copying = self.copy_disks(&mut streams, &mut disks)?;
        let ordered = Ordered::new(Arc::clone(&self.memory));
        let mut set = self.pages(Want::Rounds)?;
        streams.send_zeros(&set, &self.progress)?;
        let mut judge = Judge::new(Terms {
            // It takes both: a target that would do so is not whoever decides it.
            postcopy: self.terms.postcopy && answer.postcopy,
            deadline: self.terms.deadline + copying,
            ..self.terms
        });
        let next = loop {
            let (begun, before) = (Instant::now(), streams.sent_bytes());
            let (sent_pages, sent_disk_bytes) = self.send_round(&mut streams, &ordered, &set, &mut disks)?;
            // What lies on its way is no part of the downtime then, and the connection not taken for faster than it is.
            streams.first().send(Kind::Mark, &[])?;
            expect(streams.first(), Kind::Reached)?;
            let took = begun.elapsed();
            set = self.pages(Want::Round)?;
            disks.look();
            let round = Round {
                sent_bytes: streams.sent_bytes() - before,
                took,
                sent_pages,
                left_pages: set.count(),
                sent_disk_bytes,
                left_disk_bytes: disks.last_bytes(),
            };
            match self.next(&mut judge, round)? {
                Next::Round => {}
                next => break next,
            }
        };
        log::info!(
            "migration: the guest stands still after {} rounds, for {} us by what is known",
            self.progress.rounds(),
            self.progress.downtime().as_micros()
        );
        let Given::Last(last, needed, state) = self.ask(Want::Stop)? else {
            return Err(SendError::Source);
        };
        set.insert_all(&last);
        disks.look_last();
        let standstill =
            Standstill::begin(&self.progress, judge.standstill_max()).map_err(SendError::Host)?;
        let rest = Rest {
            set,
            needed,
            state,
            fetched_by: (next == Next::PostCopy).then_some(answer.token),
        };
        let sent = self.send_rest(&mut streams, &ordered, &mut disks, rest, &standstill);
        match (sent, standstill.overdue()) {
            (Err(SendError::Wire(_)), Some(overdue)) => Err(overdue.into()),
            (sent, _) => sent,
        }
    }

    /// Sends what is left of a guest that stands still, and hands it over.
    fn send_rest(
        &self,
        streams: &mut Streams,
        ordered: &Ordered,
        disks: &mut Sending<'_>,
        rest: Rest,
        standstill: &Standstill,
    ) -> Result<(), SendError> {
        let Rest {
            mut set,
            needed,
            state,
            fetched_by,
        } = rest;
        let Some(token) = fetched_by else {
            self.send_round(streams, ordered, &set, disks)?;
            return self.hand_over(streams, &state, standstill, None);
        };
        self.send_round(streams, ordered, &needed, disks)?;
        needed.runs().for_each(|run| set.remove(run.start, run.end));
        log::info!(
            "migration: the guest goes on without {} MiB of its memory, which are fetched from here",
            (set.count() * PAGE_BYTES as u64) >> 20
        );
        absent::send(streams.first(), &set)?;
        self.hand_over(streams, &state, standstill, Some((token, set.count())))
    }

    /// Has the target take the machine, by as many streams as were asked for.
    fn begin(&self, way: &Way<'_>) -> Result<(Streams, Answer), SendError> {
        let mut wire = way.call()?;
        let images = self.images.iter();
        let images = images.map(|drive| Ok(ImageOffer::new(drive, drive.likeness(&self.owner)?)));
        let hello = Hello {
            images: images.collect::<Result<_, DriveError>>()?,
            ..self.hello.clone()
        };
        let hello = postcard::to_stdvec(&hello).expect("plain data can be written");
        wire.send(Kind::Hello, &[&hello])?;
        let answer: Answer = whole(expect(&mut wire, Kind::Ready)?)?;
        if self.hello.postcopy && !answer.postcopy {
            log::warn!(
                "migration: the target cannot run the guest before all of its memory is there, and so it does not: there, set \
                 vm.unprivileged_userfaultfd to 1, or give the monitor access to /dev/userfaultfd; a guest with huge pages of \
                 hugetlbfs never does"
            );
        }
        let others = way.join(answer.token, self.hello.streams, &wire)?;
        Ok((Streams::new(wire, others, self.compression), answer))
    }

    /// All of the memory is on its way, or is kept to be fetched: so many pages, with such a token. The state, and
    /// when the target
    /// has both, the machine.
    fn hand_over(
        &self,
        streams: &mut Streams,
        state: &[u8],
        standstill: &Standstill,
        kept: Option<(Token, u64)>,
    ) -> Result<(), SendError> {
        let wire = streams.first();
        wire.send(Kind::State, &[state])?;
        expect(wire, Kind::Loaded)?;
        self.progress.cannot_be_cut();
        if self.progress.is_cancelled() {
            return Err(SendError::Cancelled);
        }
        standstill.end()?;
        self.ask(Want::Yield)?;
        wire.send(Kind::Go, &[])?;
        wire.flush()?;
        if let Some((token, left_pages)) = kept {
            // It calls while the target takes the disks: the guest will not wait for that.
            self.keep(token, left_pages).map_err(SendError::Host)?;
        }
        wire.stream()
            .socket()
            .set_read_timeout(Some(START_MAX))
            .map_err(WireError::Io)?;
        // The leases are to be asked then, also if it says its word a byte at a time. Without a thread that is done later.
        let last = Arc::<Progress>::default();
        let watch = last.goes_by(wire.stream_ref().socket());
        let _watch = watch.and_then(|()| Standstill::begin(&last, Some(START_MAX)));
        expect(wire, Kind::Running)?;
        log::info!(
            "migration: sent {} bytes in {} us of processor time",
            streams.sent_bytes(),
            (cpu_time() + streams.cpu_time()).as_micros()
        );
        Ok(())
    }

    /// Sends disks alone, while nothing is said of memory yet: all of them, and then what was changed meanwhile, as long as that
    /// becomes less by half. Says how long that took.
    fn copy_disks(&self, streams: &mut Streams, disks: &mut Sending<'_>) -> Result<Duration, SendError> {
        let begun = Instant::now();
        if disks.is_empty() {
            return Ok(Duration::ZERO);
        }
        let mut before = u64::MAX;
        for _ in 0..DISK_ROUNDS_MAX {
            let pace = Pace::new(self.bandwidth_limit, &self.progress);
            self.send_disks(streams, disks, &pace)?;
            streams.first().send(Kind::Mark, &[])?;
            expect(streams.first(), Kind::Reached)?;
            disks.look();
            let left_bytes = disks.left_bytes();
            if left_bytes == 0 || left_bytes > before / 2 {
                break;
            }
            before = left_bytes;
        }
        log::info!(
            "migration: the disks that go along are there after {} ms, but for {} KiB that the guest has changed meanwhile",
            begun.elapsed().as_millis(),
            disks.left_bytes() >> 10
        );
        Ok(begun.elapsed())
    }

    fn send_disks(
        &self,
        streams: &mut Streams,
        disks: &mut Sending<'_>,
        pace: &Pace<'_>,
    ) -> Result<u64, SendError> {
        self.progress.begin_disk_round(disks.left_bytes());
        let sent = disks.send(streams.first(), |disk_bytes, bytes| {
            self.progress.add_disk(disk_bytes);
            pace.keep(Sent { pages: 0, bytes })
        });
        match sent {
            // It may have said why before it went: that its disk is full, for instance.
            Err(lost @ SendError::Wire(_)) => match streams.first().receive() {
                Ok((Kind::Refused, why)) => {
                    Err(SendError::Refused(String::from_utf8_lossy(why).into_owned()))
                }
                _ => Err(lost),
            },
            sent => sent,
        }
    }

    /// Sends what is left of disks, and the pages of `set`; says how many pages, and how much of disks.
    fn send_round(
        &self,
        streams: &mut Streams,
        ordered: &Ordered,
        set: &PageSet,
        disks: &mut Sending<'_>,
    ) -> Result<(u64, u64), SendError> {
        self.progress.begin_round(set.count());
        let pace = Pace::new(self.bandwidth_limit, &self.progress);
        let disk_bytes = self.send_disks(streams, disks, &pace)?;
        let pages = streams.send(&Share::new(ordered, set, &pace))?;
        Ok((pages, disk_bytes))
    }

    /// Has the memory be there for whoever knows the token.
    fn keep(&self, token: Token, left_pages: u64) -> io::Result<()> {
        let remainder = Remainder {
            memory: Arc::clone(&self.memory),
            line: Line {
                to: self.to.clone(),
                name: self.name.clone(),
                tls: self.tls.clone(),
            },
            token,
            bandwidth_limit: self.bandwidth_limit,
            wait: self.postcopy_wait,
            notice: self.desk.notice.clone(),
        };
        let keeper = Keeper::start(remainder, left_pages)?;
        *self.keeper.lock().expect("no holder panics") = Some(keeper);
        Ok(())
    }

    /// Whether the guest may stand still for what is left.
    fn next(&self, judge: &mut Judge, round: Round) -> Result<Next, SendError> {
        let verdict = judge.judge(round, Instant::now());
        log::debug!(
            "migration, round {}: {} bytes in {} us, {} pages and {} bytes of disks left",
            self.progress.rounds(),
            round.sent_bytes,
            round.took.as_micros(),
            round.left_pages,
            round.left_disk_bytes
        );
        self.progress
            .predict(judge.bytes_per_s(), judge.downtime(round.left_bytes()));
        match verdict {
            Verdict::Last => Ok(Next::Last),
            Verdict::PostCopy => Ok(Next::PostCopy),
            Verdict::Again { run_permille } if run_permille == self.progress.run_permille() => {
                Ok(Next::Round)
            }
            Verdict::Again { run_permille } => match self.ask(Want::Slow(run_permille))? {
                Given::Slowed => {
                    self.progress.slow_down(run_permille);
                    log::info!(
                        "the guest runs for {run_permille} thousandths of the time: it writes faster than is sent"
                    );
                    Ok(Next::Round)
                }
                _ => Err(SendError::Source),
            },
            Verdict::GiveUp => Err(SendError::TooSlow {
                left_mib: round.left_bytes() >> 20,
                rounds: self.progress.rounds(),
            }),
        }
    }

    fn pages(&self, want: Want) -> Result<PageSet, SendError> {
        match self.ask(want)? {
            Given::Pages(pages) => Ok(pages),
            Given::Last(..) | Given::Slowed | Given::Yielded => Err(SendError::Source),
        }
    }

    fn ask(&self, want: Want) -> Result<Given, SendError> {
        if self.desk.wants.send(want).is_err() {
            return Err(SendError::Source);
        }
        self.desk.notice.ring();
        self.desk.given.recv().map_err(|_| SendError::Source)
    }
}

/// What this thread has had of a processor.
pub(super) fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

/// Waits for an answer of that kind, and returns its body.
pub(super) fn expect(wire: &mut Wire<Stream>, kind: Kind) -> Result<&[u8], SendError> {
    wire.flush()?;
    match wire.receive()? {
        (found, body) if found == kind => Ok(body),
        (Kind::Refused, why) => Err(SendError::Refused(String::from_utf8_lossy(why).into_owned())),
        (found, _) => Err(WireError::Unexpected { found }.into()),
    }
}
