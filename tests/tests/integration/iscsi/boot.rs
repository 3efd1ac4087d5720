//! A host's user who may use /dev/kvm and nothing else boots Linux from a target, and so does another one afterwards.

use std::process::Command;
use std::time::Duration;

use coracle_tests::case::{Context, text};
use coracle_tests::environment::Environment;
use coracle_tests::guest::{Linux, Machine, copy_image};
use coracle_tests::harness::iscsi::target::{Lun, Plan, Target};
use coracle_tests::monitor::{Launch, Monitor};
use coracle_tests::{Outcome, ensure};
use rustix::process::Signal;
use serde_json::json;

use super::says;

/// A boot takes ten seconds where kernel code is emulated, and ten times that on a host with ten times its work.
const BOOT_WITHIN: Duration = Duration::from_secs(240);
const SOON: Duration = Duration::from_secs(20);
const KIB: u64 = 64;
/// In a mount namespace of its own: /dev/kvm is a node that nobody may open, too, and the rest belongs to others.
const AS_NOBODY: &str = r#"mknod "$0" c 10 232 && chmod 666 "$0" && mount --bind "$0" /dev/kvm &&
    exec setpriv --reuid=65534 --regid=65534 --clear-groups "$@""#;

pub(super) fn run(context: &Context) -> Outcome {
    let seed = context.seed.clone().below(1 << 31);
    let directory = tempfile::tempdir()?;
    open_to_all(directory.path(), 0o777)?;
    let linux = Linux::read(&context.environment)?;
    let image = directory.path().join("image");
    copy_image(&linux.rootfs, &image)?;
    let target = Target::start(Plan::default().lun(Lun::of(&image)?))?;
    let lease_at = directory.path().join("record");
    let machine = |words: &str| -> Outcome<Machine> {
        let machine = linux.machine("smp", directory.path(), words)?;
        Ok(machine
            .root("path_on_host", &json!(target.url(1)))
            .root("cache_type", &json!("Writeback"))
            .root("lock", &json!("exclusive"))
            .root("lease_at", &json!(lease_at)))
    };

    let write = format!("hello disk-write /data/pattern {KIB} {seed} hello records 1000000 8 1");
    let first = as_nobody(&context.environment, "first", &machine(&write)?)?;
    let worked = first.console.wait_for("init: record 3\r", BOOT_WITHIN);
    worked.map_err(|e| format!("{}{}", text(&e), first.errors.text()))?;
    first.signal(Signal::KILL)?;
    first.wait(SOON)?;

    let read = machine(&format!("disk-read /data/pattern {KIB} {seed} exit 0"))?;
    let refused = as_nobody(&context.environment, "second", &read)?.wait(SOON)?;
    ensure!(!refused.status.success(), "it had the lease of a killed machine");
    says(&refused.errors, "first")?;
    let broken = Command::new(&context.environment.coraclectl)
        .args(["lease", "break", &target.url(1), "--yes", "--lease-at"])
        .arg(&lease_at)
        .output()?;
    let said = String::from_utf8_lossy(&broken.stderr).into_owned();
    ensure!(broken.status.success(), "the lease cannot be broken: {said}");
    as_nobody(&context.environment, "second", &read)?
        .wait(BOOT_WITHIN)?
        .expect(0)
}

/// Starts the machine as a user who owns nothing.
fn as_nobody(environment: &Environment, id: &str, machine: &Machine) -> Outcome<Monitor> {
    let launch = Launch::new(environment)?.arguments(["--id", id]);
    // Where the directories of what is built are private, the other user needs copies.
    let program = launch.directory().join("test-coracle");
    std::fs::copy(&environment.coracle, &program)?;
    let mut config = machine.config();
    let kernel = config.pointer_mut("/boot-source/kernel_image_path");
    let kernel = kernel.ok_or("a machine has a kernel")?;
    let copy = launch.directory().join("test-kernel");
    std::fs::copy(kernel.as_str().ok_or("a path is a text")?, &copy)?;
    *kernel = json!(copy);
    open_to_all(launch.directory(), 0o777)?;
    let node = launch.directory().join("test-kvm").display().to_string();
    let launch = launch.program(&program).without_api();
    let launch = launch.by_way_of(["unshare", "--mount", "sh", "-c", AS_NOBODY, &node]);
    launch.config(&config)?.spawn()
}

fn open_to_all(directory: &std::path::Path, mode: u32) -> Outcome {
    let open = std::os::unix::fs::PermissionsExt::from_mode(mode);
    Ok(std::fs::set_permissions(directory, open)?)
}
