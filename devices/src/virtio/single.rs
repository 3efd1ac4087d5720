//! The loop of a worker with one queue.

use std::time::{Duration, Instant};

use super::device::{ActiveQueue, Interrupt, Session};
use super::service::Mailbox;
use crate::wait::wait;

/// What a worker that has served what it could waits for, besides its mailbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Nothing: there is more.
    More,
    /// The guest's kick.
    Kick,
    /// The rate limiter.
    Tokens(Instant),
    /// A reset: the ring is broken. There is no other turn before.
    Reset,
}

/// What differs between them.
pub(super) trait Single {
    /// How long a worker waits at most for a kick or a reset, if not for ever.
    const LOOK_PERIOD: Option<Duration> = None;

    /// Takes a few requests off the ring, and pushes what it has answered: so long a stop waits.
    fn turn(&mut self, mailbox: &Mailbox, queue: &mut ActiveQueue) -> Next;

    /// Looks at what there is beside the queue, before each turn, and whenever a turn would be if the ring were not broken.
    fn look(&mut self, _interrupt: &Interrupt) {}

    /// Has waited for `next`, or something else has come: a nudge, a recall, or [`Self::LOOK_PERIOD`].
    fn has_waited(&mut self, _next: Next) {}
}

/// Serves the first queue of `session` until that is recalled.
///
/// ```text
///   look ──► turn ──► publish, interrupt ──► wait for a kick, for tokens, or for a reset ──► look
/// ```
pub(super) fn serve(worker: &mut impl Single, mailbox: &Mailbox, session: &mut Session) {
    let Session {
        queues, interrupt, ..
    } = session;
    let Some(Some(queue)) = queues.first_mut() else {
        return;
    };
    let mut is_broken = false;
    while !mailbox.is_recalled() {
        worker.look(interrupt);
        let next = if is_broken {
            Next::Reset
        } else {
            turn(worker, mailbox, queue, interrupt)
        };
        is_broken = next == Next::Reset;
        wait_for(worker, mailbox, queue, next);
    }
}

fn turn(worker: &mut impl Single, mailbox: &Mailbox, queue: &mut ActiveQueue, interrupt: &Interrupt) -> Next {
    let next = worker.turn(mailbox, queue);
    queue.ring.publish();
    if queue.ring.needs_interrupt() {
        interrupt.used_buffer();
    }
    match next {
        Next::Kick if queue.ring.enable_kicks() => Next::More,
        Next::Reset => {
            interrupt.device_needs_reset();
            next
        }
        _ => next,
    }
}

fn wait_for<W: Single>(worker: &mut W, mailbox: &Mailbox, queue: &ActiveQueue, next: Next) {
    match next {
        Next::More => return,
        Next::Kick => wait(&[mailbox.wake(), &queue.kick], W::LOOK_PERIOD),
        Next::Tokens(at) => {
            let pause = at.saturating_duration_since(Instant::now());
            wait(&[mailbox.wake()], Some(pause));
        }
        Next::Reset => wait(&[mailbox.wake()], W::LOOK_PERIOD),
    }
    worker.has_waited(next);
}
