//! Locks of an open file description, on the bytes that QEMU uses: both refuse the other's images.
//!
//! A byte at 100 + p says "I use permission p", one at 200 + p "I let nobody else have it"; all are shared
//! locks, and whoever wants in sets its own first and then looks for the opposite ones of others.
//!
//! | | uses | denies |
//! |---|---|---|
//! | writer | read, write, resize | write, resize |
//! | reader | read | write, resize |
//!
//! The locks belong to the open file description: duplicates of a descriptor share them, and they are gone
//! when the last one is closed, also by the death of the process.
#![expect(unsafe_code, reason = "these locks have a system call and no safe wrapper")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::thread;
use std::time::{Duration, Instant};

/// What an owner does with an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It reads and writes, alone.
    Writer,
    /// It reads, among others who do.
    Reader,
}

/// Who is in the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conflict {
    /// Somebody who writes.
    Writer,
    /// Somebody who lets nobody else write.
    Reader,
    /// Somebody who is just about to take a lock, for longer than that takes.
    Turn,
}

/// Why a lock is not to be had.
#[derive(Debug)]
pub(in crate::lease) enum FenceError {
    Busy(Conflict),
    Host(io::Error),
}

impl From<io::Error> for FenceError {
    fn from(error: io::Error) -> Self {
        Self::Host(error)
    }
}

/// QEMU's numbers of the permissions.
const READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;
/// QEMU's bytes.
const USES: i64 = 100;
const DENIES: i64 = 200;
/// All of them.
const BYTES: i64 = DENIES + RESIZE + 1 - USES;
/// Ours, "CORACLE" in ASCII: whoever takes a fence has it meanwhile, so that of two that come at once
/// one gets in. By QEMU's rule alone both could see the other and give up.
const TURN: i64 = 0x0043_4f52_4143_4c45;
/// How long the taking of a fence may last.
const TURN_MS_MAX: u64 = 1_000;
const TURN_PERIOD: Duration = Duration::from_micros(100);

impl Role {
    fn uses(self) -> &'static [i64] {
        match self {
            Self::Writer => &[READ, WRITE, RESIZE],
            Self::Reader => &[READ],
        }
    }

    /// Neither lets anybody else change the image.
    fn denies(self) -> &'static [i64] {
        &[WRITE, RESIZE]
    }

    /// Readers need not wait for one another, and may not set an exclusive lock.
    fn turn(self) -> i32 {
        match self {
            Self::Writer => libc::F_WRLCK,
            Self::Reader => libc::F_RDLCK,
        }
    }
}

/// Takes the fence of `file` for this open file description, which has none.
///
/// # Errors
///
/// Who has it; then nothing is locked.
pub(in crate::lease) fn take(file: &File, role: Role) -> Result<(), FenceError> {
    wait_for_turn(file, role)?;
    let taken = lock_and_look(file, role);
    if taken.is_err() {
        set(file, libc::F_UNLCK, USES, BYTES)?;
    }
    set(file, libc::F_UNLCK, TURN, 1)?;
    taken
}

/// Says who would be in the way of `role`, and takes nothing.
pub(in crate::lease) fn probe(file: &File, role: Role) -> io::Result<Option<Conflict>> {
    for permission in role.denies() {
        if is_held(file, USES + permission)? {
            return Ok(Some(Conflict::Writer));
        }
    }
    for permission in role.uses() {
        if is_held(file, DENIES + permission)? {
            return Ok(Some(Conflict::Reader));
        }
    }
    Ok(None)
}

/// Gives the fence back.
pub(in crate::lease) fn release(file: &File) -> io::Result<()> {
    set(file, libc::F_UNLCK, USES, BYTES)
}

fn wait_for_turn(file: &File, role: Role) -> Result<(), FenceError> {
    let deadline = Instant::now() + Duration::from_millis(TURN_MS_MAX);
    loop {
        match set(file, role.turn(), TURN, 1) {
            Ok(()) => return Ok(()),
            Err(error) if !is_conflict(&error) => return Err(error.into()),
            Err(_) if Instant::now() >= deadline => return Err(FenceError::Busy(Conflict::Turn)),
            Err(_) => thread::sleep(TURN_PERIOD),
        }
    }
}

fn lock_and_look(file: &File, role: Role) -> Result<(), FenceError> {
    let uses = role.uses().iter().map(|permission| USES + permission);
    let denies = role.denies().iter().map(|permission| DENIES + permission);
    for byte in uses.chain(denies) {
        set(file, libc::F_RDLCK, byte, 1).map_err(|error| {
            if is_conflict(&error) {
                // An exclusive lock of a program that knows nothing of these bytes.
                FenceError::Busy(Conflict::Writer)
            } else {
                error.into()
            }
        })?;
    }
    match probe(file, role)? {
        Some(conflict) => Err(FenceError::Busy(conflict)),
        None => Ok(()),
    }
}

/// fcntl(2) has both for a lock that another holds.
fn is_conflict(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES))
}

/// Whether another description has any lock on `byte`.
fn is_held(file: &File, byte: i64) -> io::Result<bool> {
    let mut lock = flock(libc::F_WRLCK, byte, 1);
    call(file, libc::F_OFD_GETLK, &mut lock)?;
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}

fn set(file: &File, kind: i32, start: i64, len: i64) -> io::Result<()> {
    call(file, libc::F_OFD_SETLK, &mut flock(kind, start, len))
}

fn flock(kind: i32, start: i64, len: i64) -> libc::flock {
    let small = |value: i32| i16::try_from(value).expect("the kernel's lock types and SEEK_SET are small");
    libc::flock {
        l_type: small(kind),
        l_whence: small(libc::SEEK_SET),
        l_start: start,
        l_len: len,
        // The kernel insists: such a lock has no process.
        l_pid: 0,
    }
}

fn call(file: &File, command: i32, lock: &mut libc::flock) -> io::Result<()> {
    loop {
        // SAFETY: the descriptor is open and `lock` is a whole `flock` that nobody else sees meanwhile.
        let done = unsafe { libc::fcntl(file.as_raw_fd(), command, std::ptr::from_mut(lock)) };
        if done == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

    use std::fs::OpenOptions;
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn opened(path: &std::path::Path, role: Role) -> File {
        let writes = role == Role::Writer;
        OpenOptions::new().read(true).write(writes).open(path).unwrap()
    }

    fn conflict(taken: Result<(), FenceError>) -> Option<Conflict> {
        match taken {
            Ok(()) => None,
            Err(FenceError::Busy(conflict)) => Some(conflict),
            Err(FenceError::Host(error)) => panic!("{error}"),
        }
    }

    #[test]
    fn a_writer_is_alone_and_readers_are_together() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for (first, second, expected) in [
            (Role::Writer, Role::Writer, Some(Conflict::Writer)),
            (Role::Writer, Role::Reader, Some(Conflict::Writer)),
            (Role::Reader, Role::Writer, Some(Conflict::Reader)),
            (Role::Reader, Role::Reader, None),
        ] {
            let (one, two) = (opened(file.path(), first), opened(file.path(), second));
            assert_eq!(conflict(take(&one, first)), None);
            assert_eq!(probe(&two, second).unwrap(), expected);
            assert_eq!(conflict(take(&two, second)), expected, "{first:?}, {second:?}");
        }
    }

    #[test]
    fn who_was_refused_is_in_nobodys_way() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (one, two, three) = (
            opened(file.path(), Role::Reader),
            opened(file.path(), Role::Writer),
            opened(file.path(), Role::Reader),
        );
        assert_eq!(conflict(take(&one, Role::Reader)), None);
        assert_eq!(conflict(take(&two, Role::Writer)), Some(Conflict::Reader));
        assert_eq!(conflict(take(&three, Role::Reader)), None);
        release(&one).unwrap();
        drop(three);
        assert_eq!(conflict(take(&two, Role::Writer)), None);
    }

    #[test]
    fn a_fence_falls_with_the_last_copy_of_its_descriptor() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (one, two) = (
            opened(file.path(), Role::Writer),
            opened(file.path(), Role::Writer),
        );
        take(&one, Role::Writer).unwrap();
        let copy = one.try_clone().unwrap();
        drop(one);
        assert_eq!(conflict(take(&two, Role::Writer)), Some(Conflict::Writer));
        drop(copy);
        assert_eq!(conflict(take(&two, Role::Writer)), None);
    }

    #[test]
    fn of_those_who_come_at_once_one_gets_in() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for _ in 0..100 {
            let (barrier, inside) = (Barrier::new(4), AtomicUsize::new(0));
            std::thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| {
                        let mine = opened(file.path(), Role::Writer);
                        barrier.wait();
                        if take(&mine, Role::Writer).is_ok() {
                            inside.fetch_add(1, Ordering::Relaxed);
                        }
                        barrier.wait();
                    });
                }
            });
            assert_eq!(inside.into_inner(), 1);
        }
    }

    #[test]
    fn a_program_that_locks_the_whole_file_is_respected() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (other, ours) = (
            opened(file.path(), Role::Writer),
            opened(file.path(), Role::Writer),
        );
        set(&other, libc::F_WRLCK, 0, 1 << 20).unwrap();
        assert_eq!(conflict(take(&ours, Role::Writer)), Some(Conflict::Writer));
    }
}
