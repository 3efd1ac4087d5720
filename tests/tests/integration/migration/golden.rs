//! What sources of each version of the protocol have sent, kept so that every later target can show that it still takes it.
//!
//! `golden/migration/version-N` has the frames of one source, up to the state of its machine; `make record-migration` adds that
//! of today's version.

use std::io::{BufRead, Cursor, Write};
use std::net::TcpStream;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread;

use coracle_tests::case::Context;
use coracle_tests::guest::{Machine, unikernel_words};
use coracle_tests::monitor::Launch;
use coracle_tests::{Outcome, ensure};
use coracle_vmm::migration::hello::Hello;
use coracle_vmm::migration::stream::Stream;
use coracle_vmm::migration::tls::Identity;
use coracle_vmm::migration::wire::{Kind, PROTOCOL_VERSION, Wire};
use coracle_vmm::state::whole;
use serde_json::json;

use super::played::PlayedTarget;
use super::{Hosts, SOON};

/// Small enough to be kept.
const MEMORY_MIB: u32 = 4;
/// In the directory in which its monitor runs: no stream names a path of the host that made it.
const KERNEL: &str = "test-kernel";
/// Likewise: a disk that goes along.
const DISK: &str = "test-disk";
/// What is said where a processor has less than the one of the source.
pub(super) const OTHER_PROCESSOR: &str = "this host cannot give the guest what its processor has";

pub(super) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/migration")
}

/// What a target says to a whole stream.
#[derive(Debug)]
enum Said {
    /// It has all it needs.
    Loaded,
    /// It will not take it.
    Refused(String),
}

pub(super) fn streams_are_taken(context: &Context) -> Outcome {
    let today = root().join(format!("version-{PROTOCOL_VERSION}"));
    if std::env::var_os("CORACLE_RECORD").is_some() {
        record(context, &today)?;
    }
    ensure!(
        today.is_file(),
        "no stream of version {PROTOCOL_VERSION} is kept; run: make record-migration"
    );
    for entry in std::fs::read_dir(root())? {
        let path = entry?.path();
        let frames = std::fs::read(&path)?;
        match answered(context, &frames)? {
            Said::Loaded => {}
            // It was sent by a host whose processors have more: all else was read before.
            Said::Refused(why) if why.contains(OTHER_PROCESSOR) => println!("{}: {why}", path.display()),
            said => return Err(format!("{}: {said:?}", path.display()).into()),
        }
    }
    for version in [0, PROTOCOL_VERSION + 1] {
        let other = with_hello(&std::fs::read(&today)?, |hello| hello.version = version)?;
        let said = answered(context, &other)?;
        let refused = format!("speaks version {version} of the migration protocol");
        ensure!(
            matches!(&said, Said::Refused(why) if why.contains(&refused)),
            "{said:?}"
        );
    }
    refuses_another_processor(context, &std::fs::read(&today)?)
}

/// Keeps what a source sends, whose target is played here.
fn record(context: &Context, path: &Path) -> Outcome {
    ensure!(
        !path.exists(),
        "{} is kept for good: only a new version has a new one",
        path.display()
    );
    let directory = tempfile::tempdir()?;
    let hosts = Hosts::new(directory.path())?;
    let launch = Launch::new(&context.environment)?;
    std::fs::copy(&context.environment.unikernel, launch.directory().join(KERNEL))?;
    let words = unikernel_words("do=hello do=registers:ms=100000,seed=1");
    let disk = std::fs::File::create_new(launch.directory().join(DISK))?;
    disk.set_len(1 << 20)?;
    disk.write_all_at(&[[1; 4096], [0; 4096], [2; 4096]].concat(), 512 << 10)?;
    let machine = Machine::new(Path::new(KERNEL), &words)
        .memory_mib(MEMORY_MIB)
        .disk("d", Path::new(DISK))
        .part("entropy", json!({}));
    let monitor = launch.start()?;
    monitor.configure(&machine.config())?;
    monitor.start_instance()?;
    monitor.console.wait_for("registers: ready", SOON)?;
    let target = PlayedTarget::new(&hosts, false)?;
    let body = json!({ "to": target.address()?, "tls": hosts.tls, "copy_disks": ["d"] });
    let kept = thread::scope(|scope| {
        let sending = scope.spawn(|| monitor.request("PUT", "/migration/send", Some(&body)));
        let kept = (|| -> Outcome<Vec<u8>> {
            let mut source = target.accept()?;
            let mut kept = Wire::new(Cursor::new(Vec::new()));
            loop {
                let (kind, body) = source.receive()?;
                kept.send(kind, &[body])?;
                match kind {
                    Kind::State => return Ok(kept.stream().get_ref().clone()),
                    kind => target.answer(&mut source, kind)?,
                }
            }
        })();
        // It hears that its target is gone, and its guest runs on.
        let answer = sending.join().map_err(|_| "the caller panicked")??;
        ensure!(answer.status == 400, "{}", answer.body);
        kept
    })?;
    std::fs::create_dir_all(root())?;
    Ok(std::fs::write(path, kept)?)
}

/// Sends the frames to a receiver.
fn answered(context: &Context, frames: &[u8]) -> Outcome<Said> {
    let directory = tempfile::tempdir()?;
    let hosts = Hosts::new(directory.path())?;
    let identity = Identity::read(&hosts.files()?)?;
    let (_receiver, call, to) = hosts.receiver(context)?;
    let mut target = Wire::new(Stream::from(
        identity.call(TcpStream::connect(&to)?, "127.0.0.1")?,
    ));
    let said = played(&mut target, frames);
    // No GO was said, so it has nothing.
    drop(target);
    ensure!(call.join().is_ok_and(|call| call.is_err()), "it has received");
    said
}

/// Says each frame, and waits for the answer where the protocol has one.
fn played<S: BufRead + Write>(target: &mut Wire<S>, frames: &[u8]) -> Outcome<Said> {
    let mut source = Wire::new(Cursor::new(frames.to_vec()));
    loop {
        let (kind, body) = source.receive()?;
        target.send(kind, &[body])?;
        let expected = match kind {
            Kind::Hello => Kind::Ready,
            Kind::Mark => Kind::Reached,
            Kind::State => Kind::Loaded,
            _ => continue,
        };
        target.flush()?;
        match target.receive()? {
            (Kind::Refused, why) => return Ok(Said::Refused(String::from_utf8_lossy(why).into_owned())),
            (Kind::Loaded, _) => return Ok(Said::Loaded),
            (found, _) => ensure!(found == expected, "{found:?} came, and not {expected:?}"),
        }
    }
}

/// The same stream with another hello.
fn with_hello(frames: &[u8], change: impl FnOnce(&mut Hello)) -> Outcome<Vec<u8>> {
    let mut source = Wire::new(Cursor::new(frames.to_vec()));
    let (_, body) = source.receive()?;
    let mut hello: Hello = whole(body)?;
    change(&mut hello);
    let mut changed = Wire::new(Cursor::new(Vec::new()));
    changed.send(Kind::Hello, &[&postcard::to_stdvec(&hello)?])?;
    let read = usize::try_from(source.stream().position())?;
    let mut all = changed.stream().get_ref().clone();
    all.extend_from_slice(frames.get(read..).ok_or("the hello is not all of it")?);
    Ok(all)
}

/// A guest whose processor has all that there ever was is refused for that before a byte of its memory moves.
fn refuses_another_processor(context: &Context, frames: &[u8]) -> Outcome {
    let hello = with_hello(frames, |hello| {
        for answer in hello.cpuid.iter_mut().filter(|answer| answer.leaf == 7) {
            answer.ebx = u32::MAX;
        }
    })?;
    let mut first = Wire::new(Cursor::new(hello));
    first.receive()?;
    let length = usize::try_from(first.stream().position())?;
    let hello = first
        .stream()
        .get_ref()
        .get(..length)
        .ok_or("a hello has an end")?
        .to_vec();
    let said = answered(context, &hello)?;
    ensure!(
        matches!(&said, Said::Refused(why) if why.contains(OTHER_PROCESSOR)),
        "{said:?}"
    );
    Ok(())
}
