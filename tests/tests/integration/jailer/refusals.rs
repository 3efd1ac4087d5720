//! What is refused, by name, before anything runs.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use coracle_tests::case::Context;
use coracle_tests::harness::jail::{Jail, Jailed, UID};
use coracle_tests::{Outcome, ensure};
use rustix::process::Signal;

use super::SOON;

/// The jailer ends with 1, and says this.
fn refused(jail: Jail, part: &str) -> Outcome {
    let ended = jail.spawn()?.monitor.wait(SOON)?;
    ensure!(
        ended.status.code() == Some(1) && ended.errors.contains(part),
        "no `{part}` in {ended:?}"
    );
    Ok(())
}

pub(super) fn links_and_ways_out(context: &Context) -> Outcome {
    let jail = || Jail::new(&context.environment);
    // What the words alone say.
    for (flags, part) in [
        (
            &["--parent-cgroup", "../../x", "--cgroup", "cpu.shares=2"][..],
            "--parent-cgroup",
        ),
        (
            &["--parent-cgroup", "/x", "--cgroup", "cpu.shares=2"][..],
            "--parent-cgroup",
        ),
        (&["--cgroup", "../cpu.shares=2"][..], "--cgroup"),
        (&["--cgroup", "x/cpu.shares=2"][..], "--cgroup"),
        (&["--file", "/etc/../etc/passwd"][..], "--file"),
        (
            &["--file", "/etc/passwd:../../../passwd"][..],
            "names no file in the jail",
        ),
        (
            &["--file", "/etc/passwd:/passwd"][..],
            "names no file in the jail",
        ),
        (&["--fd", "3:../x"][..], "names no file in the jail"),
    ] {
        refused(jail()?.flags(flags.iter().copied()), part)?;
    }
    for id in ["..", ".", "a/b", "../a", ""] {
        let mut jail = jail()?;
        jail.id = id.to_owned();
        refused(jail, "--id")?;
    }
    let jail = jail()?;
    let link = jail.directory().join("test-link");
    symlink("/etc/passwd", &link)?;
    let file = link.display().to_string();
    refused(
        jail.flags(["--file", &file]),
        "a symbolic link on the way is refused",
    )?;
    directories_of_the_layout(context)?;
    files_of_the_layout(context)
}

fn directories_of_the_layout(context: &Context) -> Outcome {
    // A link in place of each directory of the layout.
    for level in ["", "root", "root/dev", "root/dev/net", "root/run", "root/disks"] {
        let jail = Jail::new(&context.environment)?;
        let elsewhere = jail.directory().join("test-elsewhere");
        fs::create_dir(&elsewhere)?;
        let own = jail.root().parent().ok_or("a root is in a directory")?.to_owned();
        let path = own.join(level);
        // With nothing behind, the name is that of the directory itself.
        let path = if level.is_empty() { own } else { path };
        fs::create_dir_all(path.parent().ok_or("it is in a directory")?)?;
        symlink(&elsewhere, &path)?;
        let jail = jail.shows("/etc/passwd".as_ref(), "disks/a")?;
        let part = "Too many levels of symbolic links";
        // The directory goes away with the handle of what was started.
        let ended = jail.spawn()?;
        let made = watched(ended, &elsewhere, part)?;
        ensure!(
            made == 0,
            "{made} files were made behind a link in place of `{level}`"
        );
    }
    Ok(())
}

fn files_of_the_layout(context: &Context) -> Outcome {
    for name in ["dev/kvm", "dev/net/tun", "coracle.pid", "kernel"] {
        let jail = Jail::new(&context.environment)?;
        let victim = jail.directory().join("test-victim");
        fs::write(&victim, "precious")?;
        let path = jail.root().join(name);
        fs::create_dir_all(path.parent().ok_or("it is in a directory")?)?;
        symlink(&victim, &path)?;
        let jailed = jail.shows("/etc/passwd".as_ref(), "kernel")?.spawn()?;
        stays_as_it_was(jailed, &victim, Some("is there already"))?;
    }
    // The copy of the monitor takes the place of whatever has its name, and writes through nothing.
    for is_symbolic in [true, false] {
        let jail = Jail::new(&context.environment)?.flags(["--new-pid-ns"]);
        let victim = jail.directory().join("test-victim");
        fs::write(&victim, "precious")?;
        fs::create_dir_all(jail.root())?;
        let copy = jail.root().join("coracle");
        if is_symbolic {
            symlink(&victim, copy)?;
        } else {
            fs::hard_link(&victim, copy)?;
        }
        stays_as_it_was(jail.arguments(["--version"]).spawn()?, &victim, None)?;
    }
    Ok(())
}

/// Ends refused, and says how many files are in a directory then.
fn watched(jailed: Jailed, elsewhere: &Path, part: &str) -> Outcome<usize> {
    let mut jailed = jailed;
    jailed.ends(SOON)?;
    let count = fs::read_dir(elsewhere)?.count();
    let ended = jailed.monitor.wait(SOON)?;
    ensure!(
        ended.status.code() == Some(1) && ended.errors.contains(part),
        "{ended:?}"
    );
    Ok(count)
}

/// What a link leads to has its content and its owner still; and what was said, if anything is to be.
fn stays_as_it_was(jailed: Jailed, victim: &Path, said: Option<&str>) -> Outcome {
    let mut jailed = jailed;
    jailed.ends(SOON)?;
    let (content, metadata) = (fs::read_to_string(victim)?, fs::metadata(victim)?);
    ensure!(
        content == "precious" && metadata.uid() != UID,
        "{} bytes, {metadata:?}",
        content.len()
    );
    let ended = jailed.monitor.wait(SOON)?;
    let expected = i32::from(said.is_some());
    ensure!(
        ended.status.code() == Some(expected) && ended.errors.contains(said.unwrap_or_default()),
        "{ended:?}"
    );
    Ok(())
}

/// The same command line once more, by mistake.
pub(super) fn a_second_start(context: &Context) -> Outcome {
    for flag in [None, Some("--cleanup")] {
        let jail = Jail::new(&context.environment)?.flags(flag);
        let (words, root) = (jail.words(), jail.root());
        let jailed = jail.start()?;
        let look = || -> Outcome<_> {
            let folders = ["", "dev", "run"].map(|name| fs::metadata(root.join(name)));
            let folders = folders.into_iter().collect::<std::io::Result<Vec<_>>>()?;
            let folders: Vec<_> = folders
                .iter()
                .map(|folder| (folder.uid(), folder.mode()))
                .collect();
            Ok((folders, fs::metadata(root.join("coracle"))?.ino()))
        };
        let before = look()?;
        let again = Command::new(&context.environment.jailer).args(&words).output()?;
        let said = String::from_utf8_lossy(&again.stderr);
        ensure!(
            again.status.code() == Some(1) && said.contains("is there already"),
            "{}: {said}",
            again.status
        );
        ensure!(look()? == before, "{:?} was {before:?}", look()?);
        jailed.monitor.must("GET", "/", None)?;
        jailed.monitor.signal(Signal::TERM)?;
        let ended = jailed.monitor.wait(SOON)?;
        ensure!(ended.status.code() == Some(143), "{ended:?}");
    }
    Ok(())
}

pub(super) fn what_is_in_the_way(context: &Context) -> Outcome {
    let jail = || Jail::new(&context.environment);
    refused(jail()?.flags(["--netns", "/nowhere"]), "cannot open --netns")?;
    refused(
        jail()?.flags(["--netns", "/etc/passwd"]),
        "cannot join --netns /etc/passwd",
    )?;
    refused(
        jail()?.flags(["--chroot-base-dir", "/nowhere"]),
        "--chroot-base-dir is given more than once",
    )?;
    // None that this program has opened for itself, either.
    for number in [3, 4, 5, 6, 7, 8, 9, 77] {
        let number = number.to_string();
        let words = ["--file", "/etc/passwd:a", "--fd", &number];
        refused(jail()?.flags(words), &format!("--fd {number} is not open"))?;
    }
    refused(
        jail()?.flags(["--file", "/nowhere/x"]),
        "cannot open --file /nowhere/x",
    )?;
    refused(jail()?.flags(["--cgroup", "nothing.at_all=1"]), "`nothing`")?;
    refused(
        jail()?.flags(["--resource-limit", "no-file=99999999999"]),
        "--resource-limit no-file=99999999999",
    )?;
    refused(
        jail()?.flags(["--file", "/etc/passwd:a", "--file", "/etc/group:a"]),
        "two files are to be `a`",
    )?;
    refused(jail()?.flags(["--file", "/etc/passwd:dev/kvm"]), "dev/kvm")?;
    let jail = jail()?;
    let mounted = "mount -t tmpfs -o nodev none \"$1\" && shift && exec \"$@\"";
    let base = jail.base().display().to_string();
    let wrapped = ["unshare", "--mount", "sh", "-c", mounted, "sh", &base];
    refused(jail.by_way_of(wrapped), "mounted nodev")?;
    let place = tempfile::tempdir()?;
    let script = place.path().join("script");
    fs::write(&script, "no program")?;
    refused(Jail::of(&context.environment, &script)?, "is no program")?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    refused(
        Jail::of(&context.environment, &script)?,
        "cannot execute /script in the jail",
    )
}
