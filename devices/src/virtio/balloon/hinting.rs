//! Runs of free page hints (virtio 1.2, 5.5.6.4), which the host begins and ends by numbers.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// VIRTIO_BALLOON_CMD_ID_STOP: of the guest, that it has told all; of the host, that it has never asked.
const STOP: u32 = 0;
/// VIRTIO_BALLOON_CMD_ID_DONE: the driver may have its pages back.
const DONE: u32 = 1;
const FIRST_RUN: u32 = 2;

/// How far a run of hints is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct HintingStatus {
    /// What the host has asked for last: 0 for nothing, 1 for the end of a run, otherwise the number of a run.
    pub host_cmd: u32,
    /// What the guest has answered last: the number of the run whose pages it tells, or 0 at its end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest_cmd: Option<u32>,
}

/// The two sides of it.
#[derive(Debug)]
pub(super) struct Hinting {
    status: HintingStatus,
    last_run: u32,
    /// The host ends the run when the guest does.
    acknowledges: bool,
}

impl Default for Hinting {
    fn default() -> Self {
        Self {
            status: HintingStatus {
                host_cmd: STOP,
                guest_cmd: None,
            },
            last_run: FIRST_RUN - 1,
            acknowledges: false,
        }
    }
}

impl Hinting {
    pub(super) fn status(&self) -> HintingStatus {
        self.status
    }

    pub(super) fn last_run(&self) -> u32 {
        self.last_run
    }

    /// Whether the driver may hold pages that it was not told to take back.
    pub(super) fn is_open(&self) -> bool {
        self.status.host_cmd >= FIRST_RUN
    }

    /// Begins a run.
    pub(super) fn start(&mut self, acknowledges: bool) {
        self.last_run = self.last_run.wrapping_add(1).max(FIRST_RUN);
        self.status.host_cmd = self.last_run;
        self.acknowledges = acknowledges;
    }

    /// Ends what was begun: the driver may have its pages back, and none of them is given to the host from now on.
    pub(super) fn stop(&mut self) {
        self.status.host_cmd = DONE;
    }

    /// The driver has begun anew.
    pub(super) fn forget(&mut self) {
        let last_run = self.last_run;
        *self = Self {
            last_run,
            ..Self::default()
        };
    }

    /// Goes on after a run of that number in another process.
    pub(super) fn go_on(&mut self, last_run: u32, is_open: bool) {
        self.forget();
        self.last_run = last_run;
        if is_open {
            self.stop();
        }
    }

    /// The guest says which run its next pages are of, or that it has told all. Returns whether that has ended the run.
    pub(super) fn answered(&mut self, command: u32) -> bool {
        self.status.guest_cmd = Some(command);
        let ends = command < FIRST_RUN && self.acknowledges && self.is_open();
        if ends {
            self.stop();
        }
        ends
    }

    /// Whether pages that the guest tells now are of the run that the host has begun.
    pub(super) fn wants_pages(&self) -> bool {
        self.is_open() && self.status.guest_cmd == Some(self.status.host_cmd)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_wanted_of_the_run_that_is_on_only() {
        let mut hinting = Hinting::default();
        assert!(!hinting.wants_pages());
        assert!(!hinting.answered(0));
        hinting.start(false);
        assert_eq!(hinting.status().host_cmd, 2);
        assert!(!hinting.wants_pages(), "the guest does not tell them yet");
        hinting.answered(2);
        assert!(hinting.wants_pages());
        assert!(!hinting.answered(0), "it was not to end by itself");
        assert!(hinting.is_open() && !hinting.wants_pages());
        hinting.start(true);
        hinting.answered(2);
        assert!(!hinting.wants_pages(), "those are of an earlier run");
        hinting.answered(3);
        assert!(hinting.wants_pages());
        assert!(hinting.answered(0));
        assert_eq!(
            hinting.status(),
            HintingStatus {
                host_cmd: 1,
                guest_cmd: Some(0)
            }
        );
        assert!(!hinting.answered(0), "once");
    }

    #[test]
    fn a_run_has_a_number_that_no_driver_can_have_from_before() {
        let mut hinting = Hinting::default();
        hinting.start(true);
        hinting.forget();
        assert_eq!(
            hinting.status(),
            HintingStatus {
                host_cmd: 0,
                guest_cmd: None
            }
        );
        hinting.start(true);
        assert_eq!(hinting.status().host_cmd, 3);
        hinting.go_on(u32::MAX, true);
        assert_eq!(
            hinting.status(),
            HintingStatus {
                host_cmd: 1,
                guest_cmd: None
            }
        );
        hinting.start(true);
        assert_eq!(hinting.status().host_cmd, 2, "0 and 1 are no runs");
    }
}
