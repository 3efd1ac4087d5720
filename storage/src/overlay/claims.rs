//! Who is about to fill which clusters: two changes may not both copy the same cluster from the base.

use std::ops::Range;

/// The clusters that changes in flight will fill.
#[derive(Debug, Default)]
pub(super) struct Claims {
    // As many as there are such changes in flight: a search is shorter than a hash.
    spans: Vec<Range<u64>>,
}

impl Claims {
    /// Whether nobody has claimed any of `span`.
    pub(super) fn are_free(&self, span: &Range<u64>) -> bool {
        let disjoint = |claimed: &Range<u64>| claimed.end <= span.start || span.end <= claimed.start;
        self.spans.iter().all(disjoint)
    }

    /// Claims `span`, which is free.
    pub(super) fn take(&mut self, span: Range<u64>) {
        debug_assert!(self.are_free(&span), "a claim is taken when it is free");
        self.spans.push(span);
    }

    /// Gives a claim back.
    pub(super) fn release(&mut self, span: &Range<u64>) {
        let place = self.spans.iter().position(|claimed| claimed == span);
        self.spans
            .swap_remove(place.expect("a claim is released once, by who took it"));
    }
}
