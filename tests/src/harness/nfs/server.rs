//! A private NFS server: one nfs-ganesha with its exports and its recovery records in a directory of its own, gone with
//! its owner.
//!
//! ```text
//!  start ──► serving ──stop──► stopped (SIGSTOP)
//!              │  ▲ ◄─go on──────┘ │
//!         kill │  │ restart        │ kill
//!              ▼  │                ▼
//!             dead ◄───────────────┘
//! ```
//!
//! NFSv4 needs nothing else. NFSv3 needs an rpcbind, of which a network has one, and which is found by a socket in `/run`
//! besides: so it has a host's network and a `/run` of its own, and the server is started into both.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::Outcome;
use crate::harness::daemon::{self, Daemon};
use crate::harness::hosts::Host;
use crate::process::Process;

mod plan;

pub use plan::{Export, Plan, Squash};

/// A running server, or a dead one that can be started again. Dropping it kills ganesha and removes its directory.
#[derive(Debug)]
pub struct Server {
    directory: tempfile::TempDir,
    plan: Plan,
    host: Option<Host>,
    address: SocketAddr,
    /// Before the one that registers with it, so that it is the last to go.
    daemon: Option<Daemon>,
    registry: Option<Daemon>,
    /// The second in which it was ready last.
    started: u64,
}

/// ganesha says this and hangs.
const PORT_TAKEN: &str = "Address already in use";
/// ganesha says these of its grace periods.
const GRACE_BEGINS: &str = "NFS Server Now IN GRACE";
const GRACE_ENDS: &str = "NFS Server Now NOT IN GRACE";
/// For its C library: memory that is freed is kept. By NFSv4 it gives the buffer of each READ of 128 KiB back to the kernel
/// otherwise, and takes it again for the next, which is half of its time; by NFSv3, which QEMU speaks, it happens not to.
const KEEPS_MEMORY: [(&str, &str); 2] = [
    ("MALLOC_TRIM_THRESHOLD_", "268435456"),
    ("MALLOC_MMAP_THRESHOLD_", "33554432"),
];
/// No bus of this machine: servers would want one name there.
const NO_BUS: &str = "unix:path=/nonexistent";
const REGISTRY_PORT: u16 = 111;
const READY_WITHIN: Duration = Duration::from_secs(20);
const ANSWER_WITHIN: Duration = Duration::from_secs(1);
const ATTEMPTS_MAX: u32 = 50;

impl Server {
    /// Starts a server on loopback and waits until it serves.
    ///
    /// # Errors
    ///
    /// When ganesha is not installed, does not come up, or is to speak NFSv3.
    pub fn start(plan: Plan) -> Outcome<Self> {
        crate::ensure!(!plan.has_v3, "NFSv3 needs a host of its own");
        Self::spawn(plan, None, IpAddr::V4(Ipv4Addr::LOCALHOST))
    }

    /// The same on another host, where it listens on all addresses.
    ///
    /// # Errors
    ///
    /// When ganesha is not installed or does not come up.
    pub fn start_on(host: &Host, plan: Plan) -> Outcome<Self> {
        Self::spawn(plan, Some(host.again()?), IpAddr::V4(Ipv4Addr::UNSPECIFIED))
    }

    fn spawn(plan: Plan, host: Option<Host>, listen: IpAddr) -> Outcome<Self> {
        daemon::expect_installed(&["ganesha.nfsd"])?;
        let directory = tempfile::Builder::new().prefix("coracle-nfs-").tempdir()?;
        let mut server = Self {
            directory,
            plan,
            host,
            address: SocketAddr::new(listen, 0),
            daemon: None,
            registry: None,
            started: 0,
        };
        std::fs::create_dir(server.directory.path().join("recovery"))?;
        for export in &server.plan.exports {
            std::fs::create_dir_all(server.path(&export.path))?;
            for (name, bytes) in &export.images {
                let path = server.path(&export.path).join(name);
                std::fs::File::create(path)?.set_len(*bytes)?;
            }
        }
        if server.plan.has_v3 {
            server.registry = Some(server.start_registry()?);
        }
        for _ in 0..ATTEMPTS_MAX {
            server.address.set_port(daemon::next_port());
            if server.launch()? {
                return Ok(server);
            }
        }
        Err(format!("{ATTEMPTS_MAX} ports are all taken").into())
    }

    /// Where the server listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The URL of a path below the root, such as `export/image.raw`, by way of the server itself.
    pub fn url(&self, path: &str) -> String {
        url(self.address, path)
    }

    /// The port at which NFSv3 clients mount, if the server speaks that.
    pub fn mount_port(&self) -> Option<u16> {
        self.plan.has_v3.then(|| mount_port(self.address.port()))
    }

    /// Where a path below the root is on this machine, for a judge to read: `export` and `export/image.raw`.
    pub fn path(&self, path: &str) -> PathBuf {
        self.directory.path().join("exports").join(path)
    }

    /// ganesha, seen from outside.
    ///
    /// # Errors
    ///
    /// When it is dead.
    pub fn process(&self) -> Outcome<Process> {
        Ok(self.alive()?.process())
    }

    /// All that ganesha has said so far, in all its lives.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// Whether it waits for those who had something open before it was started, and lets nobody else open or lock.
    pub fn is_in_grace(&self) -> bool {
        let log = self.log();
        let last = |words: &str| log.rfind(words);
        last(GRACE_BEGINS) > last(GRACE_ENDS)
    }

    /// Kills ganesha, stopped or not, as `kill -9` does: sessions, opens and locks are gone; written bytes and the records
    /// of who may reclaim are not. When it returns nobody listens.
    ///
    /// # Errors
    ///
    /// When it is dead already, or does not die.
    pub fn kill(&mut self) -> Outcome {
        self.daemon.take().ok_or("the server is dead already")?.kill()
    }

    /// Starts a dead server again, at the same place with the same exports, and waits until it serves: those who had a
    /// session may reclaim then, and all others wait for the end of the grace period.
    ///
    /// # Errors
    ///
    /// When it is not dead, or somebody has taken its port.
    pub fn restart(&mut self) -> Outcome {
        crate::ensure!(self.daemon.is_none(), "the server is not dead");
        // ganesha tells its lives apart by the second: client ids, sessions and verifiers have it in them.
        while second()? == self.started {
            std::thread::sleep(Duration::from_millis(10));
        }
        let port = self.address;
        crate::ensure!(self.launch()?, "somebody has taken {port}");
        Ok(())
    }

    /// Forgets who may reclaim: a server that is started after this has never seen a client.
    ///
    /// # Errors
    ///
    /// When it is not dead.
    pub fn forget_clients(&self) -> Outcome {
        crate::ensure!(self.daemon.is_none(), "the server is not dead");
        let records = self.directory.path().join("recovery");
        std::fs::remove_dir_all(&records)?;
        Ok(std::fs::create_dir(records)?)
    }

    /// Stops ganesha (SIGSTOP): its sockets stay open, and nobody answers.
    ///
    /// # Errors
    ///
    /// When it is dead.
    pub fn stop(&self) -> Outcome {
        self.alive()?.signal(Signal::STOP)
    }

    /// Lets a stopped ganesha go on.
    ///
    /// # Errors
    ///
    /// When it is dead.
    pub fn go_on(&self) -> Outcome {
        self.alive()?.signal(Signal::CONT)
    }

    fn alive(&self) -> Outcome<&Daemon> {
        Ok(self.daemon.as_ref().ok_or("the server is dead")?)
    }

    /// Starts ganesha; false when its port is taken.
    fn launch(&mut self) -> Outcome<bool> {
        let said_before = self.log().len();
        let directory = self.directory.path();
        let configuration = directory.join("ganesha.conf");
        std::fs::write(&configuration, self.plan.configuration(directory, self.address))?;
        let mut command = match &self.registry {
            Some(registry) => {
                let mut inside = Command::new("nsenter");
                inside.arg(format!("--mount=/proc/{}/ns/mnt", registry.process().0));
                inside.arg("ganesha.nfsd");
                inside
            }
            None => Command::new("ganesha.nfsd"),
        };
        command.args(["-F", "-L", "STDERR", "-f"]).arg(&configuration);
        command.arg("-p").arg(directory.join("pid"));
        command.env("DBUS_SYSTEM_BUS_ADDRESS", NO_BUS);
        command.envs(KEEPS_MEMORY);
        let daemon = Daemon::start(&command, &self.log_path(), self.host.as_ref())?;
        let deadline = Instant::now() + READY_WITHIN;
        loop {
            let is_ready = self.answers();
            let said = self.log().split_off(said_before);
            if said.contains(PORT_TAKEN) {
                daemon.kill()?;
                return Ok(false);
            }
            if is_ready {
                // It has looked at the clock before.
                self.started = second()?;
                self.daemon = Some(daemon);
                return Ok(true);
            }
            let is_in_time = Instant::now() < deadline && daemon.process().is_there();
            crate::ensure!(is_in_time, "ganesha does not answer: {said}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Starts an rpcbind with a `/run` of its own and waits until it listens.
    fn start_registry(&self) -> Outcome<Daemon> {
        daemon::expect_installed(&["rpcbind"])?;
        let own_run = "mount -t tmpfs none /run && exec rpcbind -f";
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", own_run]);
        let registry = Daemon::start(&command, &self.log_path(), self.host.as_ref())?;
        let deadline = Instant::now() + READY_WITHIN;
        let socket = format!("/proc/{}/root/run/rpcbind.sock", registry.process().0);
        while !(Path::new(&socket).exists() && self.connect(REGISTRY_PORT).is_ok()) {
            let is_in_time = Instant::now() < deadline && registry.process().is_there();
            crate::ensure!(is_in_time, "rpcbind does not listen: {}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(registry)
    }

    /// Whether the server answers a NULL call (RFC 5531, 12.1).
    fn answers(&self) -> bool {
        const XID: u32 = 0x6361_6c6c;
        let version = if self.plan.minor_versions.is_empty() { 3 } else { 4 };
        // A call of RPC version 2 to procedure 0 of NFS, with AUTH_NONE twice, in one record.
        let call = [1 << 31 | 40, XID, 0, 2, 100_003, version, 0, 0, 0, 0, 0];
        let call: Vec<u8> = call.into_iter().flat_map(u32::to_be_bytes).collect();
        let asked = self.connect(self.address.port()).and_then(|mut stream| {
            stream.set_read_timeout(Some(ANSWER_WITHIN))?;
            stream.write_all(&call)?;
            let mut answer = [0; 28];
            stream.read_exact(&mut answer)?;
            Ok(answer)
        });
        // Accepted, and done.
        asked.is_ok_and(|answer| answer.ends_with(&[0; 4]))
    }

    fn connect(&self, port: u16) -> std::io::Result<TcpStream> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let connect = || TcpStream::connect_timeout(&address, ANSWER_WITHIN);
        match &self.host {
            Some(host) => host
                .inside(connect)
                .unwrap_or_else(|_| Err(std::io::ErrorKind::NotFound.into())),
            None => connect(),
        }
    }

    fn log_path(&self) -> PathBuf {
        self.directory.path().join("log")
    }
}

/// The URL of a path of a server at this address: its own, or that of a proxy in front of it.
pub fn url(address: SocketAddr, path: &str) -> String {
    format!("nfs://{address}/{path}")
}

/// The URL of a path of a server with NFSv3 for clients that ask its host's rpcbind for the port, as QEMU's must.
pub fn url_by_rpcbind(host: IpAddr, path: &str) -> String {
    format!("nfs://{host}/{path}")
}

fn second() -> Outcome<u64> {
    Ok(std::time::UNIX_EPOCH.elapsed()?.as_secs())
}

/// The one behind the server's own; the next is for locks.
fn mount_port(port: u16) -> u16 {
    port + 1
}

#[cfg(test)]
mod tests;
