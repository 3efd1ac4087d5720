//! The memory of an operation in flight.
#![expect(unsafe_code, reason = "reads and fills guest memory, as the kernel would")]

use crate::request::Segment;

/// The segments of an operation, as they were when it was submitted.
pub(super) struct Memory {
    list: *const Segment,
    segments: Vec<Segment>,
}

impl Memory {
    /// `segment_count` segments, which stay in place until the operation ends.
    pub(super) fn of(list: *const Segment, segment_count: u32) -> Self {
        let segments = listed(list, index(segment_count.into())).to_vec();
        Self { list, segments }
    }

    /// That of an operation that has none.
    pub(super) fn none() -> Self {
        Self {
            list: std::ptr::null(),
            segments: Vec::new(),
        }
    }

    pub(super) fn len_bytes(&self) -> usize {
        self.segments.iter().map(Segment::len_bytes).sum()
    }

    /// The bytes behind the first `skip_bytes`, at most `len_bytes` of them.
    pub(super) fn gather(&self, skip_bytes: usize, len_bytes: usize) -> Vec<u8> {
        self.check();
        let mut bytes = Vec::with_capacity(len_bytes);
        for (address, len_bytes) in self.pieces(skip_bytes, len_bytes) {
            // SAFETY: the memory of a segment stays valid until its operation ends (contract of
            // `Segment::new`), and simulated guests run on this thread.
            bytes.extend_from_slice(unsafe { std::slice::from_raw_parts(address, len_bytes) });
        }
        bytes
    }

    /// Fills what lies behind the first `skip_bytes` with `bytes`.
    pub(super) fn scatter(&self, skip_bytes: usize, mut bytes: &[u8]) {
        self.check();
        for (address, len_bytes) in self.pieces(skip_bytes, bytes.len()) {
            let (piece, rest) = bytes.split_at(len_bytes);
            bytes = rest;
            // SAFETY: as in `gather`; nobody holds a reference to the memory meanwhile.
            unsafe { std::ptr::copy_nonoverlapping(piece.as_ptr(), address, len_bytes) };
        }
    }

    /// The list of segments stays in place until the operation ends (contract of `KernelOp`).
    pub(super) fn check(&self) {
        if self.segments.is_empty() {
            return;
        }
        let same = |(now, then): (&Segment, &Segment)| {
            (now.address(), now.len_bytes()) == (then.address(), then.len_bytes())
        };
        let now = listed(self.list, self.segments.len());
        assert!(
            now.iter().zip(&self.segments).all(same),
            "the segments of an operation in flight were changed"
        );
    }

    /// The pieces of memory behind `skip`, of `left` bytes.
    fn pieces(&self, mut skip: usize, mut left: usize) -> impl Iterator<Item = (*mut u8, usize)> {
        self.segments.iter().filter_map(move |segment| {
            let skipped = skip.min(segment.len_bytes());
            skip -= skipped;
            let len_bytes = left.min(segment.len_bytes() - skipped);
            left -= len_bytes;
            (len_bytes > 0).then(|| (segment.address().wrapping_add(skipped), len_bytes))
        })
    }
}

fn listed<'op>(list: *const Segment, segment_count: usize) -> &'op [Segment] {
    if segment_count == 0 {
        return &[];
    }
    // SAFETY: `list` points to that many segments until the operation ends (contract of `KernelOp`).
    unsafe { std::slice::from_raw_parts(list, segment_count) }
}

fn index(bytes: u64) -> usize {
    usize::try_from(bytes).expect("this is a 64-bit monitor")
}
