//! A guest that goes from one jail to the next, each on a host of its own.

use std::os::unix::fs::chown;

use coracle_tests::case::Context;
use coracle_tests::certificates::Authority;
use coracle_tests::guest::Machine;
use coracle_tests::harness::hosts::{Host, Star};
use coracle_tests::harness::jail::{Jail, UID};
use coracle_tests::harness::nfs::server::{Plan, Server, url};
use coracle_tests::harness::receiver::Receiver;
use coracle_tests::{Outcome, ensure};
use serde_json::{Value, json};

use super::SOON;

const HOSTS: u8 = 3;
const DISK_MIB: u64 = 8;
const GUEST_STATUS: i32 = 6;

/// Network namespaces are joined by the jailer; what the monitors need of certificates is shown in their jails.
pub(super) fn goes_from_jail_to_jail(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let star = Star::new(HOSTS)?;
    let server = Server::start_on(&star.server, Plan::image(DISK_MIB << 20))?;
    let at = (star.server.address, server.address().port()).into();
    // The export is root's.
    let disk = format!("{}?uid=0&gid=0", url(at, "export/image.raw"));
    let authority = Authority::new(directory.path())?;
    let words = format!(
        "do=hello do=pattern-write:mib={DISK_MIB},seed=5 do=flush do=pattern-verify:mib={DISK_MIB},seed=5 \
         do=tick:ms=20,count=150 do=pattern-verify:mib={DISK_MIB},seed=5 do=exit:status={GUEST_STATUS}"
    );
    let machine = Machine::unikernel(&context.environment, &words)
        .memory_mib(64)
        .drive(json!({
            "drive_id": "d", "path_on_host": disk, "is_root_device": false, "is_read_only": false,
            "cache_type": "Writeback"
        }));
    let [first, others @ ..] = star.clients.as_slice() else {
        return Err("there are hosts".into());
    };
    let (jail, mut tls) = on(context, first, &authority)?;
    let (jail, config) = jail.kernel_of(&machine)?;
    let mut monitor = jail.start()?.monitor;
    monitor.configure(&config)?;
    monitor.start_instance()?;
    monitor.console.wait_for("hello", SOON)?;
    let mut said = String::new();
    for host in others {
        let (jail, theirs) = on(context, host, &authority)?;
        let body = json!({ "listen": format!("{}:0", host.address), "tls": theirs });
        let receiver = Receiver::of(jail.start()?.monitor, &body)?;
        let body = json!({ "to": receiver.to(), "to_name": host.address.to_string(), "tls": tls });
        monitor.must("PUT", "/migration/send", Some(&body))?;
        let next = receiver.received()?;
        let ended = std::mem::replace(&mut monitor, next).wait(SOON)?;
        ensure!(ended.status.code() == Some(0), "{ended:?}");
        said.push_str(&ended.console);
        tls = theirs;
    }
    let ended = monitor.wait(SOON)?;
    said.push_str(&ended.console);
    ensure!(ended.status.code() == Some(GUEST_STATUS), "{ended:?}");
    ensure!(said.matches("pattern-verify: ok").count() == 2, "{said}");
    Ok(())
}

/// A jail on this host's network, and its certificates as the monitor in it has to name them.
fn on(context: &Context, host: &Host, authority: &Authority) -> Outcome<(Jail, Value)> {
    let mut tls = authority.host(&host.address.to_string())?;
    let mut jail = Jail::new(&context.environment)?
        .flags([
            "--supervise",
            "--cleanup",
            "--new-pid-ns",
            "--netns",
            &host.path(),
        ])
        .arguments(["--level", "Error"]);
    for (part, path) in tls.as_object_mut().into_iter().flatten() {
        let file = path.as_str().ok_or("it is a path")?.to_owned();
        chown(&file, Some(UID), Some(UID))?;
        jail = jail.shows(file.as_ref(), part)?;
        *path = Value::from(format!("/{part}"));
    }
    Ok((jail, tls))
}
