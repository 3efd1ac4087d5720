//! Files that a jail is given, and files that it makes.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::Path;
use std::process::Command;

use coracle_tests::case::Context;
use coracle_tests::guest::{Machine, blank_image};
use coracle_tests::harness::jail::{Jail, UID};
use coracle_tests::monitor::Launch;
use coracle_tests::process::copy_program;
use coracle_tests::{Outcome, ensure};
use rustix::process::Signal;
use serde_json::json;

use super::SOON;
use super::supervised::ticking;

pub(super) fn a_snapshot_survives(context: &Context) -> Outcome {
    let jailed = ticking(
        context,
        Jail::new(&context.environment)?.flags(["--supervise", "--cleanup"]),
    )?;
    jailed.monitor.set_state("Paused")?;
    let body = json!({ "snapshot_path": "/vm.state", "mem_file_path": "/run/vm.memory" });
    jailed.monitor.must("PUT", "/snapshot/create", Some(&body))?;
    jailed.monitor.signal(Signal::TERM)?;
    let root = jailed.root.clone();
    let mut jailed = jailed;
    jailed.ends(SOON)?;
    let mut names: Vec<_> = fs::read_dir(&root)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Outcome<_>>()?;
    names.sort();
    ensure!(names == ["run", "vm.state"], "{names:?}");
    let names: Vec<_> = fs::read_dir(root.join("run"))?
        .flatten()
        .map(|entry| entry.file_name())
        .collect();
    ensure!(names == ["vm.memory"], "{names:?}");

    // It is of use: another jail goes on from it.
    let next = Jail::new(&context.environment)?
        .flags(["--cleanup"])
        .shows(&root.join("vm.state"), "vm.state")?
        .shows(&root.join("run/vm.memory"), "vm.memory")?;
    for file in ["vm.state", "run/vm.memory"] {
        chown(root.join(file), Some(UID), Some(UID))?;
    }
    let next = next.start()?;
    let body = json!({
        "snapshot_path": "/vm.state", "resume_vm": true,
        "mem_backend": { "backend_type": "File", "backend_path": "/vm.memory" }
    });
    next.monitor.must("PUT", "/snapshot/load", Some(&body))?;
    next.monitor.console.wait_for("tick: n=", SOON)?;
    next.monitor.signal(Signal::TERM)?;
    let ended = next.monitor.wait(SOON)?;
    ensure!(ended.status.code() == Some(143), "{ended:?}");
    Ok(())
}

/// The host's file where the user may execute it, which costs a jail nothing; and a copy if that is asked for, or needed.
pub(super) fn the_monitor_is_shown_or_copied(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let private = directory.path().join("coracle");
    copy_program(&context.environment.coracle, &private)?;
    fs::set_permissions(&private, fs::Permissions::from_mode(0o700))?;
    let public = &context.environment.coracle;
    for (monitor, flag, is_copied) in [
        (public, None, false),
        (public, Some("--copy-exec"), true),
        (&private, None, true),
    ] {
        let jail = Jail::of(&context.environment, monitor)?
            .flags(["--cleanup"])
            .flags(flag);
        let name = monitor.file_name().unwrap_or_default().to_owned();
        let jailed = jail.start()?;
        let length = fs::metadata(jailed.root.join(name))?.len();
        let expected = if is_copied {
            fs::metadata(monitor)?.len()
        } else {
            0
        };
        ensure!(
            length == expected,
            "{}, {flag:?}: {length} bytes in the jail",
            monitor.display()
        );
        jailed.monitor.signal(Signal::TERM)?;
        let ended = jailed.end(SOON)?;
        ensure!(ended.status.code() == Some(143), "{ended:?}");
    }
    Ok(())
}

/// On a host of systemd all mounts are shared: with those of a new namespace, and with copies of them.
pub(super) fn mounts_stay_apart(context: &Context) -> Outcome {
    let place = tempfile::tempdir()?;
    let gift = place.path().join("gift");
    fs::create_dir(&gift)?;
    let shared = "mount --make-rshared /; exec \"$@\"";
    let jailed = ticking(
        context,
        Jail::new(&context.environment)?
            .flags(["--cleanup", "--supervise"])
            .shows(&gift, "gift")?
            .by_way_of([
                "unshare",
                "--mount",
                "--propagation",
                "private",
                "sh",
                "-ec",
                shared,
                "sh",
            ]),
    )?;
    let pid = jailed.process()?.0;
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo"))?;
    ensure!(mounts.lines().any(|line| line.contains(" /gift ")), "{mounts}");
    for word in ["shared:", "master:"] {
        ensure!(!mounts.contains(word), "{mounts}");
    }
    // What is mounted on the host later is the host's alone.
    let late = Command::new("nsenter")
        .args(["--mount", "--target", &jailed.monitor.process().0.to_string()])
        .args(["mount", "-t", "tmpfs", "late"])
        .arg(&gift)
        .status()?;
    ensure!(late.success(), "nothing is mounted: {late}");
    let after = fs::read_to_string(format!("/proc/{pid}/mountinfo"))?;
    ensure!(after == mounts, "{after}");
    jailed.monitor.signal(Signal::TERM)?;
    let ended = jailed.end(SOON)?;
    ensure!(ended.status.code() == Some(143), "{ended:?}");
    Ok(())
}

pub(super) fn a_disk_is_shown(context: &Context) -> Outcome {
    let words = "do=pattern-write:mib=1,seed=3 do=pattern-verify:mib=1,seed=3 do=tick:ms=10,count=1000000";
    for is_by_descriptor in [false, true] {
        let jail = Jail::new(&context.environment)?.flags(["--supervise", "--cleanup"]);
        let image = jail.directory().join("test-image");
        blank_image(&image, 1)?;
        chown(&image, Some(UID), Some(UID))?;
        let machine = Machine::unikernel(&context.environment, words).drive(json!({
            "drive_id": "d", "path_on_host": "/disks/d", "is_root_device": false, "is_read_only": false
        }));
        let script = format!("exec 8<>{}; exec \"$@\"", image.display());
        let jail = if is_by_descriptor {
            jail.flags(["--fd", "8:disks/d"])
                .by_way_of(["sh", "-c", &script, "sh"])
        } else {
            jail.shows(&image, "disks/d")?
        };
        let jailed = jail.machine(&machine)?.start()?;
        jailed.monitor.console.wait_for("tick: n=1", SOON)?;
        // What the guest wrote is in the image itself.
        let content = fs::read(&image)?;
        ensure!(content.iter().any(|byte| *byte != 0), "the image is as it was");
        // Nobody above the monitor has it open, so that its lock ends with the monitor.
        no_more_than_the_path(jailed.monitor.process().0, &image)?;
        let second = Launch::new(&context.environment)?.start()?;
        let drive = json!({
            "drive_id": "d", "path_on_host": image, "is_root_device": false, "is_read_only": false
        });
        let answer = second.request("PUT", "/drives/d", Some(&drive))?;
        ensure!(answer.status == 400, "{} {}", answer.status, answer.body);
        super::kill(jailed.process()?, Signal::KILL)?;
        let mut jailed = jailed;
        jailed.ends(SOON)?;
        let answer = second.request("PUT", "/drives/d", Some(&drive))?;
        ensure!(answer.status == 204, "{} {}", answer.status, answer.body);
        // The records of the lease are the monitor's own files.
        let left = fs::read_dir(jailed.root.join("disks"))?.flatten();
        let left: Vec<_> = left
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect();
        ensure!(left.iter().all(|name| name.starts_with("d.lease.")), "{left:?}");
        ensure!(!jailed.root.join("dev").exists(), "the devices are still there");
    }
    Ok(())
}

/// A descriptor that is only a path keeps no lock, and is not counted as one of a file that is open.
fn no_more_than_the_path(process: u32, image: &Path) -> Outcome {
    for entry in fs::read_dir(format!("/proc/{process}/fd"))? {
        let entry = entry?;
        if fs::read_link(entry.path()).is_ok_and(|target| target == image) {
            let name = entry.file_name().to_string_lossy().into_owned();
            let info = fs::read_to_string(format!("/proc/{process}/fdinfo/{name}"))?;
            let flags = info
                .lines()
                .find_map(|line| line.strip_prefix("flags:"))
                .ok_or("no flags")?;
            let flags = u32::from_str_radix(flags.trim(), 8)?;
            ensure!(
                flags & rustix::fs::OFlags::PATH.bits() != 0,
                "descriptor {name} of the jailer: {info}"
            );
        }
    }
    Ok(())
}
