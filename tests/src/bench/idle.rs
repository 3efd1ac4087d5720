//! Disks that nobody uses: who has one, what it costs, and what the least would be.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use super::contender::{CORACLE_ASYNC, Contender, QEMU};

use super::measurement::{Figure, idle_cost};
use super::program::{self, Program};
use super::remote::{Client, Unit};
use super::target::{Against, Target};
use crate::Outcome;
use crate::environment::Environment;

/// Who is idle. All of them are at the same time: a busy host may charge a wake-up with a hundred times what it costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Idler {
    /// A thread that does nothing but [`exchanges`].
    Control,
    /// The storage library without a guest.
    Storage,
    /// A monitor with a guest that leaves its disk alone.
    Guest(Contender),
}

/// Everybody.
pub const IDLERS: [Idler; 4] = [
    Idler::Control,
    Idler::Storage,
    Idler::Guest(CORACLE_ASYNC),
    Idler::Guest(QEMU),
];

/// The yardstick.
const CONTROL: Against = Against {
    title: "the control",
    names: &["control"],
};
/// What an idle session may cost: an exchange has a little more to it than a header there and back.
const MULTIPLE_MAX: f64 = 2.0;
/// A session that nobody uses asks as often as this whether the server is there, and is answered.
const PERIOD: Duration = Duration::from_secs(5);
/// A NOP, and its answer.
const MESSAGE_BYTES: usize = 48;

/// How often an idle session asks for a sign of life in so long.
pub fn exchanges(time: Duration) -> u32 {
    u32::try_from(time.as_secs() / PERIOD.as_secs()).unwrap_or(u32::MAX)
}

/// What is to be reached.
pub fn targets() -> Vec<Target> {
    let target = |of| Target {
        of,
        figure: Figure::HostCpu,
        against: CONTROL,
        multiple: MULTIPLE_MAX,
    };
    vec![target(Idler::Storage.name()), target(CORACLE_ASYNC.name)]
}

impl Idler {
    /// Its name in tables and filters.
    pub fn name(self) -> &'static str {
        match self {
            Self::Control => "control",
            Self::Storage => Program::Storage.name(),
            Self::Guest(contender) => contender.name,
        }
    }

    /// The disk that it has, if it has one: each another, as one may lease it.
    pub fn disk(self) -> Option<(Client, Unit)> {
        match self {
            Self::Control => None,
            Self::Storage => Some((Client::Program(Program::Storage), Unit::Cached)),
            Self::Guest(CORACLE_ASYNC) => Some((Client::Guest(CORACLE_ASYNC), Unit::Through)),
            Self::Guest(other) => Some((Client::Guest(other), Unit::Spare)),
        }
    }

    /// CPU time of so long on the disk with this URL.
    ///
    /// # Errors
    ///
    /// When it cannot begin, or is not answered.
    pub fn cost(self, environment: &Environment, url: &str, time: Duration) -> Outcome<Duration> {
        match self {
            Self::Control => control(time),
            Self::Storage => program::idle(url, u64::try_from(time.as_millis())?),
            Self::Guest(contender) => idle_cost(&contender, environment, Path::new(url), time),
        }
    }
}

/// CPU time of this thread for nothing but what an idle session has to do: a timer wakes it, it sends a header to somebody on
/// loopback, and the answer wakes it again.
fn control(time: Duration) -> Outcome<Duration> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut client = TcpStream::connect(listener.local_addr()?)?;
    let (peer, _) = listener.accept()?;
    client.set_nodelay(true)?;
    peer.set_nodelay(true)?;
    // It ends with the connection.
    let _echo = thread::spawn(move || echo(peer));
    let (begun, before) = (Instant::now(), thread_time());
    for number in 1..=exchanges(time) {
        thread::sleep((begun + PERIOD * number).saturating_duration_since(Instant::now()));
        let mut message = [0; MESSAGE_BYTES];
        client.write_all(&message)?;
        client.read_exact(&mut message)?;
    }
    Ok(thread_time().saturating_sub(before))
}

fn echo(mut peer: TcpStream) {
    let mut message = [0; MESSAGE_BYTES];
    while peer.read_exact(&mut message).is_ok() && peer.write_all(&message).is_ok() {}
}

fn thread_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::try_from(time).expect("a thread has used no negative time")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn whoever_has_a_target_is_there_with_a_disk_of_its_own() {
        let units = IDLERS.iter().filter_map(|idler| idler.disk());
        let luns: BTreeSet<usize> = units.map(|(_, unit)| unit.lun()).collect();
        assert_eq!(luns.len(), IDLERS.len() - 1);
        for target in targets() {
            assert!(IDLERS.iter().any(|idler| idler.name() == target.of));
            assert!(
                IDLERS
                    .iter()
                    .any(|idler| target.against.names.contains(&idler.name()))
            );
        }
    }

    #[test]
    fn the_control_costs_something_and_hardly_anything() {
        let cost = control(PERIOD).expect("loopback is there");
        assert!(
            cost > Duration::ZERO && cost < Duration::from_millis(100),
            "{cost:?}"
        );
        assert_eq!(exchanges(Duration::from_secs(30)), 6);
    }
}
