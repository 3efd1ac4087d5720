//! The vocabulary between a device and an image: requests, completions and their errors.
#![expect(unsafe_code, reason = "a segment promises that memory outlives its request")]

use std::ops::Range;
use std::ptr::NonNull;

/// What a guest asked of its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Fills the segments from the image.
    Read,
    /// Writes the segments to the image.
    Write,
    /// Completes when every write that completed before is on the medium.
    Flush,
    /// Frees a range; what it reads as afterwards is not defined (virtio 1.2, 5.2.6.2).
    Discard,
    /// Makes a range read as zeros.
    WriteZeroes {
        /// Whether the range may be deallocated, or must stay allocated.
        space: Space,
    },
    /// Raises the generation of the image's lease, durably; nothing else is in flight. Only an image of a network has a lease
    /// of its own, others are done at once: the host's records are raised by [`crate::open::Hold::begin_raise`].
    Raise,
    /// Takes the fence of the image's lease down, with everything on the medium: another owner may take the image over. It ends
    /// when the fence is down, which it stays until [`Self::TakeBack`]. Only an image of a network has a fence of its own; that
    /// of others is the host's ([`crate::open::Hold::yield_fence`]).
    Yield,
    /// Puts the fence up again after a [`Self::Yield`], by the step of the lease that [`crate::open::Hold::take_back`] has made.
    /// It ends when it is up: that waits for whoever has the image meanwhile. Done at once where the fence is up.
    TakeBack,
    /// Makes the image `len_bytes` long, which is no less than it is; what is new reads as zeros. `offset_bytes` is 0.
    Grow,
    /// Narrows the range of the request to the first part of it that may hold something else than zeros; one that is empty, at
    /// the end, if there is none. What lies before reads as zeros. An image that cannot tell leaves the range as it is.
    FindData,
}

impl Operation {
    /// What becomes of the space of what it zeroes.
    pub(crate) fn space(self) -> Space {
        match self {
            Self::WriteZeroes { space } => space,
            _ => Space::MayBeFreed,
        }
    }
}

/// When a change of the image counts as done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// When the host's page cache, or the cache of a server, has it: a flush makes it last.
    Cached,
    /// When the medium has it.
    Durable,
}

/// What a WRITE ZEROES may do with the space of its range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// The image may give the space back (VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP).
    MayBeFreed,
    /// The space stays reserved.
    Stays,
}

/// One piece of guest memory that a request reads or fills; laid out as a `struct iovec`.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub struct Segment(libc::iovec);

// SAFETY: a segment is an address and a length; whoever made it has promised (see `new`) that the
// memory stays valid until its request completes, on whichever thread that happens.
unsafe impl Send for Segment {}

impl Segment {
    /// A segment of `len_bytes` at `address`.
    ///
    /// # Safety
    ///
    /// The range must stay mapped, readable and writable until the request that carries the segment has completed.
    pub unsafe fn new(address: NonNull<u8>, len_bytes: usize) -> Self {
        Self(libc::iovec {
            iov_base: address.as_ptr().cast(),
            iov_len: len_bytes,
        })
    }

    /// Where the segment starts in this process.
    pub fn address(&self) -> *mut u8 {
        self.0.iov_base.cast()
    }

    /// Drops the first `bytes` of the segment.
    ///
    /// # Panics
    ///
    /// When it is shorter than that.
    pub fn advance(&mut self, bytes: usize) {
        assert!(bytes <= self.0.iov_len, "a segment cannot shrink below nothing");
        self.0.iov_base = self.0.iov_base.wrapping_byte_add(bytes);
        self.0.iov_len -= bytes;
    }

    /// Keeps the first `at_bytes` of the segment and returns the rest.
    ///
    /// # Panics
    ///
    /// When it is shorter than that.
    #[must_use]
    pub fn split_off(&mut self, at_bytes: usize) -> Self {
        let mut rest = *self;
        rest.advance(at_bytes);
        self.0.iov_len = at_bytes;
        rest
    }

    /// How long the segment is, in bytes.
    pub fn len_bytes(&self) -> usize {
        self.0.iov_len
    }
}

/// Drops the first `bytes` of `segments`, and every segment that is empty then.
///
/// # Panics
///
/// When they have fewer.
pub fn cut_first_bytes(segments: &mut Vec<Segment>, mut bytes: usize) {
    let mut whole = 0;
    for segment in segments.iter_mut() {
        let cut_bytes = bytes.min(segment.len_bytes());
        segment.advance(cut_bytes);
        bytes -= cut_bytes;
        if segment.len_bytes() > 0 {
            break;
        }
        whole += 1;
    }
    assert!(bytes == 0, "segments end before what is cut off them");
    segments.drain(..whole);
}

/// One request; it travels to the backend and comes back in its [`Completion`], so that the
/// vector of segments is used again instead of allocated again.
#[derive(Debug)]
pub struct Request {
    /// The caller's own number for it; not looked at by a backend.
    pub tag: u64,
    /// What to do.
    pub operation: Operation,
    /// Where in the image, in bytes.
    pub offset_bytes: u64,
    /// How much, in bytes; for reads and writes the sum of the segments.
    pub len_bytes: u64,
    /// When it is done; looked at for a write, a discard and a write-zeroes.
    pub durability: Durability,
    /// The guest's memory; empty unless the operation is a read or a write.
    pub segments: Vec<Segment>,
}

impl Request {
    /// What it is about.
    pub(crate) fn range(&self) -> Range<u64> {
        self.offset_bytes..self.offset_bytes + self.len_bytes
    }

    /// Makes it one about a part of its range.
    pub(crate) fn narrow(&mut self, part: &Range<u64>) {
        let whole = self.range();
        assert!(
            whole.start <= part.start && part.start <= part.end && part.end <= whole.end,
            "a part lies within the whole"
        );
        (self.offset_bytes, self.len_bytes) = (part.start, part.end - part.start);
    }
}

/// The end of a request: sent exactly once for every request that was accepted.
#[derive(Debug)]
pub struct Completion {
    /// The request, given back.
    pub request: Request,
    /// What became of it.
    pub outcome: Result<(), Failure>,
}

/// Why the storage refused or failed a request; the device maps it to the guest's status byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The image lies behind something that answered with an error (EIO, ENOSPC, EBADF …).
    #[error("the host's storage answered: {}", std::io::Error::from_raw_os_error(*.0))]
    Host(i32),
    /// The image cannot do this operation at all.
    #[error("this image does not support the operation")]
    Unsupported,
    /// The range does not lie within the image.
    #[error("the range does not lie within the image")]
    OutOfRange,
    /// The image was opened read-only.
    #[error("the image is read-only")]
    ReadOnly,
    /// The image cannot become as long as it was asked to.
    #[error("this image cannot become larger than {bytes_max} bytes")]
    TooLarge {
        /// As long as it can become.
        bytes_max: u64,
    },
    /// The image ended in the middle of a read: it was truncated under us.
    #[error("the image is shorter than it was when it was opened")]
    Truncated,
}
