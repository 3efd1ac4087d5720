//! The layout and the arithmetic of a split virtqueue (virtio 1.2, section 2.7), without the memory.

/// Where the parts of a virtqueue of `size` entries lie in one piece of memory aligned to [`ALIGN_BYTES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Entries; a power of two.
    pub size: u16,
    /// Offset of the available ring; the descriptor table is at 0.
    pub avail_bytes: usize,
    /// Offset of the used ring.
    pub used_bytes: usize,
    /// Of all three.
    pub total_bytes: usize,
}

/// More than the 16 that a descriptor table needs: a queue starts a page of its own.
pub const ALIGN_BYTES: usize = 4096;
/// Bytes of a descriptor.
pub const DESCRIPTOR_BYTES: usize = 16;

impl Layout {
    /// The layout of a queue of `size` entries.
    #[must_use]
    pub const fn new(size: u16) -> Self {
        let entries = size as usize;
        let avail_bytes = DESCRIPTOR_BYTES * entries;
        // Flags, index, entries of two bytes, used_event.
        let avail_end = avail_bytes + 2 + 2 + 2 * entries + 2;
        let used_bytes = avail_end.next_multiple_of(4);
        // Flags, index, entries of eight bytes, avail_event.
        let total_bytes = used_bytes + 2 + 2 + 8 * entries + 2;
        Self {
            size,
            avail_bytes,
            used_bytes,
            total_bytes,
        }
    }
}

/// Whether moving an index from `old` to `new` passes `event`: the peer asked to be told (section 2.7.10).
#[must_use]
pub const fn passes(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_follow_each_other_with_the_alignment_of_the_specification() {
        for shift in 0..=15u32 {
            let layout = Layout::new(1 << shift);
            assert_eq!(layout.avail_bytes, 16 << shift);
            assert_eq!(layout.used_bytes % 4, 0);
            assert!(layout.used_bytes >= layout.avail_bytes + 6 + (2 << shift));
            assert_eq!(layout.total_bytes, layout.used_bytes + 6 + (8 << shift));
        }
    }

    #[test]
    fn an_event_is_passed_exactly_when_it_lies_in_the_step() {
        assert!(passes(5, 6, 5));
        assert!(!passes(6, 6, 5));
        assert!(!passes(4, 6, 5));
        assert!(passes(u16::MAX, 0, u16::MAX));
        assert!(passes(u16::MAX, 3, u16::MAX - 2));
        assert!(!passes(3, 3, 3));
    }
}
