//! Lines and Prometheus text of invented sections.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test's panic is its failure"
)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::Value as Json;

use super::*;
use crate::api::http::Method;
use crate::cli::StartTimes;
use crate::signals::StopSignal;

fn block(reads: &Arc<AtomicU64>) -> Report {
    let reads = Arc::clone(reads);
    Box::new(move |section| {
        let reads = reads.load(Ordering::Relaxed);
        section.counter("read_count", reads);
        section.latency("read_agg", [reads, 2 * reads, 10 * reads]);
    })
}

fn config(path: &std::path::Path) -> MetricsConfig {
    serde_json::from_value(serde_json::json!({
        "metrics_path": path, "emit_id": true, "properties": {"rack": "7"}
    }))
    .unwrap()
}

#[test]
fn a_line_tells_what_was_counted_since_the_last_one() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let (a, b) = (Arc::new(AtomicU64::new(3)), Arc::new(AtomicU64::new(4)));
    let mut registry = Registry::default();
    registry.add_device("block", "a", block(&a));
    registry.add_device("block", "b", block(&b));
    registry.add("vmm", Box::new(|section| section.gauge("panic_count", 1)));
    registry.write();
    registry.write_to(&config(file.path()), "vm-1").unwrap();
    registry.write();
    a.fetch_add(2, Ordering::Relaxed);
    registry.write();

    let text = std::fs::read_to_string(file.path()).unwrap();
    assert!(
        text.starts_with("{\"utc_timestamp_ms\":") && text.ends_with("}\n"),
        "{text}"
    );
    let lines: Vec<Json> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.len(), 2, "nothing was written before it was said where");
    assert_eq!(lines[0]["id"], "vm-1");
    assert_eq!(lines[0]["properties"]["rack"], "7");
    assert_eq!(lines[0]["block_a"]["read_count"], 3);
    assert_eq!(lines[0]["block"]["read_count"], 7);
    assert_eq!(
        lines[0]["block"]["read_agg"],
        serde_json::json!({"min_us": 3, "max_us": 8, "sum_us": 70})
    );
    assert_eq!(lines[1]["block_a"]["read_count"], 2);
    assert_eq!(lines[1]["block_b"]["read_count"], 0);
    assert_eq!(lines[1]["block"]["read_agg"]["sum_us"], 20);
    assert_eq!(lines[1]["vmm"]["panic_count"], 1);
}

#[test]
fn what_a_lost_line_would_have_told_is_in_the_next_one() {
    let mut registry = Registry::default();
    registry.add_device("block", "a", block(&Arc::new(AtomicU64::new(3))));
    registry
        .write_to(&config(std::path::Path::new("/dev/full")), "vm-1")
        .unwrap();
    registry.write();
    assert_eq!(registry.missed_lines(), 1);
    let file = tempfile::NamedTempFile::new().unwrap();
    registry.write_to(&config(file.path()), "vm-1").unwrap();
    registry.write();
    let line: Json = serde_json::from_str(&std::fs::read_to_string(file.path()).unwrap()).unwrap();
    assert_eq!(line["block_a"]["read_count"], 3);
}

#[test]
fn prometheus_gets_totals_with_the_devices_as_labels() {
    let mut registry = Registry::default();
    registry.add_device("block", "a", block(&Arc::new(AtomicU64::new(3))));
    registry.add_device("block", "b", block(&Arc::new(AtomicU64::new(4))));
    registry.add("vmm", Box::new(|section| section.gauge("panic_count", 1)));
    assert_eq!(
        registry.prometheus(),
        "# TYPE coracle_block_read_count_total counter\n\
         coracle_block_read_count_total{id=\"a\"} 3\n\
         coracle_block_read_count_total{id=\"b\"} 4\n\
         # TYPE coracle_block_read_agg_min_us gauge\n\
         coracle_block_read_agg_min_us{id=\"a\"} 3\n\
         coracle_block_read_agg_min_us{id=\"b\"} 4\n\
         # TYPE coracle_block_read_agg_max_us gauge\n\
         coracle_block_read_agg_max_us{id=\"a\"} 6\n\
         coracle_block_read_agg_max_us{id=\"b\"} 8\n\
         # TYPE coracle_block_read_agg_sum_us_total counter\n\
         coracle_block_read_agg_sum_us_total{id=\"a\"} 30\n\
         coracle_block_read_agg_sum_us_total{id=\"b\"} 40\n\
         # TYPE coracle_vmm_panic_count gauge\n\
         coracle_vmm_panic_count 1\n"
    );
}

#[test]
fn a_histogram_is_told_by_its_bounds_since_the_last_line_and_in_all() {
    use coracle_storage::metrics::LatencyHistogram;

    let (latency, file) = (
        Arc::new(LatencyHistogram::default()),
        tempfile::NamedTempFile::new().unwrap(),
    );
    let mut registry = Registry::default();
    for device in ["a", "b"] {
        let latency = Arc::clone(&latency);
        let report: Report = Box::new(move |section| {
            section.histogram("session_latency", latency.counts(), latency.sum_us());
        });
        registry.add_device("block", device, report);
    }
    registry.write_to(&config(file.path()), "vm-1").unwrap();
    for us in [10, 20, 30, u64::from(u32::MAX)] {
        latency.record(Duration::from_micros(us));
    }
    registry.write();
    latency.record(Duration::from_micros(20));
    registry.write();
    let text = std::fs::read_to_string(file.path()).unwrap();
    let lines: Vec<Json> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let below = |line: usize, section: &str, bound: &str| {
        lines[line][section]["session_latency"]["count_below_us"][bound].clone()
    };
    assert_eq!(
        [
            below(0, "block_a", "16"),
            below(0, "block_a", "32"),
            below(0, "block_a", "+Inf")
        ],
        [1, 2, 1]
    );
    assert_eq!(below(0, "block", "32"), 4, "two devices together");
    assert_eq!([below(1, "block_a", "16"), below(1, "block_a", "32")], [0, 1]);
    assert_eq!(lines[1]["block_a"]["session_latency"]["sum_us"], 20);
    let text = registry.prometheus();
    for line in [
        "# TYPE coracle_block_session_latency_us histogram\n\
         coracle_block_session_latency_us_bucket{id=\"a\",le=\"16\"} 1\n\
         coracle_block_session_latency_us_bucket{id=\"a\",le=\"32\"} 4\n\
         coracle_block_session_latency_us_bucket{id=\"a\",le=\"64\"} 4\n",
        "coracle_block_session_latency_us_bucket{id=\"b\",le=\"+Inf\"} 5\n\
         coracle_block_session_latency_us_sum{id=\"b\"} 4294967375\n\
         coracle_block_session_latency_us_count{id=\"b\"} 5\n",
    ] {
        assert!(text.contains(line), "{text}");
    }
}

#[test]
fn requests_are_counted_by_resource() {
    let counters = Arc::new(RequestCounters::default());
    counters.count(Method::Put, "/drives/{drive_id}", &Ok::<(), ()>(()));
    counters.count(Method::Put, "/drives/{drive_id}", &Err::<(), ()>(()));
    counters.count(Method::Get, "/vm/config", &Ok::<(), ()>(()));
    let mut registry = Registry::default();
    counters.register(&mut registry);
    let sections = registry.sections();
    let put = &sections["put_api_requests"];
    assert!(put.values.contains(&("drive_count", Value::Counter(2))));
    assert!(put.values.contains(&("drive_fails", Value::Counter(1))));
    assert!(
        sections["get_api_requests"]
            .values
            .contains(&("machine_cfg_count", Value::Counter(0)))
    );
}

#[test]
fn the_process_tells_of_its_start_its_log_and_its_signals() {
    let mut registry = Registry::default();
    let process = ProcessReport::default();
    process.register(&mut registry);
    let gauge = |registry: &Registry, section: &str, name: &'static str| {
        let values = registry.sections()[section].values.clone();
        match values.iter().find(|(other, _)| *other == name).unwrap().1 {
            Value::Gauge(value) | Value::Counter(value) => value,
            Value::Latency { .. } | Value::Histogram { .. } => unreachable!("there is none here"),
        }
    };
    for name in ["process_startup_time_us", "process_startup_time_cpu_us"] {
        assert_eq!(
            gauge(&registry, "api_server", name),
            0,
            "nobody has said when it began"
        );
    }
    process.is_up(StartTimes {
        wall_us: Some(0),
        cpu_us: Some(0),
        parent_cpu_us: Some(1_000_000),
    });
    assert!(gauge(&registry, "api_server", "process_startup_time_us") > 0);
    assert!(gauge(&registry, "api_server", "process_startup_time_cpu_us") > 1_000_000);

    process.stopped_by(StopSignal::Terminate);
    assert_eq!(gauge(&registry, "signals", "sighup"), 0);
    process.stopped_by(StopSignal::HangUp);
    assert_eq!(gauge(&registry, "signals", "sighup"), 1);

    registry
        .write_to(&config(std::path::Path::new("/dev/full")), "vm-1")
        .unwrap();
    registry.write();
    assert_eq!(gauge(&registry, "logger", "missed_metrics_count"), 1);
    // Other tests of this process log too.
    let logged = &registry.sections()["logger"];
    for name in ["missed_metrics_count", "missed_log_count"] {
        assert!(logged.values.iter().any(|(other, _)| *other == name), "{name}");
    }
}

#[test]
fn what_a_device_has_counted_that_is_gone_stays_in_the_sum() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut registry = Registry::default();
    let (a, b) = (Arc::new(AtomicU64::new(3)), Arc::new(AtomicU64::new(4)));
    registry.add_device("block", "a", block(&a));
    registry.add_device("block", "b", block(&b));
    registry.write_to(&config(file.path()), "vm-1").unwrap();
    registry.write();
    for _ in 0..2 {
        registry.remove_device("block", "b");
        // The next one of that name counts from the beginning.
        registry.add_device("block", "b", block(&Arc::new(AtomicU64::new(5))));
        registry.write();
    }
    registry.remove_device("block", "none");
    let text = std::fs::read_to_string(file.path()).unwrap();
    let lines: Vec<Json> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    for (line, [b, sum]) in lines.iter().zip([[4, 7], [5, 5], [5, 5]]) {
        assert_eq!(line["block_b"]["read_count"], b);
        assert_eq!(line["block"]["read_count"], sum);
    }
    assert_eq!(registry.sources.len(), 3, "those that are gone are one");
}
