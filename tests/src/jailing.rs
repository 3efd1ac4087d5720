//! Whole runs of the tests with their monitors in jails, asked for by [`VARIABLE`].
//!
//! The tests stay as they are: each monitor is started by the jailer, which shows it the one directory where all the
//! temporary files of the run are, by the name that they have outside. Programs and guests are copied there. What the tests make
//! belongs to the user of the jails, and so does what `coraclectl` makes for them.

#![expect(unsafe_code, reason = "no crate of ours has the user of a thread's files")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use rustix::fs::{CWD, FileType, Mode as Bits, makedev, mknodat};
use rustix::process::{getegid, geteuid};
use rustix::thread::{capabilities, set_capabilities};
use serde_json::Value;
use tempfile::TempDir;

use crate::Outcome;
use crate::environment::Environment;
use crate::harness::jail::UID;
use crate::process::Process;

/// Names the mode: `root` or `rootless`; without it monitors are started directly.
pub const VARIABLE: &str = "CORACLE_JAILED";

/// The name of a monitor that its test gives none.
const NO_NAME: &str = "anonymous-instance";
/// The kernel's major number for the nodes that an ordinary user is lent.
const MISC_MAJOR: u32 = 10;
/// Distinguishes the jails of this process.
static NEXT: AtomicU64 = AtomicU64::new(0);

/// Who makes the jails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Root, for a user that only jails have.
    Root,
    /// An ordinary user.
    Rootless,
}

/// How monitors of this run are put into jails.
#[derive(Clone, Debug)]
pub struct Jailing {
    /// Who makes the jails.
    pub mode: Mode,
    jailer: PathBuf,
    /// The user and the group of the monitors.
    owner: (u32, u32),
    /// What the command line begins with.
    entry: Vec<String>,
    /// What it goes on with, so that an ordinary user makes the jail.
    becoming: Vec<String>,
    /// What the jails are shown.
    shown: PathBuf,
    /// Where jails are made.
    jails: PathBuf,
}

/// The directory of a run in jails, which goes away with this value.
#[derive(Debug)]
pub struct Run(TempDir);

/// What a monitor in a jail is started with.
#[derive(Debug)]
pub(crate) struct Jailed {
    /// The whole command line.
    pub(crate) words: Vec<String>,
    /// Where the jail is; it has to be there as long as the monitor.
    pub(crate) base: TempDir,
}

/// What the monitor of one test is to be.
#[derive(Debug)]
pub(crate) struct Wish<'a> {
    /// What it is started by way of.
    pub(crate) before: &'a [String],
    /// Its program.
    pub(crate) program: &'a Path,
    /// Its directory, in which it would run outside.
    pub(crate) directory: &'a Path,
    /// Its arguments.
    pub(crate) arguments: Vec<String>,
}

/// Makes a run's monitors start in jails, if that is asked for. To be called before there are threads or temporary files.
///
/// # Errors
///
/// When the mode is none, or nothing can be made ready for it.
pub fn begin(mut environment: Environment) -> Outcome<(Environment, Option<Run>)> {
    let Some(word) = std::env::var_os(VARIABLE) else {
        return Ok((environment, None));
    };
    let mode = match word.to_str() {
        Some("root") => Mode::Root,
        Some("rootless") => Mode::Rootless,
        _ => return Err(format!("{VARIABLE} is {}; there are root and rootless", word.display()).into()),
    };
    let is_root = geteuid().is_root();
    crate::ensure!(
        is_root || mode == Mode::Rootless,
        "{VARIABLE}=root is for root; an ordinary user has {VARIABLE}=rootless"
    );
    let owner = if is_root {
        (UID, UID)
    } else {
        (geteuid().as_raw(), getegid().as_raw())
    };
    // In lower case, as the directories of monitors in it.
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
    let name = format!("coracle-jailed-{}-{}", std::process::id(), since.as_millis());
    let run = Run(tempfile::Builder::new().prefix(&name).rand_bytes(0).tempdir()?);
    if is_root {
        make_files_of(owner)?;
    }
    // The jailer refuses links on the way.
    let place = run.0.path().canonicalize()?;
    let folder = |name: &str| -> Outcome<PathBuf> {
        let path = place.join(name);
        fs::create_dir(&path)?;
        open_to_all(&path)?;
        Ok(path)
    };
    open_to_all(&place)?;
    let (shown, jails, programs) = (folder("shown")?, folder("jails")?, folder("programs")?);
    copy_programs(&mut environment, &programs)?;
    copy_guests(&mut environment, &shown)?;
    tempfile::env::override_temp_dir(&shown).map_err(|_| "the temporary directory is somewhere else")?;
    let (mut entry, mut becoming) = (vec![], vec![]);
    if is_root {
        let becomes = becomes(owner);
        keep_owner_of_client(&mut environment, &programs, &becomes)?;
        if mode == Mode::Rootless {
            entry = lent_nodes(&folder("nodes")?)?;
            becoming = becomes;
        }
    }
    environment.jailing = Some(Jailing {
        mode,
        jailer: environment.jailer.clone(),
        owner,
        entry,
        becoming,
        shown,
        jails,
    });
    Ok((environment, Some(run)))
}

impl Jailing {
    /// The command line of a monitor in a jail of its own.
    ///
    /// # Errors
    ///
    /// When there is no place for the jail.
    pub(crate) fn of(&self, wish: Wish<'_>) -> Outcome<Jailed> {
        let number = NEXT.fetch_add(1, Ordering::Relaxed).to_string();
        let base = tempfile::Builder::new()
            .prefix(&number)
            .rand_bytes(0)
            .tempdir_in(&self.jails)?;
        let (id, arguments) = without_name(wish.arguments);
        let (uid, gid) = self.owner;
        let mut words = self.entry.clone();
        words.extend(wish.before.iter().cloned());
        words.extend(self.becoming.iter().cloned());
        words.extend([text(&self.jailer), "--id".into(), id.unwrap_or(NO_NAME.into())]);
        words.extend(["--exec-file".into(), text(wish.program)]);
        words.extend(["--uid".into(), uid.to_string(), "--gid".into(), gid.to_string()]);
        words.extend(["--chroot-base-dir".into(), text(base.path())]);
        words.extend(["--file".into(), same_name(&self.shown)]);
        // A monitor in a jail works in its root: what it would find by a bare name has to be there.
        for entry in fs::read_dir(wish.directory)? {
            let path = entry?.path();
            if path.is_file() && !path.is_symlink() {
                words.extend(["--file".into(), text(&path.canonicalize()?)]);
            }
        }
        words.push("--".into());
        words.extend(arguments);
        Ok(Jailed { words, base })
    }
}

impl Jailing {
    /// The user of the monitors.
    pub fn user(&self) -> u32 {
        self.owner.0
    }

    /// Fails unless this process is in a jail, as its user.
    ///
    /// # Errors
    ///
    /// Then, or when it is gone.
    pub(crate) fn holds(&self, process: Process) -> Outcome {
        let Process(number) = process;
        let status = fs::read_to_string(format!("/proc/{number}/status"))?;
        let field = |name: &str| {
            status
                .lines()
                .find_map(|line| line.strip_prefix(name))
                .unwrap_or_default()
        };
        let (uid, _) = self.owner;
        let own = field("Uid:").split_whitespace().all(|id| id == uid.to_string());
        let rights = field("CapEff:").trim().trim_start_matches('0');
        let sees_processes = Path::new(&format!("/proc/{number}/root/proc")).exists();
        crate::ensure!(
            own && rights.is_empty() && !sees_processes,
            "process {number} is in no jail: {status}"
        );
        Ok(())
    }
}

/// The name that the arguments give the machine, and the others.
fn without_name(mut arguments: Vec<String>) -> (Option<String>, Vec<String>) {
    let at = arguments.iter().position(|word| word == "--id");
    match at {
        Some(at) if at + 1 < arguments.len() => {
            let name = arguments.drain(at..at + 2).nth(1);
            (name, arguments)
        }
        _ => (None, arguments),
    }
}

/// A path of the host that has the same name in the jail.
fn same_name(path: &Path) -> String {
    let path = text(path);
    format!("{path}:{}", path.trim_start_matches('/'))
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

fn open_to_all(path: &Path) -> Outcome {
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(0o755))?)
}

/// Lets what this thread and its threads make belong to that user, as if that user made it; all rights stay. Programs that
/// are started have it no more.
fn make_files_of((uid, gid): (u32, u32)) -> Outcome {
    let before = capabilities(None)?;
    // SAFETY: both change numbers of this thread that nothing else depends on; there are no others yet.
    unsafe { libc::setfsgid(gid) };
    // SAFETY: as above.
    unsafe { libc::setfsuid(uid) };
    // The rights over files went away with root's number.
    Ok(set_capabilities(None, before)?)
}

/// Beginning of a command line that becomes a process of that user.
fn becomes((uid, gid): (u32, u32)) -> Vec<String> {
    let (uid, gid) = (format!("--reuid={uid}"), format!("--regid={gid}"));
    ["setpriv", &uid, &gid, "--clear-groups"]
        .map(str::to_owned)
        .to_vec()
}

/// Where the build directory is private, others need copies.
fn copy_programs(environment: &mut Environment, to: &Path) -> Outcome {
    for program in [
        &mut environment.coracle,
        &mut environment.coraclectl,
        &mut environment.jailer,
    ] {
        let name = program.file_name().ok_or("a program has a name")?;
        let copy = to.join(name);
        fs::copy(&*program, &copy).map_err(|error| format!("{}: {error}", program.display()))?;
        *program = copy;
    }
    Ok(())
}

fn copy_guests(environment: &mut Environment, to: &Path) -> Outcome {
    let unikernel = to.join("unikernel");
    fs::copy(&environment.unikernel, &unikernel)?;
    environment.unikernel = unikernel;
    let manifest = environment.linux.join("manifest.json");
    let read = fs::read_to_string(&manifest)
        .map_err(|error| format!("{}: {error}; run: make linux", manifest.display()))?;
    let mut manifest: Value = serde_json::from_str(&read)?;
    let linux = to.join("linux");
    fs::create_dir(&linux)?;
    copy_named(&mut manifest, &linux)?;
    fs::write(linux.join("manifest.json"), manifest.to_string())?;
    environment.linux = linux;
    Ok(())
}

/// Copies each file that the value names by an absolute path, and names the copy instead.
fn copy_named(value: &mut Value, to: &Path) -> Outcome {
    match value {
        Value::String(path) if Path::new(path).is_absolute() => {
            let name = Path::new(path).file_name().ok_or("a file has a name")?;
            let copy = to.join(name);
            crate::ensure!(!copy.exists(), "two guests are called {}", copy.display());
            crate::guest::copy_image(Path::new(path), &copy)?;
            *path = text(&copy);
        }
        Value::Object(members) => members
            .values_mut()
            .try_for_each(|member| copy_named(member, to))?,
        _ => {}
    }
    Ok(())
}

/// Nodes of KVM, of page faults and of taps that an ordinary user may open, and how a command line begins that has them in place
/// of the host's, which stay as they are for everybody else.
fn lent_nodes(to: &Path) -> Outcome<Vec<String>> {
    let mut script = String::new();
    for (name, host) in [
        ("kvm", "/dev/kvm"),
        ("userfaultfd", "/dev/userfaultfd"),
        ("tun", "/dev/net/tun"),
    ] {
        let host = Path::new(host);
        if !host.exists() {
            continue;
        }
        let device = rustix::fs::stat(host)?.st_rdev;
        crate::ensure!(
            rustix::fs::major(device) == MISC_MAJOR,
            "{} is no device of that kind",
            host.display()
        );
        let node = to.join(name);
        let device = makedev(MISC_MAJOR, rustix::fs::minor(device));
        mknodat(CWD, &node, FileType::CharacterDevice, Bits::RWXU, device)?;
        fs::set_permissions(&node, fs::Permissions::from_mode(0o666))?;
        script.push_str(&format!(
            "mount --bind '{}' '{}' && ",
            node.display(),
            host.display()
        ));
    }
    script.push_str("exec \"$@\"");
    Ok(["unshare", "--mount", "sh", "-c", &script, "sh"]
        .map(str::to_owned)
        .to_vec())
}

/// What the client writes beside images has to be the monitors' to write.
fn keep_owner_of_client(environment: &mut Environment, programs: &Path, becomes: &[String]) -> Outcome {
    let place = programs.join("as-owner");
    fs::create_dir(&place)?;
    open_to_all(&place)?;
    let script = place.join("coraclectl");
    let client = environment.coraclectl.display();
    fs::write(
        &script,
        format!("#!/bin/sh\nexec {} '{client}' \"$@\"\n", becomes.join(" ")),
    )?;
    open_to_all(&script)?;
    environment.coraclectl = script;
    Ok(())
}
