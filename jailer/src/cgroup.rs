//! The cgroups of a jail, of either version.

mod mounts;
#[cfg(test)]
mod tests;

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use crate::cli::{CgroupVersion, Request, Setting};
use crate::ledger::{self, Item, Kind, Ledger, Made};
use mounts::Hierarchy;

/// The monitor's cgroup in one hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Group {
    /// Where the hierarchy is mounted.
    mount: PathBuf,
    /// The cgroup, relative to it.
    path: PathBuf,
    version: CgroupVersion,
    settings: Vec<Setting>,
    /// Whether it is the user's, and only entered.
    is_given: bool,
}

/// The cgroups that a request asks for, one for each hierarchy.
///
/// # Errors
///
/// When the host has no such hierarchy or controller.
pub(crate) fn planned(request: &Request, exec_name: &Path, mounts: &str) -> Result<Vec<Group>, CgroupError> {
    let version = request.cgroup_version;
    if request.cgroups.is_empty() && version == CgroupVersion::V1 {
        return Ok(vec![]);
    }
    let hierarchies = mounts::hierarchies(mounts, version);
    if hierarchies.is_empty() {
        return Err(CgroupError::NoHierarchy { version });
    }
    let parent = request.parent_cgroup.as_deref().unwrap_or(exec_name);
    if request.cgroups.is_empty() {
        // Version 2 without settings: the cgroup above is entered if there is one, and none is made.
        let given = hierarchies.into_iter().take(1).map(|hierarchy| Group {
            mount: hierarchy.mount,
            path: parent.to_owned(),
            version,
            settings: vec![],
            is_given: true,
        });
        return Ok(given.filter(|group| group.location().is_dir()).collect());
    }
    let mut groups: Vec<Group> = Vec::new();
    for setting in &request.cgroups {
        let controller = setting.file.split('.').next().unwrap_or_default();
        let hierarchy = hierarchies.iter().find(|hierarchy| hierarchy.has(controller));
        let Hierarchy { mount, .. } = hierarchy.ok_or_else(|| CgroupError::NoController {
            controller: controller.to_owned(),
            version,
        })?;
        let at = groups.iter_mut().find(|group| group.mount == *mount);
        match at {
            Some(group) => group.settings.push(setting.clone()),
            None => groups.push(Group {
                mount: mount.clone(),
                path: parent.join(&request.id),
                version,
                settings: vec![setting.clone()],
                is_given: false,
            }),
        }
    }
    Ok(groups)
}

impl Group {
    /// What is made for it, outermost first.
    pub(crate) fn items(&self) -> Vec<Item> {
        if self.is_given {
            return vec![];
        }
        let mut paths = self.levels();
        let own = paths.pop();
        let shared = paths.into_iter().map(|path| (Kind::Shared, path));
        shared
            .chain(own.map(|path| (Kind::Directory, path)))
            .map(|(kind, path)| Item { kind, path })
            .collect()
    }

    /// Makes the cgroup, and writes what was asked for.
    ///
    /// # Errors
    ///
    /// When the kernel refuses something of it.
    pub(crate) fn make(&self, ledger: &Ledger) -> Result<(), CgroupError> {
        if self.is_given {
            return Ok(());
        }
        let refused = |path: &Path| {
            let path = path.to_owned();
            move |source| CgroupError::Make { path, source }
        };
        let levels = self.levels();
        // Whoever leaves a shared cgroup last removes it, perhaps just now.
        for attempt in 0.. {
            let made = levels.iter().try_for_each(|path| {
                ledger
                    .make(path, || self.make_level(path))
                    .map_err(|error| (path, error))
            });
            match made {
                Ok(()) => break,
                Err((_, error)) if error.kind() == io::ErrorKind::NotFound && attempt < ATTEMPTS_MAX => {}
                Err((path, error)) => return Err(refused(path)(error)),
            }
        }
        if self.version == CgroupVersion::V2 {
            self.enable_controllers()?;
        }
        let location = self.location();
        for Setting { file, value } in &self.settings {
            let path = location.join(file);
            write(&path, value).map_err(|source| CgroupError::Write {
                path,
                value: value.clone(),
                source,
            })?;
        }
        Ok(())
    }

    /// Moves this process into the cgroup.
    ///
    /// # Errors
    ///
    /// When the kernel refuses that.
    pub(crate) fn enter(&self) -> Result<(), CgroupError> {
        let path = self.location().join("cgroup.procs");
        write(&path, "0").map_err(|source| CgroupError::Enter { path, source })
    }

    /// How many processes of it the kernel has killed for want of memory, if it counts that, and all of them are this jail's.
    pub(crate) fn oom_kills(&self) -> Option<u64> {
        if self.is_given {
            return None;
        }
        let name = match self.version {
            CgroupVersion::V1 => "memory.oom_control",
            CgroupVersion::V2 => "memory.events",
        };
        let text = fs::read_to_string(self.location().join(name)).ok()?;
        let count = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        count?.trim().parse().ok()
    }

    fn location(&self) -> PathBuf {
        self.mount.join(&self.path)
    }

    /// The cgroup and those above it, outermost first.
    fn levels(&self) -> Vec<PathBuf> {
        let mut path = self.mount.clone();
        self.path
            .components()
            .map(|part| {
                path.push(part);
                path.clone()
            })
            .collect()
    }

    fn make_level(&self, path: &Path) -> io::Result<Made> {
        match fs::create_dir(path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                // What is in it would end with this jail.
                let has_others =
                    || fs::read_to_string(path.join("cgroup.procs")).is_ok_and(|text| !text.is_empty());
                if *path == self.location() && has_others() {
                    return Err(io::Error::other(
                        "processes of another machine are in it; take another --id",
                    ));
                }
                return Ok(Made::Found);
            }
            Err(error) => return Err(error),
        }
        if *path != self.location()
            && let Ok(directory) = fs::File::open(path)
        {
            ledger::mark(directory);
        }
        self.inherit_cpus(path)?;
        Ok(Made::New)
    }

    /// A new cgroup of `cpuset` has no processors and no memory, and takes no process until it has.
    fn inherit_cpus(&self, path: &Path) -> io::Result<()> {
        let is_cpuset = |setting: &Setting| setting.file.starts_with("cpuset.");
        if self.version == CgroupVersion::V2 || !self.settings.iter().any(is_cpuset) {
            return Ok(());
        }
        for file in ["cpuset.cpus", "cpuset.mems"] {
            let above = path.parent().unwrap_or(path).join(file);
            write(&path.join(file), fs::read_to_string(above)?.trim())?;
        }
        Ok(())
    }

    /// Each cgroup from the root to the one above ours hands the controllers on.
    fn enable_controllers(&self) -> Result<(), CgroupError> {
        let mut above = vec![self.mount.clone()];
        above.extend(self.levels());
        above.pop();
        for Setting { file, .. } in &self.settings {
            let controller = file.split('.').next().unwrap_or_default();
            for path in &above {
                let path = path.join("cgroup.subtree_control");
                let enabled = fs::read_to_string(&path).unwrap_or_default();
                if enabled.split_whitespace().any(|name| name == controller) {
                    continue;
                }
                let value = format!("+{controller}");
                write(&path, &value).map_err(|source| CgroupError::Write { path, value, source })?;
            }
        }
        Ok(())
    }
}

/// How often a shared cgroup may vanish while ours is made in it.
const ATTEMPTS_MAX: u32 = 100;

/// One write to a file that is there: the kernel takes a value as a whole.
fn write(path: &Path, value: &str) -> io::Result<()> {
    OpenOptions::new()
        .write(true)
        .truncate(true)
        .open(path)?
        .write_all(format!("{value}\n").as_bytes())
}

/// Why there is no such cgroup.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CgroupError {
    /// Nothing of this version is mounted.
    #[error("no cgroup hierarchy of {version} is mounted; see /proc/mounts, and --cgroup-version")]
    NoHierarchy {
        /// As asked.
        version: CgroupVersion,
    },
    /// No hierarchy has this controller.
    #[error(
        "no cgroup hierarchy of {version} has the controller `{controller}`; see /proc/mounts, and --cgroup-version"
    )]
    NoController {
        /// The part before the dot.
        controller: String,
        /// As asked.
        version: CgroupVersion,
    },
    /// It cannot be made.
    #[error("cannot make the cgroup {}; its parent has to be yours or delegated to you", path.display())]
    Make {
        /// Where.
        path: PathBuf,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// A setting is not taken.
    #[error(
        "cannot write `{value}` to {}; look whether the controller has such a setting and takes such a value",
        path.display()
    )]
    Write {
        /// Where.
        path: PathBuf,
        /// What.
        value: String,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// It cannot be entered.
    #[error("cannot enter the cgroup by {}; one with controllers for its children takes no process", path.display())]
    Enter {
        /// Where.
        path: PathBuf,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
}

impl std::fmt::Display for CgroupVersion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::V1 => "version 1",
            Self::V2 => "version 2",
        })
    }
}
