//! The verbs of the API, and one policy that says in which phase a verb is allowed.

use coracle_devices::serial::SerialConfig;
use coracle_devices::virtio::balloon::{BalloonConfig, BalloonPatch, HintingStart, StatisticsPatch};
use coracle_devices::virtio::blk::{DriveConfig, PartialDrive};
use coracle_devices::virtio::mem::{MemoryHotplugConfig, MemoryHotplugSizeUpdate};
use coracle_devices::virtio::net::{NetworkInterfaceConfig, PartialNetworkInterface};
use coracle_devices::virtio::pmem::{PartialPmem, PmemConfig};
use coracle_devices::virtio::rng::EntropyConfig;
use coracle_devices::virtio::vsock::VsockConfig;
use serde_json::Value;

pub use super::answer::{Answer, Data, Fault};
use crate::config::{
    BootSource, CpuConfig, LoggerConfig, MachineConfig, MachineConfigPatch, MetricsConfig, MigrationReceive,
    MigrationRecover, MigrationSend, MmdsConfig, Phase, RateLimiterGroup, SnapshotCreate, SnapshotLoad,
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
    /// Take a drive out.
    DeleteDrive(String),
    /// Add or replace a group of drives that share limits.
    PutRateLimiterGroup(RateLimiterGroup),
    /// Change the limits of a group.
    PatchRateLimiterGroup(RateLimiterGroup),
    /// Add or replace a network interface.
    PutNetworkInterface(NetworkInterfaceConfig),
    /// Change the limits of a network interface.
    PatchNetworkInterface(PartialNetworkInterface),
    /// Take a network interface out.
    DeleteNetworkInterface(String),
    /// Let the guest ask for its metadata.
    PutMmdsConfig(MmdsConfig),
    /// Replace the metadata.
    PutMmds(Value),
    /// Change the metadata.
    PatchMmds(Value),
    /// Tell the metadata.
    GetMmds,
    /// Set the socket device.
    PutVsock(VsockConfig),
    /// Set the memory that may come while the guest runs.
    PutMemoryHotplug(MemoryHotplugConfig),
    /// Have the guest have another amount of it.
    PatchMemoryHotplug(MemoryHotplugSizeUpdate),
    /// Tell how much of it the guest has.
    GetMemoryHotplug,
    /// Set the balloon.
    PutBalloon(BalloonConfig),
    /// Change its size.
    PatchBalloon(BalloonPatch),
    /// Tell it.
    GetBalloon,
    /// Tell what the guest says of its memory.
    GetBalloonStatistics,
    /// Change how often it says that.
    PatchBalloonStatistics(StatisticsPatch),
    /// Begin a run of hints.
    StartHinting(HintingStart),
    /// Tell how far it is.
    GetHintingStatus,
    /// End it.
    StopHinting,
    /// Set the entropy device.
    PutEntropy(EntropyConfig),
    /// Add or replace a pmem device.
    PutPmem(PmemConfig),
    /// Change the limits of a pmem device.
    PatchPmem(PartialPmem),
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
    DeleteDrive,
    PutRateLimiterGroup,
    PatchRateLimiterGroup,
    PutNetworkInterface,
    PatchNetworkInterface,
    DeleteNetworkInterface,
    PutMmdsConfig,
    PutMmds,
    PatchMmds,
    GetMmds,
    PutVsock,
    PutMemoryHotplug,
    PatchMemoryHotplug,
    GetMemoryHotplug,
    PutBalloon,
    PatchBalloon,
    GetBalloon,
    GetBalloonStatistics,
    PatchBalloonStatistics,
    StartHinting,
    GetHintingStatus,
    StopHinting,
    PutEntropy,
    PutPmem,
    PatchPmem,
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
            Self::DeleteDrive(_) => VerbKind::DeleteDrive,
            Self::PutRateLimiterGroup(_) => VerbKind::PutRateLimiterGroup,
            Self::PatchRateLimiterGroup(_) => VerbKind::PatchRateLimiterGroup,
            Self::PutNetworkInterface(_) => VerbKind::PutNetworkInterface,
            Self::PatchNetworkInterface(_) => VerbKind::PatchNetworkInterface,
            Self::DeleteNetworkInterface(_) => VerbKind::DeleteNetworkInterface,
            Self::PutMmdsConfig(_) => VerbKind::PutMmdsConfig,
            Self::PutMmds(_) => VerbKind::PutMmds,
            Self::PatchMmds(_) => VerbKind::PatchMmds,
            Self::GetMmds => VerbKind::GetMmds,
            Self::PutVsock(_) => VerbKind::PutVsock,
            Self::PutMemoryHotplug(_) => VerbKind::PutMemoryHotplug,
            Self::PatchMemoryHotplug(_) => VerbKind::PatchMemoryHotplug,
            Self::GetMemoryHotplug => VerbKind::GetMemoryHotplug,
            Self::PutBalloon(_) => VerbKind::PutBalloon,
            Self::PatchBalloon(_) => VerbKind::PatchBalloon,
            Self::GetBalloon => VerbKind::GetBalloon,
            Self::GetBalloonStatistics => VerbKind::GetBalloonStatistics,
            Self::PatchBalloonStatistics(_) => VerbKind::PatchBalloonStatistics,
            Self::StartHinting(_) => VerbKind::StartHinting,
            Self::GetHintingStatus => VerbKind::GetHintingStatus,
            Self::StopHinting => VerbKind::StopHinting,
            Self::PutEntropy(_) => VerbKind::PutEntropy,
            Self::PutPmem(_) => VerbKind::PutPmem,
            Self::PatchPmem(_) => VerbKind::PatchPmem,
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
            Self::PutVsock(vsock) => vsock.vsock_id.is_some(),
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
        (
            Phase::Paused,
            VerbKind::PutDrive
            | VerbKind::DeleteDrive
            | VerbKind::PutNetworkInterface
            | VerbKind::DeleteNetworkInterface,
        ) => Err(Fault::bad_request(
            "Hot-plug error: devices come and go while the guest runs: let it run first (PATCH /vm with state `Resumed`).",
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
        | V::PutDrive
        | V::PutNetworkInterface
        | V::GetConfig
        | V::GetMetrics
        | V::PutMmds
        | V::PatchMmds
        | V::GetMmds
        | V::GetBalloon
        | V::PatchBalloon
        | V::PatchBalloonStatistics
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
        | V::PutRateLimiterGroup
        | V::PutMmdsConfig
        | V::PutVsock
        | V::PutBalloon
        | V::PutMemoryHotplug
        | V::PutEntropy
        | V::PutPmem
        | V::PutSerial
        | V::PutLogger
        | V::PutMetrics
        | V::Start
        | V::LoadSnapshot
        | V::ReceiveMigration => Time::BeforeStart,
        V::GetBalloonStatistics
        | V::PatchMemoryHotplug
        | V::GetMemoryHotplug
        | V::StartHinting
        | V::GetHintingStatus
        | V::StopHinting
        | V::PatchDrive
        | V::DeleteDrive
        | V::PatchRateLimiterGroup
        | V::PatchNetworkInterface
        | V::DeleteNetworkInterface
        | V::PatchPmem
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
    /// A device comes or goes.
    Plug,
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
    pub const ALL: [Self; 8] = [
        Self::Start,
        Self::Pause,
        Self::DriveChange,
        Self::Plug,
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
            Self::Plug => "a device that comes or goes",
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
        | V::PutMmds
        | V::PatchMmds
        | V::GetMmds
        | V::GetBalloon
        | V::GetBalloonStatistics
        | V::GetHintingStatus
        | V::GetMemoryHotplug
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
        | V::DeleteDrive
        | V::PutRateLimiterGroup
        | V::PatchRateLimiterGroup
        | V::PutNetworkInterface
        | V::PatchNetworkInterface
        | V::DeleteNetworkInterface
        | V::PutMmdsConfig
        | V::PutVsock
        | V::PutBalloon
        | V::PatchBalloon
        | V::PatchBalloonStatistics
        | V::PutMemoryHotplug
        | V::PatchMemoryHotplug
        | V::StartHinting
        | V::StopHinting
        | V::PutEntropy
        | V::PutPmem
        | V::PatchPmem
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

#[cfg(test)]
mod tests {
    use super::super::routes::ROUTES;
    use super::*;

    const BEFORE: &str = "The requested operation is not supported before starting the microVM.";
    const RUNNING: &str =
        "Create snapshot error: the microVM runs: pause it first (PATCH /vm with state `Paused`).";
    const STANDS: &str = "Migration error: the microVM stands still: let it run first (PATCH /vm with state `Resumed`, \
                          `coraclectl resume`).";
    const STILL: &str = "Hot-plug error: devices come and go while the guest runs: let it run first (PATCH /vm with state \
                         `Resumed`).";
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
                            | V::PutMmds
                            | V::PatchMmds
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
            V::GetMmds,
            V::PutMmds,
            V::PatchMmds,
            V::GetBalloon,
            V::PatchBalloon,
            V::PatchBalloonStatistics,
            V::GetSnapshot,
            V::CancelSnapshot,
            V::GetMigration,
            V::WatchMigration,
            V::CancelMigration,
            V::RecoverMigration,
        ];
        let once_started = [
            V::GetBalloonStatistics,
            V::PatchMemoryHotplug,
            V::GetMemoryHotplug,
            V::StartHinting,
            V::GetHintingStatus,
            V::StopHinting,
            V::PatchDrive,
            V::DeleteDrive,
            V::PatchRateLimiterGroup,
            V::PatchNetworkInterface,
            V::DeleteNetworkInterface,
            V::PatchPmem,
            V::FlushMetrics,
            V::SendCtrlAltDel,
            V::Pause,
            V::Resume,
            V::CreateSnapshot,
            V::SendMigration,
        ];
        let plugged = [
            V::PutDrive,
            V::DeleteDrive,
            V::PutNetworkInterface,
            V::DeleteNetworkInterface,
        ];
        let mut seen = 0;
        for kind in ROUTES.iter().flat_map(|route| route.kinds) {
            for phase in Phase::ALL {
                let expected = match phase {
                    _ if always.contains(kind) => Ok(()),
                    Phase::Paused if plugged.contains(kind) => Err(Fault::bad_request(STILL)),
                    Phase::Paused if *kind == V::SendMigration => Err(Fault::bad_request(STANDS)),
                    Phase::Running if *kind == V::CreateSnapshot => Err(Fault::bad_request(RUNNING)),
                    Phase::NotStarted if once_started.contains(kind) => Err(Fault::bad_request(BEFORE)),
                    Phase::Running | Phase::Paused
                        if !once_started.contains(kind) && !plugged.contains(kind) =>
                    {
                        Err(Fault::bad_request(AFTER))
                    }
                    _ => Ok(()),
                };
                assert_eq!(permitted(phase, *kind), expected, "{kind:?} in {phase:?}");
                seen += 1;
            }
        }
        assert_eq!(seen, 54 * 3, "a new verb belongs here and in the table");
    }
}
