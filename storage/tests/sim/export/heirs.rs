//! One image and a succession of machines that lease it: each is killed or stopped while it writes, the server gives its lease
//! away, and the next one starts; or another process takes its lock, as in a hand-over.

use std::time::Duration;

use coracle_storage::lease::{LeaseError, Lock, Owner};
use coracle_storage::nfs::NfsError;
use coracle_storage::reactor::Patience;
use coracle_storage::request::{Durability, Operation};
use coracle_storage::sim::dice::Dice;
use coracle_storage::sim::initiator;
use coracle_storage::sim::nfs::{Right, client};
use coracle_storage::sim::reactor::Faults;

use super::site::{IMAGE, MEANS, Site, chain, expected};
use crate::lane::{Excuse, Guest, Lane};
use crate::life::{FLUSH, RAISE};
use crate::memory::Memory;
use crate::passing::{RECOVERY_MAX, Surroundings, drain, step, wait};
use crate::remote::life::fresh;
use crate::workload::{Wish, Workload};

/// A machine.
struct Machine {
    owner: Owner,
    lane: Lane,
    guest: Guest,
    workload: Workload,
}

/// Runs what `seed` says, and panics when two have written, or something acknowledged is lost.
pub(crate) fn simulate(seed: u64) {
    let mut dice = Dice::new(seed);
    let content = fresh(&mut dice);
    let mut site = Site::new(&content, &mut dice);
    let mut judge = Judge::default();
    let mut stopped: Vec<Machine> = Vec::new();
    let mut now = start(&site, initiator::owner("vm", &mut dice), &mut dice);
    for _ in 0..1 + dice.below(3) {
        if dice.one_in(2) {
            site.rage();
        }
        for _ in 0..dice.below(600) {
            work(&mut now, &mut site, &mut judge, &mut dice);
            for machine in &mut stopped {
                work(machine, &mut site, &mut judge, &mut dice);
            }
            if dice.one_in(150) {
                site.mishap(&now.owner, &mut dice);
            }
        }
        site.calm();
        if dice.one_in(3) {
            refuse(&mut now, &mut site, &mut judge, &mut dice);
        }
        let memory = dice
            .one_in(2)
            .then(|| remember(&mut now, &mut stopped, &mut site, &mut judge, &mut dice));
        let is_killed = dice.one_in(2);
        if is_killed {
            now.lane.io.cut_off();
        }
        site.recover();
        if dice.one_in(4) {
            site.server.restart();
            site.hang_up();
        }
        let next = succeed(&mut site, memory, &mut judge, &mut dice);
        judge.look(&site);
        judge.lost.push(client::prefix(&now.owner));
        let mut last = std::mem::replace(&mut now, next);
        last.guest.excuse = Excuse::Anything;
        if !is_killed {
            stopped.push(last);
        }
    }
    site.calm();
    for machine in &mut stopped {
        learn(machine, &mut site, &mut judge, &mut dice);
    }
    drain(&mut now.lane, &mut site, &mut now.guest);
    now.lane.ask(FLUSH, &mut now.guest, &mut dice);
    drain(&mut now.lane, &mut site, &mut now.guest);
    assert_eq!(now.lane.image.loss(), None, "nobody has taken the lease");
    judge.look(&site);
    now.lane.io.cut_off();
    let verdict = now.guest.oracle.has_crashed(&site.server.durable(IMAGE));
    verdict.unwrap_or_else(|violation| panic!("{violation}"));
    site.check();
}

/// Another process takes the lock of a machine away, and the record, while the open of the machine stays: whatever happens to
/// the machine's connections, it writes no more.
pub(crate) fn simulate_hand_over(seed: u64) {
    let mut dice = Dice::new(seed);
    let content = fresh(&mut dice);
    let mut site = Site::new(&content, &mut dice);
    let mut judge = Judge {
        // The server's word is enough.
        takes_any_right: true,
        ..Judge::default()
    };
    let mut source = start(&site, initiator::owner("vm", &mut dice), &mut dice);
    for _ in 0..dice.below(100) {
        work(&mut source, &mut site, &mut judge, &mut dice);
    }
    if dice.one_in(2) {
        drain(&mut source.lane, &mut site, &mut source.guest);
    }
    while site.server.is_working() {
        site.server
            .due()
            .into_iter()
            .for_each(|due| site.clock.pass_to(due));
        site.server.advance();
    }
    judge.look(&site);
    let target = initiator::owner("target", &mut dice);
    let prefix = client::prefix(&source.owner);
    site.server.hand_over(&prefix, IMAGE, &target);
    judge.lost.push(prefix.clone());
    source.guest.excuse = Excuse::Anything;
    match dice.below(4) {
        0 => site.hang_up(),
        1 => site.server.forget_sessions(&prefix),
        2 => {
            site.server.restart();
            site.hang_up();
        }
        _ => {}
    }
    learn(&mut source, &mut site, &mut judge, &mut dice);
    site.check();
}

fn start(site: &Site, owner: Owner, dice: &mut Dice) -> Machine {
    let io = site.host(Faults::default(), dice);
    let disk = expected(site.open(io.clone(), Lock::Exclusive, &owner, MEANS));
    Machine {
        owner,
        lane: Lane::new(disk, io),
        guest: Guest::new(&site.server.content(IMAGE), Excuse::Nothing),
        workload: Workload::draw(dice),
    }
}

/// A second start while the machine runs comes to nothing, and the machine runs on.
fn refuse(machine: &mut Machine, site: &mut Site, judge: &mut Judge, dice: &mut Dice) {
    site.recover();
    drain(&mut machine.lane, site, &mut machine.guest);
    // The second would wait for that, and only it goes on then.
    if let Some(grace) = site.server.grace() {
        let left = grace.saturating_duration_since(machine.lane.now());
        wait(&mut machine.lane, site, &mut machine.guest, left);
    }
    machine.lane.ask(WRITE, &mut machine.guest, dice);
    drain(&mut machine.lane, site, &mut machine.guest);
    let io = site.host(Faults::default(), dice);
    let second = initiator::owner("vm", dice);
    let Err(error) = site.open(io.clone(), Lock::Exclusive, &second, MEANS) else {
        panic!("two machines have the lease");
    };
    io.cut_off();
    let is_held = matches!(error, NfsError::Held { .. });
    assert!(is_held, "it does not say who has the lease: {}", chain(&error));
    machine.lane.ask(WRITE, &mut machine.guest, dice);
    drain(&mut machine.lane, site, &mut machine.guest);
    judge.look(site);
}

/// A snapshot is made of a machine, which may go on and raise the generation then, whatever happens on the way.
fn remember(
    machine: &mut Machine,
    stopped: &mut [Machine],
    site: &mut Site,
    judge: &mut Judge,
    dice: &mut Dice,
) -> Memory {
    calm_down(machine, stopped, site, judge);
    let mut memory = Memory::of(&machine.lane);
    if dice.one_in(3) {
        return memory;
    }
    memory.fades();
    if dice.one_in(2) {
        site.rage();
    }
    machine.lane.ask(RAISE, &mut machine.guest, dice);
    let mishap_one_in = dice.pick(&[0, 5]);
    for _ in 0..dice.below(40) {
        if dice.one_in(mishap_one_in) {
            site.mishap(&machine.owner, dice);
        }
        step(&mut machine.lane, site, &mut machine.guest, Patience::UntilEvent);
        judge.look(site);
    }
    site.calm();
    if dice.one_in(2) {
        calm_down(machine, stopped, site, judge);
        memory.is_overtaken(&machine.lane);
    }
    memory
}

/// Everything that was asked of a machine ends, while those that were stopped go on as well.
fn calm_down(machine: &mut Machine, stopped: &mut [Machine], site: &mut Site, judge: &mut Judge) {
    site.recover();
    let start = machine.lane.now();
    while machine.lane.outstanding() > 0 {
        for machine in stopped.iter_mut().chain([&mut *machine]) {
            let limit = site.due().into_iter().chain([machine.lane.now() + TURN]).min();
            machine
                .lane
                .go_on_until(limit, Patience::UntilEvent, &mut machine.guest);
            site.look();
            judge.look(site);
        }
        let time = machine.lane.now() - start;
        assert!(
            time < 2 * RECOVERY_MAX,
            "requests have not ended after the last fault"
        );
    }
}

/// How long one of them has its turn.
const TURN: Duration = Duration::from_millis(5);

/// The next machine, as soon as the server has given up the last: it goes on with what is remembered, if it may.
fn succeed(site: &mut Site, mut memory: Option<Memory>, judge: &mut Judge, dice: &mut Dice) -> Machine {
    let mut last = String::new();
    let mut dies_one_in = 3;
    for _ in 0..600 {
        let owner = initiator::owner(dice.pick(&["vm", "other"]), dice);
        let io = site.host(Faults::default(), dice);
        let opened = match memory {
            Some(memory) => site.keep(io.clone(), &owner, memory.generation),
            None => site.open(io.clone(), Lock::Exclusive, &owner, MEANS),
        };
        match opened {
            Ok(disk) => {
                let mut machine = Machine {
                    owner,
                    lane: Lane::new(disk, io),
                    guest: Guest::new(&site.server.content(IMAGE), Excuse::Nothing),
                    workload: Workload::draw(dice),
                };
                if let Some(memory) = &mut memory {
                    memory.was_kept(&machine.lane);
                    if dice.one_in(dies_one_in) {
                        // Before it has written anything: the next one may go on all the same.
                        dies_one_in = 0;
                        machine.lane.io.cut_off();
                        continue;
                    }
                    machine.lane.ask(RAISE, &mut machine.guest, dice);
                    drain(&mut machine.lane, site, &mut machine.guest);
                    memory.is_overtaken(&machine.lane);
                }
                return machine;
            }
            Err(NfsError::Lease(LeaseError::Overtaken { .. })) => {
                memory.take().expect("it asks for a generation").was_refused();
                let lockers = site.server.lockers(IMAGE);
                assert!(lockers.is_empty(), "who was refused keeps the lock: {lockers:?}");
            }
            Err(error) => last = chain(&error),
        }
        io.cut_off();
        site.clock.pass(Duration::from_secs(1));
        site.network.advance();
        site.server.advance();
        judge.look(site);
    }
    panic!("the lease of a machine that is gone cannot be taken: {last}");
}

/// A machine does a little.
fn work(machine: &mut Machine, site: &mut Site, judge: &mut Judge, dice: &mut Dice) {
    let lane = &mut machine.lane;
    if lane.outstanding() < machine.workload.depth && dice.one_in(3) {
        let wish = machine.workload.wish(machine.guest.oracle.size_bytes(), dice);
        if wish.operation != Operation::Grow {
            lane.ask(wish, &mut machine.guest, dice);
        }
    }
    let limit = lane.now() + Duration::from_micros(dice.pick(&[1, 100, 5_000, 1_000_000]));
    let limit = site.due().into_iter().chain([limit]).min();
    lane.go_on_until(limit, Patience::UntilEvent, &mut machine.guest);
    site.look();
    judge.look(site);
}

/// A machine that has lost the lease finds that out when it writes next.
fn learn(machine: &mut Machine, site: &mut Site, judge: &mut Judge, dice: &mut Dice) {
    let start = machine.lane.now();
    machine.lane.ask(WRITE, &mut machine.guest, dice);
    while machine.lane.image.loss().is_none() {
        let limit = machine.lane.now() + RECOVERY_MAX;
        machine
            .lane
            .go_on_until(Some(limit), Patience::UntilEvent, &mut machine.guest);
        site.look();
        judge.look(site);
        let time = machine.lane.now() - start;
        assert!(
            time < 2 * RECOVERY_MAX,
            "a machine does not learn that it has lost the lease"
        );
    }
}

const WRITE: Wish = Wish {
    operation: Operation::Write,
    offset_bytes: 0,
    len_bytes: 512,
    durability: Durability::Cached,
};

/// Looks at what the server has done.
#[derive(Default)]
struct Judge {
    /// Who may not write any more.
    lost: Vec<String>,
    /// Whoever has not lost the lease may write by any right.
    takes_any_right: bool,
}

impl Judge {
    fn look(&self, site: &Site) {
        for change in site.changes() {
            let has_lost = |prefix: &String| change.client.starts_with(prefix.as_bytes());
            assert!(
                !self.lost.iter().any(has_lost),
                "the write of a client that has lost the lease was carried out: {change:?}"
            );
            assert!(
                self.takes_any_right || change.right == Right::Lock,
                "a write by another right than that of the lock: {change:?}"
            );
        }
    }
}
