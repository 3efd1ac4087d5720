//! Hosts as network namespaces: a server in the middle, and clients that each have a cable to it.
//!
//! ```text
//! client 0: 10.0.0.2 ──── 10.0.0.1 ┐
//! client 1: 10.0.1.2 ──── 10.0.1.1 ┴ server
//! ```
//!
//! The server forwards what clients send to each other, and each reaches all of its addresses.
//!
//! A namespace has no name: it is an open descriptor, so it is gone with its test however that ends, and no two
//! tests can meet. Faults on the cable are the proxy's: start it on the server, in front of what serves there.

#![expect(unsafe_code, reason = "rustix counts unshare among the calls that need care")]

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::process::Command;

use rustix::thread::{LinkNameSpaceType, UnshareFlags};

use crate::Outcome;
use crate::harness::jail::UID;

/// A server and its clients.
#[derive(Debug)]
pub struct Star {
    /// The host in the middle.
    pub server: Host,
    /// The others.
    pub clients: Vec<Host>,
}

/// One host: a network of its own, with loopback.
#[derive(Debug)]
pub struct Host {
    namespace: File,
    /// Its own address on the cable; the server has one for each client, of which this is the first.
    pub address: IpAddr,
}

/// What has the taps of guests.
const BRIDGE: &str = "guests";
/// More would need another scheme of addresses.
const CLIENTS_MAX: u8 = 200;

impl Star {
    /// A server with so many clients.
    ///
    /// # Errors
    ///
    /// When the kernel refuses namespaces or cables, or `ip` is not there.
    pub fn new(clients: u8) -> Outcome<Self> {
        crate::ensure!(clients <= CLIENTS_MAX, "{clients} clients are too many");
        let server = Host::new(Self::server_address(0))?;
        // It is of the network of whoever opens it.
        server.inside(|| std::fs::write("/proc/sys/net/ipv4/ip_forward", "1"))??;
        let clients = (0..clients)
            .map(|number| {
                let client = Host::new(IpAddr::V4(Ipv4Addr::new(10, 0, number, 2)))?;
                server.connect(&client, number)?;
                Ok(client)
            })
            .collect::<Outcome<_>>()?;
        Ok(Self { server, clients })
    }

    /// One network for guests across the clients: each has a bridge with these taps, and a second cable to a switch on the
    /// server. Nobody but guests has an address there.
    ///
    /// # Errors
    ///
    /// When it is there, or cannot be made.
    pub fn switch(&self, taps: &[&str]) -> Outcome {
        self.server.ports(&[])?;
        for (number, client) in self.clients.iter().enumerate() {
            let (here, there) = (format!("guests{number}"), "to-guests");
            self.server.cable(&here, client, there)?;
            client.ports(taps)?;
            for (host, device) in [(&self.server, here.as_str()), (client, there)] {
                host.ip(&["link", "set", device, "master", BRIDGE, "up"])?;
            }
        }
        Ok(())
    }

    /// The server's address on the cable of this client.
    pub fn server_address(client: u8) -> IpAddr {
        IpAddr::V4(Ipv4Addr::new(10, 0, client, 1))
    }
}

impl Host {
    /// Why this machine has no hosts to offer, if it hasn't.
    pub fn refused() -> Option<String> {
        let made = Star::new(1).map(drop);
        made.err()
            .map(|e| format!("network namespaces: {}", crate::case::text(&e)))
    }

    fn new(address: IpAddr) -> Outcome<Self> {
        let made = std::thread::spawn(|| -> std::io::Result<File> {
            // SAFETY: it changes nothing but the network of this thread, which ends with the closure.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }?;
            File::open("/proc/thread-self/ns/net")
        });
        let namespace = made
            .join()
            .map_err(|_| "the thread that made a namespace panicked")??;
        let host = Self { namespace, address };
        host.ip(&["link", "set", "lo", "up"])?;
        Ok(host)
    }

    /// The same host once more, for somebody who may outlive this value.
    ///
    /// # Errors
    ///
    /// When there are no descriptors left.
    pub fn again(&self) -> Outcome<Self> {
        Ok(Self {
            namespace: self.namespace.try_clone()?,
            address: self.address,
        })
    }

    /// A path by which others join its network, as long as this value is there.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.namespace.as_raw_fd())
    }

    /// A bridge of this host, with its address in a network of its own, and taps on it for guests. Root may have them, and
    /// the user of jails.
    ///
    /// # Errors
    ///
    /// When it is there, or cannot be made.
    pub fn bridge(&self, address: IpAddr, taps: &[&str]) -> Outcome {
        self.ports(taps)?;
        self.ip(&["address", "add", &format!("{address}/24"), "dev", BRIDGE])
    }

    /// The same without an address.
    fn ports(&self, taps: &[&str]) -> Outcome {
        self.ip(&["link", "add", BRIDGE, "type", "bridge"])?;
        self.ip(&["link", "set", BRIDGE, "up"])?;
        taps.iter().try_for_each(|tap| self.tap(tap, &[]))
    }

    /// One more tap on the bridge, with options of `ip tuntap`.
    ///
    /// # Errors
    ///
    /// When it is there, or cannot be made.
    pub fn tap(&self, name: &str, options: &[&str]) -> Outcome {
        let user = UID.to_string();
        let made = ["tuntap", "add", "dev", name, "mode", "tap", "user", &user];
        self.ip(&[&made[..], options].concat())?;
        self.ip(&["link", "set", name, "master", BRIDGE, "up"])
    }

    /// A tap on no bridge, with an address for the host and a neighbour whom nobody has to look for.
    ///
    /// # Errors
    ///
    /// When it is there, or cannot be made.
    pub fn lone_tap(&self, name: &str, here: &str, (neighbour, mac): (Ipv4Addr, &str)) -> Outcome {
        self.ip(&["tuntap", "add", "dev", name, "mode", "tap"])?;
        self.ip(&["address", "add", here, "dev", name])?;
        self.ip(&["link", "set", name, "up"])?;
        let neighbour = neighbour.to_string();
        self.ip(&["neighbour", "add", &neighbour, "lladdr", mac, "dev", name])
    }

    /// Takes a device out of its network.
    ///
    /// # Errors
    ///
    /// When it is not there.
    pub fn remove(&self, device: &str) -> Outcome {
        self.ip(&["link", "delete", device])
    }

    /// All that the kernel says about a device of its network.
    ///
    /// # Errors
    ///
    /// When it is not there.
    pub fn shows(&self, device: &str) -> Outcome<String> {
        self.told(&["-details", "link", "show", device])
    }

    /// Does something on this host: sockets and programs that it makes stay there.
    ///
    /// # Errors
    ///
    /// When the host cannot be entered.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Outcome<T> {
        let here = || -> std::io::Result<T> {
            let network = Some(LinkNameSpaceType::Network);
            rustix::thread::move_into_link_name_space(self.namespace.as_fd(), network)?;
            Ok(work())
        };
        let done = std::thread::scope(|scope| scope.spawn(here).join());
        Ok(done.map_err(|_| "the work on a host panicked")??)
    }

    /// A cable from here to a client, and the addresses of both ends.
    fn connect(&self, client: &Self, number: u8) -> Outcome {
        let (here, there) = (format!("to-client{number}"), "to-server");
        self.cable(&here, client, there)?;
        let ends = [
            (self, here.as_str(), Star::server_address(number)),
            (client, there, client.address),
        ];
        for (host, device, address) in ends {
            host.ip(&["address", "add", &format!("{address}/24"), "dev", device])?;
            host.ip(&["link", "set", device, "up"])?;
        }
        let gateway = Star::server_address(number).to_string();
        client.ip(&["route", "add", "default", "via", &gateway])
    }

    /// A cable to a client, and what its ends are called.
    fn cable(&self, here: &str, client: &Self, there: &str) -> Outcome {
        // The descriptor is ours: `ip` finds it among those of this process.
        let namespace = client.path();
        self.ip(&[
            "link", "add", here, "type", "veth", "peer", "name", there, "netns", &namespace,
        ])
    }

    fn ip(&self, arguments: &[&str]) -> Outcome {
        self.told(arguments).map(drop)
    }

    /// What `ip` says to that.
    fn told(&self, arguments: &[&str]) -> Outcome<String> {
        // Debian keeps it where only root looks.
        let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
        let done = self
            .inside(|| Command::new("ip").args(arguments).env("PATH", path).output())?
            .map_err(|e| format!("ip: {e}"))?;
        crate::ensure!(
            done.status.success(),
            "ip {}: {}",
            arguments.join(" "),
            String::from_utf8_lossy(&done.stderr).trim()
        );
        Ok(String::from_utf8_lossy(&done.stdout).into_owned())
    }
}
