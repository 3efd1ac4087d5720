//! What the verbs that talk with a host have in common: their roles, and the line that they print.

use instrument::cmdline::{ArgumentError, Command};
use instrument::histogram::Histogram;
use instrument::time::{Clock, Microseconds};

use super::Failure;
use crate::{cpu, say};

/// What is done with a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// So many bytes go to the host.
    Send(u64),
    /// Whatever the host sends is taken, until it has no more.
    Receive,
    /// So many times so many bytes go there, and come back.
    Ask(u64, u64),
}

/// What came of it.
pub struct Told {
    /// Whose line it is.
    pub verb: &'static str,
    /// What was done.
    pub role: Role,
    /// Bytes that have come.
    pub received: u64,
    /// How long the data took.
    pub ticks: u64,
    /// What was sent.
    pub packets: u64,
    /// What was sent again.
    pub repeats: u64,
    /// Interrupts that were taken.
    pub interrupts: u64,
    /// Features agreed on.
    pub features: u64,
}

const MIB: u64 = 1 << 20;

/// What a command's `role=`, `mib=`, `count=` and `bytes=` say.
pub fn role(command: &Command<'static>) -> Result<Role, Failure> {
    let bytes = command.number("mib", 64)?.saturating_mul(MIB);
    match command.text("role") {
        None | Some("send") => Ok(Role::Send(bytes)),
        Some("receive") => Ok(Role::Receive),
        Some("ask") => Ok(Role::Ask(
            command.number("count", 1000)?,
            command.within("bytes", 64, 1..=1460, "1 to 1460")?,
        )),
        Some(value) => Err(ArgumentError::Impossible {
            key: "role",
            value,
            choices: "send, receive, ask",
        }
        .into()),
    }
}

/// A connection that is being made, or used.
pub trait Talk {
    /// Takes in what has come, and says what there is to say; returns whether there was anything.
    fn turn(&mut self) -> Result<bool, Failure>;

    /// Waits for a while, or until something has come; `start` is when the waiting began.
    fn pause(&mut self, start: u64) -> Result<(), Failure>;

    /// Why there is no connection, if there will be none.
    fn refusal(&self) -> Option<&'static str>;

    /// Has so many bytes more to send.
    fn send(&mut self, bytes: u64);

    /// How many bytes have come.
    fn received(&self) -> u64;

    /// Goes on until something is so.
    fn until(&mut self, is_so: impl Fn(&Self) -> bool) -> Result<(), Failure> {
        let mut progress = cpu::ticks();
        loop {
            let has_moved = self.turn()?;
            if let Some(why) = self.refusal() {
                return Err(Failure::Check(why));
            }
            if is_so(self) {
                return Ok(());
            }
            if has_moved {
                progress = cpu::ticks();
            } else {
                self.pause(progress)?;
            }
        }
    }

    /// Sends so many times so many bytes, and waits for as many each time.
    fn ask(&mut self, count: u64, bytes: u64, latency: &mut Histogram) -> Result<(), Failure> {
        for turn in 1..=count {
            let asked = cpu::ticks();
            self.send(bytes);
            self.until(|talk| talk.received() >= turn * bytes)?;
            latency.record(cpu::ticks().saturating_sub(asked));
        }
        Ok(())
    }
}

impl Told {
    /// Prints it.
    pub fn print(&self, latency: &Histogram, clock: Clock) {
        let nanoseconds = u128::from(clock.nanoseconds(self.ticks)).max(1);
        let (role, bytes) = match self.role {
            Role::Send(bytes) => ("send", bytes),
            Role::Receive => ("receive", self.received),
            Role::Ask(..) => ("ask", self.received),
        };
        let microseconds = |ticks: u64| Microseconds(clock.nanoseconds(ticks));
        say!(
            "{}: role={role} bytes={bytes} mb_per_s={} lat_us_p50={} lat_us_p99={} lat_us_p999={} lat_us_max={} turns={} \
             packets={} repeats={} irqs={} ms={} features={:#x}\n",
            self.verb,
            u128::from(bytes) * 1000 / nanoseconds,
            microseconds(latency.percentile(500)),
            microseconds(latency.percentile(990)),
            microseconds(latency.percentile(999)),
            microseconds(latency.max()),
            latency.count(),
            self.packets,
            self.repeats,
            self.interrupts,
            nanoseconds / 1_000_000,
            self.features,
        );
    }
}
