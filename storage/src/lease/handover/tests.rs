//! Every order in which two owners of two images can make their steps, with either of them killed or frozen between any two.
#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

mod rig;

use std::fs;
use std::path::Path;

use self::rig::{Held, Kind, Rig};
use super::*;
use crate::lease::{Owner, Succession};
use crate::open::OpenError;

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

fn machine(vm: &str, life: u64) -> Owner {
    Owner {
        incarnation: Incarnation::simulated(life, life),
        ..Owner::of_this_process(vm)
    }
}

/// The side that takes over.
struct New {
    owner: Owner,
    offers: [Offer; 2],
    images: Vec<Held>,
    made: usize,
    runs: bool,
    has_failed: bool,
}

impl New {
    fn step(&mut self, rig: &Rig) {
        if self.has_failed || self.runs {
            return;
        }
        let take = |path: &str, offer| Held::taken(path, &self.owner, Succession::TakesOver(offer));
        let [lead, other] = self.offers;
        let done = match self.made {
            0 => take(&rig.lead, lead).map(|image| self.images.push(image)),
            1 => take(&rig.other, other).map(|image| self.images.push(image)),
            2 => self.images.get_mut(1).unwrap().start(),
            _ => self.images.get_mut(0).unwrap().start().map(|()| self.runs = true),
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

/// What the old owner comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Old {
    Runs,
    Retired,
    /// It waits for a fence to come down.
    Waits,
}

fn settled_by_old(images: &mut [Held; 2], contest: &Contest, new: Incarnation) -> Old {
    if *contest != Contest::Won {
        return Old::Retired;
    }
    let mut old = Old::Runs;
    for image in images {
        match image.take_back(Some(new)) {
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
    old: &mut [Held; 2],
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
            image.start().unwrap();
            image.write().unwrap();
        }
    }
    outcome
}

/// An old owner of both images who stands still, and a new one who has made no step.
fn offered(rig: &Rig) -> ([Held; 2], New) {
    let old_owner = machine("vm", 1);
    let mut old =
        [&rig.lead, &rig.other].map(|path| Held::taken(path, &old_owner, Succession::Raises).unwrap());
    let offers = [0, 1].map(|at| old.get(at).unwrap().hold.offer().unwrap());
    for image in &mut old {
        image.yields();
    }
    let new = New {
        owner: machine("vm", 2),
        offers,
        images: Vec::new(),
        made: 0,
        runs: false,
        has_failed: false,
    };
    (old, new)
}

fn run(kinds: [Kind; 2], schedule: Schedule) {
    let rig = Rig::new(kinds);
    let (mut old, mut new) = offered(&rig);
    let (fated_at, fate) = schedule.fate;
    let limit = if fate == Fate::Lives { STEPS } else { fated_at };
    new.go_on(&rig, schedule.cancel_at.min(limit));
    let mut outcome = Old::Retired;
    let kill_new = |new: &mut New| {
        if fate == Fate::Dies && new.made >= limit {
            new.images.drain(..).for_each(Held::kill);
            rig.bury(&new.owner);
            new.has_failed = true;
        }
    };
    kill_new(&mut new);
    if schedule.old_dies {
        old.into_iter().for_each(Held::kill);
        rig.bury(&machine("vm", 1));
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
    if new.runs {
        for image in &mut new.images {
            image.write().unwrap();
        }
    }
    drop(new);
    for path in [&rig.lead, &rig.other] {
        // Whatever is left, a fresh start can have it.
        if was_killed || schedule.old_dies {
            Rig::free(path);
        }
        let fresh = Held::taken(path, &machine("vm", 3), Succession::Raises);
        assert!(fresh.is_ok(), "{schedule:?}: {:?}", fresh.err());
    }
    assert_eq!(rig.complaints(), Vec::<String>::new(), "{schedule:?}");
}

/// Every order that differs from the others.
fn schedules() -> Vec<Schedule> {
    let mut schedules = Vec::new();
    for cancel_at in 0..=STEPS {
        for reclaim_at in cancel_at..=STEPS {
            for fated_at in 0..=STEPS {
                for fate in [Fate::Lives, Fate::Freezes, Fate::Dies] {
                    for old_dies in [false, true] {
                        let is_said_before =
                            fate == Fate::Lives && fated_at > 0 || old_dies && reclaim_at > cancel_at;
                        if !is_said_before {
                            schedules.push(Schedule {
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
    schedules
}

#[test]
fn at_most_one_owner_runs_in_any_order_of_steps_and_one_does_if_nobody_dies() {
    for schedule in schedules() {
        run([Kind::File, Kind::File], schedule);
    }
}

#[test]
fn so_it_is_with_images_on_a_server() {
    for schedule in schedules() {
        run([Kind::Nfs, Kind::Nfs], schedule);
    }
}

#[test]
fn so_it_is_with_units_of_a_target() {
    for schedule in schedules() {
        run([Kind::Iscsi, Kind::Iscsi], schedule);
    }
}

#[test]
fn so_it_is_with_images_of_two_kinds() {
    let kinds = [Kind::File, Kind::Nfs, Kind::Iscsi];
    let pairs = kinds.map(|lead| kinds.map(|other| [lead, other]));
    let mixed = pairs.as_flattened().iter().filter(|[lead, other]| lead != other);
    for (schedule, pair) in schedules().into_iter().zip(mixed.cycle()) {
        run(*pair, schedule);
    }
}

#[test]
fn a_server_that_restarts_between_any_two_steps_changes_nothing() {
    for restart_at in 0..=STEPS {
        let rig = Rig::new([Kind::Nfs, Kind::Nfs]);
        let (mut old, mut new) = offered(&rig);
        new.go_on(&rig, restart_at);
        rig.restart_server();
        new.go_on(&rig, STEPS);
        assert!(new.runs, "restarted at {restart_at}");
        for image in &mut new.images {
            image.write().unwrap();
        }
        assert!(matches!(
            old[0].hold.oppose(Opposition::Reclaim).unwrap(),
            Contest::Gone(record) if record.phase == Phase::Started
        ));
    }
}

#[test]
fn nor_does_it_keep_the_image_from_an_owner_who_has_it_back() {
    for restart_at in 0..STEPS {
        let rig = Rig::new([Kind::Nfs, Kind::Nfs]);
        let (mut old, mut new) = offered(&rig);
        new.go_on(&rig, restart_at);
        rig.restart_server();
        let mut contest = old[0].hold.oppose(Opposition::Cancel).unwrap();
        if let Contest::Taken(_) = contest {
            contest = old[0].hold.oppose(Opposition::Reclaim).unwrap();
        }
        let mut outcome = settled_by_old(&mut old, &contest, new.owner.incarnation);
        if outcome == Old::Waits {
            outcome = settled_by_old(&mut old, &contest, new.owner.incarnation);
        }
        assert_eq!(outcome, Old::Runs, "restarted at {restart_at}");
        for image in &mut old {
            image.write().unwrap();
        }
        new.go_on(&rig, STEPS);
        assert!(new.has_failed, "restarted at {restart_at}");
    }
}

#[test]
fn what_was_taken_by_a_stranger_is_gone() {
    stranger_takes(Kind::File);
    stranger_takes(Kind::Nfs);
}

fn stranger_takes(kind: Kind) {
    let rig = Rig::new([kind; 2]);
    let mut old = Held::taken(&rig.lead, &machine("vm", 1), Succession::Raises).unwrap();
    let offer = old.hold.offer().unwrap();
    old.yields();
    let stranger = Held::taken(&rig.lead, &machine("stranger", 3), Succession::Raises).unwrap();
    assert!(matches!(
        old.hold.oppose(Opposition::Reclaim).unwrap(),
        Contest::Gone(record) if record.owner.vm == "stranger"
    ));
    let refused = Held::taken(&rig.lead, &machine("vm", 2), Succession::TakesOver(offer))
        .err()
        .unwrap();
    let refused = format!("{refused:?}");
    assert!(
        refused.contains("Withdrawn") && refused.contains("stranger"),
        "{refused}"
    );
    drop(old);
    drop(stranger);
}

#[test]
fn a_step_that_is_made_twice_is_made_once() {
    makes_a_step_twice(Kind::File);
    makes_a_step_twice(Kind::Nfs);
    makes_a_step_twice(Kind::Iscsi);
}

fn makes_a_step_twice(kind: Kind) {
    let rig = Rig::new([kind; 2]);
    let mut old = Held::taken(&rig.lead, &machine("vm", 1), Succession::Raises).unwrap();
    old.yields();
    for _ in 0..2 {
        assert_eq!(old.hold.oppose(Opposition::Cancel).unwrap(), Contest::Won);
    }
    assert_eq!(old.take_back(None), TakenBack::Done);
    let offer = Offer {
        epoch: 2,
        incarnation: machine("vm", 1).incarnation,
    };
    assert_eq!(old.hold.offer(), Some(offer));
}
