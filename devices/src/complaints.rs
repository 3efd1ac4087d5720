//! What a guest does wrong goes to the log a few times only: it must not be able to fill it.

use std::fmt::Arguments;

/// Lines that one place may write about its guest.
const COMPLAINTS_MAX: u32 = 10;

/// What one place has complained of so far.
#[derive(Debug, Default)]
pub(crate) struct Complaints {
    made: u32,
}

impl Complaints {
    /// Logs `what`, unless there was enough of it.
    pub(crate) fn complain(&mut self, what: Arguments<'_>) {
        if self.admit() {
            log::warn!("{what} (complaint {} of at most {COMPLAINTS_MAX})", self.made);
        }
    }

    fn admit(&mut self) -> bool {
        let admitted = self.made < COMPLAINTS_MAX;
        self.made += u32::from(admitted);
        admitted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_is_wrong_for_ever_is_complained_of_ten_times() {
        let mut complaints = Complaints::default();
        let admitted = (0..1000).filter(|_| complaints.admit()).count();
        assert_eq!(admitted, 10);
    }
}
