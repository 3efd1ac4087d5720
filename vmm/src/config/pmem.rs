//! The rules of persistent memory.

use coracle_devices::virtio::pmem::{PartialPmem, PmemConfig, PmemError};

use super::{Config, ConfigError, DRIVES_MAX, check_device_id};

/// Most pmem devices of a machine, as of drives.
const PMEM_MAX: usize = DRIVES_MAX;

/// Why persistent memory is refused.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the text of an error is its documentation")]
pub enum PmemConfigError {
    #[error("path_on_host of `{0}` is empty; name a file")]
    NoFile(String),
    #[error(
        "A root device already exists: `{0}`; set root_device, or is_root_device of a drive, for one device only"
    )]
    SecondRoot(String),
    #[error("there are {PMEM_MAX} pmem devices, and no machine can have more")]
    TooMany,
    #[error("there is no pmem device `{0}`; GET /vm/config lists them")]
    NoSuch(String),
    #[error(transparent)]
    File(#[from] PmemError),
}

impl Config {
    /// The pmem devices in the order in which the guest finds them.
    pub fn pmem(&self) -> &[PmemConfig] {
        &self.pmem
    }

    /// Adds a pmem device, or replaces the one of the same name.
    ///
    /// # Errors
    ///
    /// The rule that `pmem` breaks; then nothing has changed.
    pub fn insert_pmem(&mut self, pmem: PmemConfig) -> Result<(), ConfigError> {
        check_device_id(&pmem.id)?;
        if pmem.path_on_host.is_empty() {
            return Err(PmemConfigError::NoFile(pmem.id).into());
        }
        let others = || self.pmem.iter().filter(|other| other.id != pmem.id);
        let drives = self.drives.iter().filter(|drive| drive.is_root_device);
        let mut roots = drives
            .map(|drive| &drive.drive_id)
            .chain(others().filter(|other| other.root_device).map(|other| &other.id));
        if let Some(root) = roots.next().filter(|_| pmem.root_device) {
            return Err(PmemConfigError::SecondRoot(root.clone()).into());
        }
        if others().count() == PMEM_MAX {
            return Err(PmemConfigError::TooMany.into());
        }
        match self.pmem.iter_mut().find(|other| other.id == pmem.id) {
            Some(slot) => *slot = pmem,
            None => self.pmem.push(pmem),
        }
        Ok(())
    }

    /// Changes the limits that `patch` names of a pmem device.
    ///
    /// # Errors
    ///
    /// There is no such device; then nothing has changed.
    pub fn patch_pmem(&mut self, patch: &PartialPmem) -> Result<(), ConfigError> {
        let pmem = self.pmem.iter_mut().find(|pmem| pmem.id == patch.id);
        let pmem = pmem.ok_or_else(|| PmemConfigError::NoSuch(patch.id.clone()))?;
        if let Some(limits) = patch.rate_limiter {
            let kept = pmem.rate_limiter.get_or_insert_default();
            kept.bandwidth = limits.bandwidth.or(kept.bandwidth);
            kept.ops = limits.ops.or(kept.ops);
        }
        Ok(())
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use coracle_devices::virtio::blk::DriveConfig;

    use super::*;

    fn pmem(id: &str, root_device: bool) -> PmemConfig {
        PmemConfig {
            id: id.to_owned(),
            path_on_host: "/p".to_owned(),
            root_device,
            ..PmemConfig::default()
        }
    }

    fn drive(id: &str) -> DriveConfig {
        DriveConfig {
            drive_id: id.to_owned(),
            path_on_host: Some("/d".to_owned()),
            is_root_device: true,
            ..DriveConfig::default()
        }
    }

    fn said(refused: Result<(), ConfigError>) -> String {
        let error = refused.unwrap_err();
        let source = std::error::Error::source(&error).map(ToString::to_string);
        source.unwrap_or_else(|| error.to_string())
    }

    #[test]
    fn a_device_is_replaced_by_its_name_and_keeps_its_number() {
        let mut config = Config::default();
        for id in ["a", "b", "a"] {
            config.insert_pmem(pmem(id, id == "a")).unwrap();
        }
        let ids: Vec<&str> = config.pmem().iter().map(|pmem| pmem.id.as_str()).collect();
        assert_eq!(ids, ["a", "b"]);
        assert_eq!(config.virtio_devices(), 2);
        let nowhere = PmemConfig {
            path_on_host: String::new(),
            ..pmem("c", false)
        };
        assert!(said(config.insert_pmem(nowhere)).contains("is empty"));
        assert!(config.insert_pmem(pmem("a-b", false)).is_err());
        for number in 2..PMEM_MAX {
            config.insert_pmem(pmem(&format!("n{number}"), false)).unwrap();
        }
        assert!(said(config.insert_pmem(pmem("more", false))).contains("no machine can have more"));
        config.insert_pmem(pmem("b", false)).unwrap();
    }

    #[test]
    fn a_machine_has_one_root() {
        let mut config = Config::default();
        config.insert_pmem(pmem("a", true)).unwrap();
        assert!(said(config.insert_pmem(pmem("b", true))).contains("already exists: `a`"));
        assert!(
            config.insert_drive(drive("a")).is_err(),
            "another of the same name"
        );
        assert!(
            config
                .insert_drive(drive("d"))
                .unwrap_err()
                .to_string()
                .contains("`a`")
        );
        config.insert_pmem(pmem("a", false)).unwrap();
        config.insert_drive(drive("d")).unwrap();
        config.insert_drive(drive("d")).unwrap();
        assert!(said(config.insert_pmem(pmem("a", true))).contains("already exists: `d`"));
    }

    #[test]
    fn a_patch_changes_the_buckets_that_it_names() {
        let mut config = Config::default();
        config.insert_pmem(pmem("a", false)).unwrap();
        let patch = |json| serde_json::from_str::<PartialPmem>(json).unwrap();
        for limits in [
            r#"{"id": "a", "rate_limiter": {"ops": {"size": 5, "refill_time": 100}}}"#,
            r#"{"id": "a", "rate_limiter": {"bandwidth": {"size": 7, "refill_time": 100}}}"#,
            r#"{"id": "a"}"#,
        ] {
            config.patch_pmem(&patch(limits)).unwrap();
        }
        let limits = config.pmem().first().unwrap().rate_limiter.unwrap();
        assert_eq!(limits.ops.map(|bucket| bucket.size), Some(5));
        assert_eq!(limits.bandwidth.map(|bucket| bucket.size), Some(7));
        assert!(said(config.patch_pmem(&patch(r#"{"id": "b"}"#))).contains("no pmem device `b`"));
    }
}
