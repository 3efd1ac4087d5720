//! Pages made smaller on their way, where that pays: LZ4, in code without `unsafe`, which may read what a hostile source sends.
//!
//! Others pack closer (zstd); they are half a megabyte of C that would read it instead.

use std::time::{Duration, Instant};

use lz4_flex::block::{compress_into, decompress_into, get_maximum_output_size};

use crate::config::Compression;

/// Makes pages of one stream smaller.
#[derive(Debug)]
pub struct Packer {
    packed: Vec<u8>,
    when: When,
    futile: Futile,
}

#[derive(Debug)]
enum When {
    Never,
    Always,
    Measured(Measured),
}

/// What is packed has to become smaller than this part of it, or it is sent as it is: each byte that is not packed is one that
/// the target need not unpack.
const WORTH: (usize, usize) = (7, 8);

impl Packer {
    /// One that does as was asked.
    pub fn new(asked: Compression) -> Self {
        Self {
            packed: Vec::new(),
            when: match asked {
                Compression::None => When::Never,
                Compression::Lz4 => When::Always,
                Compression::Auto => When::Measured(Measured::default()),
            },
            futile: Futile::default(),
        }
    }

    /// A round begins: what was before it is no part of how fast it is.
    pub fn begin(&mut self, now: Instant) {
        if let When::Measured(measured) = &mut self.when {
            measured.begin(now);
        }
    }

    /// So many bytes were sent, packed or not.
    pub fn sent(&mut self, len_bytes: usize, now: Instant) {
        if let When::Measured(measured) = &mut self.when {
            measured.sent(len_bytes as u64, now);
        }
    }

    /// `bytes` packed, if they are to be sent so.
    pub fn pack(&mut self, bytes: &[u8]) -> Option<&[u8]> {
        let is_wanted = match &self.when {
            When::Never => false,
            When::Always => true,
            When::Measured(measured) => measured.packs,
        };
        if !is_wanted || self.futile.is_skipped() {
            return None;
        }
        let most = get_maximum_output_size(bytes.len());
        if self.packed.len() < most {
            self.packed.resize(most, 0);
        }
        let len_bytes = compress_into(bytes, &mut self.packed).expect("there is room for the worst");
        let is_worth_it = len_bytes < bytes.len() / WORTH.1 * WORTH.0;
        self.futile.tried(is_worth_it);
        self.packed.get(..len_bytes).filter(|_| is_worth_it)
    }
}

/// Why bytes cannot be unpacked.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("what is packed is not as long as it is said to be, or damaged")]
pub struct Damaged;

/// Unpacks `packed` into all of `bytes`, and no further.
///
/// # Errors
///
/// When that is not what comes out.
pub fn unpack(packed: &[u8], bytes: &mut [u8]) -> Result<(), Damaged> {
    match decompress_into(packed, bytes) {
        Ok(len_bytes) if len_bytes == bytes.len() => Ok(()),
        _ => Err(Damaged),
    }
}

/// How often it was tried in vain: memory that was packed or encrypted before lies together, and is not tried all the time.
#[derive(Debug, Default)]
struct Futile {
    in_vain: u32,
    skipped: u32,
}

/// Most that is sent as it is before it is tried again, as a power of two.
const SKIPPED_BITS_MAX: u32 = 4;

impl Futile {
    fn is_skipped(&mut self) -> bool {
        if self.skipped == 0 {
            return false;
        }
        self.skipped -= 1;
        true
    }

    fn tried(&mut self, is_worth_it: bool) {
        if is_worth_it {
            self.in_vain = 0;
        } else {
            self.skipped = (1 << self.in_vain) - 1;
            self.in_vain = (self.in_vain + 1).min(SKIPPED_BITS_MAX);
        }
    }
}

/// Which is faster, as it goes: the link takes what it takes, and the processor packs as fast as it packs; all that counts is how
/// much memory is gone in the end. So both ways are tried, and the better one is kept for a while.
///
/// ```text
///   plain, packed: a window each ──► the better one, for `hold` windows ──► a window of the other
///                                        ▲      twice as long as before ◄── still worse │ better: changes, and looks soon
///                                        └──────────────────────────────────────────────┘
/// ```
#[derive(Debug)]
struct Measured {
    packs: bool,
    /// Bytes of this window.
    bytes: u64,
    /// How long the part of it took that counts.
    took: Duration,
    /// When something was sent last.
    since: Option<Instant>,
    /// Bytes per second, plain and packed, when that was measured last.
    plain: Option<f64>,
    packed: Option<f64>,
    /// Windows until the other way is tried.
    left: u32,
    hold: u32,
}

/// Long enough that what waits in sockets is little of it,
const WINDOW_BYTES: u64 = 16 << 20;
/// and the first of it does not count, because it only fills them.
const WARM_UP_BYTES: u64 = 8 << 20;
const HOLD_MIN: u32 = 8;
const HOLD_MAX: u32 = 256;
/// So much faster it has to be: packing costs processor time at both sides.
const ADVANTAGE: f64 = 1.1;

impl Default for Measured {
    fn default() -> Self {
        Self {
            packs: false,
            bytes: 0,
            took: Duration::ZERO,
            since: None,
            plain: None,
            packed: None,
            left: 0,
            hold: HOLD_MIN,
        }
    }
}

impl Measured {
    fn begin(&mut self, now: Instant) {
        self.since = Some(now);
    }

    fn sent(&mut self, len_bytes: u64, now: Instant) {
        let since = self.since.replace(now).unwrap_or(now);
        if self.bytes >= WARM_UP_BYTES {
            self.took += now.saturating_duration_since(since);
        }
        self.bytes += len_bytes;
        if self.bytes >= WINDOW_BYTES {
            let counted = (self.bytes - WARM_UP_BYTES) as f64;
            self.measured(counted / self.took.as_secs_f64().max(1e-9));
            (self.bytes, self.took) = (0, Duration::ZERO);
        }
    }

    /// A window has gone so fast.
    fn measured(&mut self, bytes_per_s: f64) {
        *(if self.packs {
            &mut self.packed
        } else {
            &mut self.plain
        }) = Some(bytes_per_s);
        let (Some(plain), Some(packed)) = (self.plain, self.packed) else {
            self.packs = !self.packs;
            return;
        };
        if self.left > 0 {
            self.left -= 1;
            if self.left == 0 {
                self.packs = !self.packs;
            }
            return;
        }
        // The other way was tried.
        let is_better = packed > plain * ADVANTAGE;
        self.hold = if is_better == self.packs {
            HOLD_MIN
        } else {
            (self.hold * 2).min(HOLD_MAX)
        };
        (self.packs, self.left) = (is_better, self.hold);
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PIECE_BYTES: usize = 256 << 10;

    fn noise(len_bytes: usize) -> Vec<u8> {
        let mut state = 1_u64;
        std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            state.to_le_bytes()[7]
        })
        .take(len_bytes)
        .collect()
    }

    #[test]
    fn what_can_be_packed_is_and_comes_out_as_it_was() {
        let mut packer = Packer::new(Compression::Lz4);
        let text: Vec<u8> = b"a page of text, and "
            .iter()
            .copied()
            .cycle()
            .take(PIECE_BYTES)
            .collect();
        let packed = packer.pack(&text).unwrap().to_vec();
        assert!(packed.len() < PIECE_BYTES / 50);
        let mut back = vec![1; PIECE_BYTES];
        unpack(&packed, &mut back).unwrap();
        assert_eq!(back, text);
        assert_eq!(Packer::new(Compression::None).pack(&text), None);
    }

    #[test]
    fn what_does_not_fill_its_place_or_would_run_over_it_is_damaged() {
        let packed = Packer::new(Compression::Lz4)
            .pack(&[0; PIECE_BYTES])
            .unwrap()
            .to_vec();
        for len_bytes in [0, 4096, PIECE_BYTES - 1, PIECE_BYTES + 1] {
            assert_eq!(unpack(&packed, &mut vec![0; len_bytes]), Err(Damaged));
        }
        let (_, shorter) = packed.split_last().unwrap();
        assert_eq!(unpack(shorter, &mut vec![0; PIECE_BYTES]), Err(Damaged));
        assert_eq!(unpack(&[], &mut [0; 4096]), Err(Damaged));
    }

    proptest! {
        #[test]
        fn no_bytes_are_more_than_pages_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
            let _ = unpack(&bytes, &mut [0; 4096]);
        }
    }

    #[test]
    fn what_cannot_be_packed_is_tried_less_and_less_and_all_is_tried_again_when_something_can() {
        let mut packer = Packer::new(Compression::Lz4);
        let noise = noise(4096);
        for _ in 0..100 {
            assert_eq!(packer.pack(&noise), None);
        }
        let tries = (0..1 << SKIPPED_BITS_MAX).filter(|_| packer.pack(&[7; 4096]).is_some());
        assert!(tries.count() > 0);
        assert!(packer.pack(&[7; 4096]).is_some());
    }

    /// How much of the second half of a memory is packed on a link, and by a processor, that are so fast.
    fn share_packed(link_bytes_per_s: f64, packs_bytes_per_s: f64, ratio: f64) -> f64 {
        let mut measured = Measured::default();
        let mut now = Instant::now();
        measured.begin(now);
        let pieces = (4_usize << 30) / PIECE_BYTES;
        let mut packed = 0;
        for piece in 0..pieces {
            let bytes = PIECE_BYTES as f64;
            // One side waits for the other.
            let seconds = if measured.packs {
                (bytes * ratio / link_bytes_per_s).max(bytes / packs_bytes_per_s)
            } else {
                bytes / link_bytes_per_s
            };
            packed += usize::from(measured.packs && piece >= pieces / 2);
            now += Duration::from_secs_f64(seconds);
            measured.sent(PIECE_BYTES as u64, now);
        }
        packed as f64 / (pieces / 2) as f64
    }

    #[test]
    fn it_packs_where_the_link_is_slower_than_the_processor_and_there_only() {
        for ratio in [0.02, 0.3, 0.6] {
            assert!(share_packed(100e6, 500e6, ratio) > 0.9, "{ratio}");
            assert!(share_packed(2e9, 500e6, ratio) < 0.1, "{ratio}");
        }
        // Where it is as fast either way, processors have better things to do.
        assert!(share_packed(100e6, 500e6, 0.95) < 0.1);
    }

    #[test]
    fn a_link_that_becomes_slow_is_noticed() {
        let mut measured = Measured::default();
        for _ in 0..2000 {
            let speed = if measured.packs { 4e8 } else { 1e9 };
            measured.measured(speed);
        }
        assert!(!measured.packs);
        for _ in 0..2 * HOLD_MAX {
            let speed = if measured.packs { 4e8 } else { 1e8 };
            measured.measured(speed);
        }
        assert!(measured.packs);
    }
}
