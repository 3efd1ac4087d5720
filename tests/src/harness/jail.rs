//! A monitor in a jail, driven like any other: what it is given is shown in the jail, and its socket is found from outside.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::Outcome;
use crate::environment::Environment;
use crate::guest::Machine;
use crate::monitor::{Ended, Launch, Monitor};
use crate::process::Process;

/// The user and group of jailed monitors; nobody else has it.
pub const UID: u32 = 12345;
/// Distinguishes the jails of this process.
static NEXT: AtomicU64 = AtomicU64::new(0);
/// Where the monitor's configuration is in the jail, if it has one.
const CONFIG: &str = "vm.json";

/// A jail to be, in a directory of its own.
#[derive(Debug)]
pub struct Jail {
    launch: Launch,
    /// The name of the machine.
    pub id: String,
    base: PathBuf,
    exec: PathBuf,
    before: Vec<String>,
    flags: Vec<String>,
    arguments: Vec<String>,
}

/// A jail that is in use. Dropping it kills the jailer, or the monitor that it has become.
#[derive(Debug)]
pub struct Jailed {
    /// What was started, and the API in the jail.
    pub monitor: Monitor,
    /// The root of the jail, seen from outside.
    pub root: PathBuf,
    base: PathBuf,
    id: String,
    pid_file: PathBuf,
}

impl Jail {
    /// A jail for the monitor under test, with the user [`UID`].
    ///
    /// # Errors
    ///
    /// When its directory cannot be made.
    pub fn new(environment: &Environment) -> Outcome<Self> {
        Self::of(environment, &environment.coracle)
    }

    /// The same for another program.
    ///
    /// # Errors
    ///
    /// When its directory cannot be made.
    pub fn of(environment: &Environment, exec: &Path) -> Outcome<Self> {
        let launch = Launch::bare(&environment.jailer)?;
        let base = launch.directory().join("test-jails");
        fs::create_dir(&base)?;
        Ok(Self {
            launch,
            // Nobody else on this host has it, so what is left of it is known by it.
            id: format!(
                "jail-{}-{}",
                std::process::id(),
                NEXT.fetch_add(1, Ordering::Relaxed)
            ),
            base,
            exec: exec.canonicalize()?,
            before: vec![],
            flags: vec![],
            arguments: vec![],
        }
        .user(UID))
    }

    /// Runs as another user and group.
    #[must_use]
    pub fn user(mut self, id: u32) -> Self {
        let id = id.to_string();
        self.flags = ["--uid", &id, "--gid", &id].map(str::to_owned).to_vec();
        self
    }

    /// Adds flags of the jailer.
    #[must_use]
    pub fn flags<'a>(mut self, flags: impl IntoIterator<Item = &'a str>) -> Self {
        self.flags.extend(flags.into_iter().map(str::to_owned));
        self
    }

    /// Adds arguments of the monitor.
    #[must_use]
    pub fn arguments<'a>(mut self, arguments: impl IntoIterator<Item = &'a str>) -> Self {
        self.arguments.extend(arguments.into_iter().map(str::to_owned));
        self
    }

    /// Starts the jailer by way of another program.
    #[must_use]
    pub fn by_way_of<'a>(mut self, command: impl IntoIterator<Item = &'a str>) -> Self {
        self.before = command.into_iter().map(str::to_owned).collect();
        self
    }

    /// Shows a file in the jail.
    ///
    /// # Errors
    ///
    /// When it is not there.
    pub fn shows(self, file: &Path, name: &str) -> Outcome<Self> {
        // The jailer refuses links on the way, and the way to what was built may have some.
        let shown = format!("{}:{name}", file.canonicalize()?.display());
        Ok(self.flags(["--file", &shown]))
    }

    /// The configuration of a machine as the monitor in the jail has to see it, with its kernel shown there.
    ///
    /// # Errors
    ///
    /// When it has none.
    pub fn kernel_of(self, machine: &Machine) -> Outcome<(Self, Value)> {
        let mut config = machine.config();
        let path = config
            .pointer_mut("/boot-source/kernel_image_path")
            .ok_or("there is a kernel")?;
        let kernel = PathBuf::from(path.as_str().unwrap_or_default());
        *path = Value::from("/kernel");
        Ok((self.shows(&kernel, "kernel")?, config))
    }

    /// Starts this machine at once, from a configuration file in the jail.
    ///
    /// # Errors
    ///
    /// When the file cannot be written.
    pub fn machine(self, machine: &Machine) -> Outcome<Self> {
        let (jail, config) = self.kernel_of(machine)?;
        let file = jail.directory().join(format!("test-{CONFIG}"));
        fs::write(&file, config.to_string())?;
        Ok(jail
            .shows(&file, CONFIG)?
            .arguments(["--config-file", &format!("/{CONFIG}")]))
    }

    /// A directory of this test.
    pub fn directory(&self) -> &Path {
        self.launch.directory()
    }

    /// Where jails are made.
    pub fn base(&self) -> &Path {
        &self.base
    }

    /// The root of the jail, seen from outside.
    pub fn root(&self) -> PathBuf {
        let name = self.exec.file_name().unwrap_or_default();
        self.base.join(name).join(&self.id).join("root")
    }

    /// The command line, without what it is started by way of.
    pub fn words(&self) -> Vec<String> {
        let (exec, base) = (self.exec.display().to_string(), self.base.display().to_string());
        let mut words: Vec<String> = ["--id", &self.id, "--exec-file", &exec, "--chroot-base-dir", &base]
            .map(str::to_owned)
            .to_vec();
        words.extend(self.flags.clone());
        words.push("--".into());
        words.extend(self.arguments.clone());
        words
    }

    /// Starts the jailer and waits for nothing.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn spawn(self) -> Outcome<Jailed> {
        let (root, words) = (self.root(), self.words());
        let mut name = OsString::from(self.exec.file_name().unwrap_or_default());
        name.push(".pid");
        // A path may be too long for a socket; a link is not.
        symlink(
            root.join("run/firecracker.socket"),
            self.launch.directory().join("api.sock"),
        )?;
        let launch = self
            .launch
            .by_way_of(self.before.iter().map(String::as_str))
            .arguments(words.iter().map(String::as_str));
        Ok(Jailed {
            monitor: launch.spawn()?,
            pid_file: root.join(name),
            root,
            base: self.base,
            id: self.id,
        })
    }

    /// Starts the jailer and waits until the API in the jail answers.
    ///
    /// # Errors
    ///
    /// When it ends first, or takes too long.
    pub fn start(self) -> Outcome<Jailed> {
        let mut jailed = self.spawn()?;
        let deadline = Instant::now() + READY_MAX;
        while jailed.monitor.connect().is_err() {
            crate::ensure!(
                jailed.monitor.is_running()?,
                "ended at once: {}",
                jailed.monitor.errors.finish()
            );
            crate::ensure!(
                Instant::now() < deadline,
                "no API: {}",
                jailed.monitor.errors.text()
            );
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(jailed)
    }
}

/// How long a jailed monitor may take to its API, on a busy machine.
const READY_MAX: Duration = Duration::from_secs(30);
/// How long what is killed may take to be gone.
const GONE_MAX: Duration = Duration::from_secs(20);

impl Jailed {
    /// The monitor's own process.
    ///
    /// # Errors
    ///
    /// When there is none yet, or no more.
    pub fn process(&self) -> Outcome<Process> {
        let text = fs::read_to_string(&self.pid_file)?;
        Ok(Process(text.parse()?))
    }

    /// Waits until what was started has ended; what is left of it can be looked at then.
    ///
    /// # Errors
    ///
    /// When the end does not come.
    pub fn ends(&mut self, limit: Duration) -> Outcome {
        let deadline = Instant::now() + limit;
        while self.monitor.is_running()? {
            crate::ensure!(
                Instant::now() < deadline,
                "no end: {}\n{}",
                self.monitor.console.text(),
                self.monitor.errors.text()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// Waits for the end, and until nothing is left of the jail.
    ///
    /// # Errors
    ///
    /// When the end does not come, or something is left.
    pub fn end(mut self, limit: Duration) -> Outcome<Ended> {
        self.ends(limit)?;
        // The directory goes away with the handle.
        vanishes(&self.base, &self.id)?;
        self.monitor.wait(limit)
    }

    /// Where jails are made.
    pub fn base(&self) -> &Path {
        &self.base
    }

    /// The name of the machine.
    pub fn id(&self) -> &str {
        &self.id
    }
}

/// What of a jail is still there under a base: files, and cgroups of this machine.
///
/// # Errors
///
/// When it cannot be looked at.
pub fn remains(base: &Path, id: &str) -> Outcome<Vec<PathBuf>> {
    let mut remains = Vec::new();
    files_under(base, &mut remains)?;
    remains.extend(cgroups_of(id)?);
    let mounts = fs::read_to_string("/proc/mounts")?;
    // A path on the host is in the list of a process that has a mount of it.
    if mounts.contains(&base.display().to_string()) {
        remains.push("a mount".into());
    }
    Ok(remains)
}

/// The cgroups of a machine, one level below the root.
///
/// # Errors
///
/// When they cannot be looked for.
pub fn cgroups_of(id: &str) -> Outcome<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mounts = fs::read_to_string("/proc/mounts")?;
    for mount in mounts.lines().filter_map(cgroup_mount) {
        let parents = fs::read_dir(mount)?.flatten();
        found.extend(
            parents
                .map(|parent| parent.path().join(id))
                .filter(|own| own.is_dir()),
        );
    }
    Ok(found)
}

/// Waits until nothing of a jail is there, and no process that mentions it.
///
/// # Errors
///
/// When something stays.
pub fn vanishes(base: &Path, id: &str) -> Outcome {
    let deadline = Instant::now() + GONE_MAX;
    loop {
        let remains = remains(base, id)?;
        let processes = crate::process::processes_with(id)?;
        if remains.is_empty() && processes.is_empty() {
            return Ok(());
        }
        crate::ensure!(
            Instant::now() < deadline,
            "left of {id}: {remains:?}, processes {processes:?}"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Flags for a cgroup with so much memory, in whichever version this host has; none if it has no such controller.
pub fn memory_limit(bytes: u64) -> Option<Vec<String>> {
    limit(
        "memory",
        &format!("memory.limit_in_bytes={bytes}"),
        &format!("memory.max={bytes}"),
    )
}

/// The same for so many processes and threads.
pub fn process_limit(count: u64) -> Option<Vec<String>> {
    let setting = format!("pids.max={count}");
    limit("pids", &setting, &setting)
}

/// Flags that set a controller, which is called otherwise in version 2.
fn limit(controller: &str, v1: &str, v2: &str) -> Option<Vec<String>> {
    let mounts = fs::read_to_string("/proc/mounts").ok()?;
    let has_v1 = mounts.lines().any(|line| {
        let mut fields = line.split(' ').skip(2);
        let kind = fields.next();
        kind == Some("cgroup")
            && fields
                .next()
                .is_some_and(|options| options.split(',').any(|o| o == controller))
    });
    if has_v1 {
        return Some(vec!["--cgroup".into(), v1.to_owned()]);
    }
    let unified = mounts
        .lines()
        .find(|line| line.split(' ').nth(2) == Some("cgroup2"));
    let controllers = unified
        .and_then(cgroup_mount)
        .map(|mount| mount.join("cgroup.controllers"));
    let controllers = fs::read_to_string(controllers?).ok()?;
    controllers
        .split_whitespace()
        .any(|name| name == controller)
        .then(|| {
            ["--cgroup-version", "2", "--cgroup", v2]
                .map(str::to_owned)
                .to_vec()
        })
}

/// Where this host has its cgroup hierarchy of version 2, with controllers or without.
pub fn unified_cgroup() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").ok()?;
    let unified = mounts
        .lines()
        .find(|line| line.split(' ').nth(2) == Some("cgroup2"));
    unified.and_then(cgroup_mount)
}

fn cgroup_mount(line: &str) -> Option<PathBuf> {
    let mut fields = line.split(' ').skip(1);
    let mount = fields.next()?;
    fields.next()?.starts_with("cgroup").then(|| PathBuf::from(mount))
}

fn files_under(directory: &Path, found: &mut Vec<PathBuf>) -> Outcome {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() && !path.is_symlink() {
            // It may go away meanwhile.
            let _ = files_under(&path, found);
        }
        found.push(path);
    }
    Ok(())
}
