//! The life of one disk on a target: it is used while everything breaks, drained when nothing does, and taken away.

use std::time::Duration;

use coracle_storage::backend::Parting;
use coracle_storage::lease::Lock;
use coracle_storage::reactor::{Patience, Reactor};
use coracle_storage::request::{Durability, Operation};
use coracle_storage::sim::dice::Dice;
use coracle_storage::sim::initiator;
use coracle_storage::sim::oracle::Effect;
use coracle_storage::sim::reactor::Faults;

use super::site::{Means, Site, Tail, expected};
use crate::lane::{Excuse, Guest, Lane};
use crate::life::{FLUSH, RAISE, check_size};
use crate::passing::{RECOVERY_MAX, drain, step, wait};
use crate::workload::Workload;

/// Runs what `seed` says, and panics when the disk breaks a promise.
pub(crate) fn simulate(seed: u64) {
    let mut dice = Dice::new(seed);
    let content = fresh(&mut dice);
    let (lock, tail) = dice.pick(&[
        (Lock::Exclusive, Tail::Formatted),
        (Lock::Exclusive, Tail::Formatted),
        (Lock::Exclusive, Tail::None),
        (Lock::None, Tail::None),
    ]);
    let mut site = Site::new(&content, tail, &mut dice);
    let means = Means {
        timeout: dice
            .one_in(4)
            .then(|| Duration::from_millis(dice.pick(&[10, 1_000, 30_000]))),
        uncommitted_bytes_max: dice.pick(&[0, 1 << 20, 3 << 20, 32 << 20]),
    };
    let excuse = match means.timeout {
        Some(_) => Excuse::Timeout,
        None => Excuse::Nothing,
    };
    let mut guest = Guest::new(&content, excuse);
    let owner = initiator::owner("vm", &mut dice);
    let faults = Faults {
        short_one_in: dice.pick(&[0, 2, 20]),
        interrupted_one_in: dice.pick(&[0, 10, 50]),
        ..Faults::default()
    };
    let io = site.host(faults, &mut dice);
    let disk = expected(site.open(io.clone(), lock, &owner, means));
    assert_eq!(disk.geometry().size_bytes, site.guest_bytes);
    let mut lane = Lane::new(disk, io);
    for _ in 0..1 + dice.below(3) {
        if !dice.one_in(8) {
            site.rage();
        }
        use_up(&mut lane, &mut site, &mut guest, lock, &mut dice);
        site.calm();
        drain(&mut lane, &mut site, &mut guest);
        check_size(std::slice::from_ref(&lane), &guest);
        if dice.one_in(2) {
            lane.ask(FLUSH, &mut guest, &mut dice);
            drain(&mut lane, &mut site, &mut guest);
        }
        if dice.one_in(3) {
            raise(&mut lane, &mut site, &mut guest, lock, &mut dice);
        }
        if dice.one_in(3) {
            move_on(&mut lane, &mut site, &mut guest, &mut dice);
        }
        if dice.one_in(8) {
            rest(&mut lane, &mut site, &mut guest);
        }
        site.check();
    }
    if dice.one_in(2) {
        end(&mut lane, &mut site, &mut guest, &mut dice);
    }
    assert_eq!(lane.image.loss(), None, "nobody has taken the lease");
    lane.io.cut_off();
    drop(lane);
    let verdict = guest.oracle.has_crashed(&site.durable());
    verdict.unwrap_or_else(|violation| panic!("{violation}"));
    guest.graveyard.check();
    site.check();
}

/// Steps in one phase at most.
const STEPS_MAX: u64 = 700;

/// Asks this and that while things happen, up to a random moment.
fn use_up(lane: &mut Lane, site: &mut Site, guest: &mut Guest, lock: Lock, dice: &mut Dice) {
    let workload = Workload::draw(dice);
    let depth = workload.depth * dice.pick(&[1, 2]);
    let mishap_one_in = dice.pick(&[0, 20, 100, 500]);
    for _ in 0..dice.below(STEPS_MAX) {
        if dice.one_in(mishap_one_in) {
            site.mishap(lock, dice);
        }
        if lane.outstanding() < depth && dice.below(8) < 3 {
            let mut wish = workload.wish(guest.oracle.size_bytes(), dice);
            if wish.operation == Operation::Grow {
                if lane.is_growing() || site.has_tail() {
                    continue;
                }
                site.grow(wish.len_bytes);
            }
            if dice.one_in(60) && matches!(wish.operation, Operation::Read | Operation::Write) {
                wish.offset_bytes = 0;
                wish.len_bytes = guest.oracle.size_bytes();
            }
            lane.ask(wish, guest, dice);
        } else {
            let patience = dice.pick(&[Patience::None, Patience::UntilEvent]);
            step(lane, site, guest, patience);
        }
    }
}

/// The generation is raised, whatever happens on the way.
fn raise(lane: &mut Lane, site: &mut Site, guest: &mut Guest, lock: Lock, dice: &mut Dice) {
    let before = lane.generation();
    if dice.one_in(2) {
        site.rage();
    }
    lane.ask(RAISE, guest, dice);
    let mishap_one_in = dice.pick(&[0, 3, 10]);
    for _ in 0..dice.below(40) {
        if dice.one_in(mishap_one_in) {
            site.mishap(lock, dice);
        }
        step(lane, site, guest, Patience::UntilEvent);
    }
    site.calm();
    drain(lane, site, guest);
    let now = lane.generation();
    assert!(
        now == before || now == before + 1,
        "generation {before} was raised to {now}"
    );
}

/// The disk leaves its reactor, and goes on there or elsewhere.
fn move_on(lane: &mut Lane, site: &mut Site, guest: &mut Guest, dice: &mut Dice) {
    if dice.one_in(3) {
        site.rage();
    }
    let parting = dice.pick(&[Parting::Moves, Parting::Breaks]);
    leave(lane, site, guest, parting, dice);
    if dice.one_in(2) {
        lane.io = site.host(Faults::default(), dice);
    }
    let files = lane.image.files();
    lane.io.register(&files).unwrap();
    lane.attach();
}

/// The disk is given back in good order: everything that was acknowledged is on the medium.
fn end(lane: &mut Lane, site: &mut Site, guest: &mut Guest, dice: &mut Dice) {
    let flush = guest.oracle.begin(Effect::Flush, 0, 0);
    if dice.one_in(2) {
        site.rage();
        let disturbed = dice.below(60);
        lane.image.detach(Parting::Ends, &mut lane.io);
        for _ in 0..disturbed {
            if lane.image.is_attached() {
                step(lane, site, guest, Patience::UntilEvent);
            }
        }
        if dice.one_in(2) {
            site.hang_up();
        }
        site.calm();
    }
    leave(lane, site, guest, Parting::Ends, dice);
    guest.oracle.has_succeeded(flush, Durability::Cached);
    assert_eq!(
        site.target.held(super::site::LUN),
        None,
        "the reservation is left behind"
    );
}

fn leave(lane: &mut Lane, site: &mut Site, guest: &mut Guest, parting: Parting, dice: &mut Dice) {
    lane.image.detach(parting, &mut lane.io);
    let start = lane.now();
    let hurried_after = dice.below(10);
    let mut steps = 0;
    while lane.image.is_attached() {
        if steps == hurried_after && parting == Parting::Moves {
            lane.image.detach(Parting::Breaks, &mut lane.io);
        }
        steps += 1;
        if !lane.image.is_attached() {
            break;
        }
        step(lane, site, guest, Patience::UntilEvent);
        let time = lane.now() - start;
        assert!(time < RECOVERY_MAX, "a disk does not leave: {parting:?}");
    }
    assert_eq!(
        lane.io.in_flight(),
        0,
        "something of a disk that has left is in flight"
    );
    site.calm();
}

/// An idle disk sleeps.
fn rest(lane: &mut Lane, site: &mut Site, guest: &mut Guest) {
    // Until what was noticed late is settled.
    wait(lane, site, guest, RECOVERY_MAX);
    let waits = wait(lane, site, guest, Duration::from_secs(100));
    // A ping, its way and its answer, some of it in pieces, every five seconds.
    assert!(waits < 20 * 12 * 2, "an idle disk woke {waits} times in 100 s");
}

/// What the disk holds at first.
pub(crate) fn fresh(dice: &mut Dice) -> Vec<u8> {
    let pieces = match dice.below(40) {
        0 | 1 => 600,
        2..=10 => 1 + dice.below(4),
        _ => 4 + dice.below(40),
    };
    // A tail begins at a multiple of this.
    let len_bytes = usize::try_from(pieces * 4096).unwrap();
    match dice.below(3) {
        0 => vec![0; len_bytes],
        _ => (0..len_bytes / 8)
            .flat_map(|_| dice.draw().to_le_bytes())
            .collect(),
    }
}
