//! Files of a snapshot that cannot be opened, in words for whoever wants a snapshot and no disk.

use std::fmt;

use coracle_storage::backend::{Access, Backend};
use coracle_storage::lease::{Lock, Owner, Terms};
use coracle_storage::open::{self, OpenError};

/// One of the two files of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Everything but the memory.
    State,
    /// The memory.
    Memory,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::State => "state file",
            Self::Memory => "memory file",
        })
    }
}

/// Why one is not opened.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the text of an error is its documentation")]
pub enum UnopenedError {
    #[error("there is no {part} `{path}`: make the snapshot first, or correct the path")]
    Missing { part: Part, path: String },
    #[error(
        "{part} `{path}` has {size_bytes} bytes, and none is of that size: it was cut off, or is another file"
    )]
    CutOff {
        part: Part,
        path: String,
        size_bytes: u64,
    },
    #[error("cannot open {part} `{path}`")]
    Other {
        part: Part,
        path: String,
        #[source]
        source: OpenError,
    },
}

impl UnopenedError {
    pub(crate) fn new(part: Part, path: &str, source: OpenError) -> Self {
        let path = path.to_owned();
        match source {
            OpenError::Missing { .. } => Self::Missing { part, path },
            OpenError::TooSmall { size_bytes, .. } | OpenError::PartialSector { size_bytes, .. } => {
                Self::CutOff {
                    part,
                    path,
                    size_bytes,
                }
            }
            source => Self::Other { part, path, source },
        }
    }
}

/// Opens one to be read. Nobody writes it once it has its name, so there is nothing to lock.
pub(crate) fn open(part: Part, path: &str, owner: &Owner) -> Result<Box<dyn Backend>, UnopenedError> {
    let opened = open::open(path, Access::ReadOnly, &Terms::new(Lock::None, owner));
    let image = opened.map_err(|source| UnopenedError::new(part, path, source))?;
    Ok(image.backend)
}
