//! How the disks of a snapshot are gone on with.

use std::path::{Path, PathBuf};

use coracle_devices::virtio::blk::{DriveConfig, DriveError, HeldDisk};
use coracle_storage::backend::Access;
use coracle_storage::lease::{Lock, Owner, Succession};
use coracle_storage::overlay::copy::Digest;
use coracle_storage::overlay::{Beginning, MEMORY, OverlayConfig};

use super::plan::PlanError;
use super::state::{DriveState, MachineState};
use crate::config::{Config, Disks};
use crate::snapshot::disks::{SavedOverlays, overlay_file};

/// How the image of one drive is taken up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Course {
    /// It is the drive's own.
    Own(Succession),
    /// It is what a temporary overlay begins with, which the drive now has.
    Overlay {
        /// Which.
        from: Source,
        /// Where its lease is recorded, if not beside it.
        lease_at: Option<String>,
        /// Which generation of it.
        succession: Succession,
    },
}

/// What a temporary overlay begins with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A disk: its base.
    Disk,
    /// An overlay that another machine has kept.
    Kept(String),
    /// An overlay that the snapshot has.
    Saved(PathBuf, Digest),
}

/// What is known of the disks of a snapshot, and what is to become of them.
#[derive(Debug)]
pub struct Wanted<'a> {
    /// How they are gone on with.
    pub disks: Disks,
    /// Where overlays lie that are made for that; in memory if absent.
    pub overlay_directory: Option<&'a str>,
    /// What belongs to the snapshot.
    pub saved: &'a SavedOverlays,
}

impl Wanted<'_> {
    /// The courses of the drives of `config`, in their order, which `state` is of. Drives that get an overlay have it in
    /// `config` afterwards.
    ///
    /// # Errors
    ///
    /// A drive that cannot be gone on with so.
    pub fn courses(&self, config: &mut Config, state: &MachineState) -> Result<Vec<Course>, PlanError> {
        let drives = config.drives_mut().iter_mut();
        let course = |drive: &mut DriveConfig| {
            let saved = state.drive(&drive.drive_id);
            self.course(
                drive,
                saved.ok_or_else(|| PlanError::NoState(drive.drive_id.clone()))?,
            )
        };
        drives.map(course).collect()
    }

    fn course(&self, drive: &mut DriveConfig, state: &DriveState) -> Result<Course, PlanError> {
        let id = drive.drive_id.clone();
        if drive.access() == Access::ReadOnly {
            return Ok(Course::Own(Succession::Raises));
        }
        let is_locked = drive.lock()? != Lock::None;
        let saved = self
            .saved
            .of(&id)
            .map(|(path, digest)| Source::Saved(path, digest));
        let succession = || match (self.disks, state.generation) {
            // Nothing is checked where nothing is locked: whoever asked for that answers for the image.
            _ if !is_locked => Ok(Succession::Raises),
            (Disks::Detached, _) => Ok(Succession::Raises),
            (_, Some(generation)) => Ok(Succession::Keeps(generation)),
            (_, None) => Err(PlanError::Unrecorded(id.clone())),
        };
        let (base, from) = match (drive.overlay.as_ref(), saved, self.disks) {
            (Some(overlay), Some(saved), _) if !overlay.keep => {
                return Ok(Course::Overlay {
                    from: saved,
                    lease_at: None,
                    succession: Succession::Raises,
                });
            }
            (Some(overlay), None, _) if !overlay.keep => return Err(PlanError::Temporary(id)),
            (_, _, Disks::Continue) => return Ok(Course::Own(succession()?)),
            (Some(overlay), Some(saved), _) => (overlay.base.clone(), saved),
            (Some(overlay), None, _) => (overlay.base.clone(), Source::Kept(overlay.path.clone())),
            (None, _, _) => (drive.image_path()?.to_owned(), Source::Disk),
        };
        let succession = match from {
            // What the overlay has become since is of no concern.
            Source::Saved(..) => Succession::Raises,
            Source::Disk | Source::Kept(_) => succession()?,
        };
        let path = self
            .overlay_directory
            .map(|directory| Path::new(directory).join(overlay_file(&id)));
        let path = path.map_or_else(|| MEMORY.to_owned(), |path| path.to_string_lossy().into_owned());
        drive.path_on_host = None;
        drive.overlay = Some(OverlayConfig {
            base,
            path,
            keep: false,
        });
        Ok(Course::Overlay {
            from,
            lease_at: drive.lease_at.take(),
            succession,
        })
    }
}

impl Course {
    /// Opens the image of `drive` so, and leases it to `owner`.
    ///
    /// # Errors
    ///
    /// What is wrong with it, or who has it.
    pub fn open(&self, drive: &DriveConfig, owner: &Owner) -> Result<HeldDisk, DriveError> {
        match self {
            Self::Own(succession) => drive.open(owner, *succession),
            Self::Overlay {
                from,
                lease_at,
                succession,
            } => {
                let beginning = match from {
                    Source::Disk => Beginning::Disk,
                    Source::Kept(path) => Beginning::Overlay(path),
                    Source::Saved(path, digest) => Beginning::Saved(path, *digest),
                };
                drive.begin(owner, beginning, lease_at.as_deref(), *succession)
            }
        }
    }
}

#[cfg(test)]
mod tests;
