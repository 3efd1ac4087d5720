//! Who may write an image: one owner at a time, known by name, and kept alone by the storage.
//!
//! A lease is two things. The *record* beside the image says who has it and outlives every crash; the *fence* makes
//! the host refuse whoever else would write.
//!
//! ```text
//!   free ──fence──► fenced ──record `held`, durable──► held ──image closed──► record `released`, fence down: free
//!     ▲               └── cannot be recorded: fence down ──► refused             │
//!     └──────────── the owner dies: the kernel takes the fence down ─────────────┘
//! ```
//!
//! The first byte is written after the record is durable: a snapshot that remembers an older generation
//! than the newest record has been overtaken.

mod chain;
mod copied;
mod error;
mod fence;
mod handover;
mod inspect;
mod owner;
mod place;
mod record;
mod terms;

use std::error::Error;
use std::fs::File;
use std::io;
use std::iter;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::threads::{self, Thread};

use self::fence::ofd::{self, FenceError};
use self::place::Place;

pub(crate) use self::chain::Chain;
pub use self::chain::{ChainError, UnreadableError};
pub(crate) use self::copied::Claim;
pub use self::error::LeaseError;
pub use self::fence::ofd::{Conflict, Role};
pub(crate) use self::handover::opposing;
pub use self::handover::{Contest, Offer, Opposition, TakenBack};
pub use self::inspect::{Standing, break_lease, inspect};
pub(crate) use self::owner::fill_random;
pub use self::owner::{Incarnation, Owner};
pub(crate) use self::record::NotTaken;
pub use self::record::{Overtaken, Phase, RECORD_BYTES_MAX, Record, RecordError};
pub use self::terms::{Lock, NetworkTerms, OnError, Succession, Terms};

/// The right to use an image. To be dropped after the image was closed: then it is released, and the
/// next owner learns that the last one has ended properly.
#[derive(Debug)]
pub struct Lease {
    path: String,
    file: Arc<File>,
    mark: Mark,
}

/// What the chain of records has of a lease.
#[derive(Debug, Default)]
enum Mark {
    /// Nothing: it is a reader's, or has no place.
    #[default]
    None,
    /// A step that a thread is making: it waits for the disk twice, and a machine is built meanwhile.
    Coming(StepThread),
    /// A step.
    Made(Step),
    /// A step that was offered, with the fence down: somebody else may make the next one.
    Yielded(Step),
}

/// A thread that makes a step, and says that it is made before it ends.
#[derive(Debug)]
struct StepThread {
    thread: Thread<StepMade>,
    is_made: Arc<AtomicBool>,
}

/// The newest step of ours, if there is one: that which was made, or, where it could not, the one before.
type StepMade = (Option<Step>, Result<(), ChainError>);

#[derive(Clone, Debug)]
struct Step {
    chain: Arc<Chain>,
    record: Record,
}

/// How long a fence is waited for that nobody alive is known to have.
pub(crate) const FREED_MS_MAX: u64 = 500;
/// The same, where a monitor is known to have had it, and to have ended without a word. On a busy host the kernel may need
/// a second or two for it.
pub(crate) const DEAD_FREED_MS_MAX: u64 = 5_000;
const FREED_PERIOD: Duration = Duration::from_millis(2);

/// Tries again for `limit_ms` as long as somebody `is_in_the_way`: the kernel takes the rings of a monitor that has ended
/// down a little later than the process, and its locks and its claim on a device with them.
pub(crate) fn freed_soon<T>(
    limit_ms: u64,
    mut attempt: impl FnMut() -> T,
    is_in_the_way: impl Fn(&T) -> bool,
) -> T {
    let deadline = Instant::now() + Duration::from_millis(limit_ms);
    loop {
        let outcome = attempt();
        if !is_in_the_way(&outcome) || Instant::now() >= deadline {
            return outcome;
        }
        thread::sleep(FREED_PERIOD);
    }
}

impl Lease {
    /// Takes the lease of the image at `path`, which `file` has open on a description that nobody
    /// shares. When it returns, nobody else can have it; nothing may be written before [`Self::settle`].
    ///
    /// # Errors
    ///
    /// Who has it, or why it cannot be recorded. Then nothing is locked.
    pub(crate) fn acquire(
        file: &Arc<File>,
        path: &str,
        role: Role,
        terms: &Terms<'_>,
    ) -> Result<Self, LeaseError> {
        let candidate = Candidate { file, path, terms };
        if let Succession::TakesOver(offer) = terms.succession {
            return candidate.take_over(role, offer);
        }
        candidate.take_fence(role)?;
        let begun = match role {
            Role::Writer => candidate.begin_step(),
            Role::Reader => candidate.check_unwritten().map(|()| Mark::None),
        };
        match begun {
            Ok(mark) => Ok(Self {
                path: path.to_owned(),
                file: Arc::clone(file),
                mark,
            }),
            Err(error) => {
                // If this fails the fence ends with the descriptor, which is about to be closed.
                let _ = ofd::release(file);
                Err(error)
            }
        }
    }

    /// Waits until the lease is recorded durably: from now on the image may be written. Once is enough.
    ///
    /// # Errors
    ///
    /// Why it is not.
    pub(crate) fn settle(&mut self) -> Result<(), LeaseError> {
        let (mark, outcome) = match std::mem::take(&mut self.mark) {
            Mark::Coming(step) => {
                let (step, outcome) = step.joined();
                (step.map_or(Mark::None, Mark::Made), outcome)
            }
            settled => (settled, Ok(())),
        };
        self.mark = mark;
        outcome.map_err(|source| LeaseError::Chain {
            path: self.path.clone(),
            source,
        })
    }

    /// Whether [`Self::settle`] has nothing to wait for.
    pub(crate) fn is_settled(&self) -> bool {
        match &self.mark {
            Mark::None | Mark::Made(_) | Mark::Yielded(_) => true,
            Mark::Coming(step) => step.is_made.load(Ordering::Acquire),
        }
    }

    /// The generation of the image, if that is recorded; once the lease is settled.
    pub(crate) fn generation(&self) -> Option<u64> {
        match &self.mark {
            Mark::Made(step) | Mark::Yielded(step) => Some(step.record.generation),
            Mark::None | Mark::Coming(_) => None,
        }
    }

    /// Begins to raise the generation, if that is recorded, durably: whoever remembers an older one will know that the image
    /// may have been written since. Nothing may be written before [`Self::settle`]; `done` is called when that does not wait
    /// any more.
    ///
    /// # Errors
    ///
    /// Why it is not begun; then the lease is as it was.
    pub(crate) fn begin_raise(&mut self, done: impl FnOnce() + Send + 'static) -> Result<(), LeaseError> {
        self.settle()?;
        let Mark::Made(step) = &self.mark else {
            return Ok(());
        };
        let (last, path) = (step.clone(), self.path.clone());
        let raise = move || match last.raised() {
            Ok(step) => (Some(step), Ok(())),
            Err(error) => (Some(last), Err(error)),
        };
        let thread = StepThread::begin(raise, done);
        self.mark = Mark::Coming(thread.map_err(LeaseError::no_thread(&path))?);
        Ok(())
    }

    /// Says whether the lease could be had now, and changes nothing.
    ///
    /// # Errors
    ///
    /// Who has it.
    pub(crate) fn check(
        file: &Arc<File>,
        path: &str,
        role: Role,
        terms: &Terms<'_>,
    ) -> Result<(), LeaseError> {
        let candidate = Candidate { file, path, terms };
        let look = || match ofd::probe(file, role).map_err(|error| candidate.unlockable(error))? {
            None => Ok(()),
            Some(conflict) => Err(candidate.refusal(conflict)),
        };
        candidate.until_freed(look)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let path = &self.path;
        if Arc::strong_count(&self.file) > 1 {
            // A worker that did not end in time was left behind with the image, and may yet write. The
            // fence lasts as long as its descriptor does.
            log::error!("the lease of `{path}` is not released: the image is still in use");
            return;
        }
        let step = match std::mem::take(&mut self.mark) {
            // It may be another's by now.
            Mark::Yielded(_) => return,
            Mark::None => None,
            // What was not made needs no release.
            Mark::Coming(step) => step.joined().0,
            Mark::Made(step) => Some(step),
        };
        // What was taken over and not started can be had back by whoever gave it, and by nobody else. What was moved is to be
        // mistaken for the machine's by nobody.
        if let Some(step) = step.filter(|step| !matches!(step.record.phase, Phase::Taken | Phase::Moved))
            && let Err(error) = step.release()
        {
            log::warn!("the lease of `{path}` ends without a record of it: {error}");
        }
        if let Err(error) = ofd::release(&self.file) {
            log::warn!("the lock on `{path}` ends with its descriptor only: {error}");
        }
    }
}

impl StepThread {
    /// Begins to `make` a step; `done` is called when that does not have to be waited for any more.
    fn begin(
        make: impl FnOnce() -> StepMade + Send + 'static,
        done: impl FnOnce() + Send + 'static,
    ) -> io::Result<Self> {
        let is_made = Arc::<AtomicBool>::default();
        let made = Arc::clone(&is_made);
        let step = move || {
            let step = make();
            // First: whoever is told looks at once, and then not for a while.
            made.store(true, Ordering::Release);
            done();
            step
        };
        let thread = threads::spawn(threads::Kind::Mover, "lease", step)?;
        Ok(Self { thread, is_made })
    }

    fn joined(self) -> StepMade {
        self.thread.join().expect("a thread that panics ends the process")
    }
}

impl Step {
    /// The step after this one, by the same owner and of the next generation.
    fn raised(&self) -> Result<Self, ChainError> {
        let phase = match self.record.phase {
            Phase::Taken => Phase::Started,
            _ => Phase::Held,
        };
        self.next(phase, &self.record.owner)
    }

    fn release(&self) -> Result<(), ChainError> {
        self.next(Phase::Released, &self.record.owner).map(drop)
    }

    /// Makes the step after this one.
    fn next(&self, phase: Phase, owner: &Owner) -> Result<Self, ChainError> {
        let record = Record::after(Some(&self.record), phase, owner);
        let record = record.ok_or(ChainError::Exhausted)?;
        self.chain.append(&record)?;
        Ok(Self {
            chain: Arc::clone(&self.chain),
            record,
        })
    }
}

/// An image that somebody wants the lease of.
struct Candidate<'a> {
    file: &'a Arc<File>,
    path: &'a str,
    terms: &'a Terms<'a>,
}

impl Candidate<'_> {
    fn take_fence(&self, role: Role) -> Result<(), LeaseError> {
        self.until_freed(|| {
            ofd::take(self.file, role).map_err(|error| match error {
                FenceError::Busy(conflict) => self.refusal(conflict),
                FenceError::Host(error) => self.unlockable(error),
            })
        })
    }

    /// Tries again for a moment while the fence is that of nobody who is known by name: whoever is, is alive.
    fn until_freed(&self, mut attempt: impl FnMut() -> Result<(), LeaseError>) -> Result<(), LeaseError> {
        let is_nobodys = |tried: &Result<(), LeaseError>| matches!(tried, Err(LeaseError::InUse { .. }));
        let tried = attempt();
        if !is_nobodys(&tried) {
            return tried;
        }
        let last = self.last();
        let has_died = last.is_some_and(|last| last.phase.is_owned() && last.owner.has_ended_here());
        let limit_ms = if has_died { DEAD_FREED_MS_MAX } else { FREED_MS_MAX };
        freed_soon(limit_ms, attempt, is_nobodys)
    }

    /// Begins the next step of the chain, with the fence up.
    fn begin_step(&self) -> Result<Mark, LeaseError> {
        let chain = match self.place()? {
            Place::Chain(chain) => chain,
            Place::Nowhere(_) if self.terms.succession != Succession::Raises => return Err(self.forgotten()),
            Place::Nowhere(reason) => {
                tell_unrecorded(self.path, &reason);
                return Ok(Mark::None);
            }
        };
        let last = chain.recovered().map_err(|source| self.failed(source))?;
        if let Some(last) = &last {
            self.check_end_of(last)?;
        }
        if let Some(last) = last.as_ref().filter(|last| last.phase == Phase::Moved) {
            return Err(LeaseError::Moved {
                path: self.path.to_owned(),
                record: Box::new(last.clone()),
            });
        }
        let record = Record::taking(last.as_ref(), self.terms.succession, self.terms.owner);
        let record = record.map_err(|not_taken| self.not_taken(not_taken))?;
        // A chain that was begun has to go on, or its generation says nothing.
        let is_optional =
            last.is_none() && self.terms.at.is_none() && self.terms.succession == Succession::Raises;
        let path = self.path.to_owned();
        let chain = Arc::new(chain);
        let step = move || match chain.append(&record) {
            Ok(()) => (Some(Step { chain, record }), Ok(())),
            Err(reason @ ChainError::NoPlace { .. }) if is_optional => {
                tell_unrecorded(&path, &reason);
                (None, Ok(()))
            }
            Err(error) => (None, Err(error)),
        };
        let thread = StepThread::begin(step, || ());
        Ok(Mark::Coming(thread.map_err(LeaseError::no_thread(self.path))?))
    }

    /// Whether the image is still of the generation that a reader asks for, who makes no step. With the fence up: from now on
    /// nobody writes it.
    fn check_unwritten(&self) -> Result<(), LeaseError> {
        if self.terms.succession == Succession::Raises {
            return Ok(());
        }
        let Place::Chain(chain) = self.place()? else {
            return Err(self.forgotten());
        };
        let last = chain.newest().map_err(|source| self.failed(source))?;
        if let Some(last) = &last {
            self.check_end_of(last)?;
        }
        let checked = self.terms.succession.check(last.as_ref());
        checked.map_err(|not_taken| self.not_taken(not_taken))
    }

    /// Whether the owner of `last` is known to have no fence any more.
    fn check_end_of(&self, last: &Record) -> Result<(), LeaseError> {
        if !last.phase.is_owned() {
            return Ok(());
        }
        let is_elsewhere = last.owner.host != self.terms.owner.host;
        // The locks of a file are where the file is. Those of a device are on each host apart.
        if is_elsewhere && place::is_block_device(self.file).map_err(|error| self.unlockable(error))? {
            return Err(LeaseError::HeldElsewhere {
                path: self.path.to_owned(),
                record: Box::new(last.clone()),
            });
        }
        log::info!("`{}` was not released by its last owner: {last}", self.path);
        Ok(())
    }

    /// Says who is in the way, as far as that is known.
    fn refusal(&self, conflict: Conflict) -> LeaseError {
        let path = self.path.to_owned();
        match (conflict, self.last()) {
            (Conflict::Writer, Some(record)) if record.phase.is_owned() && !record.owner.has_ended_here() => {
                let record = Box::new(record);
                if record.owner.incarnation == self.terms.owner.incarnation {
                    LeaseError::HeldHere { path }
                } else {
                    LeaseError::Held { path, record }
                }
            }
            _ => LeaseError::InUse {
                path,
                conflict,
                inode: place::inode(self.file),
            },
        }
    }

    /// The newest record, if there is one that can be read.
    fn last(&self) -> Option<Record> {
        match self.place() {
            Ok(Place::Chain(chain)) => chain.newest().ok().flatten(),
            Ok(Place::Nowhere(_)) | Err(_) => None,
        }
    }

    fn place(&self) -> Result<Place, LeaseError> {
        place::locate(self.file, self.path, self.terms.at).map_err(|source| self.failed(source))
    }

    fn failed(&self, source: ChainError) -> LeaseError {
        LeaseError::Chain {
            path: self.path.to_owned(),
            source,
        }
    }

    fn not_taken(&self, why: NotTaken) -> LeaseError {
        match why {
            NotTaken::Overtaken(overtaken) => LeaseError::Overtaken {
                path: self.path.to_owned(),
                overtaken,
            },
            NotTaken::Exhausted => self.failed(ChainError::Exhausted),
        }
    }

    fn forgotten(&self) -> LeaseError {
        LeaseError::Forgotten {
            path: self.path.to_owned(),
        }
    }

    fn unlockable(&self, source: std::io::Error) -> LeaseError {
        LeaseError::Unlockable {
            path: self.path.to_owned(),
            source,
        }
    }
}

fn tell_unrecorded(path: &str, reason: &dyn Error) {
    let causes = iter::successors(Some(reason), |&error| error.source());
    let reason: Vec<String> = causes.map(ToString::to_string).collect();
    log::info!(
        "`{path}` has a lock only, and so no migration and no restore beside the disk: {}; `lease_at` names another place",
        reason.join(": ")
    );
}

#[cfg(test)]
mod tests;
