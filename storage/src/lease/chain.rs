//! The records of one image, in files that are numbered: `<image>.lease.<n>`.
//!
//! Whoever makes number n + 1 first has won that step. A record is written under another name, made
//! durable and then linked to its number, so that nobody ever sees half of one:
//!
//! ```text
//!   <image>.lease.new-… ──fsync──link──► <image>.lease.<n+1>     EEXIST: somebody else was first
//!                                        <image>.lease.<n>       kept: who had it before
//!                                        <image>.lease.<n-1>     removed
//! ```

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{AtFlags, Dir, Mode, OFlags};
use rustix::io::Errno;

use super::record::{RECORD_BYTES_MAX, Record, RecordError};

/// The place of one image's records.
#[derive(Debug)]
pub(crate) struct Chain {
    directory: File,
    /// For messages.
    path: PathBuf,
    /// What a record's name has before its number.
    prefix: OsString,
}

/// What a look at the directory has found.
#[derive(Debug, Default)]
struct Survey {
    newest: Option<u64>,
    /// Numbers that are not the newest, as many as one step clears away.
    older: Vec<u64>,
    /// Names of records that were never linked to a number, as many likewise.
    unfinished: Vec<OsString>,
}

/// Why a chain cannot be read or continued.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    /// There is nothing to write records with.
    #[error("no lease record can be kept in {}", directory.display())]
    NoPlace {
        /// Where.
        directory: PathBuf,
        /// What the host says.
        #[source]
        source: io::Error,
    },
    /// Something stands where the newest record should.
    #[error("the newest lease record, {}, cannot be used", file.display())]
    Unreadable {
        /// Its name.
        file: PathBuf,
        /// Its number, the step that comes next.
        number: u64,
        /// What is wrong with it.
        #[source]
        source: UnreadableError,
    },
    /// The number of the step is taken.
    #[error("another process has made step {number} of the lease first")]
    Lost {
        /// The step.
        number: u64,
    },
    /// No number is left.
    #[error("the lease has had as many steps as there are numbers")]
    Exhausted,
    /// Anything else.
    #[error("cannot {action} in {}", directory.display())]
    Host {
        /// What was tried.
        action: &'static str,
        /// Where.
        directory: PathBuf,
        /// What the host says.
        #[source]
        source: io::Error,
    },
}

/// Why a file is not taken for the newest record.
#[derive(Debug, thiserror::Error)]
pub enum UnreadableError {
    /// It cannot be opened or read.
    #[error("it cannot be read")]
    Io(#[from] io::Error),
    /// Its content.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// It says another number than its name does.
    #[error("it says of itself that it is number {0}: it was renamed or copied")]
    Number(u64),
}

/// How much one step clears away at most.
const SWEPT_MAX: usize = 64;
/// How often the newest record may be replaced while it is being looked for.
const LOOKS_MAX: usize = 16;

impl Chain {
    /// The chain whose records are named after `path`, which need not exist.
    pub(crate) fn of(path: &Path) -> Result<Self, ChainError> {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        let parent = parent.unwrap_or(Path::new("."));
        let no_place = |source| ChainError::NoPlace {
            directory: parent.to_owned(),
            source,
        };
        let name = path
            .file_name()
            .ok_or_else(|| no_place(io::ErrorKind::InvalidFilename.into()))?;
        let mut prefix = name.to_owned();
        prefix.push(".lease.");
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory =
            rustix::fs::open(parent, flags, Mode::empty()).map_err(|errno| no_place(errno.into()))?;
        Ok(Self {
            directory: directory.into(),
            path: parent.to_owned(),
            prefix,
        })
    }

    /// The newest record. One listing of the directory finds it, however many numbers are missing.
    pub(crate) fn newest(&self) -> Result<Option<Record>, ChainError> {
        self.find_newest(|_| ())
    }

    /// The newest record; what crashed writers have left is removed. Only for whoever has the image's
    /// fence: there is no other writer then.
    pub(crate) fn recovered(&self) -> Result<Option<Record>, ChainError> {
        self.find_newest(|survey| survey.unfinished.iter().for_each(|name| self.remove(name)))
    }

    fn find_newest(&self, mut seen: impl FnMut(&Survey)) -> Result<Option<Record>, ChainError> {
        for _ in 0..LOOKS_MAX {
            let survey = self.survey()?;
            seen(&survey);
            let Some(number) = survey.newest else {
                return Ok(None);
            };
            match self.read(number) {
                // Removed since it was listed: there is a newer one by now.
                Err(UnreadableError::Io(error)) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => {
                    return Err(ChainError::Unreadable {
                        file: self.path.join(self.name(number)),
                        number,
                        source,
                    });
                }
                Ok(record) => return Ok(Some(record)),
            }
        }
        Err(self.failed(
            "find a lease record that stays",
            io::ErrorKind::ResourceBusy.into(),
        ))
    }

    /// Makes the step that `record` describes: afterwards it is durable, and it is the newest.
    ///
    /// # Errors
    ///
    /// [`ChainError::Lost`] when another has made that step, or a later one.
    pub(crate) fn append(&self, record: &Record) -> Result<(), ChainError> {
        let (number, name) = (record.epoch, self.name(record.epoch));
        let unfinished = self.write(record)?;
        let linked = rustix::fs::linkat(
            &self.directory,
            &unfinished,
            &self.directory,
            &name,
            AtFlags::empty(),
        );
        self.remove(&unfinished);
        match linked {
            Ok(()) => {}
            Err(Errno::EXIST) => return Err(ChainError::Lost { number }),
            Err(errno) => return Err(self.refused("link a lease record", errno)),
        }
        self.sync()?;
        let survey = self.survey()?;
        if survey.newest.is_some_and(|newest| newest > number) {
            // So late that the number was free again: it had been taken and cleared away.
            self.remove(&name);
            return Err(ChainError::Lost { number });
        }
        let kept = number - 1;
        for older in survey.older.into_iter().filter(|older| *older < kept) {
            self.remove(&self.name(older));
        }
        Ok(())
    }

    /// Says whether the step that `record` describes could be made now: all of it is tried under names that are no numbers, and
    /// nothing of that stays.
    pub(crate) fn try_out(&self, record: &Record) -> Result<(), ChainError> {
        let unfinished = self.write(record)?;
        let mut linked = unfinished.clone();
        linked.push("-tried");
        let outcome = rustix::fs::linkat(
            &self.directory,
            &unfinished,
            &self.directory,
            &linked,
            AtFlags::empty(),
        );
        self.remove(&unfinished);
        outcome.map_err(|errno| self.refused("link a lease record", errno))?;
        self.remove(&linked);
        Ok(())
    }

    /// Whether the records of both are the same files.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        let id = |chain: &Self| {
            let directory = chain.directory.metadata().ok()?;
            Some((directory.dev(), directory.ino()))
        };
        self.prefix == other.prefix && id(self) == id(other)
    }

    /// Makes the step that `record` describes, by whoever may have made it before and was not told that it is durable.
    ///
    /// # Errors
    ///
    /// As [`Self::append`].
    pub(crate) fn complete(&self, record: &Record) -> Result<(), ChainError> {
        if self.newest()?.as_ref() == Some(record) {
            return self.sync();
        }
        self.append(record)
    }

    /// Where the records are, for people: the pattern of their names.
    pub(crate) fn place(&self) -> PathBuf {
        let mut name = self.prefix.clone();
        name.push("<n>");
        self.path.join(name)
    }

    fn survey(&self) -> Result<Survey, ChainError> {
        let failed = |errno: Errno| self.failed("list the lease records", errno.into());
        let mut survey = Survey::default();
        for entry in Dir::read_from(&self.directory).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name().to_bytes();
            let Some(rest) = name.strip_prefix(self.prefix.as_bytes()) else {
                continue;
            };
            if rest.starts_with(UNFINISHED.as_bytes()) {
                if survey.unfinished.len() < SWEPT_MAX {
                    survey.unfinished.push(OsString::from_vec(name.to_vec()));
                }
            } else if let Some(number) = number(rest) {
                survey.add(number);
            }
        }
        Ok(survey)
    }

    fn read(&self, number: u64) -> Result<Record, UnreadableError> {
        // Whoever may write to the directory may have put anything there: no link is followed, no FIFO waited for.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.directory, self.name(number), flags, Mode::empty())
            .map_err(io::Error::from)?;
        let mut bytes = Vec::new();
        let limit = u64::try_from(RECORD_BYTES_MAX).expect("it is small") + 1;
        File::from(file).take(limit).read_to_end(&mut bytes)?;
        let record = Record::parse(&bytes)?;
        if record.epoch == number {
            Ok(record)
        } else {
            Err(UnreadableError::Number(record.epoch))
        }
    }

    /// Writes `record` durably under a name that nobody else uses.
    fn write(&self, record: &Record) -> Result<OsString, ChainError> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let mut name = self.prefix.clone();
        let serial = NEXT.fetch_add(1, Ordering::Relaxed);
        name.push(format!("{UNFINISHED}{}-{serial}", record.owner.incarnation));
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::ROTH;
        let file = rustix::fs::openat(&self.directory, &name, flags, mode)
            .map_err(|errno| self.refused("make a lease record", errno))?;
        let mut file = File::from(file);
        let written = file
            .write_all(record.text().as_bytes())
            .and_then(|()| file.sync_all());
        written.map_err(|source| {
            self.remove(&name);
            self.failed("write a lease record", source)
        })?;
        Ok(name)
    }

    fn sync(&self) -> Result<(), ChainError> {
        match rustix::fs::fsync(&self.directory) {
            // File systems that have nothing to make durable about a directory.
            Ok(()) | Err(Errno::INVAL) => Ok(()),
            Err(errno) => Err(self.failed("make a lease record durable", errno.into())),
        }
    }

    fn name(&self, number: u64) -> OsString {
        let mut name = self.prefix.clone();
        name.push(number.to_string());
        name
    }

    /// What cannot be removed is in nobody's way, and the next step tries again.
    fn remove(&self, name: &OsString) {
        let _ = rustix::fs::unlinkat(&self.directory, name, AtFlags::empty());
    }

    /// Tells a directory in which nothing can be made from one in which something went wrong.
    fn refused(&self, action: &'static str, errno: Errno) -> ChainError {
        match errno {
            // The last ones: no hard links there, and no room for the name.
            Errno::ACCESS
            | Errno::PERM
            | Errno::ROFS
            | Errno::OPNOTSUPP
            | Errno::MLINK
            | Errno::NAMETOOLONG => ChainError::NoPlace {
                directory: self.path.clone(),
                source: errno.into(),
            },
            _ => self.failed(action, errno.into()),
        }
    }

    fn failed(&self, action: &'static str, source: io::Error) -> ChainError {
        ChainError::Host {
            action,
            directory: self.path.clone(),
            source,
        }
    }
}

/// What stands in the name of a record in place of its number, until it has one.
const UNFINISHED: &str = "new-";

impl Survey {
    fn add(&mut self, number: u64) {
        let (newest, older) = match self.newest {
            None => (number, None),
            Some(newest) => (newest.max(number), Some(newest.min(number))),
        };
        self.newest = Some(newest);
        self.older.extend(older.filter(|_| self.older.len() < SWEPT_MAX));
    }
}

/// The number that a name ends with, if it is written as we write it.
fn number(text: &[u8]) -> Option<u64> {
    let text = str::from_utf8(text).ok()?;
    let number: u64 = text.parse().ok()?;
    (number.to_string() == text).then_some(number)
}

#[cfg(test)]
mod tests;
