//! Monitors with Firecracker's command line and API, as benchmarks drive them: as little as possible beside what is measured.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use serde_json::{Value, json};

use crate::guest::unikernel_words;
use crate::{Outcome, ensure};

/// Nothing measured takes longer on a machine that works.
const PATIENCE: Duration = Duration::from_secs(30);

/// A monitor with Firecracker's command line and API.
#[derive(Debug)]
pub struct Program {
    /// What it is called.
    pub name: &'static str,
    /// The program.
    pub path: PathBuf,
}

/// Ours, and Firecracker if `FIRECRACKER` names it.
///
/// # Errors
///
/// When it is not said where ours is.
pub fn programs() -> Outcome<Vec<Program>> {
    let mut programs = vec![Program {
        name: "coracle",
        path: variable("CORACLE_BIN")?,
    }];
    match std::env::var_os("FIRECRACKER") {
        Some(path) => programs.push(Program {
            name: "firecracker",
            path: path.into(),
        }),
        None => println!("FIRECRACKER is not set: without it there is no peer for the API's figures."),
    }
    Ok(programs)
}

/// A path from the environment.
///
/// # Errors
///
/// When it is not there.
pub fn variable(name: &str) -> Outcome<PathBuf> {
    Ok(std::env::var_os(name)
        .map(PathBuf::from)
        .ok_or_else(|| format!("{name} is not set: use `make`"))?)
}

/// Milliseconds, to the microsecond.
pub fn ms(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

/// A running monitor; killed and reaped when dropped.
pub struct Monitor {
    child: Child,
    directory: tempfile::TempDir,
    stream: Option<UnixStream>,
}

impl Monitor {
    /// Starts `program` with `arguments`, in a directory of its own.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn start(program: &Program, arguments: &[&str]) -> Outcome<Self> {
        Self::start_logging(program, arguments, "Error")
    }

    /// The same with another level of its log, which [`Self::log`] has.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn start_logging(program: &Program, arguments: &[&str], level: &str) -> Outcome<Self> {
        let directory = tempfile::tempdir()?;
        // A log file of its own: the first byte on standard output is then the guest's.
        std::fs::write(directory.path().join("log"), "")?;
        let child = Command::new(&program.path)
            .args(arguments)
            .args(["--log-path", "log", "--level", level])
            .current_dir(directory.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        Ok(Self {
            child,
            directory,
            stream: None,
        })
    }

    /// Looks after any other monitor, which has no API.
    ///
    /// # Errors
    ///
    /// When there is no room for a directory.
    pub fn of(child: Child) -> Outcome<Self> {
        Ok(Self {
            child,
            directory: tempfile::tempdir()?,
            stream: None,
        })
    }

    /// Waits until the API answers, which was asked for at `api.sock`.
    ///
    /// # Errors
    ///
    /// When it does not.
    pub fn wait_for_api(&mut self) -> Outcome {
        let socket = self.directory.path().join("api.sock");
        let begun = Instant::now();
        let stream = loop {
            match UnixStream::connect(&socket) {
                Ok(stream) => break stream,
                Err(error) => ensure!(begun.elapsed() < PATIENCE, "no API socket: {error}"),
            }
            std::thread::sleep(Duration::from_micros(20));
        };
        stream.set_read_timeout(Some(PATIENCE))?;
        self.stream = Some(stream);
        self.request("GET", "/", None)
    }

    /// Leaves the answer to what was sent last to the connection that is returned, and goes on with a new one.
    ///
    /// # Errors
    ///
    /// When the API is not there.
    pub fn connect_anew(&mut self) -> Outcome<Option<UnixStream>> {
        let waiting = self.stream.take();
        self.wait_for_api()?;
        Ok(waiting)
    }

    /// What it has logged.
    ///
    /// # Errors
    ///
    /// When that cannot be read.
    pub fn log(&self) -> Outcome<String> {
        Ok(std::fs::read_to_string(self.directory.path().join("log"))?)
    }

    /// Has it boot `guest`, which does `words`, in so much memory.
    ///
    /// # Errors
    ///
    /// When it refuses.
    pub fn configure(&mut self, guest: &Path, words: &str, memory_mib: u64) -> Outcome {
        let boot = json!({ "kernel_image_path": guest, "boot_args": unikernel_words(words) });
        self.request("PUT", "/boot-source", Some(&boot))?;
        let machine = json!({ "vcpu_count": 1, "mem_size_mib": memory_mib });
        self.request("PUT", "/machine-config", Some(&machine))
    }

    /// Sends a request, whose answer is not waited for.
    ///
    /// # Errors
    ///
    /// When the connection is gone.
    pub fn send(&mut self, method: &str, path: &str, body: &Value) -> Outcome {
        let body = if body.is_null() {
            String::new()
        } else {
            body.to_string()
        };
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        let stream = self.stream.as_mut().ok_or("the API was waited for")?;
        Ok(stream.write_all(format!("{head}{body}").as_bytes())?)
    }

    /// Sends a request, which has to be taken.
    ///
    /// # Errors
    ///
    /// When it is not.
    pub fn request(&mut self, method: &str, path: &str, body: Option<&Value>) -> Outcome {
        self.send(method, path, body.unwrap_or(&Value::Null))?;
        match self.answer() {
            Ok(_) => Ok(()),
            Err(error) => Err(format!("{method} {path}: {}", error.message().unwrap_or("failed")).into()),
        }
    }

    /// Sends a request without a body; returns the answer, which has to be a good one.
    ///
    /// # Errors
    ///
    /// When it is not.
    pub fn ask(&mut self, method: &str, path: &str) -> Outcome<String> {
        self.send(method, path, &Value::Null)?;
        self.answer()
    }

    /// Reads the answer to a request that was sent, which has to be a good one.
    ///
    /// # Errors
    ///
    /// When it is not.
    pub fn answer(&mut self) -> Outcome<String> {
        let stream = self.stream.as_mut().ok_or("the API was waited for")?;
        let mut answer = vec![0; 4096];
        let len = stream.read(&mut answer)?;
        let answer = String::from_utf8_lossy(answer.get(..len).unwrap_or_default()).into_owned();
        ensure!(answer.starts_with("HTTP/1.1 20"), "it was refused: {answer}");
        Ok(answer)
    }

    /// Waits until the guest says something.
    ///
    /// # Errors
    ///
    /// When it does not.
    pub fn wait_for_first_byte(&mut self) -> Outcome {
        let output = self
            .child
            .stdout
            .as_mut()
            .ok_or("standard output was asked for")?;
        let mut watched = [PollFd::from_borrowed_fd(output.as_fd(), PollFlags::IN)];
        let limit = rustix::time::Timespec {
            tv_sec: PATIENCE.as_secs().cast_signed(),
            tv_nsec: 0,
        };
        ensure!(poll(&mut watched, Some(&limit))? == 1, "the guest stays silent");
        let mut byte = [0];
        ensure!(
            output.read(&mut byte)? == 1,
            "the monitor ended before the guest said anything"
        );
        Ok(())
    }

    /// Waits until the guest has said `words`.
    ///
    /// # Errors
    ///
    /// When it does not.
    pub fn wait_for(&mut self, words: &str) -> Outcome {
        self.said_until(words).map(drop)
    }

    /// What the guest says from now on, up to `words`.
    ///
    /// # Errors
    ///
    /// When it does not say them.
    pub fn said_until(&mut self, words: &str) -> Outcome<String> {
        let output = self
            .child
            .stdout
            .as_mut()
            .ok_or("standard output was asked for")?;
        let (mut said, begun) = (String::new(), Instant::now());
        let mut bytes = [0; 256];
        while !said.contains(words) {
            let len = output.read(&mut bytes)?;
            ensure!(len > 0, "the monitor ended before its guest said {words}: {said}");
            ensure!(
                begun.elapsed() < PATIENCE,
                "the guest does not say {words}: {said}"
            );
            said.push_str(&String::from_utf8_lossy(bytes.get(..len).unwrap_or_default()));
        }
        Ok(said)
    }

    /// Time on a processor of all threads so far, in nanoseconds from the scheduler.
    ///
    /// # Errors
    ///
    /// When the process has ended.
    pub fn cpu_time(&self) -> Outcome<Duration> {
        let mut total_ns = 0;
        for thread in std::fs::read_dir(format!("/proc/{}/task", self.child.id()))? {
            let text = std::fs::read_to_string(thread?.path().join("schedstat"))?;
            total_ns += text
                .split_whitespace()
                .next()
                .ok_or("schedstat has fields")?
                .parse::<u64>()?;
        }
        Ok(Duration::from_nanos(total_ns))
    }

    /// Resident memory of all mappings but the guest's, which has `memory_mib`.
    ///
    /// # Errors
    ///
    /// When the process has ended.
    pub fn resident_kib_beyond(&self, memory_mib: u64) -> Outcome<f64> {
        let maps = std::fs::read_to_string(format!("/proc/{}/smaps", self.child.id()))?;
        let mut size_kib = 0;
        let mut sum_kib = 0;
        for line in maps.lines() {
            let mut words = line.split_whitespace();
            match (
                words.next(),
                words.next().and_then(|word| word.parse::<u32>().ok()),
            ) {
                (Some("Size:"), Some(kib)) => size_kib = kib,
                (Some("Rss:"), Some(kib)) if u64::from(size_kib) < memory_mib << 10 => sum_kib += kib,
                _ => {}
            }
        }
        Ok(f64::from(sum_kib))
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
