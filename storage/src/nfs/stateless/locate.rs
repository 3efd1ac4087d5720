//! Where a server of NFSv3 has what is looked for: the ports of its programs, and the handle of an export.

use std::sync::Arc;

use crate::nfs::bringup::Stop;
use crate::nfs::error::{NfsError, Refusal};
use crate::nfs::rpc::program;
use crate::nfs::url::Path;
use crate::nfs::v3::{
    Exports, FileHandle, MOUNT_VERSION, Mapping, MountPath, MountResult, MountStatus, NFS_VERSION,
    mount_procedure, portmap_procedure,
};
use crate::nfs::v4::Name;

use super::plan::Plan;
use super::procedure::{Call, CallError, Port};

/// Where the programs are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ports {
    pub(super) nfs: u16,
    pub(super) mount: u16,
}

/// An export that the image is in.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mounted {
    /// Its directory.
    pub(super) handle: FileHandle,
    /// How many components of the image's path that takes.
    pub(super) depth: usize,
}

impl Ports {
    /// Those that were said, if both were.
    pub(super) fn said(plan: &Plan) -> Option<Self> {
        Some(Self {
            nfs: plan.port?,
            mount: plan.mount_port?,
        })
    }
}

/// Asks the portmapper for the ports that were not said.
pub(super) async fn ports(port: Port, plan: Arc<Plan>) -> Result<Ports, Stop> {
    let nfs = match plan.port {
        Some(said) => said,
        None => registered(&port, Mapping::of(program::NFS, NFS_VERSION), "NFSv3").await?,
    };
    let mount = match plan.mount_port {
        Some(said) => said,
        None => registered(&port, Mapping::of(program::MOUNT, MOUNT_VERSION), "MOUNT").await?,
    };
    Ok(Ports { nfs, mount })
}

async fn registered(port: &Port, mapping: Mapping, program: &'static str) -> Result<u16, Stop> {
    let asked = Call::portmap(portmap_procedure::GETPORT, &mapping);
    let told = port.call(asked).await.value::<u32>();
    let told = told.map_err(|error| never("ask the portmapper for a port", error))?;
    match u16::try_from(told) {
        Ok(told @ 1..) => Ok(told),
        _ => Err(Stop::Never(NfsError::NotRegistered { program })),
    }
}

/// Has the export mounted that is next to the image.
pub(super) async fn mount(port: Port, plan: Arc<Plan>) -> Result<Mounted, Stop> {
    let exports = exports(&port).await;
    let mut refused = None;
    for candidate in candidates(&plan.path, &exports) {
        let asked = Call::mount(mount_procedure::MNT, &MountPath(candidate.path.clone()));
        match port.call(asked).await.answer::<MountResult>() {
            Ok(mounted) => {
                return Ok(Mounted {
                    handle: mounted.handle,
                    depth: candidate.depth,
                });
            }
            Err(CallError::Mount(status)) if candidate.is_listed => {
                refused = refused.or(Some((candidate.path, status)));
            }
            // There may be a shorter one.
            Err(CallError::Mount(_)) => {}
            Err(error) => return Err(never("mount an export", error)),
        }
    }
    Err(Stop::Never(match refused {
        Some((export, status)) => refusal(&export, status),
        None => NfsError::NotExported {
            path: plan.path.to_string(),
            exports: exports.iter().map(|path| shown(path)).collect(),
        },
    }))
}

fn refusal(export: &[u8], status: MountStatus) -> NfsError {
    NfsError::ExportRefused {
        export: shown(export),
        status,
    }
}

/// What the server exports, as far as it says: it may keep that to itself, and have them mounted nevertheless.
async fn exports(port: &Port) -> Vec<Vec<u8>> {
    let asked = Call::mount(mount_procedure::EXPORT, &());
    let told = port.call(asked).await.value::<Exports>();
    let told = told.map(|exports| exports.0.into_iter().map(|export| export.path.0).collect());
    told.unwrap_or_default()
}

/// A directory that may be exported.
#[derive(Debug, PartialEq, Eq)]
struct Candidate {
    /// As the server has it.
    path: Vec<u8>,
    depth: usize,
    is_listed: bool,
}

/// The exports that the image is in, the longest first; without one, all directories that it is in.
fn candidates(path: &Path, exports: &[Vec<u8>]) -> Vec<Candidate> {
    let (_, directories) = path.file_and_directories();
    let listed = exports.iter().filter_map(|export| {
        Some(Candidate {
            path: export.clone(),
            depth: depth(export, directories)?,
            is_listed: true,
        })
    });
    let mut listed: Vec<Candidate> = listed.collect();
    listed.sort_by_key(|candidate| std::cmp::Reverse(candidate.depth));
    if !listed.is_empty() {
        return listed;
    }
    let unlisted = (0..=directories.len()).rev().map(|depth| Candidate {
        path: directory(path, depth),
        depth,
        is_listed: false,
    });
    unlisted.collect()
}

/// The directory that so many components of a path lead to.
fn directory(path: &Path, depth: usize) -> Vec<u8> {
    let names = path.components().iter().take(depth);
    let path: Vec<u8> = names.flat_map(|name| [b"/", name.bytes()].concat()).collect();
    if path.is_empty() { b"/".to_vec() } else { path }
}

/// How many of the directories an export is, if it leads to the same place.
fn depth(export: &[u8], directories: &[Name]) -> Option<usize> {
    let names = export.split(|byte| *byte == b'/').filter(|name| !name.is_empty());
    let names: Vec<&[u8]> = names.collect();
    let same = directories.get(..names.len())?;
    let is_same = same.iter().map(Name::bytes).eq(names.iter().copied());
    is_same.then_some(names.len())
}

fn shown(path: &[u8]) -> String {
    path.escape_ascii().to_string()
}

fn never(action: &'static str, error: CallError) -> Stop {
    Stop::Never(NfsError::Call {
        action,
        source: Refusal(error.into()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tried(exports: &[&str]) -> Vec<(String, usize, bool)> {
        let names = ["srv", "vm", "golden", "base.raw"].map(|name| Name::new(name).expect("it is a name"));
        let path = Path::new(names.to_vec()).expect("it is a path");
        let exports: Vec<Vec<u8>> = exports.iter().map(|export| export.as_bytes().to_vec()).collect();
        let candidates = candidates(&path, &exports).into_iter();
        let tried = candidates.map(|it| (shown(&it.path), it.depth, it.is_listed));
        tried.collect()
    }

    #[test]
    fn the_longest_export_that_the_image_is_in_is_mounted_first_as_the_server_spells_it() {
        let tried = tried(&[
            "/srv",
            "/srv/vm/gold",
            "/srv//vm/golden/",
            "/",
            "/srv/vm/golden/base.raw",
            "/home",
        ]);
        let expected = [("/srv//vm/golden/", 3), ("/srv", 1), ("/", 0)];
        assert_eq!(
            tried,
            expected.map(|(path, depth)| (path.to_owned(), depth, true))
        );
    }

    #[test]
    fn where_no_export_is_told_of_every_directory_is_tried() {
        let expected = [("/srv/vm/golden", 3), ("/srv/vm", 2), ("/srv", 1), ("/", 0)];
        let expected = expected.map(|(path, depth)| (path.to_owned(), depth, false));
        assert_eq!(tried(&[]), expected);
        assert_eq!(tried(&["/home"]), expected);
    }
}
