//! Persistent memory from a driver's side.
#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use coracle_storage::backend::Access;
use coracle_storage::lease::{Owner, Succession};
use coracle_storage::limit::{RateLimiterConfig, TokenBucketConfig};

use super::*;
use crate::virtio::conformance::{BUFFERS, Subject, conforms, wait_until};
use crate::virtio::device::VirtioDevice;
use crate::virtio::state::DeviceState;
use crate::virtio::testing::{DriverRing, Piece, memory, session};

const RANGE: PmemRange = PmemRange {
    start: 64 << 30,
    size_bytes: REGION_ALIGNMENT_BYTES,
};
const ANSWERS: u64 = BUFFERS + 0x1000;
const FLUSH: [Piece; 2] = [Piece::Readable(BUFFERS, 4), Piece::Writable(ANSWERS, 4)];
/// What the guest put there before it asked.
const UNANSWERED: u32 = 0x5555_5555;
const FAILED: u32 = u32::MAX;

fn medium(size_bytes: u64, access: Access) -> (tempfile::NamedTempFile, Arc<Medium>) {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(size_bytes).unwrap();
    let opened = File::options()
        .read(true)
        .write(access == Access::ReadWrite)
        .open(file.path());
    let medium = Medium::new(Arc::new(opened.unwrap()), size_bytes, access);
    (file, Arc::new(medium))
}

fn device(config: &PmemConfig, medium: &Arc<Medium>) -> (Pmem, PmemControl) {
    Pmem::new(config, Arc::clone(medium), RANGE, |_| ()).unwrap()
}

fn driver() -> DriverRing {
    let driver = DriverRing::new(&memory(1 << 20), 0x1000, 16);
    driver.write(ANSWERS, &UNANSWERED.to_le_bytes().repeat(16));
    driver
}

fn used(driver: &mut DriverRing, count: usize) -> Vec<(u32, u32)> {
    let mut used = Vec::new();
    wait_until(
        || {
            used.extend(driver.take_used());
            used.len() >= count
        },
        "requests are answered",
    );
    used
}

fn answer(driver: &DriverRing) -> u32 {
    u32::from_le_bytes(driver.read(ANSWERS, 4).try_into().unwrap())
}

#[test]
fn persistent_memory_keeps_the_promises_of_every_device() {
    conforms(&Subject {
        make: || {
            // The open file outlives its name.
            let (_file, medium) = medium(REGION_ALIGNMENT_BYTES, Access::ReadWrite);
            Box::new(device(&PmemConfig::default(), &medium).0)
        },
        offer: |driver| {
            driver.write(ANSWERS, &UNANSWERED.to_le_bytes());
            driver.offer_chain(&FLUSH);
        },
        writes_buffers: true,
    });
}

#[test]
fn its_configuration_space_says_where_it_is() {
    let (_file, medium) = medium(REGION_ALIGNMENT_BYTES, Access::ReadWrite);
    let (mut device, _) = device(&PmemConfig::default(), &medium);
    device.write_config(0, &[0xff; 16]);
    let mut space = [0xee; 24];
    device.read_config(0, &mut space);
    let fields = [RANGE.start, RANGE.size_bytes, 0].map(u64::to_le_bytes).concat();
    assert_eq!(space.to_vec(), fields);
    let elsewhere = PmemRange {
        start: RANGE.start + REGION_ALIGNMENT_BYTES,
        ..RANGE
    };
    assert!(device.restore(&DeviceState::Pmem(RANGE)).is_ok());
    assert!(device.restore(&DeviceState::Pmem(elsewhere)).is_err());
    assert!(device.restore(&DeviceState::Entropy).is_err());
}

#[test]
fn requests_that_are_there_together_are_answered_by_one_flush() {
    let (_file, medium) = medium(REGION_ALIGNMENT_BYTES, Access::ReadWrite);
    let (mut device, control) = device(&PmemConfig::default(), &medium);
    let mut driver = driver();
    for at in 0..8 {
        driver.offer_chain(&[Piece::Readable(BUFFERS, 4), Piece::Writable(ANSWERS + 4 * at, 4)]);
    }
    device.start(session(&driver)).unwrap();
    let used = used(&mut driver, 8);
    assert!(used.iter().all(|(_, written)| *written == 4), "{used:?}");
    assert_eq!(driver.read(ANSWERS, 32), [0; 32]);
    assert_eq!(control.counts().flushes.load(Ordering::Relaxed), 1);
}

#[test]
fn what_is_no_flush_fails_and_the_next_one_does_not() {
    let (_file, medium) = medium(REGION_ALIGNMENT_BYTES, Access::ReadWrite);
    let (mut device, control) = device(&PmemConfig::default(), &medium);
    let mut driver = driver();
    driver.write(BUFFERS + 8, &1_u32.to_le_bytes());
    let wrong: [&[Piece]; 5] = [
        &[Piece::Readable(BUFFERS + 8, 4), Piece::Writable(ANSWERS, 4)],
        &[Piece::Readable(BUFFERS, 3), Piece::Writable(ANSWERS, 4)],
        &[Piece::Writable(ANSWERS, 4)],
        &[Piece::Readable(BUFFERS, 4)],
        &[Piece::Readable(BUFFERS, 4), Piece::Writable(ANSWERS + 8, 3)],
    ];
    for chain in wrong {
        driver.offer_chain(chain);
    }
    device.start(session(&driver)).unwrap();
    let written: Vec<u32> = used(&mut driver, 5).iter().map(|(_, written)| *written).collect();
    assert_eq!(written, [4, 4, 4, 0, 3]);
    assert_eq!(answer(&driver), FAILED);
    assert_eq!(control.counts().guest_faults.load(Ordering::Relaxed), 5);
    assert_eq!(control.counts().flushes.load(Ordering::Relaxed), 0);
    device.stop().unwrap();
    let mut driver = self::driver();
    driver.offer_chain(&FLUSH);
    device.start(session(&driver)).unwrap();
    used(&mut driver, 1);
    assert_eq!(answer(&driver), 0);
}

#[test]
fn a_file_that_was_cut_is_flushed_no_more_even_when_it_is_whole_again() {
    let (file, medium) = medium(2 * REGION_ALIGNMENT_BYTES, Access::ReadWrite);
    let (tell, told) = channel();
    let on_cut = move |error: &FlushError| drop(tell.send(error.to_string()));
    let made = Pmem::new(&PmemConfig::default(), Arc::clone(&medium), RANGE, on_cut);
    let (mut device, control) = made.unwrap();
    let mut driver = driver();
    driver.offer_chain(&FLUSH);
    let mut session = session(&driver);
    for (size_bytes, expected) in [
        (2 * REGION_ALIGNMENT_BYTES, 0),
        (REGION_ALIGNMENT_BYTES, FAILED),
        (2 * REGION_ALIGNMENT_BYTES, FAILED),
    ] {
        file.as_file().set_len(size_bytes).unwrap();
        driver.write(ANSWERS, &UNANSWERED.to_le_bytes());
        device.start(session).unwrap();
        used(&mut driver, 1);
        assert_eq!(answer(&driver), expected, "{size_bytes} bytes");
        session = device.stop().unwrap().unwrap();
        driver.offer_chain(&FLUSH);
    }
    assert_eq!(control.counts().flush_fails.load(Ordering::Relaxed), 2);
    assert!(matches!(medium.flush(), Err(FlushError::Earlier)));
    assert!(told.try_iter().count() >= 1, "whoever flushes notices it");
    // Nobody flushes.
    driver.offer_chain(&FLUSH);
    device.start(session).unwrap();
    used(&mut driver, 1);
    file.as_file().set_len(1).unwrap();
    let said = told.recv_timeout(Duration::from_secs(10)).unwrap();
    assert!(said.contains("the file has 1 bytes, and not 4194304"), "{said}");
}

#[test]
fn a_file_that_is_written_is_made_as_long_as_what_its_guest_sees() {
    let (file, writable) = medium(REGION_ALIGNMENT_BYTES + 1, Access::ReadWrite);
    file.as_file().write_all_at(&[7], REGION_ALIGNMENT_BYTES).unwrap();
    assert_eq!(writable.region_bytes(), Some(2 * REGION_ALIGNMENT_BYTES));
    assert!(matches!(writable.check_whole(), Err(FlushError::Cut { .. })));
    writable.complete().unwrap();
    writable.check_whole().unwrap();
    let mut end = [0xee; 2];
    file.as_file()
        .read_exact_at(&mut end, REGION_ALIGNMENT_BYTES)
        .unwrap();
    assert_eq!(end, [7, 0]);
    // One that has grown meanwhile is not cut.
    file.as_file().set_len(5 * REGION_ALIGNMENT_BYTES).unwrap();
    writable.complete().unwrap();
    let length = || file.as_file().metadata().unwrap().len();
    assert_eq!(length(), 5 * REGION_ALIGNMENT_BYTES);

    let (file, readable) = medium(5, Access::ReadOnly);
    readable.complete().unwrap();
    readable.flush().unwrap();
    assert_eq!(file.as_file().metadata().unwrap().len(), 5);
    file.as_file().set_len(4).unwrap();
    assert!(matches!(
        readable.flush(),
        Err(FlushError::Cut {
            now_bytes: 4,
            size_bytes: 5
        })
    ));
    let (_file, endless) = medium(1, Access::ReadOnly);
    assert_eq!(endless.region_bytes(), Some(REGION_ALIGNMENT_BYTES));
    let endless = Medium::new(
        Arc::new(tempfile::tempfile().unwrap()),
        u64::MAX,
        Access::ReadOnly,
    );
    assert_eq!(endless.region_bytes(), None);
}

fn limited(ops: u64, refill_time: u64) -> RateLimiterConfig {
    RateLimiterConfig {
        bandwidth: None,
        ops: Some(TokenBucketConfig {
            size: ops,
            one_time_burst: None,
            refill_time,
        }),
    }
}

#[test]
fn a_limited_flush_waits_in_the_ring_until_the_limit_is_another() {
    let (_file, medium) = medium(REGION_ALIGNMENT_BYTES, Access::ReadWrite);
    let config = PmemConfig {
        rate_limiter: Some(limited(1, 3_600_000)),
        ..PmemConfig::default()
    };
    let (mut device, control) = device(&config, &medium);
    let mut driver = driver();
    driver.offer_chain(&FLUSH);
    device.start(session(&driver)).unwrap();
    used(&mut driver, 1);
    let session = device.stop().unwrap().unwrap();
    driver.offer_chain(&FLUSH);
    device.start(session).unwrap();
    let throttled = &control.counts().throttled;
    wait_until(|| throttled.load(Ordering::Relaxed) > 0, "the limit is asked");
    let started = Instant::now();
    let session = device.stop().unwrap().unwrap();
    assert!(started.elapsed() < Duration::from_secs(5));
    let ring = &session.queues.first().unwrap().as_ref().unwrap().ring;
    assert_eq!((ring.in_flight(), ring.has_available()), (0, true));
    device.start(session).unwrap();
    control.limit(limited(0, 0));
    used(&mut driver, 1);
    assert_eq!(answer(&driver), 0);
}

#[test]
fn a_file_is_leased_as_the_image_of_a_drive_is() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("p");
    std::fs::write(&path, [1]).unwrap();
    let owner = Owner::of_this_process("test");
    let config = |path: &Path, read_only| PmemConfig {
        id: "p".to_owned(),
        path_on_host: path.to_str().unwrap().to_owned(),
        read_only,
        ..PmemConfig::default()
    };
    let chain = |error: PmemError| std::error::Error::source(&error).unwrap().to_string();
    let writer = config(&path, false).open(&owner, Succession::Raises).unwrap();
    for read_only in [false, true] {
        assert!(config(&path, read_only).check_file(&owner).is_err());
    }
    drop(writer.medium);
    drop(writer.hold);
    let readers = [true, true].map(|_| config(&path, true).open(&owner, Succession::Raises).unwrap());
    assert!(config(&path, false).check_file(&owner).is_err());
    drop(readers);
    config(&path, false).check_file(&owner).unwrap();

    std::fs::write(&path, []).unwrap();
    for (path, words) in [
        (path.as_path(), "is empty: what a guest has as memory"),
        (Path::new("nfs://host/a/b"), "no path of this host"),
        (directory.path(), "is a directory"),
        (&directory.path().join("nothing"), "there is no image"),
    ] {
        let refused = config(path, true).check_file(&owner).unwrap_err();
        let said = chain(refused);
        assert!(said.contains(words), "{said}");
    }
    assert!(matches!(
        config(Path::new(""), true).check_file(&owner),
        Err(PmemError::PathMissing { .. })
    ));
}
