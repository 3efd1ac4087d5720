//! The lease of an image as an operator sees it, and takes it away.

use std::path::PathBuf;
use std::sync::Arc;

use super::chain::ChainError;
use super::fence::ofd::{self, Conflict, Role};
use super::place::{self, Place};
use super::record::{Phase, Record};
use super::{Candidate, DEAD_FREED_MS_MAX, LeaseError, Lock, Owner, Terms, freed_soon};
use crate::backend::Access;
use crate::open::{OpenError, open_file};

/// How things stand with the lease of an image.
#[derive(Debug)]
pub struct Standing {
    /// Who would be in a writer's way now, as the host tells.
    pub fence: Option<Conflict>,
    /// The names of the records; `None` if there is no place for any.
    pub records: Option<PathBuf>,
    /// The newest record, if there is one.
    pub newest: Result<Option<Record>, ChainError>,
}

/// Looks at the lease of the image at `path`, whose records are named after `at` if that is given. Takes no
/// lock and writes nothing; the lock of an owner that has just been killed is given the time to fall.
///
/// # Errors
///
/// When the image cannot be read.
pub fn inspect(path: &str, at: Option<&str>) -> Result<Standing, OpenError> {
    let opened = open_file(path, Access::ReadOnly, Lock::None)?;
    let host = |source| OpenError::Host {
        path: path.to_owned(),
        source,
    };
    let (records, newest) = match place::locate(&opened.file, path, at) {
        Ok(Place::Chain(chain)) => (Some(chain.place()), chain.newest()),
        Ok(Place::Nowhere(_)) => (None, Ok(None)),
        Err(error) => (None, Err(error)),
    };
    let is_dying = matches!(&newest, Ok(Some(record)) if record.owner.has_ended_here());
    let probe = || ofd::probe(&opened.file, Role::Writer);
    let fence = freed_soon(DEAD_FREED_MS_MAX, probe, |fence| {
        is_dying && matches!(fence, Ok(Some(_)))
    })
    .map_err(host)?;
    Ok(Standing {
        fence,
        records,
        newest,
    })
}

/// Declares the lease of the image at `path` broken, as `owner`: afterwards the next who wants it gets it.
///
/// # Errors
///
/// When somebody alive has the image open, whom no other process can keep from writing; when there is
/// nothing to break; when it cannot be recorded.
pub fn break_lease(path: &str, at: Option<&str>, owner: &Owner) -> Result<Record, OpenError> {
    let file = Arc::new(open_file(path, Access::ReadWrite, Lock::Exclusive)?.file);
    let terms = Terms {
        at,
        ..Terms::new(Lock::Exclusive, owner)
    };
    let candidate = Candidate {
        file: &file,
        path,
        terms: &terms,
    };
    // Held until the record is written; it falls with the descriptor.
    candidate.take_fence(Role::Writer)?;
    let Place::Chain(chain) = candidate.place()? else {
        return Err(LeaseError::Unrecorded {
            path: path.to_owned(),
        }
        .into());
    };
    let failed = |source| LeaseError::Chain {
        path: path.to_owned(),
        source,
    };
    let broken = match chain.newest() {
        Ok(Some(last)) if last.phase.is_owned() || last.phase == Phase::Moved => {
            Record::after(Some(&last), Phase::Broken, owner)
        }
        Ok(_) => {
            return Err(LeaseError::Free {
                path: path.to_owned(),
            }
            .into());
        }
        Err(ChainError::Unreadable { number, .. }) => Record::over_unreadable(number, owner),
        Err(error) => return Err(failed(error).into()),
    };
    let broken = broken.ok_or(ChainError::Exhausted).map_err(failed)?;
    chain.append(&broken).map_err(failed)?;
    Ok(broken)
}
