//! A request in flight: the READs that it takes, one after the other, and what becomes of them.

use std::time::{Duration, Instant};

use crate::backend::Geometry;
use crate::nfs::v3::verdict;
use crate::nfs::v4::status::Verdict;
use crate::remote::flights;
use crate::request::{Failure, Operation, Request, Segment};
use crate::segments;

use super::super::command::{Command, Ended, Outcome};

/// A read that was accepted.
#[derive(Debug)]
pub(super) struct Flight {
    request: Request,
    accepted: Instant,
    /// How much of it is done.
    done_bytes: u64,
    /// How much the command under way does.
    under_way_bytes: u64,
    /// How often in a row the server has put it off.
    retries: u32,
}

/// What is to be done about a flight.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Its next command is to be sent.
    Send,
    /// The same after a while.
    Later(Duration),
    /// The file is to be looked at first.
    Doubt(&'static str),
    /// It has ended.
    End(Result<(), Failure>),
}

/// A server puts a READ off while it fetches the file from somewhere, a tape for instance.
const RETRY_AFTER_MIN: Duration = Duration::from_millis(50);
const RETRY_AFTER_MAX: Duration = Duration::from_secs(1);
/// How often it may do so: for ten minutes.
const RETRIES_MAX: u32 = 600;

impl flights::Flight for Flight {
    fn accepted(&self) -> Instant {
        self.accepted
    }

    fn request(&self) -> &Request {
        &self.request
    }

    fn into_request(self) -> Request {
        self.request
    }
}

impl Flight {
    /// A flight of `request`, or how that ends at once.
    pub(super) fn begin(
        request: Request,
        geometry: &Geometry,
        now: Instant,
    ) -> Result<Self, (Request, Result<(), Failure>)> {
        match check(&request, geometry) {
            Ok(()) => Ok(Self {
                request,
                accepted: now,
                done_bytes: 0,
                under_way_bytes: 0,
                retries: 0,
            }),
            Err(outcome) => Err((request, outcome)),
        }
    }

    /// The flight's next command, of at most so many bytes. `segments` is empty.
    pub(super) fn command(
        &mut self,
        cookie: u64,
        read_bytes_max: u32,
        mut segments: Vec<Segment>,
    ) -> Command {
        let left = self.request.len_bytes - self.done_bytes;
        self.under_way_bytes = left.min(read_bytes_max.into());
        let range = self.done_bytes..self.done_bytes + self.under_way_bytes;
        segments::slice(&self.request.segments, range, &mut segments);
        Command {
            offset_bytes: self.request.offset_bytes + self.done_bytes,
            segments,
            cookie,
        }
    }

    /// Takes the end of its command in.
    pub(super) fn judge(&mut self, ended: &Ended) -> Next {
        let outcome = match ended.outcome {
            Ok(outcome) => outcome,
            Err(status) => return self.refused(verdict(status)),
        };
        match outcome {
            Outcome { bytes: 0, is_end } if !is_end => self.retry(),
            Outcome { bytes, is_end } => self.moved(bytes.into(), is_end),
        }
    }

    fn refused(&mut self, verdict: Verdict) -> Next {
        match verdict {
            Verdict::Later | Verdict::Grace => self.retry(),
            Verdict::FileLost => Next::Doubt("the file was replaced on the server"),
            Verdict::Failed(failure) => Next::End(Err(failure)),
            // Of states, which NFSv3 has not.
            _ => Next::End(Err(Failure::Host(libc::EIO))),
        }
    }

    fn retry(&mut self) -> Next {
        let wait = RETRY_AFTER_MIN * 2_u32.saturating_pow(self.retries.min(16));
        self.retries += 1;
        if self.retries > RETRIES_MAX {
            return Next::End(Err(Failure::Host(libc::EBUSY)));
        }
        Next::Later(wait.min(RETRY_AFTER_MAX))
    }

    /// Goes on behind what was done.
    fn moved(&mut self, bytes: u64, is_end: bool) -> Next {
        self.retries = 0;
        self.done_bytes += bytes.min(self.under_way_bytes);
        match self.done_bytes {
            done if done >= self.request.len_bytes => Next::End(Ok(())),
            // The file has become shorter.
            _ if is_end => Next::End(Err(Failure::Truncated)),
            _ => Next::Send,
        }
    }
}

/// Whether `request` is to be sent, or how it ends at once.
fn check(request: &Request, geometry: &Geometry) -> Result<(), Result<(), Failure>> {
    if request.operation == Operation::Grow {
        return match request.len_bytes {
            len if len == geometry.size_bytes => Err(Ok(())),
            len if len < geometry.size_bytes => Err(Err(Failure::OutOfRange)),
            _ => Err(Err(Failure::ReadOnly)),
        };
    }
    let end = request.offset_bytes.checked_add(request.len_bytes);
    if end.is_none_or(|end| end > geometry.size_bytes) {
        return Err(Err(Failure::OutOfRange));
    }
    match request.operation {
        // NFSv3 knows no holes, and nobody has a lease that could be raised.
        Operation::Flush
        | Operation::FindData
        | Operation::Raise
        | Operation::Yield
        | Operation::TakeBack => Err(Ok(())),
        Operation::Read if request.len_bytes == 0 => Err(Ok(())),
        Operation::Read => Ok(()),
        _ => Err(Err(Failure::ReadOnly)),
    }
}

#[cfg(test)]
mod tests;
