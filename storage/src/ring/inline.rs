//! Operations that are carried out at once instead of by the ring.
//!
//! The ring tries each operation without waiting, and hands what may have to wait to a kernel worker. Two kinds of
//! file never let it try: files in memory (tmpfs, ramfs, a memfd) don't say that they never wait, and ext4 takes no
//! buffered write without leave to wait. There every operation went to a worker and back, two context switches
//! for the copy of a page; a plain system call does the same in half the time. Writes go
//! back to the workers while the file system makes writers wait: one that took long sends the next ones there.

use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use crate::plain;
use crate::reactor::{FILES_MAX, FileSlot, ImageFile, KernelOp, Medium};
use crate::request::Durability;

/// The longest transfer that is carried out at once, in bytes: it keeps the thread for a tenth of a millisecond.
const TRANSFER_BYTES_MAX: u64 = 1 << 20;
/// A write that took longer has waited for the medium: the file system holds back those who dirty pages too fast.
const QUICK_MAX: Duration = Duration::from_millis(1);
/// Writes that go to the workers after one that was not quick.
const PENANCE: u32 = 64;

/// Which operations bypass the ring.
#[derive(Clone, Debug, Default)]
pub(super) struct Inline {
    files: Vec<RawFd>,
    media: [Medium; FILES_MAX],
    /// Writes that still go to the workers.
    penance: u32,
}

impl Inline {
    /// Those on `files`. The caller keeps them open.
    pub(super) fn new(files: &[ImageFile]) -> Self {
        let mut media = [Medium::default(); FILES_MAX];
        for (medium, file) in media.iter_mut().zip(files) {
            *medium = file.medium;
        }
        Self {
            files: files.iter().map(|file| file.fd).collect(),
            media,
            penance: 0,
        }
    }

    /// The place belongs to a socket from now on: whoever registered its descriptor may close that.
    pub(super) fn forget(&mut self, place: usize) {
        if let Some(medium) = self.media.get_mut(place) {
            *medium = Medium::Any;
        }
    }

    /// Carries `op` out if it is one of those; the result is that of the system call, as in an event.
    #[inline]
    pub(super) fn run(&mut self, op: &KernelOp) -> Option<i32> {
        match (op, self.medium(op.file())) {
            (_, Medium::Any) => None,
            (KernelOp::Read { .. } | KernelOp::Write { .. }, Medium::Memory) => self.if_short(op),
            // There is nothing to write back.
            (KernelOp::SyncData { .. }, Medium::Memory) => Some(0),
            (
                KernelOp::Write {
                    durability: Durability::Cached,
                    ..
                },
                Medium::WaitingWrites,
            ) => self.if_quick(op),
            // A long range takes its time, a flush waits for the medium, and cached reads never wait.
            _ => None,
        }
    }

    fn medium(&self, file: FileSlot) -> Medium {
        let slot = usize::try_from(file.0).ok();
        slot.and_then(|slot| self.media.get(slot))
            .copied()
            .unwrap_or_default()
    }

    fn if_short(&self, op: &KernelOp) -> Option<i32> {
        (op.transfer_bytes() <= TRANSFER_BYTES_MAX).then(|| plain::run(*op, &self.files))
    }

    fn if_quick(&mut self, op: &KernelOp) -> Option<i32> {
        if self.penance > 0 {
            self.penance -= 1;
            return None;
        }
        let begun = Instant::now();
        let result = self.if_short(op)?;
        if begun.elapsed() > QUICK_MAX {
            self.penance = PENANCE;
        }
        Some(result)
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn a_sync_of_memory_is_over_at_once_and_one_of_another_file_is_the_rings() {
        let memory = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let (pipe, _writer) = std::io::pipe().unwrap();
        let memory = ImageFile {
            fd: memory.as_raw_fd(),
            medium: Medium::of(&memory),
        };
        let mut inline = Inline::new(&[pipe.as_raw_fd().into(), memory]);
        let sync = |slot| KernelOp::SyncData { file: FileSlot(slot) };
        assert_eq!(inline.run(&sync(0)), None);
        assert_eq!(inline.run(&sync(1)), Some(0));
        assert_eq!((inline.run(&sync(2)), inline.run(&sync(1000))), (None, None));
    }
}
