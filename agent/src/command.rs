//! A command that runs for who called.
//!
//! ```text
//! stream ──frames──► Pump ──► standard input (a pipe, or the terminal's master)
//!   ▲                 │ ▲
//!   └─────frames──────┘ └── standard output, standard error, the process's descriptor
//! ```
//!
//! One thread polls all of them. When the command has ended, what its pipes hold is sent, and no more is waited for: what it has
//! left running may have them open for ever. When the caller is gone, the command and what it has started are killed.
#![expect(
    unsafe_code,
    reason = "a terminal becomes that of a command between fork and exec"
)]

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};

use coracle_agent::wire::{DATA_BYTES, Decoder, Encode, Exec, Exit, Size, ToGuest, ToHost, WINDOW_BYTES};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::session::{Stream, fail, joined};

/// What a shell gives for a program that is not there, and for one that cannot be run.
const STATUS_NOT_FOUND: u8 = 127;
const STATUS_NOT_RUN: u8 = 126;
/// What is in a terminal comes out of it a little later.
const TERMINAL_STILL: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};
/// What is read at most of a terminal whose command has ended.
const TERMINAL_BYTES_MAX: usize = 1 << 20;
/// Where programs are, for an agent that was started without a PATH.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Runs it to its end, or that of the stream.
///
/// # Errors
///
/// When the caller is gone.
pub(super) fn run(exec: &Exec, stream: &mut impl Stream, decoder: Decoder) -> io::Result<()> {
    let Some(program) = exec.command.first() else {
        return fail(stream, "there is no command to run");
    };
    let (child, ends) = match start(exec, program) {
        Ok(started) => started,
        Err(error) => {
            let is_found = error.kind() != io::ErrorKind::NotFound;
            let (status, why) = match exec.directory.as_deref() {
                Some(directory) if !std::path::Path::new(directory).is_dir() => (
                    STATUS_NOT_RUN,
                    format!("there is no directory {directory} to run in"),
                ),
                _ if is_found => (STATUS_NOT_RUN, format!("cannot run {program}: {error}")),
                _ => (STATUS_NOT_FOUND, format!("cannot run {program}: {error}")),
            };
            return ToHost::Failed(status, &why).write(stream);
        }
    };
    let mut pump = match Pump::new(child, ends) {
        Ok(pump) => pump,
        Err(error) => return fail(stream, &format!("cannot watch {program}: {error}")),
    };
    ToHost::Started.write(stream)?;
    pump.run(stream, decoder)
}

/// Our ends of what a command reads and writes.
struct Ends {
    input: Option<File>,
    output: Option<File>,
    errors: Option<File>,
    /// Input and output are of one terminal.
    is_terminal: bool,
}

fn start(exec: &Exec, program: &str) -> io::Result<(Child, Ends)> {
    let mut command = Command::new(program);
    command.args(exec.command.iter().skip(1));
    command.current_dir(exec.directory.as_deref().unwrap_or("/"));
    if std::env::var_os("PATH").is_none() {
        command.env("PATH", PATH);
    }
    command.envs(exec.environment.iter().map(|(name, value)| (name, value)));
    let Some(size) = exec.terminal else {
        command
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn()?;
        let input = child.stdin.take().map(OwnedFd::from).map(File::from);
        // A command that reads slowly must not hold up what else there is.
        if let Some(input) = &input {
            rustix::io::ioctl_fionbio(input, true)?;
        }
        let ends = Ends {
            input,
            output: child.stdout.take().map(OwnedFd::from).map(File::from),
            errors: child.stderr.take().map(OwnedFd::from).map(File::from),
            is_terminal: false,
        };
        return Ok((child, ends));
    };
    let (master, slave) = terminal(size)?;
    command
        .stdin(slave.try_clone()?)
        .stdout(slave.try_clone()?)
        .stderr(slave);
    // SAFETY: both are system calls, which is all that may be made between fork and exec.
    unsafe {
        command.pre_exec(|| {
            rustix::process::setsid()?;
            Ok(rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?)
        });
    }
    let child = command.spawn()?;
    // It still has the command's end of the terminal, which would never hang up.
    drop(command);
    rustix::io::ioctl_fionbio(&master, true)?;
    let ends = Ends {
        input: Some(master.try_clone()?),
        output: Some(master),
        errors: None,
        is_terminal: true,
    };
    Ok((child, ends))
}

/// The two ends of a terminal of that size: ours, and the command's.
fn terminal(size: Size) -> io::Result<(File, File)> {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).map_err(|errno| {
        io::Error::other(format!(
            "no terminal is to be had ({errno}): is devpts mounted on /dev/pts?"
        ))
    })?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let name = ptsname(&master, Vec::new())?;
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let slave = rustix::fs::open(name, flags, Mode::empty())?;
    resize(master.as_fd(), size);
    Ok((File::from(master), File::from(slave)))
}

/// A terminal that cannot have that size keeps the one that it has.
fn resize(terminal: BorrowedFd<'_>, size: Size) {
    let size = Winsize {
        ws_row: size.rows,
        ws_col: size.columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let _ = tcsetwinsize(terminal, size);
}

struct Pump {
    child: Child,
    process: OwnedFd,
    group: Pid,
    ends: Ends,
    /// Standard input that the command has not taken yet.
    waiting: VecDeque<u8>,
    /// Nothing comes behind that.
    is_last: bool,
    has_ended: bool,
}

/// Whether the caller is still there.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Caller {
    There,
    Gone,
}

impl Pump {
    fn new(mut child: Child, ends: Ends) -> io::Result<Self> {
        let group = Pid::from_child(&child);
        let process = match pidfd_open(group, PidfdFlags::empty()) {
            Ok(process) => process,
            Err(errno) => {
                // Nobody would hear of its end.
                child.kill()?;
                child.wait()?;
                return Err(errno.into());
            }
        };
        Ok(Self {
            child,
            process,
            group,
            ends,
            waiting: VecDeque::new(),
            is_last: false,
            has_ended: false,
        })
    }

    fn run(&mut self, stream: &mut impl Stream, mut decoder: Decoder) -> io::Result<()> {
        loop {
            // What came behind the request is here already.
            while let Some(heard) = self.next(&mut decoder, stream)? {
                if heard == Caller::Gone {
                    return Ok(());
                }
            }
            let ready = self.wait(stream)?;
            if ready.stream && decoder.fill(stream)? == 0 {
                return Ok(());
            }
            if ready.input {
                self.feed(stream)?;
            }
            if ready.output {
                self.pass_output(stream)?;
            }
            if ready.errors {
                self.pass_errors(stream)?;
            }
            if ready.ended {
                return self.finish(stream);
            }
        }
    }

    /// Does what the next frame says; nothing if none has come.
    fn next(&mut self, decoder: &mut Decoder, stream: &mut impl Stream) -> io::Result<Option<Caller>> {
        let message = match decoder.take() {
            Ok(None) => return Ok(None),
            Ok(Some(frame)) => ToGuest::decode(&frame),
            Err(error) => Err(error),
        };
        match message {
            Ok(ToGuest::Data(bytes)) => {
                if self.waiting.len() + bytes.len() > WINDOW_BYTES {
                    fail(stream, "more of standard input has come than was asked for")?;
                    return Ok(Some(Caller::Gone));
                }
                self.waiting.extend(bytes);
                self.feed(stream)?;
            }
            Ok(ToGuest::End) => {
                self.is_last = true;
                self.feed(stream)?;
            }
            Ok(ToGuest::Signal(number)) => {
                // SAFETY: the number is only handed to the kernel, which knows which there are.
                let signal = unsafe { Signal::from_raw_unchecked(i32::from(number)) };
                // One that has just ended hears no signal any more.
                let _ = kill_process_group(self.group, signal);
            }
            Ok(ToGuest::Resize(size)) => {
                if let (true, Some(output)) = (self.ends.is_terminal, &self.ends.output) {
                    resize(output.as_fd(), size);
                }
            }
            Ok(ToGuest::Request(_)) => {
                fail(stream, "one command is run by each connection")?;
                return Ok(Some(Caller::Gone));
            }
            Err(error) => {
                fail(stream, &joined(&error))?;
                return Ok(Some(Caller::Gone));
            }
        }
        Ok(Some(Caller::There))
    }

    fn wait(&self, stream: &impl Stream) -> io::Result<Ready> {
        let mut polled = vec![
            PollFd::new(stream, PollFlags::IN),
            PollFd::new(&self.process, PollFlags::IN),
        ];
        let Ends {
            input,
            output,
            errors,
            ..
        } = &self.ends;
        let fed = input.as_ref().filter(|_| !self.waiting.is_empty());
        let ends = [
            (output.as_ref(), PollFlags::IN),
            (errors.as_ref(), PollFlags::IN),
            (fed, PollFlags::OUT),
        ];
        let mut places = [None; 3];
        for (place, (end, events)) in places.iter_mut().zip(ends) {
            if let Some(end) = end {
                *place = Some(polled.len());
                polled.push(PollFd::from_borrowed_fd(end.as_fd(), events));
            }
        }
        while let Err(errno) = poll(&mut polled, None) {
            if errno != Errno::INTR {
                return Err(errno.into());
            }
        }
        let is_ready = |place: Option<usize>| {
            let polled = place.and_then(|place| polled.get(place));
            polled.is_some_and(|polled| !polled.revents().is_empty())
        };
        Ok(Ready {
            stream: is_ready(Some(0)),
            ended: is_ready(Some(1)),
            output: is_ready(places[0]),
            errors: is_ready(places[1]),
            input: is_ready(places[2]),
        })
    }

    /// Gives the command what waits for it, and says how much of it is gone.
    fn feed(&mut self, stream: &mut impl Stream) -> io::Result<()> {
        let mut taken = 0;
        while !self.waiting.is_empty() {
            let Some(input) = &mut self.ends.input else {
                // It has closed its standard input: nobody will read this.
                taken += self.waiting.len();
                self.waiting.clear();
                break;
            };
            let (first, _) = self.waiting.as_slices();
            match input.write(first) {
                Ok(written) => {
                    taken += written;
                    self.waiting.drain(..written);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => self.ends.input = None,
            }
        }
        if self.waiting.is_empty() && self.is_last && !self.ends.is_terminal {
            self.ends.input = None;
        }
        match u32::try_from(taken) {
            Ok(0) | Err(_) => Ok(()),
            Ok(taken) => ToHost::Taken(taken).write(stream),
        }
    }

    fn pass_output(&mut self, stream: &mut impl Stream) -> io::Result<usize> {
        pass(&mut self.ends.output, stream, |bytes| ToHost::Output(bytes))
    }

    fn pass_errors(&mut self, stream: &mut impl Stream) -> io::Result<usize> {
        pass(&mut self.ends.errors, stream, |bytes| ToHost::Errors(bytes))
    }

    /// Sends what a terminal still has to say: until nobody has it any more, it has been still for a while, or that is enough.
    fn drain_terminal(&mut self, stream: &mut impl Stream) -> io::Result<()> {
        let mut left = TERMINAL_BYTES_MAX;
        while let Some(output) = &self.ends.output {
            let mut polled = [PollFd::new(output, PollFlags::IN)];
            if poll(&mut polled, Some(&TERMINAL_STILL)).is_ok_and(|ready| ready == 0) {
                break;
            }
            left = left.saturating_sub(self.pass_output(stream)?);
            if left == 0 {
                break;
            }
        }
        Ok(())
    }

    /// The command has ended: sends what its pipes hold, and how it has ended.
    fn finish(&mut self, stream: &mut impl Stream) -> io::Result<()> {
        let status = self.child.wait()?;
        self.has_ended = true;
        if self.ends.is_terminal {
            self.drain_terminal(stream)?;
        } else {
            // As much as there is now: what the command has left running may write for ever.
            drain(&mut self.ends.output, stream, |bytes| ToHost::Output(bytes))?;
            drain(&mut self.ends.errors, stream, |bytes| ToHost::Errors(bytes))?;
        }
        let number = |number: i32| u8::try_from(number).unwrap_or(u8::MAX);
        let exit = match (status.code(), status.signal()) {
            (Some(code), _) => Exit::Code(number(code)),
            (None, signal) => Exit::Signal(number(signal.unwrap_or_default())),
        };
        ToHost::Exited(exit).write(stream)
    }
}

/// Sends what a pipe holds now.
fn drain(
    end: &mut Option<File>,
    stream: &mut impl Stream,
    message: fn(&[u8]) -> ToHost<'_>,
) -> io::Result<()> {
    let mut left = match end {
        Some(end) => usize::try_from(rustix::io::ioctl_fionread(end)?).unwrap_or_default(),
        None => 0,
    };
    while left > 0 {
        match pass(end, stream, message)? {
            0 => break,
            read => left = left.saturating_sub(read),
        }
    }
    Ok(())
}

/// Reads once and sends what that was: so many bytes, none when there is no more, for now or for ever.
fn pass(
    end: &mut Option<File>,
    stream: &mut impl Stream,
    message: fn(&[u8]) -> ToHost<'_>,
) -> io::Result<usize> {
    let Some(open) = end else {
        return Ok(0);
    };
    let mut bytes = [0; DATA_BYTES];
    match open.read(&mut bytes) {
        Err(error) if [io::ErrorKind::WouldBlock, io::ErrorKind::Interrupted].contains(&error.kind()) => {
            Ok(0)
        }
        Ok(read) if read > 0 => {
            let (sent, _) = bytes.split_at(read);
            message(sent).write(stream)?;
            Ok(read)
        }
        // EIO is how a terminal says that nobody has it any more.
        Ok(_) | Err(_) => {
            *end = None;
            Ok(0)
        }
    }
}

struct Ready {
    stream: bool,
    ended: bool,
    output: bool,
    errors: bool,
    input: bool,
}

impl Drop for Pump {
    fn drop(&mut self) {
        if !self.has_ended {
            // Whoever has wanted it is gone.
            let _ = kill_process_group(self.group, Signal::KILL);
            let _ = self.child.wait();
        }
    }
}
