//! A server that does what none may do, and then is a proper one again.

use std::time::Duration;

use coracle_storage::lease::Lock;
use coracle_storage::reactor::Patience;
use coracle_storage::request::Operation;
use coracle_storage::sim::dice::Dice;
use coracle_storage::sim::initiator;
use coracle_storage::sim::nfs::options::Hostility;
use coracle_storage::sim::reactor::Faults;

use super::site::{IMAGE, Means, Site, expected};
use crate::lane::{Excuse, Guest, Lane};
use crate::life::FLUSH;
use crate::passing::{drain, step, wait};
use crate::remote::life::fresh;
use crate::workload::Workload;

/// Runs what `seed` says, and panics when the disk does, or is not whole again afterwards.
pub(crate) fn simulate(seed: u64) {
    let mut dice = Dice::new(seed);
    let content = fresh(&mut dice);
    let lock = dice.pick(&[Lock::None, Lock::Exclusive]);
    let mut site = Site::new(&content, &mut dice);
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
    site.server.adjust(|options| options.hostility = hostility);
    work(&mut lane, &mut site, &mut guest, 600, &mut dice);
    // What is beyond repair is tried again, and not all the time.
    let waits = wait(&mut lane, &mut site, &mut guest, Duration::from_secs(60));
    assert!(waits < 60 * WAITS_MAX, "a disk woke {waits} times in 60 s");

    site.server
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
    let _provoked = site.server.complaints();
    let mut guest = Guest::new(&site.server.content(IMAGE), Excuse::Nothing);
    work(&mut lane, &mut site, &mut guest, 300, &mut dice);
    drain(&mut lane, &mut site, &mut guest);
    guest.graveyard.check();
    site.check();
}

/// Times that a disk may wake in a second while a server fools it.
const WAITS_MAX: u64 = 400;

fn work(lane: &mut Lane, site: &mut Site, guest: &mut Guest, steps: u64, dice: &mut Dice) {
    let workload = Workload::draw(dice);
    for _ in 0..dice.below(steps) {
        if lane.image.loss().is_some() {
            return;
        }
        if lane.outstanding() < workload.depth && dice.below(8) < 3 {
            let wish = workload.wish_of_sparse(guest.oracle.size_bytes(), dice);
            if wish.operation != Operation::Grow {
                lane.ask(wish, guest, dice);
            }
        } else {
            step(lane, site, guest, Patience::UntilEvent);
        }
    }
}
