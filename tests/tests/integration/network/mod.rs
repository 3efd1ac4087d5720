//! An image behind a network, whatever the protocol: what a guest, a user and the API notice of the way and of the server.

pub(crate) mod boot;
pub(crate) mod cell;
pub(crate) mod double_start;
pub(crate) mod faults;
pub(crate) mod generations;
pub(crate) mod messages;
pub(crate) mod operator;
pub(crate) mod patience;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use coracle_tests::case::Context;
use coracle_tests::guest::Machine;
use coracle_tests::harness::proxy::{Proxy, Step, Then};
use coracle_tests::monitor::{Launch, Monitor};
use coracle_tests::seed::Seed;
use coracle_tests::{Outcome, ensure};
use serde_json::{Value, json};

/// A server with one blank image, of a test's own.
pub(crate) trait Server: Sized {
    /// A running one whose image has so many bytes.
    fn with_image(bytes: u64) -> Outcome<Self>;

    fn address(&self) -> SocketAddr;

    /// The image as a leased drive, by way of this address: the server's own, or that of a proxy. The lease may be recorded in
    /// the directory.
    fn drive(&self, way: SocketAddr, lease: &Path) -> Value;

    /// The file with the bytes of the image, for a judge to read.
    fn image(&self) -> Outcome<PathBuf>;

    fn kill(&mut self) -> Outcome;
    fn restart(&mut self) -> Outcome;
    fn stop(&self) -> Outcome;
    fn go_on(&self) -> Outcome;
}

/// A server whose protocol the proxy knows, so that faults can be laid at its steps.
pub(crate) trait Stepped: Server {
    /// One for a guest that is to be caught at the step by the fault.
    fn for_cell(fault: &str, step: Step, bytes: u64, seed: &mut Seed) -> Outcome<Self>;

    /// A proxy in front of it, in volatile mode or not.
    fn proxy(&self, mode: &str, seed: Seed) -> Outcome<Proxy>;

    /// How long a guest does nothing at a time, to be found idle.
    const IDLE_MS: u64;

    /// Has the client come to a step that it comes to only when it begins again; nothing for others.
    fn begin_again(&mut self, step: Step, proxy: &Proxy) -> Outcome;

    /// The damage that a fault of this name does to an answer; nothing when it does none.
    fn damage(fault: &str, step: Step, seed: &mut Seed) -> Option<Then>;

    /// A fault that only servers of this kind have, from the moment at which nothing passes any more to that at which all
    /// may pass again.
    fn suffer(&mut self, fault: &str, proxy: &Proxy, monitor: &Monitor) -> Outcome;

    /// Waits until the server serves everybody again, if it makes a difference to clients after such a fault.
    fn recovered(&self, step: Step, limit: Duration) -> Outcome;
}

/// A drive that is this URL.
pub(crate) fn drive(url: &str) -> Value {
    json!({
        "drive_id": "d", "path_on_host": url, "is_root_device": false, "is_read_only": false,
        "cache_type": "Writeback", "lock": "exclusive",
    })
}

/// The drive with one member more.
pub(crate) fn with(mut drive: Value, member: &str, value: Value) -> Value {
    if let Some(drive) = drive.as_object_mut() {
        drive.insert(member.into(), value);
    }
    drive
}

/// A machine that does these words with its one drive, has an API, and logs all that it comes to.
pub(crate) fn start(context: &Context, words: &str, drive: Value) -> Outcome<Monitor> {
    let machine = Machine::unikernel(&context.environment, words).drive(drive);
    Launch::new(&context.environment)?
        .arguments(["--level", "debug"])
        .config(&machine.config())?
        .start()
}

pub(crate) fn says(text: &str, word: &str) -> Outcome {
    ensure!(text.contains(word), "no '{word}' in:\n{text}");
    Ok(())
}
