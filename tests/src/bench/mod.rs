//! What the benchmarks have in common, and the parts of those of disks.

pub mod api;
pub mod balloon;
pub mod contender;
pub mod course;
pub mod frames;
pub mod idle;
pub mod image;
pub mod measurement;
pub mod migration;
pub mod net;
pub mod program;
pub mod qemu;
pub mod remote;
pub mod row;
pub mod series;
pub mod snapshot;
pub mod table;
pub mod tally;
pub mod target;

use std::path::PathBuf;

use serde_json::Value;

use crate::Outcome;

/// Where benchmarks leave their results, and what they work on: `target/bench`, which is made if need be.
///
/// # Errors
///
/// When it cannot be made.
pub fn directory() -> Outcome<PathBuf> {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| PathBuf::from("target"), PathBuf::from);
    let directory = target.join("bench");
    std::fs::create_dir_all(&directory)?;
    Ok(directory)
}

/// Keeps the results of the benchmark `name` as JSON in [`directory`].
///
/// # Errors
///
/// When they cannot be written.
pub fn keep(name: &str, report: &Value) -> Outcome {
    let path = directory()?.join(name).with_extension("json");
    Ok(std::fs::write(path, format!("{report:#}\n"))?)
}

/// A positive number in the environment; empty is as good as absent, as a makefile hands it on.
///
/// # Errors
///
/// When it is something else.
pub fn count(name: &str, default: u64) -> Outcome<u64> {
    let text = std::env::var(name).unwrap_or_default();
    if text.is_empty() {
        return Ok(default);
    }
    let count = text.parse().unwrap_or(0);
    crate::ensure!(count > 0, "{name} is `{text}`, not a positive number");
    Ok(count)
}

/// The words of a variable, between which commas stand.
pub fn words(name: &str) -> Vec<String> {
    let text = std::env::var(name).unwrap_or_default();
    let words = text.split(',').filter(|word| !word.is_empty());
    words.map(str::to_owned).collect()
}
