//! Both sides, over connections of this host.

use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use coracle_devices::virtio::device::Notice;
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::super::door::Door;
use super::super::join::Token;
use super::super::tls::testing::Authority;
use super::super::tls::{Identity, TlsFiles};
use super::filling::Filling;
use super::pages_of;
use super::source::{Keeper, Line, Remainder};
use super::target::{Fetcher, Prepared};
use crate::end::{End, Ending};
use crate::memory::pager::Remains;
use crate::memory::testing::{touch, waits};
use crate::memory::{Backing, PageSize, allocate};
use crate::snapshot::memory::{PAGE_BYTES, PageSet};

const LIMIT: Duration = Duration::from_secs(10);
const MIB: u64 = 8;
const PAGES: u64 = MIB << 8;

/// A memory of which each page but every third has its number.
fn numbered() -> Arc<GuestMemoryMmap> {
    let memory = allocate(MIB, Backing::Anonymous, PageSize::Base).unwrap();
    for page in (0..PAGES).filter(|page| page % 3 != 0) {
        memory.write_obj(page + 1, at(page)).unwrap();
    }
    memory
}

fn at(page: u64) -> GuestAddress {
    GuestAddress(page * PAGE_BYTES as u64)
}

struct Hosts {
    _directory: TempDir,
    tls: TlsFiles,
    ending: Ending,
}

impl Hosts {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let authority = Authority::new();
        Self {
            tls: authority.host("127.0.0.1", &authority, directory.path()),
            _directory: directory,
            ending: Ending::new().unwrap(),
        }
    }

    fn fetcher(&self, memory: &GuestMemoryMmap, absent: PageSet, token: Token, wait: Duration) -> Fetcher {
        let door = Door {
            listener: TcpListener::bind("127.0.0.1:0").unwrap(),
            identity: Arc::new(Identity::read(&self.tls).unwrap()),
            from: None,
        };
        Fetcher::start(Prepared {
            filling: Filling::guard(memory, absent).unwrap(),
            door: Arc::new(door),
            token,
            wait,
            ending: self.ending.clone(),
        })
        .unwrap()
    }

    fn line(&self, to: &str) -> Line {
        Line {
            to: to.to_owned(),
            name: None,
            tls: self.tls.clone(),
        }
    }

    fn keeper(&self, memory: &Arc<GuestMemoryMmap>, to: &str, token: Token, slow: Option<u64>) -> Keeper {
        let remainder = Remainder {
            memory: Arc::clone(memory),
            line: self.line(to),
            token,
            bandwidth_limit: slow.map(|bytes| bytes.try_into().unwrap()),
            wait: LIMIT,
            notice: Notice::default(),
        };
        Keeper::start(remainder, PAGES).unwrap()
    }
}

fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let limit = Instant::now() + LIMIT;
    while !is_so() {
        assert!(Instant::now() < limit, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn is_the_same(from: &GuestMemoryMmap, to: &GuestMemoryMmap) {
    for page in 0..PAGES {
        let read = |memory: &GuestMemoryMmap| memory.read_obj::<u64>(at(page)).unwrap();
        assert_eq!(read(from), read(to), "page {page}");
    }
}

#[test]
fn a_memory_is_fetched_and_what_is_waited_for_comes_first() {
    let hosts = Hosts::new();
    let (from, to) = (
        numbered(),
        allocate(MIB, Backing::Anonymous, PageSize::Base).unwrap(),
    );
    let token = Token::random().unwrap();
    let fetcher = hosts.fetcher(&to, PageSet::full(MIB << 20), token, LIMIT);
    let touched = touch(&to, 1999 * PAGE_BYTES);
    assert!(waits(&touched));
    // So slow that all of it would take minutes.
    let listen = fetcher.listen().unwrap();
    let keeper = hosts.keeper(&from, &listen, token, Some(100_000));
    assert_eq!(touched.recv_timeout(LIMIT), Ok(2000_u64.to_le_bytes()[0]));
    assert!(fetcher.status().is_connected() && keeper.is_connected());
    assert!(fetcher.status().left_bytes() > 4 << 20);
    assert!(fetcher.give_up().is_err() && keeper.call_at(hosts.line(&listen)).is_err());
    drop(keeper);
    until("it is cut", || !fetcher.status().is_connected());
    let keeper = hosts.keeper(&from, &listen, token, None);
    until("it comes to an end", || {
        keeper.poll().is_some_and(|ended| ended.is_ok())
    });
    assert_eq!((fetcher.status().left_bytes(), keeper.left_bytes()), (0, 0));
    is_the_same(&from, &to);
    assert_eq!(fetcher.end(), Remains::Nothing);
    assert!(hosts.ending.announced().is_none());
}

#[test]
fn a_target_that_listens_elsewhere_is_found_there() {
    let hosts = Hosts::new();
    let (from, to) = (
        numbered(),
        allocate(MIB, Backing::Anonymous, PageSize::Base).unwrap(),
    );
    let token = Token::random().unwrap();
    let fetcher = hosts.fetcher(&to, PageSet::full(MIB << 20), token, LIMIT);
    let nowhere = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .to_string();
    let keeper = hosts.keeper(&from, &nowhere, token, None);
    fetcher
        .listen_at(TcpListener::bind("127.0.0.1:0").unwrap())
        .unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert!(!keeper.is_connected() && keeper.poll().is_none());
    keeper.call_at(hosts.line(&fetcher.listen().unwrap())).unwrap();
    until("it comes to an end", || {
        keeper.poll().is_some_and(|ended| ended.is_ok())
    });
    is_the_same(&from, &to);
}

#[test]
fn whoever_does_not_know_the_token_gets_nothing_and_brings_nothing() {
    let hosts = Hosts::new();
    let (from, to) = (
        numbered(),
        allocate(MIB, Backing::Anonymous, PageSize::Base).unwrap(),
    );
    let absent = pages_of(&to, &[(at(5), 1)]);
    let fetcher = hosts.fetcher(&to, absent, Token::random().unwrap(), LIMIT);
    let listen = fetcher.listen().unwrap();
    let _stranger = hosts.keeper(&from, &listen, Token::random().unwrap(), None);
    let _silent = TcpStream::connect(&listen).unwrap();
    std::thread::sleep(Duration::from_millis(500));
    assert!(!fetcher.status().is_connected());
    assert_eq!(fetcher.status().left_bytes(), PAGE_BYTES as u64);
}

#[test]
fn a_source_that_does_not_come_back_ends_the_guest_and_its_memory_is_never_zeros() {
    let hosts = Hosts::new();
    let to = allocate(MIB, Backing::Anonymous, PageSize::Base).unwrap();
    let absent = pages_of(&to, &[(at(5), 1)]);
    let fetcher = hosts.fetcher(&to, absent, Token::random().unwrap(), Duration::from_millis(300));
    let touched = touch(&to, 5 * PAGE_BYTES);
    until("it is given up", || hosts.ending.announced().is_some());
    let Some(End::MemoryLost { reason }) = hosts.ending.announced() else {
        panic!("{:?}", hosts.ending.announced());
    };
    assert!(reason.contains("it has not come back"), "{reason}");
    assert_eq!(fetcher.end(), Remains::Waiters);
    assert!(waits(&touched));
}

#[test]
fn a_guest_is_given_up_by_whoever_asks_and_no_later() {
    let hosts = Hosts::new();
    let to = allocate(MIB, Backing::Anonymous, PageSize::Base).unwrap();
    let absent = pages_of(&to, &[(at(5), 1)]);
    let fetcher = hosts.fetcher(&to, absent, Token::random().unwrap(), LIMIT * 10);
    fetcher.give_up().unwrap();
    until("it is given up", || hosts.ending.announced().is_some());
    assert_eq!(fetcher.end(), Remains::Nothing);
}

#[test]
fn a_source_waits_no_longer_than_it_is_to() {
    let hosts = Hosts::new();
    let nowhere = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .to_string();
    let remainder = Remainder {
        memory: numbered(),
        line: hosts.line(&nowhere),
        token: Token::random().unwrap(),
        bandwidth_limit: None,
        wait: Duration::from_millis(100),
        notice: Notice::default(),
    };
    let keeper = Keeper::start(remainder, PAGES).unwrap();
    let mut ended = None;
    until("it comes to an end", || {
        ended = keeper.poll();
        ended.is_some()
    });
    let error = ended.unwrap().unwrap_err().to_string();
    assert!(error.contains(&nowhere) && error.contains("8 MiB"), "{error}");
}
