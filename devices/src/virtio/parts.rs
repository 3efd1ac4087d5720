//! A session in parts: each of several workers of a device is lent the queues that it serves.

use super::device::Session;

/// What each of so many workers is lent: a session with the queues that are its own, in their places. Only the first gets one
/// without queues.
pub(super) fn parts(
    session: Session,
    workers: usize,
    worker_of: impl Fn(usize) -> usize,
) -> impl Iterator<Item = (usize, Session)> {
    let Session {
        memory,
        features,
        queues,
        interrupt,
    } = session;
    let count = queues.len();
    let blank = |_| Session {
        memory: memory.clone(),
        features,
        queues: (0..count).map(|_| None).collect(),
        interrupt: interrupt.clone(),
    };
    let mut parts: Vec<Session> = (0..workers).map(blank).collect();
    for (index, queue) in queues.into_iter().enumerate() {
        let part = parts.get_mut(worker_of(index));
        if let Some(place) = part.and_then(|part| part.queues.get_mut(index)) {
            *place = queue;
        }
    }
    let is_bothered =
        |(number, part): &(usize, Session)| *number == 0 || part.queues.iter().any(Option::is_some);
    parts.into_iter().enumerate().filter(is_bothered)
}

/// The session of which these are the parts; `None` if there are none.
pub(super) fn whole(parts: impl IntoIterator<Item = Session>) -> Option<Session> {
    let mut parts = parts.into_iter();
    let mut session = parts.next()?;
    for part in parts {
        for (place, queue) in session.queues.iter_mut().zip(part.queues) {
            if queue.is_some() {
                *place = queue;
            }
        }
    }
    Some(session)
}
