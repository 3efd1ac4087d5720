//! The target: a thread that takes a machine in, until it can be built.

use std::io::{self, BufRead, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use coracle_devices::vmclock::{Disruption, VMCLOCK_BYTES, VmClockError};
use coracle_storage::lease::Owner;
use vm_memory::GuestMemoryMmap;

use super::disks::{Copies, CopyError};
use super::door::{Caller, Door};
use super::hello::{Answer, Hello, HelloError, available_memory_mib};
use super::join::{Admission, Joining, Token};
use super::landing::Landing;
use super::pages::PagesError;
use super::postcopy::absent::{AbsentError, Telling};
use super::postcopy::filling::{Filling, GuardError};
use super::postcopy::target::{Fetcher, Prepared};
use super::postcopy::{self, pages_of};
use super::progress::Progress;
use super::send;
use super::stream::Stream;
use super::wire::{HEADER_BYTES, Kind, Wire, WireError};
use crate::arch::x86_64::cpuid::compatibility::CompatibilityError;
use crate::arch::x86_64::layout;
use crate::config::{Config, Disks, Overrides};
use crate::end::Ending;
use crate::keys::ReadingKeys;
use crate::kvm::KvmError;
use crate::machine::disks::Course;
use crate::machine::plan::{MemorySource, Plan, PlanError, SavedOrigin, dirty_log, page_size};
use crate::machine::shell::Shell;
use crate::machine::state::{Counts, MachineState};
use crate::memory::{self, Backing, MemoryError};
use crate::snapshot::memory::{PAGE_BYTES, PageSet};
use crate::state::{State, StateError};

/// What taking a machine in needs.
pub struct Job {
    /// Where the source calls.
    pub door: Arc<Door>,
    /// The only machine that is taken in, if that is said.
    pub vm: Option<String>,
    /// What of it has another name here.
    pub overrides: Overrides,
    /// What the process was told before.
    pub process: Config,
    /// Who takes it.
    pub owner: Owner,
    /// How far it is.
    pub progress: Arc<Progress>,
    /// How long a source may be away from which the rest of the memory is fetched.
    pub postcopy_wait: Duration,
    /// Where it is announced that it was away for longer.
    pub ending: Ending,
    /// The disks that come along.
    pub copies: Arc<Copies>,
}

/// A machine that can go on here, and nowhere else unless the source wins the next step of its lease.
pub struct Received {
    /// What it is built from.
    pub plan: Plan,
    /// Its configuration.
    pub config: Config,
    /// Who is to be told that it runs.
    pub wire: Wire<Stream>,
    /// Where the end of the machine is announced by what fetches its memory.
    pub ending: Ending,
    /// The disks that have come along; dropped before they are kept, they are gone.
    pub copies: Arc<Copies>,
}

/// Why no machine was taken in.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the text of an error is its documentation")]
pub enum ReceiveError {
    #[error("cannot wait for the source")]
    Listen(#[source] io::Error),
    #[error("the source was lost")]
    Wire(#[from] WireError),
    #[error(transparent)]
    Hello(#[from] HelloError),
    #[error("this host has nothing left for it")]
    Host(#[source] io::Error),
    #[error("the machine cannot go on here: {0}")]
    Refused(String),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Clock(#[from] VmClockError),
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error("the source has sent what cannot be")]
    Pages(#[from] PagesError),
    #[error("the source has sent the state before all of the memory was here")]
    Unmarked,
    #[error("the source has sent more memory than a migration needs")]
    TooMuch,
    #[error("a disk that comes along cannot be taken in")]
    Copy(#[from] CopyError),
    #[error("the source has said of absent pages what cannot be")]
    Absent(#[from] AbsentError),
    #[error("the source has kept a page back that this host needs before the guest runs")]
    KeptBack,
    #[error("the guest cannot run before all of its memory is here")]
    Guard(#[from] GuardError),
    #[error("the state of the machine is damaged")]
    State(#[from] StateError),
    #[error(transparent)]
    Compatibility(#[from] CompatibilityError),
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error("the migration was cancelled")]
    Cancelled,
}

/// How long a source may be silent.
pub(super) const SILENCE_MAX: Duration = Duration::from_secs(30);
/// How much of a name is logged that somebody else has given.
const NAME_CHARS_MAX: usize = 64;
/// How many times its size a memory may be sent.
const TIMES_MAX: u64 = 64;

impl Job {
    /// Waits for a source that can be trusted, and takes its machine in.
    ///
    /// # Errors
    ///
    /// [`ReceiveError`]; then nothing is left of it.
    pub fn run(self) -> Result<Received, ReceiveError> {
        let Caller { mut wire, body, .. } = self.door.wait(&self.progress)?;
        let socket = wire.stream_ref().socket();
        let waits = socket
            .set_read_timeout(Some(SILENCE_MAX))
            .and_then(|()| socket.set_write_timeout(Some(SILENCE_MAX)));
        waits.map_err(ReceiveError::Listen)?;
        let taken = self.take(&mut wire, &body);
        match taken {
            Ok((plan, config)) => Ok(Received {
                plan,
                config,
                wire,
                ending: self.ending,
                copies: self.copies,
            }),
            Err(error) => {
                // Whoever hears why may try again at once.
                self.copies.give_up();
                tell(&mut wire, &crate::api::chain(&error));
                match error {
                    ReceiveError::Wire(_) if self.progress.is_cancelled() => Err(ReceiveError::Cancelled),
                    error => Err(error),
                }
            }
        }
    }

    fn take(&self, wire: &mut Wire<Stream>, body: &[u8]) -> Result<(Plan, Config), ReceiveError> {
        let hello = Hello::read(body)?;
        let config = self.check(&hello)?;
        let machine = config.machine();
        let memory = memory::allocate(
            config.memory_layout(),
            Backing::Anonymous,
            page_size(machine.huge_pages),
        )?;
        let counts = Counts {
            vcpus: machine.vcpu_count,
            virtio: config.virtio_devices(),
        };
        // All that KVM has to make before it is needed, and before a byte of memory moves: it may refuse.
        let shell = Shell::new(
            &memory,
            config.memory_layout().hotplug(),
            Vec::new(),
            machine.vcpu_count,
            dirty_log(machine),
        )?;
        let supported = shell.supported().map_err(CompatibilityError::from)?;
        let created = self.copies.create(&hello.copies, config.drives(), &self.owner);
        created.map_err(|error| ReceiveError::Refused(crate::api::chain(&error)))?;
        let can_wait = hello.postcopy && postcopy::is_possible(page_size(machine.huge_pages));
        let (joining, taken) = self.take_memory(wire, &hello, &memory, can_wait)?;
        let mut state = State::parse(&taken.state, &ReadingKeys::default())?;
        let machine = MachineState::read(&mut state, counts)?;
        state.finish()?;
        shell.check_compatible(&supported, &machine)?;
        hello
            .check_shared(&config, &self.owner, &machine)
            .map_err(ReceiveError::Refused)?;
        tell_moved(&memory, taken.absent.as_ref())?;
        // Nobody joins any more, and hears so until the source lets go, or the door is for whoever brings what is absent.
        let (joining, fetcher) = match taken.absent {
            Some(absent) => {
                drop(joining);
                (None, Some(self.fetch(&memory, absent, &machine, taken.token)?))
            }
            None => (Some(joining), None),
        };
        // What the guest was told is on its medium is so here, before it is anywhere else no more.
        self.copies.finish()?;
        log::info!("migration: memory and state are here, and the guest is still the source's");
        wire.send(Kind::Loaded, &[])?;
        wire.flush()?;
        match wire.receive()? {
            (Kind::Go, _) => {}
            (found, _) => return Err(WireError::Unexpected { found }.into()),
        }
        self.progress.cannot_be_cut();
        drop(joining);
        if hello.drives.is_empty() {
            // No lease can give the guest back to the source: what is here may be all that is gone on with.
            self.copies.keep();
        }
        self.copies.open_up()?;
        let config = config.continued_by(&self.process);
        let courses: Vec<Course> = config
            .drives()
            .iter()
            .map(|drive| hello.course_of(drive))
            .collect();
        let saved = SavedOrigin {
            memory: MemorySource {
                memory,
                pager: None,
                fetcher,
                id: None,
            },
            state: machine,
        };
        let plan = Plan::restore(&config, (&courses, Disks::Continue), &self.owner, saved)?.within(shell);
        Ok((plan, config))
    }

    /// The configuration of a machine that can go on here.
    fn check(&self, hello: &Hello) -> Result<Config, ReceiveError> {
        if self.vm.as_ref().is_some_and(|vm| *vm != hello.vm) {
            return Err(ReceiveError::Refused(format!(
                "machine `{}` is sent, and `{}` is waited for",
                hello.vm,
                self.vm.as_deref().unwrap_or_default()
            )));
        }
        let named: String = hello.vm.chars().take(NAME_CHARS_MAX).collect();
        log::info!("migration: machine {named:?} is offered");
        if hello.drives.is_empty() {
            log::info!(
                "migration: no disk of it is written where both sides have it, so no lease decides: a connection that is lost \
                 when the guest is handed over may leave it running nowhere"
            );
        }
        let config = hello.check(&self.owner, &self.overrides, available_memory_mib());
        config.map_err(|problems| ReceiveError::Refused(problems.join("; ")))
    }

    /// Says that the machine is taken, and takes its memory in, by as many streams as join, and then its state. Nobody joins
    /// later, but whoever tries is told so, until the door is dropped.
    fn take_memory(
        &self,
        wire: &mut Wire<Stream>,
        hello: &Hello,
        memory: &Arc<GuestMemoryMmap>,
        can_wait: bool,
    ) -> Result<(Joining, Taken), ReceiveError> {
        let answer = Answer {
            token: Token::random().map_err(ReceiveError::Host)?,
            postcopy: can_wait,
        };
        let landing = Landing::new(Arc::clone(memory));
        let mut intake = Intake::new(landing, Arc::clone(&self.copies), Arc::clone(&self.progress));
        if can_wait {
            intake.may_be_incomplete();
        }
        let intake = Arc::new(intake);
        let joining = Joining::open(
            Arc::clone(&self.door),
            Admission::new(answer.token, hello.streams),
            wire.stream_ref().socket(),
            Arc::clone(&intake),
        );
        let joining = joining.map_err(ReceiveError::Host)?;
        wire.send(Kind::Ready, &[&answer.body(hello)])?;
        wire.flush()?;
        let state = take_memory(wire, &intake);
        let state = state.map_err(|error| joining.lost().unwrap_or(error))?;
        joining.end()?;
        let cpu_time = send::cpu_time() + intake.cpu_time();
        log::info!(
            "migration: taken in {} us of processor time",
            cpu_time.as_micros()
        );
        let taken = Taken {
            state,
            absent: intake.absent()?,
            token: answer.token,
        };
        Ok((joining, taken))
    }

    /// Has whoever touches a page of `absent` wait, and fetches those from now on.
    fn fetch(
        &self,
        memory: &GuestMemoryMmap,
        absent: PageSet,
        machine: &MachineState,
        token: Token,
    ) -> Result<Fetcher, ReceiveError> {
        // The thread that builds the machine must not wait for another host.
        let needed = pages_of(memory, &machine.memory_of_kvm());
        if needed.runs().flatten().any(|page| absent.contains(page)) {
            return Err(ReceiveError::KeptBack);
        }
        let prepared = Prepared {
            filling: Filling::guard(memory, absent)?,
            door: Arc::clone(&self.door),
            token,
            wait: self.postcopy_wait,
            ending: self.ending.clone(),
        };
        Fetcher::start(prepared).map_err(ReceiveError::Host)
    }
}

/// Lets the guest know that it is elsewhere, unless its page for that is still to come, from a source that knows of none.
fn tell_moved(memory: &GuestMemoryMmap, absent: Option<&PageSet>) -> Result<(), ReceiveError> {
    let page = pages_of(memory, &[(layout::VMCLOCK.0, VMCLOCK_BYTES.into())]);
    let is_absent = absent.is_some_and(|absent| page.runs().flatten().any(|page| absent.contains(page)));
    if !is_absent {
        layout::VMCLOCK.disrupt(memory, Disruption::Moved)?;
    }
    Ok(())
}

/// What has come before the machine is anybody's.
struct Taken {
    state: Vec<u8>,
    /// The pages that have not; `None` if all have.
    absent: Option<PageSet>,
    token: Token,
}

/// Where all streams of a migration take memory in.
#[derive(Debug)]
pub struct Intake {
    landing: Landing,
    taken: AtomicU64,
    is_given_up: AtomicBool,
    cpu_us: AtomicU64,
    /// What is told of pages that do not come, if some may not.
    telling: Option<Mutex<Telling>>,
    copies: Arc<Copies>,
    progress: Arc<Progress>,
}

impl Intake {
    /// One into `landing` and `copies`.
    pub fn new(landing: Landing, copies: Arc<Copies>, progress: Arc<Progress>) -> Self {
        Self {
            landing,
            taken: AtomicU64::default(),
            is_given_up: AtomicBool::default(),
            cpu_us: AtomicU64::default(),
            telling: None,
            copies,
            progress,
        }
    }

    /// Not all pages have to come before the state.
    pub fn may_be_incomplete(&mut self) {
        let size_bytes = self.landing.count() * PAGE_BYTES as u64;
        self.telling = Some(Mutex::new(Telling::new(size_bytes)));
    }

    /// The pages that have not come; `None` if all have.
    ///
    /// # Errors
    ///
    /// When not all of them were told.
    pub fn absent(&self) -> Result<Option<PageSet>, ReceiveError> {
        let telling = self
            .telling
            .as_ref()
            .map(|telling| telling.lock().expect(NO_PANIC));
        Ok(match telling {
            Some(mut telling) if telling.has_begun() => Some(telling.finish()?),
            _ => None,
        })
    }

    fn hear_absent(&self, body: &[u8]) -> Result<(), ReceiveError> {
        let found = Kind::Absent;
        let telling = self.telling.as_ref().ok_or(WireError::Unexpected { found })?;
        telling.lock().expect(NO_PANIC).take(body)?;
        Ok(())
    }

    fn take_disk(&self, kind: Kind, body: &[u8]) -> Result<(), ReceiveError> {
        if self.is_given_up.load(Ordering::Relaxed) {
            return Err(WireError::Io(io::ErrorKind::ConnectionAborted.into()).into());
        }
        let bytes = match kind {
            Kind::Blocks => self.copies.take_blocks(body)?,
            _ => self.copies.take_holes(body)?,
        };
        self.progress.add_disk(bytes);
        self.progress.add(0, (HEADER_BYTES + body.len()) as u64);
        Ok(())
    }

    pub(super) fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Whoever takes something in has the next frame be the last.
    pub(super) fn give_up(&self) {
        self.is_given_up.store(true, Ordering::Relaxed);
    }

    /// What the threads of further streams have had of processors.
    fn cpu_time(&self) -> Duration {
        Duration::from_micros(self.cpu_us.load(Ordering::Relaxed))
    }

    /// Counts what one frame has brought. Zeros of no page, and marks, would cost nothing, and last for ever.
    fn count(&self, pages: u64, wire_bytes: usize) -> Result<(), ReceiveError> {
        let limit = self.landing.count().saturating_mul(TIMES_MAX);
        let taken = self.taken.fetch_add(pages.max(1), Ordering::Relaxed);
        if taken.saturating_add(pages.max(1)) > limit {
            return Err(ReceiveError::TooMuch);
        }
        self.progress.add(pages, wire_bytes as u64);
        Ok(())
    }
}

/// Takes memory in by the first stream until the state comes, which is returned.
///
/// # Errors
///
/// When the source is lost, sends what has no place, or more than a migration needs.
pub fn take_memory<S: BufRead + Write>(wire: &mut Wire<S>, intake: &Intake) -> Result<Vec<u8>, ReceiveError> {
    let mut unpacked = Vec::new();
    loop {
        match wire.receive_head()? {
            (Kind::State, body_bytes) => return Ok(wire.receive_body(body_bytes)?.to_vec()),
            (Kind::Absent, body_bytes) => intake.hear_absent(wire.receive_body(body_bytes)?)?,
            (kind @ (Kind::Blocks | Kind::Holes), body_bytes) => {
                intake.take_disk(kind, wire.receive_body(body_bytes)?)?;
            }
            (Kind::Mark, body_bytes) => {
                // The source is to know how long it takes until everything is there.
                intake.copies.sync()?;
                take_frame(wire, intake, (Kind::Mark, body_bytes), &mut unpacked)?;
            }
            head => take_frame(wire, intake, head, &mut unpacked)?,
        }
    }
}

const NO_PANIC: &str = "no holder of what is told panics";

/// How a further stream has ended.
#[derive(Debug)]
pub struct Ended {
    /// Why: they all do by being lost, sooner or later.
    pub why: ReceiveError,
    /// Whether the source has been told of everything that came.
    pub is_marked: bool,
}

/// Takes memory in by a further stream until that ends.
pub fn take_share<S: BufRead + Write>(wire: &mut Wire<S>, intake: &Intake) -> Ended {
    let (mut is_marked, mut unpacked) = (true, Vec::new());
    let mut take = || -> Result<(), ReceiveError> {
        loop {
            let head = wire.receive_head()?;
            is_marked = false;
            take_frame(wire, intake, head, &mut unpacked)?;
            is_marked = head.0 == Kind::Mark;
        }
    };
    let why = take().expect_err("it goes on until something ends it");
    let us = u64::try_from(send::cpu_time().as_micros()).unwrap_or(u64::MAX);
    intake.cpu_us.fetch_add(us, Ordering::Relaxed);
    Ended { why, is_marked }
}

/// Takes in what may come by every stream.
fn take_frame<S: BufRead + Write>(
    wire: &mut Wire<S>,
    intake: &Intake,
    (kind, body_bytes): (Kind, usize),
    unpacked: &mut Vec<u8>,
) -> Result<(), ReceiveError> {
    if intake.is_given_up.load(Ordering::Relaxed) {
        return Err(WireError::Io(io::ErrorKind::ConnectionAborted.into()).into());
    }
    let count = match kind {
        Kind::Pages => intake.landing.take_pages::<_, ReceiveError>(wire, body_bytes)?,
        Kind::Packed => intake
            .landing
            .take_packed::<_, ReceiveError>(wire, body_bytes, unpacked)?,
        Kind::Zeros => intake.landing.take_zeros::<_, ReceiveError>(wire, body_bytes)?,
        Kind::Mark => {
            wire.send(Kind::Reached, &[])?;
            wire.flush()?;
            0
        }
        found => return Err(WireError::Unexpected { found }.into()),
    };
    intake.count(count, HEADER_BYTES + body_bytes)
}

/// Tells the source why it is not to wait. It may be gone.
fn tell(wire: &mut Wire<Stream>, why: &str) {
    let bytes = why.as_bytes();
    let shown = bytes.get(..Kind::Refused.body_bytes_max()).unwrap_or(bytes);
    let _ = wire.send(Kind::Refused, &[shown]).and_then(|()| wire.flush());
}

/// Tells the source that the guest runs here; the thread ends when it is told, or is gone.
pub fn tell_running(mut wire: Wire<Stream>) {
    let told = wire.send(Kind::Running, &[]).and_then(|()| wire.flush());
    if let Err(error) = told {
        log::info!("the source was not told that the guest runs here: {error}");
    }
    wire.stream().close();
    let _ = wire.flush();
}
