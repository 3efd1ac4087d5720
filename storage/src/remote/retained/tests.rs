#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test's panic is its failure"
)]

use proptest::prelude::*;

use super::*;

fn keep(retained: &mut Retained, offset_bytes: u64, mut bytes: Vec<u8>) {
    retained.keep(offset_bytes, &[segments::own(&mut bytes)]);
}

/// What a medium of 64 bytes has after `rewrites`, in any order.
fn applied(rewrites: &[Rewrite]) -> Vec<Option<u8>> {
    let mut medium = vec![None; 64];
    for rewrite in rewrites {
        for at in 0..rewrite.len_bytes {
            let place = &mut medium[usize::try_from(rewrite.offset_bytes + at).unwrap()];
            assert_eq!(*place, None, "a byte is written twice");
            let byte = |bytes: &Arc<[u8]>| bytes[usize::try_from(at).unwrap()];
            *place = Some(rewrite.bytes.as_ref().map_or(0, byte));
        }
    }
    medium
}

#[derive(Clone, Debug)]
enum Step {
    Write(u64, Vec<u8>),
    Zero(u64, u64),
    /// A write that passes the cache by is sent, and later is acknowledged.
    Send,
    PastTheCache(u64, u64),
    /// A flush.
    Begin,
    End,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0_u64..50, prop::collection::vec(1_u8.., 1..14)).prop_map(|(at, bytes)| Step::Write(at, bytes)),
        1 => (0_u64..50, 1_u64..14).prop_map(|(at, len)| Step::Zero(at, len)),
        1 => Just(Step::Send),
        1 => (0_u64..50, 1_u64..14).prop_map(|(at, len)| Step::PastTheCache(at, len)),
        1 => Just(Step::Begin),
        1 => Just(Step::End),
    ]
}

proptest! {
    #[test]
    fn a_replay_writes_each_byte_that_may_be_forgotten_as_it_was_written_last(steps in prop::collection::vec(step(), 0..40)) {
        let mut retained = Retained::new(1 << 30);
        // What was written since the flush that was completed last began: when it was acknowledged, what it comes after, where
        // it is, and what.
        let mut log: Vec<(usize, usize, u64, Vec<Option<u8>>)> = Vec::new();
        let mut flush = None;
        let mut sent = None;
        for (time, step) in steps.into_iter().enumerate() {
            match step {
                Step::Write(at, bytes) => {
                    keep(&mut retained, at, bytes.clone());
                    log.push((time, time, at, bytes.into_iter().map(Some).collect()));
                }
                Step::Zero(at, len) => {
                    retained.keep_zeroes(at, len, Space::MayBeFreed);
                    log.push((time, time, at, vec![Some(0); usize::try_from(len).unwrap()]));
                }
                Step::Send => sent = Some((retained.now(), time)),
                Step::PastTheCache(at, len) => {
                    let (moment, since) = sent.take().unwrap_or((retained.now(), time));
                    retained.supersede(at, len, moment);
                    log.push((time, since, at, vec![None; usize::try_from(len).unwrap()]));
                }
                Step::Begin => flush = Some((retained.now(), time)),
                Step::End => if let Some((moment, begun)) = flush.take() {
                    retained.covered(moment);
                    log.retain(|(acknowledged, ..)| *acknowledged > begun);
                }
            }
        }
        log.sort_by_key(|(_, after, ..)| *after);
        let mut expected = vec![None; 64];
        for (_, _, at, bytes) in &log {
            for (place, byte) in expected[usize::try_from(*at).unwrap()..].iter_mut().zip(bytes) {
                *place = *byte;
            }
        }
        prop_assert_eq!(applied(&retained.replay()), expected);
        prop_assert!(retained.is_empty() || !log.is_empty());
    }
}

#[test]
fn what_was_acknowledged_while_a_write_passed_the_cache_by_is_replayed() {
    let mut retained = Retained::new(1 << 20);
    keep(&mut retained, 0, vec![1; 4]);
    let sent = retained.now();
    keep(&mut retained, 2, vec![2; 4]);
    retained.supersede(0, 8, sent);
    let medium = applied(&retained.replay());
    let expected = [None, None, Some(2), Some(2), Some(2), Some(2), None, None];
    assert_eq!(medium[..8], expected);
}

#[test]
fn memory_is_given_back_when_a_flush_has_covered_it() {
    let mut retained = Retained::new(4 << 20);
    for number in 0..3 {
        keep(&mut retained, number << 20, vec![7; 1 << 20]);
    }
    assert!(retained.is_filling());
    assert!(!retained.has_room(2 << 20));
    let moment = retained.now();
    keep(&mut retained, 9 << 20, vec![8; 512]);
    retained.covered(moment);
    assert_eq!(retained.bytes(), CHUNK_BYTES + size_of::<Entry>());
    let rewrites = retained.replay();
    assert_eq!((rewrites.len(), rewrites[0].offset_bytes), (1, 9 << 20));
    retained.covered(retained.now());
    assert_eq!((retained.bytes(), retained.is_empty()), (0, true));
}

#[test]
fn a_long_write_is_replayed_in_pieces() {
    let mut retained = Retained::new(4 << 20);
    keep(&mut retained, 4096, vec![1; (600 << 10) + 512]);
    let mut lengths: Vec<u64> = retained
        .replay()
        .iter()
        .map(|rewrite| rewrite.len_bytes)
        .collect();
    lengths.sort_unstable();
    assert_eq!(lengths, [(88 << 10) + 512, 256 << 10, 256 << 10]);
}

#[test]
fn zeros_without_end_take_room_too() {
    let mut retained = Retained::new(1 << 20);
    for _ in 0..(1 << 20) / size_of::<Entry>() {
        retained.keep_zeroes(0, 512, Space::MayBeFreed);
    }
    assert!(retained.is_filling());
    assert!(!retained.has_room(512));
}
