//! Input that is wrong gets an error that names it and says what to do, and nothing is left behind.

use std::path::Path;
use std::time::Duration;

use coracle_tests::case::{Case, Context};
use coracle_tests::environment::Need;
use coracle_tests::exchange::{Files, Phase};
use coracle_tests::guest::{Machine, blank_image, run};
use coracle_tests::monitor::{Ended, Launch};
use coracle_tests::probe::{self, Protocol};
use coracle_tests::process::{copy_program, processes_with, sockets_with};
use coracle_tests::{Outcome, ensure};
use serde_json::Value;

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "a_host_without_kvm_is_named",
        need: Need::KvmAndMountNamespace,
        run: a_host_without_kvm_is_named,
    },
    Case {
        name: "a_user_without_permission_is_told",
        need: Need::KvmAndRoot,
        run: a_user_without_permission_is_told,
    },
    Case {
        name: "wrong_configurations_are_refused",
        need: Need::Kvm,
        run: wrong_configurations_are_refused,
    },
    Case {
        name: "wrong_machines_do_not_start",
        need: Need::Kvm,
        run: wrong_machines_do_not_start,
    },
    Case {
        name: "wrong_configuration_files_are_refused",
        need: Need::Nothing,
        run: wrong_files_are_refused,
    },
    Case {
        name: "wrong_arguments_are_refused",
        need: Need::Nothing,
        run: wrong_arguments_are_refused,
    },
    Case {
        name: "a_socket_path_in_use_stays_as_it_is",
        need: Need::Nothing,
        run: a_socket_path_in_use_stays_as_it_is,
    },
];

const BAD_CONFIGURATION: u8 = 152;
const BAD_ARGUMENT: u8 = 153;
const END_WITHIN: Duration = Duration::from_secs(20);

fn a_host_without_kvm_is_named(context: &Context) -> Outcome {
    let rows = [
        // An empty /dev but for what every program expects there.
        (
            "cd $(mktemp -d) && for d in null zero urandom; do touch $d && mount --bind /dev/$d $d; done && mount --rbind . /dev",
            "does not exist",
        ),
        ("mount --bind /dev/null /dev/kvm", "kvm"),
    ];
    for (change, word) in rows {
        let launch = Launch::new(&context.environment)?;
        let machine = Machine::new(&probe::write(Protocol::Linux64, launch.directory())?, "quiet");
        let changed = context.environment.after_mounting(change);
        let launch = launch.by_way_of(changed.iter().map(String::as_str));
        let ended = run(launch, &machine, END_WITHIN)?;
        refused(&ended, &["/dev/kvm", word])?;
    }
    Ok(())
}

fn a_user_without_permission_is_told(context: &Context) -> Outcome {
    let launch = Launch::new(&context.environment)?;
    let machine = Machine::new(&probe::write(Protocol::Linux64, launch.directory())?, "quiet");
    // Where the build directory is private, the other user needs a copy of the program.
    let program = launch.directory().join("test-coracle");
    copy_program(&context.environment.coracle, &program)?;
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    std::fs::set_permissions(launch.directory(), open)?;
    let launch = launch.program(&program);
    let launch = launch.by_way_of(["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]);
    refused(
        &run(launch, &machine, END_WITHIN)?,
        &["/dev/kvm", "permission", "group"],
    )
}

/// What is wrong, the change to a good configuration, words that the error says.
type Row = (&'static str, &'static str, &'static [&'static str]);

/// Faults that a configuration shows by itself.
const OF_CONFIGURATION: &[Row] = &[
    (
        "too many vCPUs",
        r#"{"machine-config":{"vcpu_count":33}}"#,
        &["33", "32"],
    ),
    (
        "no vCPU",
        r#"{"machine-config":{"vcpu_count":0}}"#,
        &["vcpu_count", "32"],
    ),
    (
        "no memory",
        r#"{"machine-config":{"mem_size_mib":0}}"#,
        &["mem_size_mib"],
    ),
    (
        "more memory than can be",
        r#"{"machine-config":{"mem_size_mib":1099511627776}}"#,
        &["mem_size_mib"],
    ),
    (
        "an unknown field",
        r#"{"machine-config":{"cpus":3}}"#,
        &["cpus", "unknown"],
    ),
    (
        "a field of another type",
        r#"{"machine-config":{"vcpu_count":"two"}}"#,
        &["two"],
    ),
    (
        "no such kernel",
        r#"{"boot-source":{"kernel_image_path":"{missing}"}}"#,
        &["test-missing"],
    ),
    (
        "no such initrd",
        r#"{"boot-source":{"initrd_path":"{missing}"}}"#,
        &["test-missing"],
    ),
    (
        "boot_args too long",
        r#"{"boot-source":{"boot_args":"{5000 letters}"}}"#,
        &["boot_args", "5000"],
    ),
    (
        "no such disk",
        r#"{"drives":[{"path_on_host":"{missing}",{drive}}]}"#,
        &["test-missing"],
    ),
    (
        "no such engine",
        r#"{"drives":[{"path_on_host":"{disk}","io_engine":"Warp",{drive}}]}"#,
        &["Warp", "Async"],
    ),
    (
        "a drive name with a slash",
        r#"{"drives":[{"path_on_host":"{disk}","drive_id":"a/b","is_root_device":false}]}"#,
        &["alphanumeric"],
    ),
    (
        "a limit without a time",
        r#"{"drives":[{"path_on_host":"{disk}","rate_limiter":{"ops":{"size":1}},{drive}}]}"#,
        &["refill_time"],
    ),
    (
        "two root drives",
        r#"{"drives":[{"path_on_host":"{disk}","drive_id":"a","is_root_device":true},
            {"path_on_host":"{disk}","drive_id":"b","is_root_device":true}]}"#,
        &["root"],
    ),
];

/// Faults that show when the machine is built.
const OF_BUILDING: &[Row] = &[
    (
        "a kernel of no format",
        r#"{"boot-source":{"kernel_image_path":"{text}"}}"#,
        &["ELF", "bzImage"],
    ),
    (
        "an empty kernel",
        r#"{"boot-source":{"kernel_image_path":"{empty}"}}"#,
        &["kernel", "test-empty"],
    ),
    (
        "a directory as a kernel",
        r#"{"boot-source":{"kernel_image_path":"{directory}"}}"#,
        &["kernel"],
    ),
    (
        "half of a kernel",
        r#"{"boot-source":{"kernel_image_path":"{half}"}}"#,
        &["kernel", "test-half"],
    ),
    (
        "a kernel larger than memory",
        r#"{"machine-config":{"mem_size_mib":1}}"#,
        &["memory"],
    ),
    (
        "an initrd larger than memory",
        r#"{"boot-source":{"initrd_path":"{huge}"}}"#,
        &["initrd", "MiB"],
    ),
    (
        "an empty disk",
        r#"{"drives":[{"path_on_host":"{empty}",{drive}}]}"#,
        &["test-empty", "512"],
    ),
    (
        "a disk below a sector",
        r#"{"drives":[{"path_on_host":"{small}",{drive}}]}"#,
        &["test-small", "512"],
    ),
    (
        "a disk of 1.5 sectors",
        r#"{"drives":[{"path_on_host":"{odd}",{drive}}]}"#,
        &["test-odd", "512"],
    ),
    (
        "a directory as a disk",
        r#"{"drives":[{"path_on_host":"{directory}",{drive}}]}"#,
        &["test-directory"],
    ),
];

fn wrong_configurations_are_refused(context: &Context) -> Outcome {
    all_are_refused(context, OF_CONFIGURATION)
}

fn wrong_machines_do_not_start(context: &Context) -> Outcome {
    all_are_refused(context, OF_BUILDING)
}

fn all_are_refused(context: &Context, rows: &[Row]) -> Outcome {
    let mut wrong = Vec::new();
    for row in rows {
        by_file(context, row).unwrap_or_else(|e| wrong.push(format!("{}, by file: {}", row.0, message(&e))));
        by_api(context, row).unwrap_or_else(|e| wrong.push(format!("{}, by API: {}", row.0, message(&e))));
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

fn by_file(context: &Context, (_, change, words): &Row) -> Outcome {
    let launch = Launch::new(&context.environment)?;
    let config = configuration(launch.directory(), change)?;
    let name = launch.directory().display().to_string();
    // With the API, so that there is a socket to leave behind.
    let ended = launch.config(&config)?.spawn()?.wait(END_WITHIN)?;
    ended.expect(BAD_CONFIGURATION)?;
    refused(&ended, words)?;
    ensure!(processes_with(&name)?.is_empty(), "a process is left");
    ensure!(sockets_with(&name)? == 0, "a socket is left");
    Ok(())
}

fn by_api(context: &Context, (_, change, words): &Row) -> Outcome {
    let launch = Launch::new(&context.environment)?;
    let config = configuration(launch.directory(), change)?;
    let monitor = launch.start()?;
    let refusal = match monitor.configure(&config) {
        Err(refusal) => refusal,
        Ok(()) => monitor.start_instance().err().ok_or("the machine has started")?,
    };
    let text = message(&refusal).to_lowercase();
    ensure!(text.contains("400 {\"fault_message\":"), "no fault: {text}");
    for word in *words {
        ensure!(text.contains(&word.to_lowercase()), "no '{word}' in: {text}");
    }
    Ok(())
}

/// A good configuration with a change, and the files that it names.
fn configuration(directory: &Path, change: &str) -> Outcome<Value> {
    let files = Files::make(directory)?;
    std::fs::write(directory.join("test-empty"), "")?;
    std::fs::write(directory.join("test-small"), [0; 100])?;
    std::fs::write(directory.join("test-odd"), [0; 768])?;
    std::fs::create_dir(directory.join("test-directory"))?;
    blank_image(&directory.join("test-huge"), 256)?;
    let kernel = std::fs::read(probe::write(Protocol::Pvh, directory)?)?;
    std::fs::write(directory.join("test-half"), kernel.get(..100).unwrap_or_default())?;
    let change = change
        .replace("{5000 letters}", &"x".repeat(5000))
        .replace("{drive}", r#""drive_id":"d","is_root_device":false"#);
    let change = ["empty", "small", "odd", "directory", "huge", "half"]
        .iter()
        .fold(change, |text, name| {
            text.replace(
                &format!("{{{name}}}"),
                &directory.join(format!("test-{name}")).display().to_string(),
            )
        });
    let mut config = Machine::new(&directory.join("test-kernel"), "quiet").config();
    merge(&mut config, &serde_json::from_str(&files.fill_in(&change))?);
    Ok(config)
}

/// Puts every member of `change` into `value`.
fn merge(value: &mut Value, change: &Value) {
    match (value, change) {
        (Value::Object(value), Value::Object(change)) => {
            for (key, change) in change {
                merge(value.entry(key).or_insert(Value::Null), change);
            }
        }
        (value, change) => *value = change.clone(),
    }
}

fn wrong_files_are_refused(context: &Context) -> Outcome {
    let machine = r#""machine-config":{"vcpu_count":1,"mem_size_mib":64}"#;
    let rows = [
        ("", "line 1"),
        ("{", "line 1"),
        ("[]", "test-file"),
        ("{}", "boot-source"),
        (&format!("{{{machine},\"boot-sauce\":{{}}}}"), "boot-sauce"),
        (&format!("{{{machine},{machine}}}"), "duplicate"),
        (
            r#"{"machine-config":{"vcpu_count":1,"vcpu_count":2,"mem_size_mib":64}}"#,
            "duplicate",
        ),
        (&" ".repeat(3 << 20), "test-file"),
    ];
    for (text, word) in rows {
        let launch = Launch::new(&context.environment)?;
        let path = launch.directory().join("test-file");
        std::fs::write(&path, text)?;
        let ended = launch
            .arguments(["--config-file", &path.display().to_string()])
            .spawn()?
            .wait(END_WITHIN)?;
        let head = text.get(..text.len().min(60)).unwrap_or_default();
        ended
            .expect(BAD_CONFIGURATION)
            .map_err(|e| format!("{head}: {}", message(&e)))?;
        refused(&ended, &[word])?;
    }
    let launch = Launch::new(&context.environment)?.arguments(["--config-file", "/nowhere/config.json"]);
    refused(&launch.spawn()?.wait(END_WITHIN)?, &["/nowhere/config.json"])
}

fn wrong_arguments_are_refused(context: &Context) -> Outcome {
    // A level is read when the log is set up, as in Firecracker, and so has the other status.
    let rows: [(&[&str], u8, &str); 5] = [
        (&["--unheard-of"], BAD_ARGUMENT, "unheard-of"),
        (&["--id", "a name with spaces"], BAD_ARGUMENT, "id"),
        (&["--level", "loud"], BAD_CONFIGURATION, "loud"),
        (&["--http-api-max-payload-size", "many"], BAD_ARGUMENT, "many"),
        (&["stray"], BAD_ARGUMENT, "stray"),
    ];
    for (arguments, status, word) in rows {
        let launch = Launch::new(&context.environment)?.arguments(arguments.iter().copied());
        let ended = launch.spawn()?.wait(END_WITHIN)?;
        ended
            .expect(status)
            .map_err(|e| format!("{arguments:?}: {}", message(&e)))?;
        refused(&ended, &[word])?;
    }
    // Without an API and without a file there would be nothing to do.
    let ended = Launch::new(&context.environment)?
        .without_api()
        .spawn()?
        .wait(END_WITHIN)?;
    ended.expect(BAD_ARGUMENT)?;
    refused(&ended, &["config-file"])
}

fn a_socket_path_in_use_stays_as_it_is(context: &Context) -> Outcome {
    let launch = Launch::new(&context.environment)?;
    let files = Files::make(launch.directory())?;
    let first = launch.start()?;
    files.reach(&first, Phase::Running)?;
    let socket = first.socket().display().to_string();
    let second = Launch::new(&context.environment)?
        .without_socket()
        .arguments(["--api-sock", &socket]);
    let ended = second.spawn()?.wait(END_WITHIN)?;
    ensure!(ended.status.code() != Some(0), "two monitors on one socket");
    refused(&ended, &[&socket])?;
    first.must("GET", "/version", None).map(drop)
}

/// Checks that a process has ended with an error that says these words.
fn refused(ended: &Ended, words: &[&str]) -> Outcome {
    ensure!(
        !matches!(ended.status.code(), Some(0) | None),
        "ended with {:?}: {}",
        ended.status,
        ended.errors
    );
    let errors = ended.errors.to_lowercase();
    for word in words {
        ensure!(
            errors.contains(&word.to_lowercase()),
            "no '{word}' in: {}",
            ended.errors
        );
    }
    ensure!(!errors.contains("panicked"), "a panic: {}", ended.errors);
    ensure!(
        ended.left_behind.is_empty(),
        "left behind: {:?}",
        ended.left_behind
    );
    Ok(())
}

fn message(failed: &libtest_mimic::Failed) -> &str {
    coracle_tests::case::text(failed)
}
