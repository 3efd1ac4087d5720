//! Requests that an image on a server has accepted, until they end.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::metrics::SessionMetrics;
use crate::request::{Completion, Failure, Operation, Request};
use crate::slab::Slab;

use super::retained::Retained;

/// What the owner of a disk asks of it, and its guest never does: no command does it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Chore {
    /// The generation is to be raised.
    Raise,
    /// The fence is to come down.
    Yield,
    /// The fence is to be up again.
    TakeBack,
}

impl Chore {
    /// That of a request, if it is one.
    pub(crate) fn of(operation: Operation) -> Option<Self> {
        match operation {
            Operation::Raise => Some(Self::Raise),
            Operation::Yield => Some(Self::Yield),
            Operation::TakeBack => Some(Self::TakeBack),
            _ => None,
        }
    }
}

/// A request, and what it takes to carry it out.
pub(crate) trait Flight {
    /// When it was accepted.
    fn accepted(&self) -> Instant;

    /// What was asked.
    fn request(&self) -> &Request;

    /// The same, at its end.
    fn into_request(self) -> Request;
}

/// All of an image's requests, each in its place.
///
/// ```text
///   accept ──► queued ──pop──► under way ──end──► done ──next_done──►
///                ▲  └───────────── queue ◄──┤
///                └── its time has come ◄── put_off
/// ```
#[derive(Debug)]
pub(crate) struct Flights<F> {
    flights: Slab<Held<F>>,
    /// Room for copies that those have taken which have not ended, in bytes.
    reserved_bytes: u64,
    /// Those whose next step is to be sent.
    queue: VecDeque<usize>,
    /// Those that the server has put off, and until when.
    put_off: Vec<(Instant, usize)>,
    done: VecDeque<Completion>,
    /// How long a request may take before it is reported as failed; for ever if nothing is said.
    report_after: Option<Duration>,
    /// When the last one ended, until somebody asked.
    last_ended: Option<Instant>,
    metrics: Arc<SessionMetrics>,
}

/// A flight, and the room for a copy that it has taken.
#[derive(Debug)]
struct Held<F> {
    flight: F,
    reserved_bytes: u64,
}

impl<F: Flight> Flights<F> {
    /// None yet.
    pub(crate) fn new(report_after: Option<Duration>, metrics: Arc<SessionMetrics>) -> Self {
        Self {
            flights: Slab::with_capacity(64),
            reserved_bytes: 0,
            queue: VecDeque::new(),
            put_off: Vec::new(),
            done: VecDeque::new(),
            report_after,
            last_ended: None,
            metrics,
        }
    }

    /// Takes one, and queues it.
    pub(crate) fn accept(&mut self, flight: F) {
        let place = self.flights.insert(Held {
            flight,
            reserved_bytes: 0,
        });
        self.queue.push_back(place);
    }

    /// The one in this place.
    pub(crate) fn get(&self, place: usize) -> Option<&F> {
        self.flights.get(place).map(|held| &held.flight)
    }

    /// The same, to go on with.
    pub(crate) fn get_mut(&mut self, place: usize) -> Option<&mut F> {
        self.flights.get_mut(place).map(|held| &mut held.flight)
    }

    /// Takes room in `retained` for a copy of what the one in this place writes, until it has ended. Without room it has to wait,
    /// unless nobody else has any: then it is longer than all the room there is. So it does if one before it waits for room, or a
    /// long one would wait for ever among short ones. What it zeroes takes a note only, and waits where there are too many.
    pub(crate) fn takes_room(&mut self, place: usize, retained: &Retained, is_full: bool) -> bool {
        let Some(held) = self.flights.get_mut(place) else {
            return true;
        };
        let request = held.flight.request();
        match request.operation {
            Operation::Write if held.reserved_bytes == 0 => {}
            Operation::Discard | Operation::WriteZeroes { .. } => return retained.takes_notes(),
            _ => return true,
        }
        let room_bytes = Retained::room_of(request.len_bytes);
        let is_alone = retained.is_empty() && self.reserved_bytes == 0;
        let has_room = is_alone || retained.has_room(self.reserved_bytes + room_bytes);
        if is_full || !has_room {
            return false;
        }
        held.reserved_bytes = room_bytes;
        self.reserved_bytes += room_bytes;
        true
    }

    /// Queues one that is under way.
    pub(crate) fn queue(&mut self, place: usize) {
        self.queue.push_back(place);
    }

    /// Queues one that is under way, for later.
    pub(crate) fn put_off(&mut self, place: usize, until: Instant) {
        self.metrics.retries.add(1);
        self.put_off.push((until, place));
    }

    /// How many are queued now.
    pub(crate) fn queued(&self) -> usize {
        self.queue.len()
    }

    /// The next of those that are queued.
    pub(crate) fn pop(&mut self) -> Option<usize> {
        self.queue.pop_front()
    }

    /// Whether nothing is left to be done.
    pub(crate) fn is_empty(&self) -> bool {
        self.flights.is_empty()
    }

    /// How many were accepted and not handed out again.
    pub(crate) fn in_flight(&self) -> usize {
        self.flights.len() + self.done.len()
    }

    /// How many are with the server.
    pub(crate) fn under_way(&self) -> usize {
        let waiting = self.queue.len() + self.put_off.len();
        self.flights.len().saturating_sub(waiting)
    }

    /// Ends the one in this place, which is under way.
    pub(crate) fn end(&mut self, place: usize, outcome: Result<(), Failure>, now: Instant) {
        let Some(Held {
            flight,
            reserved_bytes,
        }) = self.flights.remove(place)
        else {
            return;
        };
        self.reserved_bytes -= reserved_bytes;
        self.last_ended = Some(now);
        self.metrics.latency.record(now - flight.accepted());
        let request = flight.into_request();
        self.done.push_back(Completion { request, outcome });
    }

    /// What the one in this place is, if no command does it.
    pub(crate) fn chore(&self, place: usize) -> Option<Chore> {
        self.get(place)
            .and_then(|flight| Chore::of(flight.request().operation))
    }

    /// The fence is down: what asked for that ends. Says whether it is to be up again.
    pub(crate) fn has_yielded(&mut self, now: Instant) -> bool {
        let mut returns = false;
        for _ in 0..self.queued() {
            let Some(place) = self.pop() else { break };
            match self.chore(place) {
                Some(Chore::Yield) => {
                    self.end(place, Ok(()), now);
                    continue;
                }
                Some(Chore::TakeBack) => returns = true,
                Some(Chore::Raise) | None => {}
            }
            self.queue(place);
        }
        returns
    }

    /// The lease is lost: what the owner of the disk waits for comes to nothing. What the guest waits for stays as it is.
    pub(crate) fn end_chores(&mut self, now: Instant) {
        for _ in 0..self.queued() {
            let Some(place) = self.pop() else { break };
            if self.chore(place).is_some() {
                self.end(place, Err(Failure::Host(libc::ESTALE)), now);
            } else {
                self.queue(place);
            }
        }
    }

    /// The next that has ended.
    pub(crate) fn next_done(&mut self) -> Option<Completion> {
        self.done.pop_front()
    }

    /// Whether there has been nothing to do since `rest` ago; said once.
    pub(crate) fn has_rested(&mut self, rest: Duration, now: Instant) -> bool {
        let is_idle = self.flights.is_empty() && self.last_ended.is_some_and(|ended| ended + rest <= now);
        if is_idle {
            self.last_ended = None;
        }
        is_idle
    }

    /// Queues those that were put off and whose time has come.
    pub(crate) fn take_put_off(&mut self, now: Instant) {
        let queue = &mut self.queue;
        self.put_off.retain(|(due, place)| {
            if *due <= now {
                queue.push_back(*place);
            }
            *due > now
        });
    }

    /// Ends what has waited longer than its user wants. What is under way has to come back from the server first: whether there
    /// is something like that is returned.
    pub(crate) fn report_overdue(&mut self, now: Instant) -> bool {
        let Some(limit) = self.report_after else {
            return false;
        };
        if self.overdue_at().is_none_or(|due| due > now) {
            return false;
        }
        let mut overdue = Vec::new();
        let flights = &mut self.flights;
        let mut may_wait = |place: usize| {
            let is_overdue = flights
                .get_mut(place)
                .is_none_or(|held| held.flight.accepted() + limit <= now);
            if is_overdue {
                overdue.push(place);
            }
            !is_overdue
        };
        self.queue.retain(|place| may_wait(*place));
        self.put_off.retain(|(_, place)| may_wait(*place));
        for place in overdue {
            self.end(place, Err(Failure::Host(libc::ETIMEDOUT)), now);
        }
        self.overdue_at().is_some_and(|due| due <= now)
    }

    /// When something is to be done about the time: a request was put off until then, or has waited too long, or has ended
    /// while nobody looked.
    pub(crate) fn alarm(&self) -> Option<Instant> {
        let put_off = self.put_off.iter().map(|(due, _)| *due).min();
        let ended = self.last_ended.filter(|_| !self.done.is_empty());
        [put_off, self.overdue_at(), ended].into_iter().flatten().min()
    }

    /// When the oldest request has waited too long, where there is a limit.
    fn overdue_at(&self) -> Option<Instant> {
        let limit = self.report_after?;
        let accepted = self.flights.iter().map(|held| held.flight.accepted());
        accepted.min().map(|accepted| accepted + limit)
    }
}

#[cfg(test)]
mod tests;
