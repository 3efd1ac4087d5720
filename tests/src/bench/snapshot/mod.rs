//! What is measured of our snapshots alone: clones, memory that comes from a server, pauses. Each figure stands beside what was
//! asked of it.

pub mod clones;
pub mod lazy;
pub mod pauses;

use std::path::Path;

use serde_json::{Value, json};

use super::api::{Monitor, Program};
use crate::Outcome;
use crate::guest::unikernel_words;

/// What is measured, and with which guest.
#[derive(Clone, Copy)]
pub struct Subject<'a> {
    /// The monitor.
    pub program: &'a Program,
    /// The unikernel.
    pub guest: &'a Path,
}

impl Subject<'_> {
    /// A monitor whose guest does `words`, with a drive if there is one.
    fn started(&self, words: &str, memory_mib: u64, drive: Option<&Value>) -> Outcome<Monitor> {
        let mut monitor = Monitor::start(self.program, &["--api-sock", "api.sock"])?;
        monitor.wait_for_api()?;
        let boot = json!({ "kernel_image_path": self.guest, "boot_args": unikernel_words(words) });
        monitor.request("PUT", "/boot-source", Some(&boot))?;
        let machine = json!({ "vcpu_count": 1, "mem_size_mib": memory_mib });
        monitor.request("PUT", "/machine-config", Some(&machine))?;
        if let Some(drive) = drive {
            let id = drive.get("drive_id").and_then(Value::as_str).unwrap_or_default();
            monitor.request("PUT", &format!("/drives/{id}"), Some(drive))?;
        }
        let start = json!({ "action_type": "InstanceStart" });
        monitor.request("PUT", "/actions", Some(&start))?;
        Ok(monitor)
    }
}

/// Pauses the guest, or has it go on.
fn set_state(monitor: &mut Monitor, state: &str) -> Outcome {
    monitor.request("PATCH", "/vm", Some(&json!({ "state": state })))
}

/// Makes a full snapshot of a guest, which stays paused.
fn save(monitor: &mut Monitor, state: &str, memory: &str) -> Outcome {
    set_state(monitor, "Paused")?;
    let body = json!({ "snapshot_path": state, "mem_file_path": memory });
    monitor.request("PUT", "/snapshot/create", Some(&body))
}

/// A figure, and whether it is what was asked: printed, and for the report.
fn row(name: &str, figure: f64, asked_max: f64, unit: &str) -> Value {
    let verdict = if figure <= asked_max { "" } else { "  MISSED" };
    println!("  {name:<52}{figure:>10.2} {unit:<5} asked: at most {asked_max:.2}{verdict}");
    json!({ "figure": figure, "asked_max": asked_max, "unit": unit, "is_met": figure <= asked_max })
}
