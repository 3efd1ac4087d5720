//! A server as the tests of every network need it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use coracle_tests::harness::nfs::protocol::Nfs;
use coracle_tests::harness::nfs::server::{self, Plan};
use coracle_tests::harness::proxy::{Damage, Direction, Fault, Proxy, Step, Then};
use coracle_tests::monitor::Monitor;
use coracle_tests::seed::Seed;
use coracle_tests::{Outcome, ensure};
use rustix::process::Signal;
use serde_json::Value;

use super::IMAGE;
use crate::network::{self, Server, Stepped};

/// A server whose leases and grace are short.
pub(super) struct Storage(server::Server);

const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// Longer than a lease, and than a grace period with what the server takes to notice its end.
const TOO_LONG: Duration = Duration::from_secs(9);

impl Server for Storage {
    fn with_image(bytes: u64) -> Outcome<Self> {
        Ok(Self(server::Server::start(Plan::image(bytes))?))
    }

    fn address(&self) -> SocketAddr {
        self.0.address()
    }

    /// Its lease is recorded beside it.
    fn drive(&self, way: SocketAddr, _: &Path) -> Value {
        network::drive(&server::url(way, IMAGE))
    }

    fn image(&self) -> Outcome<PathBuf> {
        Ok(self.0.path(IMAGE))
    }

    fn kill(&mut self) -> Outcome {
        self.0.kill()
    }

    fn restart(&mut self) -> Outcome {
        self.0.restart()
    }

    fn stop(&self) -> Outcome {
        self.0.stop()
    }

    fn go_on(&self) -> Outcome {
        self.0.go_on()
    }
}

impl Stepped for Storage {
    /// Longer than a third of a lease.
    const IDLE_MS: u64 = 2400;

    fn for_cell(_: &str, _: Step, bytes: u64, _: &mut Seed) -> Outcome<Self> {
        Self::with_image(bytes)
    }

    fn proxy(&self, mode: &str, seed: Seed) -> Outcome<Proxy> {
        let server = self.0.address();
        match mode {
            "volatile" => Proxy::volatile(HERE, server, seed, Nfs::over(&self.0.path("export"))),
            _ => Proxy::knowing(HERE, server, seed, Nfs::default()),
        }
    }

    fn begin_again(&mut self, step: Step, proxy: &Proxy) -> Outcome {
        match step {
            Step::Connect => proxy.cut(),
            // A session outlives its connections; only a server that has forgotten it has it made anew.
            Step::ClientId | Step::Login | Step::Reclaim | Step::Reservation => {
                self.0.kill()?;
                self.0.restart()
            }
            // One that does not let it be reclaimed has it opened by its name.
            Step::Open => {
                self.0.kill()?;
                self.0.forget_clients()?;
                self.0.restart()
            }
            _ => Ok(()),
        }
    }

    fn damage(fault: &str, _: Step, seed: &mut Seed) -> Option<Then> {
        let all: &[Then] = match fault {
            "wrong length" => &[Then::Damage(Damage::Truncated), Then::Damage(Damage::Oversized)],
            "odd answer" => &[
                Then::Damage(Damage::Tag),
                Then::Damage(Damage::Verdict),
                Then::Twice,
            ],
            "wrong sequence" => &[Then::Damage(Damage::Number)],
            _ => &[],
        };
        seed.pick(all).copied()
    }

    fn suffer(&mut self, fault: &str, proxy: &Proxy, monitor: &Monitor) -> Outcome {
        match fault {
            "restart outside grace" => {
                silence(proxy)?;
                self.0.kill()?;
                self.0.restart()?;
                std::thread::sleep(TOO_LONG);
            }
            "restart without records" => {
                self.0.kill()?;
                self.0.forget_clients()?;
                self.0.restart()?;
            }
            "lease expiry" => {
                monitor.signal(Signal::STOP)?;
                pass(proxy)?;
                std::thread::sleep(TOO_LONG);
                monitor.signal(Signal::CONT)?;
            }
            "power and restart" => {
                self.0.kill()?;
                proxy.crash()?;
                self.0.restart()?;
            }
            _ => {}
        }
        Ok(())
    }

    /// Who has to begin again cannot always reclaim, and others wait for the end of grace.
    fn recovered(&self, step: Step, limit: Duration) -> Outcome {
        let deadline = Instant::now() + limit;
        let waits = matches!(
            step,
            Step::ClientId | Step::Login | Step::Reclaim | Step::Reservation | Step::Open
        );
        while waits && self.0.is_in_grace() {
            ensure!(Instant::now() < deadline, "grace does not end: {}", self.0.log());
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

fn silence(proxy: &Proxy) -> Outcome {
    proxy.set(Direction::ToServer, Fault::BlackHole)?;
    proxy.set(Direction::ToClient, Fault::BlackHole)
}

fn pass(proxy: &Proxy) -> Outcome {
    proxy.set(Direction::ToServer, Fault::None)?;
    proxy.set(Direction::ToClient, Fault::None)
}
