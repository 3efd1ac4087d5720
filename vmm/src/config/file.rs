//! The whole configuration as one JSON document: what `--config-file` reads and `GET /vm/config` writes.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use coracle_devices::serial::SerialConfig;
use coracle_devices::virtio::balloon::BalloonConfig;
use coracle_devices::virtio::blk::DriveConfig;
use coracle_devices::virtio::mem::MemoryHotplugConfig;
use coracle_devices::virtio::net::NetworkInterfaceConfig;
use coracle_devices::virtio::pmem::PmemConfig;
use coracle_devices::virtio::rng::EntropyConfig;
use coracle_devices::virtio::vsock::VsockConfig;
use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};

use super::{
    BootSource, Config, ConfigError, CpuConfig, LoggerConfig, MachineConfig, MetricsConfig, MmdsConfig,
    RateLimiterGroup,
};

/// Longest config file, and longest CPU template that it names, in bytes.
pub const CONFIG_FILE_BYTES_MAX: u64 = 1 << 20;

/// The answer to `GET /vm/config`: every section, with `null` for what is not configured.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct FullConfig {
    balloon: Option<BalloonConfig>,
    drives: Vec<DriveConfig>,
    boot_source: BootSource,
    cpu_config: Option<CpuConfig>,
    logger: Option<LoggerConfig>,
    machine_config: MachineConfig,
    metrics: Option<MetricsConfig>,
    mmds_config: Option<MmdsConfig>,
    network_interfaces: Vec<NetworkInterfaceConfig>,
    vsock: Option<VsockConfig>,
    entropy: Option<EntropyConfig>,
    pmem: Vec<PmemConfig>,
    memory_hotplug: Option<MemoryHotplugConfig>,
    #[serde(skip_serializing_if = "Option::is_none")]
    serial: Option<SerialConfig>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    rate_limiter_groups: Vec<RateLimiterGroup>,
}

impl From<&Config> for FullConfig {
    fn from(config: &Config) -> Self {
        let config = config.clone();
        Self {
            balloon: config.balloon,
            drives: config.drives,
            boot_source: config.boot_source.unwrap_or_default(),
            cpu_config: config.cpu,
            logger: config.logger,
            machine_config: config.machine,
            metrics: config.metrics,
            mmds_config: config.mmds,
            network_interfaces: config.networks,
            vsock: config.vsock,
            entropy: config.entropy,
            pmem: config.pmem,
            memory_hotplug: config.memory_hotplug,
            serial: config.serial,
            rate_limiter_groups: config.groups,
        }
    }
}

impl Config {
    /// Reads the file of `--config-file`, and the CPU template that it may name.
    ///
    /// # Errors
    ///
    /// What is wrong with the file, or the first rule that its content breaks.
    pub fn from_file(path: &Path) -> Result<Self, ConfigFileError> {
        Self::from_json(&read(path)?, path, read)
    }

    /// Makes a configuration of the text of a config file, which errors call `path`. Opens nothing by
    /// itself: `read` reads the CPU template that the text may name.
    ///
    /// # Errors
    ///
    /// What is wrong with the text, or the first rule that its content breaks.
    pub fn from_json(
        text: &[u8],
        path: &Path,
        read: impl FnOnce(&Path) -> Result<Vec<u8>, ConfigFileError>,
    ) -> Result<Self, ConfigFileError> {
        parse::<Sections>(text, path)?.into_config(read)
    }
}

/// The sections of a config file. A file that `GET /vm/config` has written can be read back.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Sections {
    boot_source: BootSource,
    #[serde(default)]
    drives: Vec<DriveConfig>,
    #[serde(default)]
    rate_limiter_groups: Vec<RateLimiterGroup>,
    machine_config: Option<MachineConfig>,
    #[serde(default)]
    cpu_config: CpuSection,
    logger: Option<LoggerConfig>,
    metrics: Option<MetricsConfig>,
    entropy: Option<EntropyConfig>,
    serial: Option<SerialConfig>,
    balloon: Option<BalloonConfig>,
    mmds_config: Option<MmdsConfig>,
    #[serde(default)]
    network_interfaces: Vec<NetworkInterfaceConfig>,
    vsock: Option<VsockConfig>,
    pmem: Option<Vec<PmemConfig>>,
    memory_hotplug: Option<MemoryHotplugConfig>,
}

impl Sections {
    fn into_config(
        self,
        read: impl FnOnce(&Path) -> Result<Vec<u8>, ConfigFileError>,
    ) -> Result<Config, ConfigFileError> {
        let mut config = Config::default();
        if let Some(machine) = self.machine_config {
            config.set_machine(machine)?;
        }
        config.cpu = match self.cpu_config {
            CpuSection::None => None,
            CpuSection::Template(template) => Some(template),
            CpuSection::Path(path) => Some(parse(&read(&path)?, &path)?),
        };
        config.set_boot_source(self.boot_source)?;
        for group in self.rate_limiter_groups {
            config.insert_group(group)?;
        }
        for drive in self.drives {
            config.insert_drive(drive)?;
        }
        for network in self.network_interfaces {
            config.insert_network(network)?;
        }
        if let Some(mmds) = self.mmds_config {
            config.set_mmds(mmds)?;
        }
        if let Some(vsock) = self.vsock {
            config.set_vsock(vsock)?;
        }
        if let Some(balloon) = self.balloon {
            config.set_balloon(balloon)?;
        }
        for pmem in self.pmem.into_iter().flatten() {
            config.insert_pmem(pmem)?;
        }
        if let Some(hotplug) = self.memory_hotplug {
            config.set_memory_hotplug(hotplug)?;
        }
        config.entropy = self.entropy;
        config.serial = self.serial;
        config.logger = self.logger;
        config.metrics = self.metrics;
        Ok(config)
    }
}

fn parse<T: DeserializeOwned>(text: &[u8], path: &Path) -> Result<T, ConfigFileError> {
    serde_json::from_slice(text).map_err(|source| ConfigFileError::Json {
        path: path.to_owned(),
        source,
    })
}

fn read(path: &Path) -> Result<Vec<u8>, ConfigFileError> {
    let cannot = |source| ConfigFileError::Read {
        path: path.to_owned(),
        source,
    };
    let mut text = Vec::new();
    let file = File::open(path).map_err(cannot)?;
    file.take(CONFIG_FILE_BYTES_MAX + 1)
        .read_to_end(&mut text)
        .map_err(cannot)?;
    if text.len() as u64 > CONFIG_FILE_BYTES_MAX {
        return Err(ConfigFileError::TooLong {
            path: path.to_owned(),
        });
    }
    Ok(text)
}

/// A CPU template in the file itself, or the path of one.
#[derive(Default)]
enum CpuSection {
    #[default]
    None,
    Path(PathBuf),
    Template(CpuConfig),
}

impl<'de> Deserialize<'de> for CpuSection {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;

        impl<'de> serde::de::Visitor<'de> for Visitor {
            type Value = CpuSection;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a CPU template, or the path of a file with one")
            }

            fn visit_unit<E>(self) -> Result<CpuSection, E> {
                Ok(CpuSection::None)
            }

            fn visit_str<E>(self, path: &str) -> Result<CpuSection, E> {
                Ok(CpuSection::Path(path.into()))
            }

            fn visit_map<A: serde::de::MapAccess<'de>>(self, map: A) -> Result<CpuSection, A::Error> {
                CpuConfig::deserialize(serde::de::value::MapAccessDeserializer::new(map))
                    .map(CpuSection::Template)
            }
        }

        deserializer.deserialize_any(Visitor)
    }
}

/// Why a config file is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigFileError {
    /// It cannot be read.
    #[error("cannot read `{}`; check the path and its permissions", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is no configuration by its size.
    #[error("`{}` has more than {CONFIG_FILE_BYTES_MAX} bytes; that is no configuration", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
    },
    /// It is not JSON, or has fields that are not known.
    #[error("`{}` is not a configuration", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where, and what was expected there.
        source: serde_json::Error,
    },
    /// A rule is broken.
    #[error(transparent)]
    Config(#[from] ConfigError),
}
