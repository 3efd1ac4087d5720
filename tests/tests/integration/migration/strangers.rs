//! Whom a side does not trust, and what is not what it was said to be.

use std::fs::{self, File};
use std::io::Write as _;
use std::net::TcpListener;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use coracle_tests::case::{Context, text};
use coracle_tests::certificates::Authority;
use coracle_tests::guest::{Machine, blank_image};
use coracle_tests::monitor::{Launch, Monitor};
use coracle_tests::{Outcome, ensure};
use coracle_vmm::migration::wire::Kind;
use serde_json::{Value, json};

use super::place::Place;
use super::played::PlayedTarget;
use super::{Hosts, PERIOD, SOON, merge};

/// A guest that nobody gets.
struct Staying<'a> {
    context: &'a Context,
    hosts: Hosts,
    monitor: Monitor,
}

impl<'a> Staying<'a> {
    /// With a disk `d` at `disk`.
    fn start(context: &'a Context, hosts: Hosts, disk: &Path) -> Outcome<Self> {
        blank_image(disk, 1)?;
        Self::with(context, hosts, Place::File(disk.to_owned()).drive("d"))
    }

    fn with(context: &'a Context, hosts: Hosts, drive: Value) -> Outcome<Self> {
        let config = Machine::unikernel(&context.environment, "do=hello do=tick:ms=10,count=1000000")
            .memory_mib(32)
            .drive(drive)
            .config();
        let monitor = Launch::new(&context.environment)?.start()?;
        monitor.configure(&config)?;
        monitor.start_instance()?;
        monitor.console.wait_for("hello", SOON)?;
        Ok(Self {
            context,
            hosts,
            monitor,
        })
    }

    /// It is not sent, for the reason `why`, when the target and the source are asked with these members.
    fn is_refused(&self, receive: &Value, send: &Value, why: &str) -> Outcome {
        let launch = Launch::new(&self.context.environment)?;
        self.hosts.refuse(&self.monitor, launch, [receive, send], why)
    }

    /// It goes on.
    fn runs_on(&self) -> Outcome {
        let seen = self.monitor.console.text().matches("tick: ").count();
        let next = format!("tick: n={} ", seen + 5);
        self.monitor.console.wait_for(&next, SOON).map(drop)
    }
}

/// A source of another authority, one whose time is over, one of another name, a target of another name, another machine than
/// is waited for.
pub(super) fn are_refused(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let (ours, theirs) = (directory.path().join("ours"), directory.path().join("theirs"));
    std::fs::create_dir(&ours)?;
    std::fs::create_dir(&theirs)?;
    let authority = Authority::new(&ours)?;
    let hosts = Hosts {
        tls: authority.host("127.0.0.1")?,
    };
    let past = authority.host_of_the_past("127.0.0.1")?;
    let mut strange = Authority::new(&theirs)?.host("127.0.0.1")?;
    // It knows whom to trust, and nobody trusts it.
    merge(&mut strange, &json!({ "ca": ours.join("ca.crt") }));
    let guest = Staying::start(context, hosts, &directory.path().join("test-disk"))?;
    let none = json!({});
    for (receive, send, why) in [
        (&none, &json!({ "tls": strange }), "the other side is gone"),
        (
            &json!({ "tls": strange }),
            &none,
            "does not accept the other's certificate",
        ),
        (&none, &json!({ "tls": past }), "the other side is gone"),
        (&json!({ "tls": past }), &none, "certificate expired"),
        (
            &none,
            &json!({ "to_name": "host-b" }),
            "the certificate of the other side is not of `host-b`",
        ),
        (&json!({ "from_name": "host-b" }), &none, "the other side is gone"),
        (&json!({ "vm": "another" }), &none, "and `another` is waited for"),
    ] {
        guest.is_refused(receive, send, why)?;
    }
    guest.runs_on()
}

/// A target that would fetch memory later is not asked to by a source that was not: what was to stand still for a moment does
/// not, and nothing of the guest is left here.
pub(super) fn need_not_have_memory_later(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let hosts = Hosts::new(directory.path())?;
    let mut source = Launch::new(&context.environment)?.start()?;
    let config = Machine::unikernel(&context.environment, "do=hello do=dirty:mib=8,ms=60000,seed=3")
        .memory_mib(32)
        .config();
    source.configure(&config)?;
    source.start_instance()?;
    source.console.wait_for("dirty: ready", SOON)?;
    let target = PlayedTarget::new(&hosts, true)?;
    let mut body = hosts.send(&target.address()?);
    merge(
        &mut body,
        &json!({ "mode": "Precopy", "timeout_s": 1, "downtime_ms": 13, "bandwidth_limit": 4_000_000 }),
    );
    let mut caller = source.connect()?;
    let sending = thread::spawn(move || caller.request("PUT", "/migration/send", Some(&body.to_string())));
    let mut wire = target.accept()?;
    let mut last = None;
    while let Ok((kind, _)) = wire.receive() {
        last = Some(kind);
        if !matches!(kind, Kind::Hello | Kind::Mark | Kind::Pages | Kind::Zeros) {
            break;
        }
        target.answer(&mut wire, kind)?;
    }
    drop(wire);
    let answer = sending.join().map_err(|_| "a thread has panicked")??;
    ensure!(
        answer.fault().contains("faster than it is sent") && last == Some(Kind::Mark),
        "{}, after {last:?}",
        answer.body
    );
    ensure!(source.is_running()?, "it does not run on");
    Ok(())
}

/// A target that says a byte at a time that it has everything is never silent for long, and yet the guest does not stand still
/// for as long as that takes.
pub(super) fn hold_no_guest_up(context: &Context) -> Outcome {
    /// Longer than a guest may stand still all in all, and each byte sooner than the target would be taken for gone.
    const BYTE_PERIOD: Duration = Duration::from_secs(3);
    let directory = tempfile::tempdir()?;
    let hosts = Hosts::new(directory.path())?;
    let guest = Staying::start(context, hosts, &directory.path().join("test-disk"))?;
    let target = PlayedTarget::new(&guest.hosts, false)?;
    let body = guest.hosts.send(&target.address()?).to_string();
    let mut caller = guest.monitor.connect()?;
    let sending = thread::spawn(move || caller.request("PUT", "/migration/send", Some(&body)));
    let mut wire = target.accept()?;
    loop {
        match wire.receive()?.0 {
            Kind::State => break,
            kind => target.answer(&mut wire, kind)?,
        }
    }
    for byte in [Kind::Loaded.code(), 0, 0, 0, 0, 0, 0, 0] {
        thread::sleep(BYTE_PERIOD);
        let said = wire
            .stream()
            .write_all(&[byte])
            .and_then(|()| wire.stream().flush());
        if said.is_err() || sending.is_finished() {
            break;
        }
    }
    drop(wire);
    let answer = sending.join().map_err(|_| "a thread has panicked")??;
    ensure!(
        answer.fault().contains("has stood still for 10 s"),
        "{}",
        answer.body
    );
    guest.runs_on()
}

/// A machine that writes no disk has nobody who could give the guest back: images that it reads, and the target does not reach,
/// or finds to be others, are told before it is let go.
pub(super) fn images_that_are_read_are_looked_at(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let hosts = Hosts::new(directory.path())?;
    let at = |name: &str| directory.path().join(name);
    blank_image(&at("read"), 2)?;
    let config = Machine::unikernel(&context.environment, "do=hello do=tick:ms=10,count=1000000")
        .memory_mib(32)
        .drive(json!({ "drive_id": "r", "path_on_host": at("read"), "is_root_device": false, "is_read_only": true }))
        .config();
    let mut source = Launch::new(&context.environment)?.start()?;
    source.configure(&config)?;
    source.start_instance()?;
    source.console.wait_for("hello", SOON)?;
    let nobody = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    for (path, why) in [
        (json!(format!("nfs://{nobody}/a/b")), "does not answer"),
        (
            json!(format!("iscsi://{nobody}/iqn.2026-01.test/0")),
            "does not answer",
        ),
    ] {
        let receive = json!({ "overrides": { "drives": [{ "drive_id": "r", "path_on_host": path }] } });
        let launch = Launch::new(&context.environment)?;
        hosts.refuse(&source, launch, [&receive, &json!({})], why)?;
    }
    // It is taken away while memory is on its way.
    let (_receiver, call, to) = hosts.receiver(context)?;
    let mut body = hosts.send(&to);
    merge(&mut body, &json!({ "bandwidth_limit": 200_000 }));
    let mut caller = source.connect()?;
    let sending = thread::spawn(move || caller.request("PUT", "/migration/send", Some(&body.to_string())));
    let until = Instant::now() + SOON;
    while source.must("GET", "/migration", None)?.json()?.get("rounds") != Some(&json!(1)) {
        ensure!(Instant::now() < until, "it is not begun");
        thread::sleep(PERIOD);
    }
    std::fs::rename(at("read"), at("elsewhere"))?;
    let answer = sending.join().map_err(|_| "a thread has panicked")??;
    ensure!(
        answer.fault().contains("there is no image") && answer.fault().contains("runs on here"),
        "{}",
        answer.body
    );
    ensure!(call.join().is_ok_and(|call| call.is_err()), "it has received");
    ensure!(source.is_running()?, "it does not run on");
    Ok(())
}

/// Drives that the machine does not have, or not so, and another image than the one that is offered.
pub(super) fn disks_are_refused(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let hosts = Hosts::new(directory.path())?;
    let guest = Staying::start(context, hosts, &directory.path().join("test-disk"))?;
    let other = directory.path().join("another-disk");
    blank_image(&other, 1)?;
    for (drive, why) in [
        (
            json!({ "drive_id": "e", "path_on_host": other }),
            "drive `e`, which the machine does not have",
        ),
        (
            json!({ "drive_id": "d", "overlay_path": other }),
            "drive `d` an overlay, and it has none",
        ),
        (
            json!({ "drive_id": "d", "path_on_host": other }),
            "it is not as its owner has offered it",
        ),
    ] {
        let receive = json!({ "overrides": { "drives": [drive] } });
        guest.is_refused(&receive, &json!({}), why)?;
    }
    guest.runs_on()
}

/// No lease tells whether an image that nobody writes is the one that the guest knows: its bytes do. Where they are is the
/// target's own business.
pub(super) fn images_are_compared(context: &Context) -> Outcome {
    for kind in Place::KINDS {
        one_image(context, kind).map_err(|e| format!("{kind}: {}", text(&e)))?;
    }
    Ok(())
}

fn one_image(context: &Context, kind: &str) -> Outcome {
    let directory = tempfile::tempdir()?;
    let at = |name: &str| directory.path().join(name);
    let place = Place::new(kind, directory.path(), 2)?;
    for (name, mib) in [("same", 2), ("changed", 2), ("longer", 3)] {
        blank_image(&at(name), mib)?;
    }
    let changed = File::options().write(true).open(at("changed"))?;
    changed.write_all_at(&[1], (2 << 20) - 1)?;
    let mut drive = place.drive("r");
    merge(&mut drive, &json!({ "is_read_only": true }));
    if matches!(place, Place::Iscsi(_)) {
        // The unit is not write-protected.
        let path = format!("{}?base_immutable=true", place.path().display());
        merge(&mut drive, &json!({ "path_on_host": path }));
    }
    let guest = Staying::with(context, Hosts::new(directory.path())?, drive)?;
    let received = |name: &str| {
        let drive = json!({ "drive_id": "r", "path_on_host": at(name) });
        json!({ "overrides": { "drives": [drive] } })
    };
    let none = json!({});
    guest.is_refused(
        &received("changed"),
        &none,
        "with other bytes in some of the places",
    )?;
    guest.is_refused(&received("longer"), &none, "with 3145728 bytes, and not 2097152")?;
    guest.runs_on()?;
    let mut receive = received("same");
    if let Place::File(path) = &place {
        // An image without a name is not compared with what has the name now.
        fs::rename(path, at("away"))?;
        fs::rename(at("changed"), path)?;
        guest.is_refused(&received("longer"), &none, "reads an image of 2097152 bytes, and")?;
    } else {
        // Both reach it where it is.
        receive = none;
    }
    let Staying { hosts, monitor, .. } = guest;
    let (target, call, to) = hosts.receiver_of(context, &receive)?;
    monitor.must("PUT", "/migration/send", Some(&hosts.send(&to)))?;
    call.join().map_err(|_| "a thread has panicked")??;
    target.console.wait_for("tick: ", SOON).map(drop)
}
