//! A snapshot that was changed anywhere is refused, or its guest gets what was saved nevertheless: every bit of a state one by
//! one, and files that were cut, lengthened, overwritten and mixed up.
//!
//! `MUTATIONS` says how many files are tried (`make soak`: 100,000), `SEED` which.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test's panic is its failure"
)]

use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use tempfile::NamedTempFile;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::*;
use crate::keys::ReadingKeys;
use crate::memory::testing::{Dice, owner};
use crate::snapshot::load::{Snapshot, StateFile};
use crate::snapshot::memory::{CHUNK_BYTES, PAGE_BYTES};
use crate::state::State;

/// How many files are tried where nobody says.
const SAMPLE: u64 = 2_000;
/// One in so many memory files is loaded by a pager: what a pager could not load stays guarded until the process ends.
const BY_PAGER: u64 = 100;
/// No checksum of a part of a section, and no name, is within so many bytes of its beginning.
const SECTION_HEADER_BYTES: usize = 64;

/// A snapshot that a real machine has left.
struct Good {
    state: Vec<u8>,
    memory: Vec<u8>,
    parsed: Snapshot,
}

impl Good {
    fn read() -> Self {
        let kept = Path::new(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../tests/golden/snapshot/format-1"
        ));
        let state = std::fs::read(kept.join("state")).unwrap();
        let parsed = parse(state.clone()).unwrap();
        Self {
            state,
            memory: std::fs::read(kept.join("memory")).unwrap(),
            parsed,
        }
    }

    /// The guest's memory: pages that the file does not have are zeros.
    fn content(&self) -> Vec<u8> {
        let table = &self.parsed.table;
        let mut content = self.memory[..self.memory.len() - TRAILER_BYTES].to_vec();
        for (page, bytes) in content.chunks_mut(PAGE_BYTES).enumerate() {
            if !table.pages().contains(page as u64) {
                bytes.fill(0);
            }
        }
        content
    }
}

fn parse(bytes: Vec<u8>) -> Result<Snapshot, String> {
    let parsed = StateFile::of(Path::new("state"), bytes).parse(&ReadingKeys::default());
    parsed.map_err(|error| crate::api::chain(&error))
}

fn is_same(one: &Snapshot, other: &Snapshot) -> bool {
    one.origin == other.origin
        && one.config == other.config
        && one.state == other.state
        && one.table.save() == other.table.save()
}

/// A number that a variable may give.
fn given(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

fn count() -> u64 {
    given("MUTATIONS").unwrap_or(SAMPLE) / 2
}

/// What the choices of a test come from, and how to have them again.
fn dice() -> (Dice, String) {
    let clock = || u64::from(std::time::UNIX_EPOCH.elapsed().unwrap().subsec_nanos());
    let seed = given("SEED").unwrap_or_else(clock);
    (Dice(seed), format!("SEED={seed}"))
}

/// A range of `len` bytes at most, often at a boundary of what files are made of.
fn range(dice: &mut Dice, len: usize) -> Range<usize> {
    let unit = [1, 4, 64, 512, PAGE_BYTES, CHUNK_BYTES][dice.below(6)];
    let start = dice.below(len) / unit * unit;
    let longest = (len - start).min(unit * (1 + dice.below(8)));
    start..start + 1 + dice.below(longest)
}

/// Changes `bytes`, which are many, and says how.
fn change(bytes: &mut Vec<u8>, dice: &mut Dice) -> String {
    let len = bytes.len();
    let (one, other) = (range(dice, len), range(dice, len));
    match dice.below(10) {
        0 | 1 => {
            let count = 1 + dice.below(2) * dice.below(16);
            for _ in 0..count {
                bytes[dice.below(len)] ^= 1 << dice.below(8);
            }
            format!("{count} flips")
        }
        2 => {
            bytes.truncate(one.start);
            format!("cut at {one:?}")
        }
        3 => {
            bytes.extend((0..one.len()).map(|_| 0));
            format!("{} zeros added", one.len())
        }
        4 => {
            bytes.extend_from_within(one.clone());
            format!("{one:?} added")
        }
        5 => {
            let to = other.start.min(len - one.len());
            bytes.copy_within(one.clone(), to);
            format!("{one:?} copied to {to}")
        }
        6 => {
            let copy = bytes[one.clone()].to_vec();
            bytes.splice(other.start..other.start, copy);
            format!("{one:?} put in at {}", other.start)
        }
        7 => {
            bytes.drain(one.clone());
            format!("{one:?} taken out")
        }
        8 => {
            let (first, second) = if one.start < other.start {
                (one, other)
            } else {
                (other, one)
            };
            let length = first.len().min(second.len()).min(second.start - first.start);
            for at in 0..length {
                bytes.swap(first.start + at, second.start + at);
            }
            format!("{length} bytes swapped at {} and {}", first.start, second.start)
        }
        _ => {
            let fill = [0, 0xff, u8::try_from(dice.below(256)).unwrap()][dice.below(3)];
            bytes[one.clone()].fill(fill);
            format!("{one:?} filled with {fill:#x}")
        }
    }
}

/// The sections of a state, and where their bodies lie.
fn bodies(state: &[u8]) -> Vec<(String, Range<usize>)> {
    let parsed = State::parse(state, &ReadingKeys::default()).unwrap();
    let mut at = crate::state::HEADER_BYTES;
    let body = |(name, _, len): (&str, u32, usize)| {
        let start = at + SECTION_HEADER_BYTES;
        at = start + len;
        (name.to_owned(), start..at)
    };
    parsed.sections().map(body).collect()
}

#[test]
fn every_flipped_bit_of_a_state_is_refused_by_the_name_of_its_section() {
    let good = Good::read();
    let bodies = bodies(&good.state);
    for bit in 0..good.state.len() * 8 {
        let mut bytes = good.state.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        let Err(text) = parse(bytes) else {
            panic!("bit {bit} is flipped and the state is taken");
        };
        if let Some((name, _)) = bodies.iter().find(|(_, body)| body.contains(&(bit / 8))) {
            let expected = format!("section `{name}` is damaged");
            assert!(text.contains(&expected), "bit {bit}: {text}");
        }
    }
}

#[test]
fn a_state_that_was_changed_is_refused_unless_it_says_the_same() {
    let good = Good::read();
    let (mut dice, seed) = dice();
    let mut refused = 0;
    for number in 0..count() {
        let mut bytes = good.state.clone();
        let mut how = change(&mut bytes, &mut dice);
        if dice.below(4) == 0 && !bytes.is_empty() {
            how += ", ";
            how += &change(&mut bytes, &mut dice);
        }
        match parse(bytes) {
            Err(_) => refused += 1,
            Ok(parsed) => assert!(is_same(&parsed, &good.parsed), "{seed}, number {number}: {how}"),
        }
    }
    assert!(refused > count() / 2, "{seed}: {refused} were refused");
}

#[test]
fn every_byte_of_memory_that_is_not_as_it_was_is_found_by_the_sum_of_its_chunk() {
    let good = Good::read();
    let table = &good.parsed.table;
    let (mut dice, seed) = dice();
    // Each byte where many mutations are asked for, or else some of each page.
    let step = if count() > SAMPLE { 1 } else { 61 };
    for chunk in saved_chunks_of(table) {
        let bytes = &mut good.memory[chunk * CHUNK_BYTES..(chunk + 1) * CHUNK_BYTES].to_vec();
        for at in (dice.below(step)..CHUNK_BYTES).step_by(step) {
            let page = (chunk * CHUNK_BYTES + at) / PAGE_BYTES;
            if !table.pages().contains(page as u64) {
                continue;
            }
            let bit = 1 << dice.below(8);
            bytes[at] ^= bit;
            let checked = table.check(chunk, bytes);
            assert!(checked.is_err(), "{seed}: chunk {chunk}, byte {at}, {bit:#x}");
            bytes[at] ^= bit;
        }
    }
}

fn saved_chunks_of(table: &MemoryTable) -> impl Iterator<Item = usize> {
    (0..table.chunks()).filter(|chunk| table.mask(*chunk) != 0)
}

/// A memory file that is changed again and again.
struct Changing {
    file: NamedTempFile,
    bytes: Vec<u8>,
}

impl Changing {
    fn new(bytes: &[u8]) -> Self {
        let file = NamedTempFile::new().unwrap();
        file.as_file().write_all_at(bytes, 0).unwrap();
        Self {
            file,
            bytes: bytes.to_vec(),
        }
    }

    /// Writes what differs; `bytes` become what was there before.
    fn take_on(&mut self, bytes: &mut Vec<u8>) {
        let file = self.file.as_file();
        file.set_len(bytes.len() as u64).unwrap();
        for (number, page) in bytes.chunks(PAGE_BYTES).enumerate() {
            let at = number * PAGE_BYTES;
            if self.bytes.get(at..at + page.len()) != Some(page) {
                file.write_all_at(page, at as u64).unwrap();
            }
        }
        std::mem::swap(&mut self.bytes, bytes);
    }
}

/// The whole memory, in the way in which it is loaded before the guest runs.
fn eagerly(saved: &SavedMemory<'_>) -> Result<Vec<u8>, RestoreError> {
    let image = opened(saved)?;
    let file = Arc::new(Saved {
        path: saved.path.to_owned(),
        table: Arc::clone(&saved.table),
        layout: saved.layout(),
    });
    let reader = ChunkReader::bind(PreparedPipeline::new(image, DEPTH), file).unwrap();
    let memory = allocate(saved.table.size_bytes() / MIB, Backing::Anonymous, saved.pages).unwrap();
    let loaded = eager::load(reader, &saved.table, &memory);
    loaded.map_err(|source| RestoreError::Load {
        path: saved.path.to_owned(),
        source,
    })?;
    Ok(all_of(&memory))
}

/// The same while a guest would run already; `None` if some of it is lost.
fn lazily(saved: SavedMemory<'_>) -> Option<Vec<u8>> {
    let ending = Ending::new().unwrap();
    let size_bytes = saved.table.size_bytes();
    let (memory, pager) = restore(saved, &ending).ok()?;
    let pager = pager.expect("tests run as root, or with vm.unprivileged_userfaultfd = 1");
    let brought = pager.bring(&[(GuestAddress(0), size_bytes)], Duration::from_secs(30));
    assert_eq!(brought.is_err(), ending.announced().is_some(), "{brought:?}");
    brought.ok().map(|()| all_of(&memory))
}

fn all_of(memory: &GuestMemoryMmap) -> Vec<u8> {
    let len = memory.iter().map(GuestMemoryRegion::len).sum::<u64>();
    let mut bytes = vec![0; usize::try_from(len).unwrap()];
    memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    bytes
}

#[test]
fn a_memory_file_that_was_changed_is_refused_unless_the_guest_gets_what_was_saved() {
    let good = Good::read();
    let content = good.content();
    let table = Arc::new(good.parsed.table.clone());
    let mut changing = Changing::new(&good.memory);
    let path = changing.file.path().to_str().unwrap().to_owned();
    let owner = owner();
    let saved = || SavedMemory {
        path: &path,
        table: Arc::clone(&table),
        hotplug: None,
        verify: Verify::Chunks,
        pages: PageSize::Base,
        owner: &owner,
    };
    assert!(eagerly(&saved()).unwrap() == content && lazily(saved()).unwrap() == content);
    let (mut dice, seed) = dice();
    let mut refused = 0;
    // A buffer that is used again costs no page faults.
    let mut bytes = Vec::new();
    for number in 0..count() {
        bytes.clone_from(&good.memory);
        let how = change_what_there_is(&mut bytes, &good.parsed.table, &mut dice);
        changing.take_on(&mut bytes);
        let loaded = match number % BY_PAGER {
            0 => lazily(saved()),
            _ => eagerly(&saved()).ok(),
        };
        match loaded {
            None => refused += 1,
            Some(loaded) => assert!(loaded == content, "{seed}, number {number}: {how}"),
        }
    }
    assert!(refused > count() / 2, "{seed}: {refused} were refused");
}

/// Most of the file is holes, which nobody reads: three of four changes begin with a flip in a page that there is.
fn change_what_there_is(bytes: &mut Vec<u8>, table: &MemoryTable, dice: &mut Dice) -> String {
    let chunks: Vec<usize> = saved_chunks_of(table).collect();
    if dice.below(4) == 0 {
        return change(bytes, dice);
    }
    let chunk = chunks[dice.below(chunks.len())];
    let pages: Vec<usize> = (0..16)
        .filter(|page| table.mask(chunk) & 1 << page != 0)
        .collect();
    let page = chunk * 16 + pages[dice.below(pages.len())];
    let within = page * PAGE_BYTES..(page + 1) * PAGE_BYTES;
    let mut changed = bytes[within.clone()].to_vec();
    let how = loop {
        let how = change(&mut changed, dice);
        changed.resize(PAGE_BYTES, 0);
        if changed != bytes[within.clone()] {
            break how;
        }
    };
    bytes[within].copy_from_slice(&changed);
    format!("page {page}: {how}")
}
