//! A private iSCSI target: one tgtd with one target, its state in a directory of its own, gone with its owner.
//!
//! ```text
//!  start ──► serving ──stop──► stopped (SIGSTOP)
//!              │  ▲ ◄─continue───┘ │
//!         kill │  │ restart        │ kill
//!              ▼  │                ▼
//!             dead ◄───────────────┘
//! ```
//!
//! The control socket lies in the directory too, so two targets cannot meet.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::Outcome;
use crate::harness::daemon::{self, Daemon};
use crate::harness::hosts::Host;
use crate::process::Process;

mod plan;

use plan::Account;
pub use plan::{Lun, Plan};

/// A running target, or a dead one that can be started again. Dropping it kills tgtd and removes its directory.
#[derive(Debug)]
pub struct Target {
    directory: tempfile::TempDir,
    plan: Plan,
    host: Option<Host>,
    address: SocketAddr,
    daemon: Option<Daemon>,
}

/// The name of the one target.
pub const NAME: &str = "iqn.2026-01.test.coracle:disk";
/// tgtd says this and goes on without a portal.
const PORT_TAKEN: &str = "unable to bind server socket";
const READY_WITHIN: Duration = Duration::from_secs(20);
const ATTEMPTS_MAX: u32 = 50;

/// The caching mode page (SBC-3 6.4.5) of tgtd with WCE clear; it differs from tgtd's own in the third field alone.
const NO_WRITE_CACHE: &str =
    "mode_page=8:0:18:0x10:0:0xff:0xff:0:0:0xff:0xff:0xff:0xff:0x80:0x14:0:0:0:0:0:0";

impl Target {
    /// Starts a target on loopback and waits until it serves.
    ///
    /// # Errors
    ///
    /// When tgtd is not installed, or does not do what it is told.
    pub fn start(plan: Plan) -> Outcome<Self> {
        Self::spawn(plan, None, IpAddr::V4(Ipv4Addr::LOCALHOST))
    }

    /// The same on another host, where it listens on all addresses.
    ///
    /// # Errors
    ///
    /// As for [`Target::start`].
    pub fn start_on(host: &Host, plan: Plan) -> Outcome<Self> {
        Self::spawn(plan, Some(host.again()?), IpAddr::V4(Ipv4Addr::UNSPECIFIED))
    }

    fn spawn(plan: Plan, host: Option<Host>, listen: IpAddr) -> Outcome<Self> {
        daemon::expect_installed(&["tgtd", "tgtadm"])?;
        let directory = tempfile::Builder::new().prefix("coracle-target-").tempdir()?;
        let mut target = Self {
            directory,
            plan,
            host,
            address: SocketAddr::new(listen, 0),
            daemon: None,
        };
        for (number, lun) in (1..).zip(&target.plan.luns) {
            if lun.image.is_none() {
                std::fs::File::create(target.image(number)?)?.set_len(lun.bytes)?;
            }
        }
        for _ in 0..ATTEMPTS_MAX {
            target.address.set_port(daemon::next_port());
            if target.launch()? {
                target.configure()?;
                return Ok(target);
            }
        }
        Err(format!("{ATTEMPTS_MAX} ports are all taken").into())
    }

    /// The address and port of the portal.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The URL of a logical unit, by way of the portal itself.
    pub fn url(&self, lun: usize) -> String {
        url(self.address, lun)
    }

    /// The file with the bytes of a logical unit, for a judge to read.
    ///
    /// # Errors
    ///
    /// When the target has no such logical unit.
    pub fn image(&self, lun: usize) -> Outcome<PathBuf> {
        let found = lun.checked_sub(1).and_then(|index| self.plan.luns.get(index));
        let found = found.ok_or_else(|| format!("the target has no LUN {lun}"))?;
        let own = || self.directory.path().join(format!("lun{lun}.img"));
        Ok(found.image.clone().unwrap_or_else(own))
    }

    /// tgtd, seen from outside.
    ///
    /// # Errors
    ///
    /// When it is dead.
    pub fn process(&self) -> Outcome<Process> {
        Ok(self.daemon.as_ref().ok_or("the target is dead")?.process())
    }

    /// All that tgtd has said so far, in all its lives.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// Kills tgtd, stopped or not, as `kill -9` does: sessions and reservations are gone, written bytes are not. When it
    /// returns nobody listens.
    ///
    /// # Errors
    ///
    /// When it is dead already, or does not die.
    pub fn kill(&mut self) -> Outcome {
        let daemon = self.daemon.take().ok_or("the target is dead already")?;
        daemon.kill()
    }

    /// Starts a dead target again, at the same place with the same logical units, and waits until it serves.
    ///
    /// # Errors
    ///
    /// When it is not dead, or somebody has taken its port.
    pub fn restart(&mut self) -> Outcome {
        crate::ensure!(self.daemon.is_none(), "the target is not dead");
        let port = self.address;
        crate::ensure!(self.launch()?, "somebody has taken {port}");
        self.configure()
    }

    /// Stops tgtd (SIGSTOP): its sockets stay open, and nobody answers.
    ///
    /// # Errors
    ///
    /// When it is dead.
    pub fn stop(&self) -> Outcome {
        self.signal(Signal::STOP)
    }

    /// Lets a stopped tgtd go on.
    ///
    /// # Errors
    ///
    /// When it is dead.
    pub fn go_on(&self) -> Outcome {
        self.signal(Signal::CONT)
    }

    fn signal(&self, signal: Signal) -> Outcome {
        self.daemon.as_ref().ok_or("the target is dead")?.signal(signal)
    }

    /// Starts tgtd; false when its port is taken.
    fn launch(&mut self) -> Outcome<bool> {
        let said_before = self.log().len();
        let mut command = Command::new("tgtd");
        command.args(["-f", "-C", "0", "-t", &self.plan.threads.to_string()]);
        command.args(["--iscsi", &format!("portal={}", self.address)]);
        command.env("TGT_IPC_SOCKET", self.socket());
        let daemon = Daemon::start(&command, &self.log_path(), self.host.as_ref())?;
        let deadline = Instant::now() + READY_WITHIN;
        loop {
            // tgtd opens its portal before it answers.
            let is_ready = self.admin(&["--mode", "sys", "--op", "show"]).is_ok();
            let said = self.log().split_off(said_before);
            if said.contains(PORT_TAKEN) {
                daemon.kill()?;
                return Ok(false);
            }
            if is_ready {
                self.daemon = Some(daemon);
                return Ok(true);
            }
            let is_in_time = Instant::now() < deadline && daemon.process().is_there();
            crate::ensure!(is_in_time, "tgtd does not answer: {said}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn configure(&self) -> Outcome {
        let target = ["--tid", "1"];
        let op = |words: &[&str]| self.admin(&[&target, words].concat());
        op(&["--mode", "target", "--op", "new", "--targetname", NAME])?;
        for (name, value) in &self.plan.keys {
            op(&[
                "--mode", "target", "--op", "update", "--name", name, "--value", value,
            ])?;
        }
        for (number, lun) in (1..).zip(&self.plan.luns) {
            self.configure_lun(number, lun)?;
        }
        let accounts = [
            (&self.plan.incoming, &[][..]),
            (&self.plan.outgoing, &["--outgoing"][..]),
        ];
        for (account, direction) in accounts {
            let Some(Account { user, secret }) = account else {
                continue;
            };
            let new = [
                "--mode",
                "account",
                "--op",
                "new",
                "--user",
                user,
                "--password",
                secret,
            ];
            self.admin(&new)?;
            op(&[&["--mode", "account", "--op", "bind", "--user", user], direction].concat())?;
        }
        op(&["--mode", "target", "--op", "bind", "--initiator-address", "ALL"])
    }

    fn configure_lun(&self, number: usize, lun: &Lun) -> Outcome {
        let (image, number) = (self.image(number)?.display().to_string(), number.to_string());
        let unit = ["--mode", "logicalunit", "--tid", "1", "--lun", &number];
        let op = |words: &[&str]| self.admin(&[&unit, words].concat());
        let block_bytes = lun.block_bytes.to_string();
        let store = [
            "--bstype",
            "rdwr",
            "--backing-store",
            &image,
            "--blocksize",
            &block_bytes,
        ];
        op(&[&["--op", "new"], &store[..]].concat())?;
        let parameters = [
            (lun.is_thin, "thin_provisioning=1"),
            (lun.is_read_only, "readonly=1"),
            (!lun.has_write_cache, NO_WRITE_CACHE),
        ];
        for (_, parameter) in parameters.iter().filter(|(is_wanted, _)| *is_wanted) {
            op(&["--op", "update", "--params", parameter])?;
        }
        Ok(())
    }

    fn admin(&self, words: &[&str]) -> Outcome {
        let done = Command::new("tgtadm")
            .args(["-C", "0", "--lld", "iscsi"])
            .args(words)
            .env("TGT_IPC_SOCKET", self.socket())
            .env("PATH", daemon::path())
            .output()?;
        crate::ensure!(
            done.status.success(),
            "tgtadm {}: {}",
            words.join(" "),
            String::from_utf8_lossy(&done.stderr).trim()
        );
        Ok(())
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("control")
    }

    fn log_path(&self) -> PathBuf {
        self.directory.path().join("log")
    }
}

/// The URL of a logical unit of a target at this address: of its portal, or of a proxy in front of that.
pub fn url(address: SocketAddr, lun: usize) -> String {
    format!("iscsi://{address}/{NAME}/{lun}")
}

#[cfg(test)]
mod tests;
