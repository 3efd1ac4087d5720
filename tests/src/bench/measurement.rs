//! One run of one contender: what the guest saw, and what the host paid.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use super::contender::Contender;
use super::series::Series;
use crate::environment::Environment;
use crate::monitor::Monitor;
use crate::process::ThreadTime;
use crate::{Outcome, ensure};

/// What is measured, in the order of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Figure {
    /// Requests a second.
    Iops,
    /// Megabytes (10^6) a second.
    Bandwidth,
    /// Median latency in the guest.
    LatencyMedian,
    /// Latency of the slowest of a thousand requests.
    LatencyTail,
    /// Time of all threads of the monitor but the vCPUs', for each request.
    HostCpu,
    /// The same for each gigabyte (10^9 bytes).
    HostCpuOfGigabyte,
    /// Time of the vCPUs' threads inside the kernel: notifications and exits, but also what the guest itself costs.
    VcpuSystem,
    /// Interrupts that the guest took, for each request.
    Interrupts,
}

/// All figures.
pub const FIGURES: [Figure; 8] = [
    Figure::Iops,
    Figure::Bandwidth,
    Figure::LatencyMedian,
    Figure::LatencyTail,
    Figure::HostCpu,
    Figure::HostCpuOfGigabyte,
    Figure::VcpuSystem,
    Figure::Interrupts,
];

impl Figure {
    /// Its name with its unit, in the results.
    pub fn key(self) -> &'static str {
        match self {
            Self::Iops => "iops",
            Self::Bandwidth => "mb_per_s",
            Self::LatencyMedian => "lat_us_p50",
            Self::LatencyTail => "lat_us_p999",
            Self::HostCpu => "host_cpu_us_per_request",
            Self::HostCpuOfGigabyte => "host_cpu_ms_per_gb",
            Self::VcpuSystem => "vcpu_system_us_per_request",
            Self::Interrupts => "interrupts_per_request",
        }
    }

    /// The head of its column.
    pub fn title(self) -> &'static str {
        match self {
            Self::Iops => "IOPS",
            Self::Bandwidth => "MB/s",
            Self::LatencyMedian => "p50 us",
            Self::LatencyTail => "p99.9 us",
            Self::HostCpu => "host us/req",
            Self::HostCpuOfGigabyte => "host ms/GB",
            Self::VcpuSystem => "vcpu sys us/req",
            Self::Interrupts => "irq/req",
        }
    }

    /// Digits behind the point that mean something.
    pub fn decimals(self) -> usize {
        match self {
            Self::Iops | Self::Bandwidth | Self::HostCpuOfGigabyte => 0,
            Self::LatencyMedian | Self::LatencyTail => 1,
            Self::HostCpu | Self::VcpuSystem | Self::Interrupts => 2,
        }
    }

    /// Whether more of it is better.
    pub fn is_a_rate(self) -> bool {
        matches!(self, Self::Iops | Self::Bandwidth)
    }
}

/// The figures of one contender in all runs of a row.
pub type Results = BTreeMap<Figure, Series>;

/// A load as the guest's `load` verb takes it.
#[derive(Clone, Copy, Debug)]
pub struct Load<'a> {
    /// Mode, block size, depth and the way to wait.
    pub arguments: &'a str,
    /// How long.
    pub milliseconds: u64,
}

/// The guest waits so long between its first word and the load: time to look at the clocks of the threads.
const BEFORE_MS: u64 = 30;
/// And so long between the result and its end.
const AFTER_MS: u64 = 150;
/// What a run may take beyond the load itself.
const PATIENCE: Duration = Duration::from_secs(20);
/// A start has settled then.
const SETTLED_AFTER: Duration = Duration::from_secs(1);

/// Runs a load once and adds its figures to `results`.
///
/// # Errors
///
/// When the monitor refuses the disk, the guest gets a wrong answer, or nothing happens for too long.
pub fn measure(
    contender: &Contender,
    environment: &Environment,
    image: &Path,
    load: Load<'_>,
    results: &mut Results,
) -> Outcome {
    let words = format!(
        "do=hello do=tick:ms={BEFORE_MS},count=1 do=load:{},queues={},ms={} do=tick:ms={AFTER_MS},count=1",
        load.arguments,
        contender.queues(),
        load.milliseconds
    );
    let monitor = contender.start(environment, &words, image)?;
    let observed = observe(&monitor, PATIENCE + Duration::from_millis(load.milliseconds));
    // An orderly end: whatever the monitor keeps beside the image is tidied up.
    let ended = monitor.wait(PATIENCE)?;
    let (line, spent) = observed.map_err(|failure| {
        let failure = failure.message().unwrap_or_default();
        format!("{failure}{}", ended.errors)
    })?;

    let number = |key: &str| number(&line, key);
    ensure!(number("errors")? == 0.0, "the guest got wrong answers: {line}");
    let requests = number("requests")?;
    let is_answered = requests > 0.0;
    ensure!(is_answered, "nothing was answered: {line}");
    for (figure, value) in [
        (Figure::Iops, number("iops")?),
        (Figure::Bandwidth, number("mb_per_s")?),
        (Figure::LatencyMedian, number("lat_us_p50")?),
        (Figure::LatencyTail, number("lat_us_p999")?),
        (Figure::HostCpu, microseconds(spent.others) / requests),
        (Figure::VcpuSystem, microseconds(spent.vcpu_system) / requests),
        (Figure::Interrupts, number("irqs")? / requests),
    ] {
        results.entry(figure).or_default().push(value);
    }
    Ok(())
}

/// What a machine spends besides its vCPUs while its guest leaves the disk alone for so long.
///
/// # Errors
///
/// When it does not start.
pub fn idle_cost(
    contender: &Contender,
    environment: &Environment,
    image: &Path,
    time: Duration,
) -> Outcome<Duration> {
    let whole = time + SETTLED_AFTER + PATIENCE;
    let words = format!("do=capacity do=tick:ms={},count=1", whole.as_millis());
    let monitor = contender.start(environment, &words, image)?;
    monitor.console.wait_for("tick: ", PATIENCE)?;
    std::thread::sleep(SETTLED_AFTER);
    let before = monitor.process().thread_times()?;
    std::thread::sleep(time);
    let after = monitor.process().thread_times()?;
    // An orderly end: a lease that stays would be in the way of the next one.
    monitor.signal(rustix::process::Signal::TERM)?;
    monitor.wait(PATIENCE)?;
    Ok(Spent::between(&before, &after).others)
}

/// The line that the guest prints of its load, and what the monitor used of the processors for it.
fn observe(monitor: &Monitor, limit: Duration) -> Outcome<(String, Spent)> {
    monitor.console.wait_for("hello from", PATIENCE)?;
    let before = monitor.process().thread_times()?;
    let line = monitor.console.wait_for("load: ", limit)?;
    let after = monitor.process().thread_times()?;
    Ok((line, Spent::between(&before, &after)))
}

/// The value of `key` in the line that the guest prints.
pub(super) fn number(line: &str, key: &str) -> Outcome<f64> {
    let value = line
        .split_whitespace()
        .find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
    let value = value.ok_or_else(|| format!("no {key} in the guest's line: {line}"))?;
    Ok(value.parse()?)
}

pub(super) fn microseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// What threads used of the processors meanwhile.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Spent {
    pub(super) others: Duration,
    vcpu_system: Duration,
}

impl Spent {
    /// A thread that was not there before, as a worker of the kernel, has used nothing before.
    pub(super) fn between(before: &[ThreadTime], after: &[ThreadTime]) -> Self {
        let mut spent = Self::default();
        for thread in after {
            let earlier = before.iter().find(|earlier| earlier.id == thread.id);
            let (total, system) = earlier.map_or((Duration::ZERO, Duration::ZERO), |earlier| {
                (earlier.total, earlier.system)
            });
            if is_vcpu(&thread.name) {
                spent.vcpu_system += thread.system.saturating_sub(system);
            } else {
                spent.others += thread.total.saturating_sub(total);
            }
        }
        spent
    }
}

/// `vcpu 0` is ours, `fc_vcpu 0` Firecracker's, `CPU 0/KVM` QEMU's.
fn is_vcpu(name: &str) -> bool {
    name.starts_with("vcpu ") || name.starts_with("fc_vcpu ") || name.ends_with("/KVM")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn thread(id: u32, name: &str, total_ms: u64, system_ms: u64) -> ThreadTime {
        ThreadTime {
            id,
            name: name.to_owned(),
            total: Duration::from_millis(total_ms),
            system: Duration::from_millis(system_ms),
        }
    }

    #[test]
    fn a_vcpu_counts_by_what_it_spends_in_the_kernel_and_every_other_thread_in_full() {
        let before = [thread(1, "coracle", 10, 5), thread(2, "vcpu 0", 100, 20)];
        let after = [
            thread(1, "coracle", 11, 5),
            thread(2, "vcpu 0", 900, 50),
            thread(3, "iou-wrk-1", 7, 7),
        ];
        let spent = Spent::between(&before, &after);
        let expected = (Duration::from_millis(8), Duration::from_millis(30));
        assert_eq!((spent.others, spent.vcpu_system), expected);
    }

    #[test]
    fn a_key_is_not_taken_for_one_that_begins_with_it() {
        let line = "load: lat_us_p999=7.5 lat_us_p99=3.0 errors=0";
        assert_eq!(number(line, "lat_us_p99").ok(), Some(3.0));
        assert!(number(line, "lat_us_p9").is_err());
    }
}
