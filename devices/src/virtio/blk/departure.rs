//! How an image leaves its worker's reactor: in good order, or by force where that takes too long.

use std::time::{Duration, Instant};

use coracle_storage::backend::Parting;

use super::lane::Drive;

/// How long an image may take to leave by force, which asks nobody: the kernel has to end what is in flight.
const BREAK_MS_MAX: u64 = 500;

/// An image on its way out.
///
/// ```text
///   Ends ──not attached any more──────────────► Left
///     └──takes too long──► Breaks ──the same──► Left
///                             └──takes too long──► Stuck, until it is Left all the same
/// ```
pub(super) struct Departure {
    parting: Parting,
    until: Instant,
}

/// Where a departure is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Whereabouts {
    /// Operations of its own are in flight.
    Leaving,
    /// They are, and should not be any more.
    Stuck,
    /// Nothing of it is in flight.
    Left,
}

impl Departure {
    /// Asks the image, which has no request in flight, to be done until then.
    pub(super) fn in_good_order(drive: &mut Drive, until: Instant) -> Self {
        drive.image.detach(Parting::Ends, drive.io.as_mut());
        Self {
            parting: Parting::Ends,
            until,
        }
    }

    /// Asks the image to let everything go at once.
    pub(super) fn by_force(drive: &mut Drive, now: Instant) -> Self {
        drive.image.detach(Parting::Breaks, drive.io.as_mut());
        Self {
            parting: Parting::Breaks,
            until: now + Duration::from_millis(BREAK_MS_MAX),
        }
    }

    /// When [`Self::whereabouts`] is to be asked for, if nothing else happens before.
    pub(super) fn alarm(&self, now: Instant) -> Option<Instant> {
        (self.until > now).then_some(self.until)
    }

    /// Looks where the image is, and hurries it when its time is over.
    pub(super) fn whereabouts(&mut self, drive: &mut Drive, now: Instant) -> Whereabouts {
        if drive.image.is_attached() && now >= self.until && self.parting == Parting::Ends {
            *self = Self::by_force(drive, now);
        }
        match drive.image.is_attached() {
            false => Whereabouts::Left,
            true if now < self.until => Whereabouts::Leaving,
            true => Whereabouts::Stuck,
        }
    }
}
