#![expect(clippy::unwrap_used, clippy::panic, reason = "a test's panic is its failure")]

use std::net::TcpListener;

use super::*;
use crate::backend::{Backend, Parting, Step};
use crate::iscsi::bringup::Stop;
use crate::lease::Owner;
use crate::plain::Plain;
use crate::reactor::{Patience, Reactor, Submit, Wake};
use crate::request::{Completion, Durability, Operation, Request};
use crate::segments;
use crate::sim::dice::Dice;
use crate::sim::serve::{Served, serve};
use crate::sim::target::options::{Options, Place};
use crate::sim::target::{Redirect, Target, Term};

const BLOCK_BYTES: usize = 512;

/// A target with a disk, number 1, that has a cache and FUA.
fn served() -> Served<Target> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("{},1", listener.local_addr().unwrap());
    let place = Place {
        address,
        ..Place::default()
    };
    let make = move || {
        let options = Options {
            place,
            ..Options::default()
        };
        let target = Target::new(options, Dice::new(1));
        target.add(1, 16 << 20, Access::ReadWrite);
        target
    };
    serve(listener, make).unwrap()
}

fn url(served: &Served<Target>) -> String {
    format!("iscsi://{}/iqn.2026-01.test:t1/1", served.address())
}

fn planned(served: &Served<Target>) -> Arc<Plan> {
    let owner = Owner::of_this_process("vm");
    let terms = Terms::new(Lock::Exclusive, &owner);
    Arc::new(plan(&url(served), Access::ReadWrite, &terms).unwrap().0)
}

#[test]
fn a_session_that_broke_off_before_it_was_up_does_not_take_the_lease_from_the_next() {
    let served = served();
    let plan = planned(&served);
    let (_first, up) = begun(dialogue::plain(), &plan, &Past::default()).unwrap();
    plan.keys.settle(up.tenure.as_ref().unwrap().key);
    let past = Past {
        unit: Some(up.unit),
        tenure: up.tenure,
        strays: false,
    };
    // As far as its PREEMPT, and not as far as its end: the disk still knows the first key only.
    drop(begun(dialogue::plain(), &plan, &past).unwrap());
    let (_third, up) = begun(dialogue::plain(), &plan, &past).unwrap();
    let holder = served.with(|target| target.held(1)).unwrap().0;
    assert_eq!(up.tenure.unwrap().key, ReservationKey(holder));
}

#[test]
fn the_first_session_may_break_off_too_and_another_image_of_the_process_is_still_refused() {
    let served = served();
    let ours = planned(&served);
    drop(begun(dialogue::plain(), &ours, &Past::default()).unwrap());
    let other = planned(&served);
    assert!(matches!(
        begun(dialogue::plain(), &other, &Past::default()),
        Err(IscsiError::Reserved { .. })
    ));
    begun(dialogue::plain(), &ours, &Past::default()).unwrap();
}

#[test]
fn a_target_that_has_no_end_of_questions_does_not_keep_whoever_opens_it() {
    let served = served();
    let plan = planned(&served);
    let begun = std::time::Instant::now();
    let mut dialogue = converse(dialogue::plain(), &plan, Duration::from_millis(300)).unwrap();
    let endless = dialogue.run(|port| {
        let plan = Arc::clone(&plan);
        async move {
            enter(&port, &plan).await?;
            loop {
                let _told = attempt(&port, cdb::test_unit_ready(), Data::None).await;
                port.sleep(Duration::from_millis(10)).await;
            }
            #[expect(unreachable_code, reason = "it says what there would be at the end")]
            Ok::<(), Stop>(())
        }
    });
    assert!(endless.is_err());
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
}

/// A disk in use.
struct Host {
    disk: Disk,
    io: Plain,
}

impl Host {
    fn of(served: &Served<Target>) -> Self {
        let owner = Owner::of_this_process("vm");
        let terms = Terms::new(Lock::None, &owner);
        Self::using(open(&url(served), Access::ReadWrite, &terms).unwrap().disk)
    }

    fn using(mut disk: Disk) -> Self {
        let mut io = Plain::new(16);
        io.register(&disk.files()).unwrap();
        disk.attach(&mut io);
        Self { disk, io }
    }

    /// One request on the first block.
    fn does(&mut self, operation: Operation, durability: Durability, memory: &mut [u8]) -> Completion {
        let segments = match operation {
            Operation::Read | Operation::Write => vec![segments::own(memory)],
            _ => Vec::new(),
        };
        let request = Request {
            tag: 1,
            operation,
            offset_bytes: 0,
            len_bytes: memory.len() as u64,
            durability,
            segments,
        };
        let Step::Pending = self.disk.start(request, &mut self.io) else {
            panic!("it takes at least one exchange");
        };
        loop {
            if let Some(completion) = self.round() {
                return completion;
            }
        }
    }

    fn round(&mut self) -> Option<Completion> {
        let mut wakes = Vec::new();
        self.disk.before_wait(&mut self.io);
        self.io.set_timer(self.disk.alarm());
        self.io.wait(Patience::UntilEvent, &mut wakes).unwrap();
        let mut ended = None;
        for wake in wakes {
            if let Wake::Done(event) = wake
                && let Step::Done(completion) = self.disk.resume(event, &mut self.io)
            {
                ended = Some(completion);
            }
        }
        if self.disk.alarm().is_some_and(|alarm| alarm <= self.io.now()) {
            self.disk.wake(&mut self.io);
        }
        ended.or_else(|| self.disk.next_completion())
    }

    fn reads(&mut self) -> u8 {
        let mut memory = vec![0xee; BLOCK_BYTES];
        let read = self.does(Operation::Read, Durability::Cached, &mut memory);
        assert_eq!(read.outcome, Ok(()));
        *memory.first().unwrap()
    }

    fn writes(&mut self, byte: u8, durability: Durability) {
        let mut memory = vec![byte; BLOCK_BYTES];
        let written = self.does(Operation::Write, durability, &mut memory);
        assert_eq!(written.outcome, Ok(()));
    }
}

#[test]
fn what_was_only_cached_is_not_written_again_over_what_is_durable() {
    let served = served();
    let mut host = Host::of(&served);
    host.writes(1, Durability::Cached);
    host.writes(2, Durability::Durable);
    served.with(Target::restart);
    assert_eq!(host.reads(), 2);
}

#[test]
fn a_lease_is_given_back_though_the_session_that_began_to_breaks_off() {
    let served = served();
    let owner = Owner::of_this_process("vm");
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path().join("disk");
    let terms = Terms {
        at: at.to_str(),
        ..Terms::new(Lock::Exclusive, &owner)
    };
    let disk = open(&url(&served), Access::ReadWrite, &terms).unwrap().disk;
    let mut host = Host::using(disk);
    assert!(served.with(|target| target.held(1)).is_some());
    host.disk.detach(Parting::Ends, &mut host.io);
    // Its first farewell goes to a target that has forgotten it.
    served.with(Target::restart);
    let begun = std::time::Instant::now();
    while host.disk.is_attached() {
        host.round();
        assert!(begun.elapsed() < Duration::from_secs(10), "it never ends");
    }
    assert_eq!(served.with(|target| target.held(1)), None);
    assert_eq!(served.with(|target| target.keys(1)), Vec::<u64>::new());
    assert_eq!(host.disk.loss(), None);
}

#[test]
fn two_targets_that_redirect_to_each_other_are_asked_with_pauses() {
    let served = served();
    let mut host = Host::of(&served);
    host.writes(1, Durability::Cached);
    let address = served.address().to_string();
    served.with(move |target| {
        target.redirect(Some(Redirect {
            address,
            term: Term::Temporarily,
        }));
        target.restart();
    });
    let begun = std::time::Instant::now();
    let mut rounds = 0;
    while begun.elapsed() < Duration::from_secs(1) {
        assert!(host.round().is_none());
        rounds += 1;
    }
    assert!(rounds < 200, "{rounds} rounds in a second");
    served.with(|target| target.redirect(None));
    assert_eq!(host.reads(), 1);
}

#[test]
fn two_disks_of_one_unit_in_one_process_leave_each_other_alone() {
    let served = served();
    served.with(|target| target.adjust(|options| options.quirks.reinstates = true));
    let owner = Owner::of_this_process("vm");
    let terms = Terms::new(Lock::None, &owner);
    let open = || open(&url(&served), Access::ReadOnly, &terms).unwrap().disk;
    let (mut first, mut second) = (Host::using(open()), Host::using(open()));
    for _ in 0..3 {
        first.reads();
        second.reads();
    }
    assert_eq!(served.with(|target| target.sessions().len()), 2);
    assert!(first.disk.loss().is_none() && second.disk.loss().is_none());
}
