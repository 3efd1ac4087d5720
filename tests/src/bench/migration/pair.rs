//! One migration between two fresh processes, and what was seen of it.

use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::Outcome;
use crate::bench::api::{Monitor, Program, ms};
use crate::certificates::Authority;
use crate::ensure;
use crate::guest::unikernel_words;
use crate::harness::proxy::{Direction, Fault, Proxy};
use crate::seed::Seed;

/// What is moved, and how.
#[derive(Clone, Debug)]
pub struct Move<'a> {
    /// The monitor.
    pub program: &'a Program,
    /// The unikernel.
    pub guest: &'a Path,
    /// What the guest has, in MiB.
    pub memory_mib: u64,
    /// What it has written before it is moved, in MiB.
    pub filled_mib: u64,
    /// What it does when it is moved: a `dirty`.
    pub work: String,
    /// How many bytes pass per second, if not as many as there can.
    pub link_bytes_per_s: Option<u64>,
    /// Members beside `to` and `tls` of what is asked of the source.
    pub asked: Value,
}

/// What was seen.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    /// From the call to its answer, in milliseconds.
    pub total_ms: f64,
    /// The longest time in which the guest did not run.
    pub gap_ms: f64,
    /// What the source thought that it would be.
    pub predicted_ms: f64,
    /// What went over the connection.
    pub sent_bytes: f64,
    /// How fast the largest round was sent.
    pub bytes_per_s: f64,
    /// Processor time of the threads that sent and took.
    pub sender_cpu_ms: f64,
    /// The same at the target.
    pub receiver_cpu_ms: f64,
}

const PATIENCE: Duration = Duration::from_secs(30);

impl Move<'_> {
    /// Does it once.
    ///
    /// # Errors
    ///
    /// When the guest does not go over, or finds its memory changed.
    pub fn run(&self) -> Outcome<Seen> {
        let directory = tempfile::tempdir()?;
        let tls = Authority::new(directory.path())?.host("127.0.0.1")?;
        let mut source = self.started()?;
        let (mut target, _waiting, listen) = self.receiver(&tls)?;
        let proxy = match self.link_bytes_per_s {
            None => None,
            Some(bytes_per_second) => Some(paced(&listen, bytes_per_second)?),
        };
        let to = proxy.as_ref().map_or(listen, |proxy| proxy.address().to_string());
        let mut body = json!({ "to": to, "tls": tls });
        if let (Some(body), Some(asked)) = (body.as_object_mut(), self.asked.as_object()) {
            body.extend(asked.clone());
        }
        let begun = Instant::now();
        source.send("PUT", "/migration/send", &body)?;
        source.answer()?;
        let total_ms = ms(begun.elapsed());
        let said = target.said_until("checksum=")?;
        let gap_us = number_after(&said, "gap_us=").ok_or("the guest says its longest gap")?;
        let (sent, taken) = (source.log()?, target.log()?);
        Ok(Seen {
            total_ms,
            gap_ms: gap_us / 1e3,
            predicted_ms: number_after(&sent, " rounds, for ").ok_or("a gap is predicted")? / 1e3,
            sent_bytes: number_after(&sent, "migration: sent ").ok_or("bytes are counted")?,
            bytes_per_s: fastest_of_largest(&sent).ok_or("there are rounds")?,
            sender_cpu_ms: number_between(&sent, "migration: sent ", " bytes in ")
                .ok_or("the source says its processor time")?
                / 1e3,
            receiver_cpu_ms: number_after(&taken, "migration: taken in ")
                .ok_or("the target says its processor time")?
                / 1e3,
        })
    }

    fn started(&self) -> Outcome<Monitor> {
        let mut monitor = Monitor::start_logging(self.program, &["--api-sock", "api.sock"], "Debug")?;
        monitor.wait_for_api()?;
        let words = match self.filled_mib {
            0 => self.work.clone(),
            filled => format!("do=dirty:mib={filled},ms=1 {}", self.work),
        };
        let boot = json!({ "kernel_image_path": self.guest, "boot_args": unikernel_words(&words) });
        monitor.request("PUT", "/boot-source", Some(&boot))?;
        let machine = json!({ "vcpu_count": 1, "mem_size_mib": self.memory_mib });
        monitor.request("PUT", "/machine-config", Some(&machine))?;
        let start = json!({ "action_type": "InstanceStart" });
        monitor.request("PUT", "/actions", Some(&start))?;
        // Both may come at once.
        let (ready, mut said) = (1 + usize::from(self.filled_mib > 0), String::new());
        while said.matches("dirty: ready\n").count() < ready {
            said.push_str(&monitor.said_until("\n")?);
        }
        Ok(monitor)
    }

    fn receiver(&self, tls: &Value) -> Outcome<(Monitor, Option<UnixStream>, String)> {
        let mut monitor = Monitor::start_logging(self.program, &["--api-sock", "api.sock"], "Debug")?;
        monitor.wait_for_api()?;
        let body = json!({ "listen": "127.0.0.1:0", "tls": tls });
        monitor.send("PUT", "/migration/receive", &body)?;
        let waiting = monitor.connect_anew()?;
        let begun = Instant::now();
        loop {
            let answer = monitor.ask("GET", "/migration")?;
            if let Some((_, rest)) = answer.split_once("\"listen\":\"") {
                let listen = rest.split('"').next().unwrap_or_default().to_owned();
                return Ok((monitor, waiting, listen));
            }
            ensure!(begun.elapsed() < PATIENCE, "it does not listen: {answer}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// A link between a source and `listen` that is not as fast as it could be.
fn paced(listen: &str, bytes_per_second: u64) -> Outcome<Proxy> {
    let server: SocketAddr = listen.parse()?;
    let proxy = Proxy::start(server.ip(), server, Seed::from_environment())?;
    proxy.set(Direction::ToServer, Fault::Rate { bytes_per_second })?;
    Ok(proxy)
}

/// The number behind the last `words` of a text.
fn number_after(text: &str, words: &str) -> Option<f64> {
    let (_, rest) = text.rsplit_once(words)?;
    let end = rest
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(rest.len());
    rest.get(..end)?.parse().ok()
}

/// The number behind `last`, of what follows the last `first`.
fn number_between(text: &str, first: &str, last: &str) -> Option<f64> {
    number_after(text.rsplit_once(first)?.1.lines().next()?, last)
}

/// How fast the largest round was, in bytes per second.
fn fastest_of_largest(log: &str) -> Option<f64> {
    let rounds = log.lines().filter(|line| line.contains("migration, round "));
    let seen = rounds.filter_map(|line| {
        let (_, counts) = line.split_once("migration, round ")?;
        Some((number_after(counts, ": ")?, number_after(counts, " bytes in ")?))
    });
    let (bytes, us) = seen.max_by(|a, b| a.0.total_cmp(&b.0))?;
    Some(bytes * 1e6 / us.max(1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_found_in_a_log() {
        let log = "x migration, round 1: 1000000 bytes in 500000 us, 7 pages left\n\
                   x migration, round 2: 10 bytes in 1 us, 0 pages left\n\
                   x migration: the guest stands still after 2 rounds, for 6100 us by what is known\n\
                   x migration: sent 1000010 bytes in 1234 us of processor time\n";
        assert_eq!(fastest_of_largest(log), Some(2e6));
        assert_eq!(number_after(log, " rounds, for "), Some(6100.0));
        assert_eq!(
            number_between(log, "migration: sent ", " bytes in "),
            Some(1234.0)
        );
    }
}
