//! Snapshots: a machine in files.

pub mod contents;
pub mod create;
pub mod disks;
pub mod files;
pub mod load;
pub mod memory;
pub mod sealed;
pub mod unopened;

use coracle_storage::backend::Backend;
use coracle_storage::blocking::Blocking;
use coracle_storage::request::Failure;

/// Writes `bytes` to `image`, which is as long, and has them on the medium when it returns.
pub(crate) fn write_whole(image: Box<dyn Backend>, bytes: &[u8]) -> Result<(), Failure> {
    let mut image =
        Blocking::new(image).map_err(|error| Failure::Host(error.raw_os_error().unwrap_or(libc::EIO)))?;
    image.write_at(0, bytes)?;
    image.flush()
}
