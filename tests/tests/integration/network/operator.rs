//! What an operator types, and the machines that have an image meanwhile.
#![expect(
    clippy::indexing_slicing,
    reason = "JSON that lacks a field is a failure of the test"
)]

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use coracle_storage::blocking::Blocking;
use coracle_storage::lease::{Lock, Owner, Terms};
use coracle_storage::overlay::OverlayConfig;
use coracle_tests::case::Context;
use coracle_tests::environment::Environment;
use coracle_tests::guest::Machine;
use coracle_tests::monitor::{Launch, Monitor};
use coracle_tests::{Outcome, ensure};
use serde_json::{Value, json};

pub(crate) const SOON: Duration = Duration::from_secs(60);

/// A machine that has the image and goes on.
pub(crate) fn holding(context: &Context, id: &str, url: &str) -> Outcome<Monitor> {
    let machine =
        Machine::unikernel(&context.environment, "do=hello do=spin:seconds=forever").drive(drive(url));
    let monitor = named(context, id)?.config(&machine.config())?.start()?;
    monitor.console.wait_for("hello from", SOON)?;
    Ok(monitor)
}

/// One that has it for a moment.
pub(crate) fn machine(context: &Context, url: &str) -> Machine {
    Machine::unikernel(&context.environment, "do=hello").drive(drive(url))
}

pub(crate) fn named(context: &Context, id: &str) -> Outcome<Launch> {
    Ok(Launch::new(&context.environment)?.arguments(["--id", id]))
}

pub(crate) fn drive(url: &str) -> Value {
    json!({ "drive_id": "d", "path_on_host": url, "is_root_device": false, "is_read_only": false })
}

pub(crate) fn ctl(environment: &Environment, arguments: &[&str]) -> Command {
    let mut command = Command::new(&environment.coraclectl);
    command.args(arguments).stdin(Stdio::null());
    command
}

/// What a verb says to programs.
pub(crate) fn does(environment: &Environment, arguments: &[&str]) -> Outcome<Value> {
    let said = said(environment, &[&["--json"], arguments].concat())?;
    Ok(serde_json::from_str(&said)?)
}

pub(crate) fn said(environment: &Environment, arguments: &[&str]) -> Outcome<String> {
    let done = ctl(environment, arguments).output()?;
    ensure!(done.status.success(), "{arguments:?}: {}", text(&done.stderr));
    Ok(text(&done.stdout))
}

pub(crate) fn refuses(environment: &Environment, arguments: &[&str], words: &[&str]) -> Outcome {
    let done = ctl(environment, arguments).output()?;
    ensure!(done.status.code() == Some(1), "{arguments:?}: {done:?}");
    let said = text(&done.stderr);
    for word in words {
        ensure!(said.contains(word), "{arguments:?}: no {word:?} in: {said}");
    }
    Ok(())
}

pub(crate) fn with_input(environment: &Environment, arguments: &[&str], input: &str) -> Outcome<Output> {
    let mut command = ctl(environment, arguments);
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn()?;
    child
        .stdin
        .take()
        .ok_or("stdin was asked for")?
        .write_all(input.as_bytes())?;
    Ok(child.wait_with_output()?)
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Makes an overlay of an image, whose bytes are in this file, flattens it, and moves it to a copy and back; returns its path.
pub(crate) fn overlaid(context: &Context, place: &Path, url: &str, image: &Path) -> Outcome<String> {
    let environment = &context.environment;
    let path = |name: &str| place.join(name).display().to_string();
    let length = fs::metadata(image)?.len();
    let content: Vec<u8> = (0..length)
        .map(|at| u8::try_from(at / 65536 % 251).unwrap_or(0))
        .collect();
    fs::write(image, &content)?;
    let overlay = path("overlay");
    let shown = written(url, &overlay, content)?;
    let info = does(environment, &["disk", "info", &overlay])?;
    ensure!(info["base"] == url && info["base_state"] == "there", "{info}");
    let flat = path("flat");
    does(environment, &["disk", "flatten", &overlay, &flat])?;
    ensure!(fs::read(&flat)? == shown, "it was flattened to something else");
    // To a file and back: nothing differs, or only what the overlay has.
    let copy = path("copy");
    fs::copy(image, &copy)?;
    let copied = does(environment, &["disk", "rebase", &overlay, "--base", &copy])?;
    ensure!(copied["copied_bytes"] == 0, "{copied}");
    does(environment, &["disk", "rebase", &overlay, "--base", url])?;
    Ok(overlay)
}

/// Commits such an overlay: then the image is what it has shown.
pub(crate) fn committed(environment: &Environment, overlay: &str, image: &Path) -> Outcome {
    let flat = Path::new(overlay).with_file_name("flat");
    does(environment, &["disk", "commit", overlay])?;
    ensure!(
        fs::read(image)? == fs::read(flat)?,
        "something else was committed"
    );
    Ok(())
}

/// Makes an overlay of the image as a machine does, with something in it; what it shows then.
fn written(url: &str, overlay: &str, mut content: Vec<u8>) -> Outcome<Vec<u8>> {
    let config = OverlayConfig {
        base: url.to_owned(),
        path: overlay.to_owned(),
        keep: true,
    };
    let owner = Owner::of_this_process("vm1");
    let image = config.open(&Terms::new(Lock::Exclusive, &owner))?;
    let _hold = image.hold;
    let mut disk = Blocking::new(image.backend)?;
    for (at, len, byte) in [
        (512, 512, 201),
        (1 << 20, 12_288, 202),
        (content.len() - 4096, 4096, 203),
    ] {
        let part = content
            .get_mut(at..at + len)
            .ok_or("it is as long as the image")?;
        part.fill(byte);
        disk.write_at(at as u64, part)?;
    }
    disk.flush()?;
    Ok(content)
}
