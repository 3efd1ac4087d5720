//! The device's features and its configuration space (virtio 1.2, 5.2.3 and 5.2.4).

use coracle_storage::backend::{Access, Geometry};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

use super::cache::WriteCache;
use super::config::CacheType;
use super::device::QUEUE_SIZE_MAX;
use super::request::SECTOR_BYTES;
use crate::virtio::ring::{FEATURE_EVENT_IDX, FEATURE_INDIRECT_DESC};

/// DISCARD, as a bit of the feature word.
pub(super) const FEATURE_DISCARD: u64 = 1 << VIRTIO_BLK_F_DISCARD;
/// WRITE ZEROES, as a bit of the feature word.
pub(super) const FEATURE_WRITE_ZEROES: u64 = 1 << VIRTIO_BLK_F_WRITE_ZEROES;
/// FLUSH, as a bit of the feature word.
pub(super) const FEATURE_FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;
/// The guest's switch of the write cache, as a bit of the feature word.
pub(super) const FEATURE_CONFIG_WCE: u64 = 1 << VIRTIO_BLK_F_CONFIG_WCE;
/// Several queues, as a bit of the feature word.
pub(super) const FEATURE_MQ: u64 = 1 << VIRTIO_BLK_F_MQ;
/// Read-only, as a bit of the feature word.
pub(super) const FEATURE_RO: u64 = 1 << VIRTIO_BLK_F_RO;

/// The longest range of one DISCARD or WRITE ZEROES, in sectors: 1 GiB, so that none runs for long.
const RANGE_SECTORS_MAX: u32 = 1 << 21;
/// Ranges in one DISCARD or WRITE ZEROES.
pub(super) const RANGES_MAX: u32 = 1;
/// Segments of one request: what a chain has beside its header and its status byte.
const SEGMENTS_MAX: u32 = QUEUE_SIZE_MAX as u32 - 2;

/// The longest segment, in bytes: far beyond what a driver makes, and within what a chain may hold.
const SEGMENT_BYTES_MAX: u32 = 1 << 30;

/// What is offered for an image of this access, by a device with so many queues.
pub(super) fn features(access: Access, cache_type: CacheType, queues: u16) -> u64 {
    let always = 1 << VIRTIO_F_VERSION_1
        | FEATURE_EVENT_IDX
        | FEATURE_INDIRECT_DESC
        | 1 << VIRTIO_BLK_F_SIZE_MAX
        | 1 << VIRTIO_BLK_F_SEG_MAX
        | 1 << VIRTIO_BLK_F_BLK_SIZE
        | 1 << VIRTIO_BLK_F_TOPOLOGY;
    let by_access = match access {
        Access::ReadOnly => FEATURE_RO,
        Access::ReadWrite => FEATURE_DISCARD | FEATURE_WRITE_ZEROES,
    };
    let by_cache = match cache_type {
        CacheType::Unsafe => 0,
        CacheType::Writeback | CacheType::Writethrough => FEATURE_FLUSH | FEATURE_CONFIG_WCE,
    };
    let by_queues = if queues > 1 { FEATURE_MQ } else { 0 };
    always | by_access | by_cache | by_queues
}

/// Bytes of `struct virtio_blk_config` up to `write_zeroes_may_unmap` and its padding.
const SPACE_BYTES: usize = 60;
/// Where the one field is that the driver may write.
pub(super) const WRITEBACK: u64 = 32;

/// The whole space for an image of this shape; fields of features that are not offered stay zero.
pub(super) fn space(geometry: &Geometry, cache: &WriteCache, queues: u16) -> [u8; SPACE_BYTES] {
    let mut space = [0; SPACE_BYTES];
    let mut put = |offset: usize, bytes: &[u8]| {
        let field = space.get_mut(offset..offset + bytes.len());
        field
            .expect("every field lies within the space")
            .copy_from_slice(bytes);
    };
    put(0, &(geometry.size_bytes / SECTOR_BYTES).to_le_bytes()); // capacity
    put(8, &SEGMENT_BYTES_MAX.to_le_bytes()); // size_max
    put(12, &SEGMENTS_MAX.to_le_bytes()); // seg_max
    put(20, &geometry.logical_block_bytes.to_le_bytes()); // blk_size
    put(24, &[physical_block_exponent(geometry)]); // topology.physical_block_exp
    put(26, &1_u16.to_le_bytes()); // topology.min_io_size, in logical blocks
    if cache.cache_type() != CacheType::Unsafe {
        put(32, &[u8::from(cache.writeback())]); // writeback
    }
    if queues > 1 {
        put(34, &queues.to_le_bytes()); // num_queues
    }
    if geometry.access == Access::ReadWrite {
        let alignment_sectors = geometry.physical_block_bytes / 512;
        put(36, &RANGE_SECTORS_MAX.to_le_bytes()); // max_discard_sectors
        put(40, &RANGES_MAX.to_le_bytes()); // max_discard_seg
        put(44, &alignment_sectors.to_le_bytes()); // discard_sector_alignment
        put(48, &RANGE_SECTORS_MAX.to_le_bytes()); // max_write_zeroes_sectors
        put(52, &RANGES_MAX.to_le_bytes()); // max_write_zeroes_seg
        put(56, &[1]); // write_zeroes_may_unmap
    }
    space
}

/// How many times the logical block doubles to make a physical one.
fn physical_block_exponent(geometry: &Geometry) -> u8 {
    let ratio = geometry.physical_block_bytes / geometry.logical_block_bytes;
    u8::try_from(ratio.max(1).ilog2()).expect("a logarithm of 32 bits fits eight")
}

#[cfg(test)]
mod tests {
    use super::*;
    use coracle_storage::backend::Discard;

    const GEOMETRY: Geometry = Geometry {
        size_bytes: 3 * 512,
        logical_block_bytes: 512,
        physical_block_bytes: 4096,
        access: Access::ReadWrite,
        discard: Discard::Supported,
    };

    #[test]
    fn the_space_tells_capacity_and_topology() {
        let space = space(&GEOMETRY, &WriteCache::new(CacheType::Writeback), 4);
        assert_eq!(space[0..8], 3_u64.to_le_bytes());
        assert_eq!(space[20..24], 512_u32.to_le_bytes());
        assert_eq!(space[24], 3);
        assert_eq!(space[32], 1);
        assert_eq!(space[34..36], 4_u16.to_le_bytes());
        assert_eq!(space[44..48], 8_u32.to_le_bytes());
    }

    #[test]
    fn a_read_only_disk_offers_no_change_and_an_unsafe_one_no_flush() {
        let read_only = features(Access::ReadOnly, CacheType::Writeback, 1);
        assert_eq!(
            read_only & (FEATURE_RO | FEATURE_FLUSH),
            FEATURE_RO | FEATURE_FLUSH
        );
        assert_eq!(read_only & (FEATURE_DISCARD | FEATURE_WRITE_ZEROES), 0);
        assert_eq!(
            features(Access::ReadWrite, CacheType::Unsafe, 1) & (FEATURE_RO | FEATURE_FLUSH),
            0
        );
    }
}
