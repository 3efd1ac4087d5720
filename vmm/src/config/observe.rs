//! Where logs and metrics go.

use std::collections::BTreeMap;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The body of `PUT /logger`: what is absent stays as it is, except the level, which becomes `Info`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LoggerConfig {
    /// A file or a FIFO that lines are appended to; standard output by default.
    pub log_path: Option<PathBuf>,
    /// The least important level that is logged.
    pub level: Option<Level>,
    /// Whether a line names its level.
    pub show_level: Option<bool>,
    /// Whether a line names the source line it comes from.
    pub show_log_origin: Option<bool>,
    /// Only modules whose path starts with this are logged.
    pub module: Option<String>,
}

/// The body of `PUT /metrics`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MetricsConfig {
    /// A file or a FIFO that a line of JSON is appended to every minute and at `FlushMetrics`.
    pub metrics_path: PathBuf,
    /// Whether every line has the instance's name.
    #[serde(default)]
    pub emit_id: bool,
    /// What else every line has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub properties: Option<BTreeMap<String, String>>,
}

/// How important a log line is; upper and lower case are the same, and `Warning` is `Warn`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub enum Level {
    /// Nothing is logged.
    Off,
    /// What failed.
    Error,
    /// What may fail soon, or is not as asked.
    #[serde(rename = "Warning")]
    Warn,
    /// What happened.
    Info,
    /// What a developer wants to know.
    Debug,
    /// Every step.
    Trace,
}

impl Level {
    /// The level as the logging front has it.
    pub fn filter(self) -> log::LevelFilter {
        match self {
            Self::Off => log::LevelFilter::Off,
            Self::Error => log::LevelFilter::Error,
            Self::Warn => log::LevelFilter::Warn,
            Self::Info => log::LevelFilter::Info,
            Self::Debug => log::LevelFilter::Debug,
            Self::Trace => log::LevelFilter::Trace,
        }
    }
}

impl std::str::FromStr for Level {
    type Err = UnknownLevel;

    fn from_str(text: &str) -> Result<Self, UnknownLevel> {
        match text.to_ascii_lowercase().as_str() {
            "off" => Ok(Self::Off),
            "error" => Ok(Self::Error),
            "warn" | "warning" => Ok(Self::Warn),
            "info" => Ok(Self::Info),
            "debug" => Ok(Self::Debug),
            "trace" => Ok(Self::Trace),
            _ => Err(UnknownLevel {
                text: text.to_owned(),
            }),
        }
    }
}

impl<'de> Deserialize<'de> for Level {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

/// A word that is not a level.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a log level; choose Off, Error, Warning, Info, Debug or Trace")]
pub struct UnknownLevel {
    text: String,
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

    use super::*;

    #[test]
    fn levels_are_read_in_any_case() {
        for (text, level) in [
            ("warn", Level::Warn),
            ("WARNING", Level::Warn),
            ("Trace", Level::Trace),
            ("oFF", Level::Off),
        ] {
            assert_eq!(serde_json::from_value::<Level>(text.into()).unwrap(), level);
        }
        let error = serde_json::from_str::<Level>(r#""loud""#)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("`loud` is not a log level; choose Off, Error"),
            "{error}"
        );
    }
}
