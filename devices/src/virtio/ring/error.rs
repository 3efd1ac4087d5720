//! What can be wrong with a queue, its ring and its chains.

use super::{CHAIN_SEGMENTS_MAX, QUEUE_SIZE_MAX};

/// Why a queue could not be built.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// The size is no power of two or too large.
    #[error("a queue of {0} descriptors: the size must be a power of two from 1 to {QUEUE_SIZE_MAX}")]
    Size(u16),
    /// One of the three areas is not aligned or does not lie wholly inside one region of memory.
    #[error("the {area} at {address:#x} is not aligned or does not lie inside one region of guest memory")]
    Area {
        /// Which area.
        area: &'static str,
        /// Its guest address.
        address: u64,
    },
    /// A saved state has more chains in flight than the queue has descriptors.
    #[error("a queue of {size} descriptors cannot have taken {next_avail} and given back {next_used}")]
    Progress {
        /// Descriptors.
        size: u16,
        /// Chains taken, modulo 2^16.
        next_avail: u16,
        /// Chains given back, modulo 2^16.
        next_used: u16,
    },
}

/// Why no chain could be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PopError {
    /// The chain was taken off the ring but makes no sense: give it back with `push(head, 0)`, or ask for a reset.
    #[error("descriptor chain {head}: {fault}")]
    Malformed {
        /// The chain's first descriptor.
        head: u16,
        /// What is wrong with it.
        fault: ChainFault,
    },
    /// The ring's own positions make no sense; nothing more can be taken from it, ever.
    #[error(transparent)]
    Broken(RingFault),
}

/// What is wrong with a descriptor chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainFault {
    /// It has more descriptors than its table, so it loops, or too many for one request.
    #[error("it loops or has more than {CHAIN_SEGMENTS_MAX} pieces")]
    TooLong,
    /// Its pieces add up to more than 2^32 bytes (2.7.5.2).
    #[error("it is longer than 2^32 bytes")]
    TooLarge,
    /// A `next` points beyond the table.
    #[error("it goes on at descriptor {0}, beyond its table")]
    NextOutOfRange(u16),
    /// Something that the device reads comes after something that it writes (2.7.4.2).
    #[error("a readable descriptor follows a writable one")]
    ReadableAfterWritable,
    /// A piece does not lie in guest memory.
    #[error("guest address {0:#x} is not memory")]
    NotMemory(u64),
    /// An indirect descriptor where none is allowed: not negotiated, with NEXT, or inside an indirect table (2.7.5.3).
    #[error("an indirect descriptor where none is allowed")]
    IndirectNotAllowed,
    /// The indirect table is empty, too long, no multiple of 16 bytes, or not inside one region of memory.
    #[error("an indirect table of {len_bytes} bytes at {address:#x} cannot be read")]
    IndirectTable {
        /// Its guest address.
        address: u64,
        /// Its length.
        len_bytes: u32,
    },
}

/// What is wrong with a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingFault {
    /// More chains would be outstanding than there are descriptors.
    #[error(
        "the available index went from {from} to {to} in a queue of {size} with {in_flight} chains in flight"
    )]
    AvailIndex {
        /// Up to here chains were taken.
        from: u16,
        /// What the driver wrote.
        to: u16,
        /// Descriptors.
        size: u16,
        /// Chains taken and not given back.
        in_flight: u16,
    },
    /// The available ring names a descriptor that does not exist, which could not even be given back.
    #[error("the available ring names descriptor {head} in a queue of {size}")]
    Head {
        /// The descriptor named.
        head: u16,
        /// Descriptors.
        size: u16,
    },
}
