//! `coraclectl lease show`: how things stand with an image.

use std::error::Error;
use std::fmt::Write;

use coracle_storage::lease::{Conflict, Phase, Record, Standing, inspect};
use serde_json::{Value, json};

use super::{ImageArgs, LeaseVerbError};
use crate::output::{Format, causes, path_text, print, print_json};
use crate::table::printable;

/// Prints how things stand.
///
/// # Errors
///
/// When the image cannot be read. Records that cannot be read are part of the answer.
pub(super) fn show(args: &ImageArgs, format: Format) -> Result<(), LeaseVerbError> {
    let standing = inspect(&args.image, args.lease_at.as_deref())?;
    match format {
        Format::Json => print_json(&as_json(&args.image, &standing))?,
        Format::Text => print(text(&args.image, &standing))?,
    }
    Ok(())
}

/// A record as programs read it.
pub(super) fn record_json(record: &Record) -> Value {
    json!({
        "phase": record.phase.to_string(),
        "generation": record.generation,
        "epoch": record.epoch,
        "vm": record.owner.vm,
        "host": record.owner.host,
        "pid": record.owner.pid,
        "incarnation": record.owner.incarnation.to_string(),
        "since": record.since.to_string(),
        "since_seconds": record.since.0,
    })
}

fn as_json(image: &str, standing: &Standing) -> Value {
    let (record, error) = match &standing.newest {
        Ok(record) => (record.as_ref().map(record_json), None),
        Err(error) => (None, Some(joined(error))),
    };
    json!({
        "image": image,
        "fence": fence_word(standing.fence),
        "records": standing.records.as_deref().map(path_text),
        "record": record,
        "record_error": error,
    })
}

fn text(image: &str, standing: &Standing) -> String {
    let mut lines = vec![("image", image.to_owned()), ("lock", fence_text(standing))];
    if let Some(records) = &standing.records {
        lines.push(("records", records.display().to_string()));
    }
    match &standing.newest {
        Ok(Some(record)) => {
            lines.push(("phase", phase_text(record.phase).to_owned()));
            lines.push(("owner", record.owner.to_string()));
            lines.push(("since", record.since.to_string()));
            lines.push(("generation", record.generation.to_string()));
            lines.push(("epoch", record.epoch.to_string()));
            lines.push(("incarnation", record.owner.incarnation.to_string()));
        }
        Ok(None) => lines.push(("phase", "never leased, as far as is recorded".to_owned())),
        Err(error) => lines.push(("error", joined(error))),
    }
    let mut text = String::new();
    for (label, value) in lines {
        writeln!(text, "{label:<12}  {}", printable(&value).replace('\n', " "))
            .expect("a String takes what it is given");
    }
    text
}

/// The host's word, and whom the newest record has for it.
fn fence_text(standing: &Standing) -> String {
    let holder = match &standing.newest {
        Ok(Some(record)) if record.phase == Phase::Held => Some(&record.owner),
        _ => None,
    };
    match (standing.fence, holder) {
        (None, None) => "free".to_owned(),
        (None, Some(_)) => "free: its last owner has ended without releasing it".to_owned(),
        (Some(Conflict::Writer), Some(owner)) => format!("locked to write, by the record by {owner}"),
        (Some(Conflict::Writer), None) => {
            "locked to write by a program that keeps no record, such as QEMU".to_owned()
        }
        (Some(Conflict::Reader), _) => "locked by readers: nobody may write".to_owned(),
        (Some(Conflict::Turn), _) => "just being taken".to_owned(),
    }
}

fn fence_word(fence: Option<Conflict>) -> &'static str {
    match fence {
        None => "free",
        Some(Conflict::Writer) => "writer",
        Some(Conflict::Reader) => "readers",
        Some(Conflict::Turn) => "busy",
    }
}

fn phase_text(phase: Phase) -> &'static str {
    match phase {
        Phase::Held => "held",
        Phase::Released => "released: its last owner has ended properly",
        Phase::Broken => "broken: declared free by the operator named here",
    }
}

fn joined(error: &dyn Error) -> String {
    let texts: Vec<String> = std::iter::once(error.to_string()).chain(causes(error)).collect();
    texts.join(": ")
}
