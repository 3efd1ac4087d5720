//! What keeps a second writer out: the storage's own means, which end with their owner.

pub(super) mod ofd;
