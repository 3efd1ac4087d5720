//! Which snapshots may be gone on with many times.

use coracle_storage::backend::Access;
use coracle_storage::lease::{Lock, Owner, Terms};
use coracle_storage::open::{self, Image, OpenError};
use coracle_vmm::config::Disks;
use coracle_vmm::machine::disks::{Course, Source, Wanted};
use coracle_vmm::machine::plan::PlanError;
use coracle_vmm::snapshot::load::Snapshot;
use thiserror::Error;

/// Why a snapshot cannot be cloned.
#[derive(Debug, Error)]
pub(crate) enum DisksError {
    #[error(transparent)]
    Course(#[from] PlanError),
    #[error("the snapshot cannot be cloned: drive `{drive_id}` cannot be shared as it was saved")]
    NotShared {
        drive_id: String,
        #[source]
        source: OpenError,
    },
}

/// Has the disks of `snapshot` that clones begin their overlays with read by `owner`, too: as long as the images are there,
/// nobody writes them, so what holds of one clone holds of all.
///
/// # Errors
///
/// The first disk that somebody writes, or has written since, and who it is; or one that is gone.
pub(super) fn hold(snapshot: &Snapshot, owner: &Owner) -> Result<Vec<Image>, DisksError> {
    let wanted = Wanted {
        disks: Disks::Clone,
        overlay_directory: None,
        saved: &snapshot.overlays,
    };
    let mut config = snapshot.config.clone();
    let courses = wanted.courses(&mut config, &snapshot.state)?;
    let mut held = Vec::new();
    for (drive, course) in config.drives().iter().zip(&courses) {
        let Course::Overlay {
            from,
            lease_at,
            succession,
        } = course
        else {
            continue;
        };
        let path = match from {
            Source::Kept(path) => Some(path),
            Source::Disk => drive.overlay.as_ref().map(|overlay| &overlay.base),
            // It belongs to the snapshot, and each clone checks it.
            Source::Saved(..) => None,
        };
        let Some(path) = path else { continue };
        let lock = match drive.lock {
            Some(Lock::None) => Lock::None,
            _ => Lock::Shared,
        };
        let terms = Terms {
            at: lease_at.as_deref(),
            succession: *succession,
            ..Terms::new(lock, owner)
        };
        let image = open::open(path, Access::ReadOnly, &terms);
        held.push(image.map_err(|source| DisksError::NotShared {
            drive_id: drive.drive_id.clone(),
            source,
        })?);
    }
    Ok(held)
}
