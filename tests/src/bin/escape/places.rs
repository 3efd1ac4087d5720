//! The threads that try: those of a monitor, with the monitor's own filters.

use std::io;

use coracle_storage::threads::{self, Kind};
use coracle_vmm::seccomp::{self, Filters};

/// No filter at all.
const BARE: &str = "bare";
/// What the whole process may do, before a guest runs.
const MAIN: &str = "main";
/// The first thread, while a guest runs.
const VMM: &str = "vmm";

/// Makes an attempt on a thread of that kind, which is called by its kind: 0, or the number of what the kernel has answered.
///
/// # Errors
///
/// When there is no such place, or the kernel has no filters.
pub(super) fn make_there(
    place: &str,
    attempt: impl FnOnce() -> io::Result<()> + Send + 'static,
) -> io::Result<u8> {
    let outcome = if place == BARE {
        attempt()
    } else {
        seccomp::begin(&Filters::BuiltIn).map_err(io::Error::other)?;
        if place == MAIN {
            attempt()
        } else {
            // As in a monitor whose guest runs: the first thread has its own filter, whoever tries.
            seccomp::confine_vmm().map_err(io::Error::other)?;
            match Kind::ALL.into_iter().find(|kind| kind.name() == place) {
                Some(kind) => {
                    let thread = threads::spawn(kind, kind.name(), attempt)?;
                    let panicked = |_| io::Error::other("the attempt has panicked");
                    thread.join().map_err(panicked)?
                }
                None if place == VMM => attempt(),
                None => return Err(io::Error::other(format!("there is no place {place}"))),
            }
        }
    };
    match outcome {
        Ok(()) => Ok(0),
        Err(error) => {
            let number = error.raw_os_error().and_then(|number| u8::try_from(number).ok());
            number.ok_or(error)
        }
    }
}
