//! The rules of the balloon.

use coracle_devices::virtio::balloon::{BalloonConfig, BalloonPatch, StatisticsPatch};

use super::{Config, ConfigError};

/// Why a balloon is refused.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the text of an error is its documentation")]
pub enum BalloonError {
    #[error("amount_mib of {amount_mib} is more than the {mem_size_mib} MiB that the machine has")]
    Amount { amount_mib: u32, mem_size_mib: u64 },
    #[error("the machine has no balloon: set it with PUT /balloon before the start")]
    None,
    #[error("the balloon has no statistics: set its stats_polling_interval_s before the start")]
    NoStatistics,
    #[error(
        "stats_polling_interval_s cannot become or cease to be 0: PUT /balloon before the start says whether there are statistics"
    )]
    StatisticsForGood,
    #[error("the balloon takes no hints: set its free_page_hinting before the start")]
    NoHinting,
}

impl Config {
    /// The balloon, if there is one.
    pub fn balloon(&self) -> Option<&BalloonConfig> {
        self.balloon.as_ref()
    }

    /// The balloon.
    ///
    /// # Errors
    ///
    /// There is none.
    pub fn expect_balloon(&self) -> Result<&BalloonConfig, ConfigError> {
        Ok(self.balloon().ok_or(BalloonError::None)?)
    }

    /// That the balloon has statistics.
    ///
    /// # Errors
    ///
    /// It has not, or there is none.
    pub fn expect_statistics(&self) -> Result<(), ConfigError> {
        match self.expect_balloon()?.stats_polling_interval_s {
            0 => Err(BalloonError::NoStatistics.into()),
            _ => Ok(()),
        }
    }

    /// That the balloon takes hints.
    ///
    /// # Errors
    ///
    /// It does not, or there is none.
    pub fn expect_hinting(&self) -> Result<(), ConfigError> {
        if self.expect_balloon()?.free_page_hinting {
            Ok(())
        } else {
            Err(BalloonError::NoHinting.into())
        }
    }

    /// Replaces the balloon.
    ///
    /// # Errors
    ///
    /// The rule that `balloon` breaks; then nothing has changed.
    pub fn set_balloon(&mut self, balloon: BalloonConfig) -> Result<(), ConfigError> {
        check_amount(balloon.amount_mib, self.machine.mem_size_mib)?;
        self.balloon = Some(balloon);
        Ok(())
    }

    /// Changes how large the balloon is to be.
    ///
    /// # Errors
    ///
    /// The rule that the result would break; then nothing has changed.
    pub fn patch_balloon(&mut self, patch: &BalloonPatch) -> Result<(), ConfigError> {
        check_amount(patch.amount_mib, self.machine.mem_size_mib)?;
        self.balloon.as_mut().ok_or(BalloonError::None)?.amount_mib = patch.amount_mib;
        Ok(())
    }

    /// Changes how often there are statistics.
    ///
    /// # Errors
    ///
    /// The rule that the result would break; then nothing has changed.
    pub fn patch_statistics(&mut self, patch: &StatisticsPatch) -> Result<(), ConfigError> {
        let balloon = self.balloon.as_mut().ok_or(BalloonError::None)?;
        let interval = &mut balloon.stats_polling_interval_s;
        if (*interval == 0) != (patch.stats_polling_interval_s == 0) {
            return Err(BalloonError::StatisticsForGood.into());
        }
        *interval = patch.stats_polling_interval_s;
        Ok(())
    }

    /// That the balloon fits a machine of that much memory.
    pub(super) fn check_balloon(&self, mem_size_mib: u64) -> Result<(), BalloonError> {
        let amount = self.balloon().map(|balloon| balloon.amount_mib);
        amount.map_or(Ok(()), |amount| check_amount(amount, mem_size_mib))
    }
}

fn check_amount(amount_mib: u32, mem_size_mib: u64) -> Result<(), BalloonError> {
    if u64::from(amount_mib) > mem_size_mib {
        return Err(BalloonError::Amount {
            amount_mib,
            mem_size_mib,
        });
    }
    Ok(())
}
