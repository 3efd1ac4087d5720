//! The thread of a network device.
#![expect(unsafe_code, reason = "a frame of our own is written like those of the guest")]

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use coracle_storage::limit::RateLimiter;
use coracle_storage::request::Segment;
use rustix::event::{PollFd, PollFlags};
use virtio_bindings::virtio_net::VIRTIO_NET_F_GUEST_ANNOUNCE;

use super::config::MacAddress;
use super::control::Link;
use super::receive::Receiver;
use super::send::Sender;
use super::tap::{HEADER_BYTES, Tap};
use crate::complaints::Complaints;
use crate::mmds::Stack;
use crate::virtio::device::{ActiveQueue, Interrupt, Session};
use crate::virtio::limits::NewLimits;
use crate::virtio::ring::{Chain, PopError};
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
    /// The rate limiter.
    Tokens(Instant),
    /// A frame from the host.
    TapGives,
    /// Room for one.
    TapTakes,
}

/// What serves the queues.
#[derive(Debug)]
pub(super) struct Worker {
    tap: Tap,
    counts: Arc<NetCounts>,
    link: Arc<Link>,
    /// For what the guest receives, and for what it sends.
    limits: Arc<NewLimits<2>>,
    receiver: Receiver,
    sender: Sender,
    command: Chain,
    /// The guest's address, if it was given one.
    mac: Option<MacAddress>,
    /// The metadata service, if the guest may ask it by this interface.
    metadata: Option<Stack>,
    complaints: Complaints,
}

impl Worker {
    pub(super) fn new(tap: Tap, counts: Arc<NetCounts>, link: Arc<Link>, limits: Arc<NewLimits<2>>) -> Self {
        Self {
            tap,
            counts,
            link,
            limits,
            receiver: Receiver::default(),
            sender: Sender::default(),
            command: Chain::default(),
            mac: None,
            metadata: None,
            complaints: Complaints::default(),
        }
    }

    /// Whose frames they are, for a driver that cannot say where it is.
    pub(super) fn speak_for(&mut self, mac: Option<MacAddress>) {
        self.mac = mac;
    }

    /// Lets the guest ask the metadata service.
    pub(super) fn answer_by(&mut self, metadata: Option<Stack>) {
        self.metadata = metadata;
    }

    /// Has the bridges of the network learn where the guest is, by a frame that nobody has to answer.
    fn announce_for(&mut self, mac: MacAddress) {
        let mut frame = reverse_request(mac);
        // SAFETY: the frame outlives the call.
        let segment = unsafe { Segment::new(NonNull::from(&mut frame).cast(), frame.len()) };
        if let Err(error) = self.tap.write(&[segment]) {
            self.complaints.complain(format_args!(
                "the guest's network was not told where it is: {error}"
            ));
        }
    }

    /// Begins with these limits.
    pub(super) fn limit(&mut self, rx: RateLimiter, tx: RateLimiter) {
        self.receiver.limiter = rx;
        self.sender.limiter = tx;
    }

    /// Serves until the session is recalled.
    pub(super) fn serve(&mut self, mailbox: &Mailbox, session: &mut Session) {
        let Session {
            queues,
            interrupt,
            features,
            ..
        } = session;
        if let Err(error) = self.tap.offload_for(*features) {
            // Then the guest is given nothing that it would have to be told of: it is slower, and right.
            self.complaints
                .complain(format_args!("the tap leaves no work to the guest: {error}"));
        }
        self.receiver.begin(*features);
        let can_announce = *features & 1 << VIRTIO_NET_F_GUEST_ANNOUNCE != 0;
        let mut queues = queues.iter_mut().map(Option::as_mut);
        let mut queues: [Option<&mut ActiveQueue>; 3] = std::array::from_fn(|_| queues.next().flatten());
        let mut is_broken = false;
        while !mailbox.is_recalled() {
            self.take_limits();
            if self.link.is_news() {
                match self.mac {
                    _ if can_announce => interrupt.configuration_changed(),
                    Some(mac) => self.announce_for(mac),
                    None => {}
                }
            }
            if is_broken {
                wait(&[mailbox.wake()], None);
                continue;
            }
            match self.turns(&mut queues, interrupt) {
                Ok(next) => {
                    let alarm = self
                        .metadata
                        .as_mut()
                        .and_then(|stack| stack.alarm(Instant::now()));
                    wait_for(&self.tap, mailbox, &mut queues, next, alarm);
                }
                Err(fault) => {
                    self.complaints.complain(format_args!(
                        "the guest's network driver broke a queue, which needs a reset: {fault}"
                    ));
                    self.counts.tx_guest_faults.fetch_add(1, Relaxed);
                    is_broken = true;
                    interrupt.device_needs_reset();
                }
            }
        }
        if let [Some(rx), ..] = queues {
            self.receiver.end(rx);
        }
    }

    fn take_limits(&mut self) {
        if let Some([rx, tx]) = self.limits.take() {
            let now = Instant::now();
            self.receiver.limit(&rx, now);
            self.sender.limiter.update(&tx, now);
        }
    }

    /// One turn of each queue; one that the driver has left alone waits for nothing.
    fn turns(
        &mut self,
        queues: &mut [Option<&mut ActiveQueue>; 3],
        interrupt: &Interrupt,
    ) -> Result<[Next; 3], PopError> {
        let mut next = [Next::Kick; 3];
        for (index, (queue, next)) in queues.iter_mut().zip(&mut next).enumerate() {
            let Some(queue) = queue else {
                continue;
            };
            let done = match index {
                0 => self
                    .receiver
                    .turn(queue, &self.tap, self.metadata.as_mut(), &self.counts),
                1 => self
                    .sender
                    .turn(queue, &self.tap, self.metadata.as_mut(), &self.counts),
                _ => self.link.turn(queue, &mut self.command),
            };
            queue.ring.publish();
            if queue.ring.needs_interrupt() {
                interrupt.used_buffer();
            }
            *next = done?;
        }
        // What was sent after the guest was given frames may have been answered at once.
        if let (Some(stack), [rx, ..]) = (&self.metadata, &mut next)
            && stack.has_frames()
            && *rx != Next::Kick
        {
            *rx = Next::More;
        }
        Ok(next)
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

/// Waits for what all directions wait for, if each of them does, and not past `alarm`.
fn wait_for(
    tap: &Tap,
    mailbox: &Mailbox,
    queues: &mut [Option<&mut ActiveQueue>; 3],
    next: [Next; 3],
    alarm: Option<Instant>,
) {
    let mut kicks = Vec::with_capacity(4);
    let mut events = PollFlags::empty();
    let mut until = alarm;
    kicks.push(mailbox.wake());
    for (queue, next) in queues.iter_mut().zip(next) {
        let Some(queue) = queue else {
            continue;
        };
        match next {
            Next::More => return,
            Next::Kick if queue.ring.enable_kicks() => return,
            Next::Kick => kicks.push(&queue.kick),
            Next::Tokens(at) => until = Some(until.map_or(at, |until| until.min(at))),
            Next::TapGives => events |= PollFlags::IN,
            Next::TapTakes => events |= PollFlags::OUT,
        }
    }
    let timeout = until.map(|at| at.saturating_duration_since(Instant::now()));
    let tap = (!events.is_empty()).then(|| PollFd::new(tap, events));
    wait_also(&kicks, tap, timeout);
}
