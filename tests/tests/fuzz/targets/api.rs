//! The API as a client's bytes reach it: HTTP, the table of verbs, JSON, the configuration.
//!
//! An input is what a client sends. How it is cut into pieces must not matter; whatever is asked, the
//! answer is one well-formed response.

use std::sync::Arc;

use coracle_devices::mmds::Mmds;
use coracle_vmm::api::http::{Decoder, Event, HttpError, Request};
use coracle_vmm::api::routes::ROUTES;
use coracle_vmm::api::verbs::permitted;
use coracle_vmm::api::{Fault, Verb, route};
use coracle_vmm::config::{Config, ConfigError, Phase};
use coracle_vmm::metrics::RequestCounters;

use super::configuration;

/// Short, so that short inputs reach it, in bytes.
const BODY_BYTES_MAX: usize = 2048;

pub(crate) fn run(data: &[u8]) {
    let whole = decode([data].into_iter());
    assert_eq!(whole, decode(data.chunks(1)), "cut into bytes");
    assert_eq!(whole, decode(Pieces::of(data)), "cut into pieces");

    let (events, error) = whole;
    if let Some(error) = error {
        check_fault(&Fault::from_error(&error), false);
    }
    let counters = Arc::new(RequestCounters::default());
    let mut config = Config::default();
    for event in events {
        if let Event::Request(request) = event {
            serve(&request, &counters, &mut config);
        }
    }
    configuration::check(&config);
}

/// What comes out when the pieces go in one after the other, up to the first error.
fn decode<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> (Vec<Event>, Option<HttpError>) {
    let mut decoder = Decoder::new(BODY_BYTES_MAX);
    let mut events = Vec::new();
    for piece in pieces {
        decoder.feed(piece);
        loop {
            match decoder.next_event() {
                Ok(Some(event)) => events.push(event),
                Ok(None) => break,
                Err(error) => return (events, Some(error)),
            }
        }
    }
    (events, None)
}

fn serve(request: &Request, counters: &RequestCounters, config: &mut Config) {
    assert!(request.body.len() <= BODY_BYTES_MAX);
    let verb = match route(request, counters) {
        Ok(verb) => verb,
        Err(fault) => return check_fault(&fault, request.keep_alive),
    };
    let line = ROUTES
        .iter()
        .find(|line| line.method == request.method && line.kinds.contains(&verb.kind()));
    assert!(line.is_some(), "{verb:?} came of a {:?}", request.method);
    for phase in Phase::ALL {
        if let Err(fault) = permitted(phase, verb.kind()) {
            check_fault(&fault, request.keep_alive);
        }
    }
    if let Err(error) = apply(verb, config) {
        check_fault(&error.into(), request.keep_alive);
    }
}

/// What the monitor does with a verb before the machine starts.
fn apply(verb: Verb, config: &mut Config) -> Result<(), ConfigError> {
    match verb {
        Verb::PutMachineConfig(machine) => config.set_machine(machine)?,
        Verb::PatchMachineConfig(patch) => config.patch_machine(&patch)?,
        Verb::PutCpuConfig(cpu) => config.set_cpu(cpu),
        Verb::PutBootSource(source) => config.set_boot_source(source)?,
        Verb::PutDrive(drive) => config.insert_drive(drive)?,
        Verb::PatchDrive(patch) => config.patch_drive(&patch)?,
        Verb::DeleteDrive(id) => config.unplug_drive(&id)?,
        Verb::PutRateLimiterGroup(group) => config.insert_group(group)?,
        Verb::PatchRateLimiterGroup(patch) => config.patch_group(&patch)?,
        Verb::PutNetworkInterface(network) => config.insert_network(network)?,
        Verb::PatchNetworkInterface(patch) => config.patch_network(&patch)?,
        Verb::DeleteNetworkInterface(id) => config.unplug_network(&id)?,
        Verb::PutMmdsConfig(mmds) => config.set_mmds(mmds)?,
        // A patch of what is not there is refused, and that is no rule of the configuration's.
        Verb::PutMmds(content) => {
            let _ = Mmds::new().put(content);
        }
        Verb::PatchMmds(patch) => {
            let mmds = Mmds::new();
            let stored = mmds.put(serde_json::json!({ "a": { "b": 1 }, "c": [2] }));
            let _ = stored.and_then(|()| mmds.patch(patch));
        }
        Verb::PutPmem(pmem) => config.insert_pmem(pmem)?,
        Verb::PatchPmem(patch) => config.patch_pmem(&patch)?,
        Verb::PutVsock(vsock) => config.set_vsock(vsock)?,
        Verb::PutMemoryHotplug(hotplug) => config.set_memory_hotplug(hotplug)?,
        Verb::PatchMemoryHotplug(update) => config.check_requested(&update)?,
        Verb::GetMemoryHotplug => drop(config.expect_memory_hotplug()?),
        Verb::PutBalloon(balloon) => config.set_balloon(balloon)?,
        Verb::PatchBalloon(patch) => config.patch_balloon(&patch)?,
        Verb::PatchBalloonStatistics(patch) => config.patch_statistics(&patch)?,
        Verb::GetBalloonStatistics => config.expect_statistics()?,
        Verb::StartHinting(_) | Verb::GetHintingStatus | Verb::StopHinting => config.expect_hinting()?,
        Verb::PutEntropy(entropy) => config.set_entropy(entropy),
        Verb::PutSerial(serial) => config.set_serial(serial),
        Verb::PutLogger(logger) => config.set_logger(logger),
        Verb::PutMetrics(metrics) => config.set_metrics(metrics)?,
        Verb::GetInstance
        | Verb::GetVersion
        | Verb::GetMachineConfig
        | Verb::GetMetrics
        | Verb::GetMmds
        | Verb::GetBalloon
        | Verb::FlushMetrics
        | Verb::Start
        | Verb::SendCtrlAltDel
        | Verb::Pause
        | Verb::Resume
        | Verb::GetConfig
        | Verb::CreateSnapshot(_)
        | Verb::GetSnapshot
        | Verb::CancelSnapshot
        | Verb::SendMigration(_)
        | Verb::ReceiveMigration(_)
        | Verb::GetMigration
        | Verb::WatchMigration
        | Verb::CancelMigration
        | Verb::RecoverMigration(_) => {}
        Verb::LoadSnapshot(load) => drop(load.memory()),
    }
    Ok(())
}

/// A fault must come out as one response, whatever of the client's words is in it.
fn check_fault(fault: &Fault, keep_alive: bool) {
    let bytes = fault.response().encode(keep_alive);
    let text = std::str::from_utf8(&bytes).expect("a response is text");
    let (head, body) = text.split_once("\r\n\r\n").expect("a head has an end");
    assert!(head.starts_with("HTTP/1.1 400 "), "{head}");
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("Content-Length: "))
        .expect("a fault has a body");
    assert_eq!(length.parse(), Ok(body.len()));
    let body: serde_json::Value = serde_json::from_str(body).expect("the body is JSON");
    let message = body.get("fault_message").and_then(serde_json::Value::as_str);
    assert_eq!(message, Some(fault.message.as_str()));
}

/// Pieces of different lengths that depend on what comes before them, so that an input names its own cuts.
struct Pieces<'a> {
    rest: &'a [u8],
    state: u32,
}

impl<'a> Pieces<'a> {
    fn of(data: &'a [u8]) -> Self {
        Self {
            rest: data,
            state: 0x811c_9dc5,
        }
    }
}

impl<'a> Iterator for Pieces<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let first = *self.rest.first()?;
        self.state = (self.state ^ u32::from(first)).wrapping_mul(0x0100_0193);
        let [low, high, ..] = self.state.to_le_bytes();
        // Mostly short, sometimes long.
        let len = usize::from(low & 31) * if high & 7 == 0 { 64 } else { 1 } + 1;
        let (piece, rest) = self.rest.split_at(len.min(self.rest.len()));
        self.rest = rest;
        Some(piece)
    }
}
