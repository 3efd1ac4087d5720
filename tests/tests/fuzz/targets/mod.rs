//! What is fuzzed: for each parser that hostile bytes reach, a function from bytes to nothing.
//!
//! A target panics when a promise is broken; the fuzzer and the replay notice that, a run that does not end, and
//! one that grows. `make fuzz` searches for such inputs, `make test` replays the known ones.

mod agent;
mod api;
mod boot;
mod configuration;
mod input;
mod iscsi;
mod lease;
mod migration;
mod mmds;
mod nfs;
mod overlay;
mod ports;
mod postcopy;
mod processor;
mod ring;
mod scsi;
mod snapshot;
mod tail;
mod virtio;

use input::Input;

/// One parser, or one device, and the bytes' way into it.
pub(crate) struct Target {
    /// Names it to `make fuzz`, and its corpus.
    pub(crate) name: &'static str,
    /// Takes one input.
    pub(crate) run: fn(&[u8]),
}

/// All targets.
pub(crate) const TARGETS: &[Target] = &[
    Target {
        name: "agent-archive",
        run: agent::run_archive,
    },
    Target {
        name: "agent-frames",
        run: agent::run_frames,
    },
    Target {
        name: "api",
        run: api::run,
    },
    Target {
        name: "boot",
        run: boot::run,
    },
    Target {
        name: "config",
        run: configuration::run,
    },
    Target {
        name: "cpu-template",
        run: processor::run,
    },
    Target {
        name: "iscsi-login",
        run: iscsi::run_login,
    },
    Target {
        name: "iscsi-pdu",
        run: iscsi::run_pdu,
    },
    Target {
        name: "iscsi-text",
        run: iscsi::run_text,
    },
    Target {
        name: "iscsi-url",
        run: iscsi::run_url,
    },
    Target {
        name: "lease-record",
        run: lease::run,
    },
    Target {
        name: "lun-tail",
        run: tail::run,
    },
    Target {
        name: "migration",
        run: migration::run,
    },
    Target {
        name: "mmds-frames",
        run: mmds::run_frames,
    },
    Target {
        name: "mmds-request",
        run: mmds::run_request,
    },
    Target {
        name: "nfs-callback",
        run: nfs::run_callback,
    },
    Target {
        name: "nfs-reply",
        run: nfs::run_reply,
    },
    Target {
        name: "nfs-url",
        run: nfs::run_url,
    },
    Target {
        name: "nfs-v3",
        run: nfs::run_v3,
    },
    Target {
        name: "overlay",
        run: overlay::run,
    },
    Target {
        name: "ports",
        run: ports::run,
    },
    Target {
        name: "postcopy",
        run: postcopy::run,
    },
    Target {
        name: "ring",
        run: ring::run,
    },
    Target {
        name: "scsi-data",
        run: scsi::run,
    },
    Target {
        name: "snapshot-state",
        run: snapshot::run,
    },
    Target {
        name: "virtio-balloon",
        run: virtio::run_balloon,
    },
    Target {
        name: "virtio-blk",
        run: virtio::run_blk,
    },
    Target {
        name: "virtio-mem",
        run: virtio::run_mem,
    },
    Target {
        name: "virtio-mmio",
        run: virtio::run_null,
    },
    Target {
        name: "virtio-net",
        run: virtio::run_net,
    },
    Target {
        name: "virtio-pmem",
        run: virtio::run_pmem,
    },
    Target {
        name: "virtio-rng",
        run: virtio::run_rng,
    },
    Target {
        name: "virtio-vsock",
        run: virtio::run_vsock,
    },
];
