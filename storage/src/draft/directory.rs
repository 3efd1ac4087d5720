//! A new directory on this host that gets its name when everything in it is complete.

#[cfg(test)]
mod tests;

use std::ffi::{OsStr, OsString};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FlockOperation, RenameFlags};
use rustix::io::Errno;

use super::{draft_beside, host};
use crate::draft::DraftError;
use crate::open::directory_of;

/// A directory beside the one that it is to become, with files and nothing else in it.
///
/// ```text
///   create ──► draft ──files written──► publish:  sync ──► name ──► secure ──► clear
///     │          └── dropped: nothing is left      │ the old one,   │ the new one, │ what was there
///     └── what a killed one has left is removed    │ under its name │ and the old  │ is removed
///                                                                     under the draft's
/// ```
///
/// A process that is killed leaves a draft, `<name>.<16 digits>.draft`, which has a lock for as long as somebody works on it: the
/// next one for the same name removes those that have none.
#[derive(Debug)]
pub struct DirectoryDraft {
    target: PathBuf,
    draft: PathBuf,
    is_part: fn(&OsStr) -> bool,
    /// It is locked by this.
    handle: File,
    is_draft: bool,
}

/// As many drafts are made as somebody may take for left ones, between their making and their lock.
const ATTEMPTS_MAX: usize = 16;

impl DirectoryDraft {
    /// Begins an empty directory to become `path`. Whatever has that name has to be a directory of files of which `is_part`
    /// knows the names: nothing else is ever replaced, or removed.
    ///
    /// # Errors
    ///
    /// When something else is there, or what the host says.
    pub fn create(path: &str, is_part: fn(&OsStr) -> bool) -> Result<Self, DraftError> {
        let failed = |error| host(path, error);
        let target = PathBuf::from(path);
        let name = target
            .file_name()
            .ok_or_else(|| failed(ErrorKind::InvalidInput.into()))?;
        // Without a slash at its end.
        let target = directory_of(&target).join(name);
        check_replaceable(&target, is_part)?;
        remove_left(&target, is_part).map_err(failed)?;
        for _ in 0..ATTEMPTS_MAX {
            let draft = draft_beside(&target.to_string_lossy());
            let draft = PathBuf::from(draft);
            DirBuilder::new().mode(0o700).create(&draft).map_err(failed)?;
            if let Some(handle) = locked(&draft) {
                return Ok(Self {
                    target,
                    draft,
                    is_part,
                    handle,
                    is_draft: true,
                });
            }
        }
        Err(failed(ErrorKind::ResourceBusy.into()))
    }

    /// Where it is until it is published.
    pub fn path(&self) -> &Path {
        &self.draft
    }

    /// Gives the directory its name, in one step, instead of what had it. The files in it are on the medium; when it returns,
    /// their names and its own are.
    ///
    /// # Errors
    ///
    /// When that fails; then nothing is left of the draft, unless the host cannot tell what it has done.
    pub fn publish(mut self) -> Result<(), DraftError> {
        self.sync()?;
        self.name()?;
        self.secure()?;
        self.clear();
        Ok(())
    }

    fn sync(&self) -> Result<(), DraftError> {
        self.handle.sync_all().map_err(|error| self.failed(error))
    }

    /// From here on the name is that of the new one, and the draft's that of the old one, if there is one.
    fn name(&mut self) -> Result<(), DraftError> {
        let rename = |flags| rustix::fs::renameat_with(CWD, &self.draft, CWD, &self.target, flags);
        let renamed = match rename(RenameFlags::NOREPLACE) {
            Err(Errno::EXIST) => {
                check_replaceable(&self.target, self.is_part)?;
                match rename(RenameFlags::EXCHANGE) {
                    Err(Errno::INVAL | Errno::NOSYS) => {
                        return Err(DraftError::Unexchangeable {
                            path: self.target.display().to_string(),
                        });
                    }
                    exchanged => exchanged,
                }
            }
            // Not every file system knows the flag. A directory replaces nothing but an empty one.
            Err(Errno::INVAL | Errno::NOSYS) => rustix::fs::rename(&self.draft, &self.target),
            renamed => renamed,
        };
        renamed.map_err(|errno| self.failed(errno.into()))?;
        self.is_draft = false;
        Ok(())
    }

    fn secure(&self) -> Result<(), DraftError> {
        let synced = File::open(directory_of(&self.target)).and_then(|parent| parent.sync_all());
        synced.map_err(|error| self.failed(error))
    }

    fn clear(&self) {
        match remove(&self.draft, self.is_part) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => {
                let draft = self.draft.display();
                log::warn!("`{draft}` is what was there before, and can be removed: {error}");
            }
        }
    }

    fn failed(&self, error: io::Error) -> DraftError {
        host(&self.target.to_string_lossy(), error)
    }
}

impl Drop for DirectoryDraft {
    fn drop(&mut self) {
        if self.is_draft
            && let Err(error) = remove(&self.draft, self.is_part)
        {
            log::warn!(
                "`{}` is of no use and can be removed: {error}",
                self.draft.display()
            );
        }
    }
}

/// Opens and locks the draft that was made just now; nothing if somebody was faster, and took it for one that was left.
fn locked(draft: &Path) -> Option<File> {
    let handle = open(draft).ok()?;
    rustix::fs::flock(&handle, FlockOperation::NonBlockingLockExclusive).ok()?;
    let (made, named) = (handle.metadata().ok()?, fs::symlink_metadata(draft).ok()?);
    (made.ino() == named.ino() && made.dev() == named.dev()).then_some(handle)
}

fn open(directory: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW)
        .open(directory)
}

/// Whether what has the name `target` can be replaced.
fn check_replaceable(target: &Path, is_part: fn(&OsStr) -> bool) -> Result<(), DraftError> {
    let path = || target.display().to_string();
    let failed = |error| host(&path(), error);
    match fs::symlink_metadata(target) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
        Ok(there) if !there.is_dir() => return Err(DraftError::NotADirectory { path: path() }),
        Ok(_) => {}
    }
    match stranger(target, is_part).map_err(failed)? {
        None => Ok(()),
        Some(name) => Err(DraftError::Stranger {
            path: path(),
            name: name.to_string_lossy().into_owned(),
        }),
    }
}

/// Something in `directory` that does not belong there.
fn stranger(directory: &Path, is_part: fn(&OsStr) -> bool) -> io::Result<Option<OsString>> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if !is_part(&entry.file_name()) || entry.file_type()?.is_dir() {
            return Ok(Some(entry.file_name()));
        }
    }
    Ok(None)
}

/// Removes the drafts for `target` that nobody works on.
fn remove_left(target: &Path, is_part: fn(&OsStr) -> bool) -> io::Result<()> {
    let parent = directory_of(target);
    for entry in fs::read_dir(parent)? {
        let name = entry?.file_name();
        if !is_draft_of(&name, target) {
            continue;
        }
        let draft = parent.join(name);
        // A file of that name is somebody else's draft.
        let Ok(handle) = open(&draft) else { continue };
        if rustix::fs::flock(&handle, FlockOperation::NonBlockingLockExclusive).is_err() {
            continue;
        }
        match remove(&draft, is_part) {
            Ok(()) => log::info!(
                "`{}` was left by a process that was killed, and is removed",
                draft.display()
            ),
            Err(error) => log::warn!(
                "`{}` was left by a process that was killed: {error}",
                draft.display()
            ),
        }
    }
    Ok(())
}

fn is_draft_of(name: &OsStr, target: &Path) -> bool {
    let (Some(name), Some(target)) = (name.to_str(), target.file_name().and_then(OsStr::to_str)) else {
        return false;
    };
    let number = name
        .strip_prefix(target)
        .and_then(|rest| rest.strip_prefix('.'))
        .and_then(|rest| rest.strip_suffix(".draft"));
    number.is_some_and(|number| number.len() == 16 && number.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

/// Removes `directory` if there are only parts in it, and nothing otherwise.
fn remove(directory: &Path, is_part: fn(&OsStr) -> bool) -> io::Result<()> {
    if let Some(name) = stranger(directory, is_part)? {
        let text = format!("`{}` in it is of somebody else", name.to_string_lossy());
        return Err(io::Error::other(text));
    }
    for entry in fs::read_dir(directory)? {
        fs::remove_file(entry?.path())?;
    }
    fs::remove_dir(directory)
}
