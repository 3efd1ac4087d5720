//! A machine that is stopped for longer than its lease lasts, at any moment: whatever it was about to write is not sent when it
//! goes on, before its lease is proved.

use std::time::Duration;

use coracle_storage::lease::Lock;
use coracle_storage::reactor::Patience;
use coracle_storage::request::Operation;
use coracle_storage::sim::dice::Dice;
use coracle_storage::sim::initiator;
use coracle_storage::sim::net::NetFaults;
use coracle_storage::sim::nfs::client;
use coracle_storage::sim::nfs::options::{Mishaps, Options};
use coracle_storage::sim::reactor::Faults;

use super::site::{IMAGE, MEANS, Site, expected};
use crate::lane::{Excuse, Guest, Lane};
use crate::life::FLUSH;
use crate::passing::{drain, step};
use crate::remote::life::fresh;
use crate::workload::Workload;

/// Runs what `seed` says, and panics when something is written too late, or lost.
pub(crate) fn simulate(seed: u64) {
    let mut dice = Dice::new(seed);
    let content = fresh(&mut dice);
    let mut options = Options::draw(&mut dice);
    // What comes too late is let in, so that it is seen; and nothing takes its time on the way.
    options.quirks.keeps_expired = true;
    options.mishaps = Mishaps::default();
    let mut site = Site::with(options, &content, &mut dice);
    site.network.set_faults(NetFaults::default());
    let owner = initiator::owner("vm", &mut dice);
    let faults = Faults {
        short_one_in: dice.pick(&[0, 2, 10]),
        interrupted_one_in: dice.pick(&[0, 10]),
        ..Faults::default()
    };
    let io = site.host(faults, &mut dice);
    let lock = dice.pick(&[Lock::Exclusive, Lock::None]);
    let disk = expected(site.open(io.clone(), lock, &owner, MEANS));
    let mut lane = Lane::new(disk, io);
    let mut guest = Guest::new(&content, Excuse::Nothing);
    for _ in 0..1 + dice.below(6) {
        work(&mut lane, &mut site, &mut guest, &mut dice);
        if dice.one_in(2) {
            match dice.below(5) {
                0 => site.server.restart(),
                1 => site.server.crash(),
                2 => site.server.forget_sessions(&client::prefix(&owner)),
                _ => {}
            }
            site.hang_up();
            let steps_max = dice.pick(&[1, 10, 60]);
            for _ in 0..dice.below(steps_max) {
                step(&mut lane, &mut site, &mut guest, Patience::UntilEvent);
            }
        }
        let lease = site.options.limits.lease;
        lane.stop(
            lease * dice.pick(&[1, 2, 3, 4, 5, 6, 7, 12]) / 6 + SLACK,
            &mut guest,
        );
        if dice.one_in(2) {
            drain(&mut lane, &mut site, &mut guest);
        }
    }
    drain(&mut lane, &mut site, &mut guest);
    lane.ask(FLUSH, &mut guest, &mut dice);
    drain(&mut lane, &mut site, &mut guest);
    assert_eq!(
        site.server.late(),
        0,
        "something was written after the lease was over"
    );
    assert_eq!(lane.image.loss(), None, "nobody has taken the lease");
    lane.io.cut_off();
    let verdict = guest.oracle.has_crashed(&site.server.durable(IMAGE));
    verdict.unwrap_or_else(|violation| panic!("{violation}"));
    site.check();
}

/// So that no moment is just the last one of a lease.
const SLACK: Duration = Duration::from_millis(1);

fn work(lane: &mut Lane, site: &mut Site, guest: &mut Guest, dice: &mut Dice) {
    let workload = Workload::draw(dice);
    for _ in 0..dice.below(100) {
        if lane.outstanding() < workload.depth * 2 && dice.one_in(2) {
            let wish = workload.wish(guest.oracle.size_bytes(), dice);
            if wish.operation != Operation::Grow {
                lane.ask(wish, guest, dice);
            }
        } else {
            step(lane, site, guest, Patience::None);
        }
    }
}
