#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

use std::fs::{self, File};
use std::io::Cursor;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;

use coracle_devices::virtio::blk::DriveConfig;
use coracle_storage::backend::Access;
use coracle_storage::changes::{BLOCK_BYTES, Changes};
use coracle_storage::copy::{DuplicateError, Original};
use coracle_storage::lease::{Lock, Owner, Terms};
use coracle_storage::open::{self, Image};
use proptest::prelude::*;

use super::*;
use crate::migration::hello::CopyOffer;
use crate::migration::wire::{Kind, Wire};

const MIB: u64 = 1 << 20;

/// An image, and what is made of it.
struct Pair {
    directory: tempfile::TempDir,
    source: File,
    _image: Image,
    copied: Vec<Copied>,
    copies: Copies,
}

impl Pair {
    fn new(size_bytes: u64) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("source").to_str().unwrap().to_owned();
        let source = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .unwrap();
        source.set_len(size_bytes).unwrap();
        let owner = Owner::of_this_process("test");
        let image = open::open(&path, Access::ReadWrite, &Terms::new(Lock::Exclusive, &owner)).unwrap();
        let copied = Copied {
            id: "d".to_owned(),
            size_bytes,
            original: Original::open(&path, &image.hold, size_bytes).unwrap(),
            changes: Arc::<Changes>::default(),
        };
        let target = directory.path().join("target").to_str().unwrap().to_owned();
        let drives = [DriveConfig {
            drive_id: "d".to_owned(),
            path_on_host: Some(target),
            ..DriveConfig::default()
        }];
        let offers = [CopyOffer {
            id: "d".to_owned(),
            size_bytes,
            data_bytes: 0,
        }];
        let copies = Copies::default();
        copies.create(&offers, &drives, &owner).unwrap();
        Self {
            directory,
            source,
            _image: image,
            copied: vec![copied],
            copies,
        }
    }

    /// Sends a round, and has it taken. Says how much of frames that was.
    fn round(sending: &mut Sending<'_>, copies: &Copies) -> u64 {
        let mut wire = Wire::new(Cursor::new(Vec::new()));
        let mut told = (0, 0);
        let sent = sending.send(&mut wire, |disk, bytes| {
            told = (told.0 + disk, told.1 + bytes);
            Ok(())
        });
        assert_eq!((sent.unwrap(), wire.sent_bytes()), told);
        assert_eq!(sending.left_bytes(), 0);
        wire.stream().set_position(0);
        while let Ok((kind, body)) = wire.receive() {
            match kind {
                Kind::Blocks => copies.take_blocks(body).unwrap(),
                Kind::Holes => copies.take_holes(body).unwrap(),
                _ => panic!("{kind:?} is none of them"),
            };
        }
        told.1
    }

    fn target(&self) -> File {
        File::open(self.directory.path().join("target")).unwrap()
    }
}

#[derive(Clone, Debug)]
enum Change {
    Write(u64, Vec<u8>),
    Punch(u64, u64),
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        (0..4 * MIB, any::<u8>(), 1..300_000_usize)
            .prop_map(|(at, byte, len)| Change::Write(at, vec![byte; len])),
        (0..4 * MIB, 1..MIB).prop_map(|(at, len)| Change::Punch(at, len)),
    ]
}

fn carry_out(file: &File, changes: &Changes, change: &Change, size_bytes: u64) {
    let (at, len) = match change {
        Change::Write(at, bytes) => (*at, bytes.len() as u64),
        Change::Punch(at, len) => (*at, *len),
    };
    let end = (at + len).min(size_bytes);
    if at >= end {
        return;
    }
    match change {
        Change::Write(_, bytes) => {
            let len = usize::try_from(end - at).unwrap();
            file.write_all_at(bytes.get(..len).unwrap(), at).unwrap();
        }
        Change::Punch(..) => {
            let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(file, flags, at, end - at).unwrap();
        }
    }
    changes.mark(at..end);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn whatever_is_written_between_rounds_is_there_in_the_end(
        sectors in 1..4 * MIB / 512,
        rounds in prop::collection::vec(prop::collection::vec(change(), 0..6), 1..5),
    ) {
        let size_bytes = sectors * 512;
        let pair = Pair::new(size_bytes);
        let changes = Arc::clone(&pair.copied.first().unwrap().changes);
        let mut rounds = rounds.iter();
        // What was written before is sent with all of it.
        for change in rounds.next().into_iter().flatten() {
            carry_out(&pair.source, &changes, change, size_bytes);
        }
        let mut sending = Sending::begin(&pair.copied);
        Pair::round(&mut sending, &pair.copies);
        for round in rounds {
            for change in round {
                carry_out(&pair.source, &changes, change, size_bytes);
            }
            sending.look();
            Pair::round(&mut sending, &pair.copies);
        }
        pair.copies.finish().unwrap();
        let (mut expected, mut found) = (vec![0; usize::try_from(size_bytes).unwrap()], Vec::new());
        pair.source.read_exact_at(&mut expected, 0).unwrap();
        std::io::Read::read_to_end(&mut pair.target(), &mut found).unwrap();
        prop_assert!(expected == found);
    }
}

#[test]
fn holes_take_neither_the_line_nor_space_and_only_what_was_changed_is_sent_again() {
    let size_bytes = 1 << 40;
    let pair = Pair::new(size_bytes);
    pair.source.write_all_at(&[1; 8192], 512 << 30).unwrap();
    let changes = Arc::clone(&pair.copied.first().unwrap().changes);
    let mut sending = Sending::begin(&pair.copied);
    assert!(sending.left_bytes() <= MIB, "{}", sending.left_bytes());
    assert!(Pair::round(&mut sending, &pair.copies) < 16 << 10);
    sending.look();
    assert_eq!(
        (sending.left_bytes(), Pair::round(&mut sending, &pair.copies)),
        (0, 0)
    );
    carry_out(&pair.source, &changes, &Change::Write(7, vec![2; 1]), size_bytes);
    carry_out(
        &pair.source,
        &changes,
        &Change::Punch(512 << 30, 8192),
        size_bytes,
    );
    sending.look();
    assert_eq!(sending.left_bytes(), 2 * BLOCK_BYTES);
    assert!(Pair::round(&mut sending, &pair.copies) < 16 << 10);
    // A guest that gives all of it back costs one message.
    changes.mark(0..size_bytes);
    pair.source.set_len(0).unwrap();
    pair.source.set_len(size_bytes).unwrap();
    sending.look();
    assert!(Pair::round(&mut sending, &pair.copies) < 100);
    let metadata = pair.target().metadata().unwrap();
    assert_eq!((metadata.len(), metadata.blocks()), (size_bytes, 0));
}

#[test]
fn what_lies_elsewhere_or_never_ends_is_not_taken() {
    let pair = Pair::new(2 * BLOCK_BYTES);
    let number = |number: u32| number.to_le_bytes().to_vec();
    let blocks = |disk, offset: u64, len: usize| {
        let body = [number(disk), offset.to_le_bytes().to_vec(), vec![1; len]].concat();
        pair.copies.take_blocks(&body)
    };
    let holes = |disk, offset: u64, len: u64| {
        let body = [
            number(disk),
            offset.to_le_bytes().to_vec(),
            len.to_le_bytes().to_vec(),
        ]
        .concat();
        pair.copies.take_holes(&body)
    };
    assert_eq!(blocks(0, 512, 1024).unwrap(), 1024);
    assert_eq!(holes(0, 512, 512).unwrap(), 512);
    let is_outside = |taken| matches!(taken, Err(CopyError::Duplicate(DuplicateError::Outside { .. })));
    for (offset, len) in [
        (2 * BLOCK_BYTES, 1),
        (2 * BLOCK_BYTES - 1, 2),
        (u64::MAX, 2),
        (0, 0),
    ] {
        assert!(
            is_outside(blocks(0, offset, usize::try_from(len).unwrap())),
            "{offset}"
        );
        assert!(is_outside(holes(0, offset, len)), "{offset}");
    }
    assert!(
        is_outside(holes(0, 1, u64::MAX - 1)) || matches!(holes(0, 1, u64::MAX - 1), Err(CopyError::TooMuch))
    );
    assert!(matches!(blocks(1, 0, 1), Err(CopyError::NoDisk(1))));
    assert!(matches!(holes(u32::MAX, 0, 1), Err(CopyError::NoDisk(_))));
    assert!(matches!(pair.copies.take_blocks(&[0; 11]), Err(CopyError::Short)));
    assert!(matches!(pair.copies.take_holes(&[0; 21]), Err(CopyError::Short)));
    assert_eq!(pair.target().metadata().unwrap().len(), 2 * BLOCK_BYTES);
    let most = (0..1_000_000).find(|_| matches!(holes(0, 0, 1), Err(CopyError::TooMuch)));
    assert!(most.is_some(), "it went on for ever");
}

#[test]
fn copies_that_are_given_up_are_gone_and_nothing_is_taken_any_more() {
    let pair = Pair::new(BLOCK_BYTES);
    let path = pair.directory.path().join("target");
    let copies = Arc::new(pair.copies);
    let mut abandoned = Abandoned::unless_done(&copies);
    abandoned.never_mind();
    drop(abandoned);
    assert!(path.exists());
    drop(Abandoned::unless_done(&copies));
    assert!(!path.exists());
    let taken = copies.take_holes(&[0; HOLES_BYTES]);
    assert!(matches!(taken, Err(CopyError::GivenUp)));
    assert!(matches!(copies.finish(), Err(CopyError::GivenUp)));
}

#[test]
fn copies_that_are_kept_stay_whatever_is_said_later() {
    let pair = Pair::new(BLOCK_BYTES);
    pair.copies.keep();
    pair.copies.give_up();
    let path = pair.directory.path().join("target");
    assert_eq!(fs::metadata(path).unwrap().len(), BLOCK_BYTES);
}
