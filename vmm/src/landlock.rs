//! Which files the threads of this process may open, by Landlock (the kernel's `Documentation/userspace-api/landlock.rst`).
//!
//! ```text
//!   no API:  the configuration names all files there will ever be ──► begin(reach) ──► the process, and every thread of it
//!   an API:  its clients name files as long as the machine lives  ──► begin_without ──► vCPUs and `entropy`, which open none
//! ```
//!
//! A domain is inherited and can only become narrower, as filters of system calls are; and like them it is put on before there
//! is a second thread. It does without the rights of newer kernels on older ones, and without all where there is no Landlock.

use std::io;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use ::landlock::{
    ABI, Access, AccessFs, AccessNet, AddRuleError, AddRulesError, BitFlags, CompatLevel, Compatible,
    PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError,
    RulesetStatus, Scope, make_bitflags,
};
use coracle_devices::serial::Output;
use coracle_storage::open::{Need, Place};
use coracle_storage::threads::Kind;

use crate::config::Config;
use crate::line_sink::LineSink;

/// The newest whose rights are asked for.
const NEWEST: ABI = ABI::V6;

/// Why there is no domain where there could be one.
#[derive(Debug, thiserror::Error)]
pub enum LandlockError {
    /// The kernel refuses.
    #[error("cannot confine the process by Landlock: say --no-landlock to run without")]
    Kernel(#[from] RulesetError),
}

/// What a process without an API may reach.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reach {
    places: Vec<Place>,
    /// Files that are written from their end on, and made where they are not there.
    logs: Vec<PathBuf>,
    /// The guest's serial port, likewise.
    serial: Option<PathBuf>,
    /// Directories in which it makes sockets, and removes them.
    sockets: Vec<PathBuf>,
    /// Whether it calls servers.
    calls: bool,
}

impl Reach {
    /// All that `config` names, and those `others`, which are read. `metrics` are those of the command line.
    pub fn of<'a>(
        config: &Config,
        others: impl IntoIterator<Item = &'a Path>,
        metrics: Option<&'a Path>,
    ) -> Self {
        let place = |path: &Path, need| Place {
            path: path.to_owned(),
            need,
        };
        let mut places = vec![place(Path::new("/dev/kvm"), Need::Write)];
        let boot = config.boot_source().into_iter();
        let boot = boot.flat_map(|boot| [Some(&boot.kernel_image_path), boot.initrd_path.as_ref()]);
        places.extend(boot.flatten().map(|path| place(Path::new(path), Need::Read)));
        places.extend(others.into_iter().map(|path| place(path, Need::Read)));
        if !config.networks().is_empty() {
            places.push(place(Path::new("/dev/net/tun"), Need::Write));
        }
        places.extend(config.drives().iter().flat_map(|drive| drive.places()));
        places.extend(config.pmem().iter().flat_map(|pmem| pmem.places()));
        // The console has a description of its own for what standard input and output lead to.
        places
            .extend((0..=2).map(|number| place(Path::new(&format!("/proc/self/fd/{number}")), Need::Write)));
        let log = config.logger().and_then(|logger| logger.log_path.as_deref());
        let kept = config.metrics().map(|metrics| metrics.metrics_path.as_path());
        Self {
            places,
            logs: [log, kept, metrics]
                .into_iter()
                .flatten()
                .map(Path::to_owned)
                .collect(),
            serial: config.serial().and_then(|serial| serial.serial_out_path.clone()),
            sockets: config
                .vsock()
                .map(|vsock| directory_of(&vsock.uds_path))
                .into_iter()
                .collect(),
            calls: config.has_remote_image(),
        }
    }

    /// The places, with the files made that have to be there to be named. What cannot be made is told about where it is used.
    fn places(&self) -> impl Iterator<Item = Place> {
        for path in &self.logs {
            drop(LineSink::open(path));
        }
        if let Some(path) = &self.serial {
            drop(Output::to_path(path));
        }
        let written = self.logs.iter().chain(&self.serial).map(|path| Place {
            path: path.clone(),
            need: Need::Write,
        });
        self.places.iter().cloned().chain(written)
    }
}

/// What threads have that open nothing: no rule at all.
static NOTHING: OnceLock<RulesetCreated> = OnceLock::new();

/// Says why a kernel cannot confine a process in every way that is asked for, if it cannot.
pub fn lacks() -> Option<String> {
    let asked = Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(NEWEST))
        .and_then(|ruleset| ruleset.handle_access(AccessNet::from_all(NEWEST)))
        .and_then(|ruleset| ruleset.scope(Scope::from_all(NEWEST)))
        .and_then(Ruleset::create);
    asked.err().map(|error| format!("Landlock: {error}"))
}

/// Has this process reach nothing but `reach`, and some of its threads nothing at all. To be called while there is one thread.
///
/// # Errors
///
/// When the kernel has Landlock, and refuses.
pub fn begin(reach: &Reach) -> Result<(), LandlockError> {
    let ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?;
    // Where servers send a client on to is for them to say.
    let ruleset = if reach.calls {
        ruleset
    } else {
        ruleset.handle_access(AccessNet::from_all(NEWEST))?
    };
    let mut ruleset = ruleset.create()?;
    let places = reach.places().filter_map(|Place { path, need }| {
        let rights = rights(&path, need)?;
        Some((path, rights))
    });
    let sockets = reach.sockets.iter().cloned();
    let makes_sockets = make_bitflags!(AccessFs::{MakeSock | RemoveFile});
    for (path, rights) in places.chain(sockets.map(|path| (path, makes_sockets))) {
        if let Ok(file) = PathFd::new(&path) {
            match (&mut ruleset).add_rule(PathBeneath::new(file, rights)) {
                Err(error) if !is_of_no_file_system(&error) => return Err(error.into()),
                _ => {}
            }
        }
    }
    let status = ruleset.restrict_self()?;
    match status.ruleset {
        RulesetStatus::FullyEnforced => {
            log::debug!("Landlock: the process reaches what its configuration names")
        }
        RulesetStatus::PartiallyEnforced => {
            log::info!("Landlock: this kernel's is older than it could be, and confines the process in part");
        }
        RulesetStatus::NotEnforced => log::warn!(
            "this kernel has no Landlock (CONFIG_SECURITY_LANDLOCK, and `landlock` in the boot parameter `lsm=`): the process is \
             not confined to the files of its configuration; a jail confines it on any kernel"
        ),
    }
    begin_without()
}

/// Has some threads of this process, which is to reach what it likes, reach nothing. To be called while there is one thread.
///
/// # Errors
///
/// As [`begin`].
pub fn begin_without() -> Result<(), LandlockError> {
    let ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .create()?;
    assert!(NOTHING.set(ruleset).is_ok(), "it is begun once");
    Ok(())
}

/// This thread, which has just begun, is of that kind.
///
/// # Errors
///
/// When the kernel refuses.
pub(crate) fn confine(kind: Kind) -> io::Result<()> {
    let opens_nothing = matches!(
        kind,
        Kind::Vcpu | Kind::Entropy | Kind::Net | Kind::Vsock | Kind::Balloon | Kind::Pmem
    );
    match NOTHING.get().filter(|_| opens_nothing) {
        Some(nothing) => nothing
            .try_clone()?
            .restrict_self()
            .map(drop)
            .map_err(io::Error::other),
        None => Ok(()),
    }
}

/// Where a socket's file lies.
fn directory_of(path: &str) -> PathBuf {
    match Path::new(path).parent() {
        Some(directory) if !directory.as_os_str().is_empty() => directory.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// The rights that a place needs, or `None` if it is not there, or something else.
fn rights(path: &Path, need: Need) -> Option<BitFlags<AccessFs>> {
    let metadata = path.metadata().ok()?;
    let kind = metadata.file_type();
    let for_directories = matches!(need, Need::List | Need::Make);
    // A rule on a directory is one on all that is beneath it.
    if kind.is_dir() != for_directories {
        return None;
    }
    let is_device = kind.is_char_device() || kind.is_block_device();
    let rights = match need {
        Need::Read => make_bitflags!(AccessFs::{ReadFile}),
        Need::Write => make_bitflags!(AccessFs::{ReadFile | WriteFile | Truncate}),
        Need::List => make_bitflags!(AccessFs::{ReadDir | ReadFile}),
        Need::Make => {
            make_bitflags!(AccessFs::{ReadDir | ReadFile | WriteFile | Truncate | MakeReg | RemoveFile})
        }
    };
    Some(if is_device {
        rights | AccessFs::IoctlDev
    } else {
        rights
    })
}

/// Whether there can be no rule for a file, as for a pipe or a memfd: those are open to whoever has them.
fn is_of_no_file_system(error: &RulesetError) -> bool {
    let RulesetError::AddRules(AddRulesError::Fs(AddRuleError::AddRuleCall { source, .. })) = error else {
        return false;
    };
    source.raw_os_error() == Some(libc::EBADFD)
}
