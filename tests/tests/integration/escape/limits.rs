//! What there is too much of: files, processes, threads, memory, bytes in a file. Limits refuse it, whatever the filter lets by.

use coracle_tests::case::Context;
use coracle_tests::harness::jail::{Jail, memory_limit, process_limit};
use coracle_tests::{Outcome, ensure};
use serde_json::{Value, json};

use super::rows::Found;
use super::{ESCAPE, Outside, SOON, read};

/// Of what the program asks for 256.
const PROCESSES: u64 = 32;
/// And of this; the program knows the number, and tries to double it.
const FILES: u64 = 64;
const MEMORY_BYTES: u64 = 64 << 20;
/// Bytes in a file; the program writes 16 MiB.
const FILE_BYTES: u64 = 1 << 20;

/// What is tried where, and what is found then: what the filter lets by, the limit refuses.
const LIMITS: &[(&str, &str, &str)] = &[
    ("many-files", "bare", "EMFILE"),
    ("many-files", "io", "the filter of `io`, for openat"),
    ("many-files", "io_recording", "EMFILE"),
    ("many-files", "mover", "EMFILE"),
    ("many-files", "vcpu", "the filter of `vcpu`, for openat"),
    ("raise-a-limit", "bare", "EPERM"),
    ("raise-a-limit", "main", "the filter of `main`, for prlimit64"),
    ("raise-a-limit", "mover", "the filter of `mover`, for prlimit64"),
    ("fork-bomb", "bare", "EAGAIN"),
    ("fork-bomb", "main", "the filter of `main`, for clone"),
    ("fork-bomb", "mover", "the filter of `mover`, for clone"),
    ("fork-bomb", "vcpu", "the filter of `vcpu`, for clone"),
    ("thread-bomb", "bare", "EAGAIN"),
    ("thread-bomb", "mover", "EAGAIN"),
    ("thread-bomb", "io", "the filter of `io`, for mmap"),
    ("long-file", "bare", "signal 25"),
    ("long-file", "mover", "signal 25"),
    ("long-file", "entropy", "the filter of `entropy`, for openat"),
];

pub(super) fn each_limit(context: &Context) -> Outcome {
    let outside = Outside::new()?;
    let jail = Jail::of(&context.environment, ESCAPE.as_ref())?;
    let flags = process_limit(PROCESSES).ok_or("this host has the controller")?;
    let jail = jail
        .flags(["--new-pid-ns", "--cleanup"])
        .flags(flags.iter().map(String::as_str))
        .flags(["--resource-limit", &format!("no-file={FILES}")])
        .flags(["--resource-limit", &format!("fsize={FILE_BYTES}")]);
    let mut attempts: Vec<&str> = LIMITS.iter().map(|(attempt, ..)| *attempt).collect();
    attempts.dedup();
    let mut places: Vec<&str> = LIMITS.iter().map(|(_, place, _)| *place).collect();
    places.sort_unstable();
    places.dedup();
    // Its own directory is the jail's user's.
    let task = outside.task(&attempts, &places, "/run")?.to_string();
    let ended = jail.arguments([task.as_str()]).spawn()?.monitor.wait(SOON)?;
    ensure!(ended.status.code() == Some(0), "{ended:?}");
    let found = read(&ended.console)?;
    let here = outside.found_here(&attempts, &["env", "--"])?;
    let mut wrong = Vec::new();
    for (attempt, place, expected) in LIMITS {
        let control = here.get(&((*attempt).to_owned(), "bare".to_owned()));
        match control {
            Some(Found::Nobody) => {}
            Some(found @ Found::Error(_)) => {
                println!("{attempt}: {found} outside of a jail, too: this host has a limit of its own")
            }
            other => wrong.push(format!("{attempt} outside: {other:?}")),
        }
        match found.get(&((*attempt).to_owned(), (*place).to_owned())) {
            Some(found) if found.to_string() == *expected => {}
            found => wrong.push(format!("{attempt} on {place}: {found:?}, not {expected}")),
        }
    }
    ensure!(wrong.is_empty(), "\n{}", wrong.join("\n"));
    memory(context, &outside)
}

/// Here it is the process itself that tries, and its supervisor that says why it is no more.
fn memory(context: &Context, outside: &Outside) -> Outcome {
    let flags = memory_limit(MEMORY_BYTES).ok_or("this host has the controller")?;
    let alone = |place: &str| -> Outcome<String> {
        let mut task = outside.task(&["much-memory"], &[place], "/run")?;
        task.as_object_mut()
            .ok_or("a task is an object")?
            .insert("alone".to_owned(), json!(true));
        Ok(task.to_string())
    };
    for place in ["bare", "mover", "vcpu"] {
        let jail = Jail::of(&context.environment, ESCAPE.as_ref())?.flags(["--supervise", "--cleanup"]);
        let task = alone(place)?;
        let jail = jail
            .flags(flags.iter().map(String::as_str))
            .arguments([task.as_str()]);
        let ended = jail.spawn()?.end(SOON)?;
        let record = ended.errors.lines().find(|line| line.starts_with('{'));
        let record: Value = serde_json::from_str(record.ok_or("the supervisor tells of the end")?)?;
        ensure!(record.get("cause") == Some(&json!("oom")), "{place}: {ended:?}");
        ensure!(
            record.get("signal") == Some(&json!("SIGKILL")),
            "{place}: {ended:?}"
        );
        // Without the limit there is enough.
        let free = Jail::of(&context.environment, ESCAPE.as_ref())?.arguments([task.as_str()]);
        let ended = free.spawn()?.monitor.wait(SOON)?;
        ensure!(ended.status.code() == Some(0), "{place}: {ended:?}");
    }
    Ok(())
}
