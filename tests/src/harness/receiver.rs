//! A monitor that waits on a host for a machine that is sent to it.

use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::Outcome;
use crate::harness::hosts::Host;
use crate::monitor::{Launch, Monitor};

/// It, and its call, which ends when the guest runs there.
#[derive(Debug)]
pub struct Receiver {
    /// The monitor.
    pub monitor: Monitor,
    call: JoinHandle<Outcome>,
    to: String,
}

const READY_WITHIN: Duration = Duration::from_secs(30);
const PERIOD: Duration = Duration::from_millis(2);

impl Receiver {
    /// Starts one on `host`, whose certificates are `tls`, and waits until it listens.
    ///
    /// # Errors
    ///
    /// When it does not.
    pub fn start(launch: Launch, host: &Host, tls: &Value) -> Outcome<Self> {
        let monitor = host.inside(|| launch.start())??;
        let body = json!({ "listen": format!("{}:0", host.address), "tls": tls });
        Self::of(monitor, &body)
    }

    /// Asks a monitor to receive what `body` says, and waits until it listens.
    ///
    /// # Errors
    ///
    /// When it does not.
    pub fn of(monitor: Monitor, body: &Value) -> Outcome<Self> {
        let mut caller = monitor.connect()?;
        let body = body.to_string();
        let call = std::thread::spawn(move || {
            let answer = caller.request("PUT", "/migration/receive", Some(&body))?;
            crate::ensure!(answer.status == 204, "{} {}", answer.status, answer.body);
            Ok(())
        });
        let until = Instant::now() + READY_WITHIN;
        loop {
            let status = monitor.must("GET", "/migration", None)?.json()?;
            if let Some(to) = status.get("listen").and_then(Value::as_str) {
                let to = to.to_owned();
                return Ok(Self { monitor, call, to });
            }
            crate::ensure!(
                Instant::now() < until && !call.is_finished(),
                "it does not listen: {status}"
            );
            std::thread::sleep(PERIOD);
        }
    }

    /// Where it listens.
    pub fn to(&self) -> &str {
        &self.to
    }

    /// The monitor, its call, and where it listens.
    pub fn into_parts(self) -> (Monitor, JoinHandle<Outcome>, String) {
        (self.monitor, self.call, self.to)
    }

    /// The monitor, once it has the machine.
    ///
    /// # Errors
    ///
    /// When it has none.
    pub fn received(self) -> Outcome<Monitor> {
        self.call.join().map_err(|_| "the caller panicked")??;
        Ok(self.monitor)
    }
}
