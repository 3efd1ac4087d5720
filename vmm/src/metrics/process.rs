//! What the process as a whole tells: its start, its log, its signals.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Registry, Section};
use crate::cli::StartTimes;
use crate::logger;
use crate::signals::StopSignal;

/// The sections of the process, by Firecracker's names; told what happens by the thread `vmm`.
#[derive(Clone, Debug, Default)]
pub struct ProcessReport {
    facts: Arc<Facts>,
}

#[derive(Debug, Default)]
struct Facts {
    startup_us: AtomicU64,
    startup_cpu_us: AtomicU64,
    hangups: AtomicU64,
}

impl ProcessReport {
    /// Remembers how long the process took until now, when its API answers.
    pub fn is_up(&self, times: StartTimes) {
        // As in Firecracker, zero means that the starter did not say when it started the process.
        let (wall_us, cpu_us) = times.elapsed_us();
        self.facts
            .startup_us
            .store(wall_us.unwrap_or(0), Ordering::Relaxed);
        self.facts
            .startup_cpu_us
            .store(cpu_us.unwrap_or(0), Ordering::Relaxed);
    }

    /// Counts `signal`, if it is one that Firecracker counts.
    pub fn stopped_by(&self, signal: StopSignal) {
        if signal == StopSignal::HangUp {
            self.facts.hangups.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Adds the sections to `registry`.
    pub fn register(&self, registry: &mut Registry) {
        let facts = Arc::clone(&self.facts);
        let startup = move |section: &mut Section| {
            section.gauge(
                "process_startup_time_us",
                facts.startup_us.load(Ordering::Relaxed),
            );
            section.gauge(
                "process_startup_time_cpu_us",
                facts.startup_cpu_us.load(Ordering::Relaxed),
            );
        };
        registry.add("api_server", Box::new(startup));
        let missed_metrics = Arc::clone(&registry.missed);
        let log = move |section: &mut Section| {
            section.counter("missed_metrics_count", missed_metrics.load(Ordering::Relaxed));
            section.counter("missed_log_count", logger::missed_lines());
            section.counter("rate_limited_log_count", logger::suppressed_lines());
        };
        registry.add("logger", Box::new(log));
        let facts = Arc::clone(&self.facts);
        let signals = move |section: &mut Section| {
            section.gauge("sighup", facts.hangups.load(Ordering::Relaxed));
        };
        registry.add("signals", Box::new(signals));
    }
}
