//! Clients of an image that run no guest: this project's storage alone, and QEMU's.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, WaitId, WaitIdOptions};

use super::measurement::{Figure, Results, microseconds, number};
use crate::process::Process;
use crate::{Outcome, ensure};

/// A client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// The example `load` of the storage library.
    Storage,
    /// `qemu-img bench`.
    QemuImg,
}

/// A load: one block after the other, so many at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Which way.
    pub direction: Way,
    /// Bytes of a request.
    pub block_bytes: u64,
    /// Requests in flight.
    pub depth: u64,
}

/// Whether bytes come or go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// They come.
    Read,
    /// They go.
    Write,
}

/// What one run came to.
struct Run {
    requests: f64,
    seconds: f64,
    cpu: Duration,
}

/// Of a run that says how fast the next ones will be.
const TRIAL_REQUESTS: u64 = 500;

impl Way {
    /// The word for it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
        }
    }
}

impl Shape {
    /// Whether what counts is bytes, and not requests.
    pub fn is_large(self) -> bool {
        self.block_bytes > 4096
    }
}

impl Program {
    /// Its name in tables and filters.
    pub fn name(self) -> &'static str {
        match self {
            Self::Storage => "storage",
            Self::QemuImg => "qemu-img",
        }
    }

    /// One run on an image for about so long, added to the results.
    ///
    /// # Errors
    ///
    /// When the program fails, or a request does.
    pub fn measure(self, image: &str, shape: Shape, milliseconds: u64, results: &mut Results) -> Outcome {
        let run = match self {
            Self::Storage => load(image, shape.direction.word(), shape, milliseconds)?,
            Self::QemuImg => qemu_img(image, shape, milliseconds)?,
        };
        let is_answered = run.requests > 0.0;
        ensure!(is_answered, "nothing was answered");
        let iops = run.requests / run.seconds;
        let bytes = f64::from(u32::try_from(shape.block_bytes)?);
        for (figure, value) in [
            (Figure::Iops, iops),
            (Figure::Bandwidth, iops * bytes / 1e6),
            (Figure::HostCpu, microseconds(run.cpu) / run.requests),
        ] {
            results.entry(figure).or_default().push(value);
        }
        Ok(())
    }
}

/// CPU time of the storage library alone on an image that nobody uses, for so long.
///
/// # Errors
///
/// When it cannot be opened.
pub fn idle(image: &str, milliseconds: u64) -> Outcome<Duration> {
    let shape = Shape {
        direction: Way::Read,
        block_bytes: 4096,
        depth: 1,
    };
    Ok(load(image, "idle", shape, milliseconds)?.cpu)
}

fn load(image: &str, word: &str, shape: Shape, milliseconds: u64) -> Outcome<Run> {
    let program = std::env::var_os("CORACLE_LOAD").map_or_else(beside_this_program, PathBuf::from);
    let numbers = [shape.block_bytes, shape.depth, milliseconds].map(|number| number.to_string());
    let mut command = Command::new(program);
    let (line, _) = output(command.args([image, word]).args(numbers))?;
    ensure!(number(&line, "errors")? == 0.0, "wrong answers: {line}");
    let time = |key| -> Outcome<Duration> { Ok(Duration::from_secs_f64(number(&line, key)? / 1e6)) };
    Ok(Run {
        requests: number(&line, "requests")?,
        seconds: time("us")?.as_secs_f64(),
        cpu: time("cpu_us")?,
    })
}

/// Its start and its end are no part of the figure: a run with one request has them too.
fn qemu_img(image: &str, shape: Shape, milliseconds: u64) -> Outcome<Run> {
    let trial = bench(image, shape, TRIAL_REQUESTS)?;
    let rate = trial.requests / trial.seconds.max(1e-3);
    let wanted = rate * f64::from(u32::try_from(milliseconds)?) / 1000.0;
    // Text is the one conversion of a float that neither wraps nor warns.
    let requests: u64 = format!("{:.0}", wanted.max(1000.0)).parse()?;
    let nothing = bench(image, shape, 1)?;
    let all = bench(image, shape, requests)?;
    Ok(Run {
        requests: all.requests,
        seconds: all.seconds,
        cpu: all.cpu.saturating_sub(nothing.cpu),
    })
}

fn bench(image: &str, shape: Shape, requests: u64) -> Outcome<Run> {
    let mut command = Command::new("qemu-img");
    command.args(["bench", "-f", "raw", "-t", "none"]);
    let numbers = [("-c", requests), ("-d", shape.depth), ("-s", shape.block_bytes)];
    for (option, number) in numbers {
        command.args([option, &number.to_string()]);
    }
    if shape.direction == Way::Write {
        command.arg("-w");
    }
    let (text, cpu) = output(command.arg(image))?;
    let seconds = text.split("Run completed in ").nth(1);
    let seconds = seconds.and_then(|rest| rest.split_whitespace().next());
    let seconds = seconds.ok_or_else(|| format!("qemu-img does not say how long: {text}"))?;
    Ok(Run {
        requests: f64::from(u32::try_from(requests)?),
        seconds: seconds.parse()?,
        cpu,
    })
}

/// What a program says, and the CPU time of its whole life.
fn output(command: &mut Command) -> Outcome<(String, Duration)> {
    let command = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let child = command
        .spawn()
        .map_err(|e| format!("{}: {e}", command.get_program().display()))?;
    let cpu = cpu_at_its_end(&child)?;
    let done = child.wait_with_output()?;
    let errors = String::from_utf8_lossy(&done.stderr).into_owned();
    ensure!(done.status.success(), "{}: {errors}", done.status);
    Ok((String::from_utf8(done.stdout)?, cpu))
}

/// The kernel keeps the account of a process until somebody takes note of its end. It says little, so no pipe fills up.
fn cpu_at_its_end(child: &Child) -> Outcome<Duration> {
    let exited = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
    rustix::process::waitid(WaitId::Pid(Pid::from_child(child)), exited)?;
    Process(child.id()).cpu_time()
}

/// Where cargo builds examples.
fn beside_this_program() -> PathBuf {
    let this = std::env::current_exe().unwrap_or_default();
    let directory = this.parent().unwrap_or(std::path::Path::new("."));
    directory.join("examples/load")
}
