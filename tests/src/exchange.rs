//! Requests to the API in each phase of a machine, and what a monitor answers to them.
//!
//! The same list goes to Coracle and to Firecracker; `record-api` keeps Firecracker's answers in
//! `golden/firecracker-api.json` as facts (the status, the keys and kinds of the body), so that they can be compared
//! where there is no Firecracker.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::Outcome;
use crate::guest::{Machine, blank_image};
use crate::monitor::{Launch, Monitor};
use crate::probe;
use crate::shape::shape;

/// When a request is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// Nothing is configured.
    Fresh,
    /// Everything is configured, nothing started.
    Configured,
    /// The machine runs.
    Running,
    /// The machine is paused.
    Paused,
}

/// One request; `{kernel}` and the like in the body stand for files, see [`Files::fill_in`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// When it is sent.
    pub phase: Phase,
    /// Its method.
    pub method: String,
    /// Its path.
    pub path: String,
    /// Its body, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub body: Option<String>,
}

/// A request and what was answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exchange {
    /// What was asked.
    #[serde(flatten)]
    pub request: Request,
    /// The status of the answer.
    pub status: u16,
    /// The shape of its body.
    pub shape: Value,
}

/// The phases in order.
pub const PHASES: [Phase; 4] = [Phase::Fresh, Phase::Configured, Phase::Running, Phase::Paused];

/// The requests that are sent in every phase: method, path and body (`-` for none).
///
/// They are within what Coracle offers; what it refuses until later is not comparable.
const IN_EVERY_PHASE: &[(&str, &str, &str)] = &[
    ("GET", "/", "-"),
    ("GET", "/version", "-"),
    ("GET", "/vm/config", "-"),
    ("GET", "/machine-config", "-"),
    ("PUT", "/machine-config", r#"{"vcpu_count":2,"mem_size_mib":64}"#),
    ("PATCH", "/machine-config", r#"{"mem_size_mib":96}"#),
    (
        "PUT",
        "/boot-source",
        r#"{"kernel_image_path":"{kernel}","boot_args":"quiet"}"#,
    ),
    ("PUT", "/drives/data", r#"{{drive}}"#),
    (
        "PATCH",
        "/drives/first",
        r#"{"drive_id":"first","path_on_host":"{other_disk}"}"#,
    ),
    (
        "PATCH",
        "/drives/first",
        r#"{"drive_id":"first","rate_limiter":{"ops":{"size":100,"refill_time":100}}}"#,
    ),
    (
        "PATCH",
        "/drives/nobody",
        r#"{"drive_id":"nobody","path_on_host":"{disk}"}"#,
    ),
    ("PUT", "/cpu-config", r#"{"cpuid_modifiers":[]}"#),
    ("PUT", "/entropy", "{}"),
    ("PUT", "/serial", "{}"),
    ("PUT", "/logger", r#"{"level":"Warning"}"#),
    ("PUT", "/metrics", r#"{"metrics_path":"{metrics}"}"#),
    ("PUT", "/actions", r#"{"action_type":"FlushMetrics"}"#),
    ("PUT", "/actions", r#"{"action_type":"InstanceStart"}"#),
    ("PUT", "/actions", r#"{"action_type":"SendCtrlAltDel"}"#),
    ("PATCH", "/vm", r#"{"state":"Paused"}"#),
    ("PATCH", "/vm", r#"{"state":"Resumed"}"#),
];

/// Requests that are sent to a machine that was not started: good and bad forms of each body.
const BEFORE_START: &[(&str, &str, &str)] = &[
    ("PUT", "/machine-config", "-"),
    ("PUT", "/machine-config", ""),
    ("PUT", "/machine-config", "{"),
    ("PUT", "/machine-config", "[]"),
    ("PUT", "/machine-config", "{}"),
    ("PUT", "/machine-config", r#"{"vcpu_count":0,"mem_size_mib":64}"#),
    ("PUT", "/machine-config", r#"{"vcpu_count":33,"mem_size_mib":64}"#),
    (
        "PUT",
        "/machine-config",
        r#"{"vcpu_count":256,"mem_size_mib":64}"#,
    ),
    (
        "PUT",
        "/machine-config",
        r#"{"vcpu_count":"2","mem_size_mib":64}"#,
    ),
    ("PUT", "/machine-config", r#"{"vcpu_count":2,"mem_size_mib":0}"#),
    ("PUT", "/machine-config", r#"{"vcpu_count":2,"mem_size_mib":-1}"#),
    (
        "PUT",
        "/machine-config",
        r#"{"vcpu_count":2,"mem_size_mib":64,"unknown":1}"#,
    ),
    (
        "PUT",
        "/machine-config",
        r#"{"vcpu_count":2,"vcpu_count":2,"mem_size_mib":64}"#,
    ),
    (
        "PUT",
        "/machine-config",
        r#"{"vcpu_count":2,"mem_size_mib":64,"smt":false,"track_dirty_pages":true}"#,
    ),
    (
        "PUT",
        "/machine-config",
        r#"{"vcpu_count":3,"mem_size_mib":64,"smt":true}"#,
    ),
    (
        "PUT",
        "/machine-config",
        r#"{"vcpu_count":2,"mem_size_mib":63,"huge_pages":"2M"}"#,
    ),
    (
        "PUT",
        "/machine-config",
        r#"{"vcpu_count":2,"mem_size_mib":64,"huge_pages":"1G"}"#,
    ),
    (
        "PUT",
        "/machine-config",
        r#"{"vcpu_count":2,"mem_size_mib":64,"cpu_template":"None"}"#,
    ),
    ("PATCH", "/machine-config", "{}"),
    ("PATCH", "/machine-config", r#"{"vcpu_count":33}"#),
    ("PUT", "/boot-source", "{}"),
    ("PUT", "/boot-source", r#"{"kernel_image_path":"{missing}"}"#),
    (
        "PUT",
        "/boot-source",
        r#"{"kernel_image_path":"{kernel}","initrd_path":"{missing}"}"#,
    ),
    (
        "PUT",
        "/boot-source",
        r#"{"kernel_image_path":"{kernel}","initrd_path":null,"boot_args":null}"#,
    ),
    (
        "PUT",
        "/boot-source",
        r#"{"kernel_image_path":"{kernel}","unknown":1}"#,
    ),
    ("PUT", "/boot-source", r#"{"kernel_image_path":"{text}"}"#),
    (
        "PUT",
        "/drives/data",
        r#"{"drive_id":"data","is_root_device":false}"#,
    ),
    (
        "PUT",
        "/drives/data",
        r#"{"drive_id":"other","path_on_host":"{disk}","is_root_device":false}"#,
    ),
    (
        "PUT",
        "/drives/data",
        r#"{"drive_id":"data","path_on_host":"{missing}","is_root_device":false}"#,
    ),
    (
        "PUT",
        "/drives/data",
        r#"{"drive_id":"data","path_on_host":"{disk}"}"#,
    ),
    ("PUT", "/drives/data", r#"{{drive},"unknown":1}"#),
    (
        "PUT",
        "/drives/data",
        r#"{"drive_id":"data","path_on_host":"{disk}","is_root_device":true,"partuuid":"0eaa91a0-01"}"#,
    ),
    ("PUT", "/drives/data", r#"{{drive},"is_read_only":true}"#),
    ("PUT", "/drives/data", r#"{{drive},"cache_type":"Unsafe"}"#),
    ("PUT", "/drives/data", r#"{{drive},"cache_type":"Writeback"}"#),
    ("PUT", "/drives/data", r#"{{drive},"cache_type":"None"}"#),
    ("PUT", "/drives/data", r#"{{drive},"io_engine":"Sync"}"#),
    ("PUT", "/drives/data", r#"{{drive},"io_engine":"Async"}"#),
    ("PUT", "/drives/data", r#"{{drive},"io_engine":"None"}"#),
    (
        "PUT",
        "/drives/data",
        r#"{{drive},"rate_limiter":{"bandwidth":{"size":1000,"one_time_burst":2000,"refill_time":100}}}"#,
    ),
    (
        "PUT",
        "/drives/data",
        r#"{{drive},"rate_limiter":{"bandwidth":{"size":1000}}}"#,
    ),
    (
        "PUT",
        "/drives/",
        r#"{"drive_id":"","path_on_host":"{disk}","is_root_device":false}"#,
    ),
    ("PUT", "/drives", r#"{{drive}}"#),
    (
        "PUT",
        "/drives/a.b",
        r#"{"drive_id":"a.b","path_on_host":"{disk}","is_root_device":false}"#,
    ),
    ("GET", "/drives/data", "-"),
    ("DELETE", "/drives/data", "-"),
    ("PUT", "/cpu-config", "{}"),
    ("PUT", "/cpu-config", r#"{"unknown":1}"#),
    (
        "PUT",
        "/cpu-config",
        r#"{"cpuid_modifiers":[{"leaf":"0x1","subleaf":"0x0","flags":0,"modifiers":[{"register":"ecx","bitmap":"0bx0"}]}]}"#,
    ),
    (
        "PUT",
        "/cpu-config",
        r#"{"cpuid_modifiers":[{"leaf":"1","subleaf":"0x0","flags":0,"modifiers":[{"register":"ecx","bitmap":"0bx0"}]}]}"#,
    ),
    (
        "PUT",
        "/entropy",
        r#"{"rate_limiter":{"bandwidth":{"size":1000,"refill_time":100}}}"#,
    ),
    ("PUT", "/entropy", r#"{"unknown":1}"#),
    ("PUT", "/serial", r#"{"serial_out_path":"{serial}"}"#),
    (
        "PUT",
        "/serial",
        r#"{"serial_out_path":"{missing_directory}/serial"}"#,
    ),
    ("PUT", "/serial", r#"{"unknown":1}"#),
    ("PUT", "/logger", "{}"),
    ("PUT", "/logger", r#"{"level":"loud"}"#),
    (
        "PUT",
        "/logger",
        r#"{"level":"info","show_level":true,"show_log_origin":true}"#,
    ),
    ("PUT", "/logger", r#"{"log_path":"{log}","level":"Debug"}"#),
    ("PUT", "/logger", r#"{"log_path":"{missing_directory}/log"}"#),
    ("PUT", "/logger", r#"{"module":"some::module"}"#),
    ("PUT", "/logger", r#"{"unknown":1}"#),
    ("PUT", "/metrics", "{}"),
    (
        "PUT",
        "/metrics",
        r#"{"metrics_path":"{missing_directory}/metrics"}"#,
    ),
    ("PUT", "/metrics", r#"{"metrics_path":"{metrics}","unknown":1}"#),
    ("PUT", "/actions", "{}"),
    ("PUT", "/actions", r#"{"action_type":"Explode"}"#),
    (
        "PUT",
        "/actions",
        r#"{"action_type":"InstanceStart","unknown":1}"#,
    ),
    ("PATCH", "/vm", "{}"),
    ("PATCH", "/vm", r#"{"state":"Stopped"}"#),
    ("PUT", "/vm", r#"{"state":"Paused"}"#),
    ("GET", "/nowhere", "-"),
    ("PUT", "/nowhere", "{}"),
    ("POST", "/", "{}"),
    ("GET", "/", "{}"),
    ("GET", "//", "-"),
    ("GET", "/machine-config/", "-"),
    ("PUT", "/version", "{}"),
    ("PATCH", "/boot-source", "{}"),
];

/// Requests for snapshots that are sent in every phase.
const SNAPSHOTS_IN_EVERY_PHASE: &[(&str, &str, &str)] = &[
    (
        "PUT",
        "/snapshot/create",
        r#"{"snapshot_path":"{state}","mem_file_path":"{memory}"}"#,
    ),
    (
        "PUT",
        "/snapshot/create",
        r#"{"snapshot_type":"Diff","snapshot_path":"{state}","mem_file_path":"{memory}"}"#,
    ),
    (
        "PUT",
        "/snapshot/create",
        r#"{"snapshot_path":"{missing_directory}/state","mem_file_path":"{memory}"}"#,
    ),
    (
        "PUT",
        "/snapshot/create",
        r#"{"snapshot_path":"{state}","mem_file_path":"{missing_directory}/memory"}"#,
    ),
    (
        "PUT",
        "/snapshot/load",
        r#"{"snapshot_path":"{missing}","mem_backend":{"backend_type":"File","backend_path":"{missing}"}}"#,
    ),
    (
        "PUT",
        "/snapshot/load",
        r#"{"snapshot_path":"{text}","mem_file_path":"{text}","resume_vm":true}"#,
    ),
];

/// Good and bad forms of the bodies of snapshots.
const SNAPSHOTS_BEFORE_START: &[(&str, &str, &str)] = &[
    ("PUT", "/snapshot/create", "-"),
    ("PUT", "/snapshot/create", "{}"),
    ("PUT", "/snapshot/create", r#"{"snapshot_path":"{state}"}"#),
    ("PUT", "/snapshot/create", r#"{"mem_file_path":"{memory}"}"#),
    (
        "PUT",
        "/snapshot/create",
        r#"{"snapshot_type":"full","snapshot_path":"{state}","mem_file_path":"{memory}"}"#,
    ),
    (
        "PUT",
        "/snapshot/create",
        r#"{"snapshot_path":"{state}","mem_file_path":"{memory}","unknown":1}"#,
    ),
    ("PUT", "/snapshot/load", "-"),
    ("PUT", "/snapshot/load", "{}"),
    ("PUT", "/snapshot/load", r#"{"snapshot_path":"{text}"}"#),
    ("PUT", "/snapshot/load", r#"{"mem_file_path":"{text}"}"#),
    (
        "PUT",
        "/snapshot/load",
        r#"{"snapshot_path":"{text}","mem_file_path":"{text}","mem_backend":{"backend_type":"File","backend_path":"{text}"}}"#,
    ),
    (
        "PUT",
        "/snapshot/load",
        r#"{"snapshot_path":"{text}","mem_backend":{"backend_type":"File"}}"#,
    ),
    (
        "PUT",
        "/snapshot/load",
        r#"{"snapshot_path":"{text}","mem_backend":{"backend_path":"{text}"}}"#,
    ),
    (
        "PUT",
        "/snapshot/load",
        r#"{"snapshot_path":"{text}","mem_backend":{"backend_type":"Tape","backend_path":"{text}"}}"#,
    ),
    (
        "PUT",
        "/snapshot/load",
        r#"{"snapshot_path":"{text}","mem_backend":{"backend_type":"Uffd","backend_path":"{missing}"}}"#,
    ),
    (
        "PUT",
        "/snapshot/load",
        r#"{"snapshot_path":"{text}","mem_file_path":"{text}","enable_diff_snapshots":true,"track_dirty_pages":true}"#,
    ),
    (
        "PUT",
        "/snapshot/load",
        r#"{"snapshot_path":"{text}","mem_file_path":"{text}","network_overrides":[]}"#,
    ),
    (
        "PUT",
        "/snapshot/load",
        r#"{"snapshot_path":"{text}","mem_file_path":"{text}","unknown":1}"#,
    ),
    (
        "PUT",
        "/snapshot/load",
        r#"{"snapshot_path":"{text}","mem_file_path":"{text}","resume_vm":"yes"}"#,
    ),
    ("PUT", "/snapshot", "{}"),
    ("PATCH", "/snapshot/load", "{}"),
    ("GET", "/snapshot/create", "-"),
];

/// Every request, in every phase that it is sent in.
pub fn requests() -> Vec<Request> {
    let request = |phase, (method, path, body): &(&str, &str, &str)| Request {
        phase,
        method: (*method).to_owned(),
        path: (*path).to_owned(),
        body: (*body != "-").then(|| (*body).to_owned()),
    };
    let everywhere = PHASES
        .into_iter()
        .flat_map(|phase| IN_EVERY_PHASE.iter().map(move |row| request(phase, row)));
    let snapshots = PHASES.into_iter().flat_map(|phase| {
        SNAPSHOTS_IN_EVERY_PHASE
            .iter()
            .map(move |row| request(phase, row))
    });
    everywhere
        .chain(BEFORE_START.iter().map(|row| request(Phase::Fresh, row)))
        .chain(snapshots)
        .chain(
            SNAPSHOTS_BEFORE_START
                .iter()
                .map(|row| request(Phase::Fresh, row)),
        )
        .collect()
}

/// The recorded answers of Firecracker.
///
/// # Errors
///
/// When the file is not there or is of another form.
pub fn recorded() -> Outcome<Vec<Exchange>> {
    let text = std::fs::read_to_string(golden())?;
    Ok(serde_json::from_str(&text)?)
}

/// The file of the recorded answers.
pub fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/firecracker-api.json")
}

/// Starts a monitor, brings it to the request's phase, sends the request.
///
/// # Errors
///
/// When the phase cannot be reached or nothing is answered.
pub fn ask(launch: Launch, request: &Request) -> Outcome<Exchange> {
    let files = Files::make(launch.directory())?;
    let monitor = launch.start()?;
    files.reach(&monitor, request.phase)?;
    let body = request.body.as_ref().map(|body| files.fill_in(body));
    let answer = monitor
        .connect()?
        .request(&request.method, &request.path, body.as_deref())?;
    // Some of Firecracker's answers have line breaks inside a JSON string; any shape is as good as that.
    let shape = answer
        .json()
        .map_or(Value::String("null".to_owned()), |body| shape(&body));
    Ok(Exchange {
        request: request.clone(),
        status: answer.status,
        shape,
    })
}

/// The files that requests name.
pub struct Files(PathBuf);

impl Files {
    /// Makes them in a directory.
    ///
    /// # Errors
    ///
    /// When that fails.
    pub fn make(directory: &Path) -> Outcome<Self> {
        probe::write_idle(&directory.join("test-kernel"))?;
        blank_image(&directory.join("test-disk"), 1)?;
        blank_image(&directory.join("test-other_disk"), 2)?;
        std::fs::write(
            directory.join("test-text"),
            "no kernel, but long enough to be read as one\n".repeat(100),
        )?;
        for name in ["test-metrics", "test-log", "test-serial"] {
            std::fs::write(directory.join(name), "")?;
        }
        Ok(Self(directory.to_owned()))
    }

    /// Replaces `{drive}` by the fields that every drive has, and each other `{name}` by a path.
    pub fn fill_in(&self, text: &str) -> String {
        let names = [
            "kernel",
            "disk",
            "other_disk",
            "text",
            "metrics",
            "log",
            "serial",
            "state",
            "memory",
            "missing",
            "missing_directory",
        ];
        let drive = r#""drive_id":"data","path_on_host":"{disk}","is_root_device":false"#;
        names
            .into_iter()
            .fold(text.replace("{drive}", drive), |text, name| {
                text.replace(
                    &format!("{{{name}}}"),
                    &self.0.join(format!("test-{name}")).display().to_string(),
                )
            })
    }

    /// Brings a monitor to a phase.
    ///
    /// # Errors
    ///
    /// When it refuses.
    pub fn reach(&self, monitor: &Monitor, phase: Phase) -> Outcome {
        if phase == Phase::Fresh {
            return Ok(());
        }
        let machine = Machine::new(&self.0.join("test-kernel"), "quiet").memory_mib(64);
        monitor.configure(&machine.disk("first", &self.0.join("test-disk")).config())?;
        if phase == Phase::Configured {
            return Ok(());
        }
        monitor.start_instance()?;
        if phase == Phase::Paused {
            monitor.set_state("Paused")
        } else {
            Ok(())
        }
    }
}
