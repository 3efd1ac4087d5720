//! Memory that is packed on its way.

use coracle_tests::case::Context;
use coracle_tests::guest::Machine;
use coracle_tests::harness::proxy::{Direction, Fault, Proxy};
use coracle_tests::monitor::Launch;
use coracle_tests::{Outcome, ensure};
use serde_json::{Value, json};

use super::{Hosts, SOON, merge};

/// Slower than anything packs, however it was compiled.
const LINK_BYTES_PER_S: u64 = 20_000_000;
/// What the guest has written; nearly all of each page is zeros.
const WRITTEN_MIB: u64 = 96;
/// Less where all of it goes by the slow link.
const PLAIN_MIB: u64 = 24;

/// By a slow link: all of it, and all but what was sent to find out; and nothing where nobody asked.
pub(super) fn is_packed_where_it_pays(context: &Context) -> Outcome {
    let written_bytes = WRITTEN_MIB << 20;
    let plain = wire_bytes(context, PLAIN_MIB, "None", 1)?;
    ensure!(plain > PLAIN_MIB << 20, "{plain} bytes by the wire");
    for streams in [1, 3] {
        let packed = wire_bytes(context, WRITTEN_MIB, "Lz4", streams)?;
        ensure!(packed < written_bytes / 8, "{packed} bytes by the wire");
    }
    let measured = wire_bytes(context, WRITTEN_MIB, "Auto", 1)?;
    ensure!(
        measured < written_bytes / 2,
        "{measured} bytes by the wire, though it is slow"
    );
    Ok(())
}

/// What goes over the connections.
fn wire_bytes(context: &Context, mib: u64, compression: &str, streams: u8) -> Outcome<u64> {
    let directory = tempfile::tempdir()?;
    let hosts = Hosts::new(directory.path())?;
    let words = format!("do=hello do=dirty:mib={mib},ms=12000,rate_mib_s=1,seed=3");
    let config = Machine::unikernel(&context.environment, &words)
        .memory_mib(128)
        .config();
    let source = Launch::new(&context.environment)?.start()?;
    source.configure(&config)?;
    source.start_instance()?;
    source.console.wait_for("dirty: ready", SOON)?;
    let (target, call, to) = hosts.receiver(context)?;
    let proxy = Proxy::start([127, 0, 0, 1].into(), to.parse()?, context.seed.clone())?;
    proxy.set(
        Direction::ToServer,
        Fault::Rate {
            bytes_per_second: LINK_BYTES_PER_S,
        },
    )?;
    let mut body = hosts.send(&proxy.address().to_string());
    merge(
        &mut body,
        &json!({ "compression": compression, "streams": streams, "downtime_ms": 200 }),
    );
    let body = body.to_string();
    let mut caller = source.connect()?;
    let sending = std::thread::spawn(move || caller.request("PUT", "/migration/send", Some(&body)));
    let (mut seen, mut taken) = (0, 0);
    while !sending.is_finished() {
        // It may end while it is asked.
        if let Ok(status) = source
            .request("GET", "/migration", None)
            .and_then(|answer| answer.json())
        {
            let bytes = |name| status.get(name).and_then(Value::as_u64).unwrap_or(0);
            (seen, taken) = (bytes("wire_bytes").max(seen), bytes("sent_bytes").max(taken));
        }
        std::thread::sleep(super::PERIOD);
    }
    let answer = sending.join().map_err(|_| "a thread has panicked")??;
    ensure!(
        answer.status == 204,
        "{compression} by {streams}: {}, {}",
        answer.body,
        source.log()?
    );
    call.join().map_err(|_| "a thread has panicked")??;
    let ended = target.wait(SOON)?;
    ensure!(ended.console.contains("dirty: ok"), "{}", ended.console);
    let log = source.log()?;
    let sent = log
        .split("migration: sent ")
        .nth(1)
        .and_then(|rest| rest.split(' ').next()?.parse().ok());
    let sent: u64 = sent.ok_or("the source says what it has sent")?;
    ensure!(
        seen > 0 && seen <= sent && taken >= mib << 20,
        "{seen} of {sent} bytes were told of, for {taken} of memory"
    );
    source.wait(SOON)?.expect(0)?;
    Ok(sent)
}
