//! Metrics: sections of numbers, written as Firecracker's JSON lines and as Prometheus text.
//!
//! Whoever counts something keeps its own counters, which only grow, and gives the [`Registry`] a
//! function that reports them. A JSON line has what was counted since the line before, as
//! Firecracker's; Prometheus gets the totals.

mod process;
mod requests;
mod text;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use coracle_storage::metrics::LATENCY_BUCKETS;
#[cfg(doc)]
use coracle_storage::metrics::LatencyHistogram;

pub use process::ProcessReport;
pub use requests::RequestCounters;

use crate::config::MetricsConfig;
use crate::line_sink::{LineSink, LineSinkError};

/// How often a line is written besides `FlushMetrics`, in seconds.
pub const WRITE_PERIOD_S: u64 = 60;

/// One number of a section.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    /// What only grows.
    Counter(u64),
    /// What is as it is now.
    Gauge(u64),
    /// The shortest, the longest and the sum of many times.
    Latency {
        /// The shortest, in microseconds; zero before the first.
        min_us: u64,
        /// The longest, in microseconds.
        max_us: u64,
        /// All together, in microseconds.
        sum_us: u64,
    },
    /// How many times there were of each kind (see [`LatencyHistogram`]).
    Histogram {
        /// As many as there were of each.
        counts: [u64; LATENCY_BUCKETS],
        /// All together, in microseconds.
        sum_us: u64,
    },
}

/// The numbers of one part of the monitor, by Firecracker's names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Section {
    values: Vec<(&'static str, Value)>,
}

impl Section {
    /// Reports what only grows.
    pub fn counter(&mut self, name: &'static str, total: u64) {
        self.values.push((name, Value::Counter(total)));
    }

    /// Reports what is as it is now.
    pub fn gauge(&mut self, name: &'static str, value: u64) {
        self.values.push((name, Value::Gauge(value)));
    }

    /// Reports the shortest, the longest and the sum of many times, in microseconds.
    pub fn latency(&mut self, name: &'static str, [min_us, max_us, sum_us]: [u64; 3]) {
        self.values.push((
            name,
            Value::Latency {
                min_us,
                max_us,
                sum_us,
            },
        ));
    }

    /// Reports how many times there were of each kind, and their sum in microseconds.
    pub fn histogram(&mut self, name: &'static str, counts: [u64; LATENCY_BUCKETS], sum_us: u64) {
        self.values.push((name, Value::Histogram { counts, sum_us }));
    }

    /// Adds the numbers of another device of the same kind, which reports the same names.
    fn add(&mut self, other: &Self) {
        for (name, value) in &other.values {
            match self.values.iter_mut().find(|(own, _)| own == name) {
                Some((_, own)) => *own = sum(*own, *value),
                None => self.values.push((name, *value)),
            }
        }
    }
}

fn sum(one: Value, other: Value) -> Value {
    match (one, other) {
        (Value::Counter(one), Value::Counter(other)) => Value::Counter(one.wrapping_add(other)),
        (
            Value::Latency {
                min_us,
                max_us,
                sum_us,
            },
            Value::Latency {
                min_us: other_min_us,
                max_us: other_max_us,
                sum_us: other_sum_us,
            },
        ) => Value::Latency {
            // Zero means that nothing was timed yet.
            min_us: if min_us == 0 || other_min_us == 0 {
                min_us.max(other_min_us)
            } else {
                min_us.min(other_min_us)
            },
            max_us: max_us.max(other_max_us),
            sum_us: sum_us.wrapping_add(other_sum_us),
        },
        (
            Value::Histogram { counts, sum_us },
            Value::Histogram {
                counts: other_counts,
                sum_us: other_sum_us,
            },
        ) => {
            let mut total = counts;
            for (own, other) in total.iter_mut().zip(other_counts) {
                *own = own.wrapping_add(other);
            }
            Value::Histogram {
                counts: total,
                sum_us: sum_us.wrapping_add(other_sum_us),
            }
        }
        (_, other) => other,
    }
}

/// A function that reports the numbers of a section as they are now.
pub type Report = Box<dyn Fn(&mut Section) + Send>;

/// Every source of numbers, and where they are written to.
#[derive(Default)]
pub struct Registry {
    sources: Vec<Source>,
    /// What the counters were at the last line, by section, name, and the place of one among several of that name.
    reported: BTreeMap<(String, &'static str, usize), u64>,
    destination: Option<Destination>,
    missed: Arc<AtomicU64>,
}

struct Source {
    /// Name of the section, or of the kind of device.
    name: &'static str,
    /// Name of the device, if it is one of several.
    device: Option<String>,
    report: Report,
}

impl Source {
    /// Whether it has what devices of this kind have counted that are gone.
    fn is_of_gone(&self, kind: &str) -> bool {
        self.name == kind && self.device.is_none()
    }
}

struct Destination {
    sink: LineSink,
    /// The instance's name, if lines have it.
    id: Option<String>,
    properties: Option<BTreeMap<String, String>>,
}

impl Registry {
    /// Adds a section, reported by `report`.
    pub fn add(&mut self, name: &'static str, report: Report) {
        self.sources.push(Source {
            name,
            device: None,
            report,
        });
    }

    /// Adds the section `kind_device`; the section `kind` has the sum over all devices of the kind.
    pub fn add_device(&mut self, kind: &'static str, device: &str, report: Report) {
        self.sources.push(Source {
            name: kind,
            device: Some(device.to_owned()),
            report,
        });
    }

    /// Takes the section `kind_device` away. What it has counted stays part of the sum over all devices of the kind, which only
    /// grows.
    pub fn remove_device(&mut self, kind: &'static str, device: &str) {
        let is_it = |source: &Source| source.name == kind && source.device.as_deref() == Some(device);
        let Some(at) = self.sources.iter().position(is_it) else {
            return;
        };
        let mut counted = Section::default();
        (self.sources.remove(at).report)(&mut counted);
        counted
            .values
            .retain(|(_, value)| !matches!(value, Value::Gauge(_)));
        if let Some(at) = self.sources.iter().position(|source| source.is_of_gone(kind)) {
            let mut others = Section::default();
            (self.sources.remove(at).report)(&mut others);
            counted.add(&others);
        }
        let report = move |section: &mut Section| section.add(&counted);
        self.add(kind, Box::new(report));
        let name = format!("{kind}_{device}");
        self.reported.retain(|(section, _, _), _| *section != name);
    }

    /// Says where lines go, for the instance `id`.
    ///
    /// # Errors
    ///
    /// The path cannot be written to; then nothing has changed.
    pub fn write_to(&mut self, config: &MetricsConfig, id: &str) -> Result<(), LineSinkError> {
        self.destination = Some(Destination {
            sink: LineSink::open(&config.metrics_path)?,
            id: config.emit_id.then(|| id.to_owned()),
            properties: config.properties.clone(),
        });
        Ok(())
    }

    /// Writes a line, if it was said where; one that is lost is counted, and what it would have told
    /// is in the next one.
    pub fn write(&mut self) {
        let Some(mut destination) = self.destination.take() else {
            return;
        };
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let sections = self.sections();
        let line = self.line(&destination, &sections, since_epoch);
        match destination.sink.append(line.as_bytes()) {
            Ok(()) => self.remember(&sections),
            Err(_) => {
                self.missed.fetch_add(1, Ordering::Relaxed);
            }
        }
        self.destination = Some(destination);
    }

    /// How many lines were lost because there was no room for them.
    pub fn missed_lines(&self) -> u64 {
        self.missed.load(Ordering::Relaxed)
    }

    /// The totals, in the Prometheus text exposition format.
    pub fn prometheus(&self) -> String {
        text::prometheus(self.sources.iter().map(|source| {
            let mut section = Section::default();
            (source.report)(&mut section);
            (source.name, source.device.as_deref(), section)
        }))
    }

    /// Every section by name, those that sum up a kind of device among them.
    fn sections(&self) -> BTreeMap<String, Section> {
        let mut sections = BTreeMap::<String, Section>::new();
        for source in &self.sources {
            let mut section = Section::default();
            (source.report)(&mut section);
            sections.entry(source.name.to_owned()).or_default().add(&section);
            if let Some(device) = &source.device {
                sections.insert(format!("{}_{device}", source.name), section);
            }
        }
        sections
    }

    fn line(
        &self,
        destination: &Destination,
        sections: &BTreeMap<String, Section>,
        since_epoch: Duration,
    ) -> String {
        let mut line = text::JsonLine::new(since_epoch);
        if let Some(id) = &destination.id {
            line.field("id", id);
        }
        if let Some(properties) = &destination.properties {
            line.field("properties", properties);
        }
        for (name, section) in sections {
            line.section(name, section, |metric, place, total| {
                let before = self.reported.get(&(name.clone(), metric, place)).copied();
                total.wrapping_sub(before.unwrap_or(0))
            });
        }
        line.finish()
    }

    fn remember(&mut self, sections: &BTreeMap<String, Section>) {
        for (name, section) in sections {
            for (metric, value) in &section.values {
                let (first, others): (_, &[u64]) = match value {
                    Value::Counter(total) | Value::Latency { sum_us: total, .. } => (total, &[]),
                    Value::Histogram { counts, sum_us } => (sum_us, counts),
                    Value::Gauge(_) => continue,
                };
                for (place, total) in std::iter::once(first).chain(others).enumerate() {
                    self.reported.insert((name.clone(), metric, place), *total);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
