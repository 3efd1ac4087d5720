//! An overlay on a kernel that reorders, shortens and interrupts operations, and whose power is cut.

#![expect(unsafe_code, reason = "segments point into the test's own buffers")]

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;

const SECTOR: u64 = 512;
const SECTORS: u64 = 19 * 8 + 3;
const IMAGE_BYTES: u64 = SECTORS * SECTOR;

type Sector = [u8; 512];

/// Numbers that follow from a seed.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// A disk with a volatile cache: what was not synced may or may not survive, sector by sector.
struct Kernel {
    base: HashMap<u64, Sector>,
    medium: HashMap<u64, Sector>,
    /// In the order in which they were made.
    cached: Vec<(u64, Sector)>,
    /// Each with how much of the cache a sync covers.
    ops: Vec<(KernelOp, Token, usize)>,
    random: Random,
}

impl Submit for Kernel {
    fn submit(&mut self, op: KernelOp, token: Token) -> Result<(), Full> {
        // Few, so that the overlay meets a full reactor.
        if self.ops.len() >= 6 {
            return Err(Full);
        }
        self.ops.push((op, token, self.cached.len()));
        Ok(())
    }
}

impl Kernel {
    fn new(seed: u64) -> Self {
        Self {
            base: (0..SECTORS).map(|sector| (sector, [255; 512])).collect(),
            medium: HashMap::new(),
            cached: Vec::new(),
            ops: Vec::new(),
            random: Random(seed | 1),
        }
    }

    /// Ends any operation that is in flight, one way or another.
    fn end_one(&mut self) -> Event {
        let chosen = self.random.below(self.ops.len() as u64);
        let (op, token, covered) = self.ops.swap_remove(chosen.try_into().unwrap());
        let result = if self.random.below(10) == 0 {
            -libc::EINTR
        } else {
            self.carry_out(op, covered)
        };
        Event { token, result }
    }

    fn carry_out(&mut self, op: KernelOp, covered: usize) -> i32 {
        match op {
            KernelOp::Socket { .. } => panic!("a file has no sockets"),
            KernelOp::SyncData { .. } => {
                self.sync(covered);
                0
            }
            KernelOp::Allocate {
                offset_bytes,
                len_bytes,
                ..
            } => {
                for sector in offset_bytes / SECTOR..(offset_bytes + len_bytes) / SECTOR {
                    self.cached.push((sector, [0; 512]));
                }
                0
            }
            KernelOp::Read {
                file,
                segments,
                segment_count,
                offset_bytes,
            } => self.transfer(segments, segment_count, |kernel, sector, bytes| {
                bytes.copy_from_slice(&kernel.sector(file, offset_bytes / SECTOR + sector));
            }),
            KernelOp::Write {
                segments,
                segment_count,
                offset_bytes,
                durability,
                ..
            } => {
                let before = self.cached.len();
                let done = self.transfer(segments, segment_count, |kernel, sector, bytes| {
                    let value = (*bytes).try_into().unwrap();
                    kernel.cached.push((offset_bytes / SECTOR + sector, value));
                });
                if durability == Durability::Durable {
                    // These alone, as RWF_DSYNC has it; what older writes of the same sectors said is gone.
                    for (sector, value) in self.cached.split_off(before) {
                        self.cached.retain(|(older, _)| *older != sector);
                        self.medium.insert(sector, value);
                    }
                    // Syncs that are in flight cover no more than there is.
                    let left = self.cached.len();
                    self.ops
                        .iter_mut()
                        .for_each(|(_, _, covered)| *covered = left.min(*covered));
                }
                done
            }
        }
    }

    /// Goes through as many sectors of the memory as it likes, at least one.
    fn transfer(
        &mut self,
        segments: *const Segment,
        segment_count: u32,
        mut each: impl FnMut(&mut Self, u64, &mut &mut [u8]),
    ) -> i32 {
        // SAFETY: the request that owns the segments is in flight.
        let segments = unsafe { std::slice::from_raw_parts(segments, segment_count.try_into().unwrap()) };
        let whole = len_of(segments.as_ptr(), segment_count) / SECTOR;
        let limit = match self.random.below(4) {
            0 => 1 + self.random.below(whole),
            _ => whole,
        };
        let mut done = 0;
        for segment in segments {
            // SAFETY: as above, and nobody else looks at the memory meanwhile.
            let memory = unsafe { std::slice::from_raw_parts_mut(segment.address(), segment.len_bytes()) };
            for mut bytes in memory.chunks_mut(512) {
                if done == limit {
                    break;
                }
                each(self, done, &mut bytes);
                done += 1;
            }
        }
        i32::try_from(done * SECTOR).unwrap()
    }

    fn sector(&self, file: FileSlot, sector: u64) -> Sector {
        if file == BASE {
            return self.base.get(&sector).copied().unwrap();
        }
        let cached = self.cached.iter().rev().find(|(cached, _)| *cached == sector);
        let value = cached.map(|(_, value)| *value);
        value
            .or_else(|| self.medium.get(&sector).copied())
            .unwrap_or([0; 512])
    }

    /// Puts the first `count` cached writes on the medium.
    fn sync(&mut self, count: usize) {
        for (sector, value) in self.cached.drain(..count) {
            self.medium.insert(sector, value);
        }
        for (_, _, covered) in &mut self.ops {
            *covered = covered.saturating_sub(count);
        }
    }

    /// Cuts the power: of each sector some version survives that is not older than the last sync.
    fn crash(&mut self) {
        self.ops.clear();
        for (sector, value) in std::mem::take(&mut self.cached) {
            if self.random.below(2) == 0 {
                self.medium.insert(sector, value);
            }
        }
    }

    fn mount(&self) -> Overlay {
        let bits = self.sector(STORE, BITMAP_OFFSET_BYTES / SECTOR);
        overlay_of(IMAGE_BYTES, &bits, Lifetime::Kept)
    }
}

/// What a guest does: a range in sectors.
#[derive(Clone, Debug)]
struct Act {
    operation: Operation,
    first: u64,
    count: u64,
    durability: Durability,
}

fn act() -> impl Strategy<Value = Act> {
    let operation = prop_oneof![
        4 => Just(Operation::Write),
        1 => Just(Operation::Read),
        1 => Just(Operation::Discard),
        1 => Just(Operation::WriteZeroes { space: Space::MayBeFreed }),
        2 => Just(Operation::Flush),
    ];
    let durability = prop_oneof![3 => Just(Durability::Cached), 1 => Just(Durability::Durable)];
    (operation, 0..SECTORS, 1..40_u64, durability).prop_map(|(operation, first, count, durability)| Act {
        operation,
        first,
        count: if operation == Operation::Flush {
            0
        } else {
            count.min(SECTORS - first)
        },
        durability,
    })
}

/// What each sector may hold: the last value is what it holds now, one of the others if the power is cut.
struct Model(Vec<Vec<u8>>);

impl Model {
    fn sectors(&mut self, act: &Act) -> &mut [Vec<u8>] {
        let first = usize::try_from(act.first).unwrap();
        self.0
            .get_mut(first..first + usize::try_from(act.count).unwrap())
            .unwrap()
    }

    /// A discard has no meaning for the guest; what it reads as is either.
    fn began(&mut self, act: &Act, fill: u8) {
        let value = if act.operation == Operation::Write {
            fill
        } else {
            0
        };
        match act.operation {
            Operation::Write | Operation::WriteZeroes { .. } => {
                self.sectors(act).iter_mut().for_each(|sector| sector.push(value));
            }
            Operation::Discard => {
                // Whole clusters; the last one is whole although it is short.
                let end = match act.first + act.count {
                    SECTORS => SECTORS,
                    end => end / 8 * 8,
                };
                let first = act.first.next_multiple_of(8);
                if first < end {
                    let whole = Act {
                        first,
                        count: end - first,
                        ..act.clone()
                    };
                    self.sectors(&whole).iter_mut().for_each(|sector| sector.push(0));
                }
            }
            _ => {}
        }
    }

    /// After a flush or a durable change older values cannot come back. `new` says how many of a sector's
    /// values the batch has brought: its flushes do not cover those.
    fn ended(&mut self, act: &Act, new: &[usize]) {
        match act.operation {
            Operation::Flush => {
                for (sector, new) in self.0.iter_mut().zip(new) {
                    sector.drain(..sector.len().saturating_sub(new + 1));
                }
            }
            Operation::Write | Operation::WriteZeroes { .. } if act.durability == Durability::Durable => {
                for sector in self.sectors(act) {
                    sector.drain(..sector.len() - 1);
                }
            }
            _ => {}
        }
    }
}

/// A request of `act` whose memory is `memory`.
fn asked(tag: usize, act: &Act, memory: &mut [u8]) -> Request {
    let mut segments = Vec::new();
    if matches!(act.operation, Operation::Read | Operation::Write) {
        let address = NonNull::new(memory.as_mut_ptr()).unwrap();
        // SAFETY: callers keep the memory until the request, or its kernel, is over.
        segments.push(unsafe { Segment::new(address, memory.len()) });
    }
    Request {
        tag: tag as u64,
        operation: act.operation,
        offset_bytes: act.first * SECTOR,
        len_bytes: act.count * SECTOR,
        durability: act.durability,
        segments,
    }
}

/// Runs `acts` at once, as far as there is room; stops in the middle when `steps` are over. Says whether it ended.
fn serve(
    overlay: &mut Overlay,
    kernel: &mut Kernel,
    model: &mut Model,
    acts: &[Act],
    fill: &mut u8,
    steps: &mut u64,
) -> bool {
    let mut memories = Vec::new();
    for act in acts {
        *fill = *fill % 250 + 1;
        memories.push((*fill, vec![*fill; (act.count * SECTOR).try_into().unwrap()]));
    }
    let mut over = vec![false; acts.len()];
    let mut left = acts.len();
    // A flush covers what had completed when it began: nothing of its own batch.
    let before: Vec<usize> = model.0.iter().map(Vec::len).collect();
    let mut waiting = VecDeque::new();
    for (number, (act, (fill, memory))) in acts.iter().zip(&mut memories).enumerate() {
        model.began(act, *fill);
        waiting.push_back(asked(number, act, memory));
    }
    let new: Vec<usize> = model
        .0
        .iter()
        .zip(before)
        .map(|(sector, before)| sector.len() - before)
        .collect();
    let mut ended = |model: &mut Model, completion: Completion| {
        assert_eq!(completion.outcome, Ok(()));
        let number = usize::try_from(completion.request.tag).unwrap();
        let act = acts.get(number).unwrap();
        let is_second = std::mem::replace(over.get_mut(number).unwrap(), true);
        assert!(!is_second, "a request completes once");
        model.ended(act, &new);
    };
    while left > 0 {
        while let Some(request) = waiting.pop_front() {
            match overlay.start(request, kernel) {
                Step::Pending => {}
                Step::Done(completion) => {
                    ended(model, completion);
                    left -= 1;
                }
                Step::Busy(request) => {
                    waiting.push_front(request);
                    break;
                }
            }
        }
        while let Some(completion) = overlay.next_completion() {
            ended(model, completion);
            left -= 1;
        }
        if left == 0 {
            break;
        }
        if *steps == 0 {
            return false;
        }
        *steps -= 1;
        assert!(!kernel.ops.is_empty(), "{left} requests wait for nothing");
        let event = kernel.end_one();
        if let Step::Done(completion) = overlay.resume(event, kernel) {
            ended(model, completion);
            left -= 1;
        }
    }
    assert_eq!((overlay.in_flight(), kernel.ops.len()), (0, 0));
    true
}

/// The first byte of each sector, all of which have to be alike.
fn content(overlay: &mut Overlay, kernel: &mut Kernel) -> Vec<u8> {
    let all = Act {
        operation: Operation::Read,
        first: 0,
        count: SECTORS,
        durability: Durability::Cached,
    };
    let mut memory = vec![0; IMAGE_BYTES.try_into().unwrap()];
    let mut step = overlay.start(asked(0, &all, &mut memory), kernel);
    while matches!(step, Step::Pending) {
        let event = kernel.end_one();
        step = overlay.resume(event, kernel);
    }
    let sectors = memory.chunks(512).map(|sector| {
        let first = *sector.first().unwrap();
        assert!(sector.iter().all(|byte| *byte == first), "a sector is torn");
        first
    });
    sectors.collect()
}

/// As many of the first acts as do not touch each other.
fn batch(acts: &[Act]) -> usize {
    let overlap =
        |one: &Act, other: &Act| one.first < other.first + other.count && other.first < one.first + one.count;
    (1..=acts.len())
        .take_while(|count| {
            let (last, before) = acts.get(..*count).and_then(<[Act]>::split_last).unwrap();
            before.iter().all(|act| !overlap(act, last))
        })
        .last()
        .unwrap_or_default()
}

proptest! {
    #[test]
    fn nothing_that_was_flushed_is_lost_and_nothing_appears_that_was_never_there(
        acts in prop::collection::vec(act(), 1..60),
        seed in any::<u64>(),
        steps in 0..200_u64,
    ) {
        let mut kernel = Kernel::new(seed);
        let mut model = Model(vec![vec![255]; SECTORS.try_into().unwrap()]);
        let (mut fill, mut left, mut steps) = (0, acts.as_slice(), steps);
        // The power is cut twice: what a crash left behind must not harm the next life.
        for _ in 0..2 {
            let mut overlay = kernel.mount();
            while !left.is_empty() {
                let (now, later) = left.split_at(batch(left));
                left = later;
                if !serve(&mut overlay, &mut kernel, &mut model, now, &mut fill, &mut steps) {
                    break;
                }
                let seen = content(&mut overlay, &mut kernel);
                for (sector, (seen, may)) in seen.iter().zip(&model.0).enumerate() {
                    prop_assert_eq!(Some(seen), may.last(), "sector {}", sector);
                }
            }
            // What was in flight is not carried out any more, so its memory may go.
            kernel.crash();
            drop(overlay);
            let seen = content(&mut kernel.mount(), &mut kernel);
            for (sector, (seen, may)) in seen.iter().zip(&mut model.0).enumerate() {
                prop_assert!(may.contains(seen), "sector {} holds {}, may hold {:?}", sector, seen, may);
                *may = vec![*seen];
            }
            steps = 200;
        }
    }
}
