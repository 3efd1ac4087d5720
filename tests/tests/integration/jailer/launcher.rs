//! A script that was written for Firecracker's jailer, by what its documentation says.

use std::fs;
use std::path::Path;
use std::process::Command;

use coracle_tests::case::Context;
use coracle_tests::guest::Machine;
use coracle_tests::harness::jail::UID;
use coracle_tests::http::Connection;
use coracle_tests::process::Process;
use coracle_tests::{Outcome, ensure};
use serde_json::{Value, json};

use super::SOON;

pub(super) fn a_launcher_works(context: &Context) -> Outcome {
    let place = tempfile::tempdir()?;
    let machine = Machine::unikernel(&context.environment, "do=hello do=exit:status=0");
    let config = machine.config();
    let boot_args = config.pointer("/boot-source/boot_args").and_then(Value::as_str);
    let boot_args = boot_args.ok_or("there are arguments")?;
    for mode in ["config", "api"] {
        let id = format!("launcher-{mode}-{}", std::process::id());
        let run = |verb: &str| {
            let done = Command::new("sh")
                .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("clients/launcher.sh"))
                .arg(verb)
                .env("JAILER", &context.environment.jailer)
                .env("MONITOR", &context.environment.coracle)
                .env("KERNEL", &context.environment.unikernel)
                .env("BOOT_ARGS", boot_args)
                .env("BASE", place.path())
                .env("ID", &id)
                .env("OWNER", UID.to_string())
                .output()?;
            ensure!(done.status.success(), "{verb}: {done:?}");
            Ok(String::from_utf8(done.stdout)?)
        };
        let said = run(mode)?;
        let mut words = said.split_whitespace();
        let (pid, socket) = (
            words.next().ok_or("no process")?,
            words.next().ok_or("no socket")?,
        );
        let monitor = Process(pid.parse()?);
        if mode == "api" {
            starts(socket.as_ref(), boot_args)?;
        }
        let deadline = std::time::Instant::now() + SOON;
        while monitor.is_there() {
            ensure!(
                std::time::Instant::now() < deadline,
                "{mode}: the guest does not end"
            );
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        let root = place.path().join("coracle").join(&id).join("root");
        let log = fs::read_to_string(root.join("log"))?;
        ensure!(log.contains("the guest exited with status 0"), "{mode}: {log}");
        // Without our flags cleaning up is the launcher's, as it always was.
        run("clean")?;
        ensure!(
            !place.path().join("coracle").exists(),
            "{mode}: something is left"
        );
    }
    Ok(())
}

/// As any client of Firecracker does it.
fn starts(socket: &Path, boot_args: &str) -> Outcome {
    let mut api = Connection::open(socket)?;
    for (path, body) in [
        (
            "/boot-source",
            json!({ "kernel_image_path": "kernel", "boot_args": boot_args }),
        ),
        ("/actions", json!({ "action_type": "InstanceStart" })),
    ] {
        let answer = api.request("PUT", path, Some(&body.to_string()))?;
        ensure!(answer.status == 204, "{path}: {} {}", answer.status, answer.body);
    }
    Ok(())
}
