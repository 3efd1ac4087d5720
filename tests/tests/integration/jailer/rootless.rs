//! Jails of an ordinary user.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;

use coracle_tests::case::Context;
use coracle_tests::guest::Machine;
use coracle_tests::harness::jail::{Jail, UID};
use coracle_tests::{Outcome, ensure};
use rustix::process::Signal;

use super::SOON;
use super::limits::has_no_rights;

/// Lets an ordinary user use KVM, in a mount namespace of its own: the node there is another one, for everybody. The host's
/// stays as it is.
const AS_A_USER: &str = "mount --bind \"$NODE\" /dev/kvm && unset NODE && \
                         exec setpriv --reuid=12345 --regid=12345 --clear-groups \"$@\"";

/// A user's jail: the user's own directory, and a node of KVM that the user may open.
fn ordinary(context: &Context) -> Outcome<Jail> {
    let jail = Jail::new(&context.environment)?;
    open_to_all(&jail)?;
    let node = jail.directory().join("test-kvm");
    let device = rustix::fs::makedev(10, 232);
    let mode = rustix::fs::Mode::from_raw_mode(0o666);
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &node,
        rustix::fs::FileType::CharacterDevice,
        mode,
        device,
    )?;
    fs::set_permissions(&node, fs::Permissions::from_mode(0o666))?;
    let node = format!("NODE={}", node.display());
    Ok(jail.by_way_of(["env", &node, "unshare", "--mount", "sh", "-c", AS_A_USER, "sh"]))
}

/// Others may look into the directory of a test, and the user of its jails has the one where they are made.
pub(super) fn open_to_all(jail: &Jail) -> Outcome {
    fs::set_permissions(jail.directory(), fs::Permissions::from_mode(0o755))?;
    Ok(chown(jail.base(), Some(UID), Some(UID))?)
}

pub(super) fn a_guest_boots(context: &Context) -> Outcome {
    for flags in ["--cleanup", "--cleanup --supervise --new-pid-ns", "--supervise"] {
        let machine = Machine::unikernel(&context.environment, "do=hello do=tick:ms=10,count=1000000");
        let jail = ordinary(context)?.flags(flags.split(' '));
        let jailed = jail.machine(&machine)?.start()?;
        jailed.monitor.console.wait_for("tick: n=3", SOON)?;
        has_no_rights(&jailed, UID)?;
        let pid = jailed.process()?.0;
        for kind in ["user", "mnt", "ipc", "uts"] {
            let of = |who: &str| fs::read_link(format!("/proc/{who}/ns/{kind}"));
            ensure!(of(&pid.to_string())? != of("self")?, "{kind} is the host's");
        }
        let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo"))?;
        let foreign = mounts
            .lines()
            .filter_map(|line| line.split(' ').nth(4))
            .find(|place| !["/", "/kernel", "/vm.json"].contains(place) && !place.starts_with("/dev/"));
        ensure!(foreign.is_none(), "{foreign:?} is mounted in the jail");
        ensure!(Path::new(&format!("/proc/{pid}/root/dev/kvm")).exists(), "no KVM");
        jailed.monitor.signal(Signal::TERM)?;
        let ended = if flags.contains("--cleanup") {
            jailed.end(SOON)?
        } else {
            jailed.monitor.wait(SOON)?
        };
        ensure!(ended.status.code() == Some(143), "{flags}: {ended:?}");
    }
    Ok(())
}

pub(super) fn what_cannot_be_had(context: &Context) -> Outcome {
    let star = coracle_tests::harness::hosts::Star::new(0)?;
    // A handle that the user may open, as `ip netns` makes them.
    let netns = star.server.path();
    for (user, flags, part) in [
        (0, vec![], "--uid 0 cannot be honoured without root"),
        (UID, vec!["--cgroup", "cpu.shares=2"], "delegated"),
        (UID, vec!["--netns", netns.as_str()], "--netns"),
        (
            UID,
            vec!["--resource-limit", "no-file=99999999999"],
            "CAP_SYS_RESOURCE",
        ),
        (UID, vec!["--chroot-base-dir=/srv"], "more than once"),
    ] {
        let jail = ordinary(context)?.user(user).flags(flags.iter().copied());
        let ended = jail.spawn()?.monitor.wait(SOON)?;
        ensure!(
            ended.status.code() == Some(1) && ended.errors.contains(part),
            "{flags:?}: no `{part}` in {ended:?}"
        );
    }
    // A directory of somebody else's.
    let jail = ordinary(context)?;
    chown(jail.base(), Some(0), Some(0))?;
    let ended = jail.spawn()?.monitor.wait(SOON)?;
    ensure!(
        ended.status.code() == Some(1) && ended.errors.contains("--chroot-base-dir"),
        "{ended:?}"
    );
    Ok(())
}
