//! A target that is away for a while: how soon its disk is served again, and how often it looks meanwhile.

use std::time::Duration;

use coracle_storage::lease::Lock;
use coracle_storage::reactor::Patience;
use coracle_storage::request::{Durability, Operation};
use coracle_storage::sim::dice::Dice;
use coracle_storage::sim::initiator;
use coracle_storage::sim::net::NetFaults;
use coracle_storage::sim::reactor::Faults;
use coracle_storage::sim::target::options::Mishaps;
use coracle_storage::sim::target::{Redirect, Term};

use super::site::{Means, Site, Tail, expected};
use crate::lane::{Excuse, Guest, Lane};
use crate::passing::{Surroundings, drain, wait};
use crate::workload::Wish;

/// Runs what `seed` says, and panics when a disk comes back late or is busy with nothing.
pub(crate) fn simulate(seed: u64) {
    let mut dice = Dice::new(seed);
    let content = vec![0; 64 << 10];
    let mut site = Site::new(&content, Tail::Formatted, &mut dice);
    let delay_max = Duration::from_micros(dice.pick(&[20, 200, 2_000]));
    site.network.set_faults(NetFaults {
        delay_max,
        ..NetFaults::default()
    });
    let owner = initiator::owner("vm", &mut dice);
    let io = site.host(Faults::default(), &mut dice);
    let means = Means {
        timeout: None,
        uncommitted_bytes_max: 32 << 20,
    };
    let disk = expected(site.open(io.clone(), Lock::Exclusive, &owner, means));
    let mut lane = Lane::new(disk, io);
    let mut guest = Guest::new(&content, Excuse::Nothing);
    wait(
        &mut lane,
        &mut site,
        &mut guest,
        Duration::from_secs(dice.below(8)),
    );
    ask(&mut lane, &mut guest, &mut dice);
    let time = Duration::from_millis(dice.pick(&[10, 400, 2_500, 7_000, 30_000]));
    match dice.below(5) {
        0 => {
            let address = dice.pick(&["10.0.0.1:3260,1", "10.0.0.2:3260,1"]).to_owned();
            site.target.redirect(Some(Redirect {
                address,
                term: Term::Temporarily,
            }));
            site.hang_up();
        }
        1 => site.freeze(lane.now() + time),
        2 => {
            site.freeze(lane.now() + time);
            site.hang_up();
        }
        _ => {
            site.target.restart();
            site.hang_up();
            site.down(lane.now() + time);
        }
    }
    ask(&mut lane, &mut guest, &mut dice);
    let waits = wait(&mut lane, &mut site, &mut guest, time);
    let seconds = time.as_secs() + 1;
    assert!(
        waits < 60 + 40 * seconds,
        "a disk woke {waits} times in {seconds} s"
    );
    site.target.redirect(None);
    let back = lane.now();
    while lane.outstanding() > 0 {
        lane.go_on_until(site.due(), Patience::UntilEvent, &mut guest);
        site.look();
        let late = lane.now() - back;
        assert!(
            late < LATE_MAX,
            "a disk is not served {} ms after its target is back",
            late.as_millis()
        );
    }
    refuse(&mut lane, &mut site, &mut guest, &mut dice);
    site.check();
}

/// Commands that an old connection has delivered and that the target has not carried out yet: they do no harm any more when their
/// requests have ended on the next one.
pub(crate) fn simulate_strays(seed: u64) {
    let mut dice = Dice::new(seed);
    let content = vec![0; 4096];
    let (lock, tail) = dice.pick(&[(Lock::Exclusive, Tail::Formatted), (Lock::None, Tail::None)]);
    let mut site = Site::new(&content, tail, &mut dice);
    let owner = initiator::owner("vm", &mut dice);
    let io = site.host(Faults::default(), &mut dice);
    let means = Means {
        timeout: None,
        uncommitted_bytes_max: 32 << 20,
    };
    let disk = expected(site.open(io.clone(), lock, &owner, means));
    let mut lane = Lane::new(disk, io);
    let mut guest = Guest::new(&content, Excuse::Nothing);
    for _ in 0..4 {
        let slow_one_in = dice.pick(&[1, 2]);
        site.target
            .adjust(|options| options.mishaps.slow_one_in = slow_one_in);
        lane.ask(wish(Operation::Write), &mut guest, &mut dice);
        for _ in 0..dice.below(20) {
            lane.go_on(Patience::UntilEvent, &mut guest);
        }
        site.calm();
        site.hang_up();
        drain(&mut lane, &mut site, &mut guest);
        lane.ask(wish(Operation::Write), &mut guest, &mut dice);
        drain(&mut lane, &mut site, &mut guest);
        while site.target.is_working() {
            site.target.advance();
        }
        lane.ask(wish(Operation::Read), &mut guest, &mut dice);
        drain(&mut lane, &mut site, &mut guest);
    }
    lane.io.cut_off();
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

/// A target that takes the session and then no write.
fn refuse(lane: &mut Lane, site: &mut Site, guest: &mut Guest, dice: &mut Dice) {
    site.target.adjust(|options| {
        options.mishaps = Mishaps {
            poison_one_in: 1,
            ..Mishaps::default()
        };
    });
    ask(lane, guest, dice);
    let waits = wait(lane, site, guest, Duration::from_secs(30));
    // Sixty logins and what comes with them, and a few more at first.
    assert!(waits < 70 * 120, "a disk woke {waits} times in 30 s");
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
