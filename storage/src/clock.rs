//! The time by which deadlines and leases are kept: it goes on while the host sleeps.

use std::sync::LazyLock;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

/// Now, to be compared with nothing but what this has returned. The clock of the standard library stands still while the host is
/// suspended, and a server gives the image to others all the same.
pub(crate) fn now() -> Instant {
    static START: LazyLock<(Instant, Duration)> = LazyLock::new(|| (Instant::now(), since_boot()));
    let (instant, boot) = *START;
    instant + since_boot().saturating_sub(boot)
}

fn since_boot() -> Duration {
    let time = clock_gettime(ClockId::Boottime);
    Duration::try_from(time).expect("a host does not boot in the future")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn while_nobody_sleeps_it_is_the_time_of_the_standard_library() {
        let before = Instant::now();
        let (first, second) = (now(), now());
        let after = Instant::now();
        assert!(first <= second, "it goes back");
        // The two clocks are read one after the other, once.
        let slack = Duration::from_secs(1);
        assert!(first + slack >= before && second <= after + slack);
    }
}
