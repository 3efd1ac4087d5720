//! QEMU's migration beside ours: the same guest, with TLS and without.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::Outcome;
use crate::bench::api::{Monitor, ms};
use crate::bench::qemu;
use crate::certificates::Authority;
use crate::ensure;
use crate::guest::unikernel_words;

/// Whether QEMU encrypts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cover {
    /// It does, with certificates on both sides.
    Tls,
    /// It does not.
    None,
}

const PATIENCE: Duration = Duration::from_secs(60);

/// How long QEMU takes to move a guest of `memory_mib` that does `words`, by what it says itself, and how long it says that the
/// guest stood still; both in milliseconds.
///
/// # Errors
///
/// When it does not.
pub fn moved(guest: &Path, memory_mib: u64, words: &str, cover: Cover) -> Outcome<(f64, f64)> {
    let directory = tempfile::tempdir()?;
    certificates(directory.path())?;
    let path = |name: &str| directory.path().join(name);
    let port = free_port()?;
    let (mut source, mut ordered) = started(guest, memory_mib, words, &path("a"), &[])?;
    source.wait_for("dirty: ready")?;
    let (_target, mut waiting) = started(guest, memory_mib, words, &path("b"), &["-incoming", "defer"])?;
    for (monitor, endpoint) in [(&mut ordered, "client"), (&mut waiting, "server")] {
        // As fast as it can.
        monitor.order("migrate-set-parameters", &json!({ "max-bandwidth": 1_u64 << 40 }))?;
        if cover == Cover::Tls {
            let credentials = json!({
                "qom-type": "tls-creds-x509", "id": "tls0", "endpoint": endpoint, "verify-peer": true,
                "dir": directory.path(),
            });
            monitor.order("object-add", &credentials)?;
            let parameters = json!({ "tls-creds": "tls0", "tls-hostname": "127.0.0.1" });
            monitor.order("migrate-set-parameters", &parameters)?;
        }
    }
    let uri = format!("tcp:127.0.0.1:{port}");
    waiting.order("migrate-incoming", &json!({ "uri": uri }))?;
    let begun = Instant::now();
    ordered.order("migrate", &json!({ "uri": uri }))?;
    loop {
        let told = ordered.order("query-migrate", &json!({}))?;
        match told.get("status").and_then(Value::as_str) {
            Some("completed") => {
                let downtime = told.get("downtime").and_then(Value::as_f64).unwrap_or(f64::NAN);
                let total = told.get("total-time").and_then(Value::as_f64);
                return Ok((total.unwrap_or_else(|| ms(begun.elapsed())), downtime));
            }
            Some("failed" | "cancelled") => return Err(format!("QEMU does not move: {told}").into()),
            _ => ensure!(begun.elapsed() < PATIENCE, "QEMU is not done: {told}"),
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Where QEMU looks for them.
fn certificates(directory: &Path) -> Outcome {
    let host = Authority::new(directory)?.host("127.0.0.1")?;
    let file = |name: &str| -> Outcome<PathBuf> {
        let path = host
            .get(name)
            .and_then(Value::as_str)
            .ok_or("a host has its files")?;
        Ok(path.into())
    };
    for (kind, name) in [
        ("ca", "ca-cert.pem"),
        ("certificate", "server-cert.pem"),
        ("key", "server-key.pem"),
    ] {
        fs::copy(file(kind)?, directory.join(name))?;
    }
    fs::copy(file("certificate")?, directory.join("client-cert.pem"))?;
    fs::copy(file("key")?, directory.join("client-key.pem"))?;
    Ok(())
}

fn free_port() -> Outcome<u16> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

fn started(
    guest: &Path,
    memory_mib: u64,
    words: &str,
    socket: &Path,
    more: &[&str],
) -> Outcome<(Monitor, Orders)> {
    let mut arguments = qemu::microvm(memory_mib, guest, &unikernel_words(words));
    arguments.extend([
        "-qmp".to_owned(),
        format!("unix:{},server=on,wait=off", socket.display()),
    ]);
    arguments.extend(more.iter().map(|word| (*word).to_owned()));
    let child = Command::new(qemu::PROGRAM)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let monitor = Monitor::of(child)?;
    let begun = Instant::now();
    let stream = loop {
        match UnixStream::connect(socket) {
            Ok(stream) => break stream,
            Err(error) => ensure!(begun.elapsed() < PATIENCE, "QEMU does not listen: {error}"),
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut orders = Orders(BufReader::new(stream));
    orders.line()?;
    orders.order("qmp_capabilities", &json!({}))?;
    Ok((monitor, orders))
}

/// QEMU's machine protocol.
struct Orders(BufReader<UnixStream>);

impl Orders {
    fn order(&mut self, name: &str, arguments: &Value) -> Outcome<Value> {
        let order = json!({ "execute": name, "arguments": arguments });
        self.0.get_mut().write_all(format!("{order}\n").as_bytes())?;
        loop {
            let line: Value = serde_json::from_str(&self.line()?)?;
            if let Some(told) = line.get("return") {
                return Ok(told.clone());
            }
            ensure!(line.get("error").is_none(), "QEMU refuses {name}: {line}");
        }
    }

    fn line(&mut self) -> Outcome<String> {
        let mut line = String::new();
        self.0.read_line(&mut line)?;
        Ok(line)
    }
}
