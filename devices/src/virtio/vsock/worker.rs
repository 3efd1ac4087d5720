//! The thread of a socket device.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU32};
use std::time::{Duration, Instant};

use super::callers::Callers;
use super::config::VsockConfig;
use super::connection::Key;
use super::connections::{Connections, VsockCounts};
use super::receive::Receiver;
use super::send::Sender;
use crate::complaints::Complaints;
use crate::virtio::device::{ActiveQueue, Interrupt, Session};
use crate::virtio::ring::{Chain, PopError};
use crate::virtio::segments;
use crate::virtio::service::Mailbox;
use crate::wait::{wait, wait_also};

/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET (5.10.6.7), as `struct virtio_vsock_event` has it.
const TRANSPORT_RESET: [u8; 4] = 0_u32.to_le_bytes();

/// How long the guest's driver may take to hear of a reset before programs of the host reach it all the same.
const SETTLE_MAX: Duration = Duration::from_secs(5);
/// How often it is looked whether it has.
const SETTLE_LOOK: Duration = Duration::from_millis(2);

/// A driver that was told of a reset and may not have heard of it: Linux ends the connections that it has when it does, also one
/// that was made in between. It has heard of it when it gives its buffer back.
#[derive(Clone, Copy, Debug)]
struct Settling {
    /// The buffers for events that it had given before.
    buffers: u16,
    /// When it is taken for one that gives none back.
    until: Instant,
}

/// What one queue waits for when it has done what it could, besides the sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Nothing: there is more.
    More,
    /// The guest's kick.
    Kick,
    /// Something else than this queue.
    Nothing,
}

/// What the register half shares with its worker.
#[derive(Debug, Default)]
pub(super) struct Shared {
    /// The guest has to be told that the connections that it knows of are gone.
    pub(super) owes_reset: AtomicBool,
    /// The port of the next caller.
    pub(super) next_port: Arc<AtomicU32>,
    pub(super) counts: Arc<VsockCounts>,
}

/// What serves the queues.
#[derive(Debug)]
pub(super) struct Worker {
    shared: Arc<Shared>,
    connections: Connections,
    callers: Callers,
    receiver: Receiver,
    sender: Sender,
    /// A buffer for an event.
    event: Chain,
    complaints: Complaints,
    /// Since when nothing was served.
    stopped: Option<Instant>,
    settling: Option<Settling>,
}

impl Worker {
    pub(super) fn new(config: &VsockConfig, socket: OwnedFd, path: OsString, shared: Arc<Shared>) -> Self {
        let counts = || Arc::clone(&shared.counts);
        Self {
            connections: Connections::new(config.guest_cid, Arc::clone(&shared.next_port), path, counts()),
            callers: Callers::of(socket),
            receiver: Receiver::new(counts()),
            sender: Sender::new(counts()),
            event: Chain::default(),
            complaints: Complaints::default(),
            stopped: None,
            settling: None,
            shared,
        }
    }

    /// Closes all streams: the guest's driver has begun anew.
    pub(super) fn forget(&mut self) {
        self.connections.clear();
        self.callers.clear();
        self.settling = None;
    }

    /// Serves until the session is recalled.
    pub(super) fn serve(&mut self, mailbox: &Mailbox, session: &mut Session) {
        let Session {
            queues, interrupt, ..
        } = session;
        let mut queues = queues.iter_mut().map(Option::as_mut);
        let mut queues: [Option<&mut ActiveQueue>; 3] = std::array::from_fn(|_| queues.next().flatten());
        if let Some(stopped) = self.stopped.take() {
            // While nobody is served nobody is late.
            let pause = stopped.elapsed();
            self.connections.postpone(pause);
            self.callers.postpone(pause);
            if let Some(settling) = &mut self.settling {
                settling.until += pause;
            }
        }
        let mut is_broken = false;
        while !mailbox.is_recalled() {
            if is_broken {
                wait(&[mailbox.wake()], None);
                continue;
            }
            match self.turns(&mut queues, interrupt) {
                Ok(next) => self.wait_for(mailbox, &mut queues, next),
                Err(fault) => {
                    self.complaints.complain(format_args!(
                        "the guest's socket driver broke a queue, which needs a reset: {fault}"
                    ));
                    self.shared.counts.tx_guest_faults.fetch_add(1, Relaxed);
                    is_broken = true;
                    interrupt.device_needs_reset();
                }
            }
        }
        self.stopped = Some(Instant::now());
    }

    /// One turn of each queue; one that the driver has left alone waits for nothing.
    fn turns(
        &mut self,
        queues: &mut [Option<&mut ActiveQueue>; 3],
        interrupt: &Interrupt,
    ) -> Result<[Next; 3], PopError> {
        let mut next = [Next::Nothing; 3];
        // What is gone before what is new; and first what the guest has to say, which is answered in the same turn.
        for index in [2, 1, 0] {
            let (Some(Some(queue)), Some(next)) = (queues.get_mut(index), next.get_mut(index)) else {
                continue;
            };
            let done = match index {
                0 => self.receiver.turn(queue, &mut self.connections),
                1 => self.sender.turn(queue, &mut self.connections),
                _ => {
                    self.look_whether_settled(queue);
                    self.tell_of_reset(queue)
                }
            };
            queue.ring.publish();
            if queue.ring.needs_interrupt() {
                interrupt.used_buffer();
            }
            *next = done?;
        }
        Ok(next)
    }

    fn look_whether_settled(&mut self, queue: &ActiveQueue) {
        let is_settled = |settling: Settling| {
            queue.ring.available() > settling.buffers || Instant::now() >= settling.until
        };
        if self.settling.is_some_and(is_settled) {
            self.settling = None;
        }
    }

    fn tell_of_reset(&mut self, queue: &mut ActiveQueue) -> Result<Next, PopError> {
        while self.shared.owes_reset.load(SeqCst) {
            let head = match queue.ring.pop(&mut self.event) {
                Ok(false) => return Ok(Next::Kick),
                Ok(true) if segments::len_bytes(&self.event.writable) >= TRANSPORT_RESET.len() as u64 => {
                    segments::scatter(&self.event.writable, 0, &TRANSPORT_RESET);
                    queue.ring.push(self.event.head, 4);
                    self.shared.owes_reset.store(false, SeqCst);
                    self.settling = Some(Settling {
                        buffers: queue.ring.available(),
                        until: Instant::now() + SETTLE_MAX,
                    });
                    break;
                }
                Ok(true) => self.event.head,
                Err(PopError::Malformed { head, .. }) => head,
                Err(broken) => return Err(broken),
            };
            self.shared.counts.rx_guest_faults.fetch_add(1, Relaxed);
            queue.ring.push(head, 0);
        }
        Ok(Next::Nothing)
    }

    /// Looks at all sockets, and waits for them and for what the queues wait for, if each of them does.
    fn wait_for(&mut self, mailbox: &Mailbox, queues: &mut [Option<&mut ActiveQueue>; 3], next: [Next; 3]) {
        let mut kicks = Vec::with_capacity(4);
        kicks.push(mailbox.wake());
        let mut is_busy = false;
        for (queue, next) in queues.iter_mut().zip(next) {
            let Some(queue) = queue else {
                continue;
            };
            match next {
                Next::More => is_busy = true,
                Next::Kick => {
                    is_busy |= queue.ring.enable_kicks();
                    kicks.push(&queue.kick);
                }
                Next::Nothing => {}
            }
        }
        let now = Instant::now();
        // Who calls waits at the socket until the guest has no connections of before any more.
        let looks = self.settling.map(|_| now + SETTLE_LOOK);
        let until = [self.connections.until(), self.callers.until(), looks];
        let until = if is_busy {
            Some(now)
        } else {
            until.into_iter().flatten().min()
        };
        let timeout = until.map(|at| at.saturating_duration_since(now));

        let (keys, mut sockets): (Vec<Key>, Vec<_>) = self.connections.interests().unzip();
        if self.settling.is_none() {
            sockets.extend(self.callers.interests());
        }
        let found = wait_also(&kicks, sockets, timeout);

        let now = Instant::now();
        let (of_connections, of_callers) = found.split_at_checked(keys.len()).unwrap_or_default();
        for (key, flags) in keys.iter().zip(of_connections) {
            if !flags.is_empty() {
                self.connections.found(*key, *flags);
            }
        }
        if self.settling.is_none() {
            self.callers.found(of_callers, &mut self.connections, now);
        }
        self.connections.expire(now);
    }
}
