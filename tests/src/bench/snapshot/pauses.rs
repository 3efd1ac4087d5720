//! How long a pause takes, of an idle guest and of one whose disk is busy.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{Subject, row, set_state};
use crate::Outcome;
use crate::bench::api::{Monitor, ms};
use crate::bench::series::Series;
use crate::bench::{self, count};
use crate::guest::blank_image;

const MEMORY_MIB: u64 = 128;
const DISK_MIB: u64 = 256;
/// What was asked for, in milliseconds: of an idle guest, and of a busy one beyond its slowest request.
const IDLE_MS_MAX: f64 = 1.0;
const BEYOND_MS_MAX: f64 = 1.0;
/// Between two pauses, so that a busy disk is busy again.
const BETWEEN: Duration = Duration::from_millis(5);
const PERCENT: f64 = 99.0;

/// Pauses guests `PAUSES` (500) times each.
///
/// # Errors
///
/// When that fails.
pub fn measure(subject: Subject<'_>) -> Outcome<Value> {
    let pauses = count("PAUSES", 500)?;
    println!("{pauses} pauses");
    let mut monitor = subject.started("do=hello do=echo:wait=irq", MEMORY_MIB, None)?;
    monitor.wait_for("echo: ready")?;
    let idle = paused(&mut monitor, pauses)?;
    drop(monitor);
    let idle_row = row(
        "of an idle guest, 99 %",
        idle.percentile(PERCENT),
        IDLE_MS_MAX,
        "ms",
    );
    println!(
        "  median {:.3} ms, the longest {:.2} ms",
        idle.median(),
        idle.highest()
    );

    let image = bench::directory()?.join("pauses.img");
    blank_image(&image, DISK_MIB)?;
    let drive = json!({
        "drive_id": "d", "path_on_host": image, "is_root_device": false, "is_read_only": false, "cache_type": "Writeback",
    });
    let slowest = slowest_request(subject, &drive)?;
    let words = format!("do=hello {}", load("seconds=3600"));
    let mut monitor = subject.started(&words, MEMORY_MIB, Some(&drive))?;
    monitor.wait_for("hello")?;
    std::thread::sleep(Duration::from_millis(500));
    let busy = paused(&mut monitor, pauses)?;
    drop(monitor);
    std::fs::remove_file(&image)?;
    let limit = slowest + BEYOND_MS_MAX;
    let busy_row = row(
        "while it writes, 99 % (slowest request + 1 ms)",
        busy.percentile(PERCENT),
        limit,
        "ms",
    );
    println!(
        "  median {:.3} ms, the longest {:.2} ms; the slowest request without pauses {slowest:.2} ms",
        busy.median(),
        busy.highest()
    );
    Ok(json!({
        "idle_p99_ms": idle_row,
        "busy_p99_ms": busy_row,
        "slowest_request_ms": slowest,
        "idle_ms": idle.report(),
        "busy_ms": busy.report(),
    }))
}

fn load(how_long: &str) -> String {
    format!("do=load:mode=randwrite,bs=4096,depth=32,{how_long}")
}

fn paused(monitor: &mut Monitor, pauses: u64) -> Outcome<Series> {
    let mut series = Series::default();
    for _ in 0..pauses {
        std::thread::sleep(BETWEEN);
        let begun = Instant::now();
        set_state(monitor, "Paused")?;
        series.push(ms(begun.elapsed()));
        set_state(monitor, "Resumed")?;
    }
    Ok(series)
}

/// In milliseconds, of a guest that nobody pauses.
fn slowest_request(subject: Subject<'_>, drive: &Value) -> Outcome<f64> {
    let words = format!("do=hello {} do=hello do=echo:wait=irq", load("seconds=3"));
    let mut monitor = subject.started(&words, MEMORY_MIB, Some(drive))?;
    let said = monitor.said_until("echo: ready")?;
    let max = said
        .split_whitespace()
        .find_map(|word| word.strip_prefix("lat_us_max="))
        .ok_or("the load says its slowest request")?;
    Ok(max.parse::<f64>()? / 1e3)
}
