//! What a thread may do that no run of a monitor has it do but by accident: it logs to standard output, finds the heap full, is
//! interrupted in the middle of a message or of a wait, is left with an image that nobody asks for any more, or finds a fault of
//! its own.

use std::process::Command;

use coracle_tests::case::Context;
use coracle_tests::{Outcome, ensure};
use serde_json::{Value, json};

use super::rows::PLACES;
use super::{Outcomes, Outside, read};

/// Where the kernel itself answers; everywhere else a filter has another answer.
const YIELDS: &[&str] = &["bare", "main", "vmm", "balloon", "pager", "mover"];
/// Where a lock or a channel may be waited for with a limit, which goes on by a call of its own when the process was stopped.
const WAITS: &[&str] = &["bare", "main", "vmm", "mover"];

/// Where nobody has a descriptor to close.
const KEEPS: &[&str] = &["vcpu", "entropy", "balloon"];

pub(super) fn by_each_thread(_: &Context) -> Outcome {
    let outside = Outside::new()?;
    let task = outside.task(&["log", "grow", "let-go", "yield", "panic"], PLACES, "/")?;
    let (said, mut found) = made(&outside, &task)?;
    let lines = said.lines().filter(|line| line.ends_with("] a line")).count();
    ensure!(lines == PLACES.len(), "{lines} lines:\n{said}");
    let mut task = outside.task(&["wait", "rest"], PLACES, "/")?;
    if let Some(task) = task.as_object_mut() {
        task.insert("interrupted".to_owned(), json!(true));
    }
    found.append(&mut made(&outside, &task)?.1);
    let mut wrong = Vec::new();
    for ((attempt, place), found) in &found {
        let found = found.to_string();
        let is_as_expected = match attempt.as_str() {
            "log" | "grow" | "rest" => found == "nobody",
            "let-go" if !KEEPS.contains(&place.as_str()) => found == "nobody",
            "let-go" => found == format!("the filter of `{place}`, for close"),
            "yield" if YIELDS.contains(&place.as_str()) => found == "nobody",
            "yield" => found == "ENOSYS",
            "wait" if WAITS.contains(&place.as_str()) => found == "nobody",
            "wait" => found == format!("the filter of `{place}`, for restart_syscall"),
            _ => found.contains("status: Some(166)") && found.contains("as asked"),
        };
        if !is_as_expected {
            wrong.push(format!("{attempt} on {place}: {found}"));
        }
    }
    ensure!(found.len() == 7 * PLACES.len(), "{} outcomes", found.len());
    ensure!(wrong.is_empty(), "\n{}", wrong.join("\n"));
    Ok(())
}

/// What the program says of a task, and what that means.
fn made(outside: &Outside, task: &Value) -> Outcome<(String, Outcomes)> {
    let output = Command::new(outside.directory.path().join("escape"))
        .arg(task.to_string())
        .output()?;
    ensure!(output.status.success(), "{output:?}");
    let said = String::from_utf8(output.stdout)?;
    let found = read(&said)?;
    Ok((said, found))
}
