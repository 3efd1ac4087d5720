//! What a peer may ask for without taking the answers.

/// Answers that were written since the connection last began to send: their memory is ours until the peer takes them.
#[derive(Debug, Default)]
pub(crate) struct Quota {
    departures: u64,
    answers: u32,
}

/// A peer that asks for more only wants to fill our memory.
const ANSWERS_MAX: u32 = 1_024;

impl Quota {
    /// Counts an answer, if there may be one more; `departures` is how many batches the connection has begun to send.
    pub(crate) fn takes_one(&mut self, departures: u64) -> bool {
        if self.departures != departures {
            *self = Self {
                departures,
                answers: 0,
            };
        }
        self.answers += 1;
        self.answers <= ANSWERS_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_takes_answers_gets_more() {
        let mut quota = Quota::default();
        assert!((0..ANSWERS_MAX).all(|_| quota.takes_one(0)));
        assert!(!quota.takes_one(0));
        assert!(quota.takes_one(1));
    }
}
