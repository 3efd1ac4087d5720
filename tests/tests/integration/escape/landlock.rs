//! What Landlock refuses by itself, where no filter does: the places of the program are those of `begin` and `begin_without`.

use std::fs;
use std::path::Path;
use std::process::Command;

use coracle_tests::case::Context;
use coracle_tests::{Outcome, ensure};
use serde_json::{Map, Value, json};

use super::{Outside, read};

/// Attempt, and what a process is told whose configuration does not name what it is on.
const UNNAMED: &[(&str, &str)] = &[
    ("open", "EACCES"),
    ("open-by-dots", "EACCES"),
    ("open-by-link", "EACCES"),
    ("open-by-link-of-dots", "EACCES"),
    ("open-by-own-root", "EACCES"),
    ("write", "EACCES"),
    ("list", "EACCES"),
    ("make", "EACCES"),
    ("service-of-the-host", "EACCES"),
    ("socket-of-the-host", "EPERM"),
    ("signal", "EPERM"),
    ("probe-a-process", "EPERM"),
    ("trace", "EPERM"),
];
/// Those on files, and on servers: a thread that opens nothing calls nobody, either.
const OF_A_THREAD: usize = 9;

/// What they come to at a place, where `members` are more of the program's task.
fn outcomes(
    outside: &Outside,
    attempts: &[&str],
    place: &str,
    members: &Value,
) -> Outcome<Vec<(String, String)>> {
    let here = outside.directory.path().display().to_string();
    let mut task = outside.task(attempts, &[place], &here)?;
    if let (Some(task), Some(members)) = (task.as_object_mut(), members.as_object()) {
        task.extend(members.clone());
    }
    let program = outside.directory.path().join("escape");
    let output = Command::new(program).arg(task.to_string()).output()?;
    ensure!(output.status.success(), "{output:?}");
    let found = read(&String::from_utf8(output.stdout)?)?;
    ensure!(found.len() == attempts.len(), "{found:?}");
    Ok(found
        .into_iter()
        .map(|((attempt, _), found)| (attempt, found.to_string()))
        .collect())
}

/// Compares, and leaves out what this host refuses to a process that is not confined, too; says so.
fn judge(outside: &Outside, rows: &[(&str, &str)], place: &str, members: &Value) -> Outcome {
    let attempts: Vec<&str> = rows.iter().map(|(attempt, _)| *attempt).collect();
    let free = outcomes(outside, &attempts, "bare", members)?;
    let found = outcomes(outside, &attempts, place, members)?;
    let mut shown = 0;
    let mut wrong = Vec::new();
    for ((attempt, free), (_, found)) in free.iter().zip(&found) {
        let expected = rows.iter().find(|(name, _)| name == attempt);
        let (_, expected) = expected.ok_or("every attempt has a row")?;
        if free != "nobody" {
            println!("{attempt}: {free} without Landlock, too: it shows nothing here");
            continue;
        }
        shown += 1;
        if found != expected {
            wrong.push(format!("{attempt}: {found}, not {expected}"));
        }
    }
    ensure!(wrong.is_empty(), "{place}:\n{}", wrong.join("\n"));
    ensure!(shown >= 8, "only {shown} attempts show something here");
    Ok(())
}

pub(super) fn unnamed_files(_: &Context) -> Outcome {
    let outside = Outside::new()?;
    let named = tempfile::tempdir()?;
    let (kernel, disk) = (named.path().join("kernel"), named.path().join("disk"));
    fs::write(&kernel, "")?;
    fs::write(&disk, vec![0; 1 << 20])?;
    let config = named.path().join("config.json");
    let content = |lock: &str| {
        json!({
            "boot-source": { "kernel_image_path": kernel },
            "drives": [{ "drive_id": "a", "is_root_device": false, "path_on_host": disk, "lock": lock }],
        })
        .to_string()
    };
    fs::write(&config, content("exclusive"))?;
    judge(&outside, UNNAMED, "configured", &json!({ "config": config }))?;

    // What it names is there, for what it is named for; its directory is that of the lease's records.
    let on = |secret: &Path| json!({ "config": config, "secret": secret, "directory": named.path() });
    let all = ["open", "write", "list", "make"];
    let found = outcomes(&outside, &all, "configured", &on(&disk))?;
    ensure!(found.iter().all(|(_, found)| found == "nobody"), "{found:?}");
    fs::write(&config, content("none"))?;
    for (path, expected) in [
        (&disk, ["EACCES", "EACCES", "nobody", "nobody"]),
        (&kernel, ["EACCES", "EACCES", "nobody", "EACCES"]),
        (&config, ["EACCES", "EACCES", "EACCES", "EACCES"]),
    ] {
        let found = outcomes(&outside, &all, "configured", &on(path))?;
        // By the names of the attempts: list, make, open, write.
        let found: Vec<&str> = found.iter().map(|(_, found)| found.as_str()).collect();
        ensure!(found == expected, "{}: {found:?}", path.display());
    }
    Ok(())
}

pub(super) fn threads_that_open_nothing(_: &Context) -> Outcome {
    let outside = Outside::new()?;
    // A policy whose filter of a vCPU lets by whatever any filter does.
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources/seccomp/x86_64.json");
    let mut policy: Map<String, Value> = serde_json::from_str(&fs::read_to_string(path)?)?;
    let mut names: Vec<Value> = policy
        .values()
        .filter_map(|filter| filter.get("filter")?.as_array())
        .flatten()
        .filter_map(|rule| rule.get("syscall").cloned())
        .collect();
    names.sort_by_key(ToString::to_string);
    names.dedup();
    let rules: Vec<Value> = names.iter().map(|name| json!({ "syscall": name })).collect();
    let wide = json!({ "mismatch_action": "trap", "match_action": "allow", "filter": rules });
    policy.insert("vcpu".to_owned(), wide);
    let place = outside.directory.path().join("policy.json");
    fs::write(&place, Value::from(policy).to_string())?;
    let rows = UNNAMED.get(..OF_A_THREAD).ok_or("there are so many")?;
    judge(&outside, rows, "open-vcpu", &json!({ "policy": place }))
}
