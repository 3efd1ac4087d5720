//! What the threads of this process may ask of the kernel.
//!
//! ```text
//!   main: install ──► the process may do what any thread may ──► the guest is about to run: confine(vmm)
//!             └──► spawner: makes all other threads, each of which begins with the filter of its kind
//! ```
//!
//! The policy is `resources/seccomp/x86_64.json`. A filter is inherited, and can only become narrower: that is why threads are
//! made by one that may do what any of them may, and which does nothing else.

mod policy;
mod spawner;
mod trap;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use coracle_storage::threads::{self, Kind};
use rustix::time::{ClockId, clock_gettime};

use self::policy::{DISPENSABLE, NO_CLONE3, PROCESS, PolicyError};

use crate::landlock;

pub use self::trap::EXIT_BAD_SYSTEM_CALL;

/// Whose filters are used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Filters {
    /// Those that are built in.
    #[default]
    BuiltIn,
    /// Those of a policy in this file.
    Own(PathBuf),
    /// None: for debugging.
    None,
}

impl Filters {
    /// The file that they are read from, if there is one.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Own(path) => Some(path),
            Self::BuiltIn | Self::None => None,
        }
    }
}

/// Why there are no filters.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// A policy of the user's.
    #[error("cannot use the filters of system calls in `{path}`")]
    Policy {
        /// Where it is.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The kernel refuses.
    #[error(
        "the kernel takes no filter of system calls: use a kernel with CONFIG_SECCOMP_FILTER, or say --no-seccomp to run without"
    )]
    Kernel(#[source] io::Error),
    /// There is no thread to be had.
    #[error("cannot make a thread: look at the limits on processes (`pids.max` of the cgroup, `ulimit -u`)")]
    Thread(#[source] io::Error),
}

type Programs = BTreeMap<String, Vec<libc::sock_filter>>;

static BUILT_IN: &[(&str, &[libc::sock_filter])] = include!(concat!(env!("OUT_DIR"), "/seccomp.rs"));
/// Those of a user's policy.
static OWN: OnceLock<Programs> = OnceLock::new();
static IS_CONFINED: OnceLock<()> = OnceLock::new();

/// Has the process, and all of its threads, be filtered by `filters` from now on. To be called while there is one thread.
///
/// # Errors
///
/// Why they are not.
pub fn begin(filters: &Filters) -> Result<(), SeccompError> {
    match filters {
        Filters::None => return Ok(()),
        Filters::Own(path) => {
            let programs = own(path)?;
            OWN.set(programs).expect("filters are chosen once");
        }
        Filters::BuiltIn => {}
    }
    // What the kernel has told the process of itself is asked for once, by whoever reads a clock first.
    let _ = clock_gettime(ClockId::Monotonic);
    trap::install("main").map_err(SeccompError::Kernel)?;
    for program in [NO_CLONE3, PROCESS] {
        install(program).map_err(SeccompError::Kernel)?;
    }
    spawner::start().map_err(SeccompError::Thread)?;
    threads::make_by(spawner::make);
    IS_CONFINED.set(()).expect("filters are chosen once");
    Ok(())
}

/// This thread, the first one, does from now on what it does while the guest runs.
///
/// # Errors
///
/// When the kernel refuses.
pub fn confine_vmm() -> Result<(), SeccompError> {
    static IS_DONE: OnceLock<()> = OnceLock::new();
    if IS_CONFINED.get().is_none() || IS_DONE.set(()).is_err() {
        return Ok(());
    }
    trap::name_thread("vmm");
    install("vmm").map_err(SeccompError::Kernel)
}

/// This thread, which has just begun, is of that kind and name.
fn confine(kind: Kind, name: &str) -> io::Result<()> {
    trap::name_thread(name);
    landlock::confine(kind)?;
    let kind = kind.name();
    if policy::is_frugal(kind) {
        install(DISPENSABLE)?;
    }
    install(kind)
}

fn own(path: &Path) -> Result<Programs, SeccompError> {
    let refused = |source| SeccompError::Policy {
        path: path.to_owned(),
        source,
    };
    let text = std::fs::read_to_string(path).map_err(|error| refused(error.into()))?;
    let programs = policy::compile(&text).map_err(|error: PolicyError| refused(error.into()))?;
    let programs = programs.into_iter().map(|(kind, program)| {
        let lines = program.iter().map(|line| libc::sock_filter {
            code: line.code,
            jt: line.jt,
            jf: line.jf,
            k: line.k,
        });
        (kind, lines.collect())
    });
    Ok(programs.collect())
}

/// Puts one more filter on this thread, which those inherit that it makes.
fn install(name: &str) -> io::Result<()> {
    let built_in = || {
        let mut programs = BUILT_IN.iter();
        programs.find_map(|(kind, program)| (*kind == name).then_some(*program))
    };
    let program = match OWN.get() {
        Some(own) => own.get(name).map(Vec::as_slice),
        None => built_in(),
    };
    let program = program.expect("a policy has a filter for each kind");
    // What is answered is no news.
    let flags = if [NO_CLONE3, DISPENSABLE].contains(&name) {
        0
    } else {
        libc::SECCOMP_FILTER_FLAG_LOG
    };
    trap::set_filter(program, flags)
}
