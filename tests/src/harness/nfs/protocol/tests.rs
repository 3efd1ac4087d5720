//! The proxy hits a session exactly at a step, and plays a power failure that takes what was not committed.
#![expect(
    clippy::indexing_slicing,
    reason = "messages and images are built and looked at by offsets; one that is wrong fails the test"
)]

use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use super::super::server::{Plan, Server, url};
use super::*;
use crate::harness::nfs::second_client;
use crate::harness::proxy::{Fault, Proxy, Then, Trap};
use crate::seed::Seed;
use client::{Client, OK, commit_operation};

mod client;
mod volatile;

const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const SOON: Duration = Duration::from_secs(5);
const IMAGE: &str = "export/image.raw";

fn server() -> Server {
    Server::start(Plan::image(1 << 20)).expect("ganesha is there: tests/tools/need ganesha.nfsd ganesha-vfs")
}

fn knowing(server: &Server) -> Proxy {
    Proxy::knowing(HERE, server.address(), Seed::from(1), Nfs::default()).expect("a free port")
}

fn image(server: &Server) -> Vec<u8> {
    std::fs::read(server.path(IMAGE)).expect("it is there")
}

/// Lays a trap in the way of answers.
fn lay(proxy: &Proxy, direction: Direction, step: Step, then: Then) {
    let trap = Trap {
        direction,
        step,
        then,
    };
    proxy.lay(trap).expect("it runs");
}

/// Sends what belongs to a step.
fn send_step(client: &mut Client, step: Step) {
    let operation = match step {
        Step::Idle => return client.send(&[], 0),
        Step::Read => client.read_operation(0, 512),
        Step::Write => client.write_operation(0, &[5; 512], 0),
        Step::Flush => commit_operation(),
        Step::Unmap => client.deallocate_operation(8192, 4096),
        Step::Reservation => client.lock_operation(),
        _ => unreachable!("it is no call of one that is open"),
    };
    client.send_on_file(&operation);
}

/// Where an answer names its session: behind its header, status, tag, count, and the number and status of SEQUENCE. What
/// follows is the sequence.
const SESSION: std::ops::Range<usize> = 44..60;

const CALLS: [Step; 6] = [
    Step::Idle,
    Step::Read,
    Step::Write,
    Step::Flush,
    Step::Unmap,
    Step::Reservation,
];

#[test]
fn messages_pass_unchanged_without_a_trap_in_one_fragment_and_in_two() {
    let server = server();
    let proxy = knowing(&server);
    let mut client = Client::begin(proxy.address(), "one");
    let content: Vec<u8> = (0..=255).cycle().take(128 << 10).collect();
    client.write(4096, &content);
    client.commit();
    assert_eq!(client.read(4096, 128 << 10), content);
    assert_eq!(client.renew_in_fragments().status, OK);
    assert_eq!(image(&server)[4096..][..content.len()], content);
    let read = second_client::read(&url(proxy.address(), IMAGE)).expect("it reads beside a writer");
    assert_eq!(read, image(&server));
}

#[test]
fn a_trap_holds_exactly_the_message_of_its_step() {
    let server = server();
    let proxy = knowing(&server);
    for (number, trapped) in CALLS.into_iter().enumerate() {
        for direction in [Direction::ToServer, Direction::ToClient] {
            let mut client = Client::begin(proxy.address(), "one");
            lay(&proxy, direction, trapped, Then::Fault(Fault::BlackHole));
            for step in CALLS.into_iter().filter(|step| *step != trapped) {
                send_step(&mut client, step);
                assert_eq!(client.finish().status, OK, "{step:?} passes");
            }
            assert!(proxy.wait_sprung(Duration::ZERO).is_err(), "sprung too early");
            send_step(&mut client, trapped);
            proxy.wait_sprung(SOON).expect("it is sprung");
            assert!(proxy.held_bytes(direction).expect("it runs") >= 28);
            proxy.set(direction, Fault::None).expect("it runs");
            assert_eq!(client.finish().status, OK, "{trapped:?} {direction:?} {number}");
        }
    }
}

#[test]
fn a_write_that_is_to_be_safe_at_once_is_no_step() {
    let server = server();
    let proxy = knowing(&server);
    let mut client = Client::begin(proxy.address(), "one");
    lay(&proxy, Direction::ToServer, Step::Write, Then::Cut);
    let stable = client.write_operation(0, &[1; 512], 2);
    assert_eq!(client.on_file(&stable).status, OK);
    assert!(proxy.wait_sprung(Duration::ZERO).is_err());
}

#[test]
fn a_trap_finds_how_a_client_begins_and_comes_back() {
    let mut server = server();
    let proxy = knowing(&server);
    let hole = |step| {
        lay(&proxy, Direction::ToClient, step, Then::Fault(Fault::BlackHole));
    };
    let free = || {
        proxy.wait_sprung(SOON).expect("it comes to that");
        proxy.set(Direction::ToClient, Fault::None).expect("it runs");
    };
    for step in [Step::ClientId, Step::Login, Step::Open] {
        hole(step);
        std::thread::scope(|scope| {
            let begin = scope.spawn(|| Client::begin(proxy.address(), "one"));
            free();
            begin.join().expect("it begins");
        });
    }
    let mut client = Client::begin(proxy.address(), "one");
    proxy.cut().expect("it runs");
    assert!(client.receive().is_err());
    hole(Step::Connect);
    client.connect_again(proxy.address());
    client.send(&[], 0);
    free();
    assert_eq!(client.finish().status, OK);
    server.kill().expect("it lives");
    server.restart().expect("its port is its own");
    hole(Step::Reclaim);
    client.connect_again(proxy.address());
    client.make_session();
    std::thread::scope(|scope| {
        let reclaim = scope.spawn(|| client.reclaim().status);
        free();
        assert_eq!(reclaim.join().expect("no panic"), OK, "{}", server.log());
    });
}

#[test]
fn each_damage_is_where_it_was_asked_for_and_nowhere_else() {
    let server = server();
    let proxy = knowing(&server);
    let read = |damage: Option<Damage>| {
        let mut client = Client::begin(proxy.address(), "one");
        if let Some(damage) = damage {
            lay(&proxy, Direction::ToClient, Step::Read, Then::Damage(damage));
        }
        send_step(&mut client, Step::Read);
        let answer = client.receive();
        proxy.wait_sprung(SOON).expect("it is sprung");
        answer
    };
    let right = read(None).expect("an answer");
    let wrong = |damage| {
        let answer = read(Some(damage)).expect("an answer that is whole");
        // Each client has a session of its own.
        let is_other =
            |(at, pair): (usize, (&u8, &u8))| (pair.0 != pair.1 && !SESSION.contains(&at)).then_some(at);
        let places: Vec<usize> = answer
            .iter()
            .zip(&right)
            .enumerate()
            .filter_map(is_other)
            .collect();
        (answer.len(), places)
    };
    let length = right.len();
    assert!(length > SESSION.end + 4);
    assert_eq!(wrong(Damage::Tag), (length, vec![0, 1, 2, 3]));
    assert_eq!(wrong(Damage::Verdict), (length, vec![23]));
    assert_eq!(wrong(Damage::Number), (length, vec![SESSION.end + 3]));
    let (truncated, _) = wrong(Damage::Truncated);
    assert_eq!(truncated, length / 8 * 4);
    let error = read(Some(Damage::Oversized)).expect_err("2 GiB never come");
    assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
    // NFS has no sums: the trap waits on for a message that has one.
    let mut client = Client::begin(proxy.address(), "one");
    lay(
        &proxy,
        Direction::ToClient,
        Step::Read,
        Then::Damage(Damage::DataSum),
    );
    assert_eq!(client.read(0, 512).len(), 512);
    assert!(proxy.wait_sprung(Duration::ZERO).is_err());
}

#[test]
fn an_answer_comes_twice_and_a_connection_ends_inside_one() {
    let server = server();
    let proxy = knowing(&server);
    let mut client = Client::begin(proxy.address(), "one");
    lay(&proxy, Direction::ToClient, Step::Read, Then::Twice);
    send_step(&mut client, Step::Read);
    let [first, second] = [0; 2].map(|_| client.receive().expect("an answer"));
    assert_eq!(first, second);
    lay(&proxy, Direction::ToClient, Step::Read, Then::CloseInside);
    send_step(&mut client, Step::Read);
    let start = Instant::now();
    assert!(client.receive().is_err(), "half a message");
    assert!(start.elapsed() < SOON, "it waits for the rest");
}

#[test]
fn no_message_is_so_wrong_that_the_proxy_stumbles_over_it() {
    let server = server();
    let mut client = Client::begin(server.address(), "one");
    let operations = [
        client.write_operation(u64::MAX - 100, &[3; 700], 0),
        client.write_operation(0, &[3; 700], 2),
        client.read_operation(0, 512),
        client.lock_operation(),
        client.deallocate_operation(0, 512),
        commit_operation(),
    ];
    let start = [client.sequence_operation(1, 0), client.put_handle()].concat();
    let call = client.message(&[start, operations.concat()].concat(), 8);
    send_step(&mut client, Step::Read);
    let answer = client.receive().expect("an answer");
    let mut nfs = Nfs::over(&server.path("export"));
    let mut seed = Seed::from(1);
    for _ in 0..20_000 {
        let mut content = if seed.below(2) == 0 {
            call.clone()
        } else {
            answer.clone()
        };
        for _ in 0..seed.below(4) {
            let at = usize::try_from(seed.below(content.len() as u64)).expect("short");
            content[at] = u8::try_from(seed.below(256)).expect("a byte");
        }
        let length = seed.below(2 * content.len() as u64);
        content.truncate(usize::try_from(length).expect("short"));
        let message = sealed(&content);
        for direction in [Direction::ToServer, Direction::ToClient] {
            nfs.step(direction, &message);
            nfs.note(direction, &message);
            nfs.damaged(direction, &message, Damage::Number);
            nfs.damaged(direction, &message, Damage::Verdict);
        }
        nfs.tag(&message);
        assert_eq!(nfs.to_server(message.clone()), message);
        assert_eq!(nfs.to_client(message.clone()).len(), message.len());
    }
    nfs.crash();
}

#[test]
fn a_call_of_the_server_is_no_answer_to_the_clients_of_the_same_number() {
    let words = |words: &[u32]| {
        let content: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
        sealed(&content)
    };
    let mut nfs = Nfs::default();
    // NULL calls of NFS, and an answer; then a callback of the same transaction.
    for _ in 0..2 {
        let call = words(&[7, 0, 2, 100_003, 4, 0, 0, 0, 0, 0]);
        nfs.note(Direction::ToServer, &call);
        let answer = words(&[7, 1, 0, 0, 0, 0]);
        let callback = words(&[7, 0, 2, 0x4000_0000, 1, 0, 0, 0, 0, 0]);
        assert_eq!(nfs.tag(&call), nfs.tag(&answer));
        assert_ne!(nfs.tag(&callback), nfs.tag(&answer));
        let step = nfs.step(Direction::ToClient, &answer);
        assert!(matches!(step, Some(Step::Connect | Step::Idle)), "{step:?}");
        assert_eq!(nfs.step(Direction::ToClient, &callback), None);
        nfs.note(Direction::ToClient, &callback);
        assert_eq!(
            nfs.step(Direction::ToClient, &answer),
            step,
            "it is still unanswered"
        );
        nfs.note(Direction::ToClient, &answer);
        assert_eq!(nfs.step(Direction::ToClient, &answer), None);
    }
}
