//! Memory that goes by several connections: who may be one of them, and what becomes of a migration that loses one.

use std::io::Cursor;
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use coracle_tests::case::Context;
use coracle_tests::guest::Machine;
use coracle_tests::harness::proxy::{Direction, Fault, Proxy};
use coracle_tests::monitor::{Launch, Monitor};
use coracle_tests::{Outcome, ensure};
use coracle_vmm::migration::hello::{Answer, Hello};
use coracle_vmm::migration::join::{Join, Token};
use coracle_vmm::migration::stream::Stream;
use coracle_vmm::migration::tls::Identity;
use coracle_vmm::migration::wire::{Kind, PROTOCOL_VERSION, Wire};
use coracle_vmm::state::whole;
use serde_json::json;

use super::golden::{OTHER_PROCESSOR, root};
use super::{Hosts, SOON, merge};

const STREAMS: u8 = 4;
/// What the guest writes all the while, in MiB.
const WRITTEN_MIB: u64 = 24;
/// Less than a migration takes of it: it is in the middle of it then.
const MIDDLE_BYTES: u64 = WRITTEN_MIB << 20;

/// A guest that writes, and checks in the end what it has written.
fn writing(context: &Context, ms: u32) -> Outcome<Monitor> {
    let words = format!("do=hello do=dirty:mib={WRITTEN_MIB},ms={ms},seed=11 do=tick:ms=10,count=1000000");
    let config = Machine::unikernel(&context.environment, &words)
        .memory_mib(64)
        .config();
    let monitor = Launch::new(&context.environment)?.start()?;
    monitor.configure(&config)?;
    monitor.start_instance()?;
    monitor.console.wait_for("dirty: ready", SOON)?;
    Ok(monitor)
}

/// The guest of `source` goes by several streams, and finds its memory as it was. Who has it then.
fn goes(context: &Context, hosts: &Hosts, source: Monitor) -> Outcome<Monitor> {
    let (target, call, to) = hosts.receiver(context)?;
    let mut body = hosts.send(&to);
    merge(
        &mut body,
        &json!({ "streams": STREAMS, "on_timeout": "Stop", "timeout_s": 2 }),
    );
    source.must("PUT", "/migration/send", Some(&body))?;
    call.join().map_err(|_| "a thread has panicked")??;
    source.wait(SOON)?.expect(0)?;
    target.console.wait_for("dirty: ok", SOON)?;
    Ok(target)
}

/// A guest that writes all the while finds its memory as it was.
pub(super) fn memory_goes_by_several(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let hosts = Hosts::new(directory.path())?;
    for _ in 0..context.count(2, 50) {
        let source = writing(context, 3000)?;
        let target = goes(context, &hosts, source)?;
        let log = target.log()?;
        for number in 1..STREAMS {
            ensure!(log.contains(&format!("stream {number} has joined")), "{log}");
        }
        target.signal(rustix::process::Signal::KILL)?;
        target.wait(SOON)?;
    }
    Ok(())
}

/// One connection is cut at a moment that the seed chooses: the guest runs on where it is, and goes when it is sent again.
pub(super) fn one_that_is_lost_loses_the_migration(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let hosts = Hosts::new(directory.path())?;
    let mut seed = context.seed.clone();
    let source = writing(context, 20_000)?;
    for _ in 0..context.count(4, 100) {
        let (target, call, to) = hosts.receiver(context)?;
        let server = to.parse()?;
        let proxy = Proxy::start([127, 0, 0, 1].into(), server, seed.clone())?;
        let bytes = seed.below(MIDDLE_BYTES);
        proxy.set(Direction::ToServer, Fault::CloseAfter { bytes })?;
        let mut body = hosts.send(&proxy.address().to_string());
        merge(&mut body, &json!({ "streams": STREAMS, "to_name": "127.0.0.1" }));
        let answer = source.request("PUT", "/migration/send", Some(&body))?;
        ensure!(answer.status == 400, "after {bytes} bytes: {}", answer.body);
        // It has heard nothing that it could lose, if the first bytes were.
        let _ended = target.request("DELETE", "/migration", None);
        ensure!(call.join().is_ok_and(|call| call.is_err()), "it has received");
        goes_on(&source)?;
    }
    goes(context, &hosts, source)?;
    Ok(())
}

/// Whoever gives it up waits for none of the connections, though nothing passes by them any more.
pub(super) fn all_are_cut_when_it_is_given_up(context: &Context) -> Outcome {
    /// A connection that is waited for is given up after ten.
    const AT_ONCE: Duration = Duration::from_secs(2);
    let directory = tempfile::tempdir()?;
    let hosts = Hosts::new(directory.path())?;
    let source = writing(context, 20_000)?;
    let (target, call, to) = hosts.receiver(context)?;
    let proxy = Proxy::start([127, 0, 0, 1].into(), to.parse()?, context.seed.clone())?;
    let mut body = hosts.send(&proxy.address().to_string());
    merge(
        &mut body,
        &json!({ "streams": STREAMS, "bandwidth_limit": 8 << 20, "to_name": "127.0.0.1" }),
    );
    let body = body.to_string();
    let mut caller = source.connect()?;
    let sending = thread::spawn(move || caller.request("PUT", "/migration/send", Some(&body)));
    let until = Instant::now() + SOON;
    loop {
        let status = target.must("GET", "/migration", None)?.json()?;
        let taken = status.get("sent_bytes").and_then(serde_json::Value::as_u64);
        if taken.is_some_and(|bytes| bytes > 48 << 20) {
            break;
        }
        ensure!(Instant::now() < until && !sending.is_finished(), "{status}");
        thread::sleep(super::PERIOD);
    }
    proxy.set(Direction::ToServer, Fault::BlackHole)?;
    proxy.set(Direction::ToClient, Fault::BlackHole)?;
    let begun = Instant::now();
    source.must("DELETE", "/migration", None)?;
    let answer = sending.join().map_err(|_| "a thread has panicked")??;
    ensure!(begun.elapsed() < AT_ONCE, "{:?}", begun.elapsed());
    ensure!(
        answer.fault().contains("the migration was cancelled"),
        "{}",
        answer.body
    );
    target.must("DELETE", "/migration", None)?;
    ensure!(call.join().is_ok_and(|call| call.is_err()), "it has received");
    ensure!(begun.elapsed() < 2 * AT_ONCE, "{:?}", begun.elapsed());
    goes_on(&source)
}

/// Only who shows the token of the migration joins it, once under each number and in time; whoever else tries is told why, and
/// the machine is taken in all the same.
pub(super) fn strangers_join_nothing(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let hosts = Hosts::new(directory.path())?;
    let identity = Identity::read(&hosts.files()?)?;
    let (_receiver, call, to) = hosts.receiver(context)?;
    let wire = || -> Outcome<Wire<Stream>> {
        let socket = TcpStream::connect(&to)?;
        socket.set_read_timeout(Some(SOON))?;
        Ok(Wire::new(Stream::from(identity.call(socket, "127.0.0.1")?)))
    };
    let says = |kind: Kind, body: &[u8]| -> Outcome<(Wire<Stream>, Kind, String)> {
        let mut wire = wire()?;
        wire.send(kind, &[body])?;
        wire.flush()?;
        let (kind, why) = wire.receive()?;
        let why = String::from_utf8_lossy(why).into_owned();
        Ok((wire, kind, why))
    };
    let joins = |token: Token, number: u8| says(Kind::Join, &postcard::to_stdvec(&Join { token, number })?);
    let refused = |said: Outcome<(Wire<Stream>, Kind, String)>, why: &str| -> Outcome {
        let (_, kind, said) = said?;
        ensure!(
            kind == Kind::Refused && said.contains(why),
            "{why}: {kind:?} {said}"
        );
        Ok(())
    };
    refused(joins(Token::random()?, 1), "no migration is under way here")?;

    let mut frames = Wire::new(Cursor::new(std::fs::read(
        root().join(format!("version-{PROTOCOL_VERSION}")),
    )?));
    let (_, body) = frames.receive()?;
    let mut hello = Hello::read(body)?;
    hello.streams = 3;
    // It was recorded on another host, whose processor may have what this one has not: who made it is left.
    hello.cpuid.retain(|entry| entry.leaf == 0);
    let hello = postcard::to_stdvec(&hello)?;
    let mut first = wire()?;
    first.send(Kind::Hello, &[&hello])?;
    first.flush()?;
    let (kind, body) = first.receive()?;
    ensure!(kind == Kind::Ready, "{}", String::from_utf8_lossy(body));
    let Answer { token, .. } = whole(body)?;

    refused(joins(Token::random()?, 1), "no connection of the migration")?;
    refused(joins(token, 0), "has no further one with the number 0")?;
    refused(joins(token, 3), "has no further one with the number 3")?;
    refused(says(Kind::Hello, &hello), "another machine is being taken in")?;
    let (_second, kind, why) = joins(token, 2)?;
    ensure!(kind == Kind::Joined, "{kind:?} {why}");
    refused(joins(token, 2), "stream 2 is there already")?;
    let silent = TcpStream::connect(&to)?;

    let mut last = None;
    while let Ok((kind, body)) = frames.receive() {
        first.send(kind, &[body])?;
        if matches!(kind, Kind::Mark | Kind::State) {
            first.flush()?;
            let (kind, why) = first.receive()?;
            last = Some((kind, String::from_utf8_lossy(why).into_owned()));
        }
    }
    let (kind, why) = last.ok_or("there is a state")?;
    if kind == Kind::Loaded {
        refused(joins(token, 1), "all of the memory is here")?;
    } else {
        // The stream that is kept is of a processor that has more.
        ensure!(
            kind == Kind::Refused && why.contains(OTHER_PROCESSOR),
            "{kind:?} {why}"
        );
    }
    drop((first, silent));
    ensure!(call.join().is_ok_and(|call| call.is_err()), "it has received");
    Ok(())
}

fn goes_on(monitor: &Monitor) -> Outcome {
    let state = monitor.must("GET", "/", None)?.json()?;
    ensure!(state.get("state") == Some(&json!("Running")), "{state}");
    Ok(())
}
