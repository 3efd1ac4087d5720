//! A program that tries to get out of where a test has put it: a jail, with the filters of a monitor's thread on it or without.
//!
//! The last word of its command line is a [`Task`]. Each attempt is made by a child of its own, since a filter ends the process;
//! what became of the child is a line of JSON on standard output: its status is 0 if nothing has refused the attempt, the number
//! of the kernel's error if that has, and 148 if a filter has.

#![no_main]
#![expect(
    unsafe_code,
    reason = "it begins as the monitor does, forks, and waits for whatever its children have left"
)]

mod attempts;
mod places;

use std::ffi::{c_char, c_int};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::time::Duration;

use coracle_vmm::{logger, process};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process};
use serde::Deserialize;
use serde_json::json;

/// What is tried, and where.
#[derive(Debug, Deserialize)]
struct Task {
    /// By name, as `attempts.rs` has them.
    attempts: Vec<String>,
    /// The threads that try, as `places.rs` has them.
    places: Vec<String>,
    /// Whether this process makes the attempt itself; there is one of each then.
    #[serde(default)]
    alone: bool,
    /// Whether a child that makes an attempt is stopped and goes on, again and again.
    #[serde(default)]
    interrupted: bool,
    #[serde(flatten)]
    world: World,
}

/// What there is to reach.
#[derive(Clone, Debug, Deserialize)]
struct World {
    /// A process that is not in the jail.
    #[serde(default)]
    pid: i32,
    /// A port of the host's loopback interface on which somebody listens.
    #[serde(default)]
    port: u16,
    /// The abstract name of a Unix socket of the host.
    #[serde(default)]
    socket: String,
    /// A file of the host, by its absolute path.
    #[serde(default)]
    secret: String,
    /// A directory of this process with two symbolic links to that file: `link` and, by `..`, `dots`.
    #[serde(default)]
    directory: String,
    /// A configuration of a machine, which names what may be reached.
    #[serde(default)]
    config: String,
    /// A policy of filters that are wider than the monitor's.
    #[serde(default)]
    policy: String,
}

/// As in the monitor: the filters have no room for what the standard library does at the beginning and the end of a thread.
// SAFETY: no other function of this program has this name.
#[unsafe(no_mangle)]
extern "C" fn main(_: c_int, _: *const *const c_char) -> c_int {
    let status = process::begin().and_then(|()| run()).unwrap_or_else(|error| {
        eprintln!("escape: {error}");
        NO_TASK
    });
    std::process::exit(i32::from(status))
}

/// No number of an error of the kernel, and no status of a filter's.
const NO_TASK: u8 = 200;

fn run() -> io::Result<u8> {
    logger::install("escape").map_err(io::Error::other)?;
    let word = std::env::args().next_back().unwrap_or_default();
    let task: Task = serde_json::from_str(&word)?;
    // Children of its children are its own when those have ended.
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
    for name in &task.attempts {
        let attempt =
            attempts::named(name).ok_or_else(|| io::Error::other(format!("there is no attempt {name}")))?;
        for place in &task.places {
            let world = task.world.clone();
            let made = || places::make_there(place, &task.world, move || attempt(&world));
            if task.alone {
                return made();
            }
            let mut line = in_a_child(made, task.interrupted)?;
            if let Some(line) = line.as_object_mut() {
                line.insert("attempt".to_owned(), json!(name));
                line.insert("place".to_owned(), json!(place));
            }
            writeln!(io::stdout(), "{line}")?;
        }
    }
    Ok(0)
}

/// Stops the child and lets it go on, every few milliseconds until it says something or ends.
fn interrupt(child: i32, words: &OwnedFd) -> io::Result<()> {
    let child = Pid::from_raw(child).ok_or_else(|| io::Error::other("no child"))?;
    let while_it_is_still = Timespec::try_from(Duration::from_millis(5)).map_err(io::Error::other)?;
    while poll(&mut [PollFd::new(words, PollFlags::IN)], Some(&while_it_is_still))? == 0 {
        kill_process(child, Signal::STOP)?;
        // Each of its threads has to hear of it.
        std::thread::sleep(Duration::from_millis(5));
        kill_process(child, Signal::CONT)?;
    }
    Ok(())
}

/// Has a child make an attempt: its status, or the signal that ended it, and its last words.
fn in_a_child(made: impl FnOnce() -> io::Result<u8>, is_interrupted: bool) -> io::Result<serde_json::Value> {
    let (words, end) = rustix::pipe::pipe()?;
    // SAFETY: this process has one thread.
    let child = unsafe { libc::fork() };
    if child == 0 {
        rustix::stdio::dup2_stderr(&end)?;
        drop((words, end));
        let status = made().unwrap_or_else(|error| {
            eprintln!("escape: {error}");
            NO_TASK
        });
        // SAFETY: nothing of this copy of the process is of use any more.
        unsafe { libc::_exit(i32::from(status)) };
    }
    drop(end);
    if child < 0 {
        return Err(io::Error::last_os_error());
    }
    if is_interrupted {
        interrupt(child, &words)?;
    }
    let mut said = Vec::new();
    let mut words = std::fs::File::from(words);
    words.read_to_end(&mut said)?;
    let mut status = 0;
    // SAFETY: the status has a place of its own.
    let waited = unsafe { libc::waitpid(child, &raw mut status, 0) };
    if waited != child {
        return Err(io::Error::last_os_error());
    }
    // What it has left behind has ended, or is killed by now.
    // SAFETY: it needs no place for a status.
    while unsafe { libc::waitpid(-1, std::ptr::null_mut(), 0) } > 0 {}
    Ok(json!({
        "status": libc::WIFEXITED(status).then(|| libc::WEXITSTATUS(status)),
        "signal": libc::WIFSIGNALED(status).then(|| libc::WTERMSIG(status)),
        "said": String::from_utf8_lossy(&said),
    }))
}
