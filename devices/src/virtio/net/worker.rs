//! The threads of a network device, one for each pair of queues.
#![expect(unsafe_code, reason = "a frame of our own is written like those of the guest")]

use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use coracle_storage::limit::SharedLimiter;
use coracle_storage::request::Segment;
use rustix::event::{PollFd, PollFlags};
use virtio_bindings::virtio_net::{VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MQ};

use super::config::MacAddress;
use super::control::{Commands, Link, Subject};
use super::pairs::Pairs;
use super::receive::Receiver;
use super::send::Sender;
use super::tap::{HEADER_BYTES, TapQueue};
use crate::complaints::Complaints;
use crate::mmds::Stack;
use crate::virtio::device::{ActiveQueue, Interrupt, Session};
use crate::virtio::ring::PopError;
use crate::virtio::service::Mailbox;
use crate::wait::{wait, wait_also};

/// What a network device has done, for metrics.
#[derive(Debug, Default)]
pub struct NetCounts {
    /// Frames that the guest was given.
    pub rx_frames: AtomicU64,
    /// Their bytes.
    pub rx_bytes: AtomicU64,
    /// Frames that did not fit what the guest had offered.
    pub rx_dropped: AtomicU64,
    /// Times that the tap could not be read.
    pub rx_fails: AtomicU64,
    /// Times that a frame had to wait for the rate limiter.
    pub rx_throttled: AtomicU64,
    /// Buffers for frames that made no sense.
    pub rx_guest_faults: AtomicU64,
    /// Frames that the guest has sent.
    pub tx_frames: AtomicU64,
    /// Their bytes.
    pub tx_bytes: AtomicU64,
    /// Frames that the host has not taken.
    pub tx_dropped: AtomicU64,
    /// Times that a frame had to wait for the rate limiter.
    pub tx_throttled: AtomicU64,
    /// Frames that made no sense, and rings that broke.
    pub tx_guest_faults: AtomicU64,
}

/// What one direction waits for when it has done what it could.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Nothing: there is more.
    More,
    /// The guest's kick.
    Kick,
    /// Somebody else who changes something.
    Nudge,
    /// This time: the rate limiter, or a tap that cannot be read.
    Then(Instant),
    /// A frame from the host.
    TapGives,
    /// Room for one.
    TapTakes,
}

/// The limits of both directions, which all pairs of queues have together.
#[derive(Debug)]
pub(super) struct Limiters {
    pub(super) rx: SharedLimiter,
    pub(super) tx: SharedLimiter,
}

/// What all workers of one device have.
#[derive(Clone, Debug)]
pub(super) struct Shared {
    pub(super) counts: Arc<NetCounts>,
    pub(super) link: Arc<Link>,
    pub(super) limiters: Arc<Limiters>,
    pub(super) pairs: Arc<Pairs>,
    /// The metadata service, if the guest may ask it by this interface.
    pub(super) metadata: Option<Arc<Mutex<Stack>>>,
    /// The guest's address, if it was given one.
    pub(super) mac: Option<MacAddress>,
}

/// The way of frames, in either direction.
#[derive(Clone, Copy)]
pub(super) struct Way<'a> {
    pub(super) tap: &'a TapQueue,
    pub(super) metadata: Option<&'a Mutex<Stack>>,
    pub(super) limiters: &'a Limiters,
    pub(super) counts: &'a NetCounts,
}

/// The metadata service, for as long as one worker uses it. One that panics ends the process.
pub(super) fn locked(metadata: &Mutex<Stack>) -> MutexGuard<'_, Stack> {
    metadata.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The queues of a pair, and of the first one also that of commands.
type Queues<'a> = [Option<&'a mut ActiveQueue>; 3];

/// What serves one pair of queues.
#[derive(Debug)]
pub(super) struct Worker {
    number: usize,
    shared: Shared,
    receiver: Receiver,
    sender: Sender,
    commands: Commands,
    complaints: Complaints,
}

impl Worker {
    /// Serves pair `number`, and commands if that is the first.
    pub(super) fn new(number: usize, shared: Shared) -> Self {
        Self {
            number,
            shared,
            receiver: Receiver::default(),
            sender: Sender::default(),
            commands: Commands::default(),
            complaints: Complaints::default(),
        }
    }

    /// Has the bridges of the network learn where the guest is, by a frame that nobody has to answer.
    fn announce_for(&mut self, mac: MacAddress) {
        let mut frame = reverse_request(mac);
        // SAFETY: the frame outlives the call.
        let segment = unsafe { Segment::new(NonNull::from(&mut frame).cast(), frame.len()) };
        if let Err(error) = self.shared.pairs.tap(self.number).write(&[segment]) {
            self.complaints.complain(format_args!(
                "the guest's network was not told where it is: {error}"
            ));
        }
    }

    /// What the first worker does for all of them, before it serves a driver with these features.
    fn prepare(&mut self, features: u64, pairs_max: usize) {
        if let Err(error) = self.shared.pairs.tap(self.number).offload_for(features) {
            // Then the guest is given nothing that it would have to be told of: it is slower, and right.
            self.complaints
                .complain(format_args!("the tap leaves no work to the guest: {error}"));
        }
        let used = self.shared.link.pairs().min(pairs_max);
        if let Err(error) = self.shared.pairs.set_used(used) {
            self.complaints.complain(format_args!(
                "the tap does not serve {used} pairs of queues, as the guest expects: {error}"
            ));
        }
    }

    /// Tells the guest, or its network, what is new of its link.
    fn tell_news(&mut self, features: u64, interrupt: &Interrupt) {
        if self.number > 0 || !self.shared.link.is_news() {
            return;
        }
        match self.shared.mac {
            _ if features & 1 << VIRTIO_NET_F_GUEST_ANNOUNCE != 0 => interrupt.configuration_changed(),
            Some(mac) => self.announce_for(mac),
            None => {}
        }
    }

    /// Serves until the session is recalled.
    pub(super) fn serve(&mut self, mailbox: &Mailbox, session: &mut Session) {
        let Session {
            queues,
            interrupt,
            features,
            ..
        } = session;
        let layout = Layout::new(queues.len(), *features);
        if self.number == 0 {
            self.prepare(*features, layout.pairs_max);
        }
        self.receiver.begin(*features);
        let places = layout.of_pair(self.number);
        let mut mine: Queues<'_> = [None, None, None];
        for (index, queue) in queues.iter_mut().enumerate() {
            let is_mine = |(place, _): &(&usize, _)| **place == index;
            if let Some((_, place)) = places.iter().zip(&mut mine).find(is_mine) {
                *place = queue.as_mut();
            }
        }
        let mut is_broken = false;
        while !mailbox.is_recalled() {
            self.tell_news(*features, interrupt);
            if is_broken {
                wait(&[mailbox.wake()], None);
                continue;
            }
            match self.turns(&mut mine, layout.pairs_max, interrupt) {
                Ok(next) => self.wait_for(mailbox, &mut mine, next),
                Err(fault) => {
                    self.complaints.complain(format_args!(
                        "the guest's network driver broke a queue, which needs a reset: {fault}"
                    ));
                    self.shared.counts.tx_guest_faults.fetch_add(1, Relaxed);
                    is_broken = true;
                    interrupt.device_needs_reset();
                }
            }
        }
        if let [Some(rx), ..] = mine {
            self.receiver.end(rx);
        }
    }

    /// One turn of each queue; one that the driver has left alone waits for nothing, and nor does that of a pair that it does not
    /// use for what it would receive. What it had sent by a pair before it gave that up is sent.
    fn turns(
        &mut self,
        queues: &mut Queues<'_>,
        pairs_max: usize,
        interrupt: &Interrupt,
    ) -> Result<[Next; 3], PopError> {
        let shared = &self.shared;
        let way = Way {
            tap: shared.pairs.tap(self.number),
            metadata: shared.metadata.as_deref(),
            limiters: &shared.limiters,
            counts: &shared.counts,
        };
        let mut next = [Next::Kick; 3];
        for (index, (queue, next)) in queues.iter_mut().zip(&mut next).enumerate() {
            let Some(queue) = queue else {
                continue;
            };
            let done = match index {
                0 => match shared.pairs.turn(self.number) {
                    Some(_turn) => self.receiver.turn(queue, &way),
                    None => {
                        self.receiver.end(queue);
                        Ok(Next::Nudge)
                    }
                },
                1 => self.sender.turn(queue, &way),
                _ => {
                    let mut subject = Subject {
                        link: &shared.link,
                        pairs: &shared.pairs,
                        pairs_max,
                        complaints: &mut self.complaints,
                    };
                    self.commands.turn(queue, &mut subject)
                }
            };
            queue.ring.publish();
            if queue.ring.needs_interrupt() {
                interrupt.used_buffer();
            }
            *next = done?;
        }
        // What was sent after the guest was given frames may have been answered at once.
        if let (Some(metadata), [rx, ..]) = (way.metadata, &mut next)
            && !matches!(*rx, Next::Kick | Next::Nudge)
            && locked(metadata).has_frames()
        {
            *rx = Next::More;
        }
        Ok(next)
    }

    /// Waits for what all directions wait for, if each of them does.
    fn wait_for(&self, mailbox: &Mailbox, queues: &mut Queues<'_>, next: [Next; 3]) {
        let mut kicks = Vec::with_capacity(4);
        let mut events = PollFlags::empty();
        let metadata = self.shared.metadata.as_ref();
        let mut until = metadata.and_then(|stack| locked(stack).alarm(Instant::now()));
        kicks.push(mailbox.wake());
        for (queue, next) in queues.iter_mut().zip(next) {
            let Some(queue) = queue else {
                continue;
            };
            match next {
                Next::More => return,
                Next::Kick if queue.ring.enable_kicks() => return,
                Next::Kick => kicks.push(&queue.kick),
                Next::Nudge => {}
                Next::Then(at) => until = Some(until.map_or(at, |until| until.min(at))),
                Next::TapGives => events |= PollFlags::IN,
                Next::TapTakes => events |= PollFlags::OUT,
            }
        }
        let timeout = until.map(|at| at.saturating_duration_since(Instant::now()));
        let tap = self.shared.pairs.tap(self.number);
        let tap = (!events.is_empty()).then(|| PollFd::new(tap, events));
        wait_also(&kicks, tap, timeout);
    }
}

/// Which queue is which, of a device with so many (5.1.2): those of commands come after all that the driver may use.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    /// How many pairs the driver may use.
    pairs_max: usize,
}

impl Layout {
    /// As a driver with these features has it.
    pub(super) fn new(queues: usize, features: u64) -> Self {
        let has_pairs = features & 1 << VIRTIO_NET_F_MQ != 0;
        Self {
            pairs_max: if has_pairs { queues / 2 } else { 1 },
        }
    }

    /// Where the queues of a pair are, and after that of the first one that of commands.
    fn of_pair(self, number: usize) -> [usize; 3] {
        let commands = if number == 0 {
            2 * self.pairs_max
        } else {
            usize::MAX
        };
        [2 * number, 2 * number + 1, commands]
    }

    /// Whose worker serves a queue; those that the driver cannot use are with the first one, and are left alone.
    pub(super) fn worker_of(self, queue: usize) -> usize {
        let pair = queue / 2;
        if pair < self.pairs_max { pair } else { 0 }
    }
}

/// A request of RARP (RFC 903) for the guest's own address, with a header that says nothing, as long as a frame has to be.
pub(super) fn reverse_request(mac: MacAddress) -> [u8; HEADER_BYTES + 60] {
    let mac = mac.bytes();
    let head = [0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3];
    let parts: [&[u8]; 8] = [
        &[0; HEADER_BYTES],
        &[0xff; 6],
        &mac,
        &head,
        &mac,
        &[0; 4],
        &mac,
        &[0; 4],
    ];
    let mut frame = [0; HEADER_BYTES + 60];
    for (to, from) in frame.iter_mut().zip(parts.into_iter().flatten()) {
        *to = *from;
    }
    frame
}
