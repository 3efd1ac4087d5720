//! Memory files that are right, and those that are not, in each way of loading them.
#![expect(unsafe_code, reason = "a segment points into guest memory")]
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test's panic is its failure"
)]

use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use coracle_storage::backend::Access;
use coracle_storage::pipeline::{Next, Pipeline};
use coracle_storage::raw::Raw;
use coracle_storage::request::{Durability, Operation, Request, Segment};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::*;
use crate::end::End;
use crate::keys::{EncryptionKey, Protection, SigningKey, SnapshotCipher};
use crate::memory::ChunkError;
use crate::memory::chunk::Pages;
use crate::memory::pager::Remains;
use crate::memory::testing::{Dice, Snapshot, owner, resident, touch, waits};
use crate::snapshot::memory::{
    self, CHUNK_BYTES, Content, MemoryId, MemoryTableState, PAGE_BYTES, Seal, SealKind, Untouched,
};

fn lazily(snapshot: &Snapshot) -> (Arc<GuestMemoryMmap>, Pager, Ending) {
    let ending = Ending::new().unwrap();
    let (memory, pager) = restore(snapshot.saved(Verify::Chunks, &owner()), &ending).unwrap();
    (
        memory,
        pager.expect("tests run as root, or with vm.unprivileged_userfaultfd = 1"),
        ending,
    )
}

fn all_of(memory: &GuestMemoryMmap, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    bytes
}

/// Waits until all of it is there.
fn await_all(pager: &Pager) {
    let end = Instant::now() + Duration::from_secs(20);
    let progress = pager.progress();
    while progress.loaded_bytes() < progress.total_bytes() {
        assert!(Instant::now() < end, "{progress:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn memory_is_what_was_saved_and_what_the_guest_wrote_in_whatever_order_it_is_touched() {
    for seed in 0..4 {
        let snapshot = Snapshot::new(16, seed);
        let len = snapshot.bytes.len();
        let (memory, pager, ending) = lazily(&snapshot);
        // Each of two vCPUs writes to its own half of each page, and checks what it reads.
        let touch_all = |half: usize| {
            let mut dice = Dice(seed << 8 | half as u64);
            let mut written = Vec::new();
            for _ in 0..2000 {
                let offset = dice.below(len / PAGE_BYTES) * PAGE_BYTES + half * 2048 + dice.below(2048);
                let address = GuestAddress(offset as u64);
                let found: u8 = memory.read_obj(address).unwrap();
                if !written.contains(&offset) {
                    assert_eq!(found, snapshot.bytes[offset], "seed {seed}, offset {offset:#x}");
                }
                memory.write_obj(!found, address).unwrap();
                written.push(offset);
            }
            written
        };
        let mut expected = snapshot.bytes.clone();
        let written = std::thread::scope(|scope| {
            let other = scope.spawn(|| touch_all(1));
            let mut written = touch_all(0);
            written.extend(other.join().unwrap());
            written
        });
        for offset in written {
            expected[offset] = !expected[offset];
        }
        await_all(&pager);
        assert!(all_of(&memory, len) == expected, "seed {seed}");
        assert_eq!(pager.end(), Remains::Nothing);
        assert!(all_of(&memory, len) == expected, "seed {seed}");
        assert_eq!(ending.announced(), None);
    }
}

#[test]
fn all_memory_comes_without_being_touched_and_holes_take_no_space() {
    let snapshot = Snapshot::new(16, 9);
    let (memory, pager, _) = lazily(&snapshot);
    await_all(&pager);
    assert_eq!(pager.end(), Remains::Nothing);
    let address = memory.get_host_address(GuestAddress(0)).unwrap() as u64;
    for chunk in 0..snapshot.table.chunks() {
        let there = resident(address + (chunk * CHUNK_BYTES) as u64, 16);
        let pages = Pages(snapshot.table.mask(chunk));
        if pages == Pages::NONE {
            assert_eq!(there, 0, "chunk {chunk}");
        } else {
            assert!(there * PAGE_BYTES >= pages.bytes(), "chunk {chunk}");
        }
    }
    assert!(all_of(&memory, snapshot.bytes.len()) == snapshot.bytes);
}

#[test]
fn reads_of_a_disk_into_absent_memory_complete() {
    let snapshot = Snapshot::new(32, 3);
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().write_all_at(&[0xd1; 1 << 20], 0).unwrap();
    let (memory, pager, _) = lazily(&snapshot);
    let geometry = coracle_storage::backend::Geometry {
        size_bytes: 1 << 20,
        logical_block_bytes: 512,
        physical_block_bytes: 4096,
        access: Access::ReadOnly,
        discard: coracle_storage::backend::Discard::Ignored,
    };
    let image = Box::new(Raw::new(Arc::new(disk.reopen().unwrap()), geometry));
    let mut pipeline = Pipeline::new(image, 64).unwrap();
    let mut expected = snapshot.bytes.clone();
    // From the end, where the background comes last; half a page each, so that the other half has to be loaded.
    for at in 1..=64 {
        let offset = snapshot.bytes.len() - at * 3 * PAGE_BYTES;
        let address = memory.get_host_address(GuestAddress(offset as u64)).unwrap();
        pipeline.start(Request {
            tag: at as u64,
            operation: Operation::Read,
            offset_bytes: 0,
            len_bytes: 2048,
            durability: Durability::Cached,
            // SAFETY: the memory outlives the pipeline.
            segments: vec![unsafe { Segment::new(NonNull::new(address).unwrap(), 2048) }],
        });
        expected[offset..offset + 2048].fill(0xd1);
    }
    for _ in 0..64 {
        match pipeline.next(Some(Duration::from_secs(10))).unwrap() {
            Next::Completed(completion) => assert_eq!(completion.outcome, Ok(())),
            other => panic!("{other:?}"),
        }
    }
    await_all(&pager);
    assert!(all_of(&memory, expected.len()) == expected);
}

#[test]
fn a_flipped_bit_ends_the_machine_and_nobody_sees_anything_of_its_chunk() {
    let mut dice = Dice(7);
    for seed in 0..12 {
        let snapshot = Snapshot::new(2, seed);
        let saved = snapshot.saved_chunks();
        let chunk = saved[dice.below(saved.len())];
        let pages = Pages(snapshot.table.mask(chunk));
        let run = pages.runs().last().unwrap();
        let start = chunk * CHUNK_BYTES;
        let offset = start + run.start + dice.below(run.len());
        let flipped = snapshot.bytes[offset] ^ 1 << dice.below(8);
        snapshot
            .file
            .as_file()
            .write_all_at(&[flipped], offset as u64)
            .unwrap();

        let (memory, pager, ending) = lazily(&snapshot);
        let touched = touch(&memory, offset);
        assert!(waits(&touched), "seed {seed}: a damaged byte was seen");
        let Some(End::MemoryLost { reason }) = ending.announced() else {
            panic!("seed {seed}: the end was not announced");
        };
        let names = [snapshot.path.as_str(), &format!("{start:#x}"), "damaged"];
        assert!(names.iter().all(|name| reason.contains(name)), "{reason}");
        let address = memory.get_host_address(GuestAddress(start as u64)).unwrap() as u64;
        assert_eq!(resident(address, 16), 0, "seed {seed}");
        // Others may still come to an end.
        let sound = saved.iter().find(|other| **other != chunk).unwrap();
        let other = sound * CHUNK_BYTES;
        let byte = touch(&memory, other).recv_timeout(Duration::from_secs(5));
        assert_eq!(byte, Ok(snapshot.bytes[other]), "seed {seed}");

        assert_eq!(pager.end(), Remains::Waiters);
        assert!(waits(&touched), "seed {seed}: a damaged byte was seen at the end");
        assert!(
            waits(&touch(&memory, start)),
            "seed {seed}: zeros were seen at the end"
        );
    }
}

#[test]
fn a_file_that_is_cut_off_under_the_pager_ends_the_machine() {
    let snapshot = Snapshot::new(64, 1);
    let (owner, ending) = (owner(), Ending::new().unwrap());
    let saved = snapshot.saved(Verify::Chunks, &owner);
    let image = opened(&saved).unwrap();
    snapshot.file.as_file().set_len(MIB).unwrap();
    let memory = allocate(64, Backing::Anonymous, PageSize::Base).unwrap();
    let guarded = guarded(&memory, PageSize::Base).unwrap();
    let file = Arc::new(Saved {
        path: snapshot.path.clone(),
        table: Arc::clone(&saved.table),
        layout: saved.layout(),
    });
    let pipeline = PreparedPipeline::new(image, DEPTH);
    let pager = Pager::start(guarded, file, pipeline, Vec::new(), ending.clone()).unwrap();
    let end = Instant::now() + Duration::from_secs(10);
    while ending.announced().is_none() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(1));
    }
    let Some(End::MemoryLost { reason }) = ending.announced() else {
        panic!("the end was not announced");
    };
    assert!(reason.contains("shorter than it was"), "{reason}");
    drop(pager);
}

#[test]
fn a_file_of_another_length_or_another_memory_is_refused_in_each_way() {
    let ending = Ending::new().unwrap();
    let owner = owner();
    for verify in [Verify::Chunks, Verify::Off] {
        let snapshot = Snapshot::new(1, 0);
        let mut trailer = Trailer::of(&snapshot.table);
        trailer.id.0[0] ^= 1;
        snapshot
            .file
            .as_file()
            .write_all_at(&trailer.to_bytes(), MIB)
            .unwrap();
        let refused = restore(snapshot.saved(verify, &owner), &ending).unwrap_err();
        assert!(matches!(refused, RestoreError::Stranger { .. }), "{refused:?}");
        for len in [0, 512, MIB, MIB + 3584, MIB + 4608] {
            snapshot.file.as_file().set_len(len).unwrap();
            let refused = restore(snapshot.saved(verify, &owner), &ending).unwrap_err();
            let is_named = crate::api::chain(&refused).contains(&snapshot.path);
            assert!(is_named, "{len} {verify:?}: {refused:?}");
        }
        for (size_bytes, kind) in [(0, Kind::Full), (CHUNK_BYTES as u64, Kind::Full), (MIB, DIFF)] {
            let mut odd = snapshot.saved(verify, &owner);
            odd.table = Arc::new(empty_table(size_bytes, kind));
            let refused = restore(odd, &ending).unwrap_err();
            let is_told = match kind {
                Kind::Full => matches!(refused, RestoreError::Size { .. }),
                Kind::Diff { .. } => matches!(refused, RestoreError::Diff { .. }),
            };
            assert!(is_told, "{refused:?}");
        }
    }
    assert_eq!(ending.announced(), None);
}

const DIFF: Kind = Kind::Diff {
    parent: MemoryId([1; 16]),
};

fn empty_table(size_bytes: u64, kind: Kind) -> MemoryTable {
    let saved = MemoryTableState {
        id: MemoryId([2; 16]),
        size_bytes,
        kind,
        pages: vec![0; usize::try_from(size_bytes).unwrap() / PAGE_BYTES / 8],
        seal: SealKind::Crc32c,
        sums: Vec::new(),
    };
    MemoryTable::restore(&saved, size_bytes, None, None).unwrap()
}

#[test]
fn mapped_memory_is_what_was_saved_and_keeps_what_is_written_to_itself() {
    let snapshot = Snapshot::new(4, 5);
    let ending = Ending::new().unwrap();
    let (memory, pager) = restore(snapshot.saved(Verify::Off, &owner()), &ending).unwrap();
    assert!(pager.is_none());
    assert!(all_of(&memory, snapshot.bytes.len()) == snapshot.bytes);
    memory.write_slice(&[0xee; 8192], GuestAddress(MIB)).unwrap();
    let mut in_file = vec![0; snapshot.bytes.len()];
    snapshot.file.as_file().read_exact_at(&mut in_file, 0).unwrap();
    assert!(in_file == snapshot.bytes);
}

#[test]
fn a_directory_or_a_fifo_is_no_memory_file() {
    let folder = tempfile::tempdir().unwrap();
    let fifo = folder.path().join("fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RWXU).unwrap();
    let (snapshot, ending, owner) = (Snapshot::new(1, 0), Ending::new().unwrap(), owner());
    for path in [folder.path(), fifo.as_path()] {
        for verify in [Verify::Chunks, Verify::Off] {
            let mut saved = snapshot.saved(verify, &owner);
            saved.path = path.to_str().unwrap();
            let refused = restore(saved, &ending).unwrap_err();
            assert!(matches!(refused, RestoreError::Open(_)), "{refused:?}");
        }
    }
}

fn eagerly(snapshot: &Snapshot) -> Result<Vec<u8>, LoadError> {
    let owner = owner();
    let image = opened(&snapshot.saved(Verify::Chunks, &owner)).unwrap();
    let file = Arc::new(Saved {
        path: snapshot.path.clone(),
        table: Arc::clone(&snapshot.table),
        layout: (snapshot.bytes.len() as u64 / MIB).into(),
    });
    let reader = ChunkReader::bind(PreparedPipeline::new(image, DEPTH), file).unwrap();
    let len = snapshot.bytes.len();
    let memory = allocate(len as u64 / MIB, Backing::Anonymous, PageSize::Base).unwrap();
    eager::load(reader, &snapshot.table, &memory)?;
    Ok(all_of(&memory, len))
}

#[test]
fn memory_that_is_loaded_as_a_whole_is_what_was_saved_or_refused() {
    let snapshot = Snapshot::new(8, 11);
    assert!(eagerly(&snapshot).unwrap() == snapshot.bytes);
    let offset = snapshot.first_byte(*snapshot.saved_chunks().last().unwrap());
    let flipped = [snapshot.bytes[offset] ^ 0x10];
    snapshot
        .file
        .as_file()
        .write_all_at(&flipped, offset as u64)
        .unwrap();
    let refused = eagerly(&snapshot).unwrap_err();
    let is_damage = matches!(refused, LoadError::Chunk(ChunkError::Damaged { .. }));
    assert!(is_damage, "{refused:?}");
}

/// The memory of `snapshot` once more, protected otherwise.
fn protected(snapshot: &Snapshot, protection: &Protection) -> Snapshot {
    let memory = allocate(
        snapshot.bytes.len() as u64 / MIB,
        Backing::Anonymous,
        PageSize::Base,
    )
    .unwrap();
    memory.write_slice(&snapshot.bytes, GuestAddress(0)).unwrap();
    snapshot.written_anew(|id, image| {
        let seal = Seal::new(id, protection);
        let content = Content::Full(Untouched::Zeros);
        memory::write(&memory, (id, seal), content, image, &memory::Progress::new()).unwrap()
    })
}

#[test]
fn protected_memory_comes_by_a_pager_and_as_a_whole_and_never_damaged() {
    let cipher = || SnapshotCipher::new(EncryptionKey::of(2)).unwrap();
    for (signing, cipher) in [
        (Some(SigningKey::of(1)), None),
        (None, Some(cipher())),
        (Some(SigningKey::of(1)), Some(cipher())),
    ] {
        let snapshot = protected(&Snapshot::new(8, 5), &Protection { signing, cipher });
        let (memory, pager, _) = lazily(&snapshot);
        await_all(&pager);
        assert!(all_of(&memory, snapshot.bytes.len()) == snapshot.bytes);
        assert!(eagerly(&snapshot).unwrap() == snapshot.bytes);
        if snapshot.table.seal().is_encrypted() {
            // It cannot be mapped, whatever is asked for.
            let (memory, pager) =
                restore(snapshot.saved(Verify::Off, &owner()), &Ending::new().unwrap()).unwrap();
            await_all(&pager.unwrap());
            assert!(all_of(&memory, snapshot.bytes.len()) == snapshot.bytes);
        }
        let offset = snapshot.first_byte(*snapshot.saved_chunks().last().unwrap());
        let mut byte = [0];
        let file = snapshot.file.as_file();
        file.read_exact_at(&mut byte, offset as u64).unwrap();
        file.write_all_at(&byte.map(|byte: u8| byte ^ 1), offset as u64)
            .unwrap();
        let refused = eagerly(&snapshot).unwrap_err();
        assert!(matches!(refused, LoadError::Chunk(ChunkError::Damaged { .. })));
        let (memory, pager, ending) = lazily(&snapshot);
        assert!(waits(&touch(&memory, offset)), "a damaged byte was seen");
        assert!(matches!(ending.announced(), Some(End::MemoryLost { .. })));
        assert_eq!(pager.end(), Remains::Waiters);
    }
}

#[test]
fn memory_cannot_be_seen_between_two_pagers() {
    // A machine that is given up in the middle of its restore, again and again.
    for seed in 0..20 {
        let snapshot = Snapshot::new(4, seed);
        let (memory, pager, ending) = lazily(&snapshot);
        let gone = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let guest = scope.spawn(|| {
                let mut dice = Dice(seed);
                while !gone.load(Ordering::Relaxed) {
                    let offset = dice.below(snapshot.bytes.len());
                    let found: u8 = memory.read_obj(GuestAddress(offset as u64)).unwrap();
                    assert_eq!(found, snapshot.bytes[offset]);
                }
            });
            std::thread::sleep(Duration::from_micros(seed * 100));
            gone.store(true, Ordering::Relaxed);
            guest.join().unwrap();
        });
        assert_eq!(pager.end(), Remains::Nothing);
        assert_eq!(ending.announced(), None);
    }
}

#[test]
fn what_was_touched_in_the_first_second_is_read_first_by_the_next_restore() {
    let snapshot = Snapshot::new(64, 21);
    let saved = snapshot.saved_chunks();
    let asked: Vec<usize> = [300, 200, 201].map(|at| saved[at]).to_vec();
    let (memory, pager, _) = lazily(&snapshot);
    for chunk in &asked {
        let address = GuestAddress(snapshot.first_byte(*chunk) as u64);
        let _: u8 = memory.read_obj(address).unwrap();
    }
    await_all(&pager);
    drop(pager);
    let recorded = learn_working_set(&snapshot.saved(Verify::Chunks, &owner()));
    let recorded = recorded.recv().unwrap();
    // Those that came by themselves before they were touched were not waited for.
    assert!(
        !recorded.is_empty() && recorded.iter().all(|chunk| asked.contains(chunk)),
        "{recorded:?}"
    );
    // A file that is damaged changes nothing but the order.
    std::fs::write(
        format!("{}.ws", snapshot.path),
        b"CORACLWS, and what follows is none",
    )
    .unwrap();
    let (memory, pager, ending) = lazily(&snapshot);
    assert!(all_of(&memory, snapshot.bytes.len()) == snapshot.bytes);
    drop(pager);
    assert_eq!(ending.announced(), None);
}

#[test]
fn a_host_that_refuses_userfaultfd_is_told_what_to_set() {
    let call = "userfaultfd(2)";
    let refused = |errno| UserfaultError {
        call,
        source: io::Error::from_raw_os_error(errno),
    };
    let text = eager_because(&refused(libc::EPERM));
    assert!(
        text.contains("vm.unprivileged_userfaultfd") && text.contains("/dev/userfaultfd"),
        "{text}"
    );
    let text = eager_because(&refused(libc::ENOSYS));
    assert!(
        !text.contains("vm.unprivileged_userfaultfd") && text.contains(call),
        "{text}"
    );
}
