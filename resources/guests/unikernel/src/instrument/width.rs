//! Conversions that lose nothing on the one architecture of the guest, or truncate by name.

/// A `u64` as a `usize`, which is the same on x86_64.
#[must_use]
#[expect(
    clippy::cast_possible_truncation,
    reason = "usize has 64 bits on x86_64, the only target"
)]
pub const fn size(value: u64) -> usize {
    value as usize
}

/// The low 32 bits.
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "the name says it")]
pub const fn low32(value: u64) -> u32 {
    value as u32
}

/// The low 16 bits.
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "the name says it")]
pub const fn low16(value: u64) -> u16 {
    value as u16
}

/// The low 8 bits.
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "the name says it")]
pub const fn low8(value: u64) -> u8 {
    value as u8
}
