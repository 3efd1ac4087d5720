//! An overlay on a base with operations, an alarm and an end of its own.

use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::*;
use crate::backend::Parting;
use crate::reactor::{ImageFile, SocketOp};

const SOCKET: FileSlot = FileSlot(0);
const RECEIVE: Token = Token(5);
const CANCEL: Token = Token(6);

/// A base whose requests end whenever a receive does.
#[derive(Default)]
struct Remote {
    seen: Vec<&'static str>,
    is_attached: bool,
    alarm: Option<Instant>,
    loss: Option<&'static str>,
    accepted: VecDeque<Request>,
    ended: VecDeque<Completion>,
}

#[derive(Clone, Default)]
struct Base(Arc<Mutex<Remote>>);

impl Base {
    fn state(&self) -> MutexGuard<'_, Remote> {
        self.0.lock().unwrap()
    }
}

impl Remote {
    fn receive(io: &mut dyn Submit) {
        let operation = SocketOp::Receive {
            segments: std::ptr::null(),
            segment_count: 0,
        };
        let file = SOCKET;
        io.submit(KernelOp::Socket { file, operation }, RECEIVE).unwrap();
    }

    fn end_all(&mut self) {
        let completed = self.accepted.drain(..).map(|request| Completion {
            request,
            outcome: Ok(()),
        });
        self.ended.extend(completed);
    }
}

impl Backend for Base {
    fn geometry(&self) -> Geometry {
        Geometry {
            size_bytes: SIZE_BYTES,
            logical_block_bytes: 512,
            physical_block_bytes: 4096,
            access: Access::ReadOnly,
            discard: Discard::Ignored,
        }
    }

    fn files(&self) -> Vec<ImageFile> {
        vec![0.into(), 1.into()]
    }

    fn start(&mut self, request: Request, _: &mut dyn Submit) -> Step {
        self.state().accepted.push_back(request);
        Step::Pending
    }

    fn resume(&mut self, event: Event, io: &mut dyn Submit) -> Step {
        let mut state = self.state();
        match event.token {
            RECEIVE if event.result == -libc::ECANCELED => {
                state.is_attached = false;
                state.seen.push("cancelled");
            }
            RECEIVE => {
                Remote::receive(io);
                state.end_all();
            }
            CANCEL => {}
            other => panic!("{other:?} is not the base's"),
        }
        state.ended.pop_front().map_or(Step::Pending, Step::Done)
    }

    fn fork(&self) -> Option<Box<dyn Backend>> {
        None
    }

    fn next_completion(&mut self) -> Option<Completion> {
        self.state().ended.pop_front()
    }

    fn in_flight(&self) -> usize {
        let state = self.state();
        state.accepted.len() + state.ended.len()
    }

    fn attach(&mut self, io: &mut dyn Submit) {
        self.state().is_attached = true;
        Remote::receive(io);
    }

    fn detach(&mut self, parting: Parting, io: &mut dyn Submit) {
        assert_eq!(parting, Parting::Ends);
        let operation = SocketOp::Cancel { target: RECEIVE };
        let file = SOCKET;
        io.submit(KernelOp::Socket { file, operation }, CANCEL).unwrap();
    }

    fn is_attached(&self) -> bool {
        self.state().is_attached
    }

    fn alarm(&self) -> Option<Instant> {
        self.state().alarm
    }

    fn wake(&mut self, _: &mut dyn Submit) {
        let mut state = self.state();
        state.alarm = None;
        state.end_all();
    }

    fn loss(&self) -> Option<&str> {
        self.state().loss
    }
}

fn on(base: &Base) -> (Overlay, Asked) {
    let identity = BaseIdentity {
        path: "base".to_owned(),
        size_bytes: SIZE_BYTES,
        fingerprint: 0,
    };
    let header = Header::new(SIZE_BYTES, identity).unwrap();
    let store = Arc::new(tempfile::tempfile().unwrap());
    let mut overlay = Overlay::new(Box::new(base.clone()), store, header, &[], Lifetime::Temporary);
    let mut kernel = Asked::default();
    overlay.attach(&mut kernel);
    (overlay, kernel)
}

/// Ends the base's receive, which is the oldest operation of a socket; returns the tags of all that ended.
fn receive(overlay: &mut Overlay, kernel: &mut Asked, result: i32) -> Vec<u64> {
    let is_receive = |op: &KernelOp| {
        matches!(
            op,
            KernelOp::Socket {
                file: SOCKET,
                operation: SocketOp::Receive { .. }
            }
        )
    };
    let at = kernel.ops.iter().position(|(op, _)| is_receive(op)).unwrap();
    let (_, token) = kernel.ops.remove(at).unwrap();
    let first = match overlay.resume(Event { token, result }, kernel) {
        Step::Done(completion) => Some(completion),
        _ => None,
    };
    let others = std::iter::from_fn(|| overlay.next_completion());
    first
        .into_iter()
        .chain(others)
        .map(|completion| completion.request.tag)
        .collect()
}

#[test]
fn an_event_of_the_bases_own_reaches_it_and_ends_every_request_that_waited() {
    let base = Base::default();
    let (mut overlay, mut kernel) = on(&base);
    assert!(overlay.is_attached());
    for tag in [1, 2, 3] {
        start(&mut overlay, &mut kernel, request(tag, Operation::Read, 0, 4096));
    }
    assert_eq!(kernel.ops.len(), 1, "the base asks for one receive");
    assert_eq!(receive(&mut overlay, &mut kernel, 10), [1, 2, 3]);
}

#[test]
fn what_follows_an_event_of_the_base_does_not_wait_for_the_next_one() {
    let base = Base::default();
    let (mut overlay, mut kernel) = on(&base);
    start(&mut overlay, &mut kernel, request(1, Operation::Write, 512, 512));
    assert_eq!(base.in_flight(), 1, "part of a cluster is filled from the base");
    assert!(receive(&mut overlay, &mut kernel, 10).is_empty());
    let written = kernel
        .ops
        .iter()
        .find(|(op, _)| !matches!(op, KernelOp::Socket { .. }));
    let (written, _) = written.expect("the cluster is written at once, beside the next receive");
    assert!(
        matches!(
            written,
            KernelOp::Write {
                file: FileSlot(2),
                ..
            }
        ),
        "{written:?}"
    );
}

#[test]
fn an_alarm_of_the_base_wakes_it_and_what_ends_by_it_is_told() {
    let base = Base::default();
    let (mut overlay, mut kernel) = on(&base);
    start(&mut overlay, &mut kernel, request(1, Operation::Read, 0, 4096));
    let alarm = Instant::now() + Duration::from_secs(5);
    base.state().alarm = Some(alarm);
    assert_eq!(overlay.alarm(), Some(alarm));
    overlay.wake(&mut kernel);
    assert_eq!(overlay.next_completion().unwrap().request.tag, 1);
    assert_eq!(overlay.alarm(), None);
}

#[test]
fn a_base_that_cancels_its_receive_is_understood() {
    let base = Base::default();
    let (mut overlay, mut kernel) = on(&base);
    let (_, receive_token) = *kernel.ops.front().unwrap();
    overlay.detach(Parting::Ends, &mut kernel);
    let (op, _) = *kernel.ops.back().unwrap();
    let KernelOp::Socket {
        file: SOCKET,
        operation: SocketOp::Cancel { target },
    } = op
    else {
        panic!("{op:?}");
    };
    assert_eq!(
        target, receive_token,
        "the reactor knows the receive by this token"
    );
    receive(&mut overlay, &mut kernel, -libc::ECANCELED);
    assert_eq!(base.state().seen, ["cancelled"]);
    assert!(!overlay.is_attached());
}

#[test]
fn an_overlay_whose_base_is_lost_takes_nothing_and_is_lost_once_its_own_file_is_still() {
    let base = Base::default();
    let (mut overlay, mut kernel) = on(&base);
    start(&mut overlay, &mut kernel, request(1, Operation::Write, 0, 4096));
    start(&mut overlay, &mut kernel, request(2, Operation::Read, 8192, 4096));
    base.state().loss = Some("host-b has it");
    assert_eq!(overlay.loss(), None, "a write to its own file is in flight");
    let step = overlay.start(request(3, Operation::Read, 0, 4096), &mut kernel);
    assert!(matches!(step, Step::Busy(_)), "{step:?}");
    let at = kernel
        .ops
        .iter()
        .position(|(op, _)| matches!(op, KernelOp::Write { .. }));
    let (_, token) = kernel.ops.remove(at.unwrap()).unwrap();
    let written = overlay.resume(Event { token, result: 4096 }, &mut kernel);
    assert!(matches!(written, Step::Done(_)), "{written:?}");
    assert_eq!(overlay.loss(), Some("host-b has it"));
    assert_eq!(
        overlay.in_flight(),
        1,
        "the read of the base stays in flight for good"
    );
}
