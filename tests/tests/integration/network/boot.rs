//! A host's user who may use /dev/kvm and nothing else boots Linux from a server, and so does another one afterwards.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use coracle_tests::case::{Context, text};
use coracle_tests::environment::Environment;
use coracle_tests::guest::{Linux, Machine};
use coracle_tests::monitor::{Launch, Monitor};
use coracle_tests::process::copy_program;
use coracle_tests::{Outcome, ensure};
use rustix::process::Signal;
use serde_json::json;

/// A boot takes ten seconds where kernel code is emulated, and ten times that on a host with ten times its work.
const BOOT_WITHIN: Duration = Duration::from_secs(240);
const SOON: Duration = Duration::from_secs(20);
const KIB: u64 = 64;
/// In a mount namespace of its own: /dev/kvm is a node that nobody may open, too, and the rest belongs to others.
const AS_NOBODY: &str = r#"mknod "$0" c 10 232 && chmod 666 "$0" && mount --bind "$0" /dev/kvm &&
    exec setpriv --reuid=65534 --regid=65534 --clear-groups "$@""#;
const NOBODY: u32 = 65_534;

/// Their number, for servers that ask who reads and writes: in a jail every monitor is such a user.
pub(crate) fn user(environment: &Environment) -> u32 {
    let jailing = environment.jailing.as_ref();
    jailing.map_or(NOBODY, |jailing| jailing.user())
}

/// Boots from the drive's members, writes and is killed; `freed` has the image free again after that, or says that it is; then
/// another boots from it and finds what was written. Which refusal there is in between is for `refused`.
pub(crate) fn run(
    context: &Context,
    members: &[(&str, serde_json::Value)],
    between: impl FnOnce(&dyn Fn() -> Outcome<Monitor>) -> Outcome,
) -> Outcome {
    let seed = context.seed.clone().below(1 << 31);
    let directory = tempfile::tempdir()?;
    open_to_all(directory.path(), 0o777)?;
    let linux = Linux::read(&context.environment)?;
    let machine = |words: &str| -> Outcome<Machine> {
        let machine = linux.machine("smp", directory.path(), words)?;
        Ok(members
            .iter()
            .fold(machine, |machine, (member, value)| machine.root(member, value))
            .root("cache_type", &json!("Writeback"))
            .root("lock", &json!("exclusive")))
    };

    let write = format!("hello disk-write /data/pattern {KIB} {seed} hello records 1000000 8 1");
    let first = as_nobody(&context.environment, "first", &machine(&write)?)?;
    let worked = first.console.wait_for("init: record 3\r", BOOT_WITHIN);
    worked.map_err(|e| format!("{}{}", text(&e), first.errors.text()))?;
    first.signal(Signal::KILL)?;
    first.wait(SOON)?;

    let read = machine(&format!("disk-read /data/pattern {KIB} {seed} exit 0"))?;
    let second = || as_nobody(&context.environment, "second", &read);
    between(&second)?;
    second()?.wait(BOOT_WITHIN)?.expect(0)
}

/// Starts the machine as a user who owns nothing.
fn as_nobody(environment: &Environment, id: &str, machine: &Machine) -> Outcome<Monitor> {
    let launch = Launch::new(environment)?.arguments(["--id", id]);
    if environment.jailing.is_some() {
        return launch.without_api().config(&machine.config())?.spawn();
    }
    // Where the directories of what is built are private, the other user needs copies.
    let program = launch.directory().join("test-coracle");
    copy_program(&environment.coracle, &program)?;
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

pub(crate) fn open_to_all(directory: &Path, mode: u32) -> Outcome {
    Ok(std::fs::set_permissions(
        directory,
        PermissionsExt::from_mode(mode),
    )?)
}

/// What a machine that must not start says.
pub(crate) fn refused(start: &dyn Fn() -> Outcome<Monitor>) -> Outcome<String> {
    let refused = start()?.wait(SOON)?;
    ensure!(!refused.status.success(), "it had the lease of a killed machine");
    Ok(refused.errors)
}
