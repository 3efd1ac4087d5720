//! One run of a machine: configured, started, watched until its monitor has ended.
//!
//! ```text
//! open -> configure -> start --> watch --(the monitor ends)----------------> Outcome
//!                                  |                                           ^
//!                                  `-(a signal, Ctrl-A x)--> Rung by rung -----'
//! ```

use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use thiserror::Error;

use super::console::{Console, Input, Pumped};
use super::machine::Step;
use super::monitor::{Monitor, MonitorError};
use crate::client::{Client, ClientError, Request};
use crate::deadline::{Deadline, wait_ready};
use crate::ladder::Rung;
use crate::output::note;
use crate::signals::{Signals, status_of};
use crate::terminal::TerminalError;

/// How long a monitor that has closed its connection may take to end.
const END_WAIT: Duration = Duration::from_secs(2);

/// Why a machine did not run to its end.
#[derive(Debug, Error)]
pub(crate) enum SessionError {
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    #[error("cannot set {part}")]
    Configure {
        part: String,
        #[source]
        source: ClientError,
    },
    #[error("cannot {what}: {fault}")]
    Refused { what: String, fault: String },
    #[error("cannot start the machine")]
    Start(#[source] ClientError),
    #[error(transparent)]
    Terminal(#[from] TerminalError),
    #[error("cannot watch the machine")]
    Watch(#[from] io::Error),
    #[error("the monitor with process id {0} has been killed and has not ended: the kernel holds it")]
    Survived(i32),
}

/// Who asked a machine to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    /// A signal to this process, by number.
    BySignal(i32),
    /// The user, by Ctrl-A x.
    ByKey,
}

/// How a machine has ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct Outcome {
    /// The monitor's status.
    pub(super) monitor: ExitStatus,
    /// Who asked, if it has not ended by itself.
    pub(super) asked: Option<Asked>,
}

impl Outcome {
    /// The status that `run` ends with: 128 and the signal if a signal has ended it, else the monitor's,
    /// which is the guest's.
    pub(super) fn status(&self) -> u8 {
        match (self.asked, self.monitor.code()) {
            (Some(Asked::BySignal(signal)), _) => status_of(signal),
            (_, Some(code)) => u8::try_from(code).unwrap_or(u8::MAX),
            (_, None) => status_of(self.monitor.signal().unwrap_or_default()),
        }
    }
}

/// A monitor, and all that is needed to see it through.
#[derive(Debug)]
pub(super) struct Session<'a> {
    monitor: Monitor,
    client: Client<'a>,
    signals: &'a Signals,
    guest_wait: Duration,
    console: Option<Console>,
    asked: Option<Asked>,
    climb: Option<(Rung, Deadline)>,
}

/// What a wait has found; several may be true.
#[derive(Clone, Copy, Debug, Default)]
struct Ready {
    ended: bool,
    signalled: bool,
    typed: bool,
    pipe: bool,
}

impl<'a> Session<'a> {
    /// Takes over `monitor`, whose API will be at `socket`.
    pub(super) fn new(
        monitor: Monitor,
        socket: &std::path::Path,
        signals: &'a Signals,
        guest_wait: Duration,
    ) -> Self {
        let client = Client::new(socket);
        Self {
            monitor,
            client,
            signals,
            guest_wait,
            console: None,
            asked: None,
            climb: None,
        }
    }

    /// Configures the machine by `steps`, lets it go by `start` and watches it until its monitor has ended.
    ///
    /// # Errors
    ///
    /// When the machine does not start, or cannot be watched. The monitor has ended in any case.
    pub(super) fn run(mut self, steps: &[Step], start: &Step, input: Input) -> Result<Outcome, SessionError> {
        match self.begin(steps, start, input) {
            Err(error) if is_interrupted(&error) => {}
            begun => begun?,
        }
        self.watch()
    }

    /// Configures the machine by `steps` and lets it go by `start`; its monitor is the caller's then.
    ///
    /// # Errors
    ///
    /// When the machine does not start. The monitor has ended then.
    pub(super) fn start(mut self, steps: &[Step], start: &Step) -> Result<Monitor, SessionError> {
        self.begin(steps, start, Input::Nothing)?;
        Ok(self.monitor)
    }

    fn begin(&mut self, steps: &[Step], start: &Step, input: Input) -> Result<(), SessionError> {
        self.monitor.await_api(&self.client, self.signals)?;
        let client = self.client.clone().interrupted_by(self.signals.as_fd());
        for step in steps {
            let sent = client.send("PUT", &step.path, &step.body);
            sent.map_err(|error| configure_error(&step.part, error))?;
        }
        if let Some(pipe) = self.monitor.take_stdin() {
            self.console = Some(Console::open(pipe, input)?);
        }
        let body = start.body.to_string();
        let request = Request {
            method: "PUT",
            path: &start.path,
            body: Some(&body),
            wait: start.wait,
        };
        match client.call(request).map(drop) {
            // A guest may be so short that its monitor ends before it has answered.
            Err(ClientError::Closed { .. } | ClientError::Io { .. })
                if self.monitor.process().wait(Deadline::after(END_WAIT))? =>
            {
                Ok(())
            }
            started => started.map_err(|error| start_error(&start.part, error)),
        }
    }

    fn watch(&mut self) -> Result<Outcome, SessionError> {
        loop {
            let ready = self.wait()?;
            if ready.ended {
                return Ok(Outcome {
                    monitor: self.monitor.reap()?,
                    asked: self.asked,
                });
            }
            if ready.signalled
                && let Some(signal) = self.signals.take()
            {
                self.stop(Asked::BySignal(signal))?;
            }
            if ready.typed || ready.pipe {
                self.pump(ready)?;
            }
            if self.climb.is_some_and(|(_, deadline)| deadline.passed()) {
                self.climb_on()?;
            }
        }
    }

    fn wait(&self) -> Result<Ready, SessionError> {
        let mut descriptors = vec![
            PollFd::new(&self.monitor, PollFlags::IN),
            PollFd::new(self.signals, PollFlags::IN),
        ];
        if let Some(console) = &self.console {
            descriptors.push(PollFd::from_borrowed_fd(console.keyboard(), PollFlags::IN));
            let pipe = console.blocked_pipe();
            descriptors.extend(pipe.map(|pipe| PollFd::from_borrowed_fd(pipe, PollFlags::OUT)));
        }
        wait_ready(&mut descriptors, self.climb.map(|(_, deadline)| deadline))?;
        let mut found = descriptors
            .iter()
            .map(|descriptor| !descriptor.revents().is_empty());
        let mut next = || found.next().unwrap_or_default();
        Ok(Ready {
            ended: next(),
            signalled: next(),
            typed: next(),
            pipe: next(),
        })
    }

    /// Moves what was typed on; a console that is over is closed, and the machine runs on.
    fn pump(&mut self, ready: Ready) -> Result<(), SessionError> {
        let Some(console) = &mut self.console else {
            return Ok(());
        };
        let pumped = if ready.typed {
            console.read()?
        } else {
            console.flush()?
        };
        match pumped {
            Pumped::Closed => self.console = None,
            Pumped::Open { stops } => {
                for _ in 0..stops {
                    self.stop(Asked::ByKey)?;
                }
            }
        }
        Ok(())
    }

    /// Begins to stop the machine; who asks again is tired of waiting for the step that was taken.
    fn stop(&mut self, asked: Asked) -> Result<(), SessionError> {
        self.asked = Some(self.asked.unwrap_or(asked));
        match self.climb {
            None => self.take(Rung::Guest),
            Some(_) => self.climb_on(),
        }
    }

    fn climb_on(&mut self) -> Result<(), SessionError> {
        let Some((rung, _)) = self.climb else {
            return Ok(());
        };
        match rung.next() {
            Some(next) => self.take(next),
            None => Err(SessionError::Survived(
                self.monitor.process().pid().as_raw_nonzero().get(),
            )),
        }
    }

    fn take(&mut self, rung: Rung) -> Result<(), SessionError> {
        note(match rung {
            Rung::Guest => "the guest is asked to shut down; ask again to end it at once",
            Rung::Monitor => "the monitor is asked to end",
            Rung::Kill => "the monitor is killed",
        });
        let wait = match rung.take(&self.client, self.monitor.process()) {
            Ok(()) => rung.wait(self.guest_wait),
            // A machine that has not started has no keyboard, and one that does not answer has none that
            // can be pressed: the next step is due at once.
            Err(_) => Duration::ZERO,
        };
        self.climb = Some((rung, Deadline::after(wait)));
        Ok(())
    }
}

/// A refusal speaks for itself; which request it answers is only of use when there was no answer.
fn configure_error(part: &str, error: ClientError) -> SessionError {
    match error {
        ClientError::Refused { fault, .. } => SessionError::Refused {
            what: format!("set {part}"),
            fault,
        },
        source => SessionError::Configure {
            part: part.to_owned(),
            source,
        },
    }
}

fn start_error(what: &str, error: ClientError) -> SessionError {
    match error {
        ClientError::Refused { fault, .. } => SessionError::Refused {
            what: what.to_owned(),
            fault,
        },
        source => SessionError::Start(source),
    }
}

fn is_interrupted(error: &SessionError) -> bool {
    match error {
        SessionError::Configure { source, .. } | SessionError::Start(source) => {
            matches!(source, ClientError::Interrupted { .. })
        }
        SessionError::Monitor(error) => matches!(error, MonitorError::Interrupted),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(wait_status: i32, asked: Option<Asked>) -> u8 {
        Outcome {
            monitor: ExitStatus::from_raw(wait_status),
            asked,
        }
        .status()
    }

    #[test]
    fn the_status_is_the_guests_unless_a_signal_has_ended_it() {
        assert_eq!(status(7 << 8, None), 7);
        assert_eq!(status(143 << 8, None), 143);
        assert_eq!(status(libc::SIGKILL, None), 137);
        assert_eq!(status(0, Some(Asked::ByKey)), 0);
        assert_eq!(status(0, Some(Asked::BySignal(libc::SIGTERM))), 143);
        assert_eq!(status(libc::SIGKILL, Some(Asked::BySignal(libc::SIGINT))), 130);
    }
}
