//! The file behind persistent memory: how much of it the guest is shown, and when what was stored there is on the medium.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};

use coracle_storage::backend::Access;

/// What ranges of persistent memory begin at multiples of, and are multiples of, in bytes: Linux takes no other ones.
pub const REGION_ALIGNMENT_BYTES: u64 = 2 << 20;

/// The file. Several threads may have it.
#[derive(Debug)]
pub struct Medium {
    file: Arc<File>,
    /// As long as the file was when it was opened.
    size_bytes: u64,
    access: Access,
    /// Held by whoever flushes: the kernel tells one of two who wait for the same pages that these were not written.
    has_failed: Mutex<bool>,
}

/// Why nobody can say that what was stored is on the medium.
#[derive(Debug, thiserror::Error)]
pub enum FlushError {
    /// Somebody has made the file shorter.
    #[error(
        "the file has {now_bytes} bytes, and not {size_bytes}: somebody has made it shorter under its guest, and what was there \
         is lost"
    )]
    Cut {
        /// How long it is.
        now_bytes: u64,
        /// How long it has to be.
        size_bytes: u64,
    },
    /// The host.
    #[error("the host cannot write the file")]
    Host(#[from] io::Error),
    /// The kernel tells of what it could not write once, and takes it for written then.
    #[error(
        "an earlier flush has failed, and what it was for may be lost: start the machine anew when the storage is well"
    )]
    Earlier,
}

impl Medium {
    /// That of `file`, which is open for `access`, has so many bytes, and more than none.
    pub fn new(file: Arc<File>, size_bytes: u64, access: Access) -> Self {
        Self {
            file,
            size_bytes,
            access,
            has_failed: Mutex::new(false),
        }
    }

    /// What may be done with it.
    pub fn access(&self) -> Access {
        self.access
    }

    /// How long the file was when it was opened, in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// How much the guest is shown: that, rounded up. `None` beyond any address space.
    pub fn region_bytes(&self) -> Option<u64> {
        self.size_bytes.checked_next_multiple_of(REGION_ALIGNMENT_BYTES)
    }

    /// Has a file that is written be as long as what the guest is shown of it: where a store leads, there has to be a file, or
    /// a flush would acknowledge what is kept nowhere. To be called by whoever has the lease.
    ///
    /// # Errors
    ///
    /// What the host answers.
    pub fn complete(&self) -> io::Result<()> {
        match (self.access, self.region_bytes()) {
            (Access::ReadWrite, Some(region_bytes)) if region_bytes > self.file.metadata()?.len() => {
                self.file.set_len(region_bytes)
            }
            _ => Ok(()),
        }
    }

    /// Puts what was stored by now on the medium. Waits for the host, and for others who flush, as long as that takes.
    ///
    /// # Errors
    ///
    /// That it may not be there. Then it may not be there for good: no later flush succeeds.
    pub fn flush(&self) -> Result<(), FlushError> {
        self.flush_by(File::sync_data)
    }

    fn flush_by(&self, sync: impl FnOnce(&File) -> io::Result<()>) -> Result<(), FlushError> {
        let mut has_failed = self.has_failed.lock().unwrap_or_else(PoisonError::into_inner);
        if *has_failed {
            return Err(FlushError::Earlier);
        }
        let synced = match self.access {
            Access::ReadOnly => Ok(()),
            Access::ReadWrite => sync(&self.file).map_err(FlushError::from),
        };
        // Afterwards: what was cut meanwhile was not written.
        let flushed = synced.and_then(|()| self.check_whole());
        *has_failed = flushed.is_err();
        flushed
    }

    /// Whether the file is still as long as what the guest is shown of it.
    ///
    /// # Errors
    ///
    /// That it is not.
    pub fn check_whole(&self) -> Result<(), FlushError> {
        let now_bytes = self.file.metadata()?.len();
        let size_bytes = match self.access {
            Access::ReadOnly => self.size_bytes,
            Access::ReadWrite => self.region_bytes().unwrap_or(u64::MAX),
        };
        if now_bytes < size_bytes {
            return Err(FlushError::Cut {
                now_bytes,
                size_bytes,
            });
        }
        Ok(())
    }
}

impl AsFd for Medium {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use std::sync::mpsc::channel;
    use std::thread;
    use std::time::Duration;

    use super::*;

    #[test]
    fn who_flushes_beside_one_whose_flush_fails_is_not_told_that_all_is_well() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(REGION_ALIGNMENT_BYTES).unwrap();
        let medium = Medium::new(Arc::new(file), REGION_ALIGNMENT_BYTES, Access::ReadWrite);
        let ((entered, is_in), (release, released)) = (channel(), channel::<()>());
        let medium = &medium;
        thread::scope(|scope| {
            let first = scope.spawn(move || {
                medium.flush_by(|_| {
                    entered.send(()).unwrap();
                    released.recv().unwrap();
                    Err(io::ErrorKind::StorageFull.into())
                })
            });
            is_in.recv().unwrap();
            // The kernel has told the first of it, and has no more to tell.
            let second = scope.spawn(|| medium.flush_by(|_| Ok(())));
            thread::sleep(Duration::from_millis(50));
            release.send(()).unwrap();
            assert!(matches!(first.join().unwrap(), Err(FlushError::Host(_))));
            assert!(matches!(second.join().unwrap(), Err(FlushError::Earlier)));
        });
    }
}
