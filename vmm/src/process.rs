//! The process itself: what has to be so before it does anything, and how it ends by a fault of ours.
#![expect(
    unsafe_code,
    reason = "the C library's allocator and its signals are told by calls without a safe form"
)]

use std::ffi::CString;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::panic::PanicHookInfo;
use std::path::Path;

use coracle_storage::lease::Incarnation;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::end::EXIT_PANIC;

/// Makes the process ready. To be called first, while there is one thread.
///
/// # Errors
///
/// Why it cannot be.
pub fn begin() -> io::Result<()> {
    open_standard_streams()?;
    // SAFETY: no handler of ours is replaced. A reader that has gone is an error of each write to it.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    share_one_heap();
    take_name();
    std::panic::set_hook(Box::new(end_by_panic));
    Ok(())
}

/// A jailer executes this program by a descriptor: before Linux 6.14 a process is then called by the number of that.
fn take_name() {
    let program = std::env::args_os().next().unwrap_or_default();
    let name = Path::new(&program).file_name().unwrap_or_default();
    if let Ok(name) = CString::new(name.as_bytes())
        && !name.is_empty()
    {
        // What it is called is of no consequence to it.
        let _ = rustix::thread::set_name(&name);
    }
}

/// Where a supervisor says which lives of this machine it has reaped: incarnations, with commas between.
const REAPED: &str = "CORACLE_REAPED";
/// Where it says on which descriptor it wants to hear which life this is.
const INCARNATION_FD: &str = "CORACLE_INCARNATION_FD";

/// What a supervisor has said that makes no sense.
#[derive(Debug, thiserror::Error)]
pub enum SupervisorError {
    /// Not a list of incarnations.
    #[error(
        "{REAPED} is `{word}` in the environment: for supervisors: incarnations of 32 hex digits, with commas between"
    )]
    Reaped {
        /// What it is.
        word: String,
    },
    /// Nobody is there.
    #[error(
        "{INCARNATION_FD} is `{word}` in the environment: for supervisors: the number of a descriptor to write to"
    )]
    Descriptor {
        /// What it is.
        word: String,
        /// Why it is of no use.
        #[source]
        source: io::Error,
    },
}

/// Hears from a supervisor which lives before this one have ended for certain, whose heir this one is, and tells it which life
/// this is. To be called before anything is opened.
///
/// # Errors
///
/// When what it says makes no sense.
pub fn meet_supervisor() -> Result<(), SupervisorError> {
    if let Some(word) = std::env::var_os(REAPED) {
        let word = word.to_string_lossy().into_owned();
        let reaped: Option<Vec<_>> = word.split(',').map(Incarnation::parse).collect();
        Incarnation::succeed(reaped.ok_or(SupervisorError::Reaped { word })?);
    }
    if let Some(word) = std::env::var_os(INCARNATION_FD) {
        let word = word.to_string_lossy().into_owned();
        introduce(&word).map_err(|source| SupervisorError::Descriptor { word, source })?;
    }
    Ok(())
}

fn introduce(word: &str) -> io::Result<()> {
    let number = word.parse().ok().filter(|number| *number > 2);
    let number = number.ok_or(Errno::BADF)?;
    // SAFETY: whoever has started this process has left it the descriptor for this, and nothing else was opened.
    let told = unsafe { BorrowedFd::borrow_raw(number) };
    rustix::io::write(told, format!("{}\n", Incarnation::of_this_process()).as_bytes())?;
    // SAFETY: nobody else knows of it.
    unsafe { rustix::io::close(number) };
    Ok(())
}

/// Gives each of the first three descriptors that is not open something that is nothing. Else the next file to be opened, which
/// may be a disk, would be standard error to all that write there.
fn open_standard_streams() -> io::Result<()> {
    for number in 0..=2 {
        // SAFETY: it is only asked about.
        let stream = unsafe { BorrowedFd::borrow_raw(number) };
        match rustix::io::fcntl_getfd(stream) {
            Ok(_) => {}
            // The lowest number that is free is this one.
            Err(Errno::BADF) => {
                let nothing = rustix::fs::open("/dev/null", OFlags::RDWR, Mode::empty())?;
                std::mem::forget(nothing);
            }
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// Has all threads share one heap, which grows and shrinks at its end and nowhere else. Each of them would have one of its own,
/// which takes 64 MiB of addresses and some pages; and what asks the kernel for mappings has to have a filter that allows them.
fn share_one_heap() {
    for (parameter, value) in [(libc::M_ARENA_MAX, 1), (libc::M_MMAP_MAX, 0)] {
        // SAFETY: it changes a number of the allocator. If it is refused, threads ask for mappings, and their filters say so.
        unsafe { libc::mallopt(parameter, value) };
    }
}

/// Ends the process. It is not aborted: what a process asks the kernel for to abort itself, no thread has to be allowed.
fn end_by_panic(told: &PanicHookInfo<'_>) {
    let thread = std::thread::current();
    let name = thread.name().unwrap_or("main");
    let what = told.payload_as_str().unwrap_or("it has not said why");
    let place = told.location().map(ToString::to_string).unwrap_or_default();
    eprintln_quietly(&format!(
        "coracle: a fault of the monitor in thread `{name}`, at {place}: {what}\n"
    ));
    // SAFETY: it ends the process, and runs nothing of it.
    unsafe { libc::_exit(i32::from(EXIT_PANIC)) }
}

/// As far as there is somebody to tell.
fn eprintln_quietly(line: &str) {
    let _ = rustix::io::write(rustix::stdio::stderr(), line.as_bytes());
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use std::process::Command;

    use super::*;

    /// Has the test below panic, in a process of its own.
    const PANICS: &str = "CORACLE_TEST_PANICS";

    #[test]
    fn a_panic_ends_the_process_with_a_status_and_says_where() {
        if std::env::var_os(PANICS).is_some() {
            std::panic::set_hook(Box::new(end_by_panic));
            panic!("this and {}", "that");
        }
        let name = "process::tests::a_panic_ends_the_process_with_a_status_and_says_where";
        let mut again = Command::new(std::env::current_exe().unwrap());
        let ended = again
            .args([name, "--exact", "--nocapture"])
            .env(PANICS, "1")
            .output()
            .unwrap();
        let said = String::from_utf8(ended.stderr).unwrap();
        assert_eq!(ended.status.code(), Some(i32::from(EXIT_PANIC)), "{said}");
        let place = concat!("at ", file!(), ":");
        assert!(
            said.contains(place) && said.contains(": this and that\n"),
            "{said}"
        );
    }
}
