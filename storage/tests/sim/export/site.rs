//! An NFS server, the network that it is reached by, and what befalls both.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use coracle_storage::backend::Backend;
use coracle_storage::lease::{Lock, NetworkTerms, OnError, Owner, Succession, Terms};
use coracle_storage::nfs::NfsError;
use coracle_storage::reactor::Reactor;
use coracle_storage::sim::clock::Clock;
use coracle_storage::sim::dice::Dice;
use coracle_storage::sim::medium::Medium;
use coracle_storage::sim::net::{NetFaults, Network};
use coracle_storage::sim::nfs::options::{Mishaps, Options};
use coracle_storage::sim::nfs::{Change, Event, Server, ServerPeer, client};
use coracle_storage::sim::reactor::{Faults, SimReactor};

use crate::passing::Surroundings;

/// One server with one image, on a network.
pub(crate) struct Site {
    pub(crate) server: Server,
    pub(crate) network: Network,
    pub(crate) clock: Clock,
    pub(crate) options: Options,
    faults: NetFaults,
    version: &'static str,
    /// When the server listens again.
    down_until: Option<Instant>,
    /// When it is not frozen any more.
    held_until: Option<Instant>,
}

/// The image.
pub(crate) const IMAGE: &str = "image.raw";

const ADDRESS: &str = "10.0.0.1:2049";

impl Site {
    /// An image of `content`, in peace.
    pub(crate) fn new(content: &[u8], dice: &mut Dice) -> Self {
        let options = Options::draw(dice);
        Self::with(options, content, dice)
    }

    /// The same, on a server like that.
    pub(crate) fn with(options: Options, content: &[u8], dice: &mut Dice) -> Self {
        let faults = NetFaults::draw(dice);
        let network = Network::new(NetFaults::default(), dice.split());
        let server = Server::new("export", options.clone(), network.clock(), dice.split());
        server.add(IMAGE, content);
        let version = match options.limits.minor_version_max {
            1 => dice.pick(&["", "?version=4.1"]),
            _ => dice.pick(&["", "", "?version=4.1", "?version=4.2"]),
        };
        let site = Self {
            clock: network.clock(),
            network,
            server,
            options,
            faults,
            version,
            down_until: None,
            held_until: None,
        };
        site.calm();
        site.listen();
        site
    }

    /// Whether the image's URL asks for that version.
    pub(crate) fn is_of_version(&self, version: &str) -> bool {
        self.version.ends_with(version)
    }

    /// A host on the network.
    pub(crate) fn host(&self, faults: Faults, dice: &mut Dice) -> SimReactor {
        let io = SimReactor::new(&Medium::default(), 16, faults, dice.split());
        io.join(&self.network);
        io
    }

    /// Opens the image as a disk.
    pub(crate) fn open(
        &self,
        io: impl Reactor,
        lock: Lock,
        owner: &Owner,
        means: Means,
    ) -> Result<Box<dyn Backend>, NfsError> {
        self.open_on(io, &Terms::new(lock, owner), means)
    }

    /// The same, if it still is of this generation.
    pub(crate) fn keep(
        &self,
        io: impl Reactor,
        owner: &Owner,
        generation: u64,
    ) -> Result<Box<dyn Backend>, NfsError> {
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
    ) -> Result<Box<dyn Backend>, NfsError> {
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
        let url = format!("nfs://10.0.0.1/export/{IMAGE}{}", self.version);
        client::open(io, &url, &terms, means.uncommitted_bytes_max)
    }

    /// Everything works from now on, but for what is under way.
    pub(crate) fn calm(&self) {
        self.network.set_faults(NetFaults::default());
        self.server.adjust(|options| options.mishaps = Mishaps::default());
    }

    /// And from now on it does not.
    pub(crate) fn rage(&self) {
        self.network.set_faults(self.faults);
        let mishaps = self.options.mishaps;
        self.server.adjust(|options| options.mishaps = mishaps);
    }

    fn listen(&self) {
        let server = self.server.clone();
        self.network
            .listen(address(), move || Box::new(ServerPeer::new(&server)));
    }

    /// Ends all connections, as when the server's process ends.
    pub(crate) fn hang_up(&self) {
        self.network.reset(address());
    }

    /// The server is down until then.
    pub(crate) fn down(&mut self, until: Instant) {
        self.network.unlisten(address());
        self.down_until = Some(until);
    }

    /// Holds the server until then.
    pub(crate) fn freeze(&mut self, until: Instant) {
        self.held_until = self.held_until.max(Some(until));
        self.network.hold(address(), until);
    }

    /// Lets what befell the server end.
    pub(crate) fn recover(&mut self) {
        let ends = self.down_until.max(self.held_until);
        ends.into_iter().for_each(|end| self.clock.pass_to(end));
        self.network.advance();
        self.look();
    }

    /// Something happens.
    pub(crate) fn mishap(&mut self, owner: &Owner, dice: &mut Dice) {
        let time = Duration::from_millis(dice.pick(&[1, 50, 500, 3_000, 20_000, 70_000]));
        match dice.below(9) {
            0 | 1 => {
                self.server.restart();
                self.hang_up();
                if dice.one_in(2) {
                    self.down(self.clock.now() + time);
                }
            }
            2 | 3 => {
                self.server.crash();
                self.hang_up();
                if dice.one_in(2) {
                    self.down(self.clock.now() + time);
                }
            }
            4 => self.freeze(self.clock.now() + time),
            5 => self.server.expire(&client::prefix(owner)),
            6 => self.server.forget_sessions(&client::prefix(owner)),
            _ => self.hang_up(),
        }
    }

    /// What was written since the last look, to the image.
    pub(crate) fn changes(&self) -> Vec<Change> {
        let events = self.server.events().into_iter();
        let changes = events.filter_map(|event| match event {
            Event::Wrote(change) if change.name == IMAGE.as_bytes() => Some(change),
            _ => None,
        });
        changes.collect()
    }

    /// Panics if a client broke the protocol.
    pub(crate) fn check(&self) {
        let complaints = self.server.complaints();
        assert!(complaints.is_empty(), "the client did wrong: {complaints:?}");
    }
}

impl Surroundings for Site {
    fn due(&self) -> Option<Instant> {
        self.down_until
    }

    /// Starts a server that has been down long enough.
    fn look(&mut self) {
        if self.down_until.is_some_and(|until| until <= self.clock.now()) {
            self.down_until = None;
            self.server.begin_grace();
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
pub(crate) fn expected<T>(opened: Result<T, NfsError>) -> T {
    opened.unwrap_or_else(|error| panic!("a server in peace refuses: {}", chain(&error)))
}

/// An error and its causes.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |&cause| cause.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

fn address() -> SocketAddr {
    ADDRESS.parse().unwrap()
}
