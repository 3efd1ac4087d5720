//! The pages of one chunk of a memory file: what is summed, read and copied in at once.

use std::ops::Range;

use crate::snapshot::memory::{CHUNK_BYTES, PAGE_BYTES};

const _: () = assert!(CHUNK_BYTES == 16 * PAGE_BYTES, "a mask has one bit for each page");

/// A set of pages of one chunk: bit `n` is page `n`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pages(pub(super) u16);

impl Pages {
    /// Not one.
    pub(super) const NONE: Self = Self(0);

    /// Those that are not in the set.
    #[must_use]
    pub(super) fn others(self) -> Self {
        Self(!self.0)
    }

    /// How many bytes they have together.
    pub(super) fn bytes(self) -> usize {
        let pages = usize::try_from(self.0.count_ones()).expect("this is a 64-bit monitor");
        pages * PAGE_BYTES
    }

    /// Where they lie in the chunk, in bytes: each range as long as can be, in order.
    pub(super) fn runs(self) -> impl Iterator<Item = Range<usize>> {
        let mut left = self.0;
        std::iter::from_fn(move || {
            if left == 0 {
                return None;
            }
            let first = left.trailing_zeros();
            // What lies below the run is set as well, so that the run ends where the first zero is.
            let end = (left | left.wrapping_sub(1)).trailing_ones();
            left = u16::try_from(u32::from(left) >> end << end).expect("bits were only cleared");
            Some(byte(first)..byte(end))
        })
    }

    /// From the first to the last of them, in bytes of the chunk; empty if there is none.
    pub(super) fn span(self) -> Range<usize> {
        if self == Self::NONE {
            return 0..0;
        }
        byte(self.0.trailing_zeros())..byte(u16::BITS - self.0.leading_zeros())
    }
}

fn byte(page: u32) -> usize {
    usize::try_from(page).expect("this is a 64-bit monitor") * PAGE_BYTES
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn runs_are_the_pages_of_the_set_and_as_long_as_can_be(bits in any::<u16>()) {
            let mut seen = 0_u16;
            let mut end = None;
            for run in Pages(bits).runs() {
                prop_assert!(!run.is_empty() && run.end <= CHUNK_BYTES);
                prop_assert!(end.is_none_or(|end| end < run.start), "two runs are one");
                for page in run.start / PAGE_BYTES..run.end / PAGE_BYTES {
                    seen |= 1 << page;
                }
                end = Some(run.end);
            }
            prop_assert_eq!(seen, bits);
            let first = Pages(bits).runs().next().map_or(0, |run| run.start);
            prop_assert_eq!(Pages(bits).span(), first..end.unwrap_or(0));
        }
    }
}
