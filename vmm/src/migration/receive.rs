//! The target: a thread that takes a machine in, until it can be built.

use std::io::{self, BufRead, Write};
use std::sync::Arc;
use std::time::Duration;

use coracle_storage::lease::Owner;

use super::door::Door;
use super::hello::{Hello, available_memory_mib};
use super::pages::{Landing, PagesError};
use super::progress::Progress;
use super::send;
use super::stream::Stream;
use super::wire::{Kind, Wire, WireError};
use crate::arch::x86_64::cpuid::compatibility::CompatibilityError;
use crate::config::{Config, Overrides};
use crate::keys::ReadingKeys;
use crate::kvm::KvmError;
use crate::machine::disks::Course;
use crate::machine::plan::{MemorySource, Plan, PlanError, SavedOrigin, dirty_log, page_size};
use crate::machine::shell::Shell;
use crate::machine::state::{Counts, MachineState};
use crate::memory::{self, Backing, MemoryError};
use crate::state::{State, StateError, whole};

/// What taking a machine in needs.
pub struct Job {
    /// Where the source calls.
    pub door: Door,
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
}

/// A machine that can go on here, and nowhere else unless the source wins the next step of its lease.
pub struct Received {
    /// What it is built from.
    pub plan: Plan,
    /// Its configuration.
    pub config: Config,
    /// Who is to be told that it runs.
    pub wire: Wire<Stream>,
}

/// Why no machine was taken in.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the text of an error is its documentation")]
pub enum ReceiveError {
    #[error("cannot wait for the source")]
    Listen(#[source] io::Error),
    #[error("the source was lost")]
    Wire(#[from] WireError),
    #[error("what the source says of its machine cannot be read")]
    Hello(#[from] postcard::Error),
    #[error("the machine cannot go on here: {0}")]
    Refused(String),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error("the source has sent what cannot be")]
    Pages(#[from] PagesError),
    #[error("the source has sent more memory than a migration needs")]
    TooMuch,
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
const SILENCE_MAX: Duration = Duration::from_secs(30);
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
        let stream = self.door.wait(&self.progress)?;
        let waits = stream
            .sock
            .set_read_timeout(Some(SILENCE_MAX))
            .and_then(|()| stream.sock.set_write_timeout(Some(SILENCE_MAX)));
        waits.map_err(ReceiveError::Listen)?;
        let mut wire = Wire::new(Stream::from(stream));
        let taken = self.take(&mut wire);
        match taken {
            Ok((plan, config)) => Ok(Received { plan, config, wire }),
            Err(error) => {
                tell(&mut wire, &crate::api::chain(&error));
                match error {
                    ReceiveError::Wire(_) if self.progress.is_cancelled() => Err(ReceiveError::Cancelled),
                    error => Err(error),
                }
            }
        }
    }

    fn take(&self, wire: &mut Wire<Stream>) -> Result<(Plan, Config), ReceiveError> {
        let (Kind::Hello, body) = wire.receive()? else {
            return Err(ReceiveError::Refused(
                "the source does not begin with a hello".to_owned(),
            ));
        };
        let hello: Hello = whole(body)?;
        if self.vm.as_ref().is_some_and(|vm| *vm != hello.vm) {
            return Err(ReceiveError::Refused(format!(
                "machine `{}` is sent, and `{}` is waited for",
                hello.vm,
                self.vm.as_deref().unwrap_or_default()
            )));
        }
        let named: String = hello.vm.chars().take(NAME_CHARS_MAX).collect();
        log::info!("migration: machine {named:?} is offered");
        let config = hello.check(&self.owner, &self.overrides, available_memory_mib());
        let config = config.map_err(|problems| ReceiveError::Refused(problems.join("; ")))?;
        let machine = config.machine();
        let memory = memory::allocate(
            machine.mem_size_mib,
            Backing::Anonymous,
            page_size(machine.huge_pages),
        )?;
        let counts = Counts {
            vcpus: machine.vcpu_count,
            virtio: config.drives().len() + usize::from(config.entropy().is_some()),
        };
        // All that KVM has to make before it is needed, and before a byte of memory moves: it may refuse.
        let shell = Shell::new(&memory, machine.vcpu_count, dirty_log(machine))?;
        let supported = shell.supported().map_err(CompatibilityError::from)?;
        wire.send(Kind::Ready, &[])?;
        wire.flush()?;
        let mut landing = Landing::new(&memory);
        let state = take_memory(wire, &mut landing, &self.progress)?;
        log::info!(
            "migration: taken in {} us of processor time",
            send::cpu_time().as_micros()
        );
        let mut state = State::parse(&state, &ReadingKeys::default())?;
        let machine = MachineState::read(&mut state, counts)?;
        state.finish()?;
        shell.check_compatible(&supported, &machine)?;
        log::info!("migration: memory and state are here, and the guest is still the source's");
        wire.send(Kind::Loaded, &[])?;
        wire.flush()?;
        match wire.receive()? {
            (Kind::Go, _) => {}
            (found, _) => return Err(WireError::Unexpected { found }.into()),
        }
        self.progress.cannot_be_cut();
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
                id: None,
            },
            state: machine,
        };
        let plan = Plan::restore(&config, &courses, &self.owner, saved)?.within(shell);
        Ok((plan, config))
    }
}

/// Takes memory in until the state comes, which is returned.
///
/// # Errors
///
/// When the source is lost, sends what has no place, or more than a migration needs.
pub fn take_memory<S: BufRead + Write>(
    wire: &mut Wire<S>,
    landing: &mut Landing<'_>,
    progress: &Progress,
) -> Result<Vec<u8>, ReceiveError> {
    let limit = landing.count().saturating_mul(TIMES_MAX);
    let mut taken = 0;
    loop {
        let count = match wire.receive_head()? {
            (Kind::Pages, body_bytes) => landing.take_pages::<_, ReceiveError>(wire, body_bytes)?,
            (Kind::Zeros, body_bytes) => landing.take_zeros::<_, ReceiveError>(wire, body_bytes)?,
            (Kind::Mark, _) => {
                wire.send(Kind::Reached, &[])?;
                wire.flush()?;
                0
            }
            (Kind::State, body_bytes) => return Ok(wire.receive_body(body_bytes)?.to_vec()),
            (found, _) => return Err(WireError::Unexpected { found }.into()),
        };
        // Zeros of no page, and marks, would cost nothing, and last for ever.
        taken += count.max(1);
        if taken > limit {
            return Err(ReceiveError::TooMuch);
        }
        progress.add(count);
    }
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
