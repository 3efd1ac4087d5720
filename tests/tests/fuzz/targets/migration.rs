//! What the source of a migration sends: an input is its side of one connection, as a target hears it.

use std::io::{self, BufRead, Cursor, Read, Write};
use std::sync::Arc;

use coracle_devices::virtio::blk::DriveConfig;
use coracle_storage::lease::Owner;
use coracle_vmm::keys::ReadingKeys;
use coracle_vmm::memory::{Backing, PageSize, allocate};
use coracle_vmm::migration::disks::Copies;
use coracle_vmm::migration::hello::{CopyOffer, Hello};
use coracle_vmm::migration::join::{Admission, Join};
use coracle_vmm::migration::landing::Landing;
use coracle_vmm::migration::progress::Progress;
use coracle_vmm::migration::receive::{Intake, take_memory, take_share};
use coracle_vmm::migration::wire::{Kind, Wire};
use coracle_vmm::state::{State, whole};

/// Somebody who says what it says, whatever it is told.
pub(super) struct Said<'a>(pub(super) Cursor<&'a [u8]>);

impl Read for Said<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl BufRead for Said<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.0.fill_buf()
    }

    fn consume(&mut self, len_bytes: usize) {
        self.0.consume(len_bytes);
    }
}

impl Write for Said<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        Ok(buffer.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

pub(crate) fn run(data: &[u8]) {
    let mut wire = Wire::new(Said(Cursor::new(data)));
    let begun = wire.receive().map(|(kind, body)| (kind, body.to_vec()));
    let memory = allocate(1, Backing::Anonymous, PageSize::Base).expect("a MiB is there");
    let (directory, copies) = copies();
    let mut intake = Intake::new(
        Landing::new(memory),
        Arc::clone(&copies),
        Arc::new(Progress::default()),
    );
    intake.may_be_incomplete();
    match begun {
        Ok((Kind::Hello, body)) => {
            // What is said first decides nothing of how the rest is read.
            if let Ok(hello) = Hello::read(&body) {
                drop(hello.config.config());
            }
            if let Ok(state) = take_memory(&mut wire, &intake)
                && intake.absent().is_ok()
                && let Ok(state) = State::parse(&state, &ReadingKeys::default())
            {
                drop(state.finish());
            }
        }
        Ok((kind, body)) => {
            // A token cannot be guessed, and so the one that is shown is the right one.
            let shown = whole::<Join>(&body).map(|join| join.token);
            if let Ok(token) = shown
                && Admission::new(token, STREAMS).admit(kind, &body).is_ok()
            {
                drop(take_share(&mut wire, &intake));
            }
        }
        Err(_) => {}
    }
    // However much was said of a disk, it is no longer than was offered.
    let found = std::fs::metadata(directory.path().join("disk")).expect("it is there until it is given up");
    assert_eq!(found.len(), DISK_BYTES);
    copies.give_up();
    assert!(
        directory
            .path()
            .read_dir()
            .expect("it can be listed")
            .next()
            .is_none()
    );
}

/// A disk that comes along, and where.
fn copies() -> (tempfile::TempDir, Arc<Copies>) {
    let directory = tempfile::tempdir().expect("a directory can be made");
    let drive = DriveConfig {
        drive_id: "d".to_owned(),
        path_on_host: Some(directory.path().join("disk").to_string_lossy().into_owned()),
        ..DriveConfig::default()
    };
    let offer = CopyOffer {
        id: "d".to_owned(),
        size_bytes: DISK_BYTES,
        data_bytes: 0,
    };
    let copies = Arc::<Copies>::default();
    let created = copies.create(&[offer], &[drive], &Owner::of_this_process("fuzz"));
    created.expect("there is room for a copy");
    (directory, copies)
}

const DISK_BYTES: u64 = 1 << 20;
const STREAMS: u8 = 4;
