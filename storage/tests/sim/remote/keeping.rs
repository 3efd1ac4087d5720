//! One unit that one owner after the other goes on with, as that of a snapshot which is loaded several times.

use coracle_storage::backend::Parting;
use coracle_storage::iscsi::IscsiError;
use coracle_storage::lease::{LeaseError, Lock, Terms};
use coracle_storage::reactor::Patience;
use coracle_storage::sim::dice::Dice;
use coracle_storage::sim::initiator;
use coracle_storage::sim::reactor::Faults;

use super::site::{LUN, MEANS, Site, Tail, expected};
use crate::lane::{Excuse, Guest, Lane};
use crate::life::RAISE;
use crate::passing::{drain, step};

const CONTENT: [u8; 4096] = [0; 4096];

/// Nobody raises the generation but who is asked to, and whoever remembers an older one is refused.
pub(crate) fn check() {
    let mut rig = Rig::new(Tail::Formatted);
    let first = rig.open(Lock::Exclusive);
    rig.release(first);
    let kept = rig.keep(1, "kept").expect("nothing has been written since");
    rig.release(kept);
    let mut raising = rig.keep(1, "raising").expect("nothing has been written since");
    rig.raise(&mut raising);
    assert_eq!(raising.generation(), 2);
    rig.release(raising);
    let before = rig.site.target.durable(LUN);
    let refused = rig.keep(1, "late").err().expect("it has been written since");
    let is_overtaken = matches!(refused, IscsiError::Lease(LeaseError::Overtaken { .. }));
    let says = "it was of generation 1 then, and is of 2 now: written by VM `raising`";
    assert!(is_overtaken && refused.to_string().contains(says), "{refused}");
    assert!(rig.site.target.durable(LUN) == before, "the unit was changed");
    rig.is_untouched();
    assert_eq!(rig.keep(2, "last").unwrap().generation(), 2);
}

/// Without records nobody knows of which generation a unit is, and none is raised.
pub(crate) fn check_unrecorded() {
    let mut rig = Rig::new(Tail::None);
    let refused = rig.keep(1, "vm").err().expect("nothing says what it is");
    let is_forgotten = matches!(refused, IscsiError::Lease(LeaseError::Forgotten { .. }));
    assert!(is_forgotten, "{refused}");
    rig.is_untouched();
    for lock in [Lock::Exclusive, Lock::None] {
        let mut lane = rig.open(lock);
        lane.ask(RAISE, &mut rig.guest, &mut rig.dice);
        assert_eq!(lane.outstanding(), 0, "there is nothing to be raised");
        rig.release(lane);
    }
}

/// Records in a directory of the host.
pub(crate) fn check_elsewhere() {
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path().join("image");
    let mut rig = Rig::new(Tail::None);
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
    fn new(tail: Tail) -> Self {
        let mut dice = Dice::new(0);
        Self {
            site: Site::new(&CONTENT, tail, &mut dice),
            guest: Guest::new(&CONTENT, Excuse::Nothing),
            dice,
        }
    }

    fn open(&mut self, lock: Lock) -> Lane {
        let io = self.site.host(Faults::default(), &mut self.dice);
        let owner = initiator::owner("first", &mut self.dice);
        let disk = expected(self.site.open(io.clone(), lock, &owner, MEANS));
        Lane::new(disk, io)
    }

    fn keep(&mut self, generation: u64, vm: &str) -> Result<Lane, IscsiError> {
        let io = self.site.host(Faults::default(), &mut self.dice);
        let owner = initiator::owner(vm, &mut self.dice);
        let disk = self.site.keep(io.clone(), &owner, generation)?;
        Ok(Lane::new(disk, io))
    }

    fn is_untouched(&self) {
        let target = &self.site.target;
        assert_eq!((target.held(LUN), target.keys(LUN)), (None, Vec::new()));
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
}
