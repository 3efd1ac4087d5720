//! What is asked of the balloon.

use coracle_devices::virtio::balloon::{BalloonControl, BalloonPatch, StatisticsPatch};

use super::{Guest, Monitor};
use crate::api::{Answer, Data, Fault, Verb};

impl Monitor {
    /// Does what a verb says that is about the balloon; none of them takes time.
    pub(super) fn attend_balloon(&mut self, verb: &Verb) -> Answer {
        match verb {
            Verb::PutBalloon(balloon) => self.config.set_balloon(balloon.clone())?,
            Verb::PatchBalloon(patch) => self.patch_balloon(patch)?,
            Verb::PatchBalloonStatistics(patch) => self.patch_statistics(patch)?,
            Verb::GetBalloon => return Ok(Data::json(self.config.expect_balloon()?)),
            Verb::GetBalloonStatistics => {
                self.config.expect_statistics()?;
                return Ok(Data::json(&self.balloon()?.statistics()));
            }
            Verb::StartHinting(start) => {
                self.config.expect_hinting()?;
                self.balloon()?.start_hinting(start.acknowledge_on_stop);
            }
            Verb::GetHintingStatus => {
                self.config.expect_hinting()?;
                return Ok(Data::json(&self.balloon()?.hinting_status()));
            }
            Verb::StopHinting => {
                self.config.expect_hinting()?;
                self.balloon()?.stop_hinting();
            }
            _ => unreachable!("this is about the balloon"),
        }
        Ok(Data::Empty)
    }

    fn patch_balloon(&mut self, patch: &BalloonPatch) -> Result<(), Fault> {
        self.config.patch_balloon(patch)?;
        if let Some(balloon) = self.guest.balloon() {
            balloon.set_amount(patch.amount_mib);
        }
        Ok(())
    }

    fn patch_statistics(&mut self, patch: &StatisticsPatch) -> Result<(), Fault> {
        self.config.patch_statistics(patch)?;
        if let Some(balloon) = self.guest.balloon() {
            balloon.set_interval(patch.stats_polling_interval_s);
        }
        Ok(())
    }

    fn balloon(&self) -> Result<&BalloonControl, Fault> {
        // Whose machine has given everything away can only be told that.
        let gone = || Fault::bad_request("the guest is not here any more: ask the host that it went to");
        self.guest.balloon().ok_or_else(gone)
    }
}

impl Guest {
    /// The balloon of the machine, if there is one.
    fn balloon(&self) -> Option<&BalloonControl> {
        match self {
            Self::Running(machine) => machine.balloon(),
            Self::Pausing(machine) => machine.balloon(),
            Self::Paused(machine) => machine.balloon(),
            Self::Stranded(machine) => machine.balloon(),
            Self::NotStarted | Self::Yielded(_) => None,
        }
    }
}
