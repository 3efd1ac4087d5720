//! A server that goes on as if nothing had happened when it has lost what it had not committed: only its verifier tells.

use coracle_storage::lease::Lock;
use coracle_storage::reactor::Patience;
use coracle_storage::request::{Durability, Operation};
use coracle_storage::sim::dice::Dice;
use coracle_storage::sim::initiator;
use coracle_storage::sim::reactor::Faults;

use super::site::{IMAGE, Means, Site, expected};
use crate::lane::{Excuse, Guest, Lane};
use crate::life::FLUSH;
use crate::passing::{drain, step};
use crate::remote::life::fresh;
use crate::workload::{Wish, Workload};

/// Runs what `seed` says, and panics when something is not there that was flushed.
pub(crate) fn simulate(seed: u64) {
    let mut dice = Dice::new(seed);
    let content = fresh(&mut dice);
    let mut site = Site::new(&content, &mut dice);
    let means = Means {
        timeout: None,
        uncommitted_bytes_max: dice.pick(&[0, 1 << 20, 32 << 20]),
    };
    let owner = initiator::owner("vm", &mut dice);
    let io = site.host(Faults::default(), &mut dice);
    let lock = dice.pick(&[Lock::Exclusive, Lock::None]);
    let disk = expected(site.open(io.clone(), lock, &owner, means));
    let mut lane = Lane::new(disk, io);
    let mut guest = Guest::new(&content, Excuse::Nothing);
    for _ in 0..1 + dice.below(3) {
        if dice.one_in(2) {
            site.rage();
        }
        work(&mut lane, &mut site, &mut guest, &mut dice);
        site.calm();
        drain(&mut lane, &mut site, &mut guest);
        lane.ask(FLUSH, &mut guest, &mut dice);
        drain(&mut lane, &mut site, &mut guest);
        lane.ask(all_of(&guest), &mut guest, &mut dice);
        drain(&mut lane, &mut site, &mut guest);
        site.check();
    }
    lane.io.cut_off();
    let verdict = guest.oracle.has_crashed(&site.server.durable(IMAGE));
    verdict.unwrap_or_else(|violation| panic!("{violation}"));
}

/// Changes this and that, and reads nothing: until it hears of its loss, nobody can say what a server has lost.
fn work(lane: &mut Lane, site: &mut Site, guest: &mut Guest, dice: &mut Dice) {
    let workload = Workload::draw(dice);
    let lapses_one_in = dice.pick(&[5, 50, 200]);
    for _ in 0..dice.below(300) {
        if dice.one_in(lapses_one_in) {
            site.server.lapse();
        }
        if lane.outstanding() < workload.depth && dice.below(8) < 3 {
            let wish = workload.wish(guest.oracle.size_bytes(), dice);
            if !matches!(wish.operation, Operation::Read | Operation::Grow) {
                lane.ask(wish, guest, dice);
            }
        } else {
            step(lane, site, guest, Patience::UntilEvent);
        }
    }
}

fn all_of(guest: &Guest) -> Wish {
    Wish {
        operation: Operation::Read,
        offset_bytes: 0,
        len_bytes: guest.oracle.size_bytes(),
        durability: Durability::Cached,
    }
}
