//! A machine with a vsock device, on one host with its target.

use std::os::unix::net::UnixStream;

use coracle_tests::case::Context;
use coracle_tests::guest::Machine;
use coracle_tests::monitor::Launch;
use coracle_tests::{Outcome, ensure};
use rustix::process::Signal;
use serde_json::json;

use super::{Hosts, SOON};

/// The socket is where the target has it, and no longer where the source had it.
pub(super) fn are_made_where_it_arrives(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let hosts = Hosts::new(directory.path())?;
    let here = directory.path().join("test-v");
    let there = directory.path().join("test-w");
    let config = Machine::unikernel(&context.environment, "do=hello do=tick:ms=10,count=1000000")
        .memory_mib(32)
        .part("vsock", json!({ "guest_cid": 3, "uds_path": here }))
        .config();
    let source = Launch::new(&context.environment)?.start()?;
    source.configure(&config)?;
    source.start_instance()?;
    source.console.wait_for("hello", SOON)?;
    let none = json!({});
    let launch = Launch::new(&context.environment)?;
    hosts.refuse(&source, launch, [&none, &none], "a running process listens there")?;
    drop(UnixStream::connect(&here)?);

    let receive = json!({ "overrides": { "vsock": { "uds_path": there } } });
    let (target, call, to) = hosts.receiver_of(context, &receive)?;
    source.must("PUT", "/migration/send", Some(&hosts.send(&to)))?;
    call.join().map_err(|_| "a thread has panicked")??;
    target.console.wait_for("tick: ", SOON)?;
    drop(UnixStream::connect(&there)?);
    source.wait(SOON)?.expect(0)?;
    ensure!(!here.exists(), "the source's socket is left over");
    target.signal(Signal::TERM)?;
    target.wait(SOON)?;
    ensure!(!there.exists(), "the target's socket is left over");
    Ok(())
}
