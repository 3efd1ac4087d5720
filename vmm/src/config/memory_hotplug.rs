//! The rules of memory that comes and goes.

use coracle_devices::virtio::mem::{MemoryHotplugConfig, MemoryHotplugSizeUpdate};

use super::{Config, ConfigError};
use crate::memory::Layout;

/// The most memory that may come to a guest: what Firecracker has room for.
const TOTAL_SIZE_MIB_MAX: u32 = 512 << 10;
const BLOCK_SIZE_MIB_MIN: u32 = 2;
const SLOT_SIZE_MIB_MIN: u32 = 128;

/// Why memory that comes and goes is refused.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the text of an error is its documentation")]
pub enum MemoryHotplugError {
    #[error(
        "block_size_mib is {block_size_mib}; choose a power of two from {BLOCK_SIZE_MIB_MIN} on, or leave it out"
    )]
    Block { block_size_mib: u32 },
    #[error(
        "slot_size_mib is {slot_size_mib}; choose a multiple of block_size_mib ({block_size_mib}), at least {SLOT_SIZE_MIB_MIN}"
    )]
    Slot { slot_size_mib: u32, block_size_mib: u32 },
    #[error(
        "total_size_mib is {total_size_mib}; choose a multiple of slot_size_mib ({slot_size_mib}), at most {TOTAL_SIZE_MIB_MAX}"
    )]
    Total { total_size_mib: u32, slot_size_mib: u32 },
    #[error(
        "the machine has no memory that comes and goes: set it with PUT /hotplug/memory before the start"
    )]
    None,
    #[error(
        "requested_size_mib is {requested_size_mib}; choose a multiple of block_size_mib ({block_size_mib}), at most \
         total_size_mib ({total_size_mib})"
    )]
    Requested {
        requested_size_mib: u32,
        block_size_mib: u32,
        total_size_mib: u32,
    },
}

impl Config {
    /// The memory that may come while the guest runs, if there may be any.
    pub fn memory_hotplug(&self) -> Option<&MemoryHotplugConfig> {
        self.memory_hotplug.as_ref()
    }

    /// Where the guest has its memory, and may have more.
    pub fn memory_layout(&self) -> Layout {
        Layout::new(self.machine.mem_size_mib, self.memory_hotplug())
    }

    /// The memory that may come.
    ///
    /// # Errors
    ///
    /// There is none.
    pub fn expect_memory_hotplug(&self) -> Result<&MemoryHotplugConfig, ConfigError> {
        Ok(self.memory_hotplug().ok_or(MemoryHotplugError::None)?)
    }

    /// Replaces the memory that may come.
    ///
    /// # Errors
    ///
    /// The rule that `hotplug` breaks; then nothing has changed.
    pub fn set_memory_hotplug(&mut self, hotplug: MemoryHotplugConfig) -> Result<(), ConfigError> {
        let MemoryHotplugConfig {
            total_size_mib,
            block_size_mib,
            slot_size_mib,
        } = hotplug;
        let is_whole =
            |size: u32, of: u32, min: u32| size >= min && size.checked_rem(of).is_some_and(|rest| rest == 0);
        if !block_size_mib.is_power_of_two() || block_size_mib < BLOCK_SIZE_MIB_MIN {
            return Err(MemoryHotplugError::Block { block_size_mib }.into());
        }
        if !is_whole(slot_size_mib, block_size_mib, SLOT_SIZE_MIB_MIN) {
            return Err(MemoryHotplugError::Slot {
                slot_size_mib,
                block_size_mib,
            }
            .into());
        }
        if !is_whole(total_size_mib, slot_size_mib, slot_size_mib) || total_size_mib > TOTAL_SIZE_MIB_MAX {
            return Err(MemoryHotplugError::Total {
                total_size_mib,
                slot_size_mib,
            }
            .into());
        }
        self.memory_hotplug = Some(hotplug);
        Ok(())
    }

    /// Checks that so much can be requested of the guest.
    ///
    /// # Errors
    ///
    /// Why not.
    pub fn check_requested(&self, update: &MemoryHotplugSizeUpdate) -> Result<(), ConfigError> {
        let requested_size_mib = update.requested_size_mib;
        let MemoryHotplugConfig {
            total_size_mib,
            block_size_mib,
            ..
        } = *self.expect_memory_hotplug()?;
        if !requested_size_mib.is_multiple_of(block_size_mib) || requested_size_mib > total_size_mib {
            return Err(MemoryHotplugError::Requested {
                requested_size_mib,
                block_size_mib,
                total_size_mib,
            }
            .into());
        }
        Ok(())
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use super::*;

    fn set(text: &str) -> Result<Config, ConfigError> {
        let mut config = Config::default();
        config.set_memory_hotplug(serde_json::from_str(text).unwrap())?;
        Ok(config)
    }

    #[test]
    fn sizes_are_whole_blocks_and_whole_slots() {
        for good in [
            r#"{"total_size_mib": 128}"#,
            r#"{"total_size_mib": 1024, "block_size_mib": 2, "slot_size_mib": 128}"#,
            r#"{"total_size_mib": 256, "block_size_mib": 256, "slot_size_mib": 256}"#,
            r#"{"total_size_mib": 524288, "block_size_mib": 4, "slot_size_mib": 1024}"#,
            r#"{"total_size_mib": 390, "block_size_mib": 2, "slot_size_mib": 130}"#,
        ] {
            assert!(set(good).is_ok(), "{good}");
        }
        for (bad, words) in [
            (r#"{"total_size_mib": 0}"#, "total_size_mib is 0"),
            (r#"{"total_size_mib": 130}"#, "total_size_mib is 130"),
            (r#"{"total_size_mib": 524416}"#, "at most 524288"),
            (r#"{"total_size_mib": 4294967168}"#, "at most 524288"),
            (
                r#"{"total_size_mib": 128, "block_size_mib": 0}"#,
                "block_size_mib is 0",
            ),
            (
                r#"{"total_size_mib": 128, "block_size_mib": 1}"#,
                "block_size_mib is 1",
            ),
            (r#"{"total_size_mib": 128, "block_size_mib": 3}"#, "power of two"),
            (
                r#"{"total_size_mib": 128, "slot_size_mib": 0}"#,
                "slot_size_mib is 0",
            ),
            (r#"{"total_size_mib": 128, "slot_size_mib": 64}"#, "at least 128"),
            (
                r#"{"total_size_mib": 129, "slot_size_mib": 129}"#,
                "multiple of block_size_mib",
            ),
            (
                r#"{"total_size_mib": 256, "block_size_mib": 256}"#,
                "slot_size_mib is 128",
            ),
        ] {
            let refused = crate::api::chain(&set(bad).unwrap_err());
            assert!(refused.contains(words), "{bad}: {refused}");
        }
    }

    #[test]
    fn whole_blocks_are_requested_up_to_all_there_are() {
        let config = set(r#"{"total_size_mib": 256, "block_size_mib": 4}"#).unwrap();
        let check =
            |requested_size_mib| config.check_requested(&MemoryHotplugSizeUpdate { requested_size_mib });
        for good in [0, 4, 256] {
            assert!(check(good).is_ok(), "{good}");
        }
        for bad in [2, 257, 260, u32::MAX] {
            assert!(check(bad).is_err(), "{bad}");
        }
        let none = Config::default().check_requested(&MemoryHotplugSizeUpdate {
            requested_size_mib: 0,
        });
        assert!(crate::api::chain(&none.unwrap_err()).contains("PUT /hotplug/memory"));
    }
}
