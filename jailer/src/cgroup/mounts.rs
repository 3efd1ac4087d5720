//! Where the host has its cgroup hierarchies, as /proc/mounts says.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt as _;
use std::path::PathBuf;

use crate::cli::CgroupVersion;

/// One hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Hierarchy {
    /// Where it is mounted.
    pub(super) mount: PathBuf,
    controllers: Vec<String>,
}

impl Hierarchy {
    /// Whether it has this controller.
    pub(super) fn has(&self, controller: &str) -> bool {
        self.controllers.iter().any(|name| name == controller)
    }
}

/// The hierarchies of a version. Of version 2 there is one; mounted twice, the first counts.
pub(super) fn hierarchies(mounts: &str, version: CgroupVersion) -> Vec<Hierarchy> {
    let found = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let (mount, kind, options) = (fields.next()?, fields.next()?, fields.next()?);
        let mount = unescaped(mount);
        let controllers = match (kind, version) {
            ("cgroup", CgroupVersion::V1) => options.split(',').map(str::to_owned).collect(),
            ("cgroup2", CgroupVersion::V2) => {
                let names = fs::read_to_string(mount.join("cgroup.controllers")).unwrap_or_default();
                names.split_whitespace().map(str::to_owned).collect()
            }
            _ => return None,
        };
        Some(Hierarchy { mount, controllers })
    });
    match version {
        CgroupVersion::V1 => found.collect(),
        CgroupVersion::V2 => found.take(1).collect(),
    }
}

/// A path of /proc/mounts, where blanks and the like are written as `\` and three octal digits.
fn unescaped(field: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field.as_bytes();
    while let Some((byte, after)) = rest.split_first() {
        let digits = after.first_chunk::<3>().filter(|_| *byte == b'\\');
        let code = digits.and_then(|digits| u8::from_str_radix(str::from_utf8(digits).ok()?, 8).ok());
        match code {
            Some(code) => {
                bytes.push(code);
                rest = after.get(3..).unwrap_or_default();
            }
            None => {
                bytes.push(*byte);
                rest = after;
            }
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}
