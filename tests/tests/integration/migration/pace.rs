//! Guests that write memory faster than it is sent.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use coracle_tests::case::Context;
use coracle_tests::guest::Machine;
use coracle_tests::monitor::{Launch, Monitor};
use coracle_tests::{Outcome, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};

use super::{Hosts, SOON, merge};

/// Less than a guest writes per second, in bytes, that hardly runs because the host is busy.
const SLOW_BYTES_PER_S: u64 = 4_000_000;
/// More than one writes that runs for the least share of the time.
const FAST_BYTES_PER_S: u64 = 60_000_000;
const WRITTEN_MIB: u64 = 4;

/// Not slowed down it stays; slowed down it goes; and at last it stands still for as long as it takes.
pub(super) fn fast_writers_are_slowed_down_or_stopped(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let hosts = Hosts::new(directory.path())?;
    let words = format!("do=hello do=dirty:mib={WRITTEN_MIB},ms=15000,seed=5");
    let config = Machine::unikernel(&context.environment, &words)
        .memory_mib(32)
        .config();
    let first = Launch::new(&context.environment)?.start()?;
    first.configure(&config)?;
    first.start_instance()?;
    first.console.wait_for("dirty: ready", SOON)?;

    let mut full_speed = json!({
        "mode": "Precopy", "timeout_s": 2, "downtime_ms": 13, "bandwidth_limit": SLOW_BYTES_PER_S,
    });
    let (refused, _) = asked(context, &hosts, &first, &full_speed)?;
    ensure!(refused.is_none(), "it is sent at its full speed");

    // In more time than any clock counts.
    let slowed = json!({ "bandwidth_limit": FAST_BYTES_PER_S, "timeout_s": u64::MAX, "downtime_ms": 50 });
    let (second, _) = asked(context, &hosts, &first, &slowed)?;
    let second = second.ok_or("it was slowed down, and not sent")?;
    first.wait(SOON)?.expect(0)?;

    merge(&mut full_speed, &json!({ "on_timeout": "Stop" }));
    let begun = Instant::now();
    let (third, share) = asked(context, &hosts, &second, &full_speed)?;
    let third = third.ok_or("it was not stopped")?;
    ensure!(share == 1000, "it was slowed down to {share}");
    let least = Duration::from_millis((WRITTEN_MIB << 20) * 1000 / SLOW_BYTES_PER_S);
    ensure!(begun.elapsed() >= least, "more was sent than is allowed");
    let ended = third.wait(SOON)?;
    ensure!(ended.console.contains("dirty: ok"), "{}", ended.console);
    second.wait(SOON)?.expect(0)
}

/// Sends the guest with these members in what is asked. Says who has it then, if it went, and the least share of the time that
/// its vCPUs were seen to have.
fn asked(
    context: &Context,
    hosts: &Hosts,
    source: &Monitor,
    members: &Value,
) -> Outcome<(Option<Monitor>, u64)> {
    thread::scope(|scope| {
        let (receiver, call, to) = hosts.receiver(context)?;
        let mut body = hosts.send(&to);
        merge(&mut body, members);
        let body = body.to_string();
        let mut caller = source.connect()?;
        let sending = scope.spawn(move || caller.request("PUT", "/migration/send", Some(&body)));
        let mut least = 1000;
        let mut was_seen = false;
        while !sending.is_finished() {
            // Before it begins there is one line, which says so.
            for status in events(source)? {
                let share = status.get("vcpu_permille").and_then(Value::as_u64).unwrap_or(0);
                least = least.min(share);
                was_seen |= status.get("state") == Some(&json!("Sending"));
            }
            if least < 1000 && !sending.is_finished() {
                // A vCPU that rests is stopped with its process as one that runs is, and goes on.
                source.signal(Signal::STOP)?;
                thread::sleep(Duration::from_millis(5));
                source.signal(Signal::CONT)?;
            }
            thread::sleep(super::PERIOD);
        }
        ensure!(was_seen, "nothing was told of it");
        let answer = sending.join().map_err(|_| "a thread has panicked")??;
        if answer.status == 204 {
            call.join().map_err(|_| "a thread has panicked")??;
            return Ok((Some(receiver), least));
        }
        ensure!(
            answer.fault().contains("faster than it is sent"),
            "{}",
            answer.body
        );
        receiver.must("DELETE", "/migration", None)?;
        ensure!(call.join().is_ok_and(|call| call.is_err()), "it has received");
        Ok((None, least))
    })
}

/// All that is told of a migration until it has ended, line by line.
fn events(of: &Monitor) -> Outcome<Vec<Value>> {
    let Ok(mut stream) = UnixStream::connect(of.socket()) else {
        // The machine has gone, and the process with it.
        return Ok(Vec::new());
    };
    stream.set_read_timeout(Some(SOON))?;
    stream.write_all(b"GET /migration/events HTTP/1.1\r\n\r\n")?;
    let mut said = String::new();
    stream.read_to_string(&mut said)?;
    let (_, lines) = said.split_once("\r\n\r\n").unwrap_or_default();
    Ok(lines
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<_, _>>()?)
}
