//! What the parts of a machine count, under Firecracker's names.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use coracle_devices::mmds::Mmds;
use coracle_devices::virtio::balloon::BalloonCounts;
use coracle_devices::virtio::blk::{BlkControl, BlkMetrics, LatencyAggregate};
use coracle_devices::virtio::mem::{MemCounts, OfRequest};
use coracle_devices::virtio::net::NetCounts;
use coracle_devices::virtio::pmem::PmemCounts;
use coracle_devices::virtio::rng::EntropyCounts;
use coracle_devices::virtio::vsock::VsockCounts;
use coracle_storage::metrics::{Counter, SessionMetrics};

use super::plug::Plugged;
use super::{DriveSlot, Machine, NetworkSlot, Running};
use crate::kvm::vcpu::VcpuCounters;
use crate::metrics::{Registry, Section};

impl<P> Machine<P> {
    /// Adds what this machine counts to `registry`.
    pub fn register(&self, registry: &mut Registry) {
        for drive in &self.parts.drives {
            register_drive(drive, registry);
        }
        for network in &self.parts.networks {
            register_network(network, registry);
        }
        if let Some(counts) = self.parts.vsock_counts.clone() {
            registry.add("vsock", Box::new(move |section| vsock(&counts, section)));
        }
        if let Some(control) = &self.parts.balloon {
            let counts = Arc::clone(control.counts());
            registry.add("balloon", Box::new(move |section| balloon(&counts, section)));
        }
        if let Some(control) = &self.parts.memory_hotplug {
            let counts = Arc::clone(control.counts());
            registry.add(
                "memory_hotplug",
                Box::new(move |section| memory_hotplug(&counts, section)),
            );
        }
        if let Some(counts) = self.parts.entropy_counts.clone() {
            registry.add("entropy", Box::new(move |section| entropy(&counts, section)));
        }
        for slot in &self.parts.pmem {
            let counts = Arc::clone(slot.control.counts());
            registry.add_device("pmem", &slot.id, Box::new(move |section| pmem(&counts, section)));
        }
        let counters = Arc::clone(&self.parts.counters);
        registry.add("vcpu", Box::new(move |section| vcpu(&counters, section)));
        self.register_serial(registry);
        self.register_keyboard(registry);
    }

    fn register_keyboard(&self, registry: &mut Registry) {
        let keyboard = self
            .parts
            .keyboard
            .lock()
            .expect("no holder of the keyboard panics");
        let counts = Arc::clone(keyboard.counts());
        let report = move |section: &mut Section| {
            section.counter("read_count", loaded(&counts.reads));
            section.counter("write_count", loaded(&counts.writes));
            section.counter("missed_read_count", loaded(&counts.missed_reads));
            section.counter("missed_write_count", loaded(&counts.missed_writes));
            section.counter("reset_count", loaded(&counts.resets));
        };
        registry.add("i8042", Box::new(report));
    }

    fn register_serial(&self, registry: &mut Registry) {
        let port = self
            .parts
            .serial
            .lock()
            .expect("no holder of the serial port panics");
        let (counts, output) = (Arc::clone(port.counts()), Arc::clone(port.output().counts()));
        let report = move |section: &mut Section| {
            section.counter("read_count", loaded(&counts.reads));
            section.counter("write_count", loaded(&counts.writes));
            section.counter("missed_write_count", loaded(&counts.missed));
            section.counter("written_bytes", loaded(&output.written_bytes));
            section.counter("lost_bytes", loaded(&output.lost_bytes));
            section.counter("rate_limiter_dropped_bytes", loaded(&output.limited_bytes));
        };
        registry.add("uart", Box::new(report));
    }
}

impl Machine<Running> {
    /// Adds what the device that has come last counts, a drive or a network interface, to `registry`.
    pub fn register_last(&self, kind: Plugged, registry: &mut Registry) {
        match kind {
            Plugged::Drive => self
                .parts
                .drives
                .last()
                .map(|drive| register_drive(drive, registry)),
            Plugged::Network => self
                .parts
                .networks
                .last()
                .map(|network| register_network(network, registry)),
        };
    }
}

fn register_drive(drive: &DriveSlot, registry: &mut Registry) {
    let control = drive.control.clone();
    let report = move |section: &mut Section| drive_of(&control, section);
    registry.add_device(Plugged::Drive.section(), &drive.id, Box::new(report));
}

fn register_network(network: &NetworkSlot, registry: &mut Registry) {
    let counts = Arc::clone(network.control.counts());
    let report = move |section: &mut Section| net(&counts, section);
    registry.add_device(Plugged::Network.section(), &network.id, Box::new(report));
}

/// One of the counters of a worker.
type CounterOf = fn(&BlkMetrics) -> &Counter;

/// What a drive counts.
fn drive_of(control: &BlkControl, section: &mut Section) {
    block(control.metrics(), section);
    section.gauge("lost", control.loss().reason().is_some().into());
    if let Some(metrics) = control.session() {
        session(&metrics, section);
    }
}

/// What the session of an image of a network counts.
fn session(metrics: &SessionMetrics, section: &mut Section) {
    section.counter("session_reconnects", metrics.reconnects.count());
    section.counter("session_retries", metrics.retries.count());
    section.gauge("session_outstanding", metrics.outstanding.value());
    section.histogram(
        "session_latency",
        metrics.latency.counts(),
        metrics.latency.sum_us(),
    );
    section.gauge("lease_state", metrics.lease_state().into());
    section.gauge("lease_epoch", metrics.lease_epoch.value());
}

/// What the workers of one disk count, added up.
fn block(workers: &[Arc<BlkMetrics>], section: &mut Section) {
    let counters: [(&str, CounterOf); 15] = [
        ("event_fails", |worker| &worker.event_fails),
        ("execute_fails", |worker| &worker.execute_fails),
        ("invalid_reqs_count", |worker| &worker.invalid_reqs_count),
        ("flush_count", |worker| &worker.flush_count),
        ("discard_count", |worker| &worker.discard_count),
        ("queue_event_count", |worker| &worker.queue_event_count),
        ("rate_limiter_event_count", |worker| {
            &worker.rate_limiter_event_count
        }),
        ("update_count", |worker| &worker.update_count),
        ("update_fails", |worker| &worker.update_fails),
        ("read_bytes", |worker| &worker.read_bytes),
        ("write_bytes", |worker| &worker.write_bytes),
        ("read_count", |worker| &worker.read_count),
        ("write_count", |worker| &worker.write_count),
        ("rate_limiter_throttled_events", |worker| {
            &worker.rate_limiter_throttled_events
        }),
        ("io_engine_throttled_events", |worker| {
            &worker.io_engine_throttled_events
        }),
    ];
    for (name, counter) in counters {
        section.counter(name, workers.iter().map(|worker| counter(worker).count()).sum());
    }
    section.latency("read_agg", times(workers, |worker| &worker.read_agg));
    section.latency("write_agg", times(workers, |worker| &worker.write_agg));
}

/// The shortest, the longest and the sum of what all workers took.
fn times(workers: &[Arc<BlkMetrics>], of: fn(&BlkMetrics) -> &LatencyAggregate) -> [u64; 3] {
    let taken = || workers.iter().map(|worker| of(worker));
    [
        taken().filter_map(LatencyAggregate::min_us).min().unwrap_or(0),
        taken().map(LatencyAggregate::max_us).max().unwrap_or(0),
        taken().map(LatencyAggregate::sum_us).sum(),
    ]
}

/// What a network interface counts.
fn net(counts: &NetCounts, section: &mut Section) {
    for (name, counter) in [
        ("rx_packets_count", &counts.rx_frames),
        ("rx_count", &counts.rx_frames),
        ("rx_bytes_count", &counts.rx_bytes),
        ("rx_fails", &counts.rx_dropped),
        ("tap_read_fails", &counts.rx_fails),
        ("rx_rate_limiter_throttled", &counts.rx_throttled),
        ("rx_malformed_buffers", &counts.rx_guest_faults),
        ("tx_packets_count", &counts.tx_frames),
        ("tx_count", &counts.tx_frames),
        ("tx_bytes_count", &counts.tx_bytes),
        ("tap_write_fails", &counts.tx_dropped),
        ("tx_rate_limiter_throttled", &counts.tx_throttled),
        ("tx_malformed_frames", &counts.tx_guest_faults),
    ] {
        section.counter(name, loaded(counter));
    }
}

/// Has `registry` tell what guests have asked the metadata service.
pub fn metadata(mmds: &Arc<Mmds>, registry: &mut Registry) {
    let mmds = Arc::clone(mmds);
    let report = move |section: &mut Section| {
        let counts = mmds.counts();
        for (name, counter) in [
            ("rx_accepted", &counts.rx_frames),
            ("rx_accepted_err", &counts.rx_dropped),
            ("rx_count", &counts.requests),
            ("rx_invalid_token", &counts.invalid_tokens),
            ("rx_no_token", &counts.no_tokens),
            ("tx_count", &counts.tx_frames),
            ("tx_frames", &counts.tx_frames),
            ("tx_bytes", &counts.tx_bytes),
            ("connections_created", &counts.opened),
            ("connections_destroyed", &counts.closed),
        ] {
            section.counter(name, loaded(counter));
        }
    };
    registry.add("mmds", Box::new(report));
}

/// What the socket device counts.
fn vsock(counts: &VsockCounts, section: &mut Section) {
    for (name, counter) in [
        ("rx_packets_count", &counts.rx_packets),
        ("rx_bytes_count", &counts.rx_bytes),
        ("rx_read_fails", &counts.rx_read_fails),
        ("rx_malformed_buffers", &counts.rx_guest_faults),
        ("tx_packets_count", &counts.tx_packets),
        ("tx_bytes_count", &counts.tx_bytes),
        ("tx_write_fails", &counts.tx_write_fails),
        ("tx_flush_fails", &counts.tx_flush_fails),
        ("tx_malformed_packets", &counts.tx_guest_faults),
        ("conns_added", &counts.conns_added),
        ("conns_removed", &counts.conns_removed),
        ("conns_killed", &counts.conns_killed),
    ] {
        section.counter(name, loaded(counter));
    }
}

/// What the balloon counts; `inflate_bytes` is not in Firecracker.
fn balloon(counts: &BalloonCounts, section: &mut Section) {
    for (name, counter) in [
        ("inflate_count", &counts.inflations),
        ("inflate_bytes", &counts.inflated_bytes),
        ("deflate_count", &counts.deflations),
        ("stats_updates_count", &counts.statistics),
        ("stats_update_fails", &counts.statistics_unknown),
        ("free_page_report_count", &counts.reports),
        ("free_page_report_freed", &counts.reported_bytes),
        ("free_page_report_fails", &counts.report_fails),
        ("free_page_hint_count", &counts.hints),
        ("free_page_hint_freed", &counts.hinted_bytes),
        ("free_page_hint_fails", &counts.hint_fails),
        ("event_fails", &counts.guest_faults),
    ] {
        section.counter(name, loaded(counter));
    }
}

/// What persistent memory counts; `flush_count` and `flush_fails` are not in Firecracker.
fn pmem(counts: &PmemCounts, section: &mut Section) {
    for (name, counter) in [
        ("queue_event_count", &counts.queue_events),
        ("flush_count", &counts.flushes),
        ("flush_fails", &counts.flush_fails),
        ("event_fails", &counts.guest_faults),
        ("rate_limiter_throttled_events", &counts.throttled),
        ("rate_limiter_event_count", &counts.refilled),
    ] {
        section.counter(name, loaded(counter));
    }
}

/// What memory that comes and goes counts.
fn memory_hotplug(counts: &MemCounts, section: &mut Section) {
    section.counter("queue_event_count", loaded(&counts.requests));
    section.counter("queue_event_fails", loaded(&counts.guest_faults));
    for (names, of_request) in [
        (["plug_agg", "plug_count", "plug_fails"], &counts.plug),
        (["unplug_agg", "unplug_count", "unplug_fails"], &counts.unplug),
        (
            ["unplug_all_agg", "unplug_all_count", "unplug_all_fails"],
            &counts.unplug_all,
        ),
        (["state_agg", "state_count", "state_fails"], &counts.state),
    ] {
        let [latency, count, fails] = names;
        let OfRequest {
            min_us,
            max_us,
            sum_us,
            ..
        } = of_request;
        section.latency(latency, [min_us, max_us, sum_us].map(loaded));
        section.counter(count, loaded(&of_request.count));
        section.counter(fails, loaded(&of_request.fails));
    }
    section.counter("plug_bytes", loaded(&counts.plug_bytes));
    section.counter("unplug_bytes", loaded(&counts.unplug_bytes));
    section.counter("unplug_discard_fails", loaded(&counts.discard_fails));
}

fn entropy(counts: &EntropyCounts, section: &mut Section) {
    section.counter("entropy_event_count", loaded(&counts.requests));
    section.counter("entropy_bytes", loaded(&counts.bytes));
    section.counter("entropy_event_fails", loaded(&counts.guest_faults));
    section.counter("host_rng_fails", loaded(&counts.host_failures));
    section.counter("entropy_rate_limiter_throttled", loaded(&counts.throttled));
}

fn vcpu(counters: &VcpuCounters, section: &mut Section) {
    section.counter("exit_io_in", loaded(&counters.exit_io_in));
    section.counter("exit_io_out", loaded(&counters.exit_io_out));
    section.counter("exit_mmio_read", loaded(&counters.exit_mmio_read));
    section.counter("exit_mmio_write", loaded(&counters.exit_mmio_write));
    section.counter("failures", loaded(&counters.failures));
}

fn loaded(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}
