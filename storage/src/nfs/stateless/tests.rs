#![expect(clippy::unwrap_used, clippy::panic, reason = "a test's panic is its failure")]

mod server;

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::client::Client;
use super::locate::{self, Ports};
use super::*;
use crate::backend::{Access, Backend, Parting, Step};
use crate::lease::{Lock, NetworkTerms, OnError, Owner, Terms};
use crate::nfs::{self, NfsError};
use crate::plain::Plain;
use crate::reactor::{Patience, Reactor, Submit, Wake};
use crate::remote::dialogue::{self, Dialogue};
use crate::request::{Completion, Durability, Failure, Operation, Request};
use crate::segments;

use self::server::{Served, State};

const IMAGE_BYTES: usize = 8 << 20;
const PATH: &str = "/srv/golden/base.raw";

fn served() -> Served {
    let content = (0..IMAGE_BYTES).map(byte_at).collect();
    Served::start(State::new(&["srv", "golden", "base.raw"], content))
}

/// No block is like another.
fn byte_at(at: usize) -> u8 {
    let block = at / 512;
    u8::try_from((at % 251) ^ (block % 253)).unwrap()
}

fn url(served: &Served) -> String {
    let port = served.address().port();
    format!("nfs://127.0.0.1:{port}{PATH}?version=3&mountport={port}")
}

fn opened(url: &str, access: Access, lock: Lock) -> Result<nfs::Opened, NfsError> {
    let owner = Owner::of_this_process("vm");
    nfs::open(url, access, &Terms::new(lock, &owner))
}

fn refused(url: &str) -> NfsError {
    match opened(url, Access::ReadOnly, Lock::None) {
        Ok(_) => panic!("{url} was opened"),
        Err(error) => error,
    }
}

/// A disk in use.
struct Host {
    disk: Box<dyn Backend>,
    io: Plain,
}

impl Host {
    fn of(served: &Served) -> Self {
        Self::using(opened(&url(served), Access::ReadOnly, Lock::None).unwrap().disk)
    }

    fn reporting(served: &Served, timeout: Duration) -> Self {
        let owner = Owner::of_this_process("vm");
        let terms = Terms {
            network: NetworkTerms {
                on_error: OnError::Report,
                timeout: Some(timeout),
                takes_over: None,
            },
            ..Terms::new(Lock::None, &owner)
        };
        Self::using(nfs::open(&url(served), Access::ReadOnly, &terms).unwrap().disk)
    }

    fn using(mut disk: Box<dyn Backend>) -> Self {
        let mut io = Plain::new(16);
        io.register(&disk.files()).unwrap();
        disk.attach(&mut io);
        Self { disk, io }
    }

    fn start(&mut self, offset: usize, memory: &mut [u8]) {
        let request = Request {
            tag: offset as u64,
            operation: Operation::Read,
            offset_bytes: offset as u64,
            len_bytes: memory.len() as u64,
            durability: Durability::Cached,
            segments: memory.chunks_mut(100_000).map(segments::own).collect(),
        };
        let step = self.disk.start(request, &mut self.io);
        assert!(matches!(step, Step::Pending), "it takes at least one exchange");
    }

    /// Reads a range, and finds in it what is there.
    fn reads(&mut self, offset: usize, len: usize) {
        let mut memory = vec![0xee; len];
        self.start(offset, &mut memory);
        assert_eq!(self.completion().outcome, Ok(()));
        check(offset, &memory);
    }

    fn completion(&mut self) -> Completion {
        let begun = Instant::now();
        loop {
            if let Some(completion) = self.round(Instant::now() + Duration::from_secs(1)) {
                return completion;
            }
            assert!(begun.elapsed() < Duration::from_secs(30), "it does not end");
        }
    }

    fn round(&mut self, limit: Instant) -> Option<Completion> {
        if let Some(completion) = self.disk.next_completion() {
            return Some(completion);
        }
        let mut wakes = Vec::new();
        self.disk.before_wait(&mut self.io);
        self.io
            .set_timer(self.disk.alarm().into_iter().chain([limit]).min());
        self.io.wait(Patience::UntilEvent, &mut wakes).unwrap();
        let mut ended = None;
        for wake in wakes {
            if let Wake::Done(event) = wake
                && let Step::Done(completion) = self.disk.resume(event, &mut self.io)
            {
                assert!(ended.is_none(), "one event ends what it is for");
                ended = Some(completion);
            }
        }
        if self.disk.alarm().is_some_and(|alarm| alarm <= self.io.now()) {
            self.disk.wake(&mut self.io);
        }
        ended
    }

    fn parts(&mut self, parting: Parting) {
        self.disk.detach(parting, &mut self.io);
        let begun = Instant::now();
        while self.disk.is_attached() {
            assert!(self.round(Instant::now() + Duration::from_secs(1)).is_none());
            assert!(begun.elapsed() < Duration::from_secs(10), "it never leaves");
        }
    }

    fn reconnects(&self) -> u64 {
        self.disk.session().unwrap().reconnects.count()
    }
}

fn check(offset: usize, memory: &[u8]) {
    let wrong = memory
        .iter()
        .enumerate()
        .find(|(at, byte)| **byte != byte_at(offset + at));
    assert_eq!(wrong, None, "from {offset} on, {} bytes", memory.len());
}

#[test]
fn what_is_read_is_what_is_there_short_and_long_and_across_what_one_call_gives() {
    let served = served();
    let mut host = Host::of(&served);
    assert_eq!(host.disk.geometry().size_bytes, IMAGE_BYTES as u64);
    for (offset, len) in [
        (0, 512),
        (512, 16 << 10),
        (4096, 300_032),
        (512, 3 << 20),
        (IMAGE_BYTES - 512, 512),
    ] {
        host.reads(offset, len);
    }
    served.with(|state| state.fragment_bytes = Some(1000));
    host.reads(1024, 200_192);
    served.with(|state| (state.fragment_bytes, state.bytes_max) = (None, 5000));
    host.reads(1024, 65_536);
    assert_eq!(host.reconnects(), 0);
}

#[test]
fn as_many_reads_are_under_way_as_were_asked_for() {
    let served = served();
    let mut host = Host::of(&served);
    served.with(|state| state.is_held = true);
    let mut memories = vec![vec![0xee_u8; 32 << 10]; 64];
    for (number, memory) in memories.iter_mut().enumerate() {
        host.start(number << 15, memory);
    }
    let begun = Instant::now();
    while served.with(|state| state.held) < 64 {
        assert!(host.round(Instant::now() + Duration::from_millis(20)).is_none());
        assert!(begun.elapsed() < Duration::from_secs(10));
    }
    served.with(|state| state.is_held = false);
    for _ in 0..memories.len() {
        assert_eq!(host.completion().outcome, Ok(()));
    }
    for (number, memory) in memories.iter().enumerate() {
        check(number << 15, memory);
    }
}

#[test]
fn a_connection_that_breaks_in_the_middle_of_an_answer_is_followed_by_another_and_nothing_is_lost() {
    let served = served();
    let mut host = Host::of(&served);
    for (reconnects, cut_after) in (1..).zip([0, 3, 60, 130, 20_000, 100_000]) {
        served.with(|state| state.cut_after = Some(cut_after));
        host.reads(4096, 200_192);
        assert_eq!(host.reconnects(), reconnects, "cut after {cut_after}");
    }
}

#[test]
fn a_server_that_is_silent_is_given_up_and_asked_on_another_connection() {
    let served = served();
    let mut host = Host::of(&served);
    served.with(|state| state.mute_connections = 1);
    let begun = Instant::now();
    host.reads(0, 4096);
    assert_eq!(host.reconnects(), 1);
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
}

#[test]
fn a_server_that_only_takes_long_keeps_its_connection() {
    let served = served();
    let mut host = Host::of(&served);
    served.with(|state| state.is_held = true);
    let mut memory = vec![0xee; 4096];
    host.start(0, &mut memory);
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(5) {
        assert!(host.round(Instant::now() + Duration::from_millis(500)).is_none());
    }
    served.with(|state| state.is_held = false);
    assert_eq!(host.completion().outcome, Ok(()));
    check(0, &memory);
    assert_eq!(host.reconnects(), 0);
    assert!(
        served.with(|state| state.nulls) > 0,
        "it was never asked for a sign of life"
    );
}

#[test]
fn a_read_that_is_put_off_is_sent_again() {
    let served = served();
    let mut host = Host::of(&served);
    served.with(|state| state.put_off = 3);
    host.reads(0, 4096);
    assert_eq!(host.disk.session().unwrap().retries.count(), 3);
    assert_eq!(host.reconnects(), 0);
}

#[test]
fn a_file_that_was_replaced_is_waited_for_or_reported_and_never_read() {
    let served = served();
    for become_another in [
        |state: &mut State| state.is_stale = true,
        |state: &mut State| {
            // Its handle leads to another file, as some servers have it.
            (state.fileid, state.cut_after) = (8, Some(0));
        },
    ] {
        let mut host = Host::reporting(&served, Duration::from_millis(500));
        served.with(become_another);
        let mut memory = vec![0xee; 4096];
        host.start(0, &mut memory);
        assert_eq!(host.completion().outcome, Err(Failure::Host(libc::ETIMEDOUT)));
        assert!(memory.iter().all(|byte| *byte == 0xee));
        served.with(|state| (state.is_stale, state.fileid) = (false, 7));
        host.reads(0, 4096);
    }
}

#[test]
fn an_idle_disk_wants_nothing_and_leaves_and_moves_and_ends_as_it_is_told() {
    let served = served();
    let mut host = Host::of(&served);
    host.reads(0, 4096);
    let calls = served.with(|state| state.calls);
    assert_eq!(host.disk.alarm(), None);
    host.parts(Parting::Moves);
    let mut host = Host::using(host.disk);
    host.reads(8192, 4096);
    assert_eq!(host.reconnects(), 0, "it went on with its connection");
    assert_eq!(served.with(|state| state.calls), calls + 1);
    host.parts(Parting::Ends);
    let mut host = Host::using(host.disk);
    host.reads(8192, 4096);
    assert_eq!(host.reconnects(), 1);
    host.parts(Parting::Breaks);
    assert_eq!(host.disk.in_flight(), 0);
}

#[test]
fn an_image_is_not_written_and_shared_only_on_its_users_word() {
    let served = served();
    let url = url(&served);
    let owner = Owner::of_this_process("vm");
    for terms in [Lock::Exclusive, Lock::None].map(|lock| Terms::new(lock, &owner)) {
        let error = nfs::open(&url, Access::ReadWrite, &terms).err().unwrap();
        assert!(matches!(error, NfsError::Unfenced), "{error}");
        assert!(nfs::check(&url, Access::ReadWrite, terms.lock).is_err());
    }
    let error = opened(&url, Access::ReadOnly, Lock::Shared).err().unwrap();
    assert!(matches!(error, NfsError::NotProtected), "{error}");
    assert!(nfs::check(&url, Access::ReadOnly, Lock::Shared).is_err());
    let url = format!("{url}&base_immutable=true");
    nfs::check(&url, Access::ReadOnly, Lock::Shared).unwrap();
    let mut host = Host::using(opened(&url, Access::ReadOnly, Lock::Shared).unwrap().disk);
    host.reads(0, 512);
}

#[test]
fn what_is_missing_and_what_is_refused_is_said() {
    let served = served();
    let url = url(&served);
    let error = refused(&url.replace("base.raw", "other.raw")).to_string();
    assert!(error.contains("no image `other.raw` in /srv/golden"), "{error}");
    let error = refused(&url.replace("golden", "silver")).to_string();
    assert!(error.contains("no `silver` in /srv"), "{error}");
    let error = refused(&url.replace("/base.raw", "")).to_string();
    assert!(
        error.contains("`/srv/golden` on the server is a directory"),
        "{error}"
    );
    served.with(|state| state.is_unreadable = true);
    let error = refused(&url).to_string();
    assert!(
        error.contains("no permission to read `/srv/golden/base.raw`"),
        "{error}"
    );
    served.with(|state| state.is_mount_refused = true);
    let error = refused(&url).to_string();
    assert!(
        error.contains("mount `/srv` (MNT3ERR_ACCES)") && error.contains("insecure"),
        "{error}"
    );
    served.with(|state| state.exports = vec!["/home", "/opt"]);
    let error = refused(&url).to_string();
    assert!(error.contains("it exports /home, /opt"), "{error}");
    let nobody = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let port = format!("mountport={}", nobody.port());
    let url = url.replace(&format!("mountport={}", served.address().port()), &port);
    assert!(matches!(refused(&url), NfsError::Server { server, .. } if server == nobody));
}

#[test]
fn an_export_that_the_server_keeps_to_itself_is_found() {
    let served = served();
    served.with(|state| (state.exports, state.is_secretive) = (vec!["/srv"], true));
    Host::of(&served).reads(0, 512);
}

/// What a portmapper tells.
fn ports(served: &Served, port: Option<u16>) -> Result<Ports, NfsError> {
    let (user, credential) = nfs::open::caller(&url(served).parse().unwrap());
    let plan = Arc::new(Plan {
        name: url(served),
        servers: vec![served.address()],
        port,
        mount_port: None,
        path: url(served).parse::<nfs::NfsUrl>().unwrap().image.path,
        user,
        credential: Arc::new(credential),
        report_after: None,
    });
    let io = dialogue::plain();
    let client = Client::new(served.address(), Arc::clone(&plan.credential), io.now());
    let mut dialogue = Dialogue::new(io, client, vec![served.address()], Duration::from_secs(5)).unwrap();
    dialogue.run(|port| locate::ports(port, Arc::clone(&plan)))
}

#[test]
fn the_portmapper_is_asked_for_the_ports_that_were_not_said() {
    let served = served();
    served.with(|state| state.ports = vec![(100_003, 2049), (100_005, 20_048)]);
    let found = Ports {
        nfs: 2049,
        mount: 20_048,
    };
    assert_eq!(ports(&served, None).unwrap(), found);
    assert_eq!(ports(&served, Some(7)).unwrap(), Ports { nfs: 7, ..found });
    served.with(|state| state.ports = vec![(100_005, 20_048)]);
    let error = ports(&served, None).unwrap_err();
    assert!(
        matches!(error, NfsError::NotRegistered { program: "NFSv3" }),
        "{error}"
    );
    assert!(ports(&served, Some(7)).is_ok());
}
