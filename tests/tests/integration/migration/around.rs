//! Hosts that have addresses of their own, and what is seen between them.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::thread::JoinHandle;

use coracle_tests::case::{Context, text};
use coracle_tests::certificates::Authority;
use coracle_tests::guest::Machine;
use coracle_tests::harness::hosts::{Host, Star};
use coracle_tests::harness::nfs::server::{Plan, Server, url};
use coracle_tests::harness::receiver::Receiver;
use coracle_tests::monitor::{Launch, Monitor};
use coracle_tests::seed::Seed;
use coracle_tests::{Outcome, ensure};
use serde_json::{Value, json};

use super::SOON;
use crate::snapshot::has_worked;

const HOSTS: u8 = 3;
const DISK_MIB: u64 = 16;
const MEMORY_MIB: u32 = 64;

/// From the first host to the second, to the third, and back.
pub(super) fn goes_around(context: &Context) -> Outcome {
    let mut seed = context.seed.clone();
    for lap in 0..context.count(2, 100) {
        one_lap(context, &mut seed).map_err(|e| format!("lap {lap}: {}", text(&e)))?;
    }
    Ok(())
}

fn one_lap(context: &Context, seed: &mut Seed) -> Outcome {
    let directory = tempfile::tempdir()?;
    let star = Star::new(HOSTS)?;
    let server = Server::start_on(&star.server, Plan::image(DISK_MIB << 20))?;
    let disk = url(
        (star.server.address, server.address().port()).into(),
        "export/image.raw",
    );
    let authority = Authority::new(directory.path())?;
    let number = seed.below(1 << 30);
    let vcpus = 1 + u32::try_from(seed.below(2))?;
    // It is in the guest's memory, and nowhere else.
    let secret = format!(
        "secret={:016x}{:016x}",
        seed.below(u64::MAX),
        seed.below(u64::MAX)
    );
    let words = format!(
        "{secret} do=hello do=dirty:mib=8,ms=500,seed={number} do=registers:ms=500,seed={number} \
         do=pattern-write:mib={DISK_MIB},seed={number},bs=65536,depth=8 do=flush do=vcpus:count={vcpus},ms=100 \
         do=pattern-verify:mib={DISK_MIB},seed={number},bs=4096,depth=16 do=tick:ms=20,count=100 do=dirty:mib=16,ms=100,seed=7"
    );
    let config = Machine::unikernel(&context.environment, &words)
        .vcpus(vcpus)
        .memory_mib(MEMORY_MIB)
        .drive(json!({
            "drive_id": "d", "path_on_host": disk, "is_root_device": false, "is_read_only": false,
            "cache_type": "Writeback"
        }))
        .config();
    let [first, second, third] = star.clients.as_slice() else {
        return Err("there are three hosts".into());
    };
    let launch = Launch::new(&context.environment)?;
    let mut monitor = first.inside(|| launch.start())??;
    monitor.configure(&config)?;
    monitor.start_instance()?;
    monitor.console.wait_for("hello", SOON)?;
    let memory = monitor.process().read_mapping(u64::from(MEMORY_MIB) << 20)?;
    ensure!(
        has(&memory, &secret),
        "its memory has the word that is looked for"
    );
    let mut said = String::new();
    for (from, to) in [(first, second), (second, third), (third, first)] {
        std::thread::sleep(std::time::Duration::from_micros(seed.below(300_000)));
        let tap = Tap::on(&star.server)?;
        let next = moved(context, (&monitor, from), to, (&authority, &tap))?;
        let ended = std::mem::replace(&mut monitor, next).wait(SOON)?;
        ended.expect(0)?;
        said.push_str(&ended.console);
        let passed = tap.end()?;
        ensure!(
            passed.there.len() > 1 << 20 && !has(&passed.there, &secret) && !has(&passed.back, &secret),
            "{} bytes passed, and a word of the guest's memory can be read in them",
            passed.there.len()
        );
        is_of_no_use_later(context, &passed, to, &authority)?;
    }
    let ended = monitor.wait(SOON)?;
    has_worked(&ended, said, &format!("{words}, {vcpus} vCPUs"))
}

/// Sends the guest by way of the tap; each host shows its own certificate.
fn moved(
    context: &Context,
    (monitor, from): (&Monitor, &Host),
    to: &Host,
    (authority, tap): (&Authority, &Tap),
) -> Outcome<Monitor> {
    let tls = |host: &Host| authority.host(&host.address.to_string());
    let receiver = Receiver::start(Launch::new(&context.environment)?, to, &tls(to)?)?;
    tap.leads_to(receiver.to())?;
    let body: Value = json!({ "to": tap.address, "to_name": to.address.to_string(), "tls": tls(from)? });
    monitor.must("PUT", "/migration/send", Some(&body))?;
    let next = receiver.received()?;
    // Whoever finds two dead processes finds these.
    for (log, step) in [
        (monitor.log()?, "offered: drive `d` at step "),
        (monitor.log()?, "the fences are down"),
        (next.log()?, "the guest is still the source's"),
        (next.log()?, "the leases of its disks are taken over"),
    ] {
        ensure!(log.contains(step), "{step}: {log}");
    }
    Ok(next)
}

/// What a source has sent is said once more, byte by byte, to a receiver that waits under the same name.
fn is_of_no_use_later(context: &Context, passed: &Passed, host: &Host, authority: &Authority) -> Outcome {
    let tls = authority.host(&host.address.to_string())?;
    let receiver = Receiver::start(Launch::new(&context.environment)?, host, &tls)?;
    let mut socket = host.inside(|| TcpStream::connect(receiver.to()))??;
    // It is sent away in the middle of it.
    let _ = socket.write_all(&passed.there);
    let _ = socket.read_to_end(&mut Vec::new());
    let status = receiver.monitor.must("GET", "/migration", None)?.json()?;
    let is_waiting =
        status.get("state") == Some(&json!("Receiving")) && status.get("sent_bytes") == Some(&json!(0));
    ensure!(is_waiting, "{status}");
    receiver.monitor.must("DELETE", "/migration", None)?;
    ensure!(
        receiver.received().is_err(),
        "it has received what was said before"
    );
    Ok(())
}

fn has(bytes: &[u8], word: &str) -> bool {
    bytes.windows(word.len()).any(|window| window == word.as_bytes())
}

/// All that has passed by a connection.
struct Passed {
    there: Vec<u8>,
    back: Vec<u8>,
}

/// Somebody on the way of one connection who keeps a copy of everything.
struct Tap {
    address: String,
    target: std::sync::mpsc::Sender<String>,
    thread: JoinHandle<io::Result<Passed>>,
}

impl Tap {
    fn on(host: &Host) -> Outcome<Self> {
        let everywhere = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        let listener = host.inside(|| TcpListener::bind((everywhere, 0)))??;
        let port = listener.local_addr()?.port();
        let (target, to) = std::sync::mpsc::channel::<String>();
        let host_again = host.again()?;
        let thread = std::thread::spawn(move || {
            let (near, _) = listener.accept()?;
            let to = to.recv().map_err(io::Error::other)?;
            let far = host_again.inside(|| TcpStream::connect(&to));
            let far = far.map_err(|error| io::Error::other(text(&error)))??;
            std::thread::scope(|scope| {
                let back = scope.spawn(|| copied(&far, &near));
                let there = copied(&near, &far)?;
                let back = back.join().map_err(|_| io::Error::other("a thread panicked"))??;
                Ok(Passed { there, back })
            })
        });
        Ok(Self {
            // Each host reaches all addresses of the one in the middle.
            address: format!("{}:{port}", host.address),
            target,
            thread,
        })
    }

    fn leads_to(&self, to: &str) -> Outcome {
        Ok(self.target.send(to.to_owned())?)
    }

    /// What has passed.
    fn end(self) -> Outcome<Passed> {
        Ok(self.thread.join().map_err(|_| "the tap panicked")??)
    }
}

/// Passes everything on until it ends, and returns it.
fn copied(mut from: &TcpStream, mut to: &TcpStream) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut buffer = vec![0; 64 << 10];
    loop {
        let count = match from.read(&mut buffer) {
            // Who has all it needs may reset what it has not read.
            Ok(0) | Err(_) => break,
            Ok(count) => count,
        };
        let read = buffer.get(..count).unwrap_or_default();
        bytes.extend_from_slice(read);
        if to.write_all(read).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
    Ok(bytes)
}
