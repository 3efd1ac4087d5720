//! The life of one disk: it is opened, used, crashed and opened again, several times over.

use coracle_storage::reactor::Patience;
use coracle_storage::request::{Durability, Operation};
use coracle_storage::sim::dice::Dice;
use coracle_storage::sim::image::{self, Kind};
use coracle_storage::sim::medium::Medium;
use coracle_storage::sim::reactor::{Faults, SimReactor};

use crate::lane::{Excuse, Guest, Lane};
use crate::workload::{Wish, Workload};

/// Runs what `seed` says, and panics when an image breaks a promise.
pub(crate) fn simulate(kind: &Kind, seed: u64) {
    let mut dice = Dice::new(seed);
    let medium = Medium::default();
    let content = (kind.create)(&medium, &mut dice);
    let faults = Faults::draw(&mut dice);
    let mut guest = Guest::new(&content, Excuse::Host(faults));
    for _ in 0..1 + dice.below(3) {
        let mut lanes = open(kind, &medium, &faults, &mut dice);
        use_up(&mut lanes, &mut guest, &mut dice);
        if dice.one_in(2) {
            settle(&mut lanes, &mut guest, &mut dice);
        }
        drop(lanes);
        medium.crash(&mut dice);
        let left = left_by_a_crash(kind, &medium, &faults, &mut dice);
        let verdict = guest.oracle.has_crashed(&left);
        verdict.unwrap_or_else(|violation| panic!("{violation}"));
    }
    guest.graveyard.check();
}

/// The image in service, on one thread or, if it can be forked, on two.
fn open(kind: &Kind, medium: &Medium, faults: &Faults, dice: &mut Dice) -> Vec<Lane> {
    let image = (kind.open)(medium);
    let fork = image.fork().filter(|_| dice.one_in(3));
    let images = [Some(image), fork].into_iter().flatten();
    images
        .map(|image| {
            let ops_max = dice.pick(&[1, 2, 8, 64]);
            Lane::new(image, SimReactor::new(medium, ops_max, *faults, dice.split()))
        })
        .collect()
}

/// Steps in one life at most.
const STEPS_MAX: u64 = 250;

/// Asks this and that, up to a random moment.
fn use_up(lanes: &mut [Lane], guest: &mut Guest, dice: &mut Dice) {
    let workload = Workload::draw(dice);
    for _ in 0..dice.below(STEPS_MAX) {
        let outstanding: usize = lanes.iter().map(Lane::outstanding).sum();
        let is_growing = lanes.iter().any(Lane::is_growing);
        let lane = dice.index(lanes.len());
        let lane = &mut lanes[lane];
        if outstanding < workload.depth && lane.has_room() && dice.below(8) < 5 {
            let wish = workload.wish(guest.oracle.size_bytes(), dice);
            match wish.operation {
                // A device resizes its disk once at a time.
                Operation::Grow if is_growing => lane.ask_beyond_the_end(guest),
                _ => lane.ask(wish, guest, dice),
            }
        } else {
            let patience = dice.pick(&[Patience::None, Patience::UntilEvent]);
            lane.go_on(patience, guest);
        }
        check_size(lanes, guest);
    }
}

/// Ends what has begun; often a flush comes last.
fn settle(lanes: &mut [Lane], guest: &mut Guest, dice: &mut Dice) {
    for lane in &mut *lanes {
        lane.drain(guest);
    }
    check_size(lanes, guest);
    if dice.one_in(2) {
        let lane = dice.index(lanes.len());
        let lane = &mut lanes[lane];
        lane.ask(FLUSH, guest, dice);
        lane.drain(guest);
    }
}

pub(crate) const FLUSH: Wish = Wish {
    operation: Operation::Flush,
    offset_bytes: 0,
    len_bytes: 0,
    durability: Durability::Cached,
};

/// Asked of a disk that has nothing else to do.
pub(crate) const RAISE: Wish = Wish {
    operation: Operation::Raise,
    ..FLUSH
};

pub(crate) fn check_size(lanes: &[Lane], guest: &Guest) {
    if lanes.iter().any(Lane::is_growing) {
        return;
    }
    for lane in lanes {
        assert_eq!(
            lane.image.geometry().size_bytes,
            guest.oracle.size_bytes(),
            "the image has another size than the guest was told"
        );
    }
}

/// What the image holds when it is opened again, read on a host that behaves.
fn left_by_a_crash(kind: &Kind, medium: &Medium, faults: &Faults, dice: &mut Dice) -> Vec<u8> {
    let sound = Faults {
        refuses_holes: faults.refuses_holes,
        refuses_zeroing: faults.refuses_zeroing,
        ..Faults::default()
    };
    let io = SimReactor::new(medium, 8, sound, dice.split());
    image::content((kind.open)(medium).as_mut(), io)
}
