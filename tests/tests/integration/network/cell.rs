//! One cell of the matrix: a guest at a step, a fault, its end, and how soon the guest goes on.

use std::time::{Duration, Instant};

use coracle_tests::case::{Context, Extent};
use coracle_tests::harness::double_start::IMAGE_BYTES;
use coracle_tests::harness::matrix::Cell;
use coracle_tests::harness::oracle::{BLOCK_SECTORS, Oracle, reread_damaged};
use coracle_tests::harness::proxy::{Direction, Fault, Proxy, Step, Then, Trap};
use coracle_tests::monitor::Monitor;
use coracle_tests::seed::Seed;
use coracle_tests::{Outcome, ensure};
use rustix::process::Signal;

use super::Stepped;

/// A guest at work, and all between it and its bytes.
pub(super) struct Scene<S> {
    server: S,
    proxy: Proxy,
    monitor: Monitor,
    oracle: Oracle,
    seed: Seed,
    extent: Extent,
    step: Step,
    /// Whether the work is `stamp`, which says what is safe.
    stamps: bool,
    /// How long the guest may be silent by itself.
    period: Duration,
    _lease: tempfile::TempDir,
}

/// What a guest does while it is at a step. Every verb fails on an error and on a byte that is wrong.
struct Work {
    words: String,
    stamps: bool,
    period: Duration,
}

const DISK_MIB: u64 = 16;
const BLOCKS: u64 = IMAGE_BYTES / 512 / BLOCK_SECTORS;
/// As the issue has it: so soon after the fault is over the guest goes on.
const RESUMES_WITHIN: Duration = Duration::from_secs(2);
/// A session notices by its own pings that nobody answers; then it comes to its next login.
const STEP_WITHIN: Duration = Duration::from_secs(30);
const SOON: Duration = Duration::from_secs(20);
/// The status of a monitor that SIGTERM ends.
const TERMINATED: i32 = 143;

impl Work {
    fn at(step: Step, idle_ms: u64, seed: u64) -> Self {
        let pattern = format!("mib=1,offset_mib=4,seed={seed}");
        let begin = format!("do=pattern-write:{pattern} do=flush");
        let repeated = |words: &str, times| vec![words; times].join(" ");
        let verify = format!("do=pattern-verify:{pattern}");
        let discard = "do=pattern-write:mib=1,offset_mib=8 do=discard:mib=1,offset_mib=8 do=read-check-zero:mib=1,offset_mib=8";
        let (words, period) = match step {
            Step::Idle => (
                repeated(&format!("do=tick:ms=300,count={} {verify}", idle_ms / 300), 25),
                300,
            ),
            Step::Read => (repeated(&verify, 34), 0),
            Step::Unmap => (repeated(discard, 14), 0),
            _ => (format!("do=stamp:writer=1,blocks={BLOCKS},flush_every=4,ms=1"), 0),
        };
        Self {
            stamps: words.contains("stamp"),
            words: format!("{begin} {words}"),
            period: Duration::from_millis(period),
        }
    }
}

impl<S: Stepped> Scene<S> {
    /// Starts everything, and waits until the guest is well at work.
    pub(super) fn new(context: &Context, cell: &Cell, step: Step, seed: Seed) -> Outcome<Self> {
        let mut seed = seed;
        let server = S::for_cell(cell.value("fault")?, step, DISK_MIB << 20, &mut seed)?;
        let proxy = server.proxy(cell.value("mode")?, Seed::from(seed.draw()))?;
        let lease = tempfile::tempdir()?;
        let drive = server.drive(proxy.address(), lease.path());
        let work = Work::at(step, S::IDLE_MS, seed.below(1 << 20));
        let mut oracle = Oracle::new(BLOCKS);
        oracle.granted(1)?;
        let scene = Self {
            monitor: super::start(context, &work.words, drive)?,
            server,
            proxy,
            oracle,
            seed,
            extent: context.extent,
            step,
            stamps: work.stamps,
            period: work.period,
            _lease: lease,
        };
        scene.progress(4, SOON)?;
        Ok(scene)
    }

    /// Lets the fault happen at the step, ends it, and has the guest go on and end.
    pub(super) fn survive(mut self, fault: &str) -> Outcome {
        let late = self.suffer(fault)?;
        self.server.recovered(self.step, STEP_WITHIN)?;
        let healed = Instant::now();
        self.look()?;
        let limit = RESUMES_WITHIN + self.slack() + self.period + late;
        self.progress(1, limit + SOON)?;
        let took = healed.elapsed();
        ensure!(
            took <= limit,
            "it went on {took:?} after the fault was over, not within {limit:?}"
        );
        // What an old connection still has comes now, and changes nothing.
        self.proxy.deliver_late()?;
        self.progress(3, SOON)?;
        self.look()?;
        self.end()
    }

    /// What other tests cost that run beside a sample; a soak has the host for itself.
    fn slack(&self) -> Duration {
        match self.extent {
            Extent::Sample => Duration::from_secs(3),
            Extent::Full => Duration::ZERO,
        }
    }

    /// The fault from its beginning to its end; returns how much later what it held back still comes.
    fn suffer(&mut self, fault: &str) -> Outcome<Duration> {
        let then = match fault {
            "reset" => Then::Cut,
            "cut inside" => Then::CloseInside,
            _ => S::damage(fault, self.step, &mut self.seed).unwrap_or(Then::Fault(Fault::BlackHole)),
        };
        let direction = self.direction(then);
        self.spring(direction, then)?;
        let duration = self.duration(fault);
        match fault {
            "black hole" => {
                self.silence(Fault::BlackHole)?;
                std::thread::sleep(duration);
            }
            "delay" => {
                let least = Duration::from_millis(10);
                self.silence(Fault::Delay {
                    least,
                    most: duration,
                })?;
                std::thread::sleep(duration);
                self.silence(Fault::None)?;
                return Ok(duration);
            }
            "kill and restart" => {
                self.server.kill()?;
                self.silence(Fault::None)?;
                std::thread::sleep(duration);
                self.server.restart()?;
            }
            "stop" => {
                self.server.stop()?;
                self.silence(Fault::None)?;
                std::thread::sleep(duration);
                self.server.go_on()?;
            }
            "old connection late" => drop(self.proxy.strand()?),
            "power" => drop(self.proxy.crash()?),
            _ => self.server.suffer(fault, &self.proxy, &self.monitor)?,
        }
        self.silence(Fault::None)?;
        Ok(Duration::ZERO)
    }

    /// Has the trap for the step catch its message.
    fn spring(&mut self, direction: Direction, then: Then) -> Outcome {
        let step = self.step;
        let waits = matches!(then, Then::Fault(_) | Then::Cut);
        if step == Step::Idle && waits {
            // The guest is idle for most of the time, and nothing need be on the way.
            return match then {
                Then::Cut => self.proxy.cut(),
                _ => self.silence(Fault::BlackHole),
            };
        }
        self.proxy.lay(Trap {
            direction,
            step,
            then,
        })?;
        self.server.begin_again(step, &self.proxy)?;
        self.proxy.wait_sprung(STEP_WITHIN)
    }

    /// Damages are the server's to send; everything else happens to both.
    fn direction(&mut self, then: Then) -> Direction {
        match then {
            Then::Damage(_) | Then::Twice | Then::Swap => Direction::ToClient,
            Then::CloseInside if self.seed.below(2) == 0 => Direction::ToClient,
            _ => Direction::ToServer,
        }
    }

    /// How long a fault lasts: in a sample a short time, in a soak up to what the issue says.
    fn duration(&mut self, fault: &str) -> Duration {
        let (least_ms, most_ms) = match (fault, self.extent) {
            ("delay", Extent::Sample) => (10, 1000),
            ("delay", Extent::Full) => (10, 10_000),
            ("stop", Extent::Sample) => (1000, 2000),
            ("stop", Extent::Full) => (1000, 60_000),
            (_, Extent::Sample) => (50, 1500),
            (_, Extent::Full) => (50, 20_000),
        };
        Duration::from_millis(least_ms + self.seed.below(most_ms - least_ms))
    }

    fn silence(&self, fault: Fault) -> Outcome {
        self.proxy.set(Direction::ToServer, fault)?;
        self.proxy.set(Direction::ToClient, fault)
    }

    /// Waits until the guest has said so many lines more.
    fn progress(&self, lines: usize, limit: Duration) -> Outcome {
        let count = |text: &str| text.matches('\n').count();
        let before = count(&self.monitor.console.text());
        let wanted = |text: &str| (count(text) >= before + lines).then_some(());
        let found = self.monitor.console.wait_until("more lines", limit, wanted);
        let errors = || self.monitor.errors.text();
        let log = || self.monitor.log().unwrap_or_default();
        Ok(found.map_err(|e| format!("{}{}{}", coracle_tests::case::text(&e), errors(), log()))?)
    }

    /// Shows the judge the image, where the guest says what of it is safe.
    fn look(&mut self) -> Outcome {
        if !self.stamps {
            return Ok(());
        }
        self.oracle
            .acknowledged(1, acknowledged(&self.monitor.console.text()));
        let path = self.server.image()?;
        let image = reread_damaged(|| Ok(std::fs::read(&path)?))?;
        Ok(self.oracle.look(&image)?)
    }

    /// An orderly end, with all that was acknowledged on the target.
    fn end(mut self) -> Outcome {
        self.monitor.signal(Signal::TERM)?;
        let ended = self.monitor.wait(SOON)?;
        ensure!(
            ended.status.code() == Some(TERMINATED),
            "ended with {}: {}{}",
            ended.status,
            ended.console,
            ended.errors
        );
        if self.stamps {
            self.oracle.acknowledged(1, acknowledged(&ended.console));
            self.oracle.look(&std::fs::read(self.server.image()?)?)?;
        }
        Ok(())
    }
}

/// How far the writer has come, by the last whole line that says so.
fn acknowledged(console: &str) -> u64 {
    let whole = console.split_inclusive('\n').filter(|line| line.ends_with('\n'));
    let mut numbers = whole.filter_map(|line| line.trim_end().strip_prefix("stamp: acked=")?.parse().ok());
    numbers.next_back().unwrap_or(0)
}
