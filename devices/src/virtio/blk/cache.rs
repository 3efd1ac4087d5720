//! Whether a guest's writes may rest in a cache of the host: what the drive's `cache_type` says, and the guest's own
//! `writeback` switch (virtio 1.2, 5.2.5.2 and 5.2.6.2).

use std::sync::atomic::{AtomicBool, Ordering};

use coracle_storage::request::Durability;

use super::config::CacheType;
use super::space::{FEATURE_CONFIG_WCE, FEATURE_FLUSH};

/// The write cache of one disk, as the guest sees it.
#[derive(Debug)]
pub(super) struct WriteCache {
    cache_type: CacheType,
    /// The field of the configuration space.
    writeback: AtomicBool,
}

impl WriteCache {
    /// The cache as after a reset.
    pub(super) fn new(cache_type: CacheType) -> Self {
        Self {
            cache_type,
            writeback: AtomicBool::new(cache_type == CacheType::Writeback),
        }
    }

    /// What the drive was configured as.
    pub(super) fn cache_type(&self) -> CacheType {
        self.cache_type
    }

    /// The `writeback` field.
    pub(super) fn writeback(&self) -> bool {
        self.writeback.load(Ordering::SeqCst)
    }

    /// The driver writes the field. On a drive that is configured to be written through it stays off.
    pub(super) fn set_writeback(&self, on: bool) {
        if self.cache_type == CacheType::Writeback {
            self.writeback.store(on, Ordering::SeqCst);
        }
    }

    /// The driver has accepted `features`. One that can switch the cache but cannot flush it starts with the
    /// cache off (5.2.5.2).
    pub(super) fn agree(&self, features: u64) {
        if features & FEATURE_CONFIG_WCE != 0 && features & FEATURE_FLUSH == 0 {
            self.writeback.store(false, Ordering::SeqCst);
        }
    }

    /// The driver has reset the device.
    pub(super) fn reset(&self) {
        self.writeback
            .store(self.cache_type == CacheType::Writeback, Ordering::SeqCst);
    }

    /// When a write that is submitted now counts as done, for a driver with these `features`: a driver that accepted
    /// neither feature, though a flush was offered, takes each completed write for stable (5.2.6.2).
    #[inline]
    pub(super) fn durability(&self, features: u64) -> Durability {
        let cached = match self.cache_type {
            CacheType::Unsafe => true,
            CacheType::Writethrough => false,
            CacheType::Writeback if features & FEATURE_CONFIG_WCE != 0 => self.writeback(),
            CacheType::Writeback => features & FEATURE_FLUSH != 0,
        };
        if cached {
            Durability::Cached
        } else {
            Durability::Durable
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_is_durable_when_the_drive_or_the_guest_says_so_or_cannot_flush() {
        let both = FEATURE_CONFIG_WCE | FEATURE_FLUSH;
        for features in [0, FEATURE_FLUSH, FEATURE_CONFIG_WCE, both] {
            let of = |cache_type| WriteCache::new(cache_type).durability(features);
            assert_eq!(of(CacheType::Unsafe), Durability::Cached);
            assert_eq!(of(CacheType::Writethrough), Durability::Durable);
        }
        let cache = WriteCache::new(CacheType::Writeback);
        assert_eq!(cache.durability(0), Durability::Durable);
        assert_eq!(cache.durability(FEATURE_FLUSH), Durability::Cached);
        assert_eq!(cache.durability(both), Durability::Cached);
        cache.set_writeback(false);
        assert_eq!(cache.durability(both), Durability::Durable);
        cache.reset();
        assert_eq!(cache.durability(both), Durability::Cached);
    }

    #[test]
    fn a_driver_that_cannot_flush_starts_with_the_cache_off() {
        let cache = WriteCache::new(CacheType::Writeback);
        cache.agree(FEATURE_CONFIG_WCE);
        assert!(!cache.writeback());
        cache.reset();
        cache.agree(FEATURE_CONFIG_WCE | FEATURE_FLUSH);
        assert!(cache.writeback());
    }

    #[test]
    fn a_drive_that_is_written_through_cannot_be_switched() {
        let cache = WriteCache::new(CacheType::Writethrough);
        cache.set_writeback(true);
        assert!(!cache.writeback());
    }
}
