//! A target that does what none may do, and then is a proper one again.

use std::time::Duration;

use coracle_storage::lease::Lock;
use coracle_storage::reactor::Patience;
use coracle_storage::request::Operation;
use coracle_storage::sim::dice::Dice;
use coracle_storage::sim::initiator;
use coracle_storage::sim::reactor::Faults;
use coracle_storage::sim::target::options::Hostility;

use super::life::fresh;
use super::site::{Means, Site, Tail, expected};
use crate::lane::{Excuse, Guest, Lane};
use crate::life::FLUSH;
use crate::passing::{Surroundings, drain, wait};
use crate::workload::Workload;

/// Runs what `seed` says, and panics when the disk does, or is not whole again afterwards.
pub(crate) fn simulate(seed: u64) {
    let mut dice = Dice::new(seed);
    let content = fresh(&mut dice);
    let (lock, tail) = dice.pick(&[(Lock::None, Tail::None), (Lock::Exclusive, Tail::Formatted)]);
    let mut site = Site::new(&content, tail, &mut dice);
    let means = Means {
        timeout: None,
        uncommitted_bytes_max: dice.pick(&[1 << 20, 32 << 20]),
    };
    let owner = initiator::owner("vm", &mut dice);
    let io = site.host(Faults::default(), &mut dice);
    let disk = expected(site.open(io.clone(), lock, &owner, means));
    let mut lane = Lane::new(disk, io);
    let mut guest = Guest::new(&content, Excuse::Anything);
    let hostility = Hostility::draw(&mut dice);
    site.target.adjust(|options| options.hostility = hostility);
    work(&mut lane, &mut site, &mut guest, 600, &mut dice);
    // What is beyond repair is tried again, and not all the time.
    let waits = wait(&mut lane, &mut site, &mut guest, Duration::from_secs(60));
    assert!(waits < 60 * WAITS_MAX, "a disk woke {waits} times in 60 s");

    site.target
        .adjust(|options| options.hostility = Hostility::default());
    site.hang_up();
    if lane.image.loss().is_none() {
        drain(&mut lane, &mut site, &mut guest);
    }
    if lane.image.loss().is_some() {
        // It was told so; that is for good.
        assert_eq!(lock, Lock::Exclusive, "a disk without a lease has lost it");
        return;
    }
    lane.ask(FLUSH, &mut guest, &mut dice);
    drain(&mut lane, &mut site, &mut guest);
    let _provoked = site.target.complaints();
    let mut guest = Guest::new(&site.content(), Excuse::Nothing);
    work(&mut lane, &mut site, &mut guest, 200, &mut dice);
    drain(&mut lane, &mut site, &mut guest);
    lane.io.cut_off();
    let verdict = guest.oracle.has_crashed(&site.durable());
    verdict.unwrap_or_else(|violation| panic!("{violation}"));
    guest.graveyard.check();
    site.check();
}

/// The same of mistakes that each can be told from what is right: nothing wrong is ever believed, and the connection is left.
pub(crate) fn simulate_mistakes(seed: u64) {
    let mut dice = Dice::new(seed);
    let content = fresh(&mut dice);
    let mut site = Site::new(&content, Tail::None, &mut dice);
    let owner = initiator::owner("vm", &mut dice);
    let io = site.host(Faults::default(), &mut dice);
    let means = Means {
        timeout: None,
        uncommitted_bytes_max: 32 << 20,
    };
    let disk = expected(site.open(io.clone(), Lock::None, &owner, means));
    let mut lane = Lane::new(disk, io);
    let mut guest = Guest::new(&content, Excuse::Nothing);
    lane.ask(FLUSH, &mut guest, &mut dice);
    drain(&mut lane, &mut site, &mut guest);
    let session = lane.image.session().unwrap();
    let before = session.reconnects.count();
    let mut hostility = Hostility::default();
    let kind = dice.below(4);
    match kind {
        // Not so often that no session begins.
        0 => hostility.wrong_stat_sn_one_in = 150,
        1 => hostility.stray_data_one_in = 20,
        2 => hostility.duplicated_one_in = 20,
        _ => hostility.reordered_one_in = 20,
    }
    site.target.adjust(|options| options.hostility = hostility);
    work(&mut lane, &mut site, &mut guest, 600, &mut dice);
    if kind == 0 {
        site.target
            .adjust(|options| options.hostility.wrong_stat_sn_one_in = 1);
        lane.ask(FLUSH, &mut guest, &mut dice);
        wait(&mut lane, &mut site, &mut guest, Duration::from_secs(3));
        let reconnects = session.reconnects.count() - before;
        assert!(
            reconnects > 0 || lane.outstanding() > 0,
            "a status with a wrong number is taken for an answer"
        );
    }
    site.target
        .adjust(|options| options.hostility = Hostility::default());
    drain(&mut lane, &mut site, &mut guest);
    lane.ask(FLUSH, &mut guest, &mut dice);
    drain(&mut lane, &mut site, &mut guest);
    lane.io.cut_off();
    let verdict = guest.oracle.has_crashed(&site.durable());
    verdict.unwrap_or_else(|violation| panic!("{violation}"));
    guest.graveyard.check();
}

/// Wakes of a disk in a second at most, when it is nothing but refused: a login is some twenty of them.
const WAITS_MAX: u64 = 100;

fn work(lane: &mut Lane, site: &mut Site, guest: &mut Guest, steps: u64, dice: &mut Dice) {
    let workload = Workload::draw(dice);
    for _ in 0..dice.below(steps) {
        if lane.outstanding() < workload.depth && dice.one_in(3) {
            let wish = workload.wish(guest.oracle.size_bytes(), dice);
            if wish.operation != Operation::Grow {
                lane.ask(wish, guest, dice);
            }
        } else {
            lane.go_on_until(site.due(), Patience::UntilEvent, guest);
        }
        site.look();
    }
}
