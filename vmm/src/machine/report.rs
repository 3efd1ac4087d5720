//! What the parts of a machine count, under Firecracker's names.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use coracle_devices::virtio::blk::{BlkMetrics, LatencyAggregate};
use coracle_devices::virtio::rng::EntropyCounts;

use super::Machine;
use crate::kvm::vcpu::VcpuCounters;
use crate::metrics::{Registry, Section};

impl<P> Machine<P> {
    /// Adds what this machine counts to `registry`.
    pub fn register(&self, registry: &mut Registry) {
        for drive in &self.parts.drives {
            let metrics = Arc::clone(drive.control.metrics());
            registry.add_device(
                "block",
                &drive.id,
                Box::new(move |section| block(&metrics, section)),
            );
        }
        if let Some(counts) = self.parts.entropy_counts.clone() {
            registry.add("entropy", Box::new(move |section| entropy(&counts, section)));
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

fn block(metrics: &BlkMetrics, section: &mut Section) {
    for (name, counter) in [
        ("event_fails", &metrics.event_fails),
        ("execute_fails", &metrics.execute_fails),
        ("invalid_reqs_count", &metrics.invalid_reqs_count),
        ("flush_count", &metrics.flush_count),
        ("discard_count", &metrics.discard_count),
        ("queue_event_count", &metrics.queue_event_count),
        ("rate_limiter_event_count", &metrics.rate_limiter_event_count),
        ("update_count", &metrics.update_count),
        ("update_fails", &metrics.update_fails),
        ("read_bytes", &metrics.read_bytes),
        ("write_bytes", &metrics.write_bytes),
        ("read_count", &metrics.read_count),
        ("write_count", &metrics.write_count),
        (
            "rate_limiter_throttled_events",
            &metrics.rate_limiter_throttled_events,
        ),
        ("io_engine_throttled_events", &metrics.io_engine_throttled_events),
    ] {
        section.counter(name, counter.count());
    }
    let times = |of: &LatencyAggregate| [of.min_us(), of.max_us(), of.sum_us()];
    section.latency("read_agg", times(&metrics.read_agg));
    section.latency("write_agg", times(&metrics.write_agg));
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
