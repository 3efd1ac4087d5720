//! A reactor on a simulated medium: it reorders, shortens, interrupts and fails what it is asked.
#![expect(unsafe_code, reason = "watched descriptors are borrowed from their owner")]

mod flight;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, HashMap};
use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};

use self::flight::Flight;
use super::dice::Dice;
use super::medium::Medium;
use crate::reactor::{Event, FILES_MAX, Full, KernelOp, Patience, Reactor, Submit, Token, WATCHES_MAX, Wake};

/// How badly a simulated host behaves. A rate of `n` means once in `n` operations, 0 never.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// Transfers that end early.
    pub short_one_in: u64,
    /// Operations that end with EINTR or EAGAIN; never more often in a row than a backend has to try again.
    pub interrupted_one_in: u64,
    /// Operations that end with EIO or ENOSPC, having done any part of their work.
    pub failed_one_in: u64,
    /// The file systems cannot punch holes.
    pub refuses_holes: bool,
    /// The file systems cannot zero ranges.
    pub refuses_zeroing: bool,
}

impl Faults {
    /// Faults of a host that is drawn from the dice: some are sound, some are sick.
    pub fn draw(dice: &mut Dice) -> Self {
        let mut rate = |rates: &[u64]| dice.pick(rates);
        Self {
            short_one_in: rate(&[0, 2, 5, 20]),
            interrupted_one_in: rate(&[0, 3, 10, 50]),
            failed_one_in: rate(&[0, 0, 0, 10, 40]),
            refuses_holes: rate(&[0, 0, 0, 1]) == 1,
            refuses_zeroing: rate(&[0, 0, 1]) == 1,
        }
    }
}

/// A [`Reactor`] whose operations work on a [`Medium`]; a clone is the same reactor. Descriptors
/// are only counted: a [`crate::reactor::FileSlot`] names the file of the medium with that number.
///
/// An operation takes effect in parts, at any moment between its submission and its end, and
/// operations overtake each other. Nothing ever blocks: a wait carries operations on, or turns the
/// clock to the timer. A wait that nothing would end asks whoever is [`SimReactor::on_idle`] to do
/// something; if nothing comes of it, it returns, and then the reactor is idle.
#[derive(Clone)]
pub struct SimReactor(Rc<RefCell<State>>, Rc<RefCell<Option<OnIdle>>>);

/// What goes on in the world while a reactor sleeps.
type OnIdle = Box<dyn FnMut()>;

struct State {
    medium: Medium,
    dice: Dice,
    faults: Faults,
    files: usize,
    ops_max: usize,
    flights: Vec<Flight>,
    watches: Vec<(RawFd, Token)>,
    deadline: Option<Instant>,
    clock: Cell<Instant>,
    /// How often in a row the operation of a token was interrupted.
    interruptions: HashMap<Token, u32>,
    /// The errors that were made up.
    errors: BTreeSet<i32>,
    /// Counts submissions and ends.
    moment: Moment,
    /// When the last sync that ended well was submitted.
    synced: Option<Moment>,
    idle: bool,
}

/// A point in the order of a reactor's submissions and ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(u64);

impl SimReactor {
    /// A reactor with room for `ops_max` operations, on `medium`.
    pub fn new(medium: &Medium, ops_max: usize, faults: Faults, dice: Dice) -> Self {
        let state = State {
            medium: medium.clone(),
            dice,
            faults,
            files: 0,
            ops_max,
            flights: Vec::new(),
            watches: Vec::new(),
            deadline: None,
            clock: Cell::new(Instant::now()),
            interruptions: HashMap::new(),
            errors: BTreeSet::new(),
            moment: Moment::default(),
            synced: None,
            idle: false,
        };
        Self(Rc::new(RefCell::new(state)), Rc::default())
    }

    /// Calls `act` each time when a wait would otherwise never end.
    pub fn on_idle(&self, act: impl FnMut() + 'static) {
        *self.1.borrow_mut() = Some(Box::new(act));
    }

    /// From now on the host behaves like this.
    pub fn set_faults(&self, faults: Faults) {
        self.0.borrow_mut().faults = faults;
    }

    /// How many operations are in flight.
    pub fn in_flight(&self) -> usize {
        self.0.borrow().flights.len()
    }

    /// How many operations it takes at most.
    pub fn ops_max(&self) -> usize {
        self.0.borrow().ops_max
    }

    /// Whether the last wait returned because nothing could ever end it.
    pub fn is_idle(&self) -> bool {
        self.0.borrow().idle
    }

    /// Whether an operation has ended with this errno, which is no interruption.
    pub fn has_failed_with(&self, errno: i32) -> bool {
        self.0.borrow().errors.contains(&errno)
    }

    /// Now, in the order of submissions and ends.
    pub fn moment(&self) -> Moment {
        self.0.borrow().moment
    }

    /// Whether a sync that was submitted after `moment` has ended well.
    pub fn has_synced_since(&self, moment: Moment) -> bool {
        self.0.borrow().synced.is_some_and(|synced| synced > moment)
    }

    /// Lets `time` pass.
    pub fn pass(&self, time: Duration) {
        self.0.borrow().pass(time);
    }
}

impl Submit for SimReactor {
    fn submit(&mut self, op: KernelOp, token: Token) -> Result<(), Full> {
        self.0.borrow_mut().submit(op, token)
    }

    fn now(&self) -> Instant {
        self.0.borrow().clock.get()
    }
}

impl Reactor for SimReactor {
    fn register(&mut self, files: &[RawFd]) -> io::Result<()> {
        let mut state = self.0.borrow_mut();
        assert!(
            state.flights.is_empty(),
            "files are replaced only when nothing is in flight"
        );
        if files.len() > FILES_MAX {
            return Err(io::Error::from_raw_os_error(libc::EMFILE));
        }
        state.files = files.len();
        Ok(())
    }

    fn watch(&mut self, eventfd: RawFd, token: Token) -> io::Result<()> {
        let mut state = self.0.borrow_mut();
        if state.watches.len() == WATCHES_MAX {
            return Err(io::Error::from_raw_os_error(libc::EMFILE));
        }
        state.watches.push((eventfd, token));
        Ok(())
    }

    fn unwatch(&mut self, token: Token) -> io::Result<()> {
        let mut state = self.0.borrow_mut();
        state.watches.retain(|(_, watched)| *watched != token);
        Ok(())
    }

    fn set_timer(&mut self, deadline: Option<Instant>) {
        self.0.borrow_mut().deadline = deadline;
    }

    fn wait(&mut self, patience: Patience, wakes: &mut Vec<Wake>) -> io::Result<()> {
        for _ in 0..ACTS_MAX {
            // The world looks at this reactor while it acts.
            self.0.borrow_mut().wait(patience, wakes)?;
            match &mut *self.1.borrow_mut() {
                Some(act) if self.is_idle() => act(),
                _ => break,
            }
        }
        Ok(())
    }
}

/// How often the world may act without waking a reactor before its wait ends for nothing.
const ACTS_MAX: u32 = 1_000;

/// How often in a row an operation is interrupted at most; a backend has to try again more often.
const INTERRUPTIONS_MAX: u32 = 8;

impl State {
    fn submit(&mut self, op: KernelOp, token: Token) -> Result<(), Full> {
        if self.flights.len() == self.ops_max {
            return Err(Full);
        }
        assert!(
            self.flights.iter().all(|flight| flight.token != token),
            "two operations in flight are both called {token:?}"
        );
        self.moment.0 += 1;
        let flight = Flight::new(op, token, self.moment, &self.medium);
        self.flights.push(flight);
        Ok(())
    }

    fn wait(&mut self, patience: Patience, wakes: &mut Vec<Wake>) -> io::Result<()> {
        let mut news = Vec::new();
        self.idle = false;
        loop {
            self.carry_on(&mut news);
            self.look_at_watches(&mut news)?;
            if self.deadline.is_some_and(|deadline| deadline <= self.clock.get()) {
                self.deadline = None;
                news.push(Wake::TimerExpired);
            }
            if !news.is_empty() || patience == Patience::None {
                break;
            }
            if self.flights.is_empty() {
                let Some(deadline) = self.deadline else {
                    self.idle = true;
                    break;
                };
                self.clock.set(deadline);
            }
        }
        self.dice.shuffle(&mut news);
        wakes.append(&mut news);
        Ok(())
    }

    /// Does a part of the work in flight; some of it may end.
    fn carry_on(&mut self, news: &mut Vec<Wake>) {
        // A look takes time, even if nothing is there.
        self.pass(Duration::from_nanos(500));
        let parts = self.dice.below(2 * self.flights.len() as u64 + 1);
        for _ in 0..parts {
            let time = Duration::from_nanos(self.dice.below(100_000));
            self.pass(time);
            if self.flights.is_empty() {
                return;
            }
            let place = self.dice.index(self.flights.len());
            let Some(flight) = self.flights.get_mut(place) else {
                return;
            };
            let faults = faults_now(&self.faults, &self.interruptions, flight.token);
            if flight.carry_on(&self.medium, self.files, &faults, &mut self.dice) {
                let flight = self.flights.swap_remove(place);
                news.push(self.end(&flight));
            }
        }
    }

    fn end(&mut self, flight: &Flight) -> Wake {
        let result = flight.end(&self.medium);
        self.moment.0 += 1;
        let token = flight.token;
        if result == -libc::EINTR || result == -libc::EAGAIN {
            *self.interruptions.entry(token).or_default() += 1;
            return Wake::Done(Event { token, result });
        }
        self.interruptions.remove(&token);
        if result < 0 {
            self.errors.insert(-result);
        } else if flight.is_sync() {
            self.synced = self.synced.max(Some(flight.submitted));
        }
        Wake::Done(Event { token, result })
    }

    fn pass(&self, time: Duration) {
        self.clock.set(self.clock.get() + time);
    }

    fn look_at_watches(&self, news: &mut Vec<Wake>) -> io::Result<()> {
        if self.watches.is_empty() {
            return Ok(());
        }
        let entry = |(eventfd, _): &(RawFd, Token)| PollFd::from_borrowed_fd(borrow(*eventfd), PollFlags::IN);
        let mut polled: Vec<PollFd<'_>> = self.watches.iter().map(entry).collect();
        rustix::event::poll(&mut polled, Some(&Timespec::default()))?;
        for (entry, (eventfd, token)) in polled.iter().zip(&self.watches) {
            if entry.revents().contains(PollFlags::IN) {
                // Resets the counter; it is readable and nobody else reads it, so this cannot block.
                rustix::io::read(borrow(*eventfd), &mut [0_u8; 8])?;
                news.push(Wake::Signalled(*token));
            }
        }
        Ok(())
    }
}

/// The faults that may befall the operation of `token`: it is not interrupted for ever.
fn faults_now(faults: &Faults, interruptions: &HashMap<Token, u32>, token: Token) -> Faults {
    let interrupted = interruptions.get(&token).copied().unwrap_or(0);
    Faults {
        interrupted_one_in: if interrupted < INTERRUPTIONS_MAX {
            faults.interrupted_one_in
        } else {
            0
        },
        ..*faults
    }
}

fn borrow<'fd>(fd: RawFd) -> BorrowedFd<'fd> {
    // SAFETY: whoever watches a descriptor keeps it open until it takes the watch back (contract of `Reactor`).
    unsafe { BorrowedFd::borrow_raw(fd) }
}
