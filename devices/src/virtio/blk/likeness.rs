//! Whether a drive that only reads has the same image on two hosts: no lease tells that.

use std::time::Duration;

use coracle_storage::backend::Access;
use coracle_storage::blocking::Blocking;
use coracle_storage::lease::{Lock, Owner, Terms};
use coracle_storage::likeness::Likeness;
use coracle_storage::open::{self, Image};

use super::config::{DriveConfig, DriveError};

/// How long a server may take for one part of its image.
const READ_MAX: Duration = Duration::from_secs(5);

impl DriveConfig {
    /// Whether its image is one that nobody writes by it, and no overlay stands on.
    pub fn only_reads(&self) -> bool {
        self.access() == Access::ReadOnly && self.overlay.is_none()
    }

    /// What its image looks like. It is read beside whoever has it, and by nobody's lease.
    ///
    /// # Errors
    ///
    /// When it cannot be read.
    pub fn likeness(&self, owner: &Owner) -> Result<Likeness, DriveError> {
        let path = self.image_path()?;
        let terms = Terms {
            lock: Lock::None,
            ..self.terms(owner)?
        };
        let Image { backend, hold } =
            open::open(path, Access::ReadOnly, &terms).map_err(|source| self.refused(source))?;
        let unread = |source: std::io::Error| DriveError::Unread {
            drive_id: self.drive_id.clone(),
            source,
        };
        let mut image = Blocking::new(backend).map_err(unread)?.with_limit(READ_MAX);
        let likeness = Likeness::of(&mut image).map_err(|failure| unread(std::io::Error::other(failure)));
        drop(image);
        drop(hold);
        likeness
    }
}
