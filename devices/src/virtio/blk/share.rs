//! A session in shares: each worker of a disk is lent the queues that it serves.

use std::sync::Arc;

use vm_memory::GuestMemoryMmap;

use crate::virtio::device::{ActiveQueue, Interrupt, Session};

/// One worker's part of a session.
#[derive(Debug)]
pub(super) struct Share {
    /// Keeps the memory that the queues lie in.
    pub(super) memory: Arc<GuestMemoryMmap>,
    /// As in the session.
    pub(super) features: u64,
    /// As in the session.
    pub(super) interrupt: Interrupt,
    /// Queues by their index in the session, ascending.
    pub(super) queues: Vec<(usize, ActiveQueue)>,
    /// How many queues the session has, ready or not.
    pub(super) queue_count: usize,
}

/// Deals the queues out to `workers`, in turn. Workers that get none are left out: the shares come with the
/// number of the worker.
pub(super) fn deal(session: Session, workers: usize) -> Vec<(usize, Share)> {
    let Session {
        memory,
        features,
        queues,
        interrupt,
    } = session;
    let queue_count = queues.len();
    let mut hands: Vec<Vec<(usize, ActiveQueue)>> = (0..workers).map(|_| Vec::new()).collect();
    for (index, queue) in queues.into_iter().enumerate() {
        let hand = hands.get_mut(index % workers);
        if let (Some(queue), Some(hand)) = (queue, hand) {
            hand.push((index, queue));
        }
    }
    hands
        .into_iter()
        .enumerate()
        .filter(|(_, queues)| !queues.is_empty())
        .map(|(worker, queues)| {
            let share = Share {
                memory: Arc::clone(&memory),
                features,
                interrupt: interrupt.clone(),
                queues,
                queue_count,
            };
            (worker, share)
        })
        .collect()
}

/// The session that was dealt out as `shares`; `None` if there are none.
pub(super) fn collect(shares: impl IntoIterator<Item = Share>) -> Option<Session> {
    let mut session: Option<Session> = None;
    for share in shares {
        let session = session.get_or_insert_with(|| Session {
            memory: share.memory,
            features: share.features,
            queues: (0..share.queue_count).map(|_| None).collect(),
            interrupt: share.interrupt,
        });
        for (index, queue) in share.queues {
            if let Some(place) = session.queues.get_mut(index) {
                *place = Some(queue);
            }
        }
    }
    session
}
