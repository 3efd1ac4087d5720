//! Random starts, deaths and silences of writers of one image, with the oracle as the judge.
//!
//! ```text
//!           start ──► refused
//!             │
//!             ▼     SIGSTOP
//!          running ────────► stopped ─┐
//!             │   resumed ◄──         │ kill -9
//!             │      SIGCONT          ▼
//!             ├─ kill -9 ──────► killed
//!             └─ SIGTERM ──────► ended
//! ```
//!
//! Where the storage is reached by a network, a writer is also cut off from it and healed, its server is killed and started
//! again, and the lease of whoever has it is broken, which is the end of that writer's tenure but not of his process.
//!
//! A writer is a whole monitor with the unikernel guest's `stamp`. Each start is another incarnation; half of them are
//! of a VM that was started before.

use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::Outcome;
use crate::case::text;
use crate::console::Console;
use crate::environment::Environment;
use crate::guest::Machine;
use crate::harness::oracle::{BLOCK_SECTORS, Oracle, reread_damaged};
use crate::monitor::{Launch, Monitor};
use crate::seed::Seed;

mod network;

pub use network::Network;

/// One image on some kind of storage, blank when the schedule begins.
pub trait Backend {
    /// The members of the next writer's drive that say where the image is and how it is leased. Asked once for each start.
    ///
    /// # Errors
    ///
    /// When there is no way to the image for him.
    fn drive(&self) -> Outcome<Value>;

    /// The first bytes of the image, as the storage has them.
    ///
    /// # Errors
    ///
    /// When the storage does not answer.
    fn read(&self, bytes: u64) -> Outcome<Vec<u8>>;

    /// What must become of a start, when the last writer that held the lease is in this state.
    fn expected(&self, holder: State) -> Expected;

    /// Whether a monitor that ended said that this VM holds the lease.
    fn is_refusal(&self, errors: &str, vm: &str) -> bool;

    /// What the schedule can do to the way to the image, if there is a way.
    fn network(&self) -> Option<&dyn Network> {
        None
    }
}

/// The state of a writer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It runs, and has done so all the time.
    Running,
    /// It runs again, after it was stopped.
    Resumed,
    /// It was stopped and may go on at any time.
    Stopped,
    /// It was killed, without a chance to give anything back.
    Killed,
    /// It has ended in good order.
    Ended,
    /// Its lease was broken, whatever it does itself.
    Broken,
}

/// What must become of a start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// It gets the lease, and whoever had it has it no more.
    Granted,
    /// It ends, and names the holder.
    Refused,
    /// Either: the storage frees the lease after a time.
    Either,
}

/// Blocks that writers share: few, so that each is overwritten often.
const BLOCKS: u64 = 64;
/// Bytes of an image that hold them.
pub const IMAGE_BYTES: u64 = BLOCKS * BLOCK_SECTORS * 512;
const STEPS: u64 = 8;
const VMS: &[&str] = &["vm-one", "vm-two"];
/// At most so many at a time: two that ran side by side, and one that tries.
const ALIVE_MAX: usize = 3;
const START_WITHIN: Duration = Duration::from_secs(30);
const END_WITHIN: Duration = Duration::from_secs(20);
/// How long steps are apart at most.
const PAUSE_MS_MAX: u64 = 40;
/// The same on a network: a session that was lost has the time to come back, sometimes.
const NETWORK_PAUSE_MS_MAX: u64 = 600;
/// Kinds of steps, and those that need a network after them.
const KINDS: u64 = 6;
const NETWORK_KINDS: u64 = 5;
/// The status of a monitor that SIGTERM ends.
const TERMINATED: i32 = 143;

/// Runs one seeded schedule to its end.
///
/// # Errors
///
/// The first violation, with all that was done until then.
pub fn run(environment: &Environment, backend: &dyn Backend, seed: &Seed) -> Outcome {
    let mut schedule = Schedule {
        environment,
        backend,
        seed: seed.clone(),
        oracle: Oracle::new(BLOCKS),
        alive: vec![],
        last: None,
        starts: 0,
        done: vec![],
    };
    let outcome = schedule.run();
    let done = schedule.done.join(", ");
    outcome.map_err(|e| format!("schedule {}: {done}: {}", seed.number(), text(&e)).into())
}

struct Schedule<'a> {
    environment: &'a Environment,
    backend: &'a dyn Backend,
    seed: Seed,
    oracle: Oracle,
    alive: Vec<Writer>,
    /// The last one that was given the lease: its VM and its state.
    last: Option<(u64, &'static str, State)>,
    starts: u64,
    /// What was done, for the report.
    done: Vec<String>,
}

struct Writer {
    number: u64,
    vm: &'static str,
    is_stopped: bool,
    is_cut_off: bool,
    monitor: Monitor,
}

impl Schedule<'_> {
    fn run(&mut self) -> Outcome {
        let pause_ms_max = match self.backend.network() {
            None => PAUSE_MS_MAX,
            Some(_) => NETWORK_PAUSE_MS_MAX,
        };
        for _ in 0..STEPS {
            self.step()?;
            std::thread::sleep(Duration::from_millis(self.seed.below(pause_ms_max)));
            self.look()?;
        }
        while let Some(writer) = self.alive.pop() {
            self.kill(writer)?;
        }
        // Whatever happened: the image is free again, where death frees it or somebody says so, and whole.
        if let (Some(network), Expected::Refused | Expected::Either) = (self.backend.network(), self.next()) {
            self.break_lease(network)?;
        }
        self.start()?;
        self.look()?;
        match self.alive.pop() {
            Some(writer) => self.end(writer),
            None => Ok(()),
        }
    }

    /// One random step, of those that are possible.
    fn step(&mut self) -> Outcome {
        let count = u64::try_from(self.alive.len())?;
        let network = self.backend.network();
        let kind = self.seed.below(KINDS + network.map_or(0, |_| NETWORK_KINDS));
        if let Some(network) = network.filter(|_| kind >= KINDS) {
            return self.upheaval(network, kind - KINDS);
        }
        if count == 0 || (kind < 2 && self.alive.len() < ALIVE_MAX) {
            return self.start();
        }
        let index = usize::try_from(self.seed.below(count))?;
        match kind {
            2 => {
                let writer = self.alive.swap_remove(index);
                self.kill(writer)
            }
            3 => {
                let writer = self.alive.swap_remove(index);
                self.end(writer)
            }
            _ => self.stop_or_continue(index),
        }
    }

    /// What must become of the next start.
    fn next(&self) -> Expected {
        self.last
            .map_or(Expected::Granted, |(_, _, state)| self.backend.expected(state))
    }

    /// Takes note of what has become of a writer; nothing gives a broken lease back.
    fn note(&mut self, number: u64, now: State) {
        if let Some((last, _, state)) = &mut self.last
            && *last == number
            && *state != State::Broken
        {
            *state = now;
        }
    }

    fn start(&mut self) -> Outcome {
        self.starts += 1;
        let number = self.starts;
        let vm = self.seed.pick(VMS).copied().unwrap_or("vm");
        let expected = self.next();
        self.done.push(format!("start {number} of {vm}"));
        let mut drive = json!({
            "drive_id": "d", "is_root_device": false, "is_read_only": false, "cache_type": "Writeback"
        });
        if let (Some(drive), Value::Object(more)) = (drive.as_object_mut(), self.backend.drive()?) {
            drive.extend(more);
        }
        let words = format!("do=stamp:writer={number},blocks={BLOCKS},flush_every=4,ms=1");
        let machine = Machine::unikernel(self.environment, &words).drive(drive);
        let monitor = Launch::new(self.environment)?
            .without_api()
            .arguments(["--id", vm])
            .config(&machine.config())?
            .spawn()?;
        let ready = monitor.console.wait_for("stamp: ready", START_WITHIN);
        let Err(silence) = ready else {
            let writer = Writer {
                number,
                vm,
                is_stopped: false,
                is_cut_off: false,
                monitor,
            };
            return self.started(writer, expected);
        };
        let ended = monitor
            .wait(END_WITHIN)
            .map_err(|_| format!("neither ready nor at its end: {}", text(&silence)))?;
        let holder = self.last.map_or("nobody", |(_, holder, _)| holder);
        crate::ensure!(
            expected != Expected::Granted,
            "start {number} failed, {holder} is no more: {}",
            ended.errors
        );
        crate::ensure!(
            self.backend.is_refusal(&ended.errors, holder),
            "start {number} failed and did not name {holder}: {}",
            ended.errors
        );
        Ok(())
    }

    fn started(&mut self, writer: Writer, expected: Expected) -> Outcome {
        let (number, vm) = (writer.number, writer.vm);
        self.alive.push(writer);
        if expected == Expected::Refused {
            // It is told nothing, so the oracle takes each block of this writer for what it is.
            let deadline = Instant::now() + START_WITHIN;
            while self
                .alive
                .last()
                .is_some_and(|w| acknowledged(&w.monitor.console) == 0)
            {
                crate::ensure!(
                    Instant::now() < deadline,
                    "start {number} neither ended nor wrote"
                );
                std::thread::sleep(Duration::from_millis(1));
            }
            self.look()?;
            return Err(format!("start {number} was not refused, and its writes went nowhere").into());
        }
        if let Some((before, _, _)) = self.last {
            self.oracle.gone(before);
        }
        self.oracle.granted(number)?;
        self.last = Some((number, vm, State::Running));
        self.look()
    }

    fn kill(&mut self, writer: Writer) -> Outcome {
        self.done.push(format!("kill {}", writer.number));
        writer.monitor.signal(Signal::KILL)?;
        let number = writer.number;
        let ended = writer.monitor.wait(END_WITHIN)?;
        self.gone(number, &ended.console, State::Killed)
    }

    fn end(&mut self, writer: Writer) -> Outcome {
        self.done.push(format!("end {}", writer.number));
        let number = writer.number;
        // A stopped one would not hear of it, and one that is cut off could give nothing back.
        writer.monitor.signal(Signal::CONT)?;
        if let Some(network) = self.backend.network().filter(|_| writer.is_cut_off) {
            network.heal(number)?;
        }
        writer.monitor.signal(Signal::TERM)?;
        let ended = writer.monitor.wait(END_WITHIN)?;
        crate::ensure!(
            ended.status.code() == Some(TERMINATED),
            "writer {number} ended with {}: {}",
            ended.status,
            ended.errors
        );
        self.gone(number, &ended.console, State::Ended)
    }

    fn gone(&mut self, number: u64, console: &str, state: State) -> Outcome {
        self.oracle.acknowledged(number, last_acknowledged(console));
        self.oracle.gone(number);
        self.note(number, state);
        self.look()
    }

    fn stop_or_continue(&mut self, index: usize) -> Outcome {
        let Some(writer) = self.alive.get_mut(index) else {
            return Ok(());
        };
        let (signal, state, verb) = if writer.is_stopped {
            (Signal::CONT, State::Resumed, "continue")
        } else {
            (Signal::STOP, State::Stopped, "stop")
        };
        self.done.push(format!("{verb} {}", writer.number));
        writer.monitor.signal(signal)?;
        writer.is_stopped = !writer.is_stopped;
        let number = writer.number;
        self.note(number, state);
        Ok(())
    }

    /// Tells the oracle what was acknowledged, and then shows it the image.
    fn look(&mut self) -> Outcome {
        for writer in &self.alive {
            let upto = acknowledged(&writer.monitor.console);
            self.oracle.acknowledged(writer.number, upto);
        }
        let image = reread_damaged(|| self.backend.read(IMAGE_BYTES))?;
        Ok(self.oracle.look(&image)?)
    }
}

fn acknowledged(console: &Console) -> u64 {
    last_acknowledged(&console.text())
}

/// How far a writer has come, by the last whole line that says so.
fn last_acknowledged(console: &str) -> u64 {
    let whole = console.split_inclusive('\n').filter(|line| line.ends_with('\n'));
    let mut numbers = whole.filter_map(|line| line.trim_end().strip_prefix("stamp: acked=")?.parse().ok());
    numbers.next_back().unwrap_or(0)
}
