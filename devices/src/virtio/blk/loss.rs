//! The loss of a disk: its image serves nobody any more, and somebody has to hear of it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, OnceLock};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::wait::borrow;

/// The one loss of a disk, told by whichever of its workers hears of it first.
#[derive(Debug)]
pub struct LossSignal {
    drive_id: String,
    reason: OnceLock<String>,
    event: EventFd,
}

impl LossSignal {
    /// A disk that is not lost.
    ///
    /// # Errors
    ///
    /// When no eventfd can be made.
    pub fn new(drive_id: &str) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            drive_id: drive_id.to_owned(),
            reason: OnceLock::new(),
            event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        }))
    }

    /// The disk is lost, for good; the first reason is the one that counts.
    pub fn signal(&self, reason: &str) {
        if self.reason.set(reason.to_owned()).is_ok() {
            // Refused only by a full counter: this is the first and only write.
            let _ = self.event.write(1);
        }
    }

    /// The drive.
    pub fn drive_id(&self) -> &str {
        &self.drive_id
    }

    /// Why the disk is lost, if it is.
    pub fn reason(&self) -> Option<&str> {
        self.reason.get().map(String::as_str)
    }

    /// Quiets the descriptor: whoever watches it has heard.
    pub fn heard(&self) {
        // Fails only when it is quiet already.
        let _ = self.event.read();
    }
}

/// Readable from the loss on, until it was heard.
impl AsFd for LossSignal {
    fn as_fd(&self) -> BorrowedFd<'_> {
        borrow(&self.event)
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_counts_and_is_told_once() {
        let loss = LossSignal::new("root").unwrap();
        assert_eq!((loss.reason(), loss.event.read().is_ok()), (None, false));
        loss.signal("host-b has it");
        loss.signal("host-c has it");
        assert_eq!((loss.drive_id(), loss.reason()), ("root", Some("host-b has it")));
        loss.heard();
        assert!(loss.event.read().is_err());
        assert_eq!(loss.reason(), Some("host-b has it"));
    }
}
