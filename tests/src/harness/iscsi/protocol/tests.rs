//! The proxy plays a cache that loses what was not flushed, and hits a session exactly at a step.
#![expect(
    clippy::indexing_slicing,
    reason = "messages and images are built and looked at by offsets; one that is wrong fails the test"
)]

use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use super::super::pdu::{Digests, Pdu, field, seal};
use super::super::target::{Plan, Target};
use super::*;
use crate::harness::proxy::{Fault, Proxy, Then, Trap};
use crate::seed::Seed;
use initiator::{BLOCK_BYTES, CHECK_CONDITION, GOOD, Initiator, ten, write};

mod initiator;
mod volatile;

const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const SOON: Duration = Duration::from_secs(5);
const NONE: Digests = Digests {
    header: false,
    data: false,
};
const BOTH: Digests = Digests {
    header: true,
    data: true,
};

fn target() -> Target {
    let plan = Plan::disk(1 << 20).immediate_bytes(262_144);
    let plan = plan
        .key("HeaderDigest", "CRC32C,None")
        .key("DataDigest", "CRC32C,None");
    Target::start(plan).expect("tgtd is there: tests/tools/need tgtd")
}

fn knowing(target: &Target) -> Proxy {
    Proxy::knowing(HERE, target.address(), Seed::from(1), Iscsi::default()).expect("a free port")
}

fn image(target: &Target, block: u64, blocks: usize) -> Vec<u8> {
    let file = std::fs::File::open(target.image(1).expect("it has one")).expect("a file");
    let mut found = vec![0; blocks * BLOCK_BYTES];
    file.read_exact_at(&mut found, block * BLOCK_BYTES as u64)
        .expect("it is that long");
    found
}

/// A REGISTER AND IGNORE EXISTING KEY, and its parameters.
fn register(key: u8) -> ([u8; 10], [u8; 24]) {
    let mut parameters = [0; 24];
    parameters[15] = key;
    ([0x5f, 0x06, 0, 0, 0, 0, 0, 0, 24, 0], parameters)
}

/// An UNMAP of one block, and its parameters.
fn unmap(block: u8) -> ([u8; 10], [u8; 24]) {
    let mut parameters = [0; 24];
    (parameters[1], parameters[3], parameters[15], parameters[19]) = (22, 16, block, 1);
    ([0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0], parameters)
}

/// Sends what belongs to a step.
fn send_step(initiator: &mut Initiator, step: Step) {
    let data = [5; BLOCK_BYTES];
    match step {
        Step::Read => initiator.send(&ten(0x28, 1, 1), &[], BLOCK_BYTES),
        Step::Write => initiator.send(&write(1, &data), &data, 0),
        Step::Flush => initiator.send(&ten(0x35, 0, 0), &[], 0),
        Step::Unmap => {
            let (cdb, parameters) = unmap(3);
            initiator.send(&cdb, &parameters, 0);
        }
        Step::Reservation => {
            let (cdb, parameters) = register(9);
            initiator.send(&cdb, &parameters, 0);
        }
        _ => unreachable!("no command"),
    }
}

const COMMANDS: [Step; 5] = [
    Step::Read,
    Step::Write,
    Step::Flush,
    Step::Unmap,
    Step::Reservation,
];

#[test]
fn messages_pass_unchanged_without_a_trap_with_and_without_digests() {
    let target = target();
    let proxy = knowing(&target);
    for digests in [NONE, BOTH] {
        let mut initiator = Initiator::login(proxy.address(), digests);
        assert_eq!(initiator.write(8, &[7; 4096]).status, GOOD);
        let large: Vec<u8> = (0..=255).cycle().take(128 << 10).collect();
        assert_eq!(initiator.write(16, &large).status, GOOD);
        assert_eq!(initiator.read(16, 256).data, large);
        assert_eq!(initiator.read(8, 8).data, [7; 4096]);
    }
    assert_eq!(image(&target, 8, 8), [7; 4096]);
}

#[test]
fn a_trap_holds_exactly_the_message_of_its_step() {
    let target = target();
    let proxy = knowing(&target);
    for trapped in COMMANDS {
        for direction in [Direction::ToServer, Direction::ToClient] {
            let mut initiator = Initiator::login(proxy.address(), BOTH);
            let trap = Trap {
                direction,
                step: trapped,
                then: Then::Fault(Fault::BlackHole),
            };
            proxy.lay(trap).expect("it runs");
            for step in COMMANDS.into_iter().filter(|step| *step != trapped) {
                send_step(&mut initiator, step);
                assert_eq!(initiator.finish().status, GOOD, "{step:?} passes");
            }
            assert!(proxy.wait_sprung(Duration::ZERO).is_err(), "sprung too early");
            send_step(&mut initiator, trapped);
            proxy.wait_sprung(SOON).expect("it is sprung");
            assert!(proxy.held_bytes(direction).expect("it runs") >= 48);
            proxy.set(direction, Fault::None).expect("it runs");
            assert_eq!(initiator.finish().status, GOOD, "{trapped:?} {direction:?}");
        }
    }
}

#[test]
fn a_trap_finds_a_login_and_an_idle_session() {
    let target = Target::start(Plan::disk(1 << 20).key("nop_interval", "1").key("nop_count", "9"));
    let target = target.expect("tgtd is there");
    let proxy = knowing(&target);
    let hole = |step| Trap {
        direction: Direction::ToClient,
        step,
        then: Then::Fault(Fault::BlackHole),
    };
    proxy.lay(hole(Step::Login)).expect("it runs");
    let mut initiator = std::thread::scope(|scope| {
        let login = scope.spawn(|| Initiator::login(proxy.address(), NONE));
        proxy.wait_sprung(SOON).expect("it logs in");
        assert!(!login.is_finished());
        proxy.set(Direction::ToClient, Fault::None).expect("it runs");
        login.join().expect("it logs in")
    });
    proxy.lay(hole(Step::Idle)).expect("it runs");
    assert_eq!(initiator.read(0, 1).status, GOOD, "a read is not idle");
    proxy
        .wait_sprung(SOON)
        .expect("the target asks whether we are there");
}

#[test]
fn each_damage_is_where_it_was_asked_for_and_nowhere_else() {
    let target = target();
    let proxy = knowing(&target);
    let read = |damage| {
        let mut initiator = Initiator::login(proxy.address(), BOTH);
        let trap = Trap {
            direction: Direction::ToClient,
            step: Step::Read,
            then: Then::Damage(damage),
        };
        proxy.lay(trap).expect("it runs");
        initiator.send(&ten(0x28, 0, 8), &[], 4096);
        let answer = initiator.receive_any();
        proxy.wait_sprung(SOON).expect("it is sprung");
        answer
    };
    let sums_fit = |answer: &[u8]| {
        let mut sealed = answer.to_vec();
        seal(&mut sealed, BOTH);
        sealed == answer
    };
    let whole = |damage| read(damage).expect("an answer that is whole");
    for damage in [Damage::Data, Damage::HeaderSum, Damage::DataSum] {
        let answer = whole(damage);
        assert!(!sums_fit(&answer), "{damage:?}");
        assert_eq!(Pdu(&answer).data_bytes(), 4096, "{damage:?}");
    }
    let answer = whole(Damage::Data);
    let wrong = Pdu(&answer).data(BOTH).iter().filter(|byte| **byte != 0);
    assert_eq!(wrong.copied().collect::<Vec<u8>>(), [0x10]);
    let answer = whole(Damage::Truncated);
    assert!(sums_fit(&answer));
    assert_eq!(Pdu(&answer).data_bytes(), 2048);
    let answer = whole(Damage::Tag);
    assert!(sums_fit(&answer));
    assert_eq!(Pdu(&answer).field(field::TAG), 2 ^ 0x5a5a_5a5a);
    let (answer, other) = (whole(Damage::Number), whole(Damage::Tag));
    assert!(sums_fit(&answer));
    let number = |answer: &[u8]| Pdu(answer).field(field::STATUS_NUMBER);
    assert_eq!(number(&answer).wrapping_sub(number(&other)), 17);
    let error = read(Damage::Oversized).expect_err("16 MiB never come");
    assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
}

#[test]
fn answers_come_twice_or_in_another_order() {
    let target = target();
    let proxy = knowing(&target);
    let tags = |then, commands: u32| {
        let mut initiator = Initiator::login(proxy.address(), NONE);
        let (direction, step) = (Direction::ToClient, Step::Read);
        proxy
            .lay(Trap {
                direction,
                step,
                then,
            })
            .expect("it runs");
        for _ in 0..commands {
            initiator.send(&ten(0x28, 0, 1), &[], BLOCK_BYTES);
        }
        let tag = |answer: Vec<u8>| Pdu(&answer).field(field::TAG);
        [0; 2].map(|_| tag(initiator.receive_any().expect("an answer")))
    };
    assert_eq!(tags(Then::Twice, 1), [2, 2]);
    let [first, second] = tags(Then::Swap, 2);
    // The target may answer reads in any order, so only that both come is sure; that they are swapped, StatSN shows.
    assert_eq!(first + second, 5);
    let mut initiator = Initiator::login(proxy.address(), NONE);
    let (direction, step) = (Direction::ToClient, Step::Read);
    let then = Then::Swap;
    proxy
        .lay(Trap {
            direction,
            step,
            then,
        })
        .expect("it runs");
    initiator.send(&ten(0x28, 0, 1), &[], BLOCK_BYTES);
    initiator.send(&ten(0x28, 0, 1), &[], BLOCK_BYTES);
    let number = |answer: Vec<u8>| Pdu(&answer).field(field::STATUS_NUMBER);
    let numbers = [0; 2].map(|_| number(initiator.receive_any().expect("an answer")));
    assert_eq!(numbers[0], numbers[1] + 1);
}

#[test]
fn a_connection_ends_inside_a_message() {
    let target = target();
    let proxy = knowing(&target);
    let mut initiator = Initiator::login(proxy.address(), NONE);
    let (direction, step, then) = (Direction::ToClient, Step::Read, Then::CloseInside);
    proxy
        .lay(Trap {
            direction,
            step,
            then,
        })
        .expect("it runs");
    initiator.send(&ten(0x28, 0, 8), &[], 4096);
    let start = Instant::now();
    assert!(initiator.receive_any().is_err(), "half a message");
    assert!(start.elapsed() < SOON, "it waits for the rest");
    assert_eq!(Initiator::login(proxy.address(), NONE).read(0, 8).status, GOOD);
}
