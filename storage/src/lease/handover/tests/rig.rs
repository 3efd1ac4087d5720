//! Two images of any kind, and whoever has one of them.

use std::net::TcpListener;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::*;
use crate::backend::{Access, Backend};
use crate::blocking::Blocking;
use crate::iscsi::{IscsiUrl, Operator, Replace};
use crate::lease::{Lock, Terms};
use crate::nfs;
use crate::open::{Hold, open};
use crate::request::Failure;
use crate::sim::clock::Clock;
use crate::sim::dice::Dice;
use crate::sim::nfs::Server;
use crate::sim::nfs::options::Options;
use crate::sim::serve::{Served, serve};
use crate::sim::target::Target;
use crate::sim::target::options::{Options as TargetOptions, Place};

/// Where an image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    Nfs,
    Iscsi,
}

/// Two images.
pub(super) struct Rig {
    _directory: tempfile::TempDir,
    nfs: Option<Served<Server>>,
    _iscsi: Option<Served<Target>>,
    pub(super) lead: String,
    pub(super) other: String,
}

const IMAGE_BYTES: usize = 4096;

impl Rig {
    pub(super) fn new(kinds: [Kind; 2]) -> Self {
        let in_memory = Path::new("/dev/shm");
        let directory = tempfile::tempdir_in(if in_memory.is_dir() {
            in_memory
        } else {
            Path::new("/tmp")
        });
        let directory = directory.unwrap();
        let nfs = kinds.contains(&Kind::Nfs).then(server);
        let iscsi = kinds.contains(&Kind::Iscsi).then(target);
        let image = |kind, name: &str| match kind {
            Kind::Iscsi => {
                let lun = if name == "lead" { 1 } else { 2 };
                let address = iscsi.as_ref().unwrap().address();
                let url = format!("iscsi://{address}/iqn.2026-01.test:t1/{lun}");
                operator(&url).create(Replace::Never).unwrap();
                url
            }
            Kind::File => {
                let path = directory.path().join(name);
                fs::write(&path, [0; IMAGE_BYTES]).unwrap();
                path.to_str().unwrap().to_owned()
            }
            Kind::Nfs => format!("nfs://{}/export/{name}", nfs.as_ref().unwrap().address()),
        };
        let [lead, other] = kinds;
        Self {
            lead: image(lead, "lead"),
            other: image(other, "other"),
            _directory: directory,
            nfs,
            _iscsi: iscsi,
        }
    }

    /// Has nobody keep an image any more who was killed: a reservation stays for ever.
    pub(super) fn free(path: &str) {
        if IscsiUrl::is_url(path) {
            // It may be free.
            drop(operator(path).break_lease());
        }
    }

    /// Has an owner's processes die: what they have on a server is kept for their lease time, which passes.
    pub(super) fn bury(&self, owner: &Owner) {
        if let Some(nfs) = &self.nfs {
            let client = nfs::client_prefix(owner.incarnation);
            nfs.with(move |server| server.expire(&client));
        }
    }

    /// The server is started anew.
    pub(super) fn restart_server(&self) {
        if let Some(nfs) = &self.nfs {
            nfs.with(Server::restart);
        }
    }

    /// What clients did against the protocol.
    pub(super) fn complaints(&self) -> Vec<String> {
        let nfs = self.nfs.as_ref();
        nfs.map_or_else(Vec::new, |nfs| nfs.with(Server::complaints))
    }
}

fn operator(url: &str) -> Operator {
    Operator::new(url, None, &machine("operator", 9)).unwrap()
}

fn target() -> Served<Target> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let place = Place {
        address: format!("{},1", listener.local_addr().unwrap()),
        ..Place::default()
    };
    let make = move || {
        let options = TargetOptions {
            place,
            ..TargetOptions::default()
        };
        let target = Target::new(options, Dice::new(1));
        for lun in [1, 2] {
            target.add(lun, UNIT_BYTES, Access::ReadWrite);
        }
        target
    };
    serve(listener, make).unwrap()
}

/// A tail, and something before it.
const UNIT_BYTES: u64 = 2 << 20;

fn server() -> Served<Server> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let make = || {
        let mut options = Options::default();
        options.limits.grace = Duration::from_millis(300);
        let server = Server::new("export", options, Clock::default(), Dice::new(1));
        for name in ["lead", "other"] {
            server.add(name, &[0; IMAGE_BYTES]);
        }
        server
    };
    serve(listener, make).unwrap()
}

/// An image that somebody has, and the disk that serves it.
pub(super) struct Held {
    disk: Disk,
    pub(super) hold: Hold,
}

/// A disk on a thread of its own, as a device has it.
struct Disk {
    asks: Option<Sender<Ask>>,
    answers: Receiver<Result<(), Failure>>,
    /// The last was not answered in time.
    is_late: bool,
    thread: Option<JoinHandle<()>>,
}

#[derive(Clone, Copy, Debug)]
enum Ask {
    Yield,
    Raise,
    Write,
    TakeBack,
    /// Nothing is said to a server any more.
    Die,
}

/// How long a disk may take where nothing is in its way, and how long that is looked for where something may be.
const DONE_MAX: Duration = Duration::from_secs(20);
const LOOK: Duration = Duration::from_millis(30);

impl Disk {
    fn of(image: Box<dyn Backend>) -> Self {
        let (asks, asked) = channel();
        let (answer, answers) = channel();
        let serve = move || {
            let mut disk = Blocking::new(image).unwrap();
            for ask in asked {
                let done = match ask {
                    Ask::Yield => disk.yield_fence(),
                    Ask::Raise => disk.raise(),
                    Ask::Write => disk.write_at(0, &[1; 512]).and_then(|()| disk.flush()),
                    Ask::TakeBack => disk.take_back(),
                    Ask::Die => return std::mem::forget(disk),
                };
                let _may_be_over = answer.send(done);
            }
        };
        Self {
            asks: Some(asks),
            answers,
            is_late: false,
            thread: Some(thread::spawn(serve)),
        }
    }

    /// Has something done that is done at once.
    fn has_done(&mut self, ask: Ask) -> Result<(), Failure> {
        self.begin(ask, DONE_MAX).expect("the disk hangs")
    }

    /// The same of what may take longer than that; then it goes on, and is asked for again.
    fn begin(&mut self, ask: Ask, limit: Duration) -> Option<Result<(), Failure>> {
        let limit = if std::mem::take(&mut self.is_late) {
            DONE_MAX
        } else {
            self.asks.as_ref().unwrap().send(ask).unwrap();
            limit
        };
        match self.answers.recv_timeout(limit) {
            Ok(done) => Some(done),
            Err(RecvTimeoutError::Timeout) => {
                self.is_late = true;
                None
            }
            Err(RecvTimeoutError::Disconnected) => panic!("the disk has panicked"),
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.asks = None;
        if let Some(thread) = self.thread.take() {
            assert!(
                thread.join().is_ok() || thread::panicking(),
                "the disk has panicked"
            );
        }
    }
}

impl Held {
    pub(super) fn taken(path: &str, owner: &Owner, succession: Succession) -> Result<Self, OpenError> {
        let terms = Terms {
            succession,
            ..Terms::new(Lock::Exclusive, owner)
        };
        let image = open(path, Access::ReadWrite, &terms)?;
        Ok(Self {
            disk: Disk::of(image.backend),
            hold: image.hold,
        })
    }

    pub(super) fn yields(&mut self) {
        self.disk.has_done(Ask::Yield).unwrap();
        self.hold.yield_fence().unwrap();
    }

    pub(super) fn start(&mut self) -> Result<(), OpenError> {
        // Who has lost it is told so by the disk.
        let raised = self.disk.has_done(Ask::Raise);
        raised.map_err(|failure| OpenError::Host {
            path: "the disk".to_owned(),
            source: std::io::Error::other(failure),
        })?;
        self.hold.begin_raise(&|| ())?;
        self.hold.settle()
    }

    pub(super) fn write(&mut self) -> Result<(), Failure> {
        self.disk.has_done(Ask::Write)
    }

    pub(super) fn take_back(&mut self, other: Option<Incarnation>) -> TakenBack {
        match self.hold.take_back(other).unwrap() {
            TakenBack::Done => {}
            undone => return undone,
        }
        match self.disk.begin(Ask::TakeBack, LOOK) {
            None => TakenBack::Fenced,
            Some(outcome) => {
                outcome.unwrap();
                self.hold.is_back();
                TakenBack::Done
            }
        }
    }

    /// What is left of the lease of a process that was killed: its records, and what a server does not know yet.
    pub(super) fn kill(self) {
        let Self { disk, hold } = self;
        hold.fall();
        disk.asks.as_ref().unwrap().send(Ask::Die).unwrap();
        drop(disk);
        std::mem::forget(hold);
    }
}
