//! One logical unit and a succession of machines that lease it: each is killed, frozen or fenced while it writes, its lease is
//! broken, and the next one starts.

use std::io;
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use coracle_storage::iscsi::IscsiError;
use coracle_storage::lease::{LeaseError, Lock, Owner};
use coracle_storage::reactor::{Full, ImageFile, KernelOp, Patience, Reactor, Submit, Token, Wake};
use coracle_storage::request::{Durability, Operation};
use coracle_storage::sim::dice::Dice;
use coracle_storage::sim::initiator;
use coracle_storage::sim::reactor::{Faults, SimReactor};
use coracle_storage::sim::target::{Event, Written};

use super::life::fresh;
use super::site::{MEANS, Site, Tail, chain, expected};
use crate::lane::{Excuse, Guest, Lane};
use crate::life::{FLUSH, RAISE};
use crate::memory::Memory;
use crate::passing::{RECOVERY_MAX, Surroundings, drain, step};
use crate::workload::{Wish, Workload};

/// A machine.
struct Machine {
    owner: Owner,
    lane: Lane,
    guest: Guest,
    workload: Workload,
}

/// What becomes of the machine that has the lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// Its host is gone without a word.
    Killed,
    /// It does nothing while another takes its place, and goes on then.
    Frozen,
    /// It goes on all the time.
    Alive,
}

/// Runs what `seed` says, and panics when two have written, or something acknowledged is lost.
pub(crate) fn simulate(seed: u64) {
    let mut dice = Dice::new(seed);
    let content = fresh(&mut dice);
    let mut site = Site::new(&content, Tail::Formatted, &mut dice);
    let mut fenced: Vec<Machine> = Vec::new();
    let mut judge = Judge::new(&site, &mut dice);
    let mut now = start(&site, &content, &mut dice);
    for _ in 0..1 + dice.below(3) {
        if dice.one_in(2) {
            site.rage();
        }
        for _ in 0..dice.below(600) {
            work(&mut now, &mut site, &judge, &mut dice);
            for machine in &mut fenced {
                work(machine, &mut site, &judge, &mut dice);
            }
            if dice.one_in(150) {
                site.mishap(Lock::Exclusive, &mut dice);
            }
        }
        site.calm();
        let memory = dice
            .one_in(2)
            .then(|| remember(&mut now, &mut fenced, &mut site, &judge, &mut dice));
        let fate = dice.pick(&[Fate::Killed, Fate::Frozen, Fate::Alive]);
        if fate == Fate::Killed {
            now.lane.io.cut_off();
        }
        site.recover();
        if dice.one_in(4) {
            site.target.restart();
            site.hang_up();
        }
        let (next, memory) = succeed(&mut now, fate, &site, memory, &judge, &mut dice);
        judge.look(&site);
        judge.fenced.push(now.owner.clone());
        let mut last = std::mem::replace(&mut now, next);
        if fate != Fate::Killed {
            last.guest.excuse = Excuse::Anything;
            fenced.push(last);
        }
        if let Some(mut memory) = memory {
            now.lane.ask(RAISE, &mut now.guest, &mut dice);
            calm_down(&mut now, &mut fenced, &mut site, &judge);
            memory.is_overtaken(&now.lane);
        }
    }
    site.calm();
    for machine in &mut fenced {
        learn(machine, &mut site, &mut dice);
    }
    drain(&mut now.lane, &mut site, &mut now.guest);
    now.lane.ask(FLUSH, &mut now.guest, &mut dice);
    drain(&mut now.lane, &mut site, &mut now.guest);
    assert_eq!(now.lane.image.loss(), None, "nobody has taken the lease");
    judge.look(&site);
    now.lane.io.cut_off();
    let verdict = now.guest.oracle.has_crashed(&site.durable());
    verdict.unwrap_or_else(|violation| panic!("{violation}"));
    site.check();
}

/// The first machine.
fn start(site: &Site, content: &[u8], dice: &mut Dice) -> Machine {
    let owner = initiator::owner("vm", dice);
    let io = site.host(Faults::default(), dice);
    let disk = expected(site.open(io.clone(), Lock::Exclusive, &owner, MEANS));
    Machine {
        owner,
        lane: Lane::new(disk, io),
        guest: Guest::new(content, Excuse::Nothing),
        workload: Workload::draw(dice),
    }
}

/// A snapshot is made of a machine, which may go on and raise the generation then, whatever happens on the way.
fn remember(
    machine: &mut Machine,
    fenced: &mut [Machine],
    site: &mut Site,
    judge: &Judge,
    dice: &mut Dice,
) -> Memory {
    calm_down(machine, fenced, site, judge);
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
            site.mishap(Lock::Exclusive, dice);
        }
        step(&mut machine.lane, site, &mut machine.guest, Patience::UntilEvent);
        judge.look(site);
    }
    site.calm();
    if dice.one_in(2) {
        calm_down(machine, fenced, site, judge);
        memory.is_overtaken(&machine.lane);
    }
    memory
}

/// Everything that was asked of a machine ends, while those that are fenced go on as well.
fn calm_down(machine: &mut Machine, fenced: &mut [Machine], site: &mut Site, judge: &Judge) {
    site.recover();
    let start = machine.lane.now();
    while machine.lane.outstanding() > 0 {
        for machine in fenced.iter_mut().chain([&mut *machine]) {
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

/// The next machine in the place of `last`, whose lease is broken for that. It goes on with what is remembered, if it may: then
/// that is returned, and nothing has been raised yet.
fn succeed(
    last: &mut Machine,
    fate: Fate,
    site: &Site,
    memory: Option<Memory>,
    judge: &Judge,
    dice: &mut Dice,
) -> (Machine, Option<Memory>) {
    // The same machine once more, or another.
    let owner = initiator::owner(dice.pick(&["vm", "other"]), dice);
    let io = site.host(Faults::default(), dice);
    let mut others = Others {
        machine: (fate == Fate::Alive).then_some(last),
        judge,
        dice: dice.split(),
    };
    if dice.one_in(2) {
        let refused = site.open(Beside::new(&io, &mut others), Lock::Exclusive, &owner, MEANS);
        let Err(error) = refused else {
            panic!("two machines have the lease");
        };
        let is_held = matches!(error, IscsiError::Held { .. });
        assert!(is_held, "it does not say who has the lease: {}", chain(&error));
    }
    let operator = initiator::owner("operator", dice);
    until_done("broken", || {
        let host = site.host(Faults::default(), dice);
        let url = site.url("operator");
        let broken = initiator::break_lease(Beside::new(&host, &mut others), &url, &operator);
        host.cut_off();
        broken
    });
    let (disk, memory) = until_done("taken", || {
        let beside = Beside::new(&io, &mut others);
        let Some(memory) = memory else {
            let opened = site.open(beside, Lock::Exclusive, &owner, MEANS);
            return opened.map(|disk| (disk, None));
        };
        match site.keep(beside, &owner, memory.generation) {
            Err(IscsiError::Lease(LeaseError::Overtaken { .. })) => {
                memory.was_refused();
                let beside = Beside::new(&io, &mut others);
                let opened = site.open(beside, Lock::Exclusive, &owner, MEANS);
                opened.map(|disk| (disk, None))
            }
            opened => opened.map(|disk| (disk, Some(memory))),
        }
    });
    if let Some(last) = others.machine.take() {
        // What it is told from now on, nobody judges.
        last.guest.excuse = Excuse::Anything;
    }
    let machine = Machine {
        owner,
        lane: Lane::new(disk, io),
        guest: Guest::new(&site.content(), Excuse::Nothing),
        workload: Workload::draw(dice),
    };
    if let Some(memory) = &memory {
        memory.was_kept(&machine.lane);
    }
    (machine, memory)
}

/// Tries what a machine that is about to lose may come in between of.
fn until_done<T>(what: &str, mut act: impl FnMut() -> Result<T, IscsiError>) -> T {
    let mut last = String::new();
    for _ in 0..30 {
        match act() {
            Ok(done) => return done,
            Err(error) => last = chain(&error),
        }
    }
    panic!("the lease cannot be {what}: {last}");
}

/// A machine does a little.
fn work(machine: &mut Machine, site: &mut Site, judge: &Judge, dice: &mut Dice) {
    let lane = &mut machine.lane;
    if lane.outstanding() < machine.workload.depth && dice.one_in(3) {
        let wish = machine.workload.wish(machine.guest.oracle.size_bytes(), dice);
        if wish.operation != Operation::Grow && judge.sees(wish.operation) {
            lane.ask(wish, &mut machine.guest, dice);
        }
    }
    let limit = lane.now() + Duration::from_micros(dice.pick(&[1, 100, 5_000, 1_000_000]));
    let limit = site.due().into_iter().chain([limit]).min();
    lane.go_on_until(limit, Patience::UntilEvent, &mut machine.guest);
    site.look();
}

/// A machine that has been fenced finds that out when it writes next.
fn learn(machine: &mut Machine, site: &mut Site, dice: &mut Dice) {
    let start = machine.lane.now();
    machine.lane.ask(WRITE, &mut machine.guest, dice);
    while machine.lane.image.loss().is_none() {
        let limit = machine.lane.now() + RECOVERY_MAX;
        machine
            .lane
            .go_on_until(Some(limit), Patience::UntilEvent, &mut machine.guest);
        site.look();
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

/// Looks at what the target has done.
struct Judge {
    /// Who may not write any more.
    fenced: Vec<Owner>,
    /// The target fences nothing but WRITE.
    is_lax: bool,
}

impl Judge {
    fn new(site: &Site, dice: &mut Dice) -> Self {
        let is_lax = dice.one_in(2);
        site.target
            .adjust(|options| options.quirks.fences_unmap = !is_lax);
        // Quirks of reservations wait for the next life.
        site.target.restart();
        site.hang_up();
        Self {
            fenced: Vec::new(),
            is_lax,
        }
    }

    /// Whether the target would refuse this to a machine that has lost the lease.
    fn sees(&self, operation: Operation) -> bool {
        !self.is_lax || !matches!(operation, Operation::Discard | Operation::WriteZeroes { .. })
    }

    fn look(&self, site: &Site) {
        for event in site.target.events() {
            let Event::Executed(execution) = event else {
                continue;
            };
            let isid = execution.nexus.isid;
            let is_fenced = self.fenced.iter().any(|owner| initiator::is_owners(isid, owner));
            assert!(
                !is_fenced || (self.is_lax && execution.written == Written::Zeros),
                "the write of an initiator that has lost the lease was carried out: {execution:?}"
            );
        }
    }
}

/// Who goes on while somebody else opens the unit.
struct Others<'a> {
    machine: Option<&'a mut Machine>,
    judge: &'a Judge,
    dice: Dice,
}

impl Others<'_> {
    /// Lets them do something, until `limit` at most.
    fn go_on(&mut self, limit: Instant) {
        let Some(machine) = &mut self.machine else { return };
        let lane = &mut machine.lane;
        if lane.outstanding() < machine.workload.depth && self.dice.one_in(3) {
            let wish = machine
                .workload
                .wish(machine.guest.oracle.size_bytes(), &mut self.dice);
            if wish.operation != Operation::Grow && self.judge.sees(wish.operation) {
                lane.ask(wish, &mut machine.guest, &mut self.dice);
            }
        }
        lane.go_on_until(Some(limit), Patience::UntilEvent, &mut machine.guest);
    }
}

/// A reactor beside others, which go on while it waits.
struct Beside<'a, 'b> {
    io: SimReactor,
    others: &'a mut Others<'b>,
    deadline: Option<Instant>,
}

/// How long one of them has its turn.
const TURN: Duration = Duration::from_millis(5);

impl<'a, 'b> Beside<'a, 'b> {
    fn new(io: &SimReactor, others: &'a mut Others<'b>) -> Self {
        Self {
            io: io.clone(),
            others,
            deadline: None,
        }
    }
}

impl Submit for Beside<'_, '_> {
    fn submit(&mut self, op: KernelOp, token: Token) -> Result<(), Full> {
        self.io.submit(op, token)
    }

    fn now(&self) -> Instant {
        self.io.now()
    }
}

impl Reactor for Beside<'_, '_> {
    fn register(&mut self, files: &[ImageFile]) -> io::Result<()> {
        self.io.register(files)
    }

    fn watch(&mut self, eventfd: RawFd, token: Token) -> io::Result<()> {
        self.io.watch(eventfd, token)
    }

    fn unwatch(&mut self, token: Token) -> io::Result<()> {
        self.io.unwatch(token)
    }

    fn set_timer(&mut self, deadline: Option<Instant>) {
        self.deadline = deadline;
    }

    fn wait(&mut self, patience: Patience, wakes: &mut Vec<Wake>) -> io::Result<()> {
        loop {
            let turn = self.io.now() + TURN;
            self.others.go_on(turn);
            self.io.set_timer(self.deadline.into_iter().chain([turn]).min());
            self.io.wait(patience, wakes)?;
            if self.deadline.is_none_or(|deadline| deadline > self.io.now()) {
                wakes.retain(|wake| !matches!(wake, Wake::TimerExpired));
            }
            if !wakes.is_empty() || patience == Patience::None {
                return Ok(());
            }
        }
    }
}
