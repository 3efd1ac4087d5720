//! The lease of a file on an NFS server, which the server itself guards.

use coracle_storage::lease::Owner;
use coracle_storage::nfs::{FileStanding, Operator};
use coracle_storage::open::OpenError;
use serde_json::{Value, json};

use super::show::{Lines, newest_json, newest_lines};
use super::{ImageArgs, OWNER};
use crate::output::joined;

/// Who looks after the file.
///
/// # Errors
///
/// When the URL makes no sense.
pub(super) fn operator(args: &ImageArgs) -> Result<Operator, OpenError> {
    let owner = Owner::of_this_process(OWNER);
    let operator = Operator::new(&args.image, args.lease_at.as_deref(), &owner);
    operator.map_err(|error| OpenError::of_nfs(&args.image, error))
}

/// How things stand, for programs.
pub(super) fn as_json(image: &str, standing: &FileStanding) -> Value {
    let mut value = json!({
        "image": image,
        "fence": if standing.is_kept { "writer" } else { "free" },
        "records": standing.records,
        "size_bytes": standing.size_bytes,
    });
    if let Some(fields) = value.as_object_mut() {
        fields.extend(newest_json(&standing.newest));
    }
    value
}

/// The same for people.
pub(super) fn lines(image: &str, standing: &FileStanding) -> Lines {
    let mut lines = vec![
        ("image", image.to_owned()),
        ("server", fence(standing).to_owned()),
        ("records", standing.records.clone()),
    ];
    lines.extend(newest_lines(&standing.newest));
    lines.push(("size", format!("{} bytes", standing.size_bytes)));
    lines
}

/// What breaking means, if there is something to break.
pub(super) fn consequence(standing: &FileStanding) -> Option<String> {
    match &standing.newest {
        Ok(Some(record)) if record.phase.is_owned() => Some(format!(
            "generation {} was taken by {} at {} and not released. The server does not keep the file for it any more, so \
             it writes no more, whatever it does.",
            record.generation, record.owner, record.since
        )),
        Err(error) => Some(format!(
            "its records cannot be read ({}), so nobody knows who has it, and a snapshot that remembers an earlier generation \
             cannot be used any more.",
            joined(error)
        )),
        Ok(_) => None,
    }
}

fn fence(standing: &FileStanding) -> &'static str {
    let is_held = matches!(&standing.newest, Ok(Some(record)) if record.phase.is_owned());
    match (standing.is_kept, is_held) {
        (true, true) => "keeps the file for its owner",
        (true, false) => "keeps the file for somebody who left no record",
        (false, true) => "free: its last owner has ended without releasing it",
        (false, false) => "free",
    }
}
