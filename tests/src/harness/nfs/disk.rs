//! One image on a server that many writers want, each by way of a proxy of his own.

use std::cell::{Cell, RefCell};
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::FileExt;

use serde_json::{Value, json};

use super::protocol::Nfs;
use super::server::{Plan, Server, url};
use crate::Outcome;
use crate::harness::double_start::{Backend, Expected, Network, State};
use crate::harness::proxy::{Direction, Fault, Proxy};
use crate::seed::Seed;

/// An image on a server of its own, whose owner's record is beside it.
#[derive(Debug)]
pub struct Disk {
    server: RefCell<Server>,
    /// Those of each start, the first one first.
    proxies: RefCell<Vec<Proxy>>,
    /// Somebody was, so the server may have given his lease to another.
    was_cut_off: Cell<bool>,
    lock: &'static str,
}

const IMAGE: &str = "export/image.raw";
const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

impl Disk {
    /// A blank image of so many bytes, on a server whose leases last 5 seconds.
    ///
    /// # Errors
    ///
    /// When there is no server to be had.
    pub fn new(bytes: u64) -> Outcome<Self> {
        Ok(Self {
            server: RefCell::new(Server::start(Plan::image(bytes))?),
            proxies: RefCell::default(),
            was_cut_off: Cell::new(false),
            lock: "exclusive",
        })
    }

    /// With writers that take no lease: the judge must find that out.
    #[must_use]
    pub fn unleased(mut self) -> Self {
        self.lock = "none";
        self
    }

    /// The arguments that name the image to `coraclectl`: the way of no writer, which nothing cuts off.
    pub fn arguments(&self) -> Vec<String> {
        vec![self.server.borrow().url(IMAGE)]
    }

    fn set(&self, start: u64, fault: Fault) -> Outcome {
        let proxies = self.proxies.borrow();
        let index = usize::try_from(start)?.checked_sub(1);
        let proxy = index.and_then(|index| proxies.get(index));
        let proxy = proxy.ok_or_else(|| format!("there was no start {start}"))?;
        proxy.set(Direction::ToServer, fault)?;
        proxy.set(Direction::ToClient, fault)
    }
}

impl Backend for Disk {
    fn drive(&self) -> Outcome<Value> {
        let server = self.server.borrow().address();
        let mut proxies = self.proxies.borrow_mut();
        let seed = Seed::from(u64::try_from(proxies.len())?);
        let proxy = Proxy::knowing(HERE, server, seed, Nfs::default())?;
        let drive = json!({ "path_on_host": url(proxy.address(), IMAGE), "lock": self.lock });
        proxies.push(proxy);
        Ok(drive)
    }

    fn read(&self, bytes: u64) -> Outcome<Vec<u8>> {
        let mut content = vec![0; usize::try_from(bytes)?];
        let image = self.server.borrow().path(IMAGE);
        std::fs::File::open(image)?.read_exact_at(&mut content, 0)?;
        Ok(content)
    }

    fn expected(&self, holder: State) -> Expected {
        match holder {
            State::Running if !self.was_cut_off.get() => Expected::Refused,
            // Who is silent is displaced when his lease has expired, and only then.
            State::Running | State::Resumed | State::Stopped => Expected::Either,
            // Who is known to have died is waited for until it has.
            State::Killed | State::Ended | State::Broken => Expected::Granted,
        }
    }

    fn is_refusal(&self, errors: &str, vm: &str) -> bool {
        errors.contains(vm) || self.lock == "none"
    }

    fn network(&self) -> Option<&dyn Network> {
        Some(self)
    }
}

impl Network for Disk {
    fn restart(&self) -> Outcome {
        let mut server = self.server.borrow_mut();
        server.kill()?;
        server.restart()
    }

    fn cut_off(&self, start: u64) -> Outcome {
        self.was_cut_off.set(true);
        self.set(start, Fault::BlackHole)
    }

    fn heal(&self, start: u64) -> Outcome {
        self.set(start, Fault::None)
    }

    fn image(&self) -> Vec<String> {
        self.arguments()
    }

    /// Nobody but the server can take the file from a writer, and it does when he has been silent for too long.
    fn broken(&self, holder: State) -> Expected {
        match self.lock {
            // There is nothing to break.
            "none" => Expected::Either,
            _ => self.expected(holder),
        }
    }
}

#[cfg(test)]
mod tests;
