//! A guest that attacks its devices while the API works on them: nothing gets stuck, nothing grows.

use std::time::{Duration, Instant};

use coracle_tests::case::{Case, Context};
use coracle_tests::environment::Need;
use coracle_tests::guest::{Machine, blank_image};
use coracle_tests::monitor::Launch;
use coracle_tests::{Outcome, ensure};
use serde_json::json;

pub(crate) const CASES: &[Case] = &[Case {
    name: "an_attacked_disk_can_be_paused_replaced_and_limited_all_the_while",
    need: Need::Kvm,
    run: an_attacked_disk_can_be_paused_replaced_and_limited_all_the_while,
}];

const SOON: Duration = Duration::from_secs(60);
/// Ten complaints of the transport and ten of the worker, of a disk and of an entropy device, and to spare.
const LOG_LINES_ABOUT_THE_GUEST_MAX: usize = 50;

fn an_attacked_disk_can_be_paused_replaced_and_limited_all_the_while(context: &Context) -> Outcome {
    for engine in ["Async", "Sync"] {
        attacked(context, engine).map_err(|e| format!("{engine}: {}", coracle_tests::case::text(&e)))?;
    }
    Ok(())
}

fn attacked(context: &Context, engine: &str) -> Outcome {
    let launch = Launch::new(&context.environment)?;
    let images = [
        launch.directory().join("test-disk"),
        launch.directory().join("test-other"),
    ];
    blank_image(&images[0], 1)?;
    blank_image(&images[1], 2)?;
    let seconds = context.count(4, 120);
    let words = format!("do=hello do=hostile:kind=rng,seconds=1 do=hostile:kind=blk,seconds={seconds}");
    let machine = Machine::unikernel(&context.environment, &words)
        .drive(json!({
            "drive_id": "d", "path_on_host": images[0], "is_root_device": false, "io_engine": engine
        }))
        .part("entropy", json!({}));
    let monitor = launch.config(&machine.config())?.start()?;
    monitor.console.wait_for("hello", SOON)?;
    // The sockets of answered clients are closed soon.
    std::thread::sleep(Duration::from_millis(100));
    let before = monitor.process().settled_holdings()?;
    let until = Instant::now() + Duration::from_secs(u64::from(seconds));
    for image in images.iter().cycle() {
        let replace = json!({ "drive_id": "d", "path_on_host": image });
        monitor.must("PATCH", "/drives/d", Some(&replace))?;
        monitor.set_state("Paused")?;
        monitor.must("PATCH", "/drives/d", Some(&replace))?;
        monitor.set_state("Resumed")?;
        let limit =
            json!({ "drive_id": "d", "rate_limiter": { "ops": { "size": 100_000, "refill_time": 100 } } });
        monitor.must("PATCH", "/drives/d", Some(&limit))?;
        if Instant::now() > until {
            break;
        }
    }
    let after = monitor.process().settled_holdings()?;
    ensure!(
        after.descriptors == before.descriptors && after.resident_kib < before.resident_kib + 4096,
        "before {before:?}, after {after:?}"
    );
    // What API clients cause is their own affair.
    let log = monitor.log()?;
    let lines = log.lines().filter(|line| !line.contains(":api]")).count();
    ensure!(
        lines <= LOG_LINES_ABOUT_THE_GUEST_MAX,
        "the guest wrote {lines} lines to the log"
    );
    // The guest ends by an honest request to each device.
    monitor.wait(SOON)?.expect(0)
}
