//! What is said while memory is fetched, as each side takes it.

use std::io::{self, BufRead, Write};

use super::super::pages::{Ordered, PagesError};
use super::super::wire::{Kind, Wire, WireError};
use super::absent::{AbsentError, Telling};
use super::filling::Filling;
use crate::snapshot::memory::{PAGE_BYTES, PageSet};

/// Why a connection does not go on.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the text of an error is its documentation")]
pub enum FrameError {
    #[error("the other side was lost")]
    Wire(#[from] WireError),
    #[error("the other side has sent what cannot be")]
    Pages(#[from] PagesError),
    #[error("the other side has said what cannot be")]
    Absent(#[from] AbsentError),
    #[error("the host does not take a page")]
    Host(#[source] io::Error),
    #[error("the other side refuses: {0}")]
    Refused(String),
}

/// What the target has heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// Pages, which are in their places.
    Pages,
    /// That the source has heard that none is absent.
    Whole,
}

/// What the source has heard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked {
    /// That somebody waits for this page, which is one of the memory.
    Want(u64),
    /// That no page is absent.
    Whole,
    /// That the guest is lost, and why.
    Lost(String),
}

const NUMBER_BYTES: usize = 8;

/// Takes one frame in at the target.
///
/// # Errors
///
/// When the source is lost, or has sent what has no place; [`FrameError::Host`] when a page cannot be put where it belongs.
pub fn take_frame<S: BufRead + Write>(
    wire: &mut Wire<S>,
    filling: &mut Filling,
) -> Result<Heard, FrameError> {
    let pages = filling.absent().size_bytes() / PAGE_BYTES as u64;
    let (kind, body) = wire.receive()?;
    match kind {
        Kind::Pages => {
            let (number, bytes) = body.split_first_chunk().ok_or(PagesError::Partial)?;
            if bytes.is_empty() || !bytes.len().is_multiple_of(PAGE_BYTES) {
                return Err(PagesError::Partial.into());
            }
            let first = u64::from_le_bytes(*number);
            within(first, (bytes.len() / PAGE_BYTES) as u64, pages)?;
            filling.fill(first, bytes).map_err(FrameError::Host)?;
        }
        Kind::Zeros => {
            let (numbers, rest) = body.as_chunks::<NUMBER_BYTES>();
            let ([first, count], []) = (numbers, rest) else {
                return Err(PagesError::Partial.into());
            };
            let (first, count) = (u64::from_le_bytes(*first), u64::from_le_bytes(*count));
            within(first, count, pages)?;
            filling.zero(first, count).map_err(FrameError::Host)?;
        }
        Kind::Whole => return Ok(Heard::Whole),
        found => return Err(WireError::Unexpected { found }.into()),
    }
    Ok(Heard::Pages)
}

fn within(first: u64, count: u64, pages: u64) -> Result<(), PagesError> {
    match first.checked_add(count) {
        Some(end) if end <= pages => Ok(()),
        _ => Err(PagesError::Outside { first, count }),
    }
}

/// Hears at the source which pages of a memory of `size_bytes` are absent.
///
/// # Errors
///
/// When the target is lost, or says what cannot be.
pub fn hear_absent<S: BufRead + Write>(wire: &mut Wire<S>, size_bytes: u64) -> Result<PageSet, FrameError> {
    let mut telling = Telling::new(size_bytes);
    loop {
        match wire.receive()? {
            (Kind::Absent, body) => {
                if telling.take(body)? {
                    return Ok(telling.finish()?);
                }
            }
            (Kind::Refused, why) => {
                return Err(FrameError::Refused(String::from_utf8_lossy(why).into_owned()));
            }
            (found, _) => return Err(WireError::Unexpected { found }.into()),
        }
    }
}

/// Hears at the source what is to be sent next, of a memory of so many `pages`.
///
/// # Errors
///
/// As [`hear_absent`].
pub fn hear<S: BufRead + Write>(wire: &mut Wire<S>, pages: u64) -> Result<Asked, FrameError> {
    match wire.receive()? {
        (Kind::Want, body) => {
            let number: &[u8; NUMBER_BYTES] = body.try_into().map_err(|_| PagesError::Partial)?;
            let page = u64::from_le_bytes(*number);
            within(page, 1, pages)?;
            Ok(Asked::Want(page))
        }
        (Kind::Whole, _) => Ok(Asked::Whole),
        (Kind::Refused, why) => Ok(Asked::Lost(String::from_utf8_lossy(why).into_owned())),
        (found, _) => Err(WireError::Unexpected { found }.into()),
    }
}

/// Sends `count` pages from `first` on, which are ones of the memory, as they are. `buffer` is for them.
///
/// # Errors
///
/// When the target is lost.
pub fn send_pages<S: BufRead + Write>(
    wire: &mut Wire<S>,
    ordered: &Ordered,
    (first, count): (u64, u64),
    buffer: &mut Vec<u8>,
) -> Result<(), WireError> {
    buffer.resize(usize::try_from(count).unwrap_or(usize::MAX) * PAGE_BYTES, 0);
    ordered
        .read(first, buffer)
        .expect("the pages are ones of the memory");
    if buffer
        .as_chunks::<PAGE_BYTES>()
        .0
        .iter()
        .all(|page| *page == [0; PAGE_BYTES])
    {
        wire.send(Kind::Zeros, &[&first.to_le_bytes(), &count.to_le_bytes()])?;
    } else {
        wire.send(Kind::Pages, &[&first.to_le_bytes(), buffer])?;
    }
    wire.flush()
}
