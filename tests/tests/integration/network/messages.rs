//! What a user is told who has made a mistake: what is wrong, and where.

use coracle_tests::case::{Context, text};
use coracle_tests::guest::{Machine, run};
use coracle_tests::monitor::Launch;
use coracle_tests::{Outcome, ensure};
use serde_json::Value;

const END_WITHIN: std::time::Duration = std::time::Duration::from_secs(60);

/// Words of which a message must have one of each group.
pub(crate) type Words = &'static [&'static [&'static str]];

/// Starts a machine that must not start, and returns what it says, which names the image by `name` and has the words
/// even beside the URL.
pub(crate) fn refuse(context: &Context, drive: Value, name: &str, words: Words) -> Outcome<String> {
    let url = drive.get("path_on_host").and_then(Value::as_str);
    let url = url.ok_or("a drive has a path")?.to_owned();
    let machine = Machine::unikernel(&context.environment, "do=hello").drive(drive);
    let ended = run(Launch::new(&context.environment)?, &machine, END_WITHIN)?;
    let said = ended.errors;
    ensure!(!ended.status.success(), "it was taken: {said}");
    ensure!(!ended.console.contains("hello"), "the guest has run: {said}");
    ensure!(said.contains(name), "it does not say which image: {said}");
    let besides = said.replace(&url, "");
    for group in words {
        let is_there = group.iter().any(|word| besides.contains(word));
        ensure!(is_there, "none of {group:?} in: {besides}");
    }
    Ok(said)
}

/// Fails with each of the rows that has failed, by their names.
pub(crate) fn all<R>(rows: Vec<R>, name: fn(&R) -> &str, run: impl Fn(&R) -> Outcome) -> Outcome {
    let failed = |row: &R| {
        let failed = run(row).err()?;
        Some(format!("{}: {}", name(row), text(&failed)))
    };
    let said: Vec<String> = rows.iter().filter_map(failed).collect();
    ensure!(said.is_empty(), "\n{}", said.join("\n"));
    Ok(())
}
