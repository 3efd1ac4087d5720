//! One cell of the matrix: a guest at a step, a fault, its end, and how soon the guest goes on.

use std::time::{Duration, Instant};

use coracle_tests::case::{Context, Extent};
use coracle_tests::harness::double_start::IMAGE_BYTES;
use coracle_tests::harness::iscsi::protocol::Iscsi;
use coracle_tests::harness::iscsi::target::{Plan, Target, url};
use coracle_tests::harness::matrix::Cell;
use coracle_tests::harness::oracle::{BLOCK_SECTORS, Oracle, reread_damaged};
use coracle_tests::harness::proxy::{Damage, Direction, Fault, Proxy, Step, Then, Trap};
use coracle_tests::monitor::Monitor;
use coracle_tests::seed::Seed;
use coracle_tests::{Outcome, ensure};
use rustix::process::Signal;

/// A guest at work, and all between it and its bytes.
pub(super) struct Scene {
    target: Target,
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

const HERE: std::net::IpAddr = std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);
const DISK_MIB: u64 = 16;
const BLOCKS: u64 = IMAGE_BYTES / 512 / BLOCK_SECTORS;
/// All of a write comes with its command, so that a volatile cache can hold it.
const IMMEDIATE_BYTES: u32 = 262_144;
/// As the issue has it: so soon after the fault is over the guest goes on.
const RESUMES_WITHIN: Duration = Duration::from_secs(2);
/// A session notices by its own pings that nobody answers; then it comes to its next login.
const STEP_WITHIN: Duration = Duration::from_secs(30);
const SOON: Duration = Duration::from_secs(20);
/// The status of a monitor that SIGTERM ends.
const TERMINATED: i32 = 143;

impl Work {
    fn at(step: Step, seed: u64) -> Self {
        let pattern = format!("mib=1,offset_mib=4,seed={seed}");
        let begin = format!("do=pattern-write:{pattern} do=flush");
        let repeated = |words: &str, times| vec![words; times].join(" ");
        let verify = format!("do=pattern-verify:{pattern}");
        let discard = "do=pattern-write:mib=1,offset_mib=8 do=discard:mib=1,offset_mib=8 do=read-check-zero:mib=1,offset_mib=8";
        let (words, period) = match step {
            Step::Idle => (repeated(&format!("do=tick:ms=300,count=1 {verify}"), 25), 300),
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

impl Scene {
    /// Starts everything, and waits until the guest is well at work.
    pub(super) fn new(context: &Context, cell: &Cell, step: Step, seed: Seed) -> Outcome<Self> {
        let mut seed = seed;
        let digests = cell.value("fault")? == "wrong digest" || seed.below(2) == 0;
        // Often enough that an idle session has a message for every trap.
        let plan = Plan::disk(DISK_MIB << 20).immediate_bytes(IMMEDIATE_BYTES);
        let plan = plan.key("nop_interval", "1").key("nop_count", "120");
        let target = Target::start(if digests { plan.digests() } else { plan })?;
        let (server, stream) = (target.address(), Seed::from(seed.draw()));
        let proxy = match cell.value("mode")? {
            "volatile" => Proxy::volatile(HERE, server, stream, Iscsi::default())?,
            _ => Proxy::knowing(HERE, server, stream, Iscsi::default())?,
        };
        let lease = tempfile::tempdir()?;
        let options = if digests {
            "?header_digest=crc32c&data_digest=crc32c"
        } else {
            ""
        };
        let mut drive = super::drive(&format!("{}{options}", url(proxy.address(), 1)), lease.path());
        if let (Step::Unmap, Some(drive)) = (step, drive.as_object_mut()) {
            // tgtd lets strangers unmap what is reserved, so a leased disk never does it there.
            drive.insert("lock".into(), "none".into());
        }
        let work = Work::at(step, seed.below(1 << 20));
        let mut oracle = Oracle::new(BLOCKS);
        oracle.granted(1)?;
        let scene = Self {
            monitor: super::start(context, &work.words, drive)?,
            target,
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
        let hole = Then::Fault(Fault::BlackHole);
        let then = match fault {
            "reset" => Then::Cut,
            "cut inside" => Then::CloseInside,
            "wrong digest" => self.wrong_sum(),
            "wrong length" => self.wrong_length(),
            "odd answer" => self.odd_answer(),
            _ => hole,
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
                self.target.kill()?;
                self.silence(Fault::None)?;
                std::thread::sleep(duration);
                self.target.restart()?;
            }
            "stop" => {
                self.target.stop()?;
                self.silence(Fault::None)?;
                std::thread::sleep(duration);
                self.target.go_on()?;
            }
            "old connection late" => drop(self.proxy.strand()?),
            "power" => drop(self.proxy.crash()?),
            _ => {}
        }
        self.silence(Fault::None)?;
        Ok(Duration::ZERO)
    }

    /// Has the trap for the step catch its message.
    fn spring(&self, direction: Direction, then: Then) -> Outcome {
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
        if matches!(step, Step::Login | Step::Reservation) {
            // It comes to these only when it has to begin again.
            self.proxy.cut()?;
        }
        self.proxy.wait_sprung(STEP_WITHIN)
    }

    /// Damages are the target's to send; everything else happens to both.
    fn direction(&mut self, then: Then) -> Direction {
        match then {
            Then::Damage(_) | Then::Twice | Then::Swap => Direction::ToClient,
            Then::CloseInside if self.seed.below(2) == 0 => Direction::ToClient,
            _ => Direction::ToServer,
        }
    }

    fn wrong_sum(&mut self) -> Then {
        let of_data = self.step == Step::Read && self.seed.below(2) == 0;
        Then::Damage(if of_data {
            Damage::DataSum
        } else {
            Damage::HeaderSum
        })
    }

    fn wrong_length(&mut self) -> Then {
        // Only these are answered with data.
        let has_data = matches!(self.step, Step::Login | Step::Read);
        let is_short = has_data && self.seed.below(2) == 0;
        Then::Damage(if is_short {
            Damage::Truncated
        } else {
            Damage::Oversized
        })
    }

    fn odd_answer(&mut self) -> Then {
        let number = Then::Damage(Damage::Number);
        // The target's own pings, which is all that an idle session hears of one that pings so often, have none.
        let number = if self.step == Step::Idle {
            Then::Twice
        } else {
            number
        };
        let all = [Then::Damage(Damage::Tag), number, Then::Twice];
        self.seed.pick(&all).copied().unwrap_or(Then::Twice)
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
        Ok(found.map_err(|e| format!("{}{}", coracle_tests::case::text(&e), errors()))?)
    }

    /// Shows the judge the image, where the guest says what of it is safe.
    fn look(&mut self) -> Outcome {
        if !self.stamps {
            return Ok(());
        }
        self.oracle
            .acknowledged(1, acknowledged(&self.monitor.console.text()));
        let path = self.target.image(1)?;
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
            self.oracle.look(&std::fs::read(self.target.image(1)?)?)?;
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
