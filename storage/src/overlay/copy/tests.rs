#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::*;
use crate::blocking::Blocking;
use crate::lease::{Lock, Owner, Succession, Terms};
use crate::open::{Hold, Image};
use crate::overlay::{Beginning, MEMORY, OverlayConfig, OverlayError};

/// Not whole clusters, so that the last one is cut off.
const SIZE_BYTES: u64 = (3 << 20) + 512;

struct Rig {
    directory: tempfile::TempDir,
    owner: Owner,
}

impl Rig {
    /// A base of ones.
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(
            directory.path().join("base"),
            vec![1; usize::try_from(SIZE_BYTES).unwrap()],
        )
        .unwrap();
        Self {
            directory,
            owner: Owner::of_this_process("vm"),
        }
    }

    fn path(&self, name: &str) -> String {
        self.directory.path().join(name).to_str().unwrap().to_owned()
    }

    fn config(&self, path: &str) -> OverlayConfig {
        OverlayConfig {
            base: self.path("base"),
            path: path.to_owned(),
            keep: path.ends_with("kept"),
        }
    }

    fn terms(&self) -> Terms<'_> {
        Terms::new(Lock::Exclusive, &self.owner)
    }

    fn opened(&self, path: &str) -> (Blocking, Hold) {
        disk(self.config(path).open(&self.terms()).unwrap())
    }

    fn begun(&self, path: &str, beginning: Beginning<'_>) -> Result<(Blocking, Hold), OverlayError> {
        Ok(disk(self.config(path).begin(beginning, &self.terms())?))
    }

    fn saved(&self, hold: &Hold) -> (std::path::PathBuf, Digest) {
        let path = self.directory.path().join("saved");
        let file = File::create(&path).unwrap();
        let digest = hold.overlay().unwrap().write_to(&file, |_| true).unwrap();
        (path, digest)
    }
}

fn disk(image: Image) -> (Blocking, Hold) {
    (Blocking::new(image.backend).unwrap(), image.hold)
}

fn read(disk: &mut Blocking, offset_bytes: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    disk.read_at(offset_bytes, &mut bytes).unwrap();
    bytes
}

/// What `written` has written is there, and all else is the base.
fn check(disk: &mut Blocking) {
    let bytes = read(disk, 0, usize::try_from(SIZE_BYTES).unwrap());
    for (at, byte) in bytes.iter().enumerate() {
        let expected = match at {
            0x1234..0x5678 => 2,
            0x10_0000..0x10_2000 => 0,
            at if at as u64 >= SIZE_BYTES - 512 => 3,
            _ => 1,
        };
        assert_eq!(*byte, expected, "{at:#x}");
    }
}

fn write(disk: &mut Blocking) {
    disk.write_at(0x1234, &[2; 0x5678 - 0x1234]).unwrap();
    disk.write_at(0x10_0000, &[0; 0x2000]).unwrap();
    disk.write_at(SIZE_BYTES - 512, &[3; 512]).unwrap();
}

#[test]
fn an_overlay_is_taken_up_from_a_file_whatever_it_lay_in_and_the_two_go_on_apart() {
    let rig = Rig::new();
    for from in [MEMORY, &rig.path("temporary"), &rig.path("kept")] {
        let (mut first, hold) = rig.opened(from);
        write(&mut first);
        first.flush().unwrap();
        let (path, digest) = rig.saved(&hold);
        assert_eq!(super::digest(&File::open(&path).unwrap()).unwrap(), digest);
        for to in [MEMORY, &rig.path("other")] {
            let (mut second, second_hold) = rig.begun(to, Beginning::Saved(&path, digest)).unwrap();
            check(&mut second);
            second.write_at(0, &[9; 4096]).unwrap();
            // It can be saved as well, and has all that was saved before.
            let (again, digest) = rig.saved(&second_hold);
            let (mut third, _hold) = rig.begun(MEMORY, Beginning::Saved(&again, digest)).unwrap();
            assert_eq!(read(&mut third, 0, 4096), [9; 4096]);
            assert_eq!(read(&mut third, 0x5000, 0x678), [2; 0x678]);
            check(&mut first);
            rig.saved(&hold);
        }
    }
    assert!(
        std::fs::read(rig.path("base"))
            .unwrap()
            .iter()
            .all(|byte| *byte == 1)
    );
}

#[test]
fn what_an_overlay_does_not_have_takes_no_space_in_the_file() {
    let rig = Rig::new();
    let (mut disk, hold) = rig.opened(MEMORY);
    disk.write_at(1 << 20, &[5; 4096]).unwrap();
    let (path, digest) = rig.saved(&hold);
    let metadata = std::fs::metadata(path).unwrap();
    assert_eq!(metadata.len(), digest.length_bytes);
    assert!(
        metadata.blocks() * 512 <= 128 << 10,
        "{} blocks",
        metadata.blocks()
    );
}

#[test]
fn no_change_of_the_file_goes_unnoticed() {
    let rig = Rig::new();
    let (mut disk, hold) = rig.opened(MEMORY);
    write(&mut disk);
    let (path, digest) = rig.saved(&hold);
    let good = std::fs::read(&path).unwrap();
    let data = usize::try_from(DATA_OFFSET_BYTES).unwrap();
    let bits = usize::try_from(BITMAP_OFFSET_BYTES).unwrap();
    let places = [
        0,
        9,
        71,
        4095,
        4096,
        8191,
        100_000,
        bits,
        bits + 4095,
        bits + 8192,
        data - 1,
        data + 0x1234,
    ];
    let ends = [data + 0x5677, data + 0x10_0000, good.len() - 1];
    for at in places.into_iter().chain(ends) {
        let mut bad = good.clone();
        *bad.get_mut(at).unwrap() ^= 0x10;
        std::fs::write(&path, bad).unwrap();
        refuses(&rig, &path, digest);
    }
    // A block in the place of another.
    let mut moved = good.clone();
    moved.copy_within(data + 0x2000..data + 0x3000, data + 0x8000);
    moved.get_mut(data + 0x2000..data + 0x3000).unwrap().fill(0);
    for bad in [
        moved,
        good.get(..good.len() - 1).unwrap().to_vec(),
        [good.as_slice(), &[0]].concat(),
    ] {
        std::fs::write(&path, bad).unwrap();
        refuses(&rig, &path, digest);
    }
    std::fs::write(&path, good).unwrap();
    rig.begun(MEMORY, Beginning::Saved(&path, digest)).unwrap();
}

fn refuses(rig: &Rig, path: &Path, digest: Digest) {
    match rig.begun(MEMORY, Beginning::Saved(path, digest)) {
        Err(OverlayError::Damaged { path: named }) => assert_eq!(Path::new(&named), path),
        // Some are no overlays any more.
        Err(OverlayError::File(
            FileError::NotAnOverlay { path: named, .. } | FileError::Truncated { path: named, .. },
        )) => {
            assert_eq!(Path::new(&named), path);
        }
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("it was taken"),
    }
}

#[test]
fn a_file_over_another_base_is_refused() {
    let rig = Rig::new();
    let (mut disk, hold) = rig.opened(MEMORY);
    write(&mut disk);
    let (path, digest) = rig.saved(&hold);
    drop((disk, hold));
    std::fs::write(rig.path("base"), vec![7; usize::try_from(SIZE_BYTES).unwrap()]).unwrap();
    let refusal = rig.begun(MEMORY, Beginning::Saved(&path, digest)).err().unwrap();
    assert!(matches!(refusal, OverlayError::WrongBase { .. }), "{refusal}");
}

#[test]
fn a_disk_is_shared_by_overlays_that_keep_its_generation_and_its_writers_away() {
    let rig = Rig::new();
    let base = rig.path("base");
    let write_base = |succession| {
        let terms = Terms {
            succession,
            ..rig.terms()
        };
        crate::open::open(&base, crate::backend::Access::ReadWrite, &terms)
    };
    let begin = |succession| {
        let terms = Terms {
            succession,
            ..rig.terms()
        };
        rig.config(MEMORY).begin(Beginning::Disk, &terms)
    };
    let writer = write_base(Succession::Raises).unwrap();
    assert_eq!(writer.hold.generation(), Some(1));
    for succession in [Succession::Keeps(1), Succession::Raises] {
        let refusal = error(begin(succession));
        assert!(refusal.contains("this machine has it already"), "{refusal}");
    }
    drop(writer);
    let readers = [
        begin(Succession::Keeps(1)).unwrap(),
        begin(Succession::Keeps(1)).unwrap(),
    ];
    assert!(readers.iter().all(|reader| reader.hold.generation().is_none()));
    assert!(write_base(Succession::Raises).is_err());
    drop(readers);
    // It is as it was, and then it is not.
    drop(write_base(Succession::Keeps(1)).unwrap());
    drop(write_base(Succession::Raises).unwrap());
    let refusal = error(begin(Succession::Keeps(1)));
    assert!(
        refusal.contains("it was of generation 1 then, and is of 2 now"),
        "{refusal}"
    );
    begin(Succession::Raises).unwrap();
}

#[test]
fn a_kept_overlay_is_begun_with_as_it_was_and_left_alone() {
    let rig = Rig::new();
    let kept = rig.path("kept");
    let begin = |succession| {
        let terms = Terms {
            succession,
            ..rig.terms()
        };
        rig.config(MEMORY).begin(Beginning::Overlay(&kept), &terms)
    };
    let (mut first, hold) = rig.opened(&kept);
    write(&mut first);
    first.flush().unwrap();
    assert!(begin(Succession::Raises).is_err(), "it is written just now");
    drop((first, hold));
    let before = std::fs::read(&kept).unwrap();
    let (mut copy, _hold) = disk(begin(Succession::Keeps(1)).unwrap());
    check(&mut copy);
    copy.write_at(0, &[9; 4096]).unwrap();
    assert!(std::fs::read(&kept).unwrap() == before, "it was changed");
    // Nobody needs it any more.
    drop(rig.opened(&kept));
    let refusal = error(begin(Succession::Keeps(1)));
    assert!(
        refusal.contains("it was of generation 1 then, and is of 2 now"),
        "{refusal}"
    );
    begin(Succession::Raises).unwrap();
}

fn error(begun: Result<Image, impl Into<OverlayError>>) -> String {
    let mut error: Option<&dyn std::error::Error> = None;
    let begun = begun.err().map(Into::into).expect("it is refused");
    let mut text = begun.to_string();
    error.replace(&begun);
    while let Some(source) = error.and_then(std::error::Error::source) {
        text = format!("{text}: {source}");
        error = Some(source);
    }
    text
}

#[test]
fn a_copy_that_nobody_wants_any_more_ends() {
    let rig = Rig::new();
    let (mut disk, hold) = rig.opened(MEMORY);
    write(&mut disk);
    let view = hold.overlay().unwrap().clone();
    let cancelled = view.write_to(&tempfile::tempfile().unwrap(), |_| false);
    assert!(matches!(cancelled, Err(CopyError::Cancelled)), "{cancelled:?}");
    drop((disk, hold));
    let gone = view.write_to(&tempfile::tempfile().unwrap(), |_| true);
    assert!(matches!(gone, Err(CopyError::Gone)), "{gone:?}");
}
