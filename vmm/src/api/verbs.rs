//! The verbs of the API: one table, from which the router, the OpenAPI document and the client come,
//! and one policy that says in which phase a verb is allowed.

use coracle_devices::serial::SerialConfig;
use coracle_devices::virtio::blk::{DriveConfig, PartialDrive};
use coracle_devices::virtio::rng::EntropyConfig;
use serde::de::DeserializeOwned;

pub use super::answer::{Answer, Data, Fault};
use super::http::{Content, Method};
use crate::config::{
    Action, BootSource, CpuConfig, InstanceActionInfo, LoggerConfig, MachineConfig, MachineConfigPatch,
    MetricsConfig, MigrationReceive, MigrationRecover, MigrationSend, Phase, RateLimiterGroup,
    SnapshotCreate, SnapshotLoad, SnapshotPatch, SnapshotWish, Vm, VmState,
};

/// What a client wants, with everything it sent parsed.
#[derive(Clone, Debug, PartialEq)]
pub enum Verb {
    /// Describe the instance.
    GetInstance,
    /// Tell the version.
    GetVersion,
    /// Tell vCPUs and memory.
    GetMachineConfig,
    /// Set vCPUs and memory.
    PutMachineConfig(MachineConfig),
    /// Change vCPUs and memory.
    PatchMachineConfig(MachineConfigPatch),
    /// Set the custom CPU template.
    PutCpuConfig(CpuConfig),
    /// Set what is booted.
    PutBootSource(BootSource),
    /// Add or replace a drive.
    PutDrive(DriveConfig),
    /// Change a drive's image or limits.
    PatchDrive(PartialDrive),
    /// Add or replace a group of drives that share limits.
    PutRateLimiterGroup(RateLimiterGroup),
    /// Change the limits of a group.
    PatchRateLimiterGroup(RateLimiterGroup),
    /// Set the entropy device.
    PutEntropy(EntropyConfig),
    /// Set the serial port.
    PutSerial(SerialConfig),
    /// Set where logs go.
    PutLogger(LoggerConfig),
    /// Set where metrics go.
    PutMetrics(MetricsConfig),
    /// Tell the metrics.
    GetMetrics,
    /// Write the metrics now.
    FlushMetrics,
    /// Start the machine.
    Start,
    /// Press Ctrl+Alt+Del.
    SendCtrlAltDel,
    /// Stop the vCPUs and drain the devices.
    Pause,
    /// Let the guest run on.
    Resume,
    /// Tell the whole configuration.
    GetConfig,
    /// Make a snapshot.
    CreateSnapshot(SnapshotCreate),
    /// Go on from a snapshot.
    LoadSnapshot(Box<SnapshotLoad>),
    /// Tell how far a snapshot is.
    GetSnapshot,
    /// Give up the snapshot that is being made.
    CancelSnapshot,
    /// Send the machine to another process.
    SendMigration(Box<MigrationSend>),
    /// Take a machine from another process.
    ReceiveMigration(Box<MigrationReceive>),
    /// Tell how far a migration is.
    GetMigration,
    /// Tell the same, until it has ended.
    WatchMigration,
    /// Give up the migration.
    CancelMigration,
    /// Have the two sides of a migration find each other again.
    RecoverMigration(Box<MigrationRecover>),
}

/// What a verb is, without what it carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "each is the verb of the same name")]
pub enum VerbKind {
    GetInstance,
    GetVersion,
    GetMachineConfig,
    PutMachineConfig,
    PatchMachineConfig,
    PutCpuConfig,
    PutBootSource,
    PutDrive,
    PatchDrive,
    PutRateLimiterGroup,
    PatchRateLimiterGroup,
    PutEntropy,
    PutSerial,
    PutLogger,
    PutMetrics,
    GetMetrics,
    FlushMetrics,
    Start,
    SendCtrlAltDel,
    Pause,
    Resume,
    GetConfig,
    CreateSnapshot,
    LoadSnapshot,
    GetSnapshot,
    CancelSnapshot,
    SendMigration,
    ReceiveMigration,
    GetMigration,
    WatchMigration,
    CancelMigration,
    RecoverMigration,
}

impl Verb {
    /// What the verb is.
    pub fn kind(&self) -> VerbKind {
        match self {
            Self::GetInstance => VerbKind::GetInstance,
            Self::GetVersion => VerbKind::GetVersion,
            Self::GetMachineConfig => VerbKind::GetMachineConfig,
            Self::PutMachineConfig(_) => VerbKind::PutMachineConfig,
            Self::PatchMachineConfig(_) => VerbKind::PatchMachineConfig,
            Self::PutCpuConfig(_) => VerbKind::PutCpuConfig,
            Self::PutBootSource(_) => VerbKind::PutBootSource,
            Self::PutDrive(_) => VerbKind::PutDrive,
            Self::PatchDrive(_) => VerbKind::PatchDrive,
            Self::PutRateLimiterGroup(_) => VerbKind::PutRateLimiterGroup,
            Self::PatchRateLimiterGroup(_) => VerbKind::PatchRateLimiterGroup,
            Self::PutEntropy(_) => VerbKind::PutEntropy,
            Self::PutSerial(_) => VerbKind::PutSerial,
            Self::PutLogger(_) => VerbKind::PutLogger,
            Self::PutMetrics(_) => VerbKind::PutMetrics,
            Self::GetMetrics => VerbKind::GetMetrics,
            Self::FlushMetrics => VerbKind::FlushMetrics,
            Self::Start => VerbKind::Start,
            Self::SendCtrlAltDel => VerbKind::SendCtrlAltDel,
            Self::Pause => VerbKind::Pause,
            Self::Resume => VerbKind::Resume,
            Self::GetConfig => VerbKind::GetConfig,
            Self::CreateSnapshot(_) => VerbKind::CreateSnapshot,
            Self::LoadSnapshot(_) => VerbKind::LoadSnapshot,
            Self::GetSnapshot => VerbKind::GetSnapshot,
            Self::CancelSnapshot => VerbKind::CancelSnapshot,
            Self::SendMigration(_) => VerbKind::SendMigration,
            Self::ReceiveMigration(_) => VerbKind::ReceiveMigration,
            Self::GetMigration => VerbKind::GetMigration,
            Self::WatchMigration => VerbKind::WatchMigration,
            Self::CancelMigration => VerbKind::CancelMigration,
            Self::RecoverMigration(_) => VerbKind::RecoverMigration,
        }
    }

    /// Whether the request used a field that Firecracker has deprecated.
    pub fn is_deprecated(&self) -> bool {
        match self {
            Self::PutMachineConfig(machine) => machine.cpu_template.is_some(),
            Self::PatchMachineConfig(patch) => patch.cpu_template.is_some(),
            Self::LoadSnapshot(load) => load.is_deprecated(),
            _ => false,
        }
    }
}

/// Whether `verb` is allowed in `phase`: the one place that says so.
///
/// # Errors
///
/// The answer for a client that asks at the wrong time.
pub fn permitted(phase: Phase, verb: VerbKind) -> Result<(), Fault> {
    match (phase, verb) {
        (Phase::Running, VerbKind::CreateSnapshot) => Err(Fault::bad_request(
            "Create snapshot error: the microVM runs: pause it first (PATCH /vm with state `Paused`).",
        )),
        (Phase::Paused, VerbKind::SendMigration) => Err(Fault::bad_request(
            "Migration error: the microVM stands still: let it run first (PATCH /vm with state `Resumed`, `coraclectl resume`).",
        )),
        _ => match (phase, time_of(verb)) {
            (_, Time::Always)
            | (Phase::NotStarted, Time::BeforeStart)
            | (Phase::Running | Phase::Paused, Time::AfterStart) => Ok(()),
            (Phase::NotStarted, Time::AfterStart) => Err(Fault::bad_request(
                "The requested operation is not supported before starting the microVM.",
            )),
            (Phase::Running | Phase::Paused, Time::BeforeStart) => Err(Fault::bad_request(
                "The requested operation is not supported after starting the microVM.",
            )),
        },
    }
}

/// When something can be asked for.
enum Time {
    Always,
    BeforeStart,
    AfterStart,
}

fn time_of(verb: VerbKind) -> Time {
    use VerbKind as V;
    match verb {
        V::GetInstance
        | V::GetVersion
        | V::GetMachineConfig
        | V::GetConfig
        | V::GetMetrics
        | V::GetSnapshot
        | V::CancelSnapshot
        | V::GetMigration
        | V::WatchMigration
        | V::CancelMigration
        | V::RecoverMigration => Time::Always,
        V::PutMachineConfig
        | V::PatchMachineConfig
        | V::PutCpuConfig
        | V::PutBootSource
        | V::PutDrive
        | V::PutRateLimiterGroup
        | V::PutEntropy
        | V::PutSerial
        | V::PutLogger
        | V::PutMetrics
        | V::Start
        | V::LoadSnapshot
        | V::ReceiveMigration => Time::BeforeStart,
        V::PatchDrive
        | V::PatchRateLimiterGroup
        | V::FlushMetrics
        | V::SendCtrlAltDel
        | V::Pause
        | V::Resume
        | V::CreateSnapshot
        | V::SendMigration => Time::AfterStart,
    }
}

/// What the monitor has begun and not answered yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Underway {
    /// The images of the machine are being opened.
    Start,
    /// The guest is being stopped.
    Pause,
    /// A drive is being given another image or size.
    DriveChange,
    /// A snapshot is being made.
    SnapshotCreate,
    /// A snapshot is being loaded.
    SnapshotLoad,
    /// The guest is about to run on: its disks are made ready.
    Resume,
    /// The machine is on its way to another process, or from one.
    Migration,
}

impl Underway {
    /// All of them, for tables over them.
    pub const ALL: [Self; 7] = [
        Self::Start,
        Self::Pause,
        Self::DriveChange,
        Self::SnapshotCreate,
        Self::SnapshotLoad,
        Self::Resume,
        Self::Migration,
    ];

    /// The answer for a client that asks for something else meanwhile.
    pub fn fault(self) -> Fault {
        let what = match self {
            Self::Start => "a start",
            Self::Pause => "a pause",
            Self::DriveChange => "a change of a drive",
            Self::SnapshotCreate => "a snapshot",
            Self::SnapshotLoad => "the load of a snapshot",
            Self::Resume => "a resume",
            Self::Migration => "a migration",
        };
        Fault::bad_request(format!("{what} is under way: ask again when it has ended"))
    }
}

/// Whether `verb`, which is allowed in this phase, is allowed while something is under way: what only looks, and what
/// changes neither the phase nor a drive.
///
/// # Errors
///
/// The answer for a client that has to wait.
pub fn permitted_meanwhile(underway: Underway, verb: VerbKind) -> Result<(), Fault> {
    use VerbKind as V;
    match verb {
        V::GetInstance
        | V::GetVersion
        | V::GetMachineConfig
        | V::GetConfig
        | V::GetMetrics
        | V::GetSnapshot
        | V::CancelSnapshot
        | V::GetMigration
        | V::WatchMigration
        | V::CancelMigration
        | V::RecoverMigration
        | V::FlushMetrics
        | V::SendCtrlAltDel => Ok(()),
        V::PutMachineConfig
        | V::PatchMachineConfig
        | V::PutCpuConfig
        | V::PutBootSource
        | V::PutDrive
        | V::PatchDrive
        | V::PutRateLimiterGroup
        | V::PatchRateLimiterGroup
        | V::PutEntropy
        | V::PutSerial
        | V::PutLogger
        | V::PutMetrics
        | V::Start
        | V::Pause
        | V::Resume
        | V::CreateSnapshot
        | V::LoadSnapshot
        | V::SendMigration
        | V::ReceiveMigration => Err(underway.fault()),
    }
}

/// One line of the table: what can be sent, and what it becomes.
#[derive(Debug)]
pub struct Route {
    /// The method.
    pub method: Method,
    /// The path, with `{drive_id}` where a name stands.
    pub path: &'static str,
    /// One line for people.
    pub summary: &'static str,
    /// The type of the body as the OpenAPI document names it; `None` if there must be no body.
    pub body: Option<&'static str>,
    /// What a successful answer is.
    pub answer: AnswerShape,
    /// What a body can become.
    pub kinds: &'static [VerbKind],
    /// Makes the verb of the name in the path (empty if there is none) and the body.
    pub(super) parse: fn(&str, &[u8]) -> Result<Verb, Fault>,
}

/// What a successful answer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AnswerShape {
    /// Status 204.
    Empty,
    /// Status 200 with JSON of this type, as the OpenAPI document names it.
    Json(&'static str),
    /// Status 200 with text.
    Text(Content),
    /// Status 200 with JSON of this type in each line, for as long as the connection lasts.
    Lines(&'static str),
}

/// Everything that can be asked.
pub static ROUTES: &[Route] = &[
    Route {
        method: Method::Get,
        path: "/",
        summary: "Describes the instance.",
        body: None,
        answer: AnswerShape::Json("InstanceInfo"),
        kinds: &[VerbKind::GetInstance],
        parse: |_, _| Ok(Verb::GetInstance),
    },
    Route {
        method: Method::Get,
        path: "/version",
        summary: "Tells the version.",
        body: None,
        answer: AnswerShape::Json("Version"),
        kinds: &[VerbKind::GetVersion],
        parse: |_, _| Ok(Verb::GetVersion),
    },
    Route {
        method: Method::Get,
        path: "/machine-config",
        summary: "Tells vCPUs and memory.",
        body: None,
        answer: AnswerShape::Json("MachineConfig"),
        kinds: &[VerbKind::GetMachineConfig],
        parse: |_, _| Ok(Verb::GetMachineConfig),
    },
    Route {
        method: Method::Put,
        path: "/machine-config",
        summary: "Sets vCPUs and memory.",
        body: Some("MachineConfig"),
        answer: AnswerShape::Empty,
        kinds: &[VerbKind::PutMachineConfig],
        parse: |_, body| json(body).map(Verb::PutMachineConfig),
    },
    Route {
        method: Method::Patch,
        path: "/machine-config",
        summary: "Changes vCPUs and memory.",
        body: Some("MachineConfigPatch"),
        answer: AnswerShape::Empty,
        kinds: &[VerbKind::PatchMachineConfig],
        parse: patch_machine_config,
    },
    Route {
        method: Method::Put,
        path: "/cpu-config",
        summary: "Sets a custom CPU template.",
        body: Some("CpuConfig"),
        answer: AnswerShape::Empty,
        kinds: &[VerbKind::PutCpuConfig],
        parse: |_, body| json(body).map(Verb::PutCpuConfig),
    },
    Route {
        method: Method::Put,
        path: "/boot-source",
        summary: "Sets kernel, initrd and command line.",
        body: Some("BootSource"),
        answer: AnswerShape::Empty,
        kinds: &[VerbKind::PutBootSource],
        parse: |_, body| json(body).map(Verb::PutBootSource),
    },
    Route {
        method: Method::Put,
        path: "/drives/{drive_id}",
        summary: "Adds a drive, or replaces the one of that name.",
        body: Some("DriveConfig"),
        answer: AnswerShape::Empty,
        kinds: &[VerbKind::PutDrive],
        parse: put_drive,
    },
    Route {
        method: Method::Patch,
        path: "/drives/{drive_id}",
        summary: "Changes a drive's image, size or limits while the machine is there.",
        body: Some("PartialDrive"),
        answer: AnswerShape::Empty,
        kinds: &[VerbKind::PatchDrive],
        parse: patch_drive,
    },
    Route {
        method: Method::Put,
        path: "/rate-limiter-groups/{group_id}",
        summary: "Adds a group of drives that share limits, or replaces the one of that name. (Not in Firecracker.)",
        body: Some("RateLimiterGroup"),
        answer: AnswerShape::Empty,
        kinds: &[VerbKind::PutRateLimiterGroup],
        parse: |id, body| group(id, body).map(Verb::PutRateLimiterGroup),
    },
    Route {
        method: Method::Patch,
        path: "/rate-limiter-groups/{group_id}",
        summary: "Changes the limits of a group while the machine is there. (Not in Firecracker.)",
        body: Some("RateLimiterGroup"),
        answer: AnswerShape::Empty,
        kinds: &[VerbKind::PatchRateLimiterGroup],
        parse: |id, body| group(id, body).map(Verb::PatchRateLimiterGroup),
    },
    Route {
        method: Method::Put,
        path: "/entropy",
        summary: "Adds an entropy device.",
        body: Some("EntropyConfig"),
        answer: AnswerShape::Empty,
        kinds: &[VerbKind::PutEntropy],
        parse: |_, body| json(body).map(Verb::PutEntropy),
    },
    Route {
        method: Method::Put,
        path: "/serial",
        summary: "Sets where the serial port's output goes.",
        body: Some("SerialConfig"),
        answer: AnswerShape::Empty,
        kinds: &[VerbKind::PutSerial],
        parse: |_, body| json(body).map(Verb::PutSerial),
    },
    Route {
        method: Method::Put,
        path: "/logger",
        summary: "Sets what is logged, and where.",
        body: Some("LoggerConfig"),
        answer: AnswerShape::Empty,
        kinds: &[VerbKind::PutLogger],
        parse: |_, body| json(body).map(Verb::PutLogger),
    },
    Route {
        method: Method::Put,
        path: "/metrics",
        summary: "Sets where metrics go; once.",
        body: Some("MetricsConfig"),
        answer: AnswerShape::Empty,
        kinds: &[VerbKind::PutMetrics],
        parse: |_, body| json(body).map(Verb::PutMetrics),
    },
    Route {
        method: Method::Get,
        path: "/metrics",
        summary: "Tells the metrics, for Prometheus. (Not in Firecracker.)",
        body: None,
        answer: AnswerShape::Text(Content::Prometheus),
        kinds: &[VerbKind::GetMetrics],
        parse: |_, _| Ok(Verb::GetMetrics),
    },
    Route {
        method: Method::Put,
        path: "/actions",
        summary: "Starts the machine, writes the metrics, or presses Ctrl+Alt+Del.",
        body: Some("InstanceActionInfo"),
        answer: AnswerShape::Empty,
        kinds: &[VerbKind::Start, VerbKind::FlushMetrics, VerbKind::SendCtrlAltDel],
        parse: |_, body| {
            json(body).map(|info: InstanceActionInfo| match info.action_type {
                Action::InstanceStart => Verb::Start,
                Action::FlushMetrics => Verb::FlushMetrics,
                Action::SendCtrlAltDel => Verb::SendCtrlAltDel,
            })
        },
    },
    Route {
        method: Method::Patch,
        path: "/vm",
        summary: "Pauses or resumes the machine.",
        body: Some("Vm"),
        answer: AnswerShape::Empty,
        kinds: &[VerbKind::Pause, VerbKind::Resume],
        parse: |_, body| {
            json(body).map(|vm: Vm| match vm.state {
                VmState::Paused => Verb::Pause,
                VmState::Resumed => Verb::Resume,
            })
        },
    },
    Route {
        method: Method::Get,
        path: "/vm/config",
        summary: "Tells the whole configuration.",
        body: None,
        answer: AnswerShape::Json("FullConfig"),
        kinds: &[VerbKind::GetConfig],
        parse: |_, _| Ok(Verb::GetConfig),
    },
    Route {
        method: Method::Put,
        path: "/snapshot/create",
        summary: "Makes a snapshot of the paused machine.",
        body: Some("SnapshotCreate"),
        answer: AnswerShape::Empty,
        kinds: &[VerbKind::CreateSnapshot],
        parse: |_, body| json(body).map(Verb::CreateSnapshot),
    },
    Route {
        method: Method::Put,
        path: "/snapshot/load",
        summary: "Goes on from a snapshot, in place of a start.",
        body: Some("SnapshotLoad"),
        answer: AnswerShape::Empty,
        kinds: &[VerbKind::LoadSnapshot],
        parse: |_, body| json(body).map(|load| Verb::LoadSnapshot(Box::new(load))),
    },
    Route {
        method: Method::Get,
        path: "/snapshot",
        summary: "Tells how far the snapshot is that is being made or loaded. (Not in Firecracker.)",
        body: None,
        answer: AnswerShape::Json("SnapshotProgress"),
        kinds: &[VerbKind::GetSnapshot],
        parse: |_, _| Ok(Verb::GetSnapshot),
    },
    Route {
        method: Method::Patch,
        path: "/snapshot",
        summary: "Gives up the snapshot that is being made; nothing of it is left. (Not in Firecracker.)",
        body: Some("SnapshotPatch"),
        answer: AnswerShape::Empty,
        kinds: &[VerbKind::CancelSnapshot],
        parse: |_, body| {
            json(body).map(|patch: SnapshotPatch| match patch.state {
                SnapshotWish::Cancelled => Verb::CancelSnapshot,
            })
        },
    },
    Route {
        method: Method::Put,
        path: "/migration/send",
        summary: "Sends the machine to a receiver while its guest runs; answers when it runs there, and then this process ends.",
        body: Some("MigrationSend"),
        answer: AnswerShape::Empty,
        kinds: &[VerbKind::SendMigration],
        parse: |_, body| json(body).map(Box::new).map(Verb::SendMigration),
    },
    Route {
        method: Method::Put,
        path: "/migration/receive",
        summary: "Takes a machine from a sender; answers when its guest runs here.",
        body: Some("MigrationReceive"),
        answer: AnswerShape::Empty,
        kinds: &[VerbKind::ReceiveMigration],
        parse: |_, body| json(body).map(Box::new).map(Verb::ReceiveMigration),
    },
    Route {
        method: Method::Get,
        path: "/migration",
        summary: "Tells how far a migration is.",
        body: None,
        answer: AnswerShape::Json("MigrationStatus"),
        kinds: &[VerbKind::GetMigration],
        parse: |_, _| Ok(Verb::GetMigration),
    },
    Route {
        method: Method::Get,
        path: "/migration/events",
        summary: "Tells how far a migration is whenever that changes, until it has ended.",
        body: None,
        answer: AnswerShape::Lines("MigrationStatus"),
        kinds: &[VerbKind::WatchMigration],
        parse: |_, _| Ok(Verb::WatchMigration),
    },
    Route {
        method: Method::Delete,
        path: "/migration",
        summary: "Gives the migration up, as long as the leases are not on their way.",
        body: None,
        answer: AnswerShape::Empty,
        kinds: &[VerbKind::CancelMigration],
        parse: |_, _| Ok(Verb::CancelMigration),
    },
    Route {
        method: Method::Put,
        path: "/migration/recover",
        summary: "Has the two sides of a migration whose guest runs before its memory is there find each other by another way.",
        body: Some("MigrationRecover"),
        answer: AnswerShape::Empty,
        kinds: &[VerbKind::RecoverMigration],
        parse: |_, body| json(body).map(Box::new).map(Verb::RecoverMigration),
    },
];

/// What Firecracker has at a path that is not built into this version: first part of the path, and
/// what is missing.
pub static NOT_BUILT: &[(&str, &str)] = &[
    ("network-interfaces", "network interfaces"),
    ("vsock", "the vsock device"),
    ("mmds", "the metadata service (MMDS)"),
    ("balloon", "the balloon device"),
    ("pmem", "pmem devices"),
    ("hotplug", "memory hotplug"),
];

fn patch_machine_config(_: &str, body: &[u8]) -> Result<Verb, Fault> {
    let patch: MachineConfigPatch = json(body)?;
    if patch == MachineConfigPatch::default() {
        return Err(Fault::bad_request("Empty PATCH request."));
    }
    Ok(Verb::PatchMachineConfig(patch))
}

fn put_drive(id: &str, body: &[u8]) -> Result<Verb, Fault> {
    let drive: DriveConfig = json(body)?;
    same_id(id, &drive.drive_id)?;
    Ok(Verb::PutDrive(drive))
}

fn patch_drive(id: &str, body: &[u8]) -> Result<Verb, Fault> {
    let drive: PartialDrive = json(body)?;
    same_id(id, &drive.drive_id)?;
    Ok(Verb::PatchDrive(drive))
}

fn group(id: &str, body: &[u8]) -> Result<RateLimiterGroup, Fault> {
    let group: RateLimiterGroup = json(body)?;
    same_id(id, &group.group_id)?;
    Ok(group)
}

fn same_id(in_path: &str, in_body: &str) -> Result<(), Fault> {
    if in_path == in_body {
        return Ok(());
    }
    Err(Fault::bad_request(
        "The id from the path does not match the id from the body!",
    ))
}

fn json<T: DeserializeOwned>(body: &[u8]) -> Result<T, Fault> {
    // serde would also take a JSON array, with the fields by position.
    let parsed = match body.trim_ascii_start() {
        [b'[', ..] => Err(serde::de::Error::custom(
            "invalid type: an array, expected an object",
        )),
        _ => serde_json::from_slice(body),
    };
    parsed.map_err(|error: serde_json::Error| {
        Fault::bad_request(format!(
            "An error occurred when deserializing the json body of a request: {error}."
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE: &str = "The requested operation is not supported before starting the microVM.";
    const RUNNING: &str =
        "Create snapshot error: the microVM runs: pause it first (PATCH /vm with state `Paused`).";
    const STANDS: &str = "Migration error: the microVM stands still: let it run first (PATCH /vm with state `Resumed`, \
                          `coraclectl resume`).";
    const AFTER: &str = "The requested operation is not supported after starting the microVM.";

    #[test]
    fn what_is_under_way_holds_up_changes_only_and_says_what_it_is() {
        use VerbKind as V;
        for underway in Underway::ALL {
            for kind in ROUTES.iter().flat_map(|route| route.kinds) {
                let name = format!("{kind:?}");
                let looks = name.starts_with("Get")
                    || name.starts_with("Watch")
                    || matches!(
                        kind,
                        V::FlushMetrics
                            | V::SendCtrlAltDel
                            | V::CancelSnapshot
                            | V::CancelMigration
                            | V::RecoverMigration
                    );
                assert_eq!(permitted_meanwhile(underway, *kind).is_ok(), looks, "{kind:?}");
            }
        }
        let refused = permitted_meanwhile(Underway::Pause, V::Resume).expect_err("it would go on");
        assert!(
            refused.message.starts_with("a pause is under way"),
            "{}",
            refused.message
        );
    }

    #[test]
    fn each_verb_is_allowed_in_its_phases_only() {
        use VerbKind as V;
        let always = [
            V::GetInstance,
            V::GetVersion,
            V::GetMachineConfig,
            V::GetConfig,
            V::GetMetrics,
            V::GetSnapshot,
            V::CancelSnapshot,
            V::GetMigration,
            V::WatchMigration,
            V::CancelMigration,
            V::RecoverMigration,
        ];
        let once_started = [
            V::PatchDrive,
            V::PatchRateLimiterGroup,
            V::FlushMetrics,
            V::SendCtrlAltDel,
            V::Pause,
            V::Resume,
            V::CreateSnapshot,
            V::SendMigration,
        ];
        let mut seen = 0;
        for kind in ROUTES.iter().flat_map(|route| route.kinds) {
            for phase in Phase::ALL {
                let expected = match phase {
                    _ if always.contains(kind) => Ok(()),
                    Phase::Paused if *kind == V::SendMigration => Err(Fault::bad_request(STANDS)),
                    Phase::Running if *kind == V::CreateSnapshot => Err(Fault::bad_request(RUNNING)),
                    Phase::NotStarted if once_started.contains(kind) => Err(Fault::bad_request(BEFORE)),
                    Phase::Running | Phase::Paused if !once_started.contains(kind) => {
                        Err(Fault::bad_request(AFTER))
                    }
                    _ => Ok(()),
                };
                assert_eq!(permitted(phase, *kind), expected, "{kind:?} in {phase:?}");
                seen += 1;
            }
        }
        assert_eq!(
            seen,
            32 * 3,
            "a new verb belongs into this test and into the table"
        );
    }
}
