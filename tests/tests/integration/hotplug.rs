//! Devices that come while the guest runs, and go: what a drive that was plugged in holds, where it stays, and what is refused.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use coracle_tests::case::{Case, Context};
use coracle_tests::certificates::Authority;
use coracle_tests::environment::Need;
use coracle_tests::guest::{Linux, Machine, blank_image};
use coracle_tests::harness::hosts::Star;
use coracle_tests::harness::nfs::server::{self, Server};
use coracle_tests::harness::receiver::Receiver;
use coracle_tests::monitor::{Launch, Monitor};
use coracle_tests::{Outcome, ensure};
use serde_json::{Value, json};

use super::snapshot::{Files, killed, saved, started};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "drives_come_are_written_and_go_and_leave_nothing_behind",
        need: Need::Kvm,
        run: come_and_go,
    },
    Case {
        name: "a_drive_on_a_server_comes_and_goes",
        need: Need::Kvm,
        run: comes_from_a_server,
    },
    Case {
        name: "a_machine_that_ends_while_a_drive_comes_or_goes_ends_in_order",
        need: Need::Kvm,
        run: ends_meanwhile,
    },
    Case {
        name: "a_machine_is_saved_and_moved_with_what_was_plugged_in",
        need: Need::Kvm,
        run: is_saved_and_moved,
    },
    Case {
        name: "linux_takes_up_drives_and_networks_that_come",
        need: Need::KvmAndHosts,
        run: linux_takes_up_what_comes,
    },
    Case {
        name: "what_cannot_come_or_go_is_an_error_that_says_what_to_do",
        need: Need::Kvm,
        run: what_cannot_be,
    },
];

const SOON: Duration = Duration::from_secs(60);
/// A boot takes fifteen seconds where kernel code is emulated.
const LINUX_WITHIN: Duration = Duration::from_secs(240);
/// The places of virtio devices: windows of 4 KiB, a line each.
const PLACES: u32 = 18;

/// A unikernel that does `words`, and looks for devices in the first `places`.
fn machine(context: &Context, words: &str, places: u32) -> Machine {
    // The monitor names those that are there from the beginning, behind these: what comes is disk 0.
    let windows = (1..places).map(|place| {
        let address = 0xc000_1000_u32 + place * 0x1000;
        format!(" virtio_mmio.device=4K@{address:#x}:{}", 5 + place)
    });
    let words = format!("{words}{}", windows.collect::<String>());
    Machine::unikernel(&context.environment, &words).memory_mib(32)
}

/// What a guest does with a drive that comes.
fn work(seed: u64) -> String {
    format!(
        "do=await-disk:dev=1 do=pattern-write:mib=4,seed={seed} do=flush do=pattern-verify:mib=4,seed={seed} \
         do=release-disk do=await-disk:dev=1,gone=1 "
    )
}

fn image(directory: &Path, name: &str) -> Outcome<PathBuf> {
    let path = directory.join(format!("test-{name}"));
    blank_image(&path, 4)?;
    Ok(path)
}

fn drive(id: &str, path: &Path) -> Value {
    json!({
        "drive_id": id, "path_on_host": path, "is_root_device": false, "is_read_only": false,
        "cache_type": "Writeback"
    })
}

fn plug(monitor: &Monitor, id: &str, path: &Path) -> Outcome {
    monitor.must("PUT", &format!("/drives/{id}"), Some(&drive(id, path)))?;
    Ok(())
}

fn unplug(monitor: &Monitor, id: &str) -> Outcome {
    monitor.must("DELETE", &format!("/drives/{id}"), None)?;
    Ok(())
}

fn refused(monitor: &Monitor, method: &str, path: &str, body: Option<&Value>, why: &str) -> Outcome {
    let answer = monitor.request(method, path, body)?;
    ensure!(
        answer.status == 400 && answer.fault().contains(why),
        "{method} {path}: not {why:?}: {} {}",
        answer.status,
        answer.body
    );
    Ok(())
}

/// Waits until the guest has said so often that it has done `verb`.
fn has_done(monitor: &Monitor, verb: &str, times: usize) -> Outcome {
    let said = format!("{verb}: ok");
    monitor.console.wait_until(&said, SOON, |text| {
        (text.matches(&said).count() >= times).then_some(())
    })
}

/// The ids of the drives that the monitor tells of.
fn drives(monitor: &Monitor) -> Outcome<Vec<String>> {
    let config = monitor.must("GET", "/vm/config", None)?.json()?;
    let drives = config.get("drives").and_then(Value::as_array);
    Ok(drives
        .into_iter()
        .flatten()
        .filter_map(|drive| Some(drive.get("drive_id")?.as_str()?.to_owned()))
        .collect())
}

/// Whether another machine may write this image now.
fn is_free(context: &Context, path: &Path) -> Outcome<bool> {
    let other = Launch::new(&context.environment)?.start()?;
    other.configure(&Machine::unikernel(&context.environment, "do=exit:status=0").config())?;
    let start = json!({ "action_type": "InstanceStart" });
    // An image of this host is looked at when it is named, one of a server when it is needed.
    let asked = [("/drives/other", drive("other", path)), ("/actions", start)];
    for (at, body) in &asked {
        let answer = other.request("PUT", at, Some(body))?;
        if answer.status != 204 {
            ensure!(answer.fault().contains("cannot lease"), "{}", answer.body);
            killed(other)?;
            return Ok(false);
        }
    }
    other.wait(SOON)?.expect(0)?;
    Ok(true)
}

fn come_and_go(context: &Context) -> Outcome {
    const ROUNDS: u64 = 4;
    for engine in ["Async", "Sync"] {
        for _ in 0..context.count(1, 100) {
            come_and_go_by(context, engine, ROUNDS)?;
        }
    }
    Ok(())
}

fn come_and_go_by(context: &Context, engine: &str, rounds: u64) -> Outcome {
    let directory = tempfile::tempdir()?;
    let first = image(directory.path(), "first")?;
    let words: String = (1..=rounds).map(work).collect();
    let places = 2 + u32::try_from(rounds)?;
    let machine = machine(context, &format!("do=hello {words}do=echo"), places)
        .disk("first", &first)
        .part("entropy", json!({}));
    let mut monitor = started(context, &machine.config())?;
    monitor.console.wait_for("hello", SOON)?;
    let before = monitor.process().settled_holdings()?;
    for round in 1..=rounds {
        let path = image(directory.path(), "second")?;
        let body = drive("second", &path);
        let body = super::snapshot::with(body, "", "io_engine", engine.into());
        monitor.must("PUT", "/drives/second", Some(&body))?;
        ensure!(
            drives(&monitor)? == ["first", "second"],
            "round {round}: {:?}",
            drives(&monitor)?
        );
        ensure!(!is_free(context, &path)?, "round {round}: two may write it");
        let metrics = monitor.must("GET", "/metrics", None)?;
        ensure!(
            metrics.body.contains("second"),
            "round {round}: it counts nothing: {}",
            metrics.body
        );
        has_done(&monitor, "release-disk", usize::try_from(round)?)?;
        unplug(&monitor, "second")?;
        ensure!(drives(&monitor)? == ["first"], "round {round}");
        ensure!(
            is_free(context, &path)?,
            "round {round}: nobody has it, and it is not free"
        );
        let now = monitor.process().settled_holdings()?;
        ensure!(
            (now.descriptors, now.threads) == (before.descriptors, before.threads),
            "round {round} leaves something behind: {before:?}, then {now:?}"
        );
    }
    let written = monitor.must("GET", "/metrics", None)?.body;
    ensure!(
        !written.contains("second"),
        "what has gone is still told of: {written}"
    );
    monitor.type_in(b"exit 7\n")?;
    monitor.wait(SOON)?.expect(7)
}

fn comes_from_a_server(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let server = Server::start(server::Plan::image(4 << 20))?;
    let first = image(directory.path(), "first")?;
    let words = format!("do=hello {}{}do=echo", work(1), work(2));
    let mut monitor = started(
        context,
        &machine(context, &words, 3).disk("first", &first).config(),
    )?;
    monitor.console.wait_for("hello", SOON)?;
    let url = PathBuf::from(server.url("export/image.raw"));
    for round in 1..=2 {
        plug(&monitor, "far", &url)?;
        ensure!(!is_free(context, &url)?, "two may write it");
        has_done(&monitor, "release-disk", round)?;
        unplug(&monitor, "far")?;
        ensure!(is_free(context, &url)?, "nobody has it, and it is not free");
    }
    monitor.type_in(b"exit 7\n")?;
    monitor.wait(SOON)?.expect(7)
}

/// The status is the guest's, and the image is free, whatever was under way.
fn ends_meanwhile(context: &Context) -> Outcome {
    let server = Server::start(server::Plan::image(4 << 20))?;
    let url = PathBuf::from(server.url("export/image.raw"));
    for goes in [false, true] {
        let config = machine(context, "do=hello do=echo", 1).config();
        let mut monitor = started(context, &config)?;
        monitor.console.wait_for("echo: ready", SOON)?;
        if goes {
            plug(&monitor, "far", &url)?;
        }
        server.stop()?;
        let mut caller = monitor.connect()?;
        let body = drive("far", &url).to_string();
        let asked = std::thread::spawn(move || match goes {
            false => caller.request("PUT", "/drives/far", Some(&body)),
            true => caller.request("DELETE", "/drives/far", None),
        });
        // Until it is with the server.
        std::thread::sleep(Duration::from_millis(300));
        monitor.type_in(b"exit 7\n")?;
        std::thread::sleep(Duration::from_millis(500));
        server.go_on()?;
        monitor.wait(SOON)?.expect(7)?;
        let answer = asked.join().map_err(|_| "the caller panicked")??;
        ensure!(
            answer.status == 204 || answer.fault().contains("ended before"),
            "{answer:?}"
        );
        ensure!(is_free(context, &url)?, "it is not free; it goes: {goes}");
    }
    Ok(())
}

/// Drives that came later are in other places than they would have at a boot, and stay there.
fn is_saved_and_moved(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let path = |name| image(directory.path(), name);
    let [first, left, kept, last] = [path("first")?, path("left")?, path("kept")?, path("last")?];
    let words = format!(
        "do=hello {}{}{}do=exit:status=7",
        "do=await-disk:dev=2 do=pattern-write:dev=1,seed=1 do=flush:dev=1 do=release-disk:dev=1 do=await-disk:dev=2,gone=1 ",
        "do=tick:ms=20,count=25 do=pattern-verify:dev=0,seed=1 do=pattern-write:dev=0,seed=2 ",
        "do=await-disk:dev=2 do=pattern-write:dev=1,seed=3 do=flush:dev=1 do=pattern-verify:dev=0,seed=2 ",
    );
    let machine = machine(context, &words, 5)
        .disk("first", &first)
        .part("entropy", json!({}));
    let monitor = started(context, &machine.config())?;
    monitor.console.wait_for("hello", SOON)?;
    plug(&monitor, "left", &left)?;
    plug(&monitor, "kept", &kept)?;
    has_done(&monitor, "release-disk", 1)?;
    // Nobody has driven it.
    unplug(&monitor, "left")?;
    monitor.console.wait_for("tick: n=0 ", SOON)?;
    let files = Files::in_directory(directory.path(), "s");
    saved(&monitor, &files, "Full")?;
    killed(monitor)?;

    let loaded = Launch::new(&context.environment)?.start()?;
    loaded.must("PUT", "/snapshot/load", Some(&files.load("lazy")))?;
    ensure!(drives(&loaded)? == ["first", "kept"], "{:?}", drives(&loaded)?);
    let tls = Authority::new(directory.path())?.host("127.0.0.1")?;
    let receive = json!({ "listen": "127.0.0.1:0", "tls": tls });
    let receiver = Receiver::of(Launch::new(&context.environment)?.start()?, &receive)?;
    let send = json!({ "to": receiver.to(), "tls": tls });
    loaded.must("PUT", "/migration/send", Some(&send))?;
    let arrived = receiver.received()?;
    drop(loaded);
    ensure!(drives(&arrived)? == ["first", "kept"], "{:?}", drives(&arrived)?);
    has_done(&arrived, "pattern-write", 1)?;
    plug(&arrived, "last", &last)?;
    arrived.wait(SOON)?.expect(7)
}

fn linux_takes_up_what_comes(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let star = Star::new(0)?;
    star.server.bridge(IpAddr::from([172, 16, 0, 1]), &["tap7"])?;
    let data = image(directory.path(), "data")?;
    std::fs::write(
        &data,
        [&b"this is the first sector"[..], &[0; (4 << 20) - 24]].concat(),
    )?;
    let machine = Linux::read(&context.environment)?
        .machine("acpi", directory.path(), "agent")?
        .part(
            "vsock",
            json!({ "guest_cid": 52, "uds_path": directory.path().join("test-v") }),
        );
    let monitor = star.server.inside(|| started(context, &machine.config()))??;
    // Whenever it comes: before Linux looks for devices, before it listens to events, or when it is up.
    let after = context.seed.clone().below(20_000);
    std::thread::sleep(Duration::from_millis(after));
    println!("a drive comes after {after} ms");
    plug(&monitor, "data", &data)?;
    monitor.console.wait_for("coracle-agent listens", LINUX_WITHIN)?;
    let guest = |words: &[&str]| in_guest(context, &monitor, words);
    until(|| guest(&["ls", "/dev/vdb"]))?;
    let read = guest(&["dd", "if=/dev/vdb", "bs=24", "count=1"])?;
    ensure!(read == "this is the first sector", "{read:?}");
    refused(&monitor, "DELETE", "/drives/data", None, "unbind")?;

    let network = json!({ "iface_id": "eth7", "host_dev_name": "tap7", "guest_mac": "06:00:ac:10:00:02" });
    star.server
        .inside(|| monitor.must("PUT", "/network-interfaces/eth7", Some(&network)))??;
    until(|| guest(&["cat", "/sys/class/net/eth0/address"]))?;
    let address = guest(&["cat", "/sys/class/net/eth0/address"])?;
    ensure!(address == "06:00:ac:10:00:02\n", "{address:?}");

    // What the refusal says lets the guest go of it. The root has the first place, the socket the second.
    let unbind = "echo LNRO0005:02 > /sys/bus/platform/drivers/virtio-mmio/unbind && ls /dev/vdb";
    ensure!(guest(&["sh", "-c", unbind]).is_err(), "it is still there");
    unplug(&monitor, "data")?;

    // One that comes to a guest that was saved is taken up as well.
    let files = Files::in_directory(directory.path(), "s");
    saved(&monitor, &files, "Full")?;
    killed(monitor)?;
    let again = star
        .server
        .inside(|| Launch::new(&context.environment)?.start())??;
    let moved = json!({ "uds_path": directory.path().join("test-w") });
    let load = super::snapshot::with(files.load("lazy"), "", "vsock_override", moved);
    again.must("PUT", "/snapshot/load", Some(&load))?;
    plug(&again, "again", &data)?;
    until(|| in_guest(context, &again, &["ls", "/dev/vdb"]))?;
    killed(again)
}

/// What a command in the guest prints, if it succeeds.
fn in_guest(context: &Context, monitor: &Monitor, words: &[&str]) -> Outcome<String> {
    let socket = monitor.socket().display().to_string();
    let output = std::process::Command::new(&context.environment.coraclectl)
        .args(["exec", &socket, "--"])
        .args(words)
        .stdin(std::process::Stdio::null())
        .output()?;
    ensure!(
        output.status.success(),
        "{words:?}: {} {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn until<T>(mut succeeds: impl FnMut() -> Outcome<T>) -> Outcome<T> {
    let begun = Instant::now();
    loop {
        match succeeds() {
            Err(error) if begun.elapsed() > LINUX_WITHIN => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(200)),
            Ok(outcome) => return Ok(outcome),
        }
    }
}

fn what_cannot_be(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let path = |name| image(directory.path(), name);
    let [root, other] = [path("root")?, path("other")?];
    let words = "do=hello do=pattern-write:dev=0,mib=1 do=tick:ms=20,count=100000";
    let launch = Launch::new(&context.environment)?.start()?;
    refused(&launch, "DELETE", "/drives/d", None, "before starting")?;
    refused(
        &launch,
        "DELETE",
        "/network-interfaces/e",
        None,
        "before starting",
    )?;
    let config = machine(context, words, 1).disk("used", &other).config();
    let config = super::snapshot::with(
        config,
        "/drives/0",
        "path_on_host",
        root.display().to_string().into(),
    );
    launch.configure(&config)?;
    launch.start_instance()?;
    launch.console.wait_for("tick: n=1 ", SOON)?;
    let monitor = &launch;

    let put = |id: &str, body: &Value, why: &str| {
        refused(monitor, "PUT", &format!("/drives/{id}"), Some(body), why)
    };
    put("used", &drive("used", &other), "DELETE takes it out")?;
    let late = super::snapshot::with(drive("late", &other), "", "is_root_device", true.into());
    put("late", &late, "too late to be booted from")?;
    put(
        "gone",
        &drive("gone", &directory.path().join("no-such")),
        "no-such",
    )?;
    put("twice", &drive("twice", &root), "as another disk")?;
    refused(monitor, "DELETE", "/drives/used", None, "has `used`")?;
    refused(
        monitor,
        "DELETE",
        "/drives/none",
        None,
        "there is no drive `none`",
    )?;
    refused(
        monitor,
        "DELETE",
        "/network-interfaces/none",
        None,
        "there is no network interface `none`",
    )?;

    crowded(context, directory.path())?;
    for place in 1..PLACES {
        let id = format!("d{place}");
        plug(monitor, &id, &image(directory.path(), &id)?)?;
    }
    put("more", &drive("more", &other), "no machine can have more")?;
    for place in (1..PLACES).rev() {
        unplug(monitor, &format!("d{place}"))?;
    }
    ensure!(drives(monitor)? == ["used"], "{:?}", drives(monitor)?);
    unheard_and_still(monitor, &other)?;
    ensure!(is_free(context, &other)?, "it is not free");
    killed(launch)
}

/// A machine with a device more than there are places.
fn crowded(context: &Context, directory: &Path) -> Outcome {
    let mut crowd = machine(context, "do=hello", 1).part("entropy", json!({}));
    for place in 0..PLACES {
        let id = format!("c{place}");
        crowd = crowd.drive(drive(&id, &image(directory, &id)?));
    }
    let full = Launch::new(&context.environment)?.start()?;
    full.configure(&crowd.config())?;
    let start = json!({ "action_type": "InstanceStart" });
    refused(&full, "PUT", "/actions", Some(&start), "leave one out")
}

/// What comes to a guest that does not look, and to one that stands still.
fn unheard_and_still(monitor: &Monitor, other: &Path) -> Outcome {
    plug(monitor, "more", other)?;
    // This guest knows nothing of ACPI.
    until(|| {
        let log = monitor.log()?;
        ensure!(log.contains("has not looked at a device"), "{log}");
        Ok(())
    })?;
    monitor.set_state("Paused")?;
    refused(monitor, "DELETE", "/drives/more", None, "while the guest runs")?;
    let much = drive("much", other);
    refused(
        monitor,
        "PUT",
        "/drives/much",
        Some(&much),
        "while the guest runs",
    )?;
    monitor.set_state("Resumed")?;
    unplug(monitor, "more")
}
