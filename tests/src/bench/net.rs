//! One run of a guest that talks with its host: by TCP over a tap, or by a stream of its socket device.

use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::time::Duration;

use serde_json::json;

use super::measurement::{Figure, Results, Spent, microseconds, number};
use crate::environment::Environment;
use crate::guest::Machine;
use crate::harness::peer::{Part, Peer};
use crate::monitor::{Launch, Monitor};
use crate::{Outcome, ensure};

/// The way from the guest to its host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// TCP over a tap.
    Tcp,
    /// A stream of the socket device.
    Vsock,
}

/// What the guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Talk {
    /// It sends so many MiB.
    Send(u64),
    /// It takes so many MiB.
    Receive(u64),
    /// It asks so many times, and waits for each answer.
    Ask(u64),
}

/// The tap of the guest, and the host's address behind it.
pub const TAP: &str = "tap0";
/// See [`TAP`].
pub const HOST: IpAddr = IpAddr::V4(Ipv4Addr::new(172, 16, 0, 1));

/// Bytes of a question, and of its answer.
const QUESTION_BYTES: usize = 64;
const MEMORY_MIB: u32 = 128;
/// The guest waits so long before and after: time to look at the clocks of the threads.
const REST_MS: u64 = 100;
const PATIENCE: Duration = Duration::from_secs(60);
const PORT: u16 = 700;

impl Way {
    /// Its name, which is also the guest's verb.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Vsock => "vsock",
        }
    }
}

impl Talk {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Send(_) => "send",
            Self::Receive(_) => "receive",
            Self::Ask(_) => "ask",
        }
    }

    fn part(self) -> Outcome<Part> {
        Ok(match self {
            Self::Send(_) => Part::Takes,
            Self::Receive(mib) => Part::Gives(usize::try_from(mib)? << 20),
            Self::Ask(_) => Part::Answers,
        })
    }

    fn words(self) -> String {
        match self {
            Self::Send(mib) => format!("role=send,mib={mib}"),
            Self::Receive(_) => "role=receive".to_owned(),
            Self::Ask(count) => format!("role=ask,count={count},bytes={QUESTION_BYTES}"),
        }
    }

    fn passes(self) -> Outcome<usize> {
        Ok(match self {
            Self::Send(mib) | Self::Receive(mib) => usize::try_from(mib)? << 20,
            Self::Ask(count) => usize::try_from(count)? * QUESTION_BYTES,
        })
    }
}

/// Has a guest of `program`, which has Firecracker's command line, do it once, waiting as `wait` says, and adds the figures. On
/// a host with a bridge at [`HOST`] and [`TAP`] on it.
///
/// # Errors
///
/// When a byte is missing, or nothing happens for too long.
pub fn measure(
    program: &Path,
    environment: &Environment,
    (way, talk, wait): (Way, Talk, &str),
    results: &mut Results,
) -> Outcome {
    let launch = Launch::of(program)?.without_api();
    let socket = launch.directory().join("test-v");
    let (peer, place) = match way {
        Way::Tcp => (
            Peer::new(HOST, talk.part()?)?,
            format!("ip=172.16.0.2,host={HOST},"),
        ),
        Way::Vsock => (Peer::of_device(&socket, PORT, talk.part()?)?, String::new()),
    };
    let words = format!(
        "do=hello do=tick:ms={REST_MS},count=1 do={}:{place}port={},{},wait={wait} do=tick:ms={REST_MS},count=1",
        way.name(),
        peer.port(),
        talk.words(),
    );
    let machine = Machine::unikernel(environment, &words).memory_mib(MEMORY_MIB);
    let machine = match way {
        Way::Tcp => machine.part(
            "network-interfaces",
            json!([{ "iface_id": "eth0", "host_dev_name": TAP, "guest_mac": "06:00:ac:10:00:02" }]),
        ),
        Way::Vsock => machine.part("vsock", json!({ "guest_cid": 3, "uds_path": socket })),
    };
    let monitor = launch.config(&machine.config())?.spawn()?;
    let observed = observe(&monitor, &format!("{}: ", way.name()));
    let ended = monitor.wait(PATIENCE)?;
    let (line, spent) = observed.map_err(|failure| {
        let failure = failure.message().unwrap_or_default();
        format!("{failure}{}", ended.errors)
    })?;
    let passed = peer.ended()?;
    ensure!(passed == talk.passes()?, "{passed} bytes have passed");
    let bytes = number(&line, "bytes")?;
    let figures = match talk {
        Talk::Send(_) | Talk::Receive(_) => vec![
            (Figure::Bandwidth, number(&line, "mb_per_s")?),
            (
                Figure::HostCpuOfGigabyte,
                microseconds(spent.others) * 1e6 / bytes,
            ),
        ],
        Talk::Ask(count) => {
            let count = f64::from(u32::try_from(count)?);
            vec![
                (Figure::LatencyMedian, number(&line, "lat_us_p50")?),
                (Figure::LatencyTail, number(&line, "lat_us_p999")?),
                (Figure::HostCpu, microseconds(spent.others) / count),
            ]
        }
    };
    for (figure, value) in figures {
        results.entry(figure).or_default().push(value);
    }
    Ok(())
}

fn observe(monitor: &Monitor, line: &str) -> Outcome<(String, Spent)> {
    monitor.console.wait_for("hello from", PATIENCE)?;
    let before = monitor.process().thread_times()?;
    let line = monitor.console.wait_for(line, PATIENCE)?;
    let after = monitor.process().thread_times()?;
    Ok((line, Spent::between(&before, &after)))
}
