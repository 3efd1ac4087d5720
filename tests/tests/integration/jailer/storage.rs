//! Disks on servers, reached from jails: from the host's network and from one that the jail has joined.

use std::time::{Duration, Instant};

use coracle_tests::case::Context;
use coracle_tests::guest::Machine;
use coracle_tests::harness::hosts::{Host, Star};
use coracle_tests::harness::iscsi::target::{self, Target};
use coracle_tests::harness::jail::{Jail, Jailed};
use coracle_tests::harness::nfs::server::{self, Server};
use coracle_tests::harness::{iscsi, nfs};
use coracle_tests::process::Process;
use coracle_tests::{Outcome, ensure};
use rustix::process::Signal;
use serde_json::json;

use super::{SOON, kill};

const DISK_MIB: u64 = 4;

pub(super) fn servers_are_reached(context: &Context) -> Outcome {
    let nfs_plan = || nfs::server::Plan::image(DISK_MIB << 20);
    let iscsi_plan = || iscsi::target::Plan::disk(DISK_MIB << 20);
    // The export is root's, and the monitor is not.
    let as_root = |url: String| format!("{url}?uid=0&gid=0");
    let server = Server::start(nfs_plan())?;
    works(context, None, &as_root(server.url("export/image.raw")))?;
    let unit = Target::start(iscsi_plan())?;
    works(context, None, &unit.url(1))?;

    let star = Star::new(1)?;
    let [client] = star.clients.as_slice() else {
        return Err("there is one client".into());
    };
    let at = |port| (star.server.address, port).into();
    let server = Server::start_on(&star.server, nfs_plan())?;
    let url = server::url(at(server.address().port()), "export/image.raw");
    works(context, Some(client), &as_root(url))?;
    let unit = Target::start_on(&star.server, iscsi_plan())?;
    works(context, Some(client), &target::url(at(unit.address().port()), 1))
}

fn works(context: &Context, host: Option<&Host>, disk: &str) -> Outcome {
    let words = format!(
        "do=pattern-write:mib={DISK_MIB},seed=9 do=flush do=pattern-verify:mib={DISK_MIB},seed=9 do=exit:status=0"
    );
    let machine = Machine::unikernel(&context.environment, &words).drive(json!({
        "drive_id": "d", "path_on_host": disk, "is_root_device": false, "is_read_only": false, "cache_type": "Writeback"
    }));
    let mut jail = Jail::new(&context.environment)?
        .flags(["--supervise", "--cleanup"])
        .arguments(["--level", "Error"]);
    if let Some(host) = host {
        jail = jail.flags(["--netns", &host.path()]);
    }
    let ended = jail.machine(&machine)?.spawn()?.end(SOON)?;
    ensure!(
        ended.status.code() == Some(0) && ended.console.contains("pattern-verify: ok"),
        "{disk}: {ended:?}"
    );
    Ok(())
}

/// A reservation outlives whoever has it: only who has seen the owner's end may say so.
pub(super) fn a_restart_has_its_lease(context: &Context) -> Outcome {
    let unit = Target::start(iscsi::target::Plan::disk(DISK_MIB << 20))?;
    let words = format!(
        "do=pattern-write:mib={DISK_MIB},seed=9 do=flush do=pattern-verify:mib={DISK_MIB},seed=9 do=tick:ms=10,count=1000000"
    );
    let machine = Machine::unikernel(&context.environment, &words).drive(json!({
        "drive_id": "d", "path_on_host": unit.url(1), "is_root_device": false, "is_read_only": false, "cache_type": "Writeback"
    }));
    let jail = |restart: &str| -> Outcome<Jail> {
        let flags = format!("--supervise --cleanup --restart {restart} --restart-delay-ms 1 --new-pid-ns");
        let jail = Jail::new(&context.environment)?.flags(flags.split(' '));
        jail.arguments(["--level", "Error"]).machine(&machine)
    };
    let ticks = |jailed: &Jailed, life: usize, before: Option<Process>| -> Outcome<Process> {
        let deadline = Instant::now() + SOON;
        let is_there = || jailed.monitor.console.text().matches("tick: n=1 ").count() >= life;
        while !is_there() || jailed.process().ok() == before {
            ensure!(
                Instant::now() < deadline,
                "life {life}: {}",
                jailed.monitor.errors.text()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
        jailed.process()
    };
    let jailed = jail("on-failure")?.spawn()?;
    let first = ticks(&jailed, 1, None)?;
    kill(first, Signal::KILL)?;
    let second = ticks(&jailed, 2, Some(first))?;
    kill(second, Signal::KILL)?;
    ticks(&jailed, 3, Some(second))?;
    jailed.monitor.signal(Signal::TERM)?;
    let ended = jailed.end(SOON)?;
    ensure!(
        ended.console.matches("pattern-verify: ok").count() == 3,
        "{ended:?}"
    );

    let jailed = jail("never")?.spawn()?;
    kill(ticks(&jailed, 1, None)?, Signal::KILL)?;
    let ended = jailed.end(SOON)?;
    ensure!(ended.status.code() == Some(137), "{ended:?}");
    let ended = jail("never")?.spawn()?.end(SOON)?;
    ensure!(
        ended.status.code() == Some(152) && ended.errors.contains("coraclectl lease break"),
        "{ended:?}"
    );
    Ok(())
}
