//! `coracle-agent`: runs commands in a guest, and brings and fetches files, for who may reach the guest's vsock device.
//!
//! ```text
//! coracle-agent [--port N]
//! ```
//!
//! As the first process of a guest it mounts what programs expect, and the root that it is asked for (`boot.rs`).
//!
//! It serves until it is ended. Whoever reaches the device's Unix socket on the host has what the agent has: as root, the guest.

mod boot;
mod command;
mod session;

use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use coracle_agent::wire::PORT;
use vsock::{VMADDR_CID_ANY, VsockListener, VsockStream};

/// How many errands may be under way.
const SESSIONS_MAX: usize = 64;
/// What a shell gives where a command cannot be run.
const STATUS_BUSY: u8 = 126;
const STACK_BYTES: usize = 256 << 10;
/// How long it waits when a connection could not be taken, as without a descriptor.
const PAUSE: Duration = Duration::from_millis(100);
/// How long who is refused may take to hear of it.
const PATIENCE: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let port = match port_of(std::env::args().skip(1)) {
        Ok(port) => port,
        Err(why) => {
            eprintln!("coracle-agent: {why}\nusage: coracle-agent [--port N], {PORT} unless said otherwise");
            return ExitCode::from(2);
        }
    };
    if let Err(error) = boot::begin() {
        eprintln!("coracle-agent: cannot begin as the first process: {error}");
        return ExitCode::FAILURE;
    }
    match serve(port) {
        Ok(never) => match never {},
        Err(error) => {
            eprintln!(
                "coracle-agent: cannot listen on vsock port {port}: {error}; has the machine a vsock device, and this kernel its \
                 driver (CONFIG_VIRTIO_VSOCKETS)?"
            );
            ExitCode::FAILURE
        }
    }
}

fn port_of(mut arguments: impl Iterator<Item = String>) -> Result<u32, String> {
    let Some(flag) = arguments.next() else {
        return Ok(PORT);
    };
    let number = match flag.strip_prefix("--port") {
        Some("") => arguments.next(),
        Some(attached) => attached.strip_prefix('=').map(ToOwned::to_owned),
        None => return Err(format!("there is no argument {flag}")),
    };
    let number = number.ok_or("--port takes a number")?;
    if let Some(more) = arguments.next() {
        return Err(format!("there is no argument {more}"));
    }
    number
        .parse()
        .map_err(|_| format!("--port takes a number, and {number} is none"))
}

fn serve(port: u32) -> std::io::Result<std::convert::Infallible> {
    let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, port)?;
    // Nobody needs this line but who waits for it.
    let _ = writeln!(std::io::stdout(), "coracle-agent listens on vsock port {port}");
    let sessions = Arc::new(AtomicUsize::new(0));
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(_) => {
                thread::sleep(PAUSE);
                continue;
            }
        };
        let held = Held::one_of(&sessions);
        if held.is_too_many() {
            refuse(
                stream,
                "as many commands are running as the agent runs at a time: wait until one has ended",
            );
            continue;
        }
        let thread = thread::Builder::new().stack_size(STACK_BYTES);
        // A stream that was not taken closes with the closure.
        let _ = thread.spawn(move || {
            session::serve(stream);
            drop(held);
        });
    }
}

/// Who calls is told why not, as far as that is possible in a short time.
fn refuse(mut stream: VsockStream, why: &str) {
    let limited = stream.set_read_timeout(Some(PATIENCE)).is_ok();
    if limited && stream.set_write_timeout(Some(PATIENCE)).is_ok() {
        session::refuse(&mut stream, STATUS_BUSY, why);
    }
}

/// A place among the sessions, while it lives.
struct Held(Arc<AtomicUsize>, usize);

impl Held {
    fn one_of(sessions: &Arc<AtomicUsize>) -> Self {
        let before = sessions.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(sessions), before)
    }

    fn is_too_many(&self) -> bool {
        self.1 >= SESSIONS_MAX
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_is_what_was_said() {
        let port = |line: &str| port_of(line.split_whitespace().map(ToOwned::to_owned));
        assert_eq!(port(""), Ok(PORT));
        assert_eq!((port("--port 7"), port("--port=8")), (Ok(7), Ok(8)));
        for wrong in ["--port", "--port x", "--prot 7", "--port 7 8", "--ports 7"] {
            assert!(port(wrong).is_err(), "{wrong}");
        }
    }
}
