//! Moving a machine to another process while its guest runs.

use std::num::NonZeroU64;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Overrides;
use crate::migration::tls::TlsFiles;

/// The body of `PUT /migration/send`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MigrationSend {
    /// HOST:PORT of the receiver.
    pub to: String,
    /// The name in the receiver's certificate, if it is not the host of `to`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to_name: Option<String>,
    /// The certificates.
    pub tls: TlsFiles,
    /// How long the guest may stand still for its last pages, in milliseconds. As long as what is left would take longer, memory
    /// is sent while the guest runs.
    #[serde(default = "downtime_ms")]
    pub downtime_ms: u64,
    /// After how long it is given up, in seconds, if the guest still writes faster than memory is sent.
    #[serde(default = "timeout_s")]
    pub timeout_s: u64,
    /// What is done then.
    #[serde(default)]
    pub on_timeout: OnTimeout,
    /// Whether a guest that writes faster than memory is sent is slowed down.
    #[serde(default)]
    pub mode: MigrationMode,
    /// How many bytes per second are sent at most; without it as many as the connection takes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth_limit: Option<NonZeroU64>,
    /// Connections that memory goes by. Each takes about a core at either side while it is busy.
    #[serde(default = "streams")]
    #[schemars(range(min = 1, max = STREAMS_MAX))]
    pub streams: u8,
    /// Whether memory is packed on its way.
    #[serde(default)]
    pub compression: Compression,
    /// Whether the guest may go on at the receiver before all of its memory is there, which is fetched from here
    /// then. This is done
    /// where it writes so fast that all of it would take more than twice as long as its memory takes once, or when `timeout_s` is
    /// over; at least one round goes first. From then on both hosts are needed until the memory is there: if this one dies, the
    /// guest is lost, and boots from its disks.
    #[serde(default)]
    pub allow_postcopy: bool,
    /// How long, in seconds, the receiver may not be reached from then on; then this process ends, and the memory is lost.
    #[serde(default = "postcopy_wait_s")]
    pub postcopy_wait_s: u64,
    /// The drives whose images go along, because the receiver does not reach them: files, block devices or kept overlays of this
    /// host. They are sent while the guest runs, which takes as long as it takes, and become new files there, under the same
    /// paths or those of its `overrides`; only then the time of `timeout_s` begins. What is left behind here is taken up by
    /// nobody by mistake.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub copy_disks: Vec<String>,
}

/// Whether memory is packed on its way. Pages that do not become smaller are sent as they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Compression {
    /// It is not.
    #[default]
    None,
    /// By LZ4.
    Lz4,
    /// By LZ4 as long as that makes it faster, which is measured again and again: it does where the link is slower than a
    /// processor packs.
    Auto,
}

/// Most connections of one migration.
pub const STREAMS_MAX: u8 = 16;

/// What becomes of a migration whose time is over while the guest writes faster than memory is sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum OnTimeout {
    /// It is given up, and the guest runs on where it is.
    #[default]
    Abort,
    /// The guest stands still until the rest is sent, however long that takes.
    Stop,
}

/// How memory is sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum MigrationMode {
    /// While the guest runs. If it writes so fast that the rounds do not become shorter, its vCPUs run for a share of the time,
    /// which is halved, or more, from round to round.
    #[default]
    Auto,
    /// While the guest runs as fast as it can.
    Precopy,
}

/// Longest time that is counted, in seconds: a century, which nobody waits for, and after which a clock can still count.
const SECONDS_MAX: u64 = 100 * 365 * 24 * 3600;

impl MigrationSend {
    /// After how long it is given up. All times that are asked for can be counted from now on.
    pub fn timeout(&self) -> Duration {
        seconds(self.timeout_s)
    }

    /// How long the receiver may not be reached once the guest runs there.
    pub fn postcopy_wait(&self) -> Duration {
        seconds(self.postcopy_wait_s)
    }
}

impl MigrationReceive {
    /// How long the sender may not be reached once the guest runs here.
    pub fn postcopy_wait(&self) -> Duration {
        seconds(self.postcopy_wait_s)
    }
}

fn seconds(asked: u64) -> Duration {
    Duration::from_secs(asked.min(SECONDS_MAX))
}

fn downtime_ms() -> u64 {
    50
}

fn postcopy_wait_s() -> u64 {
    300
}

fn streams() -> u8 {
    1
}

fn timeout_s() -> u64 {
    300
}

/// The body of `PUT /migration/receive`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MigrationReceive {
    /// ADDRESS:PORT to listen at; with port 0 a free one, which `GET /migration` tells.
    pub listen: String,
    /// The name in the sender's certificate; without it any host of the authority may send.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_name: Option<String>,
    /// The only machine that is taken, by its id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
    /// The certificates.
    pub tls: TlsFiles,
    /// What of the machine has another name on this host.
    #[serde(default, skip_serializing_if = "Overrides::is_empty")]
    pub overrides: Overrides,
    /// How long, in seconds, a sender may not be reached that has a part of the memory of a guest that runs here; then the guest
    /// is stopped for good, and can be booted from its disks.
    #[serde(default = "postcopy_wait_s")]
    pub postcopy_wait_s: u64,
}

/// The body of `PUT /migration/recover`: another way between the two sides of a migration whose connection was lost while memory
/// was being fetched.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MigrationRecover {
    /// At the sender: HOST:PORT where the receiver listens now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
    /// At the sender: the name in the receiver's certificate, if it is not the host of `to`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to_name: Option<String>,
    /// At the sender: the certificates, if they are others than before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsFiles>,
    /// At the receiver: ADDRESS:PORT to listen at instead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listen: Option<String>,
}

/// The answer to `GET /migration`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct MigrationStatus {
    /// What is being done.
    pub state: MigrationStage,
    /// Where a receiver listens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listen: Option<String>,
    /// Where a sender has sent the machine whose memory is fetched from it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
    /// Whether the other side is there while memory is fetched.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub is_connected: Option<bool>,
    /// How many times memory was gone through.
    pub rounds: u64,
    /// How much memory was sent or taken, in bytes.
    pub sent_bytes: u64,
    /// What went over the connections for that, in bytes.
    pub wire_bytes: u64,
    /// How much is left of this round, or is still to be fetched, in bytes.
    pub left_bytes: u64,
    /// How much of disks that go along was sent or taken, in bytes, without the holes that they had from the beginning.
    #[serde(default)]
    pub disk_sent_bytes: u64,
    /// How much of disks that go along is left to be sent of this round, in bytes.
    #[serde(default)]
    pub disk_left_bytes: u64,
    /// How fast memory was sent in the last round, in bytes per second.
    pub bytes_per_s: u64,
    /// How long the guest would stand still now, in microseconds, by what is known.
    pub predicted_downtime_us: u64,
    /// How much of the time the guest's vCPUs may run, in thousandths.
    pub vcpu_permille: u32,
}

/// What is being done of a migration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum MigrationStage {
    /// Nothing.
    #[default]
    Idle,
    /// A receiver waits for its sender, or takes memory.
    Receiving,
    /// The guest runs, and its memory is being sent.
    Sending,
    /// The guest stands still for the last pages.
    Stopping,
    /// The disks are on their way: the leases decide.
    HandingOver,
    /// The connection was lost meanwhile, and the leases are asked who has the guest.
    Settling,
    /// The guest runs at the receiver, and the rest of its memory is fetched from the sender.
    PostCopy,
}
