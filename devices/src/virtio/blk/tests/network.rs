//! The worker of an image with operations of its own: it arrives, is woken, is lost and leaves, on a clock of the test's.

use std::collections::VecDeque;
use std::os::fd::RawFd;

use coracle_storage::backend::Parting;
use coracle_storage::changes::{BLOCK_BYTES, Changes};
use coracle_storage::reactor::{FileSlot, Full, ImageFile, KernelOp, Patience, Reactor, Token, Wake};
use coracle_storage::request::{Completion, Operation};

use super::super::cache::WriteCache;
use super::super::lane::Drive;
use super::super::loss::LossSignal;
use super::super::mailbox::{Call, Command, Mailbox, ReplaceReply, StopAnswer, StopCall};
use super::super::worker::{Life, Worker};
use super::*;
use crate::complaints::Complaints;
use crate::virtio::device::{ActiveQueue, Interrupt, Notice, Session};
use crate::virtio::testing::memory;

const DRAIN_MS: u64 = 1_000;

/// What an image does when it is asked to leave.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Leaves {
    #[default]
    AtOnce,
    /// When its last operation has ended.
    Later,
    /// Only by force.
    ByForce,
    Never,
}

/// What an image was asked, and what the test has set up for it.
#[derive(Default)]
struct Remote {
    seen: Vec<&'static str>,
    is_attached: bool,
    leaves: Leaves,
    flushes_at_end: bool,
    alarm: Option<Instant>,
    loss: Option<String>,
    accepted: Vec<Request>,
    ended: VecDeque<Completion>,
}

/// A request never ends by itself: the test lets it.
#[derive(Clone, Default)]
struct Fake(Arc<Mutex<Remote>>);

impl Fake {
    fn leaving(leaves: Leaves) -> Self {
        let fake = Self::default();
        fake.state().leaves = leaves;
        fake
    }

    fn state(&self) -> std::sync::MutexGuard<'_, Remote> {
        self.0.lock().unwrap()
    }

    fn seen(&self) -> Vec<&'static str> {
        self.state().seen.clone()
    }

    /// Everything accepted ends with the next event.
    fn end_all(&self) {
        let mut state = self.state();
        let ended: Vec<_> = state.accepted.drain(..).collect();
        let completed = ended.into_iter().map(|request| Completion {
            request,
            outcome: Ok(()),
        });
        state.ended.extend(completed);
    }
}

impl Backend for Fake {
    fn geometry(&self) -> Geometry {
        Geometry {
            size_bytes: IMAGE_BYTES,
            logical_block_bytes: 512,
            physical_block_bytes: 512,
            access: Access::ReadWrite,
            discard: Discard::Ignored,
        }
    }

    fn files(&self) -> Vec<ImageFile> {
        self.state().seen.push("files");
        Vec::new()
    }

    fn start(&mut self, request: Request, _: &mut dyn Submit) -> Step {
        let mut state = self.state();
        if request.operation == Operation::Flush {
            state.seen.push("flush");
        }
        state.accepted.push(request);
        Step::Pending
    }

    fn resume(&mut self, event: Event, _: &mut dyn Submit) -> Step {
        let mut state = self.state();
        if event.result < 0 {
            state.is_attached = false;
        }
        state.ended.pop_front().map_or(Step::Pending, Step::Done)
    }

    fn fork(&self) -> Option<Box<dyn Backend>> {
        None
    }

    fn next_completion(&mut self) -> Option<Completion> {
        self.state().ended.pop_front()
    }

    fn flushes_at_end(&self) -> bool {
        self.state().flushes_at_end
    }

    fn in_flight(&self) -> usize {
        let state = self.state();
        state.accepted.len() + state.ended.len()
    }

    fn attach(&mut self, io: &mut dyn Submit) {
        let mut state = self.state();
        state.seen.push("attach");
        state.is_attached = true;
        let op = KernelOp::SyncData { file: FileSlot(0) };
        io.submit(op, Token(7)).unwrap();
    }

    fn detach(&mut self, parting: Parting, _: &mut dyn Submit) {
        let mut state = self.state();
        state.seen.push(match parting {
            Parting::Moves => "moves",
            Parting::Ends => "ends",
            Parting::Breaks => "breaks",
        });
        match (parting, state.leaves) {
            (_, Leaves::AtOnce) | (Parting::Breaks, Leaves::ByForce) => state.is_attached = false,
            _ => {}
        }
    }

    fn is_attached(&self) -> bool {
        self.state().is_attached
    }

    fn alarm(&self) -> Option<Instant> {
        self.state().alarm
    }

    fn wake(&mut self, io: &mut dyn Submit) {
        let mut state = self.state();
        state.seen.push("wake");
        state.alarm = None;
        drop(state);
        assert!(io.now() >= *START.get().unwrap());
        self.end_all();
    }

    fn loss(&self) -> Option<&str> {
        // The text of a test's image is forgotten with the test's process.
        self.state().loss.clone().map(|loss| &*loss.leak())
    }
}

static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();

/// A reactor whose clock and events are the test's; a wait without any event would be for ever, and is a failure.
struct Desk {
    now: Instant,
    timer: Option<Instant>,
    wakes: VecDeque<Wake>,
    bells: Vec<(RawFd, Token)>,
}

#[derive(Clone)]
struct Io(Arc<Mutex<Desk>>);

impl Io {
    fn desk(&self) -> std::sync::MutexGuard<'_, Desk> {
        self.0.lock().unwrap()
    }
}

impl Submit for Io {
    fn submit(&mut self, _: KernelOp, _: Token) -> Result<(), Full> {
        Ok(())
    }

    fn now(&self) -> Instant {
        self.desk().now
    }
}

impl Reactor for Io {
    fn register(&mut self, _: &[ImageFile]) -> std::io::Result<()> {
        Ok(())
    }

    fn watch(&mut self, eventfd: RawFd, token: Token) -> std::io::Result<()> {
        self.desk().bells.push((eventfd, token));
        Ok(())
    }

    fn unwatch(&mut self, _: Token) -> std::io::Result<()> {
        Ok(())
    }

    fn set_timer(&mut self, deadline: Option<Instant>) {
        self.desk().timer = deadline;
    }

    fn wait(&mut self, patience: Patience, wakes: &mut Vec<Wake>) -> std::io::Result<()> {
        let mut desk = self.desk();
        wakes.extend(desk.wakes.drain(..));
        // Time passes a little, and as far as the timer when there is nothing else.
        desk.now += Duration::from_micros(10);
        if wakes.is_empty() && patience == Patience::UntilEvent {
            let timer = desk.timer.take().expect("somebody waits for ever");
            desk.now = desk.now.max(timer);
            wakes.push(Wake::TimerExpired);
        }
        Ok(())
    }
}

/// A worker of a fake image, which the test turns.
struct Bench {
    worker: Worker,
    mailbox: Mailbox,
    io: Io,
    loss: Arc<LossSignal>,
    changes: Arc<Changes>,
    driver: DriverRing,
    requests: u64,
}

impl Bench {
    fn new(image: &Fake) -> Self {
        let start = *START.get_or_init(Instant::now);
        let io = Io(Arc::new(Mutex::new(Desk {
            now: start,
            timer: None,
            wakes: VecDeque::new(),
            bells: Vec::new(),
        })));
        let loss = LossSignal::new("remote").unwrap();
        let changes = Arc::<Changes>::default();
        let drive = Drive {
            io: Box::new(io.clone()),
            image: Box::new(image.clone()),
            limits: Vec::new(),
            cache: Arc::new(WriteCache::new(CacheType::Writeback)),
            metrics: Arc::default(),
            loss: Arc::clone(&loss),
            changes: Arc::clone(&changes),
            serial: [0; 20],
            complaints: Complaints::default(),
        };
        let (mailbox, inbox) = Mailbox::new().unwrap();
        let memory = memory(8 << 20);
        Self {
            worker: Worker::new(drive, inbox, DRAIN_MS)
                .map_err(|born| born.error)
                .unwrap(),
            mailbox,
            io,
            loss,
            changes,
            driver: DriverRing::new(&memory, RING, QUEUE_SIZE),
            requests: 0,
        }
    }

    fn post(&mut self, command: Command) {
        self.mailbox.post(command).unwrap();
        self.io.desk().wakes.push_back(Wake::Signalled(Token(0)));
    }

    /// Lets the worker serve a queue, and gives it one read that stays in flight.
    fn serve(&mut self) {
        let eventfd = || Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let memory = Arc::clone(self.driver.memory());
        let queue = ActiveQueue {
            ring: Virtqueue::new(Arc::clone(&memory), self.driver.layout(), 0).unwrap(),
            kick: eventfd(),
        };
        let session = Session {
            memory,
            features: 0,
            interrupt: Interrupt::new(Arc::default(), eventfd()),
            queues: vec![Some(queue)],
        };
        self.post(Command::Serve(Box::new(session)));
        self.offer();
        self.turn();
    }

    fn offer(&mut self) {
        let at = REQUESTS + self.requests * REQUEST_BYTES;
        self.requests += 1;
        self.driver.write(at, &header(VIRTIO_BLK_T_IN, 0));
        self.driver
            .offer_chain(&[Piece::Readable(at, 16), Piece::Writable(at + DATA, 513)]);
    }

    fn offer_write(&mut self, sector: u64) {
        let at = REQUESTS + self.requests * REQUEST_BYTES;
        self.requests += 1;
        self.driver.write(at, &header(VIRTIO_BLK_T_OUT, sector));
        let pieces = [Piece::Readable(at, 16 + 512), Piece::Writable(at + STATUS, 1)];
        self.driver.offer_chain(&pieces);
    }

    fn turn(&mut self) {
        assert_eq!(self.worker.round(), Life::GoesOn);
    }

    /// An operation of the image's own ends.
    fn event(&mut self, result: i32) {
        let event = Event {
            token: Token(7),
            result,
        };
        self.io.desk().wakes.push_back(Wake::Done(event));
    }

    fn stop(&mut self) -> StopAnswer {
        let (call, answer) = StopCall::new(&Notice::default());
        self.post(Command::Stop(call));
        answer
    }

    fn replace(&mut self, image: &Fake) -> super::super::mailbox::Answer<ReplaceReply> {
        let (call, answer) = Call::new(&Notice::default());
        self.post(Command::Replace(Box::new(image.clone()), call));
        answer
    }

    /// Turns the worker until its thread would end; says how much time that took.
    fn end(&mut self) -> Duration {
        let begun = self.io.desk().now;
        for _ in 0..10_000 {
            if self.worker.round() == Life::Ends {
                return self.io.desk().now - begun;
            }
        }
        panic!("the worker does not end");
    }

    fn elapsed(&self, since: Instant) -> Duration {
        self.io.desk().now - since
    }
}

#[test]
fn an_image_is_attached_once_its_files_are_registered() {
    let image = Fake::default();
    let _bench = Bench::new(&image);
    assert_eq!(image.seen(), ["files", "attach"]);
}

#[test]
fn an_alarm_of_the_image_wakes_the_worker_and_what_ends_by_it_is_answered() {
    let image = Fake::default();
    let mut bench = Bench::new(&image);
    bench.serve();
    assert_eq!(image.in_flight(), 1);
    let due = bench.io.desk().now + Duration::from_secs(5);
    image.state().alarm = Some(due);
    while image.in_flight() > 0 {
        assert_eq!(bench.driver.take_used(), None);
        bench.turn();
    }
    assert!(bench.io.desk().now >= due);
    assert_eq!(image.seen().iter().filter(|seen| **seen == "wake").count(), 1);
    assert!(bench.driver.take_used().is_some());
}

#[test]
fn events_of_the_images_own_end_requests_too() {
    let image = Fake::default();
    let mut bench = Bench::new(&image);
    bench.serve();
    bench.offer();
    bench.turn();
    image.end_all();
    bench.event(0);
    bench.turn();
    assert!(bench.driver.take_used().is_some() && bench.driver.take_used().is_some());
}

#[test]
fn a_worker_that_is_retired_flushes_then_lets_the_image_end_in_good_order() {
    let image = Fake::leaving(Leaves::Later);
    image.state().flushes_at_end = true;
    let mut bench = Bench::new(&image);
    bench.post(Command::Retire);
    bench.turn();
    assert_eq!(image.seen(), ["files", "attach", "flush"]);
    image.end_all();
    bench.event(0);
    bench.turn();
    assert_eq!(image.seen(), ["files", "attach", "flush", "ends"]);
    bench.turn();
    bench.event(-libc::ECANCELED);
    assert!(bench.end() < Duration::from_millis(DRAIN_MS));
    assert!(!image.is_attached());
}

#[test]
fn an_image_that_does_not_end_in_time_is_broken_off() {
    for leaves in [Leaves::ByForce, Leaves::Never] {
        let image = Fake::leaving(leaves);
        let mut bench = Bench::new(&image);
        bench.post(Command::Retire);
        let took = bench.end();
        assert_eq!(image.seen(), ["files", "attach", "ends", "breaks"]);
        assert!(took >= Duration::from_millis(DRAIN_MS), "{took:?}");
        assert!(took < Duration::from_millis(DRAIN_MS + 900), "{took:?}");
    }
}

#[test]
fn a_stop_that_comes_while_an_image_has_operations_of_its_own_waits_for_requests_only() {
    let image = Fake::leaving(Leaves::Later);
    let mut bench = Bench::new(&image);
    bench.serve();
    let answer = bench.stop();
    bench.turn();
    assert!(answer.wait(Duration::ZERO).is_none());
    let answer = bench.stop();
    image.end_all();
    bench.event(0);
    bench.turn();
    assert!(matches!(answer.wait(Duration::ZERO), Some(Ok(Ok(Some(_))))));
    assert_eq!(image.seen(), ["files", "attach"], "and it stays attached");
}

#[test]
fn a_replaced_image_has_left_in_good_order_before_the_next_one_arrives() {
    let (old, new) = (Fake::leaving(Leaves::Later), Fake::default());
    let mut bench = Bench::new(&old);
    let answer = bench.replace(&new);
    bench.turn();
    assert_eq!(
        (old.seen(), new.seen()),
        (vec!["files", "attach", "ends"], vec![])
    );
    bench.event(-libc::ECANCELED);
    bench.turn();
    assert_eq!(new.seen(), ["files", "attach"]);
    assert!(matches!(answer.wait(Duration::ZERO), Some(Ok(Ok(_)))));
}

#[test]
fn an_image_that_does_not_leave_is_broken_off_and_replaced_within_the_time_of_the_answer() {
    let (old, new) = (Fake::leaving(Leaves::ByForce), Fake::default());
    let mut bench = Bench::new(&old);
    let begun = bench.io.desk().now;
    let answer = bench.replace(&new);
    while new.seen().is_empty() {
        bench.turn();
    }
    assert_eq!(old.seen(), ["files", "attach", "ends", "breaks"]);
    assert!(bench.elapsed(begun) < Duration::from_millis(2_000));
    assert!(matches!(answer.wait(Duration::ZERO), Some(Ok(Ok(_)))));
}

#[test]
fn a_replacement_that_was_given_up_leaves_the_old_image_attached_again() {
    let (old, new) = (Fake::leaving(Leaves::Later), Fake::default());
    let mut bench = Bench::new(&old);
    let answer = bench.replace(&new);
    bench.turn();
    assert!(answer.wait(Duration::ZERO).is_none());
    // What comes meanwhile is for the image that stays.
    bench.post(Command::Retire);
    bench.turn();
    assert_eq!(old.seen(), ["files", "attach", "ends"]);
    bench.event(-libc::ECANCELED);
    bench.turn();
    assert_eq!(
        old.seen(),
        ["files", "attach", "ends", "files", "attach", "ends"],
        "attached again, and then retired"
    );
    assert_eq!(new.seen(), ["files"], "it was never attached");
}

#[test]
fn a_loss_is_told_once_and_a_stop_of_the_lost_disk_does_not_wait() {
    let image = Fake::leaving(Leaves::Later);
    let mut bench = Bench::new(&image);
    bench.serve();
    image.state().loss = Some("host-b has it".to_owned());
    assert_eq!(bench.loss.reason(), None);
    bench.event(0);
    bench.turn();
    assert_eq!(bench.loss.reason(), Some("host-b has it"));
    let begun = bench.io.desk().now;
    let answer = bench.stop();
    bench.turn();
    let answer = answer.wait(Duration::ZERO);
    assert!(
        matches!(&answer, Some(Ok(Err(StopError::Lost { reason }))) if reason == "host-b has it"),
        "{answer:?}"
    );
    assert!(bench.elapsed(begun) < Duration::from_millis(1));
    // Nothing is taken any more, and nobody looks for it.
    bench.offer();
    bench.event(0);
    bench.turn();
    assert_eq!(image.in_flight(), 1);
}

#[test]
fn a_worker_of_a_lost_disk_ends_at_once_when_it_is_retired() {
    let image = Fake::leaving(Leaves::ByForce);
    let mut bench = Bench::new(&image);
    bench.serve();
    image.state().loss = Some("host-b has it".to_owned());
    bench.event(0);
    bench.turn();
    bench.post(Command::Retire);
    assert!(bench.end() < Duration::from_millis(1));
    assert_eq!(image.seen(), ["files", "attach", "breaks"]);
    assert_eq!(image.in_flight(), 1, "its request is never answered");
}

#[test]
fn a_lost_image_is_not_replaced() {
    let (old, new) = (Fake::default(), Fake::default());
    let mut bench = Bench::new(&old);
    old.state().loss = Some("host-b has it".to_owned());
    bench.event(0);
    bench.turn();
    let answer = bench.replace(&new);
    bench.turn();
    assert!(matches!(answer.wait(Duration::ZERO), Some(Ok(Err(_)))));
    assert!(new.seen().is_empty());
}

#[test]
fn a_write_is_marked_when_it_has_ended_however_often_marks_were_taken_while_it_was_in_flight() {
    let image = Fake::default();
    let mut bench = Bench::new(&image);
    bench.serve();
    bench.offer_write(0);
    bench.turn();
    // One write was in flight before anybody watched.
    let watch = bench.changes.watch(IMAGE_BYTES);
    bench.offer_write(3 * BLOCK_BYTES / 512);
    bench.turn();
    drop([watch.take(), watch.take()]);
    assert!(bench.driver.take_used().is_none(), "nothing has ended");
    image.end_all();
    bench.event(0);
    bench.turn();
    let marked: Vec<_> = watch.take().ranges().collect();
    assert_eq!(
        marked,
        [0..BLOCK_BYTES, 3 * BLOCK_BYTES..4 * BLOCK_BYTES],
        "what was in flight is not sent again"
    );
    assert!(
        bench.driver.take_used().is_some(),
        "it was marked before its guest was told"
    );
}
