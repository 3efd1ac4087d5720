//! What a snapshot remembers of an image, and whether it may be gone on with.

use crate::lane::Lane;

/// What is remembered, and what has happened since.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Memory {
    pub(crate) generation: u64,
    since: Since,
}

#[derive(Clone, Copy, Debug)]
enum Since {
    Nothing,
    Raised,
    /// Whoever was raising it was gone before it was known.
    Unknown,
}

impl Memory {
    /// Of an image as it is now.
    pub(crate) fn of(lane: &Lane) -> Self {
        Self {
            generation: lane.generation(),
            since: Since::Nothing,
        }
    }

    /// The generation may be raised from now on.
    pub(crate) fn fades(&mut self) {
        self.since = Since::Unknown;
    }

    /// It has been.
    pub(crate) fn is_overtaken(&mut self, lane: &Lane) {
        assert_eq!(lane.generation(), self.generation + 1, "it is raised by one");
        self.since = Since::Raised;
    }

    /// Panics if an image may not be gone on with, as it is by `lane`.
    pub(crate) fn was_kept(&self, lane: &Lane) {
        assert!(
            !matches!(self.since, Since::Raised),
            "an image that was raised is gone on with: {self:?}"
        );
        assert_eq!(lane.generation(), self.generation, "the generation is kept");
    }

    /// Panics if it may, and somebody was refused.
    pub(crate) fn was_refused(&self) {
        assert!(
            !matches!(self.since, Since::Nothing),
            "an image as it is remembered was refused: {self:?}"
        );
    }
}
