//! A server that is gone for a while: how soon a disk is served again, and what it does until then.

use std::time::Duration;

use coracle_storage::lease::Lock;
use coracle_storage::reactor::Patience;
use coracle_storage::request::{Durability, Operation};
use coracle_storage::sim::dice::Dice;
use coracle_storage::sim::initiator;
use coracle_storage::sim::net::NetFaults;
use coracle_storage::sim::nfs::client;
use coracle_storage::sim::nfs::options::{Mishaps, Options};
use coracle_storage::sim::reactor::Faults;

use super::site::{IMAGE, MEANS, Site, expected};
use crate::lane::{Excuse, Guest, Lane};
use crate::passing::{Surroundings, drain, wait};
use crate::workload::Wish;

/// Runs what `seed` says, and panics when a disk comes back late or is busy with nothing.
pub(crate) fn simulate(seed: u64) {
    let mut dice = Dice::new(seed);
    let content = vec![0; 64 << 10];
    let mut site = Site::new(&content, &mut dice);
    let delay_max = Duration::from_micros(dice.pick(&[20, 200, 2_000]));
    site.network.set_faults(NetFaults {
        delay_max,
        ..NetFaults::default()
    });
    let owner = initiator::owner("vm", &mut dice);
    let io = site.host(Faults::default(), &mut dice);
    let disk = expected(site.open(io.clone(), Lock::Exclusive, &owner, MEANS));
    let mut lane = Lane::new(disk, io);
    let mut guest = Guest::new(&content, Excuse::Nothing);
    let quiet = Duration::from_secs(dice.below(8));
    wait(&mut lane, &mut site, &mut guest, quiet);
    ask(&mut lane, &mut guest, &mut dice);
    let time = Duration::from_millis(dice.pick(&[10, 400, 2_500, 7_000, 30_000, 100_000]));
    let until = lane.now() + time;
    match dice.below(6) {
        0 => site.freeze(until),
        1 => {
            site.freeze(until);
            site.hang_up();
        }
        2 => {
            site.server.crash();
            site.hang_up();
            site.down(until);
        }
        3 => {
            site.server.expire(&client::prefix(&owner));
            site.freeze(until);
        }
        _ => {
            site.server.restart();
            site.hang_up();
            site.down(until);
        }
    }
    ask(&mut lane, &mut guest, &mut dice);
    let waits = wait(&mut lane, &mut site, &mut guest, time);
    let seconds = time.as_secs() + 1;
    assert!(
        waits < 60 + 40 * seconds,
        "a disk woke {waits} times in {seconds} s"
    );
    let back = site.server.grace().max(Some(lane.now())).unwrap();
    while lane.outstanding() > 0 {
        lane.go_on_until(site.due(), Patience::UntilEvent, &mut guest);
        site.look();
        let late = lane.now().saturating_duration_since(back);
        assert!(
            late < LATE_MAX,
            "a disk is not served {} ms after its server is back",
            late.as_millis()
        );
    }
    forget(&mut lane, &mut site, &mut guest, &mut dice);
    site.check();
}

/// Calls that an old connection has delivered and that the server has not carried out yet: they do no harm any more when their
/// requests have ended on the next one, or in the next session.
pub(crate) fn simulate_strays(seed: u64) {
    let mut dice = Dice::new(seed);
    let content = vec![0; 4096];
    let mut options = Options::draw(&mut dice);
    options.mishaps = Mishaps::default();
    let slow_max = Duration::from_millis(dice.pick(&[10, 1_000, 20_000]));
    let mut site = Site::with(options, &content, &mut dice);
    let owner = initiator::owner("vm", &mut dice);
    let io = site.host(Faults::default(), &mut dice);
    let lock = dice.pick(&[Lock::Exclusive, Lock::None]);
    let disk = expected(site.open(io.clone(), lock, &owner, MEANS));
    let mut lane = Lane::new(disk, io);
    let mut guest = Guest::new(&content, Excuse::Nothing);
    for _ in 0..4 {
        site.server.adjust(|options| {
            options.mishaps.slow_one_in = 1;
            options.mishaps.slow_max = slow_max;
        });
        lane.ask(wish(Operation::Write), &mut guest, &mut dice);
        for _ in 0..dice.below(20) {
            lane.go_on_until(site.due(), Patience::UntilEvent, &mut guest);
        }
        site.calm();
        site.hang_up();
        if dice.one_in(3) {
            site.server.expire(&client::prefix(&owner));
        }
        drain(&mut lane, &mut site, &mut guest);
        lane.ask(wish(Operation::Write), &mut guest, &mut dice);
        drain(&mut lane, &mut site, &mut guest);
        while site.server.is_working() {
            site.server
                .due()
                .into_iter()
                .for_each(|due| site.clock.pass_to(due));
            site.server.advance();
        }
        lane.ask(wish(Operation::Read), &mut guest, &mut dice);
        drain(&mut lane, &mut site, &mut guest);
    }
    lane.ask(crate::life::FLUSH, &mut guest, &mut dice);
    drain(&mut lane, &mut site, &mut guest);
    lane.io.cut_off();
    let verdict = guest.oracle.has_crashed(&site.server.durable(IMAGE));
    verdict.unwrap_or_else(|violation| panic!("{violation}"));
    site.check();
}

fn wish(operation: Operation) -> Wish {
    Wish {
        operation,
        offset_bytes: 0,
        len_bytes: 4096,
        durability: Durability::Cached,
    }
}

/// How long a disk may take until it is served again.
const LATE_MAX: Duration = Duration::from_secs(2);

/// A server that takes no session for long.
fn forget(lane: &mut Lane, site: &mut Site, guest: &mut Guest, dice: &mut Dice) {
    site.server.adjust(|options| {
        options.mishaps = Mishaps {
            forgets_one_in: 1,
            ..Mishaps::default()
        };
    });
    ask(lane, guest, dice);
    let waits = wait(lane, site, guest, Duration::from_secs(30));
    // Thirty sessions and what comes with them, and a few more at first.
    assert!(waits < 40 * 120, "a disk woke {waits} times in 30 s");
}

fn ask(lane: &mut Lane, guest: &mut Guest, dice: &mut Dice) {
    for _ in 0..dice.below(4) {
        let wish = Wish {
            operation: dice.pick(&[Operation::Read, Operation::Write, Operation::Flush]),
            offset_bytes: 0,
            len_bytes: 4096,
            durability: dice.pick(&[Durability::Cached, Durability::Durable]),
        };
        lane.ask(wish, guest, dice);
    }
}
