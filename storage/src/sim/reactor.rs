//! A reactor on a simulated medium: it reorders, shortens, interrupts and fails what it is asked.
#![expect(unsafe_code, reason = "watched descriptors are borrowed from their owner")]

mod flight;
mod memory;
mod talk;

use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap};
use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};

use self::flight::Flight;
use self::talk::{Places, Talk};
use super::clock::Clock;
use super::dice::Dice;
use super::medium::Medium;
use super::net::Network;
use crate::reactor::{
    Event, FILES_MAX, Full, ImageFile, KernelOp, Patience, Reactor, SocketOp, Submit, Token, WATCHES_MAX,
    Wake,
};
use crate::socket::place;

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
/// operations overtake each other. Operations on sockets need a network ([`SimReactor::join`]).
///
/// Nothing ever blocks: a wait carries operations on, or turns the clock to the timer or to what the network does next.
/// A wait that nothing would end asks whoever is [`SimReactor::on_idle`] to do something; if nothing comes of it, it
/// returns, and then the reactor is idle.
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
    network: Option<Network>,
    places: Places,
    talks: Vec<Talk>,
    watches: Vec<(RawFd, Token)>,
    deadline: Option<Instant>,
    clock: Clock,
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
            network: None,
            places: Places::default(),
            talks: Vec::new(),
            watches: Vec::new(),
            deadline: None,
            clock: Clock::default(),
            interruptions: HashMap::new(),
            errors: BTreeSet::new(),
            moment: Moment::default(),
            synced: None,
            idle: false,
        };
        Self(Rc::new(RefCell::new(state)), Rc::default())
    }

    /// Gives the host a place in `network`: sockets connect to its listeners, and its clock is that of this reactor.
    /// Whoever uses the reactor has not asked it for anything yet, not even for the time.
    pub fn join(&self, network: &Network) {
        let mut state = self.0.borrow_mut();
        assert!(
            state.in_flight() == 0,
            "a host joins a network before it does anything"
        );
        state.clock = network.clock();
        state.network = Some(network.clone());
    }

    /// Cuts the host off from the network for good: what it has sent goes on, and its peers never hear that it was the
    /// last. The reactor is not used any more.
    pub fn cut_off(&self) {
        let state = &mut *self.0.borrow_mut();
        state.talks.clear();
        for socket in state.places.iter_mut().filter_map(Option::take) {
            state.network.iter().for_each(|network| network.vanish(socket));
        }
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
        self.0.borrow().in_flight()
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
        self.0.borrow().clock.pass(time);
    }
}

impl Submit for SimReactor {
    fn submit(&mut self, op: KernelOp, token: Token) -> Result<(), Full> {
        self.0.borrow_mut().submit(op, token)
    }

    fn now(&self) -> Instant {
        self.0.borrow().clock.now()
    }
}

impl Reactor for SimReactor {
    fn register(&mut self, files: &[ImageFile]) -> io::Result<()> {
        let mut state = self.0.borrow_mut();
        assert!(
            state.in_flight() == 0,
            "files are replaced only when nothing is in flight"
        );
        if files.len() > FILES_MAX {
            return Err(io::Error::from_raw_os_error(libc::EMFILE));
        }
        state.files = files.len();
        state.close_sockets();
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

/// A wait that has taken that long, because a network is busy with itself, is one that nothing ends.
const WAIT_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// How often in a row an operation is interrupted at most; a backend has to try again more often.
const INTERRUPTIONS_MAX: u32 = 8;

impl Drop for State {
    fn drop(&mut self) {
        // As the kernel does when a process ends.
        self.close_sockets();
    }
}

impl State {
    fn submit(&mut self, op: KernelOp, token: Token) -> Result<(), Full> {
        if self.in_flight() == self.ops_max {
            return Err(Full);
        }
        let flights = self.flights.iter().map(|flight| flight.token);
        assert!(
            flights
                .chain(self.talks.iter().map(|talk| talk.token))
                .all(|other| other != token),
            "two operations in flight are both called {token:?}"
        );
        self.moment.0 += 1;
        if let KernelOp::Socket { file, operation } = op {
            self.talk(place(file), operation, token);
            return Ok(());
        }
        let flight = Flight::new(op, token, self.moment, &self.medium);
        self.flights.push(flight);
        Ok(())
    }

    fn talk(&mut self, place: usize, operation: SocketOp, token: Token) {
        if matches!(operation, SocketOp::Make(_) | SocketOp::Close) {
            let mut others = self.talks.iter().filter(|talk| talk.place == place);
            let cancels = |talk: &Talk| matches!(talk.operation, SocketOp::Cancel { .. });
            assert!(
                others.all(cancels),
                "the place of a socket is emptied while something is in flight there"
            );
        }
        self.talks.push(Talk::new(place, operation, token));
    }

    fn in_flight(&self) -> usize {
        self.flights.len() + self.talks.len()
    }

    fn wait(&mut self, patience: Patience, wakes: &mut Vec<Wake>) -> io::Result<()> {
        let mut news = Vec::new();
        self.idle = false;
        let latest = self.clock.now() + WAIT_MAX;
        loop {
            self.carry_on(&mut news);
            self.carry_talks_on(&mut news);
            self.look_at_watches(&mut news)?;
            if self.deadline.is_some_and(|deadline| deadline <= self.clock.now()) {
                self.deadline = None;
                news.push(Wake::TimerExpired);
            }
            if !news.is_empty() || patience == Patience::None {
                break;
            }
            // Peers go on where room was made for them just now.
            self.network.iter().for_each(Network::advance);
            if self.flights.is_empty() && !self.talks_are_ready() {
                let network = self.network.as_ref().and_then(Network::next);
                let network = network.filter(|next| *next < latest);
                let Some(next) = self.deadline.into_iter().chain(network).min() else {
                    self.idle = true;
                    break;
                };
                self.clock.pass_to(next);
            }
        }
        self.dice.shuffle(&mut news);
        wakes.append(&mut news);
        Ok(())
    }

    /// Does a part of the work in flight; some of it may end.
    fn carry_on(&mut self, news: &mut Vec<Wake>) {
        // A look takes time, even if nothing is there.
        self.clock.pass(Duration::from_nanos(500));
        let parts = self.dice.below(2 * self.flights.len() as u64 + 1);
        for _ in 0..parts {
            let time = Duration::from_nanos(self.dice.below(100_000));
            self.clock.pass(time);
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

    /// Tries some of the operations on sockets; some may end.
    fn carry_talks_on(&mut self, news: &mut Vec<Wake>) {
        let Some(network) = self.network.clone() else {
            let ended = self.talks.drain(..).map(|talk| Event {
                token: talk.token,
                // A host without a network has no sockets.
                result: -libc::EAFNOSUPPORT,
            });
            news.extend(ended.map(Wake::Done));
            return;
        };
        network.advance();
        if self.talks.is_empty() {
            return;
        }
        for _ in 0..=self.dice.below(2 * self.talks.len() as u64) {
            self.clock.pass(Duration::from_nanos(self.dice.below(20_000)));
            network.advance();
            if self.talks.is_empty() {
                return;
            }
            let number = self.dice.index(self.talks.len());
            let Some(talk) = self.talks.get_mut(number) else {
                return;
            };
            let faults = faults_now(&self.faults, &self.interruptions, talk.token);
            let Ok(mut result) = talk.attempt(&mut self.places, &network, &faults, &mut self.dice) else {
                continue;
            };
            let ended = self.talks.swap_remove(number);
            if let SocketOp::Cancel { target } = ended.operation
                && let Some(place) = self.talks.iter().position(|talk| talk.token == target)
            {
                self.talks.swap_remove(place);
                news.push(self.report(target, -libc::ECANCELED));
                result = 0;
            }
            news.push(self.report(ended.token, result));
        }
    }

    /// Whether an operation on a socket ends without the network's doing.
    fn talks_are_ready(&self) -> bool {
        let network = self.network.as_ref();
        network.is_some_and(|network| self.talks.iter().any(|talk| talk.is_ready(&self.places, network)))
    }

    fn close_sockets(&mut self) {
        for socket in self.places.iter_mut().filter_map(Option::take) {
            self.network.iter().for_each(|network| network.close(socket));
        }
    }

    fn end(&mut self, flight: &Flight) -> Wake {
        let result = flight.end(&self.medium);
        if result == 0 && flight.is_sync() {
            self.synced = self.synced.max(Some(flight.submitted));
        }
        self.report(flight.token, result)
    }

    fn report(&mut self, token: Token, result: i32) -> Wake {
        self.moment.0 += 1;
        if result == -libc::EINTR || result == -libc::EAGAIN {
            *self.interruptions.entry(token).or_default() += 1;
            return Wake::Done(Event { token, result });
        }
        self.interruptions.remove(&token);
        if result < 0 {
            self.errors.insert(-result);
        }
        Wake::Done(Event { token, result })
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
