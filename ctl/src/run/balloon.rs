//! `--balloon`: memory that the guest gives back to the host.

use std::str::FromStr;

use serde_json::{Value, json};
use thiserror::Error;

use super::memory::MemoryMib;

/// A balloon as it is written on the command line: `SIZE[,OPTION]…`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct BalloonSpec {
    amount_mib: u64,
    stats_s: u16,
    hinting: bool,
    reporting: bool,
    keep: bool,
}

/// Why a text is no balloon.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub(crate) enum BalloonError {
    #[error("{0:?} is no size of a balloon: write 0, or something like 64M")]
    Size(String),
    #[error("unknown option {0:?} of the balloon: there are stats=SECONDS, reporting, hinting and keep")]
    Option(String),
}

impl FromStr for BalloonSpec {
    type Err = BalloonError;

    fn from_str(text: &str) -> Result<Self, BalloonError> {
        let mut parts = text.split(',');
        let size = parts.next().unwrap_or_default();
        let amount_mib = match size {
            "0" => 0,
            size => {
                let size: Result<MemoryMib, _> = size.parse();
                size.map_err(|_| BalloonError::Size(text.to_owned()))?.0
            }
        };
        let mut balloon = Self {
            amount_mib,
            ..Self::default()
        };
        for option in parts {
            match option {
                "hinting" => balloon.hinting = true,
                "reporting" => balloon.reporting = true,
                "keep" => balloon.keep = true,
                other => {
                    let seconds = other.strip_prefix("stats=").and_then(|text| text.parse().ok());
                    balloon.stats_s = seconds.ok_or_else(|| BalloonError::Option(other.to_owned()))?;
                }
            }
        }
        Ok(balloon)
    }
}

/// The configuration of the device.
pub(super) fn config(balloon: &BalloonSpec) -> Value {
    json!({
        "amount_mib": balloon.amount_mib,
        "deflate_on_oom": !balloon.keep,
        "stats_polling_interval_s": balloon.stats_s,
        "free_page_hinting": balloon.hinting,
        "free_page_reporting": balloon.reporting,
    })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use super::*;

    #[test]
    fn a_balloon_is_a_size_and_options() {
        let none = json!({
            "amount_mib": 0, "deflate_on_oom": true, "stats_polling_interval_s": 0, "free_page_hinting": false,
            "free_page_reporting": false
        });
        assert_eq!(config(&"0".parse().unwrap()), none);
        let all = json!({
            "amount_mib": 64, "deflate_on_oom": false, "stats_polling_interval_s": 5, "free_page_hinting": true,
            "free_page_reporting": true
        });
        let text = "64M,stats=5,hinting,reporting,keep";
        assert_eq!(config(&text.parse().unwrap()), all);
    }

    #[test]
    fn what_is_none_is_an_error_that_says_what_there_is() {
        for (text, words) in [
            ("", "no size"),
            ("much", "no size"),
            (",stats=1", "no size"),
            ("0,stats=", "stats=SECONDS"),
            ("0,stats=70000", "stats=SECONDS"),
            ("0,grow", "stats=SECONDS"),
        ] {
            let error = text.parse::<BalloonSpec>().unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
    }
}
