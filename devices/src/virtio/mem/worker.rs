//! The data half of the device: the thread `memory`.

use std::cell::Cell;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::{Arc, Mutex};

use super::device::{Shared, locked};
use super::region::Region;
use super::request::{REQUEST_BYTES, RESPONSE_BYTES, Request, Response};
use crate::complaints::Complaints;
use crate::virtio::device::{ActiveQueue, Interrupt};
use crate::virtio::ring::{Chain, PopError};
use crate::virtio::segments;
use crate::virtio::service::Mailbox;
use crate::virtio::single::{Next, Single};

/// Requests served before the worker looks into its mailbox again: one, as each may take as long as KVM takes to hide slots.
const BATCH_REQUESTS_MAX: usize = 1;

pub(super) struct Worker {
    shared: Arc<Shared>,
    region: Arc<Mutex<Region>>,
    chain: Chain,
    complaints: Complaints,
}

impl Worker {
    pub(super) fn new(shared: Arc<Shared>, region: Arc<Mutex<Region>>) -> Self {
        Self {
            shared,
            region,
            chain: Chain::default(),
            complaints: Complaints::default(),
        }
    }

    /// Gives back what an earlier session was recalled from, without another. Others may look at the region in between.
    pub(super) fn give_all_back(&self, mailbox: &Mailbox) {
        let mut is_done = false;
        while !is_done && !mailbox.is_recalled() {
            let steps = Cell::new(0);
            is_done = locked(&self.region).give_back(&|| steps.replace(steps.get() + 1) > 0);
        }
    }

    /// Answers the chain that was taken; returns how many bytes that has, and `None` if the worker was recalled before it was
    /// done. Where there is no room for an answer, nothing is done.
    fn serve_one(&mut self, mailbox: &Mailbox) -> Option<u32> {
        let Chain {
            readable, writable, ..
        } = &self.chain;
        if segments::len_bytes(writable) < RESPONSE_BYTES as u64 {
            self.shared.counts.guest_faults.fetch_add(1, Relaxed);
            return Some(0);
        }
        let mut bytes = [0; REQUEST_BYTES];
        let read = segments::gather(readable, 0, &mut bytes);
        let request = bytes.get(..read).and_then(Request::parse);
        let response = match request {
            Some(request) => locked(&self.region).answer(request, &|| mailbox.is_recalled())?,
            None => {
                self.shared.counts.guest_faults.fetch_add(1, Relaxed);
                Response::Error
            }
        };
        let written = segments::scatter(writable, 0, &response.to_bytes());
        Some(u32::try_from(written).expect("an answer is short"))
    }
}

impl Single for Worker {
    fn turn(&mut self, mailbox: &Mailbox, queue: &mut ActiveQueue) -> Next {
        // What an earlier session was recalled from.
        if !locked(&self.region).give_back(&|| mailbox.is_recalled()) {
            return Next::More;
        }
        for _ in 0..BATCH_REQUESTS_MAX {
            match queue.ring.pop(&mut self.chain) {
                Ok(false) => return Next::Kick,
                Ok(true) => match self.serve_one(mailbox) {
                    Some(written_bytes) => queue.ring.push(self.chain.head, written_bytes),
                    None => queue.ring.unpop(),
                },
                Err(PopError::Malformed { head, .. }) => {
                    self.shared.counts.guest_faults.fetch_add(1, Relaxed);
                    queue.ring.push(head, 0);
                }
                Err(PopError::Broken(fault)) => {
                    let what = format_args!(
                        "the guest's driver of hot-plugged memory broke its queue, which needs a reset: {fault}"
                    );
                    self.complaints.complain(what);
                    self.shared.counts.guest_faults.fetch_add(1, Relaxed);
                    return Next::Reset;
                }
            }
        }
        Next::More
    }

    fn look(&mut self, interrupt: &Interrupt) {
        if self.shared.is_news.swap(false, SeqCst) {
            interrupt.configuration_changed();
        }
    }
}
