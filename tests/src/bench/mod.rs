//! What the benchmarks have in common, and the parts of the disk benchmark.

pub mod contender;
pub mod image;
pub mod measurement;
pub mod qemu;
pub mod row;
pub mod series;
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
