//! The network of a guest: a real Linux behind a tap.

mod pairs;
mod together;

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use coracle_tests::case::{Case, Context};
use coracle_tests::environment::Need;
use coracle_tests::guest::{Linux, Machine, run};
use coracle_tests::harness::hosts::Star;
use coracle_tests::harness::peer::{Part, Peer};
use coracle_tests::monitor::Launch;
use coracle_tests::{Outcome, ensure};
use serde_json::{Value, json};

use super::snapshot::{Files, killed, saved, started, with};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "linux_fetches_a_file_from_its_host_and_sends_it_back",
        need: Need::KvmAndHosts,
        run: fetches_and_sends,
    },
    Case {
        name: "streams_of_both_directions_arrive_whole_and_questions_are_answered",
        need: Need::KvmAndHosts,
        run: streams,
    },
    Case {
        name: "a_connection_goes_on_when_its_guest_does_on_another_tap",
        need: Need::KvmAndHosts,
        run: goes_on_on_another_tap,
    },
    Case {
        name: "two_linux_guests_fetch_from_each_other_while_they_are_paused_saved_and_moved",
        need: Need::KvmAndHosts,
        run: together::fetch_from_each_other,
    },
    Case {
        name: "a_tap_whose_descriptor_is_handed_in_serves",
        need: Need::KvmAndHosts,
        run: is_handed_in,
    },
    Case {
        name: "linux_uses_a_pair_of_queues_for_each_processor_and_goes_on_with_them",
        need: Need::KvmAndHosts,
        run: pairs::two_are_used,
    },
    Case {
        name: "a_pair_of_queues_that_the_guest_does_not_use_gets_no_frames",
        need: Need::KvmAndHosts,
        run: pairs::one_is_used,
    },
    Case {
        name: "a_tap_whose_descriptors_are_handed_in_serves_each_pair",
        need: Need::KvmAndHosts,
        run: pairs::are_handed_in,
    },
    Case {
        name: "pairs_of_queues_that_cannot_be_had_are_an_error_that_says_what_to_do",
        need: Need::KvmAndHosts,
        run: pairs::what_cannot_be_had,
    },
    Case {
        name: "a_tap_that_is_deleted_costs_nothing",
        need: Need::KvmAndHosts,
        run: pairs::tap_is_deleted,
    },
    Case {
        name: "a_tap_that_cannot_be_had_is_an_error_that_says_what_to_do",
        need: Need::KvmAndHosts,
        run: what_cannot_be_had,
    },
];

/// A boot takes ten seconds where kernel code is emulated, and each packet milliseconds.
const END_WITHIN: Duration = Duration::from_secs(240);
const HOST: IpAddr = IpAddr::V4(Ipv4Addr::new(172, 16, 0, 1));
const BYTES: usize = 1 << 20;
/// What the server sends at a time.
const PIECE_BYTES: usize = 16 << 10;

/// The guest's interface, on this tap.
fn interface(tap: &str) -> Value {
    json!({ "iface_id": "eth0", "host_dev_name": tap, "guest_mac": "06:00:ac:10:00:02" })
}

/// A host with a bridge, a server of one file, and somebody to send it back to.
struct Network {
    star: Star,
    content: Vec<u8>,
    /// How much of it has left the server.
    sent: Arc<AtomicUsize>,
    serves: JoinHandle<std::io::Result<()>>,
    hears: JoinHandle<std::io::Result<Vec<u8>>>,
    /// What the guest does.
    words: String,
}

impl Network {
    /// A server that rests so long after each piece; before each command of the guest there are these words.
    fn new(context: &Context, rest: Duration, before: &str) -> Outcome<Self> {
        let star = Star::new(0)?;
        star.server.bridge(HOST, &["tap0", "tap1"])?;
        let mut seed = context.seed.clone();
        let content: Vec<u8> = (0..BYTES / 8).flat_map(|_| seed.draw().to_le_bytes()).collect();
        let listen = || TcpListener::bind((HOST, 0));
        let (from, to) = (star.server.inside(listen)??, star.server.inside(listen)??);
        let words = format!(
            "run ifconfig eth0 172.16.0.2 up && {before}wget -q -O /data/f http://{}/f && {before}nc 172.16.0.1 {} < /data/f",
            from.local_addr()?,
            to.local_addr()?.port()
        );
        let sent = Arc::<AtomicUsize>::default();
        let (given, counted) = (content.clone(), Arc::clone(&sent));
        Ok(Self {
            star,
            content,
            sent,
            serves: thread::spawn(move || serve(&from, &given, rest, &counted)),
            hears: thread::spawn(move || hear(&to)),
            words,
        })
    }

    fn machine(&self, context: &Context, launch: &std::path::Path, interface: &Value) -> Outcome<Machine> {
        let linux = Linux::read(&context.environment)?;
        Ok(linux
            .machine("smp", launch, &self.words)?
            .part("network-interfaces", json!([interface])))
    }

    /// All of it has come back, and nothing else.
    fn has_come_back(self) -> Outcome {
        self.serves.join().map_err(|_| "the server panicked")??;
        let heard = self.hears.join().map_err(|_| "the receiver panicked")??;
        ensure!(
            heard == self.content,
            "{} bytes came back, and others",
            heard.len()
        );
        Ok(())
    }
}

fn fetches_and_sends(context: &Context) -> Outcome {
    let network = Network::new(context, Duration::ZERO, "")?;
    let launch = Launch::new(&context.environment)?;
    let machine = network.machine(context, launch.directory(), &interface("tap0"))?;
    let ended = network
        .star
        .server
        .inside(|| run(launch, &machine, END_WITHIN))??;
    ended.expect(0)?;
    network.has_come_back()
}

fn streams(context: &Context) -> Outcome {
    let star = Star::new(0)?;
    star.server.bridge(HOST, &["tap0"])?;
    let mib = context.count(64, 4096);
    let bytes = usize::try_from(mib)? << 20;
    let peers = star.server.inside(|| -> Outcome<_> {
        Ok([
            Peer::new(HOST, Part::Takes)?,
            Peer::new(HOST, Part::Gives(bytes))?,
            Peer::new(HOST, Part::Answers)?,
        ])
    })??;
    let words: Vec<String> = peers
        .iter()
        .zip(["role=send", "role=receive", "role=ask,count=500"])
        .map(|(peer, role)| {
            let port = peer.port();
            format!("do=tcp:{role},ip=172.16.0.2,host={HOST},port={port},mib={mib}")
        })
        .collect();
    let machine = Machine::unikernel(&context.environment, &words.join(" ")).part(
        "network-interfaces",
        json!([{ "iface_id": "eth0", "host_dev_name": "tap0" }]),
    );
    let launch = Launch::new(&context.environment)?;
    let ended = star.server.inside(|| run(launch, &machine, END_WITHIN))??;
    let lines = ended.console.lines().filter(|line| line.starts_with("tcp: "));
    lines.for_each(|line| println!("{line}"));
    ended.expect(0)?;
    let told = format!("role=receive bytes={bytes} ");
    ensure!(ended.console.contains(&told), "{}", ended.console);
    let [taken, given, answered] = peers.map(Peer::ended);
    let passed = (taken?, given?, answered?);
    ensure!(passed == (bytes, bytes, 500 * 64), "{passed:?}");
    Ok(())
}

fn goes_on_on_another_tap(context: &Context) -> Outcome {
    let network = Network::new(context, Duration::from_millis(50), "")?;
    let directory = tempfile::tempdir()?;
    let config = network
        .machine(context, directory.path(), &interface("tap0"))?
        .config();
    let host = &network.star.server;
    let first = host.inside(|| started(context, &config))??;
    let deadline = Instant::now() + END_WITHIN;
    while network.sent.load(Ordering::SeqCst) < BYTES / 4 {
        ensure!(
            Instant::now() < deadline,
            "it fetches nothing: {}",
            first.console.text()
        );
        thread::sleep(Duration::from_millis(5));
    }
    let files = Files::in_directory(directory.path(), "test-net");
    saved(&first, &files, "Full")?;
    killed(first)?;
    ensure!(network.sent.load(Ordering::SeqCst) < BYTES, "it has all of it");

    let second = host.inside(|| Launch::new(&context.environment)?.start())??;
    let load = |id: &str| {
        let overrides = json!([{ "iface_id": id, "host_dev_name": "tap1" }]);
        with(files.load("lazy"), "", "network_overrides", overrides)
    };
    let answer = second.request("PUT", "/snapshot/load", Some(&load("eth1")))?;
    ensure!(answer.status == 400, "{answer:?}");
    ensure!(answer.fault().contains("`eth1`"), "{answer:?}");
    second.must("PUT", "/snapshot/load", Some(&load("eth0")))?;
    let config: Value = serde_json::from_str(&second.must("GET", "/vm/config", None)?.body)?;
    let tap = config.pointer("/network-interfaces/0/host_dev_name");
    ensure!(tap == Some(&json!("tap1")), "{config}");
    second.wait(END_WITHIN)?.expect(0)?;
    network.has_come_back()
}

/// What opens a tap, and executes its arguments with the descriptor as number 9.
const HANDS_IN: &str = "\
import fcntl, os, struct, sys
tun = os.open('/dev/net/tun', os.O_RDWR)
fcntl.ioctl(tun, 0x400454ca, struct.pack('16sH22x', b'tap0', 0x5002)) # TUNSETIFF: IFF_TAP, IFF_NO_PI, IFF_VNET_HDR
os.dup2(tun, 9)
os.execv(sys.argv[1], sys.argv[1:])
";

fn is_handed_in(context: &Context) -> Outcome {
    let network = Network::new(context, Duration::ZERO, "")?;
    let launch = Launch::new(&context.environment)?.by_way_of(["python3", "-c", HANDS_IN]);
    let machine = network.machine(context, launch.directory(), &interface("/dev/fd/9"))?;
    let ended = network
        .star
        .server
        .inside(|| run(launch, &machine, END_WITHIN))??;
    ended.expect(0)?;
    network.has_come_back()?;

    // The same while a guest runs: one descriptor is one interface's, and what the monitor has opened itself is none.
    let star = Star::new(0)?;
    star.server.bridge(HOST, &["tap0"])?;
    let launch = Launch::new(&context.environment)?.by_way_of(["python3", "-c", HANDS_IN]);
    let machine = Machine::unikernel(&context.environment, "do=hello do=tick:ms=20,count=100000");
    let launch = launch.config(&machine.config())?;
    let monitor = star.server.inside(|| launch.start())??;
    monitor.console.wait_for("tick: n=1 ", END_WITHIN)?;
    let put = |id: &str, tap: &str| {
        let body = json!({ "iface_id": id, "host_dev_name": tap });
        monitor.request("PUT", &format!("/network-interfaces/{id}"), Some(&body))
    };
    for descriptor in 0..40 {
        if descriptor != 9 {
            let answer = put("eth1", &format!("/dev/fd/{descriptor}"))?;
            ensure!(answer.fault().contains("no descriptor of a tap"), "{answer:?}");
        }
    }
    ensure!(
        put("eth0", "/dev/fd/9")?.status == 204,
        "{:?}",
        put("eth0", "/dev/fd/9")?
    );
    for (again, words) in [("/dev/fd/9", "`eth0`"), ("/dev/fd/09", "no descriptor of a tap")] {
        let answer = put("eth1", again)?;
        ensure!(
            answer.status == 400 && answer.fault().contains(words),
            "{again}: {answer:?}"
        );
    }
    killed(monitor)
}

/// Answers one request by HTTP.
fn serve(listener: &TcpListener, content: &[u8], rest: Duration, sent: &AtomicUsize) -> std::io::Result<()> {
    let (socket, _) = listener.accept()?;
    let mut lines = BufReader::new(&socket).lines();
    while lines.next().transpose()?.is_some_and(|line| !line.is_empty()) {}
    let head = format!("HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", content.len());
    (&socket).write_all(head.as_bytes())?;
    for piece in content.chunks(PIECE_BYTES) {
        (&socket).write_all(piece)?;
        sent.fetch_add(piece.len(), Ordering::SeqCst);
        thread::sleep(rest);
    }
    Ok(())
}

/// What one connection brings.
fn hear(listener: &TcpListener) -> std::io::Result<Vec<u8>> {
    let (mut socket, _) = listener.accept()?;
    let mut heard = vec![0; BYTES];
    socket.read_exact(&mut heard)?;
    Ok(heard)
}

fn what_cannot_be_had(context: &Context) -> Outcome {
    let star = Star::new(0)?;
    star.server.bridge(HOST, &["tap0"])?;
    let network = |id: &str, tap: &str| json!({ "iface_id": id, "host_dev_name": tap });
    let launch = || Launch::new(&context.environment)?.start();
    let monitor = star.server.inside(launch)??;
    let put = |id: &str, tap: &str| {
        let path = format!("/network-interfaces/{id}");
        monitor.request("PUT", &path, Some(&network(id, tap)))
    };
    for (tap, words) in [
        ("sixteen-is-long-", "1 to 15 bytes"),
        ("lo", "mode tap"),
        ("/dev/fd/0", "no descriptor of a tap"),
        ("/dev/fd/1000", "no descriptor of a tap"),
    ] {
        let answer = put("eth0", tap)?;
        ensure!(answer.status == 400, "{tap}: {answer:?}");
        ensure!(answer.fault().contains(words), "{tap}: {answer:?}");
    }
    let answer = put("eth0", "tap0")?;
    ensure!(answer.status == 204, "{answer:?}");
    // One that nobody has made is made by the kernel, as for Firecracker; whoever has mistyped a name can read that.
    let hint = "is there for as long as it is open";
    ensure!(!monitor.log()?.contains(hint), "{}", monitor.log()?);
    let answer = put("eth2", "mistyped")?;
    // In a jail it may not be made.
    match answer.status {
        204 => ensure!(monitor.log()?.contains(hint), "{}", monitor.log()?),
        _ => ensure!(
            answer.fault().contains("make one that this user owns"),
            "{answer:?}"
        ),
    }
    let answer = put("eth1", "tap0")?;
    ensure!(answer.status == 400, "{answer:?}");
    ensure!(answer.fault().contains("`eth0`"), "{answer:?}");
    Ok(())
}
