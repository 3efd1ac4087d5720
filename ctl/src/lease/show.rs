//! `coraclectl lease show`: how things stand with an image.

use std::error::Error;
use std::fmt::Write;

use coracle_storage::iscsi::IscsiUrl;
use coracle_storage::lease::{Conflict, Phase, Record, Standing, inspect};
use coracle_storage::nfs::NfsUrl;
use coracle_storage::open::OpenError;
use serde_json::{Map, Value, json};

use super::{ImageArgs, LeaseVerbError, export, unit};
use crate::output::{Format, joined, path_text, print, print_json};
use crate::table::printable;

/// Prints how things stand.
///
/// # Errors
///
/// When the image cannot be read. Records that cannot be read are part of the answer.
pub(super) fn show(args: &ImageArgs, format: Format) -> Result<(), LeaseVerbError> {
    let image = args.image.as_str();
    let (value, lines) = if IscsiUrl::is_url(image) {
        let standing = unit::operator(args)?.inspect();
        let standing = standing.map_err(|error| OpenError::of_unit(image, error))?;
        (unit::as_json(image, &standing), unit::lines(image, &standing))
    } else if NfsUrl::is_url(image) {
        let standing = export::operator(args)?.inspect();
        let standing = standing.map_err(|error| OpenError::of_nfs(image, error))?;
        (export::as_json(image, &standing), export::lines(image, &standing))
    } else {
        let standing = inspect(image, args.lease_at.as_deref())?;
        (as_json(image, &standing), lines(image, &standing))
    };
    match format {
        Format::Json => print_json(&value)?,
        Format::Text => print(text(lines))?,
    }
    Ok(())
}

/// What there is to say to people, each with its name.
pub(super) type Lines = Vec<(&'static str, String)>;

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

/// The newest record, or why it cannot be read.
pub(super) fn newest_json(newest: &Result<Option<Record>, impl Error + 'static>) -> Map<String, Value> {
    let (record, error) = match newest {
        Ok(record) => (record.as_ref().map(record_json), None),
        Err(error) => (None, Some(joined(error))),
    };
    [
        ("record".to_owned(), record.into()),
        ("record_error".to_owned(), error.into()),
    ]
    .into_iter()
    .collect()
}

/// The same for people.
pub(super) fn newest_lines(newest: &Result<Option<Record>, impl Error + 'static>) -> Lines {
    match newest {
        Ok(Some(record)) => vec![
            ("phase", phase_text(record.phase).to_owned()),
            ("owner", record.owner.to_string()),
            ("since", record.since.to_string()),
            ("generation", record.generation.to_string()),
            ("epoch", record.epoch.to_string()),
            ("incarnation", record.owner.incarnation.to_string()),
        ],
        Ok(None) => vec![("phase", "never leased, as far as is recorded".to_owned())],
        Err(error) => vec![("error", joined(error))],
    }
}

fn as_json(image: &str, standing: &Standing) -> Value {
    let mut value = json!({
        "image": image,
        "fence": fence_word(standing.fence),
        "records": standing.records.as_deref().map(path_text),
    });
    if let Some(fields) = value.as_object_mut() {
        fields.extend(newest_json(&standing.newest));
    }
    value
}

fn lines(image: &str, standing: &Standing) -> Lines {
    let mut lines = vec![("image", image.to_owned()), ("lock", fence_text(standing))];
    if let Some(records) = &standing.records {
        lines.push(("records", records.display().to_string()));
    }
    lines.extend(newest_lines(&standing.newest));
    lines
}

fn text(lines: Lines) -> String {
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
        Ok(Some(record)) if record.phase.is_owned() => Some(&record.owner),
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
        Phase::Taken => "taken over by a migration, and not written yet",
        Phase::Started => "held, since a migration",
        Phase::Cancelled => "held: a migration was cancelled",
        Phase::Reclaimed => "held: taken back from a migration",
        Phase::Moved => "left behind: its machine was moved elsewhere with a copy, and writes that",
    }
}
