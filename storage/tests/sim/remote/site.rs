//! A target, the network that it is reached by, and what befalls both.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use coracle_storage::backend::{Access, Backend};
use coracle_storage::iscsi::IscsiError;
use coracle_storage::lease::{Lock, NetworkTerms, OnError, Owner, Succession, Terms};
use coracle_storage::reactor::Reactor;
use coracle_storage::sim::clock::Clock;
use coracle_storage::sim::dice::Dice;
use coracle_storage::sim::initiator;
use coracle_storage::sim::medium::Medium;
use coracle_storage::sim::net::{NetFaults, Network};
use coracle_storage::sim::reactor::{Faults, SimReactor};
use coracle_storage::sim::target::options::{Mishaps, Options};
use coracle_storage::sim::target::{Redirect, Target, TargetPeer, Term};

use crate::passing::Surroundings;

/// One target with one logical unit, on a network.
pub(crate) struct Site {
    pub(crate) target: Target,
    pub(crate) network: Network,
    pub(crate) clock: Clock,
    /// How bad it may get.
    pub(crate) faults: NetFaults,
    mishaps: Mishaps,
    options: String,
    /// What the guest sees of the logical unit, in bytes.
    pub(crate) guest_bytes: u64,
    is_formatted: bool,
    /// When the target listens again.
    down_until: Option<Instant>,
    /// When it is not frozen any more.
    held_until: Option<Instant>,
}

/// The unit.
pub(crate) const LUN: u16 = 1;

const PORTALS: [&str; 2] = ["10.0.0.1:3260", "10.0.0.2:3260"];

/// The size of the reserved tail, in bytes.
const TAIL_BYTES: u64 = 1 << 20;

/// Whether a unit has a place for records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tail {
    Formatted,
    None,
}

impl Site {
    /// A unit of `content`, in peace.
    pub(crate) fn new(content: &[u8], tail: Tail, dice: &mut Dice) -> Self {
        let faults = NetFaults::draw(dice);
        let mut options = Options::draw(dice);
        // Where it is not so a disk zeroes nothing (see `iscsi::open`); a simulated one does not ask.
        options.quirks.fences_unmap = true;
        let mishaps = options.mishaps;
        let network = Network::new(NetFaults::default(), dice.split());
        let target = Target::new(options.clone(), dice.split());
        let guest_bytes = content.len() as u64;
        let tail_bytes = if tail == Tail::Formatted { TAIL_BYTES } else { 0 };
        target.add(LUN, guest_bytes + tail_bytes, Access::ReadWrite);
        target.fill(LUN, 0, content);
        let site = Self {
            clock: network.clock(),
            network,
            target,
            faults,
            mishaps,
            options: format!(
                "&header_digest={}&data_digest={}",
                dice.pick(&["none", "crc32c"]),
                dice.pick(&["none", "crc32c"])
            ),
            guest_bytes,
            is_formatted: tail == Tail::Formatted,
            down_until: None,
            held_until: None,
        };
        site.calm();
        site.target.adjust(|options| {
            options.limits.header_digest = true;
            options.limits.data_digest = true;
        });
        site.listen();
        if site.is_formatted {
            let host = site.host(Faults::default(), dice);
            let owner = initiator::owner("format", dice);
            let shown = initiator::create(host.clone(), &site.url("format"), &owner);
            host.cut_off();
            assert_eq!(shown.unwrap(), guest_bytes, "the tail has another size");
        }
        site
    }

    /// A host on the network.
    pub(crate) fn host(&self, faults: Faults, dice: &mut Dice) -> SimReactor {
        let io = SimReactor::new(&Medium::default(), 16, faults, dice.split());
        io.join(&self.network);
        io
    }

    /// The unit's URL, for an initiator that is called `name`.
    pub(crate) fn url(&self, name: &str) -> String {
        format!(
            "iscsi://{}/iqn.2026-01.test:t1/{LUN}?initiator=iqn.2026-01.test:{name}{}",
            PORTALS.join(","),
            self.options
        )
    }

    /// Opens the unit as a disk.
    pub(crate) fn open(
        &self,
        io: impl Reactor,
        lock: Lock,
        owner: &Owner,
        means: Means,
    ) -> Result<Box<dyn Backend>, IscsiError> {
        self.open_on(io, &Terms::new(lock, owner), means)
    }

    /// The same, if it still is of this generation.
    pub(crate) fn keep(
        &self,
        io: impl Reactor,
        owner: &Owner,
        generation: u64,
    ) -> Result<Box<dyn Backend>, IscsiError> {
        let terms = Terms {
            succession: Succession::Keeps(generation),
            ..Terms::new(Lock::Exclusive, owner)
        };
        self.open_on(io, &terms, MEANS)
    }

    /// The same on any terms.
    pub(crate) fn open_on(
        &self,
        io: impl Reactor,
        terms: &Terms<'_>,
        means: Means,
    ) -> Result<Box<dyn Backend>, IscsiError> {
        let on_error = match means.timeout {
            Some(_) => OnError::Report,
            None => OnError::Wait,
        };
        let terms = Terms {
            network: NetworkTerms {
                on_error,
                timeout: means.timeout,
                takes_over: None,
            },
            ..*terms
        };
        if terms.lock == Lock::None {
            // Nothing else stops what an old connection delivers late.
            self.target.adjust(|options| options.quirks.reinstates = true);
        }
        let url = self.url(&terms.owner.vm);
        initiator::open(io, &url, &terms, means.uncommitted_bytes_max)
    }

    /// What the guest's part of the unit has now.
    pub(crate) fn content(&self) -> Vec<u8> {
        self.shown(self.target.content(LUN))
    }

    /// The same of what is surely on the medium.
    pub(crate) fn durable(&self) -> Vec<u8> {
        self.shown(self.target.durable(LUN))
    }

    fn shown(&self, mut content: Vec<u8>) -> Vec<u8> {
        content.truncate(usize::try_from(self.guest_bytes).unwrap());
        content
    }

    /// Everything works from now on, but for what is under way.
    pub(crate) fn calm(&self) {
        self.network.set_faults(NetFaults::default());
        self.target.adjust(|options| options.mishaps = Mishaps::default());
        self.target.redirect(None);
    }

    /// And from now on it does not.
    pub(crate) fn rage(&self) {
        self.network.set_faults(self.faults);
        let mishaps = self.mishaps;
        self.target.adjust(|options| options.mishaps = mishaps);
    }

    pub(crate) fn listen(&self) {
        for portal in portals() {
            let target = self.target.clone();
            self.network
                .listen(portal, move || Box::new(TargetPeer::new(&target)));
        }
    }

    /// Ends all connections, as when the target's process ends.
    pub(crate) fn hang_up(&self) {
        portals().for_each(|portal| self.network.reset(portal));
    }

    /// The target is down until then.
    pub(crate) fn down(&mut self, until: Instant) {
        portals().for_each(|portal| self.network.unlisten(portal));
        self.down_until = Some(until);
    }

    /// Holds the target until then.
    pub(crate) fn freeze(&mut self, until: Instant) {
        self.held_until = self.held_until.max(Some(until));
        portals().for_each(|portal| self.network.hold(portal, until));
    }

    /// Lets what befell the target end.
    pub(crate) fn recover(&mut self) {
        let ends = self.down_until.max(self.held_until);
        ends.into_iter().for_each(|end| self.clock.pass_to(end));
        self.network.advance();
        self.look();
    }

    /// Something happens; nothing that a disk without records may not survive, if the unit has none.
    pub(crate) fn mishap(&mut self, lock: Lock, dice: &mut Dice) {
        let forgets = self.is_formatted || lock == Lock::None;
        let time = Duration::from_millis(dice.pick(&[1, 50, 500, 3_000, 20_000]));
        match dice.below(9) {
            0 | 1 if forgets => {
                self.target.restart();
                self.hang_up();
                if dice.one_in(2) {
                    self.down(self.clock.now() + time);
                }
            }
            2 | 3 if forgets => {
                self.target.crash();
                self.hang_up();
                if dice.one_in(2) {
                    self.down(self.clock.now() + time);
                }
            }
            4 => self.freeze(self.clock.now() + time),
            5 => self.hang_up(),
            6 => self.target.reset(LUN),
            7 => self.target.redirect(Some(Redirect {
                address: dice
                    .pick(&["10.0.0.2:3260,1", "10.0.0.1:3260,1", "10.0.0.9:3260,1"])
                    .to_owned(),
                term: dice.pick(&[Term::Temporarily, Term::Permanently]),
            })),
            _ => self.target.redirect(None),
        }
    }

    /// Whether there is something behind what the guest sees.
    pub(crate) fn has_tail(&self) -> bool {
        self.is_formatted
    }

    /// Makes the unit longer.
    pub(crate) fn grow(&mut self, size_bytes: u64) {
        assert!(!self.is_formatted, "the tail lies behind what the guest sees");
        self.target.grow(LUN, size_bytes);
        self.guest_bytes = self.guest_bytes.max(size_bytes);
    }

    /// Panics if the initiator broke the protocol.
    pub(crate) fn check(&self) {
        let complaints = self.target.complaints();
        assert!(complaints.is_empty(), "the initiator did wrong: {complaints:?}");
    }
}

impl Surroundings for Site {
    fn due(&self) -> Option<Instant> {
        self.down_until
    }

    /// Starts a target that has been down long enough.
    fn look(&mut self) {
        if self.down_until.is_some_and(|until| until <= self.clock.now()) {
            self.down_until = None;
            self.listen();
        }
    }
}

/// What a disk is opened with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Means {
    pub(crate) timeout: Option<Duration>,
    pub(crate) uncommitted_bytes_max: usize,
}

pub(crate) const MEANS: Means = Means {
    timeout: None,
    uncommitted_bytes_max: 32 << 20,
};

/// What is there, or why not.
pub(crate) fn expected<T>(opened: Result<T, IscsiError>) -> T {
    opened.unwrap_or_else(|error| panic!("a target in peace refuses: {}", chain(&error)))
}

/// An error and its causes.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |&cause| cause.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

fn portals() -> impl Iterator<Item = SocketAddr> {
    PORTALS.into_iter().map(|portal| portal.parse().unwrap())
}
