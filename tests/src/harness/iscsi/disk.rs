//! One image on a target that many writers want, each by way of a proxy of his own.

use std::cell::RefCell;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::FileExt;
use std::process::Command;

use serde_json::{Value, json};

use super::protocol::Iscsi;
use super::target::{Plan, Target, url};
use crate::Outcome;
use crate::environment::Environment;
use crate::harness::double_start::{Backend, Expected, Network, State};
use crate::harness::proxy::{Direction, Fault, Proxy};
use crate::seed::Seed;

/// An image on a target of its own, whose owner's record is in a file beside it or in its tail.
#[derive(Debug)]
pub struct Disk {
    target: RefCell<Target>,
    /// Those of each start, the first one first.
    proxies: RefCell<Vec<Proxy>>,
    /// Nothing when the record is in the tail.
    lease_at: Option<tempfile::TempDir>,
    lock: &'static str,
}

/// Room for the tail behind what the writers use.
const TAIL_BYTES: u64 = 16 << 20;
const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

impl Disk {
    /// A blank image of so many bytes with its record in a file.
    ///
    /// # Errors
    ///
    /// When there is no target to be had.
    pub fn with_record_in_a_file(bytes: u64) -> Outcome<Self> {
        Ok(Self {
            target: RefCell::new(Target::start(Plan::disk(bytes))?),
            proxies: RefCell::default(),
            lease_at: Some(tempfile::tempdir()?),
            lock: "exclusive",
        })
    }

    /// A blank image with room for so many bytes, formatted so that its record is in its tail.
    ///
    /// # Errors
    ///
    /// When there is no target to be had, or `coraclectl disk create` fails.
    pub fn with_record_in_its_tail(environment: &Environment, bytes: u64) -> Outcome<Self> {
        let target = Target::start(Plan::disk(bytes + TAIL_BYTES))?;
        let created = Command::new(&environment.coraclectl)
            .args(["disk", "create", &target.url(1)])
            .output()?;
        crate::ensure!(
            created.status.success(),
            "coraclectl disk create: {}",
            String::from_utf8_lossy(&created.stderr).trim()
        );
        Ok(Self {
            target: RefCell::new(target),
            proxies: RefCell::default(),
            lease_at: None,
            lock: "exclusive",
        })
    }

    /// With writers that take no lease: the judge must find that out.
    #[must_use]
    pub fn unleased(mut self) -> Self {
        self.lock = "none";
        self.lease_at = None;
        self
    }

    /// The arguments that name the image to `coraclectl`: the way of no writer, which nothing cuts off.
    pub fn arguments(&self) -> Vec<String> {
        let lease_at = self.lease_at().map(|prefix| ["--lease-at".to_owned(), prefix]);
        [self.target.borrow().url(1)]
            .into_iter()
            .chain(lease_at.into_iter().flatten())
            .collect()
    }

    fn lease_at(&self) -> Option<String> {
        let directory = self.lease_at.as_ref()?;
        Some(directory.path().join("record").display().to_string())
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
        let server = self.target.borrow().address();
        let mut proxies = self.proxies.borrow_mut();
        let seed = Seed::from(u64::try_from(proxies.len())?);
        let proxy = Proxy::knowing(HERE, server, seed, Iscsi::default())?;
        let mut drive = json!({ "path_on_host": url(proxy.address(), 1), "lock": self.lock });
        if let (Some(prefix), Some(drive)) = (self.lease_at(), drive.as_object_mut()) {
            drive.insert("lease_at".into(), json!(prefix));
        }
        proxies.push(proxy);
        Ok(drive)
    }

    fn read(&self, bytes: u64) -> Outcome<Vec<u8>> {
        let mut content = vec![0; usize::try_from(bytes)?];
        let image = self.target.borrow().image(1)?;
        std::fs::File::open(image)?.read_exact_at(&mut content, 0)?;
        Ok(content)
    }

    fn expected(&self, holder: State) -> Expected {
        match holder {
            // A reservation outlives who made it.
            State::Running | State::Resumed | State::Stopped | State::Killed => Expected::Refused,
            State::Ended | State::Broken => Expected::Granted,
        }
    }

    fn is_refusal(&self, errors: &str, vm: &str) -> bool {
        errors.contains(vm)
    }

    fn network(&self) -> Option<&dyn Network> {
        Some(self)
    }
}

impl Network for Disk {
    fn restart(&self) -> Outcome {
        let mut target = self.target.borrow_mut();
        target.kill()?;
        target.restart()
    }

    fn cut_off(&self, start: u64) -> Outcome {
        self.set(start, Fault::BlackHole)
    }

    fn heal(&self, start: u64) -> Outcome {
        self.set(start, Fault::None)
    }

    fn image(&self) -> Vec<String> {
        self.arguments()
    }
}

#[cfg(test)]
mod tests;
