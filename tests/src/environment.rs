//! What the tests run against, and what this machine can do.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Outcome;
use crate::harness::hosts::Host;
use crate::jailing::Jailing;
use crate::seed::Seed;

/// The programs, guests and abilities of this run.
#[derive(Clone, Debug)]
pub struct Environment {
    /// The monitor under test.
    pub coracle: PathBuf,
    /// Its command-line client.
    pub coraclectl: PathBuf,
    /// The program that puts a monitor into a jail.
    pub jailer: PathBuf,
    /// The agent for guests.
    pub agent: PathBuf,
    /// The unikernel guest.
    pub unikernel: PathBuf,
    /// The directory of the Linux guest's manifest.
    pub linux: PathBuf,
    /// A Python with the pinned Firecracker client.
    pub client_python: PathBuf,
    /// A program around the pinned Firecracker client in Rust.
    pub client_sdk: PathBuf,
    /// A Firecracker to compare with.
    pub firecracker: Option<PathBuf>,
    /// How monitors are put into jails, if this run has them there.
    pub jailing: Option<Jailing>,
    /// Where every random choice comes from.
    pub seed: Seed,
}

/// What a test needs of the machine it runs on, beyond what the Makefile sets up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Nothing: it runs everywhere.
    Nothing,
    /// A usable /dev/kvm.
    Kvm,
    /// A usable /dev/kvm, and a mount namespace to change what is at that path.
    KvmAndMountNamespace,
    /// A usable /dev/kvm, and the right to become another user.
    KvmAndRoot,
    /// The same, and the right to trace a process.
    KvmRootAndTrace,
    /// A usable /dev/kvm, the right to become another user, and a cgroup hierarchy that limits memory.
    KvmRootAndMemoryCgroup,
    /// The same, and one that limits how many processes there are.
    KvmRootAndLimitCgroups,
    /// A usable /dev/kvm, the right to become another user, and a cgroup hierarchy of version 2.
    KvmRootAndUnifiedCgroup,
    /// Network namespaces, and cables between them.
    Hosts,
    /// The same and a usable /dev/kvm.
    KvmAndHosts,
    /// A usable /dev/kvm and a Firecracker named by `FIRECRACKER`.
    KvmAndFirecracker,
    /// A usable /dev/kvm, and the right to make a loop device.
    KvmAndLoopDevice,
    /// A usable /dev/kvm, and the right to trace a process.
    KvmAndTrace,
    /// A kernel with Landlock, as far as a process asks of it.
    Landlock,
}

impl Environment {
    /// Reads the variables that the Makefile sets; without them, the paths are those of a plain cargo build.
    pub fn read() -> Self {
        let built = built_beside_this_program();
        let path = |name: &str, default: PathBuf| std::env::var_os(name).map_or(default, PathBuf::from);
        Self {
            coracle: path("CORACLE_BIN", built.join("coracle")),
            coraclectl: path("CORACLECTL_BIN", built.join("coraclectl")),
            jailer: path("CORACLE_JAILER_BIN", built.join("coracle-jailer")),
            agent: path("CORACLE_AGENT", built.join("coracle-agent")),
            unikernel: path("CORACLE_UNIKERNEL", built.join("unikernel")),
            linux: path("CORACLE_LINUX", built.join("linux")),
            client_python: path("CORACLE_CLIENT_PYTHON", PathBuf::from("python3")),
            client_sdk: path("CORACLE_CLIENT_SDK", built.join("coracle-client-sdk")),
            firecracker: std::env::var_os("FIRECRACKER")
                .filter(|path| !path.is_empty())
                .map(PathBuf::from),
            jailing: None,
            seed: Seed::from_environment(),
        }
    }

    /// Why this machine cannot meet a need, or nothing if it can.
    pub fn lacks(&self, need: Need) -> Option<String> {
        match need {
            Need::Nothing => None,
            Need::Kvm => no_kvm(),
            Need::KvmAndMountNamespace if self.jailing.is_some() => no_kvm().or_else(no_root),
            Need::KvmAndMountNamespace => no_kvm().or_else(no_mount_namespace),
            Need::KvmAndRoot => no_kvm().or_else(no_root),
            Need::KvmRootAndTrace => no_kvm().or_else(no_root).or_else(no_trace),
            Need::KvmRootAndMemoryCgroup => no_kvm().or_else(no_root).or_else(no_memory_cgroup),
            Need::KvmRootAndLimitCgroups => no_kvm()
                .or_else(no_root)
                .or_else(no_memory_cgroup)
                .or_else(no_process_cgroup),
            Need::KvmRootAndUnifiedCgroup => no_kvm().or_else(no_root).or_else(no_unified_cgroup),
            Need::Hosts => Host::refused(),
            Need::KvmAndHosts => no_kvm().or_else(Host::refused),
            Need::KvmAndFirecracker if self.firecracker.is_none() => Some("FIRECRACKER is not set".into()),
            Need::KvmAndFirecracker => no_kvm(),
            Need::KvmAndLoopDevice => no_kvm().or_else(no_loop_device),
            Need::KvmAndTrace => no_kvm().or_else(no_trace),
            Need::Landlock => coracle_vmm::landlock::lacks(),
        }
    }

    /// How a command line begins whose mounts are its own, changed by `change` before the rest is executed.
    pub fn after_mounting(&self, change: &str) -> Vec<String> {
        let script = format!("{change} && exec \"$@\"");
        let mut words = vec!["unshare", "--mount"];
        // Whoever makes jails as root has to stay the host's root.
        if self.jailing.is_none() {
            words.push("--map-root-user");
        }
        words.extend(["sh", "-c", &script, "sh"]);
        words.into_iter().map(str::to_owned).collect()
    }

    /// Fails with what to do if a program or guest is not there.
    ///
    /// # Errors
    ///
    /// Then.
    pub fn check(&self) -> Outcome {
        for (path, remedy) in [
            (&self.coracle, "run: make test, or set CORACLE_BIN"),
            (&self.jailer, "run: make test, or set CORACLE_JAILER_BIN"),
            (&self.unikernel, "run: make test, or set CORACLE_UNIKERNEL"),
        ] {
            crate::ensure!(path.is_file(), "{} is not there; {remedy}", path.display());
        }
        Ok(())
    }
}

/// The directory of the programs that cargo built with this one.
fn built_beside_this_program() -> PathBuf {
    let this = std::env::current_exe().unwrap_or_default();
    let directory = this.parent().unwrap_or(Path::new("."));
    // Test programs are one level deeper.
    if directory.ends_with("deps") {
        directory.join("..")
    } else {
        directory.to_owned()
    }
}

fn no_kvm() -> Option<String> {
    let opened = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm");
    opened.err().map(|e| format!("/dev/kvm: {e}"))
}

fn no_mount_namespace() -> Option<String> {
    let tried = Command::new("unshare")
        .args(["--map-root-user", "--mount", "true"])
        .output();
    let is_made = tried.is_ok_and(|tried| tried.status.success());
    (!is_made).then(|| "unshare --map-root-user --mount is refused".into())
}

fn no_root() -> Option<String> {
    (!rustix::process::geteuid().is_root()).then(|| "only root can become another user".into())
}

fn no_memory_cgroup() -> Option<String> {
    let none = crate::harness::jail::memory_limit(1).is_none();
    none.then(|| "no cgroup hierarchy limits memory".into())
}

fn no_process_cgroup() -> Option<String> {
    let none = crate::harness::jail::process_limit(1).is_none();
    none.then(|| "no cgroup hierarchy limits processes".into())
}

fn no_unified_cgroup() -> Option<String> {
    let none = crate::harness::jail::unified_cgroup().is_none();
    none.then(|| "no cgroup hierarchy of version 2 is mounted".into())
}

fn no_trace() -> Option<String> {
    let tried = Command::new("strace").args(["-o", "/dev/null", "true"]).output();
    match tried {
        Ok(tried) if tried.status.success() => None,
        Ok(tried) => Some(String::from_utf8_lossy(&tried.stderr).trim().to_owned()),
        Err(error) => Some(format!("strace: {error}")),
    }
}

fn no_loop_device() -> Option<String> {
    // Says the next free one, which it makes if need be.
    let asked = Command::new("losetup").arg("--find").output();
    match asked {
        Ok(asked) if asked.status.success() => None,
        Ok(asked) => Some(String::from_utf8_lossy(&asked.stderr).trim().to_owned()),
        Err(error) => Some(format!("losetup: {error}")),
    }
}
