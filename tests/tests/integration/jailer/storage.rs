//! Disks on servers, reached from jails: from the host's network and from one that the jail has joined.

use coracle_tests::case::Context;
use coracle_tests::guest::Machine;
use coracle_tests::harness::hosts::{Host, Star};
use coracle_tests::harness::iscsi::target::{self, Target};
use coracle_tests::harness::jail::Jail;
use coracle_tests::harness::nfs::server::{self, Server};
use coracle_tests::harness::{iscsi, nfs};
use coracle_tests::{Outcome, ensure};
use serde_json::json;

use super::SOON;

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
