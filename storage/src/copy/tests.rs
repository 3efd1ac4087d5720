#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test's panic is its failure"
)]

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::backend::Access;
use crate::lease::{Lock, Owner, Phase, Terms, break_lease, inspect};
use crate::open::{self, OpenError};
use crate::overlay::OverlayConfig;
use crate::overlay::format::DATA_OFFSET_BYTES;

const MIB: u64 = 1 << 20;

fn owner() -> Owner {
    Owner::of_this_process("test")
}

fn path_in(directory: &tempfile::TempDir) -> String {
    directory.path().join("copy").to_str().unwrap().to_owned()
}

proptest! {
    #[test]
    fn grains_are_all_of_the_bytes_and_zeros_are_told_from_data(
        kinds in prop::collection::vec(any::<bool>(), 0..12), rest in 0..GRAIN_BYTES,
    ) {
        let mut bytes: Vec<u8> = kinds
            .iter()
            .flat_map(|is_data| {
                let mut grain = [0; GRAIN_BYTES];
                grain[GRAIN_BYTES - 1] = u8::from(*is_data);
                grain
            })
            .collect();
        bytes.extend(vec![0; rest]);
        let mut at = 0;
        let mut last = None;
        for (offset, part, kind) in grains(&bytes) {
            prop_assert_eq!(offset, at);
            prop_assert_ne!(last, Some(kind));
            let expected = if kind == Grains::Zeros { 0 } else { 1 };
            prop_assert!(part.chunks(GRAIN_BYTES).all(|grain| grain.iter().max().unwrap() == &expected));
            at += part.len();
            last = Some(kind);
        }
        prop_assert_eq!(at, bytes.len());
    }
}

#[test]
fn an_original_is_read_part_by_part_beside_its_lock() {
    let directory = tempfile::tempdir().unwrap();
    let path = path_in(&directory);
    let file = File::create(&path).unwrap();
    file.set_len(4 * MIB).unwrap();
    file.write_all_at(&[7; 8192], MIB).unwrap();
    let owner = owner();
    let terms = Terms::new(Lock::Exclusive, &owner);
    let image = open::open(&path, Access::ReadWrite, &terms).unwrap();
    let original = Original::open(&path, &image.hold, 4 * MIB).unwrap();
    assert!(original.data_bytes().unwrap() < MIB);
    let mut parts = Vec::new();
    let mut left = 0..4 * MIB;
    while !left.is_empty() {
        let part = original.first_part(&left).unwrap();
        let (Part::Data(range) | Part::Hole(range)) = &part;
        assert_eq!(range.start, left.start);
        left.start = range.end;
        parts.push(part);
    }
    let data = Part::Data(MIB..MIB + 8192);
    assert_eq!(parts, [Part::Hole(0..MIB), data, Part::Hole(MIB + 8192..4 * MIB)]);
    let mut bytes = [0; 8];
    original.read(&mut bytes, MIB + 8).unwrap();
    assert_eq!(bytes, [7; 8]);
    // It shares no lock with the disk, and has taken none down.
    drop(original);
    let stranger = Owner::of_this_process("stranger");
    let terms = Terms::new(Lock::Exclusive, &stranger);
    assert!(open::open(&path, Access::ReadWrite, &terms).is_err());
    // Another file under the same name is not the image.
    fs::rename(&path, format!("{path}.old")).unwrap();
    fs::write(&path, [0; 512]).unwrap();
    assert!(Original::open(&path, &image.hold, 512).is_err());
}

#[test]
fn a_copy_has_what_was_written_where_it_was_written_and_no_more_space_than_that() {
    let directory = tempfile::tempdir().unwrap();
    let path = path_in(&directory);
    let mut copy = Duplicate::create(&path, None, 64 * MIB, &owner()).unwrap();
    copy.write(5 * MIB, &[3; 12288]).unwrap();
    copy.write(32 * MIB, &[4; 4096]).unwrap();
    copy.zero(5 * MIB + 4096, 4096).unwrap();
    copy.zero(40 * MIB, 24 * MIB).unwrap();
    for (offset, len) in [(64 * MIB, 512), (u64::MAX, 2), (64 * MIB - 1, 2), (0, 0)] {
        assert!(
            matches!(copy.zero(offset, len), Err(DuplicateError::Outside { .. })),
            "{offset}"
        );
    }
    assert!(matches!(
        copy.write(64 * MIB - 1, &[1; 2]),
        Err(DuplicateError::Outside { .. })
    ));
    copy.finish().unwrap();
    copy.keep();
    drop(copy);
    let file = File::open(&path).unwrap();
    let metadata = file.metadata().unwrap();
    assert_eq!(metadata.len(), 64 * MIB);
    assert!(metadata.blocks() * 512 <= MIB, "{}", metadata.blocks());
    let mut bytes = [9; 12288];
    file.read_exact_at(&mut bytes, 5 * MIB).unwrap();
    let expected = [[3; 4096], [0; 4096], [3; 4096]].concat();
    assert_eq!(bytes[..], expected[..]);
}

#[test]
fn a_file_system_without_holes_gets_zeros() {
    let directory = tempfile::tempdir().unwrap();
    let path = path_in(&directory);
    let mut copy = Duplicate::create(&path, None, MIB, &owner()).unwrap();
    copy.write(0, &vec![1; 300 << 10]).unwrap();
    copy.without_holes();
    copy.zero(512, 200 << 10).unwrap();
    copy.keep();
    let bytes = fs::read(&path).unwrap();
    let expected = [&[1; 512][..], &[0; 200 << 10], &[1; (100 << 10) - 512]].concat();
    assert_eq!(bytes[..300 << 10], expected[..]);
}

#[test]
fn a_copy_does_not_share_the_records_of_an_image_that_is_in_use() {
    let directory = tempfile::tempdir().unwrap();
    let path = path_in(&directory);
    let at = directory.path().join("records").to_str().unwrap().to_owned();
    let image = directory.path().join("image").to_str().unwrap().to_owned();
    fs::write(&image, vec![0; 1 << 20]).unwrap();
    let owner = owner();
    let terms = Terms {
        at: Some(&at),
        ..Terms::new(Lock::Exclusive, &owner)
    };
    let held = open::open(&image, Access::ReadWrite, &terms).unwrap();
    let refused = Duplicate::create(&path, Some(&at), MIB, &owner).unwrap_err();
    let said = format!(
        "{refused} {:?}",
        std::error::Error::source(&refused).map(ToString::to_string)
    );
    assert!(said.contains("records of its own"), "{said}");
    assert!(!Path::new(&path).exists());
    drop(held);
    drop(Duplicate::create(&path, Some(&at), MIB, &owner).unwrap());
}

#[test]
fn a_copy_that_does_not_come_to_an_end_leaves_what_was_there() {
    let directory = tempfile::tempdir().unwrap();
    let path = path_in(&directory);
    drop(Duplicate::create(&path, None, MIB, &owner()).unwrap());
    assert!(!Path::new(&path).exists());
    File::create(&path).unwrap();
    let mut copy = Duplicate::create(&path, None, MIB, &owner()).unwrap();
    copy.write(0, &[1; 512]).unwrap();
    drop(copy);
    assert_eq!(fs::metadata(&path).unwrap().len(), 0);
    fs::remove_file(&path).unwrap();
    let mut copy = Duplicate::create(&path, None, MIB, &owner()).unwrap();
    // Somebody has put something else there.
    fs::remove_file(&path).unwrap();
    assert!(matches!(copy.finish(), Err(DuplicateError::Replaced { .. })));
    fs::write(&path, "theirs").unwrap();
    assert!(matches!(copy.finish(), Err(DuplicateError::Replaced { .. })));
    drop(copy);
    assert_eq!(fs::read(&path).unwrap(), b"theirs");
}

#[test]
fn what_is_there_is_never_replaced_and_a_link_is_not_followed() {
    let directory = tempfile::tempdir().unwrap();
    let path = path_in(&directory);
    let created = || Duplicate::create(&path, None, MIB, &owner());
    let checked = || Room::default().check(&path, MIB, 0);
    assert!(checked().is_ok());
    fs::write(&path, "theirs").unwrap();
    assert!(matches!(created(), Err(DuplicateError::There { .. })));
    assert!(matches!(checked(), Err(DuplicateError::There { .. })));
    assert_eq!(fs::read(&path).unwrap(), b"theirs");
    fs::remove_file(&path).unwrap();
    let elsewhere = directory.path().join("elsewhere");
    File::create(&elsewhere).unwrap();
    std::os::unix::fs::symlink(&elsewhere, &path).unwrap();
    assert!(matches!(created(), Err(DuplicateError::There { .. })));
    assert!(matches!(checked(), Err(DuplicateError::There { .. })));
    assert_eq!(fs::metadata(&elsewhere).unwrap().len(), 0);
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    assert!(matches!(created(), Err(DuplicateError::There { .. })));
}

#[test]
fn what_cannot_be_a_copy_is_told_before_one_is_made() {
    let directory = tempfile::tempdir().unwrap();
    let path = path_in(&directory);
    let checked = |path: &str, size, data| Room::default().check(path, size, data).unwrap_err();
    assert!(matches!(
        checked("nfs://a/b/c", MIB, 0),
        DuplicateError::Remote { .. }
    ));
    assert!(matches!(checked(&path, 511, 0), DuplicateError::Size { .. }));
    assert!(matches!(checked(&path, 0, 0), DuplicateError::Size { .. }));
    assert!(matches!(
        checked(&format!("{path}/x"), MIB, 0),
        DuplicateError::Host { .. }
    ));
    let full = checked(&path, !511, u64::MAX);
    assert!(matches!(full, DuplicateError::Full { .. }), "{full}");
    // Each has room, and both together have not.
    let space = rustix::fs::statvfs(directory.path()).unwrap();
    let most = (space.f_bavail * space.f_frsize / 4 * 3) & !511;
    let mut room = Room::default();
    room.check(&path, most, most).unwrap();
    let both = room.check(&format!("{path}2"), most, most).unwrap_err();
    assert!(matches!(both, DuplicateError::Full { .. }), "{both}");
}

#[test]
fn nobody_takes_a_part_of_a_copy_for_an_image() {
    let directory = tempfile::tempdir().unwrap();
    let path = path_in(&directory);
    let mut copy = Duplicate::create(&path, None, MIB, &owner()).unwrap();
    assert!(Duplicate::create(&path, None, MIB, &owner()).is_err());
    assert_eq!(fs::metadata(&path).unwrap().len(), MIB);
    let owner = owner();
    let terms = Terms::new(Lock::Exclusive, &owner);
    let opened = || open::open(&path, Access::ReadWrite, &terms).map(drop);
    assert!(matches!(opened(), Err(OpenError::Lease(_))));
    copy.open_up();
    opened().unwrap();
}

#[test]
fn an_image_that_was_left_behind_is_taken_up_by_nobody_until_somebody_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let path = path_in(&directory);
    File::create(&path).unwrap().set_len(MIB).unwrap();
    let owner = owner();
    let terms = Terms::new(Lock::Exclusive, &owner);
    let mut image = open::open(&path, Access::ReadWrite, &terms).unwrap();
    let generation = image.hold.generation().unwrap();
    image.hold.begin_move_away(&|| ()).unwrap();
    image.hold.settle().unwrap();
    drop(image.backend);
    drop(image.hold);
    let newest = inspect(&path, None).unwrap().newest.unwrap().unwrap();
    assert_eq!((newest.phase, newest.generation), (Phase::Moved, generation + 1));
    let refused = open::open(&path, Access::ReadWrite, &terms)
        .map(drop)
        .unwrap_err();
    assert!(refused.to_string().contains("what was left behind"), "{refused}");
    break_lease(&path, None, &owner).unwrap();
    open::open(&path, Access::ReadWrite, &terms).map(drop).unwrap();
}

#[test]
fn an_image_that_is_not_left_behind_after_all_is_its_owners_as_before() {
    let directory = tempfile::tempdir().unwrap();
    let path = path_in(&directory);
    File::create(&path).unwrap().set_len(MIB).unwrap();
    let owner = owner();
    let terms = Terms::new(Lock::Exclusive, &owner);
    let mut image = open::open(&path, Access::ReadWrite, &terms).unwrap();
    image.hold.begin_move_away(&|| ()).unwrap();
    // It is also had back where nobody has waited for the record.
    image.hold.take_back(None).unwrap();
    image.hold.take_back(None).unwrap();
    let newest = inspect(&path, None).unwrap().newest.unwrap().unwrap();
    assert_eq!(newest.phase, Phase::Reclaimed);
    image.hold.begin_raise(&|| ()).unwrap();
    image.hold.settle().unwrap();
    drop(image.backend);
    drop(image.hold);
    let newest = inspect(&path, None).unwrap().newest.unwrap().unwrap();
    assert_eq!(newest.phase, Phase::Released);
}

#[test]
fn a_copy_takes_the_place_of_an_image_that_was_left_behind_and_removed() {
    let directory = tempfile::tempdir().unwrap();
    let path = path_in(&directory);
    File::create(&path).unwrap().set_len(MIB).unwrap();
    let owner = owner();
    let terms = Terms::new(Lock::Exclusive, &owner);
    let mut image = open::open(&path, Access::ReadWrite, &terms).unwrap();
    image.hold.begin_move_away(&|| ()).unwrap();
    image.hold.settle().unwrap();
    drop(image.backend);
    drop(image.hold);
    fs::remove_file(&path).unwrap();
    let mut copy = Duplicate::create(&path, None, MIB, &owner).unwrap();
    copy.finish().unwrap();
    copy.open_up();
    open::open(&path, Access::ReadWrite, &terms).map(drop).unwrap();
    copy.keep();
}

#[test]
fn of_an_overlay_whole_clusters_are_what_a_change_has_changed() {
    let directory = tempfile::tempdir().unwrap();
    let base = path_in(&directory);
    File::create(&base).unwrap().set_len(MIB).unwrap();
    let config = OverlayConfig {
        base,
        path: directory.path().join("over").to_str().unwrap().to_owned(),
        keep: true,
    };
    let owner = owner();
    let terms = Terms::new(Lock::Exclusive, &owner);
    let image = config.open(&terms).unwrap();
    let original = Original::of_overlay(&config.path, image.hold.overlay().unwrap()).unwrap();
    assert_eq!(original.size_bytes(), fs::metadata(&config.path).unwrap().len());
    assert_eq!(
        original.places(&(5000..5001)),
        DATA_OFFSET_BYTES + 4096..DATA_OFFSET_BYTES + 8192
    );
    assert_eq!(
        original.places(&(4096..12288)),
        DATA_OFFSET_BYTES + 4096..DATA_OFFSET_BYTES + 12288
    );
    assert_eq!(original.ledger(), 0..DATA_OFFSET_BYTES);
    let ledger_bytes = original.ledger_bytes().unwrap();
    assert!((4096..MIB).contains(&ledger_bytes), "{ledger_bytes}");
    // It has no part in the lease of the file either.
    drop(original);
    let stranger = Owner::of_this_process("stranger");
    assert!(config.open(&Terms::new(Lock::Exclusive, &stranger)).is_err());
    // Another file that has its name by now is not what the disk has.
    fs::rename(&config.path, directory.path().join("moved")).unwrap();
    fs::copy(directory.path().join("moved"), &config.path).unwrap();
    let error = Original::of_overlay(&config.path, image.hold.overlay().unwrap()).unwrap_err();
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert_eq!(cause, "another file has its name by now");
}
