//! Landlock: a monitor without an API reaches what its configuration names, all of it and nothing else.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use coracle_tests::case::{Case, Context};
use coracle_tests::environment::Need;
use coracle_tests::guest::{Machine, blank_image};
use coracle_tests::harness::hosts::Star;
use coracle_tests::monitor::Launch;
use coracle_tests::{Outcome, ensure};
use serde_json::{Value, json};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "a_machine_has_every_file_that_its_configuration_names",
        need: Need::Kvm,
        run: every_file,
    },
    Case {
        name: "a_kernel_without_landlock_is_told_about_and_runs_it_nevertheless",
        need: Need::KvmAndTrace,
        run: without_landlock,
    },
    Case {
        name: "a_machine_has_the_tap_that_its_configuration_names",
        need: Need::KvmAndHosts,
        run: has_its_tap,
    },
];

/// A public key, as good as any.
const KEY: &str = concat!(
    "-----BEGIN PUBLIC KEY-----\n",
    "MCowBQYDK2VwAyEAAAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\n",
    "-----END PUBLIC KEY-----\n",
);
const SOON: Duration = Duration::from_secs(20);

/// Each file of a machine in a directory of its own, so that none is reached for the sake of another.
struct Places(tempfile::TempDir);

impl Places {
    fn new() -> Outcome<Self> {
        Ok(Self(tempfile::tempdir()?))
    }

    fn of(&self, directory: &str, name: &str) -> Outcome<PathBuf> {
        let directory = self.0.path().join(directory);
        fs::create_dir_all(&directory)?;
        Ok(directory.join(name))
    }

    fn image(&self, directory: &str) -> Outcome<PathBuf> {
        let path = self.of(directory, "disk")?;
        blank_image(&path, 1)?;
        Ok(path)
    }

    /// The names in a directory.
    fn names(&self, directory: &str) -> Outcome<Vec<String>> {
        let entries = fs::read_dir(self.0.path().join(directory))?;
        let mut names = Vec::new();
        for entry in entries {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        Ok(names)
    }
}

fn drive(id: &str, rest: &Value) -> Value {
    let mut drive = json!({ "drive_id": id, "is_root_device": false, "cache_type": "Writeback" });
    if let (Some(drive), Some(rest)) = (drive.as_object_mut(), rest.as_object()) {
        drive.extend(rest.clone());
    }
    drive
}

fn every_file(context: &Context) -> Outcome {
    let places = Places::new()?;
    let kernel = places.of("kernel", "kernel")?;
    fs::copy(&context.environment.unikernel, &kernel)?;
    // Where a link leads, there are the records of an image.
    let (far, link) = (places.image("far")?, places.of("link", "disk")?);
    std::os::unix::fs::symlink(&far, &link)?;
    let lease_at = places.of("leases", "b")?;
    let (kept, temporary) = (places.of("kept", "overlay")?, places.of("temporary", "overlay")?);
    let drives = [
        json!({ "path_on_host": link }),
        json!({ "path_on_host": places.image("named")?, "lease_at": lease_at }),
        json!({ "path_on_host": places.image("plain")?, "io_engine": "Sync" }),
        json!({ "overlay": { "base": places.image("base")?, "path": kept, "keep": true } }),
        json!({ "overlay": { "base": places.image("below")?, "path": temporary } }),
        json!({ "path_on_host": places.image("read")?, "is_read_only": true }),
    ];
    let writes: String = (0..5)
        .map(|dev| {
            format!("do=pattern-write:dev={dev},mib=1 do=flush:dev={dev} do=pattern-verify:dev={dev},mib=1 ")
        })
        .collect();
    let words = format!("{writes}do=read-check-zero:dev=5,mib=1 do=hello");
    let (serial, log) = (places.of("serial", "out")?, places.of("log", "log")?);
    let (metrics, others) = (places.of("metrics", "metrics")?, places.of("keys", "keys")?);
    fs::write(&others, KEY)?;
    let policy = places.of("policy", "policy")?;
    fs::write(&policy, super::seccomp::policy()?.to_string())?;
    let mut machine = Machine::new(&kernel, &coracle_tests::guest::unikernel_words(&words))
        .part("serial", json!({ "serial_out_path": serial }))
        .part("logger", json!({ "log_path": log, "level": "Debug" }))
        .part("entropy", json!({}));
    for (id, rest) in ["a", "b", "c", "d", "e", "f"].iter().zip(&drives) {
        machine = machine.drive(drive(id, rest));
    }
    let text = |path: &Path| path.display().to_string();
    // The second machine finds everything there: also its overlay.
    for turn in 1..=2 {
        let launch = Launch::new(&context.environment)?.without_api().arguments([
            "--metrics-path",
            &text(&metrics),
            "--trusted-keys",
            &text(&others),
            "--seccomp-filter",
            &text(&policy),
        ]);
        let ended = launch.config(&machine.config())?.spawn()?.wait(SOON)?;
        ended.expect(0)?;
        let said = fs::read_to_string(&serial)?;
        ensure!(said.contains("hello"), "turn {turn}: {said}");
        for (directory, expected) in [
            ("far", "disk.lease."),
            ("leases", "b.lease."),
            ("plain", "disk.lease."),
            ("kept", "overlay.lease."),
        ] {
            let names = places.names(directory)?;
            ensure!(
                names.iter().any(|name| name.starts_with(expected)),
                "turn {turn}: {directory}: {names:?}"
            );
        }
        ensure!(
            places.names("temporary")?.is_empty() && places.names("link")? == ["disk"],
            "turn {turn}"
        );
        let metrics = fs::read_to_string(&metrics)?;
        ensure!(metrics.lines().count() >= turn, "turn {turn}: {metrics}");
        let logged = fs::read_to_string(&log)?;
        ensure!(!logged.contains("has a lock only"), "turn {turn}: {logged}");
    }
    Ok(())
}

fn without_landlock(context: &Context) -> Outcome {
    let machine = Machine::unikernel(&context.environment, "do=hello");
    for (error, is_told) in [("EOPNOTSUPP", true), ("ENOSYS", true), ("", false)] {
        let inject = format!("inject=landlock_create_ruleset:error={error}");
        let tracer = ["strace", "-f", "-o", "/dev/null", "-e", inject.as_str()];
        let launch = Launch::new(&context.environment)?.without_api();
        let launch = match is_told {
            true => launch.by_way_of(tracer),
            false => launch.arguments(["--no-landlock"]),
        };
        let monitor = launch.config(&machine.config())?.spawn()?;
        monitor.console.wait_for("hello", SOON)?;
        let logged = monitor.log()?;
        monitor.wait(SOON)?.expect(0)?;
        ensure!(
            logged.contains("this kernel has no Landlock") == is_told,
            "{error}: {logged}"
        );
    }
    Ok(())
}

fn has_its_tap(context: &Context) -> Outcome {
    let star = Star::new(0)?;
    star.server.bridge(Star::server_address(0), &["tap0"])?;
    let machine = Machine::unikernel(&context.environment, "do=hello").part(
        "network-interfaces",
        json!([{ "iface_id": "eth0", "host_dev_name": "tap0" }]),
    );
    let launch = Launch::new(&context.environment)?.without_api();
    let ended = star
        .server
        .inside(|| launch.config(&machine.config())?.spawn()?.wait(SOON))??;
    ended.expect(0)
}
