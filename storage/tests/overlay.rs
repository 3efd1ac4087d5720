//! Overlays on both reactors, against a model that is a vector of bytes.
#![expect(unsafe_code, reason = "segments point into the test's own buffers")]
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test's panic is its failure"
)]

use std::fs;
use std::ptr::NonNull;

use coracle_storage::backend::{Backend, Step};
use coracle_storage::engine::{Engine, PreparedReactor};
use coracle_storage::lease::{Lock, Owner, Terms};
use coracle_storage::overlay::{MEMORY, OverlayConfig, OverlayError};
use coracle_storage::reactor::{Patience, Reach, Reactor, Wake};
use coracle_storage::request::{Completion, Durability, Failure, Operation, Request, Segment, Space};
use proptest::prelude::*;
use tempfile::TempDir;

/// Few operations, so that the tests see a full reactor.
const OPS_MAX: u32 = 8;
const CLUSTER: u64 = 4096;

/// The image of an overlay that nobody locks: the tests look at the files themselves.
fn opened(config: &OverlayConfig) -> Result<Box<dyn Backend>, OverlayError> {
    let image = config.open(&Terms::new(Lock::None, &Owner::of_this_process("test")))?;
    Ok(image.backend)
}

fn check(config: &OverlayConfig) -> Result<(), OverlayError> {
    config.check(&Terms::new(Lock::None, &Owner::of_this_process("test")))
}

/// The image and what carries its operations out.
struct Disk {
    image: Box<dyn Backend>,
    io: Box<dyn Reactor>,
}

/// A request of the model's own: what it has to do, and its memory.
struct Asked {
    request: Option<Request>,
    buffer: Vec<u8>,
    outcome: Option<Result<(), Failure>>,
}

impl Asked {
    /// A request of three segments, the first of which is odd.
    fn new(
        operation: Operation,
        offset_bytes: u64,
        len_bytes: u64,
        fill: u8,
        durability: Durability,
    ) -> Self {
        let has_memory = matches!(operation, Operation::Read | Operation::Write);
        let mut buffer = vec![
            fill;
            if has_memory {
                usize::try_from(len_bytes).unwrap()
            } else {
                0
            }
        ];
        let mut segments = Vec::new();
        if has_memory {
            // SAFETY: the buffer lives, and stays in place, until the batch is through.
            let mut first = unsafe { Segment::new(NonNull::new(buffer.as_mut_ptr()).unwrap(), buffer.len()) };
            let mut second = first.split_off(buffer.len() / 3);
            let third = second.split_off(buffer.len() / 2);
            segments.extend([first, second, third]);
        }
        let request = Request {
            tag: 0,
            operation,
            offset_bytes,
            len_bytes,
            durability,
            segments,
        };
        Self {
            request: Some(request),
            buffer,
            outcome: None,
        }
    }
}

impl Disk {
    fn new(engine: Engine, image: Box<dyn Backend>) -> Self {
        let mut io = PreparedReactor::new(engine, OPS_MAX, Reach::Files)
            .enable()
            .unwrap();
        io.register(&image.files()).unwrap();
        Self { image, io }
    }

    /// Puts all of `batch` in flight, as far as there is room, and returns when all has ended.
    fn run(&mut self, batch: &mut [Asked]) {
        let mut next = 0;
        let mut left = batch.len();
        let mut wakes = Vec::new();
        while left > 0 {
            while let Some(asked) = batch.get_mut(next) {
                let mut request = asked.request.take().unwrap();
                request.tag = next as u64;
                match self.image.start(request, self.io.as_mut()) {
                    Step::Pending => {}
                    Step::Done(completion) => left -= complete(batch, completion),
                    Step::Busy(request) => {
                        assert!(self.image.in_flight() > 0, "an idle image has room");
                        batch[next].request = Some(request);
                        break;
                    }
                }
                next += 1;
                while let Some(completion) = self.image.next_completion() {
                    left -= complete(batch, completion);
                }
            }
            if left == 0 {
                break;
            }
            self.io.wait(Patience::UntilEvent, &mut wakes).unwrap();
            for wake in wakes.drain(..) {
                let Wake::Done(event) = wake else { continue };
                if let Step::Done(completion) = self.image.resume(event, self.io.as_mut()) {
                    left -= complete(batch, completion);
                }
                while let Some(completion) = self.image.next_completion() {
                    left -= complete(batch, completion);
                }
            }
        }
        assert_eq!(self.image.in_flight(), 0);
    }

    fn one(&mut self, operation: Operation, offset_bytes: u64, len_bytes: u64, fill: u8) -> Vec<u8> {
        let mut batch = [Asked::new(
            operation,
            offset_bytes,
            len_bytes,
            fill,
            Durability::Cached,
        )];
        self.run(&mut batch);
        let [asked] = batch;
        assert_eq!(asked.outcome, Some(Ok(())), "{operation:?}");
        asked.buffer
    }

    fn content(&mut self) -> Vec<u8> {
        let size_bytes = self.image.geometry().size_bytes;
        self.one(Operation::Read, 0, size_bytes, 0xee)
    }
}

fn complete(batch: &mut [Asked], completion: Completion) -> usize {
    let asked = &mut batch[usize::try_from(completion.request.tag).unwrap()];
    assert!(asked.outcome.is_none(), "a request completes once");
    asked.outcome = Some(completion.outcome);
    1
}

/// A directory with a base.
struct Place {
    directory: TempDir,
    base: Vec<u8>,
}

impl Place {
    fn new(base_bytes: u64) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let base: Vec<u8> = (0..base_bytes).map(|at| (at / 512 % 251) as u8 | 1).collect();
        fs::write(directory.path().join("base"), &base).unwrap();
        Self { directory, base }
    }

    fn path(&self, name: &str) -> String {
        self.directory.path().join(name).to_str().unwrap().to_owned()
    }

    fn config(&self, path: &str, keep: bool) -> OverlayConfig {
        OverlayConfig {
            base: self.path("base"),
            path: if path == MEMORY {
                MEMORY.to_owned()
            } else {
                self.path(path)
            },
            keep,
        }
    }

    fn base_is_unchanged(&self) -> bool {
        fs::read(self.path("base")).unwrap() == self.base
    }
}

/// One step of the model: in sectors.
#[derive(Clone, Debug)]
enum Act {
    Read(u64, u64),
    Write(u64, u64, Durability),
    Discard(u64, u64),
    Zero(u64, u64),
    Flush,
}

const SIZE_BYTES: u64 = 45 * 512 + 16 * CLUSTER;
const SECTORS: u64 = SIZE_BYTES / 512;

fn act() -> impl Strategy<Value = Act> {
    let durability = prop_oneof![Just(Durability::Cached), Just(Durability::Durable)];
    let range = || (0..SECTORS, 1..60_u64).prop_map(|(at, len)| (at, len.min(SECTORS - at)));
    prop_oneof![
        2 => range().prop_map(|(at, len)| Act::Read(at, len)),
        4 => (range(), durability).prop_map(|((at, len), durability)| Act::Write(at, len, durability)),
        1 => range().prop_map(|(at, len)| Act::Discard(at, len)),
        2 => range().prop_map(|(at, len)| Act::Zero(at, len)),
        1 => Just(Act::Flush),
    ]
}

fn index(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap()
}

/// Runs `acts` in batches in which no two touch the same byte, and compares all bytes after each.
fn follow(disk: &mut Disk, model: &mut [u8], acts: &[Act]) {
    let mut fill = 0_u8;
    let mut left = acts;
    while !left.is_empty() {
        let mut taken: Vec<std::ops::Range<u64>> = Vec::new();
        let mut batch = Vec::new();
        let mut expected = Vec::new();
        let after_flush = |acts: &[Act]| matches!(acts.first(), Some(Act::Flush));
        while let Some((act, rest)) = left.split_first() {
            let (at, len) = match act {
                Act::Read(at, len) | Act::Write(at, len, _) | Act::Discard(at, len) | Act::Zero(at, len) => {
                    (*at, *len)
                }
                Act::Flush => (0, 0),
            };
            if taken.iter().any(|other| at < other.end && other.start < at + len) {
                break;
            }
            taken.push(at..at + len);
            fill = fill.wrapping_add(7);
            let (offset, bytes) = (at * 512, len * 512);
            let range = index(offset)..index(offset + bytes);
            let (operation, durability) = match act {
                Act::Read(..) => (Operation::Read, Durability::Cached),
                Act::Write(_, _, durability) => {
                    model[range.clone()].fill(fill);
                    (Operation::Write, *durability)
                }
                Act::Discard(..) => {
                    let end = if offset + bytes == SIZE_BYTES {
                        SIZE_BYTES
                    } else {
                        (offset + bytes) / CLUSTER * CLUSTER
                    };
                    let start = offset.next_multiple_of(CLUSTER);
                    if start < end {
                        model[index(start)..index(end)].fill(0);
                    }
                    (Operation::Discard, Durability::Cached)
                }
                Act::Zero(..) => {
                    model[range.clone()].fill(0);
                    let space = if fill & 1 == 0 {
                        Space::MayBeFreed
                    } else {
                        Space::Stays
                    };
                    (Operation::WriteZeroes { space }, Durability::Cached)
                }
                Act::Flush => (Operation::Flush, Durability::Cached),
            };
            batch.push(Asked::new(operation, offset, bytes, fill, durability));
            expected.push(matches!(act, Act::Read(..)).then_some(range));
            left = rest;
            if after_flush(left) {
                break;
            }
        }
        disk.run(&mut batch);
        for (asked, expected) in batch.iter().zip(expected) {
            assert_eq!(asked.outcome, Some(Ok(())));
            if let Some(range) = expected {
                assert!(asked.buffer == model[range], "a read shows something else");
            }
        }
        assert!(disk.content() == model, "the image is another one");
    }
}

proptest! {
    #[test]
    fn an_overlay_reads_as_a_copy_of_its_base_would(
        acts in prop::collection::vec(act(), 1..40),
        more in prop::collection::vec(act(), 1..20),
        is_async in any::<bool>(),
        kind in 0..3,
    ) {
        let engine = if is_async { Engine::Async } else { Engine::Sync };
        let place = Place::new(SIZE_BYTES);
        let mut model = place.base.clone();
        let config = match kind {
            0 => place.config(MEMORY, false),
            1 => place.config("overlay", false),
            _ => place.config("overlay", true),
        };
        let mut disk = Disk::new(engine, opened(&config).unwrap());
        follow(&mut disk, &mut model, &acts);
        if config.keep {
            disk.one(Operation::Flush, 0, 0, 0);
            drop(disk);
            disk = Disk::new(engine, opened(&config).unwrap());
            prop_assert!(disk.content() == model, "the overlay was not kept");
            follow(&mut disk, &mut model, &more);
        }
        prop_assert!(place.base_is_unchanged());
        prop_assert_eq!(fs::exists(place.path("overlay")).unwrap(), config.keep);
    }
}

#[test]
fn an_overlay_that_has_grown_shows_zeros_there_and_is_kept_with_its_size() {
    for engine in [Engine::Async, Engine::Sync] {
        let place = Place::new(SIZE_BYTES);
        let config = place.config("overlay", true);
        let mut disk = Disk::new(engine, opened(&config).unwrap());
        // The last cluster is half of one: it must not show the base's bytes, or anything else, when it is whole.
        disk.one(Operation::Write, SIZE_BYTES - 512, 512, 9);
        let grown = SIZE_BYTES + 100 * CLUSTER + 512;
        disk.one(Operation::Grow, 0, grown, 0);
        assert_eq!(disk.image.geometry().size_bytes, grown);
        disk.one(Operation::Write, grown - 512, 512, 8);
        let mut model = place.base.clone();
        model[index(SIZE_BYTES - 512)..].fill(9);
        model.resize(index(grown), 0);
        model[index(grown - 512)..].fill(8);
        assert!(disk.content() == model);
        disk.one(Operation::Flush, 0, 0, 0);
        drop(disk);
        let mut disk = Disk::new(engine, opened(&config).unwrap());
        assert!(disk.content() == model);
    }
}

#[test]
fn an_overlay_cannot_shrink_or_outgrow_its_bitmap_and_says_how_far_it_goes() {
    let place = Place::new(SIZE_BYTES);
    let mut disk = Disk::new(Engine::Sync, opened(&place.config(MEMORY, false)).unwrap());
    let bytes_max = (1 << 28) * CLUSTER;
    for (len_bytes, failure) in [
        (SIZE_BYTES - 512, Failure::OutOfRange),
        (SIZE_BYTES + 1, Failure::OutOfRange),
        (bytes_max + 512, Failure::TooLarge { bytes_max }),
    ] {
        let mut batch = [Asked::new(Operation::Grow, 0, len_bytes, 0, Durability::Cached)];
        disk.run(&mut batch);
        assert_eq!(batch[0].outcome, Some(Err(failure)));
    }
    assert_eq!(disk.image.geometry().size_bytes, SIZE_BYTES);
}

#[test]
fn overlays_of_one_base_do_not_see_each_other() {
    let place = Place::new(SIZE_BYTES);
    let mut first = Disk::new(Engine::Async, opened(&place.config(MEMORY, false)).unwrap());
    let mut second = Disk::new(Engine::Async, opened(&place.config(MEMORY, false)).unwrap());
    first.one(Operation::Write, 512, 1024, 1);
    second.one(Operation::Write, 1024, 1024, 2);
    assert_eq!(first.one(Operation::Read, 512, 1024, 0), [1; 1024]);
    assert_eq!(second.one(Operation::Read, 1024, 1024, 0), [2; 1024]);
    assert_eq!(second.one(Operation::Read, 512, 512, 0), place.base[512..1024]);
}

fn refusal(config: &OverlayConfig) -> OverlayError {
    opened(config).err().expect("the overlay is refused")
}

#[test]
fn a_kept_overlay_refuses_another_base_and_a_changed_one_and_names_both() {
    let place = Place::new(SIZE_BYTES);
    let config = place.config("overlay", true);
    drop(opened(&config).unwrap());
    let mut other = config.clone();
    other.base = place.path("other");
    fs::copy(&config.base, &other.base).unwrap();
    assert!(opened(&other).is_ok(), "a copy of the base is the base");
    for change in [
        |bytes: &mut Vec<u8>| bytes[1024] ^= 1,
        |bytes: &mut Vec<u8>| bytes.truncate(4096),
    ] {
        let mut bytes = place.base.clone();
        change(&mut bytes);
        fs::write(&other.base, &bytes).unwrap();
        let error = refusal(&other);
        assert!(matches!(error, OverlayError::WrongBase { .. }), "{error}");
        let text = error.to_string();
        assert!(
            text.contains(&config.base) && text.contains(&other.base),
            "{text}"
        );
    }
}

#[test]
fn what_is_in_the_way_of_an_overlay_is_said() {
    let place = Place::new(SIZE_BYTES);
    fs::write(place.path("overlay"), b"something of the user's").unwrap();
    let text = |config: &OverlayConfig| {
        let error = refusal(config);
        let source = std::error::Error::source(&error).map(ToString::to_string);
        format!("{error}: {}", source.unwrap_or_default())
    };
    assert!(text(&place.config("overlay", false)).contains("exists already"));
    assert!(text(&place.config("overlay", true)).contains("does not begin as an overlay file does"));
    assert_eq!(
        fs::read(place.path("overlay")).unwrap(),
        b"something of the user's"
    );
    assert!(text(&place.config(".", true)).contains("not a regular file"));
    assert!(text(&place.config(MEMORY, true)).contains("cannot be kept"));
    assert!(text(&place.config("absent/overlay", true)).contains("cannot create overlay"));
    let mut config = place.config("new", true);
    config.base = place.path("absent");
    assert!(text(&config).contains("there is no image"));
    assert!(
        !fs::exists(place.path("new")).unwrap(),
        "a refusal leaves nothing behind"
    );
    assert_eq!(fs::read_dir(place.directory.path()).unwrap().count(), 2);
}

#[test]
fn an_overlay_file_that_is_cut_off_is_refused_and_one_that_is_cut_under_us_loses_no_bits() {
    let place = Place::new(SIZE_BYTES);
    let config = place.config("overlay", true);
    let mut disk = Disk::new(Engine::Async, opened(&config).unwrap());
    disk.one(Operation::Write, 0, CLUSTER, 5);
    disk.one(Operation::Flush, 0, 0, 0);
    let file = fs::OpenOptions::new().write(true).open(&config.path).unwrap();
    let whole_bytes = file.metadata().unwrap().len();
    file.set_len(33 << 20).unwrap();
    let mut batch = [Asked::new(Operation::Read, 0, CLUSTER, 0, Durability::Cached)];
    disk.run(&mut batch);
    assert_eq!(batch[0].outcome, Some(Err(Failure::Truncated)));
    drop(disk);
    let error = refusal(&config);
    assert!(error.to_string().contains("is cut off"), "{error}");
    file.set_len(whole_bytes).unwrap();
    let mut disk = Disk::new(Engine::Async, opened(&config).unwrap());
    assert_eq!(disk.one(Operation::Read, 0, CLUSTER, 1), vec![0; index(CLUSTER)]);
}

#[test]
fn a_probe_refuses_what_opening_would_and_makes_nothing() {
    let place = Place::new(SIZE_BYTES);
    let (kept, temporary) = (place.config("overlay", true), place.config("overlay", false));
    for config in [&kept, &temporary, &place.config(MEMORY, false)] {
        check(config).unwrap();
    }
    assert!(!fs::exists(&kept.path).unwrap());
    drop(opened(&kept).unwrap());
    check(&kept).unwrap();
    assert!(
        check(&temporary)
            .unwrap_err()
            .to_string()
            .contains("exists already")
    );
    fs::write(&kept.base, vec![1; 512]).unwrap();
    assert!(matches!(check(&kept), Err(OverlayError::WrongBase { .. })));
}

#[test]
fn what_a_guest_writes_is_nobody_elses() {
    use std::os::unix::fs::PermissionsExt;
    let place = Place::new(SIZE_BYTES);
    let config = place.config("overlay", true);
    drop(opened(&config).unwrap());
    let mode = fs::metadata(&config.path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}
