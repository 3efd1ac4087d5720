//! One image that one owner after the other goes on with, as that of a snapshot which is loaded several times.

use coracle_storage::backend::Parting;
use coracle_storage::lease::{LeaseError, Lock, Terms};
use coracle_storage::nfs::NfsError;
use coracle_storage::nfs::v4::Operation as Call;
use coracle_storage::reactor::Patience;
use coracle_storage::request::{Operation, Space};
use coracle_storage::sim::dice::Dice;
use coracle_storage::sim::initiator;
use coracle_storage::sim::nfs::options::Options;
use coracle_storage::sim::reactor::Faults;

use super::site::{IMAGE, MEANS, Site, expected};
use crate::lane::{Excuse, Guest, Lane};
use crate::life::{FLUSH, RAISE};
use crate::passing::{drain, step};
use crate::workload::Wish;

const CONTENT: [u8; 4096] = [0x5a; 4096];

/// Nobody raises the generation but who is asked to, and whoever remembers an older one is refused.
pub(crate) fn check() {
    let mut rig = Rig::new();
    let first = rig.open();
    rig.release(first);
    let kept = rig.keep(1, "kept").expect("nothing has been written since");
    rig.release(kept);
    let mut raising = rig.keep(1, "raising").expect("nothing has been written since");
    rig.raise(&mut raising);
    assert_eq!(raising.generation(), 2);
    rig.release(raising);
    let before = rig.site.server.names();
    rig.is_refused(
        1,
        "it was of generation 1 then, and is of 2 now: written by VM `raising`",
    );
    assert_eq!(rig.site.server.names(), before, "a record was made or removed");
    let lockers = rig.site.server.lockers(IMAGE);
    assert!(lockers.is_empty(), "a lock is left behind: {lockers:?}");
    assert_eq!(rig.keep(2, "last").unwrap().generation(), 2);
}

/// A step that was torn has not happened.
pub(crate) fn check_torn() {
    let mut rig = Rig::new();
    let first = rig.open();
    rig.release(first);
    rig.tear(3);
    rig.tear(4);
    let mut kept = rig.keep(1, "kept").expect("nothing has been written since");
    assert_eq!(kept.generation(), 1);
    rig.raise(&mut kept);
    rig.release(kept);
    rig.tear(8);
    rig.is_refused(1, "it was of generation 1 then, and is of 2 now");
    rig.site.server.add(&record(20), b"");
    rig.is_refused(2, "nothing says of which it is now");
}

/// Zeros whose space is to stay are written, also when a server has forgotten them; others are freed.
pub(crate) fn check_space() {
    for (space, frees) in [(Space::Stays, 0), (Space::MayBeFreed, 2)] {
        let frees_ranges = |rig: &Rig| !rig.site.is_of_version("4.1");
        let mut rig = (0..).map(Rig::of).find(frees_ranges).unwrap();
        let mut lane = rig.open();
        let before = rig.site.server.asked(Call::DEALLOCATE);
        let zeroes = Wish {
            operation: Operation::WriteZeroes { space },
            len_bytes: 4096,
            ..FLUSH
        };
        lane.ask(zeroes, &mut rig.guest, &mut rig.dice);
        drain(&mut lane, &mut rig.site, &mut rig.guest);
        rig.site.server.crash();
        rig.site.hang_up();
        lane.ask(FLUSH, &mut rig.guest, &mut rig.dice);
        drain(&mut lane, &mut rig.site, &mut rig.guest);
        let freed = rig.site.server.asked(Call::DEALLOCATE) - before;
        assert_eq!(freed, frees, "{space:?}");
        assert_eq!(rig.site.server.durable(IMAGE), [0; 4096]);
        rig.release(lane);
    }
}

/// Records in a directory of the host.
pub(crate) fn check_elsewhere() {
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path().join("image");
    let mut rig = Rig::new();
    let owner = initiator::owner("vm", &mut rig.dice);
    let terms = Terms {
        at: at.to_str(),
        ..Terms::new(Lock::Exclusive, &owner)
    };
    let io = rig.site.host(Faults::default(), &mut rig.dice);
    let disk = expected(rig.site.open_on(io.clone(), &terms, MEANS));
    let mut lane = Lane::new(disk, io);
    rig.raise(&mut lane);
    assert_eq!(lane.generation(), 2);
    rig.site.hang_up();
    rig.raise(&mut lane);
    assert_eq!(lane.generation(), 3);
    rig.release(lane);
}

struct Rig {
    site: Site,
    guest: Guest,
    dice: Dice,
}

impl Rig {
    fn new() -> Self {
        Self::of(0)
    }

    fn of(seed: u64) -> Self {
        let mut dice = Dice::new(seed);
        Self {
            site: Site::with(Options::default(), &CONTENT, &mut dice),
            guest: Guest::new(&CONTENT, Excuse::Nothing),
            dice,
        }
    }

    fn open(&mut self) -> Lane {
        let io = self.site.host(Faults::default(), &mut self.dice);
        let owner = initiator::owner("first", &mut self.dice);
        let disk = expected(self.site.open(io.clone(), Lock::Exclusive, &owner, MEANS));
        Lane::new(disk, io)
    }

    fn keep(&mut self, generation: u64, vm: &str) -> Result<Lane, NfsError> {
        let io = self.site.host(Faults::default(), &mut self.dice);
        let owner = initiator::owner(vm, &mut self.dice);
        let disk = self.site.keep(io.clone(), &owner, generation)?;
        Ok(Lane::new(disk, io))
    }

    fn is_refused(&mut self, generation: u64, says: &str) {
        let refused = self
            .keep(generation, "late")
            .err()
            .expect("it has been written since");
        let is_overtaken = matches!(refused, NfsError::Lease(LeaseError::Overtaken { .. }));
        assert!(is_overtaken && refused.to_string().contains(says), "{refused}");
    }

    fn raise(&mut self, lane: &mut Lane) {
        lane.ask(RAISE, &mut self.guest, &mut self.dice);
        drain(lane, &mut self.site, &mut self.guest);
    }

    fn release(&mut self, mut lane: Lane) {
        lane.image.detach(Parting::Ends, &mut lane.io);
        while lane.image.is_attached() {
            step(&mut lane, &mut self.site, &mut self.guest, Patience::UntilEvent);
        }
    }

    /// Leaves what a server does that dies while a step is made, which is the next one.
    fn tear(&self, number: u64) {
        assert!(self.site.server.names().contains(&record(number - 1)));
        self.site.server.add(&record(number), b"");
    }
}

fn record(number: u64) -> String {
    format!("{IMAGE}.lease.{number}")
}
