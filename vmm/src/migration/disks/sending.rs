//! The source: what of its disks is to be sent, and how.

use std::io::{BufRead, Write};
use std::ops::Range;
use std::sync::Arc;

use coracle_storage::changes::{Blocks, Changes, Watch};
use coracle_storage::copy::{Grains, Original, Part, grains};

use crate::migration::send::SendError;
use crate::migration::wire::{Kind, PAGES_BYTES_MAX, Wire, WireError};

/// A drive that goes along.
#[derive(Debug)]
pub struct Copied {
    /// The drive.
    pub id: String,
    /// How long it is.
    pub size_bytes: u64,
    /// Its image, or the file of its overlay.
    pub original: Original,
    /// Where its disk marks what the guest changes.
    pub changes: Arc<Changes>,
}

/// All of them, being sent.
pub(in crate::migration) struct Sending<'a> {
    disks: Vec<Disk<'a>>,
    buffer: Vec<u8>,
    /// What was read since something was surely on its way.
    unflushed_bytes: usize,
}

struct Disk<'a> {
    copied: &'a Copied,
    number: u32,
    watch: Watch,
    /// What is to be sent.
    left: Blocks,
    /// The target has nothing of it yet, and so its holes need not be told.
    is_fresh: bool,
}

/// A target that hears nothing for long takes the source for dead: so much zeros are read in less time than that.
const UNFLUSHED_BYTES_MAX: usize = 16 << 20;

impl<'a> Sending<'a> {
    /// All of each is to be sent, and what is changed from now on.
    pub(in crate::migration) fn begin(copied: &'a [Copied]) -> Self {
        let disks = copied.iter().zip(0..).map(|(copied, number)| {
            let size_bytes = copied.original.size_bytes();
            let watch = copied.changes.watch(copied.size_bytes);
            let mut left = Blocks::none(size_bytes);
            left.insert(0..size_bytes);
            Disk {
                copied,
                number,
                watch,
                left,
                is_fresh: true,
            }
        });
        Self {
            disks: disks.collect(),
            buffer: vec![0; PAGES_BYTES_MAX],
            unflushed_bytes: 0,
        }
    }

    /// Whether there are any.
    pub(in crate::migration) fn is_empty(&self) -> bool {
        self.disks.is_empty()
    }

    /// What was changed meanwhile is to be sent, too.
    pub(in crate::migration) fn look(&mut self) {
        for disk in &mut self.disks {
            for range in disk.watch.take().ranges() {
                disk.left.insert(disk.copied.original.places(&range));
            }
        }
    }

    /// The same when nothing is in flight any more, and everything was flushed: this is all that is left.
    pub(in crate::migration) fn look_last(&mut self) {
        self.look();
        for disk in &mut self.disks {
            disk.left.insert(disk.copied.original.ledger());
        }
    }

    /// How much is to be sent, in bytes.
    pub(in crate::migration) fn left_bytes(&self) -> u64 {
        let left = self.disks.iter().map(|disk| {
            let (bytes, original) = (disk.left.bytes(), &disk.copied.original);
            match disk.is_fresh {
                true => original.data_bytes().unwrap_or(bytes).min(bytes),
                false => bytes,
            }
        });
        left.sum()
    }

    /// How much would be, if the guest stood still now.
    pub(in crate::migration) fn last_bytes(&self) -> u64 {
        let ledgers = self
            .disks
            .iter()
            .map(|disk| disk.copied.original.ledger_bytes().unwrap_or_default());
        self.left_bytes() + ledgers.sum::<u64>()
    }

    /// Sends what is to be sent, and says how much that was; `sent` is told of each part: how much of a disk, and how many bytes
    /// of frames that took.
    ///
    /// # Errors
    ///
    /// When an image cannot be read, the connection has ended, or `sent` wants no more.
    pub(in crate::migration) fn send<S: BufRead + Write>(
        &mut self,
        wire: &mut Wire<S>,
        mut sent: impl FnMut(u64, u64) -> Result<(), WireError>,
    ) -> Result<u64, SendError> {
        let mut all_bytes = 0;
        let Self {
            disks,
            buffer,
            unflushed_bytes,
        } = self;
        for disk in disks {
            let left = std::mem::replace(&mut disk.left, Blocks::none(disk.copied.original.size_bytes()));
            for mut range in left.ranges() {
                while !range.is_empty() {
                    let before = wire.sent_bytes();
                    let done = disk.send_first(wire, &range, buffer)?;
                    *unflushed_bytes += usize::try_from(done.end - done.start)
                        .unwrap_or(usize::MAX)
                        .min(buffer.len());
                    if *unflushed_bytes >= UNFLUSHED_BYTES_MAX {
                        wire.flush()?;
                        *unflushed_bytes = 0;
                    }
                    range.start = done.end;
                    let bytes = wire.sent_bytes() - before;
                    // Holes of which nothing has to be said were not among what was left either.
                    let disk_bytes = if bytes > 0 { done.end - done.start } else { 0 };
                    all_bytes += disk_bytes;
                    sent(disk_bytes, bytes)?;
                }
            }
            disk.is_fresh = false;
        }
        Ok(all_bytes)
    }
}

impl Disk<'_> {
    /// Sends the first part of `range`, and says which that is.
    fn send_first<S: BufRead + Write>(
        &self,
        wire: &mut Wire<S>,
        range: &Range<u64>,
        buffer: &mut [u8],
    ) -> Result<Range<u64>, SendError> {
        let part = match self.copied.original.first_part(range)? {
            Part::Data(part) => part,
            Part::Hole(part) => {
                if !self.is_fresh {
                    self.send_hole(wire, part.start, part.end - part.start)?;
                }
                return Ok(part);
            }
        };
        let len = usize::try_from(part.end - part.start).unwrap_or(usize::MAX);
        let bytes = match buffer.get_mut(..len) {
            Some(bytes) => bytes,
            None => buffer,
        };
        self.copied.original.read(bytes, part.start)?;
        for (offset, bytes, kind) in grains(bytes) {
            let at = part.start + offset as u64;
            match kind {
                Grains::Zeros => self.send_hole(wire, at, bytes.len() as u64)?,
                Grains::Data => {
                    let head = [&self.number.to_le_bytes()[..], &at.to_le_bytes()];
                    let [number, offset] = head;
                    wire.send(Kind::Blocks, &[number, offset, bytes])?;
                }
            }
        }
        Ok(part.start..part.start + bytes.len() as u64)
    }

    fn send_hole<S: BufRead + Write>(
        &self,
        wire: &mut Wire<S>,
        at: u64,
        len_bytes: u64,
    ) -> Result<(), WireError> {
        let parts: [&[u8]; 3] = [
            &self.number.to_le_bytes(),
            &at.to_le_bytes(),
            &len_bytes.to_le_bytes(),
        ];
        wire.send(Kind::Holes, &parts)
    }
}
