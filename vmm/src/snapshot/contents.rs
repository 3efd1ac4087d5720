//! The sections of a snapshot beside those of the machine: what it is of, and what was configured.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::config::{CONFIG_FILE_BYTES_MAX, Config, ConfigFileError, FullConfig};
use crate::state::{Body, whole};

use super::memory::{MemoryTableState, MemoryTableStateV1};

/// What a snapshot is of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OriginState {
    /// The machine's name.
    pub vm: String,
    /// When it was paused, in seconds since 1970.
    pub taken_unix_s: u64,
}

/// What was configured, in the form of a configuration file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigState {
    /// The file.
    pub json: String,
    /// Whether the guest has a boot timer, which no file can say.
    pub boot_timer: bool,
}

/// The section of the memory table.
pub const MEMORY: &str = "memory";
/// The section of [`OriginState`].
pub const ORIGIN: &str = "origin";
/// The section of [`ConfigState`].
pub const CONFIG: &str = "config";

impl Body for MemoryTableState {
    const VERSION: u32 = 2;

    fn read(version: u32, bytes: &[u8]) -> Result<Option<Self>, postcard::Error> {
        match version {
            Self::VERSION => whole(bytes).map(Some),
            1 => whole(bytes).map(|first: MemoryTableStateV1| Some(first.into())),
            _ => Ok(None),
        }
    }
}

impl Body for OriginState {
    const VERSION: u32 = 1;
}

impl Body for ConfigState {
    const VERSION: u32 = 1;
}

impl From<&Config> for ConfigState {
    fn from(config: &Config) -> Self {
        let full = FullConfig::from(config);
        Self {
            json: serde_json::to_string(&full).expect("a configuration has a text"),
            boot_timer: config.boot_timer(),
        }
    }
}

impl ConfigState {
    /// The configuration, without where logs and metrics went: that is for the process that goes on to say.
    ///
    /// # Errors
    ///
    /// The first rule that it breaks. The CPU template is part of it: nothing else is read.
    pub fn config(&self) -> Result<Config, ConfigFileError> {
        let path = Path::new("section `config`");
        if self.json.len() as u64 > CONFIG_FILE_BYTES_MAX {
            return Err(ConfigFileError::TooLong {
                path: path.to_owned(),
            });
        }
        let unread = |path: &Path| {
            Err(ConfigFileError::Read {
                path: path.to_owned(),
                source: std::io::ErrorKind::Unsupported.into(),
            })
        };
        let mut config = Config::from_json(self.json.as_bytes(), path, unread)?.without_observers();
        if self.boot_timer {
            config.add_boot_timer();
        }
        Ok(config)
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_comes_back_without_where_logs_went() {
        let text = r#"{"boot-source": {"kernel_image_path": "k"},
            "drives": [{"drive_id": "a", "path_on_host": "/a", "is_root_device": true, "is_read_only": false}],
            "machine-config": {"vcpu_count": 2, "mem_size_mib": 256, "track_dirty_pages": true},
            "logger": {"log_path": "/l"}, "metrics": {"metrics_path": "/m"}}"#;
        let config = Config::from_json(text.as_bytes(), Path::new("c"), |_| unreachable!()).unwrap();
        let mut expected = config.clone().without_observers();
        expected.add_boot_timer();
        let saved = ConfigState::from(&expected);
        assert_eq!(saved.config().unwrap(), expected);
        assert!(!saved.json.contains("/l"));
        assert!(ConfigState::from(&config).config().unwrap().logger().is_none());
    }

    #[test]
    fn a_file_that_a_template_names_is_not_read() {
        let state = ConfigState {
            json: r#"{"boot-source": {"kernel_image_path": "k"}, "cpu-config": "/etc/passwd"}"#.to_owned(),
            boot_timer: false,
        };
        assert!(matches!(state.config(), Err(ConfigFileError::Read { .. })));
    }
}
