//! Where the records of an image are.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::chain::{Chain, ChainError};

/// The place for an image's records.
pub(super) enum Place {
    Chain(Chain),
    /// There is none: what was looked for, and why it was not found.
    Nowhere(NoPlace),
}

/// Why an image has no place for records.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoPlace {
    #[error("nothing can stand beside a block device")]
    BlockDevice,
    #[error("the image has no name any more, or none that can be seen from here")]
    Nameless,
    #[error("no record can stand beside it")]
    Chain(#[source] ChainError),
}

/// Finds the place for the records of the image that `file` has open and `path` names: named after
/// `at`, else beside the image.
pub(super) fn locate(file: &File, path: &str, at: Option<&str>) -> Result<Place, ChainError> {
    if let Some(at) = at {
        return Chain::of(Path::new(at)).map(Place::Chain);
    }
    Ok(match beside(file, path) {
        Ok(chain) => Place::Chain(chain),
        Err(reason) => Place::Nowhere(reason),
    })
}

/// Whether the image is a block device, whose locks are those of one host.
pub(super) fn is_block_device(file: &File) -> io::Result<bool> {
    Ok(file.metadata()?.file_type().is_block_device())
}

/// The number under which /proc/locks has the image.
pub(super) fn inode(file: &File) -> u64 {
    file.metadata().map_or(0, |metadata| metadata.ino())
}

fn beside(file: &File, path: &str) -> Result<Chain, NoPlace> {
    if is_block_device(file).unwrap_or(false) {
        return Err(NoPlace::BlockDevice);
    }
    let name = own_name(file, path).ok_or(NoPlace::Nameless)?;
    Chain::of(&name).map_err(NoPlace::Chain)
}

/// The image's name without symbolic links: whichever of them leads to it, its records are in one place.
fn own_name(file: &File, path: &str) -> Option<PathBuf> {
    let name = fs::canonicalize(path).ok()?;
    let (opened, named) = (file.metadata().ok()?, fs::metadata(&name).ok()?);
    ((opened.dev(), opened.ino()) == (named.dev(), named.ino())).then_some(name)
}
