//! Metrics as text: a line of JSON, or what Prometheus reads.

use std::fmt::Write as _;
use std::time::Duration;

use coracle_storage::metrics::LatencyHistogram;
use serde::Serialize;
use serde_json::{Map, Value as Json};

use super::{Section, Value};

/// One line of JSON in the making.
pub(super) struct JsonLine {
    text: String,
}

impl JsonLine {
    pub(super) fn new(since_epoch: Duration) -> Self {
        Self {
            text: format!("{{\"utc_timestamp_ms\":{}", since_epoch.as_millis()),
        }
    }

    pub(super) fn field(&mut self, name: &str, value: &impl Serialize) {
        let (name, value) = (json(&name), json(value));
        write!(self.text, ",{name}:{value}").expect("writing to a String cannot fail");
    }

    /// Adds a section; `since_last` turns the total of a counter, by its name and its place among several of that name, into
    /// what a line tells of it.
    pub(super) fn section(
        &mut self,
        name: &str,
        section: &Section,
        since_last: impl Fn(&'static str, usize, u64) -> u64,
    ) {
        let mut fields = Map::new();
        for (metric, value) in &section.values {
            let value = match *value {
                Value::Counter(total) => since_last(metric, 0, total).into(),
                Value::Gauge(value) => value.into(),
                Value::Latency {
                    min_us,
                    max_us,
                    sum_us,
                } => {
                    let sum_us = since_last(metric, 0, sum_us);
                    serde_json::json!({"min_us": min_us, "max_us": max_us, "sum_us": sum_us})
                }
                Value::Histogram { counts, sum_us } => {
                    let below: Map<String, Json> = counts
                        .iter()
                        .enumerate()
                        .map(|(at, total)| (bound(at), since_last(metric, at + 1, *total).into()))
                        .collect();
                    let sum_us = since_last(metric, 0, sum_us);
                    serde_json::json!({"count_below_us": below, "sum_us": sum_us})
                }
            };
            fields.insert((*metric).to_owned(), value);
        }
        self.field(name, &Json::Object(fields));
    }

    pub(super) fn finish(self) -> String {
        self.text + "}\n"
    }
}

/// The upper end of the durations of kind `at`, in microseconds.
fn bound(at: usize) -> String {
    LatencyHistogram::bound_us(at).map_or("+Inf".to_owned(), |bound_us| bound_us.to_string())
}

fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("strings, numbers and maps of them have a JSON form")
}

/// The lines of one histogram: of each bound, how many there were up to it.
fn histogram(name: &str, device: Option<&str>, counts: &[u64], sum_us: u64) -> String {
    let id = device.map_or(String::new(), |device| format!("id=\"{device}\","));
    let label = device.map_or(String::new(), |device| format!("{{id=\"{device}\"}}"));
    let mut lines = String::new();
    let mut up_to = 0_u64;
    for (at, count) in counts.iter().enumerate() {
        up_to = up_to.wrapping_add(*count);
        lines += &format!("{name}_bucket{{{id}le=\"{}\"}} {up_to}\n", bound(at));
    }
    lines + &format!("{name}_sum{label} {sum_us}\n{name}_count{label} {up_to}\n")
}

/// Totals as Prometheus reads them. All lines of a metric stand together, as the format wants it.
pub(super) fn prometheus<'a>(
    sections: impl Iterator<Item = (&'static str, Option<&'a str>, Section)>,
) -> String {
    let mut metrics = Vec::<(String, &'static str, String)>::new();
    let mut put_lines = |name: String, kind: &'static str, lines: String| match metrics
        .iter_mut()
        .find(|(other, ..)| *other == name)
    {
        Some((_, _, others)) => others.push_str(&lines),
        None => metrics.push((name, kind, lines)),
    };
    for (section_name, device, section) in sections {
        // A device's name has only letters, digits and underscores: nothing to escape.
        let label = device.map_or(String::new(), |device| format!("{{id=\"{device}\"}}"));
        for (metric, value) in &section.values {
            let name = format!("coracle_{section_name}_{metric}");
            let mut put = |name: String, kind: &'static str, label: &str, value: u64| {
                let line = format!("{name}{label} {value}\n");
                put_lines(name, kind, line);
            };
            match *value {
                Value::Counter(total) => put(format!("{name}_total"), "counter", &label, total),
                Value::Gauge(value) => put(name, "gauge", &label, value),
                Value::Latency {
                    min_us,
                    max_us,
                    sum_us,
                } => {
                    put(format!("{name}_min_us"), "gauge", &label, min_us);
                    put(format!("{name}_max_us"), "gauge", &label, max_us);
                    put(format!("{name}_sum_us_total"), "counter", &label, sum_us);
                }
                Value::Histogram { counts, sum_us } => {
                    let lines = histogram(&format!("{name}_us"), device, &counts, sum_us);
                    put_lines(format!("{name}_us"), "histogram", lines);
                }
            }
        }
    }
    let text = |(name, kind, lines): (String, &str, String)| format!("# TYPE {name} {kind}\n{lines}");
    metrics.into_iter().map(text).collect()
}
