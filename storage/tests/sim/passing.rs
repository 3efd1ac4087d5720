//! Time that passes for a disk and for the server that it is on.

use std::time::{Duration, Instant};

use coracle_storage::reactor::Patience;

use crate::lane::{Guest, Lane};

/// What is around a disk, and changes with time.
pub(crate) trait Surroundings {
    /// When something is due there.
    fn due(&self) -> Option<Instant>;

    /// Lets happen what is due.
    fn look(&mut self);
}

/// How long it takes at most until a disk is served again when everything works: until a hole is over and was noticed.
pub(crate) const RECOVERY_MAX: Duration = Duration::from_secs(240);

pub(crate) fn step(lane: &mut Lane, site: &mut impl Surroundings, guest: &mut Guest, patience: Patience) {
    lane.go_on_until(site.due(), patience, guest);
    site.look();
}

/// Takes every request to its end, now that everything works.
pub(crate) fn drain(lane: &mut Lane, site: &mut impl Surroundings, guest: &mut Guest) {
    let start = lane.now();
    while lane.outstanding() > 0 {
        step(lane, site, guest, Patience::UntilEvent);
        let time = lane.now() - start;
        assert!(
            time < RECOVERY_MAX,
            "{} requests have not ended {} s after the last fault",
            lane.outstanding(),
            time.as_secs()
        );
    }
}

/// Lets time pass; how often the disk woke.
pub(crate) fn wait(lane: &mut Lane, site: &mut impl Surroundings, guest: &mut Guest, time: Duration) -> u64 {
    let (end, before) = (lane.now() + time, lane.waits);
    while lane.now() < end {
        let limit = site.due().into_iter().chain([end]).min();
        lane.go_on_until(limit, Patience::UntilEvent, guest);
        site.look();
    }
    lane.waits - before
}
