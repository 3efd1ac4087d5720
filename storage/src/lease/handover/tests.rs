//! Every order in which two owners of two images can make their steps, with either of them killed or frozen between any two.
#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

use std::fs;
use std::path::Path;

use super::*;
use crate::backend::Access;
use crate::lease::{Chain, Lock, Owner, Succession, Terms};
use crate::open::{Image, OpenError, open};

/// What becomes of an owner between two of its steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Lives,
    /// Until the other side has done all it can.
    Freezes,
    Dies,
}

#[derive(Clone, Copy, Debug)]
struct Schedule {
    /// How many of its steps the new owner has made when the old one cancels.
    cancel_at: usize,
    /// And when it reclaims, if it comes to that.
    reclaim_at: usize,
    /// After how many steps something becomes of the new owner, and what.
    fate: (usize, Fate),
    /// Whether the old owner dies in place of opposing.
    old_dies: bool,
}

/// The steps of a new owner: takes one image, takes the other, starts the other, starts the first.
const STEPS: usize = 4;

struct Rig {
    _directory: tempfile::TempDir,
    lead: String,
    other: String,
}

impl Rig {
    fn new() -> Self {
        let in_memory = Path::new("/dev/shm");
        let directory = tempfile::tempdir_in(if in_memory.is_dir() {
            in_memory
        } else {
            Path::new("/tmp")
        });
        let directory = directory.unwrap();
        let image = |name: &str| {
            let path = directory.path().join(name);
            fs::write(&path, [0; 512]).unwrap();
            path.to_str().unwrap().to_owned()
        };
        Self {
            lead: image("lead"),
            other: image("other"),
            _directory: directory,
        }
    }
}

fn machine(vm: &str, life: u64) -> Owner {
    Owner {
        incarnation: Incarnation::simulated(0, life),
        ..Owner::of_this_process(vm)
    }
}

fn taken(path: &str, owner: &Owner, succession: Succession) -> Result<Image, OpenError> {
    let terms = Terms {
        succession,
        ..Terms::new(Lock::Exclusive, owner)
    };
    open(path, Access::ReadWrite, &terms)
}

/// What is left of the lease of a process that was killed: its records.
fn kill(image: Image) {
    let Image { backend, hold } = image;
    hold.fall();
    drop(backend);
    std::mem::forget(hold);
}

/// The side that takes over.
struct New {
    owner: Owner,
    offers: [Offer; 2],
    images: Vec<Image>,
    made: usize,
    runs: bool,
    has_failed: bool,
}

impl New {
    fn step(&mut self, rig: &Rig) {
        if self.has_failed || self.runs {
            return;
        }
        let take = |path: &str, offer| taken(path, &self.owner, Succession::TakesOver(offer));
        let [lead, other] = self.offers;
        let done = match self.made {
            0 => take(&rig.lead, lead).map(|image| self.images.push(image)),
            1 => take(&rig.other, other).map(|image| self.images.push(image)),
            2 => start(self.images.get_mut(1).unwrap()),
            _ => start(self.images.get_mut(0).unwrap()).map(|()| self.runs = true),
        };
        self.made += 1;
        if done.is_err() {
            self.has_failed = true;
            self.images.clear();
        }
    }

    fn go_on(&mut self, rig: &Rig, until: usize) {
        while self.made < until && !self.has_failed && !self.runs {
            self.step(rig);
        }
    }
}

fn start(image: &mut Image) -> Result<(), OpenError> {
    image.hold.begin_raise(&|| ())?;
    image.hold.settle()
}

/// What the old owner comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Old {
    Runs,
    Retired,
    /// It waits for a fence to come down.
    Waits,
}

fn settled_by_old(images: &mut [Image; 2], contest: &Contest, new: Incarnation) -> Old {
    if *contest != Contest::Won {
        return Old::Retired;
    }
    let mut old = Old::Runs;
    for image in images {
        match image.hold.take_back(Some(new)).unwrap() {
            TakenBack::Done => {}
            TakenBack::Fenced => old = Old::Waits,
            TakenBack::Gone(record) => panic!("{record}"),
        }
    }
    old
}

/// The old owner hears nothing, and opposes.
fn opposes(
    schedule: Schedule,
    rig: &Rig,
    old: &mut [Image; 2],
    new: &mut New,
    kill_new: impl Fn(&mut New),
) -> Old {
    let (fated_at, fate) = schedule.fate;
    let limit = if fate == Fate::Lives { STEPS } else { fated_at };
    let incarnation = new.owner.incarnation;
    let mut contest = old[0].hold.oppose(Opposition::Cancel).unwrap();
    if let Contest::Taken(record) = contest {
        assert_eq!(record.owner, new.owner);
        new.go_on(rig, schedule.reclaim_at.min(limit));
        kill_new(new);
        contest = old[0].hold.oppose(Opposition::Reclaim).unwrap();
    }
    let mut outcome = settled_by_old(old, &contest, incarnation);
    assert!(!(outcome == Old::Runs && new.runs), "{schedule:?}: both run");
    // What was frozen goes on, and finds that it has lost, or won.
    new.go_on(rig, if fate == Fate::Dies { limit } else { STEPS });
    kill_new(new);
    if outcome == Old::Waits {
        outcome = settled_by_old(old, &Contest::Won, incarnation);
        assert_eq!(outcome, Old::Runs, "{schedule:?}: the new owner keeps its fence");
    }
    assert!(!(outcome == Old::Runs && new.runs), "{schedule:?}: both run");
    if outcome == Old::Runs {
        // It can write, and end properly.
        for image in old {
            start(image).unwrap();
        }
    }
    outcome
}

fn run(schedule: Schedule) {
    let rig = Rig::new();
    let old_owner = machine("vm", 1);
    let mut old: [Image; 2] =
        [&rig.lead, &rig.other].map(|path| taken(path, &old_owner, Succession::Raises).unwrap());
    let offers = [0, 1].map(|at| old.get(at).unwrap().hold.offer().unwrap());
    for image in &mut old {
        image.hold.yield_fence().unwrap();
    }
    let mut new = New {
        owner: machine("vm", 2),
        offers,
        images: Vec::new(),
        made: 0,
        runs: false,
        has_failed: false,
    };
    let (fated_at, fate) = schedule.fate;
    let limit = if fate == Fate::Lives { STEPS } else { fated_at };
    new.go_on(&rig, schedule.cancel_at.min(limit));
    let mut outcome = Old::Retired;
    let kill_new = |new: &mut New| {
        if fate == Fate::Dies && new.made >= limit {
            new.images.drain(..).for_each(kill);
            new.has_failed = true;
        }
    };
    kill_new(&mut new);
    if schedule.old_dies {
        old.into_iter().for_each(kill);
        new.go_on(&rig, limit);
        kill_new(&mut new);
    } else {
        outcome = opposes(schedule, &rig, &mut old, &mut new, kill_new);
        drop(old);
    }
    let runs = outcome == Old::Runs || new.runs;
    let was_killed = fate == Fate::Dies;
    assert!(
        runs || was_killed || schedule.old_dies,
        "{schedule:?}: nobody runs"
    );
    drop(new);
    for path in [&rig.lead, &rig.other] {
        // Whatever is left, a fresh start can have it.
        let fresh = taken(path, &machine("vm", 3), Succession::Raises);
        let newest = Chain::of(Path::new(path)).unwrap().newest().unwrap();
        assert!(fresh.is_ok(), "{schedule:?}: {:?}, {newest:?}", fresh.err());
    }
}

#[test]
fn at_most_one_owner_runs_in_any_order_of_steps_and_one_does_if_nobody_dies() {
    for cancel_at in 0..=STEPS {
        for reclaim_at in cancel_at..=STEPS {
            for fated_at in 0..=STEPS {
                for fate in [Fate::Lives, Fate::Freezes, Fate::Dies] {
                    for old_dies in [false, true] {
                        run(Schedule {
                            cancel_at,
                            reclaim_at,
                            fate: (fated_at, fate),
                            old_dies,
                        });
                    }
                }
            }
        }
    }
}

#[test]
fn what_was_taken_by_a_stranger_is_gone() {
    let rig = Rig::new();
    let mut old = taken(&rig.lead, &machine("vm", 1), Succession::Raises).unwrap();
    let offer = old.hold.offer().unwrap();
    old.hold.yield_fence().unwrap();
    let stranger = taken(&rig.lead, &machine("stranger", 3), Succession::Raises).unwrap();
    assert!(matches!(
        old.hold.oppose(Opposition::Reclaim).unwrap(),
        Contest::Gone(record) if record.owner.vm == "stranger"
    ));
    let refused = taken(&rig.lead, &machine("vm", 2), Succession::TakesOver(offer))
        .err()
        .unwrap();
    assert!(
        refused.to_string().contains("but held by VM `stranger`"),
        "{refused}"
    );
    drop(old);
    drop(stranger);
}

#[test]
fn a_step_that_is_made_twice_is_made_once() {
    let rig = Rig::new();
    let mut old = taken(&rig.lead, &machine("vm", 1), Succession::Raises).unwrap();
    old.hold.yield_fence().unwrap();
    for _ in 0..2 {
        assert_eq!(old.hold.oppose(Opposition::Cancel).unwrap(), Contest::Won);
    }
    assert_eq!(old.hold.take_back(None).unwrap(), TakenBack::Done);
    let newest = Chain::of(Path::new(&rig.lead))
        .unwrap()
        .newest()
        .unwrap()
        .unwrap();
    assert_eq!(
        (newest.epoch, newest.generation, newest.phase),
        (2, 1, Phase::Cancelled)
    );
    assert_eq!(old.hold.offer(), Some(newest.offer()));
}
