//! What goes wrong in a simulated network.

use std::time::Duration;

use crate::sim::dice::Dice;

/// How badly a simulated network behaves. A rate of `n` means once in `n` times, 0 never; the default is a network that
/// takes no time and keeps everything.
///
/// Short and interrupted operations are faults of a host: [`crate::sim::reactor::Faults`].
#[derive(Clone, Copy, Debug, Default)]
pub struct NetFaults {
    /// How long a piece of bytes travels at most.
    pub delay_max: Duration,
    /// Connects that are refused.
    pub refused_one_in: u64,
    /// Connects that nobody answers; the kernel gives up after two minutes.
    pub unanswered_one_in: u64,
    /// Pieces during which the connection is reset, for both ends; what travels may get lost.
    pub reset_one_in: u64,
    /// Pieces during which a black hole begins that holds what both ends send, for [`Self::hole_max`] at most. Then it
    /// delivers everything, or has lost everything and the connection is reset.
    pub hole_one_in: u64,
    /// How long a black hole lasts at most.
    pub hole_max: Duration,
    /// Pieces during which the peer's end goes away without a word: the client never hears of it.
    pub half_open_one_in: u64,
    /// Resets by the client that are overtaken by what it had sent: the peer receives that later, for up to
    /// [`Self::late_max`], when the client may long have another connection.
    pub late_one_in: u64,
    /// How much later what had been sent arrives at most.
    pub late_max: Duration,
}

impl NetFaults {
    /// Faults of a network that is drawn from the dice: some are sound, some are sick.
    pub fn draw(dice: &mut Dice) -> Self {
        let micros = [20, 200, 5_000, 200_000];
        let mut rate = |rates: &[u64]| dice.pick(rates);
        Self {
            delay_max: Duration::from_micros(rate(&micros)),
            refused_one_in: rate(&[0, 0, 2, 5]),
            unanswered_one_in: rate(&[0, 0, 0, 5]),
            reset_one_in: rate(&[0, 0, 20, 100, 1000]),
            hole_one_in: rate(&[0, 0, 50, 1000]),
            hole_max: Duration::from_secs(rate(&[1, 10, 60])),
            half_open_one_in: rate(&[0, 0, 0, 200, 1000]),
            late_one_in: rate(&[0, 1, 2]),
            late_max: Duration::from_millis(rate(&[1, 100, 30_000])),
        }
    }

    /// How long a piece travels.
    pub(super) fn delay(&self, dice: &mut Dice) -> Duration {
        up_to(self.delay_max, dice)
    }
}

/// A time from nothing to `max`.
pub(super) fn up_to(max: Duration, dice: &mut Dice) -> Duration {
    let nanos = u64::try_from(max.as_nanos()).expect("delays are short");
    Duration::from_nanos(dice.below(nanos + 1))
}
