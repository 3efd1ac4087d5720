//! A guest writes to an overlay of its own, over an image that many read from a server, and the server comes back.

use std::fs;
use std::path::Path;
use std::time::Duration;

use coracle_tests::case::{Context, text};
use coracle_tests::guest::Machine;
use coracle_tests::harness::nfs::server::{Plan, Server};
use coracle_tests::monitor::Launch;
use coracle_tests::{Outcome, ensure};
use serde_json::json;

use super::IMAGE;
use super::peer::{MIB, pattern};

const BASE_MIB: u64 = 16;
const SEED: u64 = 5;
const SOON: Duration = Duration::from_secs(60);

/// By either engine, over memory and over a file that is kept.
pub(super) fn goes_on(context: &Context) -> Outcome {
    let content = pattern(SEED, 0, BASE_MIB)?;
    let directory = tempfile::tempdir()?;
    for engine in ["Async", "Sync"] {
        for path in [Path::new("memory"), &directory.path().join(engine)] {
            let mut server = Server::start(Plan::image(BASE_MIB * MIB))?;
            fs::write(server.path(IMAGE), &content)?;
            one(context, &mut server, engine, path)
                .map_err(|e| format!("{engine} {}: {}", path.display(), text(&e)))?;
            ensure!(fs::read(server.path(IMAGE))? == content, "the base has changed");
        }
    }
    Ok(())
}

fn one(context: &Context, server: &mut Server, engine: &str, path: &Path) -> Outcome {
    let words = format!(
        "do=pattern-write:mib=2,offset_mib=2,bs=3584,depth=16,seed=9 do=flush do=write-zeroes:mib=1,offset_mib=5 \
         do=discard:mib=1,offset_mib=6 do=flush do=tick:ms=200,count=2 do=pattern-verify:mib=2,seed={SEED} \
         do=pattern-verify:mib=2,offset_mib=2,seed=9 do=read-check-zero:mib=1,offset_mib=5 \
         do=pattern-write:mib=1,offset_mib=8,seed=7 do=pattern-verify:mib=1,offset_mib=8,seed=7 \
         do=pattern-verify:mib=7,offset_mib=9,seed={SEED} do=flush"
    );
    let keep = path.is_absolute();
    let overlay = json!({ "base": server.url(IMAGE), "path": path, "keep": keep });
    let machine = Machine::unikernel(&context.environment, &words).drive(json!({
        "drive_id": "d", "is_root_device": false, "overlay": overlay, "io_engine": engine, "cache_type": "Writeback",
    }));
    let launch = Launch::new(&context.environment)?.config(&machine.config())?;
    let monitor = launch.start()?;
    monitor.console.wait_for("tick: n=0", SOON)?;
    server.kill()?;
    server.restart()?;
    monitor.wait(SOON)?.expect(0)
}
