//! What a thread may do that no run of a monitor has it do but by accident: it logs to standard output, finds the heap full, is
//! interrupted in the middle of a message, or finds a fault of its own.

use std::process::Command;

use coracle_tests::case::Context;
use coracle_tests::{Outcome, ensure};

use super::rows::PLACES;
use super::{Outside, read};

/// Where the kernel itself answers; everywhere else a filter has another answer.
const YIELDS: &[&str] = &["bare", "main", "vmm", "balloon", "pager", "mover"];

pub(super) fn by_each_thread(_: &Context) -> Outcome {
    let outside = Outside::new()?;
    let task = outside
        .task(&["log", "grow", "yield", "panic"], PLACES, "/")?
        .to_string();
    let output = Command::new(outside.directory.path().join("escape"))
        .arg(task)
        .output()?;
    ensure!(output.status.success(), "{output:?}");
    let said = String::from_utf8(output.stdout)?;
    let lines = said.lines().filter(|line| line.ends_with("] a line")).count();
    ensure!(lines == PLACES.len(), "{lines} lines:\n{said}");
    let mut wrong = Vec::new();
    let found = read(&said)?;
    for ((attempt, place), found) in &found {
        let found = found.to_string();
        let is_as_expected = match attempt.as_str() {
            "log" | "grow" => found == "nobody",
            "yield" if YIELDS.contains(&place.as_str()) => found == "nobody",
            "yield" => found == "ENOSYS",
            _ => found.contains("status: Some(166)") && found.contains("as asked"),
        };
        if !is_as_expected {
            wrong.push(format!("{attempt} on {place}: {found}"));
        }
    }
    ensure!(found.len() == 4 * PLACES.len(), "{} outcomes", found.len());
    ensure!(wrong.is_empty(), "\n{}", wrong.join("\n"));
    Ok(())
}
