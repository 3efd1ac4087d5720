//! The threads that try: those of a monitor, with the monitor's own filters.

use std::io;
use std::path::Path;

use coracle_storage::threads::{self, Kind};
use coracle_vmm::config::Config;
use coracle_vmm::landlock::{self, Reach};
use coracle_vmm::seccomp::{self, Filters};

use crate::World;

/// No filter at all.
const BARE: &str = "bare";
/// What the whole process may do, before a guest runs.
const MAIN: &str = "main";
/// The first thread, while a guest runs.
const VMM: &str = "vmm";
/// A process that has no API, and no filter: only Landlock.
const CONFIGURED: &str = "configured";
/// The thread of a vCPU whose process has an API, with filters that let it do what the process may.
const OPEN_VCPU: &str = "open-vcpu";

/// Makes an attempt on a thread of that kind, which is called by its kind: 0, or the number of what the kernel has answered.
///
/// # Errors
///
/// When there is no such place, or the kernel has no filters.
pub(super) fn make_there(
    place: &str,
    world: &World,
    attempt: impl FnOnce() -> io::Result<()> + Send + 'static,
) -> io::Result<u8> {
    let outcome = if place == BARE {
        attempt()
    } else if place == CONFIGURED {
        let config = Config::from_file(Path::new(&world.config)).map_err(io::Error::other)?;
        landlock::begin(&Reach::of(&config, [], None)).map_err(io::Error::other)?;
        attempt()
    } else if place == OPEN_VCPU {
        landlock::begin_without().map_err(io::Error::other)?;
        seccomp::begin(&Filters::Own(world.policy.clone().into())).map_err(io::Error::other)?;
        on_a_thread(Kind::Vcpu, attempt)?
    } else {
        seccomp::begin(&Filters::BuiltIn).map_err(io::Error::other)?;
        if place == MAIN {
            attempt()
        } else {
            // As in a monitor whose guest runs: the first thread has its own filter, whoever tries.
            seccomp::confine_vmm().map_err(io::Error::other)?;
            match Kind::ALL.into_iter().find(|kind| kind.name() == place) {
                Some(kind) => on_a_thread(kind, attempt)?,
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

fn on_a_thread(
    kind: Kind,
    attempt: impl FnOnce() -> io::Result<()> + Send + 'static,
) -> io::Result<io::Result<()>> {
    let thread = threads::spawn(kind, kind.name(), attempt)?;
    thread
        .join()
        .map_err(|_| io::Error::other("the attempt has panicked"))
}
