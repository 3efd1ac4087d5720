//! The table of the API, from which the router, the OpenAPI document and the client come.

use coracle_devices::virtio::balloon::HintingStart;
use coracle_devices::virtio::blk::{DriveConfig, PartialDrive};
use coracle_devices::virtio::net::{NetworkInterfaceConfig, PartialNetworkInterface};
use coracle_devices::virtio::pmem::{PartialPmem, PmemConfig};
use serde::de::DeserializeOwned;

use super::answer::Fault;
use super::http::{Content, Method};
use super::verbs::{Verb, VerbKind};
use crate::config::{
    Action, InstanceActionInfo, MachineConfigPatch, MmdsContents, RateLimiterGroup, SnapshotPatch,
    SnapshotWish, Vm, VmState,
};

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
        summary: "Adds a drive, or replaces the one of that name; while the guest runs, plugs it in.",
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
        method: Method::Delete,
        path: "/drives/{drive_id}",
        summary: "Takes a drive out of a guest that runs and whose driver has let go of it.",
        body: None,
        answer: AnswerShape::Empty,
        kinds: &[VerbKind::DeleteDrive],
        parse: |id, _| Ok(Verb::DeleteDrive(id.to_owned())),
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
        path: "/network-interfaces/{iface_id}",
        summary: "Adds a network interface, or replaces the one of that name.",
        body: Some("NetworkInterfaceConfig"),
        answer: AnswerShape::Empty,
        kinds: &[VerbKind::PutNetworkInterface],
        parse: put_network,
    },
    Route {
        method: Method::Patch,
        path: "/network-interfaces/{iface_id}",
        summary: "Changes the limits of a network interface while the machine is there.",
        body: Some("PartialNetworkInterface"),
        answer: AnswerShape::Empty,
        kinds: &[VerbKind::PatchNetworkInterface],
        parse: patch_network,
    },
    Route {
        method: Method::Delete,
        path: "/network-interfaces/{iface_id}",
        summary: "Takes a network interface out of a guest that runs and whose driver has let go of it.",
        body: None,
        answer: AnswerShape::Empty,
        kinds: &[VerbKind::DeleteNetworkInterface],
        parse: |id, _| Ok(Verb::DeleteNetworkInterface(id.to_owned())),
    },
    Route {
        method: Method::Put,
        path: "/mmds/config",
        summary: "Lets the guest ask for its metadata.",
        body: Some("MmdsConfig"),
        answer: AnswerShape::Empty,
        kinds: &[VerbKind::PutMmdsConfig],
        parse: |_, body| json(body).map(Verb::PutMmdsConfig),
    },
    Route {
        method: Method::Put,
        path: "/mmds",
        summary: "Replaces the metadata.",
        body: Some("MmdsContents"),
        answer: AnswerShape::Empty,
        kinds: &[VerbKind::PutMmds],
        parse: |_, body| any_json(body).map(|MmdsContents(content)| Verb::PutMmds(content)),
    },
    Route {
        method: Method::Patch,
        path: "/mmds",
        summary: "Changes the metadata by a JSON merge patch (RFC 7396).",
        body: Some("MmdsContents"),
        answer: AnswerShape::Empty,
        kinds: &[VerbKind::PatchMmds],
        parse: |_, body| any_json(body).map(|MmdsContents(patch)| Verb::PatchMmds(patch)),
    },
    Route {
        method: Method::Get,
        path: "/mmds",
        summary: "Tells the metadata.",
        body: None,
        answer: AnswerShape::Json("MmdsContents"),
        kinds: &[VerbKind::GetMmds],
        parse: |_, _| Ok(Verb::GetMmds),
    },
    Route {
        method: Method::Put,
        path: "/vsock",
        summary: "Sets the socket device.",
        body: Some("VsockConfig"),
        answer: AnswerShape::Empty,
        kinds: &[VerbKind::PutVsock],
        parse: |_, body| json(body).map(Verb::PutVsock),
    },
    Route {
        method: Method::Put,
        path: "/hotplug/memory",
        summary: "Sets the memory that may come while the guest runs.",
        body: Some("MemoryHotplugConfig"),
        answer: AnswerShape::Empty,
        kinds: &[VerbKind::PutMemoryHotplug],
        parse: |_, body| json(body).map(Verb::PutMemoryHotplug),
    },
    Route {
        method: Method::Patch,
        path: "/hotplug/memory",
        summary: "Has the guest plug memory, or unplug it, until it has as much as is requested.",
        body: Some("MemoryHotplugSizeUpdate"),
        answer: AnswerShape::Empty,
        kinds: &[VerbKind::PatchMemoryHotplug],
        parse: |_, body| json(body).map(Verb::PatchMemoryHotplug),
    },
    Route {
        method: Method::Get,
        path: "/hotplug/memory",
        summary: "Tells how much memory the guest has plugged.",
        body: None,
        answer: AnswerShape::Json("MemoryHotplugStatus"),
        kinds: &[VerbKind::GetMemoryHotplug],
        parse: |_, _| Ok(Verb::GetMemoryHotplug),
    },
    Route {
        method: Method::Put,
        path: "/balloon",
        summary: "Sets the balloon.",
        body: Some("BalloonConfig"),
        answer: AnswerShape::Empty,
        kinds: &[VerbKind::PutBalloon],
        parse: |_, body| json(body).map(Verb::PutBalloon),
    },
    Route {
        method: Method::Patch,
        path: "/balloon",
        summary: "Changes how much memory the guest is to give back.",
        body: Some("BalloonPatch"),
        answer: AnswerShape::Empty,
        kinds: &[VerbKind::PatchBalloon],
        parse: |_, body| json(body).map(Verb::PatchBalloon),
    },
    Route {
        method: Method::Get,
        path: "/balloon",
        summary: "Tells the balloon.",
        body: None,
        answer: AnswerShape::Json("BalloonConfig"),
        kinds: &[VerbKind::GetBalloon],
        parse: |_, _| Ok(Verb::GetBalloon),
    },
    Route {
        method: Method::Get,
        path: "/balloon/statistics",
        summary: "Tells how large the balloon is, and what the guest says of its memory.",
        body: None,
        answer: AnswerShape::Json("BalloonStatistics"),
        kinds: &[VerbKind::GetBalloonStatistics],
        parse: |_, _| Ok(Verb::GetBalloonStatistics),
    },
    Route {
        method: Method::Patch,
        path: "/balloon/statistics",
        summary: "Changes how often the guest says that.",
        body: Some("StatisticsPatch"),
        answer: AnswerShape::Empty,
        kinds: &[VerbKind::PatchBalloonStatistics],
        parse: |_, body| json(body).map(Verb::PatchBalloonStatistics),
    },
    Route {
        method: Method::Patch,
        path: "/balloon/hinting/start",
        summary: "Has the guest give back all memory that is free.",
        body: Some("HintingStart"),
        answer: AnswerShape::Empty,
        kinds: &[VerbKind::StartHinting],
        parse: |_, body| start_hinting(body).map(Verb::StartHinting),
    },
    Route {
        method: Method::Get,
        path: "/balloon/hinting/status",
        summary: "Tells how far that is.",
        body: None,
        answer: AnswerShape::Json("HintingStatus"),
        kinds: &[VerbKind::GetHintingStatus],
        parse: |_, _| Ok(Verb::GetHintingStatus),
    },
    Route {
        method: Method::Patch,
        path: "/balloon/hinting/stop",
        summary: "Lets the guest use that memory again.",
        body: None,
        answer: AnswerShape::Empty,
        kinds: &[VerbKind::StopHinting],
        parse: |_, _| Ok(Verb::StopHinting),
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
        path: "/pmem/{id}",
        summary: "Adds a file that the guest has as persistent memory, or replaces the one of that name.",
        body: Some("PmemConfig"),
        answer: AnswerShape::Empty,
        kinds: &[VerbKind::PutPmem],
        parse: put_pmem,
    },
    Route {
        method: Method::Patch,
        path: "/pmem/{id}",
        summary: "Changes the limits of a pmem device while the machine is there.",
        body: Some("PartialPmem"),
        answer: AnswerShape::Empty,
        kinds: &[VerbKind::PatchPmem],
        parse: patch_pmem,
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

/// Paths at which a PATCH may come without a body; where the table has none, one that comes all the same is not looked at.
pub static BODY_IS_OPTIONAL: &[&str] = &["/balloon/hinting/start", "/balloon/hinting/stop"];

fn patch_machine_config(_: &str, body: &[u8]) -> Result<Verb, Fault> {
    let patch: MachineConfigPatch = json(body)?;
    if patch == MachineConfigPatch::default() {
        return Err(Fault::bad_request("Empty PATCH request."));
    }
    Ok(Verb::PatchMachineConfig(patch))
}

fn start_hinting(body: &[u8]) -> Result<HintingStart, Fault> {
    if body.is_empty() {
        return Ok(HintingStart::default());
    }
    json(body)
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

fn put_network(id: &str, body: &[u8]) -> Result<Verb, Fault> {
    let network: NetworkInterfaceConfig = json(body)?;
    same_id(id, &network.iface_id)?;
    Ok(Verb::PutNetworkInterface(network))
}

fn patch_network(id: &str, body: &[u8]) -> Result<Verb, Fault> {
    let network: PartialNetworkInterface = json(body)?;
    same_id(id, &network.iface_id)?;
    Ok(Verb::PatchNetworkInterface(network))
}

fn put_pmem(id: &str, body: &[u8]) -> Result<Verb, Fault> {
    let pmem: PmemConfig = json(body)?;
    same_id(id, &pmem.id)?;
    Ok(Verb::PutPmem(pmem))
}

fn patch_pmem(id: &str, body: &[u8]) -> Result<Verb, Fault> {
    let pmem: PartialPmem = json(body)?;
    same_id(id, &pmem.id)?;
    Ok(Verb::PatchPmem(pmem))
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
    match body.trim_ascii_start() {
        [b'[', ..] => Err(unparsed(&serde::de::Error::custom(
            "invalid type: an array, expected an object",
        ))),
        _ => any_json(body),
    }
}

/// What may be an array as well.
fn any_json<T: DeserializeOwned>(body: &[u8]) -> Result<T, Fault> {
    serde_json::from_slice(body).map_err(|error| unparsed(&error))
}

fn unparsed(error: &serde_json::Error) -> Fault {
    Fault::bad_request(format!(
        "An error occurred when deserializing the json body of a request: {error}."
    ))
}
