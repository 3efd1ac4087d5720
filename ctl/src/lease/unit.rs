//! The lease of a unit of an iSCSI target, which the target itself guards.

use coracle_storage::iscsi::scsi::reservation::ReservationKey;
use coracle_storage::iscsi::{Operator, UnitStanding};
use coracle_storage::lease::{Owner, Record};
use coracle_storage::open::OpenError;
use serde_json::{Value, json};

use super::show::{Lines, newest_json, newest_lines};
use super::{ImageArgs, OWNER};
use crate::output::causes;

/// Who looks after the unit.
///
/// # Errors
///
/// When the URL or a secret that it names makes no sense.
pub(super) fn operator(args: &ImageArgs) -> Result<Operator, OpenError> {
    let owner = Owner::of_this_process(OWNER);
    let operator = Operator::new(&args.image, args.lease_at.as_deref(), &owner);
    operator.map_err(|error| OpenError::of_unit(&args.image, error))
}

/// How things stand, for programs.
pub(super) fn as_json(image: &str, standing: &UnitStanding) -> Value {
    let registrants: Vec<Value> = standing
        .registrants
        .iter()
        .map(|key| json!({ "key": key.to_string(), "is_of_owner": standing.is_of_owner(*key) }))
        .collect();
    let mut value = json!({
        "image": image,
        "fence": if standing.writer().is_some() { "writer" } else { "free" },
        "records": standing.records,
        "unit": {
            "identity": standing.identity,
            "capacity_bytes": standing.capacity_bytes,
            "size_bytes": standing.size_bytes,
            "is_write_protected": standing.is_write_protected,
            "holder": standing.holder.map(|key| key.to_string()),
            "registrants": registrants,
        },
    });
    if let Some(fields) = value.as_object_mut() {
        fields.extend(newest_json(&standing.newest));
    }
    value
}

/// The same for people.
pub(super) fn lines(image: &str, standing: &UnitStanding) -> Lines {
    let records = standing.records.as_deref().unwrap_or(
        "nowhere: `coraclectl disk create` makes a place on the unit, and `lease_at` names another",
    );
    let mut lines = vec![
        ("image", image.to_owned()),
        ("reservation", reservation(standing)),
    ];
    if !standing.registrants.is_empty() {
        lines.push(("registered", registered(standing)));
    }
    lines.push(("records", records.to_owned()));
    lines.extend(newest_lines(&standing.newest));
    if let Some(identity) = &standing.identity {
        lines.push(("identity", identity.clone()));
    }
    let protection = if standing.is_write_protected {
        "; write-protected"
    } else {
        ""
    };
    let size = format!(
        "{} bytes for a guest, of {}{protection}",
        standing.size_bytes, standing.capacity_bytes
    );
    lines.push(("size", size));
    lines
}

/// What breaking means, if there is something to break.
pub(super) fn consequence(standing: &UnitStanding) -> Option<String> {
    let owner = match &standing.newest {
        Ok(Some(record)) if record.phase.is_owned() => Some(format!(
            "generation {} was taken by {} at {} and not released",
            record.generation, record.owner, record.since
        )),
        Err(error) => Some(format!(
            "its records cannot be read ({}), so nobody knows who has it, and a snapshot that remembers an earlier \
             generation cannot be used any more",
            causes(error).collect::<Vec<_>>().join(": ")
        )),
        Ok(_) => None,
    };
    let fence = standing.writer().map(|key| {
        format!(
            "the target has it reserved for the key {}",
            described(standing, key)
        )
    });
    if owner.is_none() && fence.is_none() {
        return None;
    }
    let facts: Vec<String> = owner.into_iter().chain(fence).collect();
    Some(format!(
        "{}. Whoever that is will be fenced, alive or not: the target takes nothing more of what it writes, and commands that \
         it has sent and that the target has accepted are ended by a reset of the unit. Its guest keeps what was \
         acknowledged as written; what was not is lost.",
        facts.join("; ")
    ))
}

/// The target's word, and whom the newest record has for it.
fn reservation(standing: &UnitStanding) -> String {
    match (standing.holder, held(standing)) {
        (Some(_), None) if standing.writer().is_none() => {
            "kept by whoever broke the lease, for the next machine that asks".to_owned()
        }
        (Some(key), _) => described(standing, key),
        (None, Some(_)) => {
            "none, though its owner has not released it: perhaps the target was restarted".to_owned()
        }
        (None, None) => "none: the unit is free".to_owned(),
    }
}

fn registered(standing: &UnitStanding) -> String {
    let keys: Vec<String> = standing
        .registrants
        .iter()
        .map(|key| described(standing, *key))
        .collect();
    keys.join(", ")
}

/// A key, and what is known of who has it.
fn described(standing: &UnitStanding, key: ReservationKey) -> String {
    let whose = match &standing.newest {
        Ok(Some(record)) if record.phase.is_owned() && standing.is_of_owner(key) => {
            "of the owner by the record"
        }
        Ok(Some(record)) if record.phase.is_owned() => "not of the owner by the record",
        Ok(_) => "of somebody who left no record",
        Err(_) => "of whom, only the records could tell",
    };
    format!("{key} ({whose})")
}

fn held(standing: &UnitStanding) -> Option<&Record> {
    let newest = standing.newest.as_ref().ok()?.as_ref();
    newest.filter(|record| record.phase.is_owned())
}
