//! Filters of system calls: each thread has them before it does anything, and what they refuse ends the process with a word.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use coracle_tests::case::{Case, Context};
use coracle_tests::environment::Need;
use coracle_tests::guest::{Machine, blank_image};
use coracle_tests::monitor::{Launch, Monitor};
use coracle_tests::{Outcome, ensure};
use serde_json::{Value, json};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "each_thread_of_a_running_guest_is_filtered",
        need: Need::Kvm,
        run: each_thread_is_filtered,
    },
    Case {
        name: "a_refused_call_ends_the_process_and_is_named",
        need: Need::Nothing,
        run: a_refused_call_is_named,
    },
    Case {
        name: "a_policy_that_is_none_is_told_before_anything_is_started",
        need: Need::Nothing,
        run: a_bad_policy_is_told,
    },
];

const SOON: Duration = Duration::from_secs(20);
/// Firecracker's, for a call that a filter has refused.
const REFUSED: i32 = 148;
/// Where a configuration makes no sense.
const BAD_CONFIGURATION: u8 = 152;

/// The policy that is built in.
pub(crate) fn policy() -> Outcome<Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources/seccomp/x86_64.json");
    Ok(serde_json::from_str(&fs::read_to_string(path)?)?)
}

/// How many filters each thread of `monitor` has, by the names of threads; those that have the same are one.
fn filters(monitor: &Monitor) -> Outcome<BTreeMap<String, (u32, bool)>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{}/task", monitor.process().0))? {
        let status = fs::read_to_string(entry?.path().join("status"))?;
        let field = |name: &str| {
            let mut lines = status.lines();
            lines.find_map(|line| Some(line.strip_prefix(name)?.strip_prefix(':')?.trim().to_owned()))
        };
        let name = field("Name").ok_or("a thread has a name")?;
        let count = field("Seccomp_filters")
            .ok_or("the kernel counts filters")?
            .parse()?;
        let is_filtered =
            field("Seccomp").as_deref() == Some("2") && field("NoNewPrivs").as_deref() == Some("1");
        // KVM has one of its own in the process.
        if !name.starts_with("kvm-") {
            found.insert(name, (count, is_filtered));
        }
    }
    Ok(found)
}

fn each_thread_is_filtered(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let disk = directory.path().join("disk");
    blank_image(&disk, 1)?;
    let machine = Machine::unikernel(&context.environment, "do=tick:ms=10,count=1000000")
        .disk("a", &disk)
        .drive(json!({
            "drive_id": "b", "path_on_host": disk, "is_root_device": false, "is_read_only": true, "lock": "none",
            "io_engine": "Sync"
        }))
        .part("entropy", json!({}));
    let started = |arguments: &[&str]| -> Outcome<Monitor> {
        let launch = Launch::new(&context.environment)?.arguments(arguments.iter().copied());
        let monitor = launch.config(&machine.config())?.start()?;
        monitor.console.wait_for("tick: n=3", SOON)?;
        Ok(monitor)
    };
    let monitor = started(&[])?;
    let found = filters(&monitor)?;
    ensure!(found.len() == 7, "{found:?}");
    for (name, (count, is_filtered)) in &found {
        // What the whole process may not do; what this thread does not have to; and what it does without when it ends, unless it
        // is the first. Who makes threads has those of the process alone.
        let expected = match name.as_str() {
            "spawner" => 2,
            "coracle" => 3,
            _ => 4,
        };
        ensure!(*is_filtered && *count == expected, "{name}: {found:?}");
    }
    // Its disk has one writer.
    drop(monitor);
    let bare = filters(&started(&["--no-seccomp"])?)?;
    ensure!(
        bare.len() == 6
            && bare
                .values()
                .all(|(count, is_filtered)| *count == 0 && !is_filtered),
        "{bare:?}"
    );
    Ok(())
}

/// A monitor whose policy lacks `call` for threads of that kind.
fn without(context: &Context, kind: &str, call: &str) -> Outcome<Launch> {
    let mut policy = policy()?;
    let rules = policy
        .pointer_mut(&format!("/{kind}/filter"))
        .and_then(Value::as_array_mut);
    let rules = rules.ok_or("there is a filter of that kind")?;
    let before = rules.len();
    rules.retain(|rule| rule.get("syscall") != Some(&json!(call)));
    ensure!(rules.len() < before, "{kind} has no {call}");
    let launch = Launch::new(&context.environment)?;
    fs::write(launch.directory().join("test-policy.json"), policy.to_string())?;
    Ok(launch.arguments(["--seccomp-filter", "test-policy.json"]))
}

fn a_refused_call_is_named(context: &Context) -> Outcome {
    let mut monitor = without(context, "api", "accept4")?.spawn()?;
    // It is refused when somebody calls.
    while std::os::unix::net::UnixStream::connect(monitor.socket()).is_err() {
        ensure!(monitor.is_running()?, "it has ended before anybody called");
        std::thread::sleep(Duration::from_millis(1));
    }
    let ended = monitor.wait(SOON)?;
    ensure!(ended.status.code() == Some(REFUSED), "{ended:?}");
    let said = "coracle: thread `api` was refused system call 288 (accept4) by its filter";
    ensure!(ended.errors.contains(said), "{}", ended.errors);
    Ok(())
}

fn a_bad_policy_is_told(context: &Context) -> Outcome {
    let mut kinds = policy()?;
    kinds.as_object_mut().ok_or("it is an object")?.remove("io");
    let mut unknown = policy()?;
    let rules = unknown.pointer_mut("/api/filter").and_then(Value::as_array_mut);
    rules
        .ok_or("it has rules")?
        .push(json!({ "syscall": "levitate" }));
    for (text, why) in [
        ("{".to_owned(), "it is no JSON"),
        (
            kinds.to_string(),
            "it has to have a filter for each of start, vmm, api",
        ),
        (unknown.to_string(), "levitate"),
    ] {
        let launch = Launch::new(&context.environment)?;
        fs::write(launch.directory().join("test-policy.json"), text)?;
        let launch = launch.arguments(["--seccomp-filter", "test-policy.json"]);
        let ended = launch.spawn()?.wait(SOON)?;
        ended.expect(BAD_CONFIGURATION)?;
        ensure!(
            ended.errors.contains("`test-policy.json`") && ended.errors.contains(why),
            "{}",
            ended.errors
        );
    }
    Ok(())
}
