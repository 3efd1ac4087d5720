#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

use std::fs;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, mpsc};

use super::*;
use crate::backend::Access;
use crate::open::{Image, OpenError, check, open};

struct Rig {
    directory: tempfile::TempDir,
    image: String,
}

impl Rig {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("a.img");
        fs::write(&image, [0; 512]).unwrap();
        Self {
            image: image.to_str().unwrap().to_owned(),
            directory,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn newest(&self) -> Option<Record> {
        Chain::of(Path::new(&self.image)).unwrap().newest().unwrap()
    }

    /// What a machine leaves that was killed while it held generation 1.
    fn crashed(&self, host: Option<&str>) {
        let mut owner = machine("crashed", 1);
        owner.pid = 0x7fff_fffe;
        owner.host = host.map_or(owner.host, str::to_owned);
        let record = Record::after(None, Phase::Held, &owner).unwrap();
        Chain::of(Path::new(&self.image))
            .unwrap()
            .append(&record)
            .unwrap();
    }
}

/// A machine in a process of its own, as far as can be told from its identity.
fn machine(vm: &str, life: u8) -> Owner {
    Owner {
        incarnation: Incarnation::parse(&format!("{life:032x}")).unwrap(),
        ..Owner::of_this_process(vm)
    }
}

fn write(path: &str, owner: &Owner) -> Result<Image, OpenError> {
    open(path, Access::ReadWrite, &Terms::new(Lock::Exclusive, owner))
}

fn read(path: &str, owner: &Owner) -> Result<Image, OpenError> {
    open(path, Access::ReadOnly, &Terms::new(Lock::Shared, owner))
}

fn refused(opened: Result<Image, OpenError>) -> LeaseError {
    match opened.err() {
        Some(OpenError::Lease(error)) => error,
        Some(error) => panic!("{error}"),
        None => panic!("the lease is granted"),
    }
}

#[test]
fn a_second_machine_is_told_who_has_the_image() {
    let rig = Rig::new();
    let _first = write(&rig.image, &machine("vm1", 1)).unwrap();
    let error = refused(write(&rig.image, &machine("vm2", 2)));
    let text = error.to_string();
    assert!(matches!(error, LeaseError::Held { .. }), "{text}");
    let pid = format!("(pid {} on ", std::process::id());
    for part in [
        &rig.image,
        "generation 1 is held by VM `vm1`",
        &pid,
        " since 20",
        " UTC; stop",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(matches!(
        refused(read(&rig.image, &machine("vm2", 2))),
        LeaseError::Held { .. }
    ));
}

#[test]
fn a_second_life_of_the_same_machine_is_a_stranger() {
    let rig = Rig::new();
    let _first = write(&rig.image, &machine("vm1", 1)).unwrap();
    let error = refused(write(&rig.image, &machine("vm1", 2)));
    assert!(matches!(error, LeaseError::Held { .. }), "{error}");
}

#[test]
fn one_machine_writes_an_image_once_by_whatever_name() {
    let rig = Rig::new();
    let owner = machine("vm1", 1);
    fs::hard_link(&rig.image, rig.path("hard")).unwrap();
    std::os::unix::fs::symlink(&rig.image, rig.path("soft")).unwrap();
    let handed_in = fs::File::open(&rig.image).unwrap();
    let duplicate = handed_in.try_clone().unwrap();
    let by_fd = |place: &str, file: &fs::File| format!("{place}/{}", file.as_raw_fd());
    let first = write(&by_fd("/dev/fd", &handed_in), &owner).unwrap();
    assert!(first.hold.is_of(&rig.image));
    for name in [
        rig.image.clone(),
        rig.path("soft").display().to_string(),
        by_fd("/dev/fd", &handed_in),
        by_fd("/proc/self/fd", &duplicate),
    ] {
        assert!(first.hold.is_of(&name), "{name}");
        let error = refused(write(&name, &owner));
        assert!(matches!(error, LeaseError::HeldHere { .. }), "{name}: {error}");
    }
    // The records of a hard link are beside it, so nobody is known by name.
    let error = refused(write(rig.path("hard").to_str().unwrap(), &owner));
    assert!(
        matches!(
            error,
            LeaseError::InUse {
                conflict: Conflict::Writer,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn an_end_is_recorded_and_the_next_start_is_another_generation() {
    let rig = Rig::new();
    for generation in 1..4 {
        let mut image = write(&rig.image, &machine("vm1", 1)).unwrap();
        let held = rig.newest().unwrap();
        assert_eq!((held.phase, held.generation), (Phase::Held, generation));
        image.hold.settle().expect("once more changes nothing");
        let Image { backend, hold } = image;
        drop(backend);
        drop(hold);
        let released = rig.newest().unwrap();
        assert_eq!(
            (released.phase, released.generation),
            (Phase::Released, generation)
        );
        assert_eq!(released.epoch, held.epoch + 1);
    }
}

#[test]
fn an_image_that_was_left_behind_in_use_keeps_its_lease() {
    let rig = Rig::new();
    let Image { backend, hold } = write(&rig.image, &machine("vm1", 1)).unwrap();
    drop(hold);
    assert_eq!(rig.newest().unwrap().phase, Phase::Held);
    assert!(write(&rig.image, &machine("vm2", 2)).is_err());
    drop(backend);
    assert!(write(&rig.image, &machine("vm2", 2)).is_ok());
}

#[test]
fn who_was_killed_is_followed_and_remembered() {
    let rig = Rig::new();
    rig.crashed(None);
    let image = write(&rig.image, &machine("vm2", 2)).unwrap();
    let held = rig.newest().unwrap();
    assert_eq!((held.owner.vm.as_str(), held.generation), ("vm2", 2));
    let error = refused(write(&rig.image, &machine("vm3", 3)));
    assert!(error.to_string().contains("`vm2`"), "{error}");
    drop(image);
}

#[test]
fn a_file_that_was_moved_from_another_host_is_not_held_by_it() {
    let rig = Rig::new();
    rig.crashed(Some("elsewhere.invalid"));
    assert!(write(&rig.image, &machine("vm2", 2)).is_ok());
}

#[test]
fn readers_share_an_image_and_leave_no_record() {
    let rig = Rig::new();
    let readers: Vec<_> = (1..=3)
        .map(|life| read(&rig.image, &machine("vm", life)).unwrap())
        .collect();
    assert_eq!(rig.newest(), None);
    let error = refused(write(&rig.image, &machine("vm4", 4)));
    assert!(
        matches!(
            error,
            LeaseError::InUse {
                conflict: Conflict::Reader,
                ..
            }
        ),
        "{error}"
    );
    drop(readers);
    assert!(write(&rig.image, &machine("vm4", 4)).is_ok());
}

#[test]
fn a_lock_of_somebody_without_a_record_is_described() {
    let rig = Rig::new();
    // The record names a machine that is gone; the lock is another's.
    rig.crashed(None);
    let other = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&rig.image)
        .unwrap();
    ofd::take(&other, Role::Writer).unwrap();
    let text = refused(write(&rig.image, &machine("vm1", 1))).to_string();
    let inode = format!("inode {}", place::inode(&other));
    for part in ["such as QEMU", "fuser -v ", &inode] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[test]
fn a_lock_that_falls_a_moment_later_is_waited_for() {
    let rig = Rig::new();
    rig.crashed(None);
    let other = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&rig.image)
        .unwrap();
    ofd::take(&other, Role::Writer).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            thread::sleep(Duration::from_millis(50));
            drop(other);
        });
        // Also by the look ahead: who starts a killed machine again configures it first.
        let owner = &machine("vm1", 1);
        let terms = Terms::new(Lock::Exclusive, owner);
        assert!(check(&rig.image, Access::ReadWrite, &terms).is_ok());
        assert!(write(&rig.image, owner).is_ok());
    });
}

#[test]
fn an_image_without_a_place_for_records_has_a_lock_only() {
    let file = fs::File::from(rustix::fs::memfd_create("image", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
    file.set_len(512).unwrap();
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let _first = write(&path, &machine("vm1", 1)).unwrap();
    let error = refused(write(&path, &machine("vm2", 2)));
    assert!(matches!(error, LeaseError::InUse { .. }), "{error}");
}

#[test]
fn records_are_where_they_are_asked_for() {
    let rig = Rig::new();
    let owner = machine("vm1", 1);
    let at = rig.path("leases-of-a").to_str().unwrap().to_owned();
    let terms = |at| Terms {
        at,
        ..Terms::new(Lock::Exclusive, &owner)
    };
    let image = open(&rig.image, Access::ReadWrite, &terms(Some(at.as_str()))).unwrap();
    assert!(rig.path("leases-of-a.lease.1").exists() && rig.newest().is_none());
    drop(image);
    // Who names a place wants records: there is no going without.
    let absent = rig.path("absent/a").to_str().unwrap().to_owned();
    let refused = open(&rig.image, Access::ReadWrite, &terms(Some(absent.as_str()))).err();
    let refused = refused.unwrap();
    assert!(
        matches!(
            refused,
            OpenError::Lease(LeaseError::Chain {
                source: ChainError::NoPlace { .. },
                ..
            })
        ),
        "{refused}"
    );
    assert!(write(&rig.image, &owner).is_ok());
}

#[test]
fn a_look_ahead_changes_nothing() {
    let rig = Rig::new();
    let owner = &machine("vm2", 2);
    let terms = Terms::new(Lock::Exclusive, owner);
    check(&rig.image, Access::ReadWrite, &terms).unwrap();
    assert_eq!(rig.newest(), None);
    let _first = write(&rig.image, &machine("vm1", 1)).unwrap();
    let refused = check(&rig.image, Access::ReadWrite, &terms).unwrap_err();
    assert!(
        matches!(refused, OpenError::Lease(LeaseError::Held { .. })),
        "{refused}"
    );
}

#[test]
fn who_wants_no_lease_gets_none() {
    let rig = Rig::new();
    let _first = write(&rig.image, &machine("vm1", 1)).unwrap();
    let owner = &machine("vm2", 2);
    assert!(open(&rig.image, Access::ReadWrite, &Terms::new(Lock::None, owner)).is_ok());
    assert_eq!(rig.newest().unwrap().epoch, 1);
}

#[test]
fn records_that_cannot_be_read_are_an_error_until_they_are_broken() {
    let rig = Rig::new();
    fs::write(rig.path("a.img.lease.7"), "garbage").unwrap();
    let error = refused(write(&rig.image, &machine("vm1", 1)));
    assert!(error.to_string().contains("coraclectl lease break"), "{error}");
    let broken = break_lease(&rig.image, None, &machine("operator", 9)).unwrap();
    assert_eq!((broken.epoch, broken.phase), (8, Phase::Broken));
    let _image = write(&rig.image, &machine("vm1", 1)).unwrap();
    // Whatever the generation was that cannot be read, the next one is above it.
    assert_eq!(rig.newest().unwrap().generation, 8);
}

#[test]
fn only_a_lease_whose_owner_is_gone_can_be_broken() {
    let rig = Rig::new();
    let operator = machine("operator", 9);
    let broken = |rig: &Rig| match break_lease(&rig.image, None, &operator) {
        Ok(record) => Ok(record),
        Err(OpenError::Lease(error)) => Err(error),
        Err(error) => panic!("{error}"),
    };
    assert!(matches!(broken(&rig), Err(LeaseError::Free { .. })));
    let image = write(&rig.image, &machine("vm1", 1)).unwrap();
    assert!(matches!(broken(&rig), Err(LeaseError::Held { .. })));
    assert_eq!(rig.newest().unwrap().phase, Phase::Held);
    drop(image);
    assert!(matches!(broken(&rig), Err(LeaseError::Free { .. })));
    let rig = Rig::new();
    rig.crashed(None);
    assert_eq!(broken(&rig).unwrap(), rig.newest().unwrap());
    assert_eq!(rig.newest().unwrap().phase, Phase::Broken);
}

#[test]
fn a_standing_tells_the_record_and_the_fence() {
    let rig = Rig::new();
    let standing = inspect(&rig.image, None).unwrap();
    assert!(standing.fence.is_none() && standing.newest.unwrap().is_none());
    assert!(standing.records.unwrap().ends_with("a.img.lease.<n>"));
    let _image = write(&rig.image, &machine("vm1", 1)).unwrap();
    let standing = inspect(&rig.image, None).unwrap();
    assert_eq!(standing.fence, Some(Conflict::Writer));
    assert_eq!(standing.newest.unwrap(), rig.newest());
}

fn keep(path: &str, generation: u64, owner: &Owner) -> Result<Image, OpenError> {
    let terms = Terms {
        succession: Succession::Keeps(generation),
        ..Terms::new(Lock::Exclusive, owner)
    };
    open(path, Access::ReadWrite, &terms)
}

fn raise(image: &mut Image) {
    image.hold.begin_raise(&|| ()).unwrap();
    image.hold.settle().unwrap();
    assert!(image.hold.is_settled());
}

#[test]
fn whoever_is_told_that_a_generation_is_raised_finds_it_so() {
    let rig = Rig::new();
    let mut image = write(&rig.image, &machine("vm1", 1)).unwrap();
    let (tell, told) = mpsc::channel();
    let (let_go, held) = mpsc::channel();
    let held = Arc::new(Mutex::new(held));
    let raised = move || {
        tell.send(()).unwrap();
        let _ = held.lock().unwrap().recv();
    };
    image.hold.begin_raise(&raised).unwrap();
    told.recv().unwrap();
    assert!(image.hold.is_settled());
    let_go.send(()).unwrap();
    image.hold.settle().unwrap();
    assert_eq!(image.hold.generation(), Some(2));
}

#[test]
fn who_goes_on_with_an_image_keeps_its_generation_until_it_is_raised() {
    let rig = Rig::new();
    drop(write(&rig.image, &machine("vm1", 1)).unwrap());
    let next = keep(&rig.image, 1, &machine("vm1", 2)).unwrap();
    assert_eq!(next.hold.generation(), Some(1));
    drop(next);
    // Nothing was written, so the same may go on once more.
    let mut next = keep(&rig.image, 1, &machine("vm1", 3)).unwrap();
    raise(&mut next);
    assert_eq!(next.hold.generation(), Some(2));
    let newest = rig.newest().unwrap();
    assert_eq!((newest.generation, newest.phase), (2, Phase::Held));
}

#[test]
fn an_image_that_was_written_since_is_refused_with_the_writer_and_without_a_step() {
    let rig = Rig::new();
    drop(write(&rig.image, &machine("vm1", 1)).unwrap());
    let mut first = keep(&rig.image, 1, &machine("vm1", 2)).unwrap();
    raise(&mut first);
    drop(first);
    let before = rig.newest();
    let error = refused(keep(&rig.image, 1, &machine("vm2", 3)));
    let text = error.to_string();
    assert!(matches!(error, LeaseError::Overtaken { .. }), "{text}");
    for part in ["it was of generation 1 then, and is of 2 now", "VM `vm1`"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert_eq!(rig.newest(), before);
    drop(write(&rig.image, &machine("vm2", 4)).unwrap());
}

#[test]
fn an_image_without_a_record_cannot_be_gone_on_with() {
    let rig = Rig::new();
    let error = refused(keep(&rig.image, 1, &machine("vm1", 1)));
    assert!(matches!(error, LeaseError::Overtaken { .. }), "{error}");
    assert_eq!(rig.newest(), None);
}

#[test]
fn a_writer_who_raises_the_generation_stays_alone() {
    let rig = Rig::new();
    let mut held = write(&rig.image, &machine("vm1", 1)).unwrap();
    raise(&mut held);
    assert_eq!(held.hold.generation(), Some(2));
    let error = refused(write(&rig.image, &machine("vm2", 2)));
    assert!(error.to_string().contains("generation 2 is held by"), "{error}");
    drop(held);
    assert_eq!(rig.newest().unwrap().phase, Phase::Released);
}

#[test]
fn a_generation_that_cannot_be_raised_stays_what_it_was_and_is_released() {
    let rig = Rig::new();
    let mut held = write(&rig.image, &machine("vm1", 1)).unwrap();
    // The number of the next step is taken, which nobody can have done who keeps to the rules.
    fs::write(rig.path("a.img.lease.2"), "in the way").unwrap();
    held.hold.begin_raise(&|| ()).unwrap();
    assert!(held.hold.settle().is_err());
    assert_eq!(held.hold.generation(), Some(1));
}
