//! Reads and writes of a simulated server: by which right, how much of them, and in how many parts.

use super::rights::Right;
use super::state::State;
use super::tree::{File, Lasts, number};
use super::{Change, Event};
use crate::nfs::v4::{
    Allocation, CloneRange, Content, FileHandle, Read, Seek, SeekResult, Setattr, ShareAccess, Stability,
    Stateid, Status, Verifier, Write, WriteResult,
};

/// A WRITE that was let in, and is carried out part by part whatever happens meanwhile.
#[derive(Debug)]
pub(super) struct Admitted {
    file: File,
    number: u64,
    right: Right,
    pieces: Vec<(u64, Vec<u8>)>,
    count: u32,
    stability: Stability,
    /// That of the time at which the first part may have been written.
    verifier: Verifier,
}

/// What was read.
#[derive(Debug)]
pub(super) struct Bytes {
    pub(super) bytes: Vec<u8>,
    pub(super) is_end: bool,
}

const READ: u32 = ShareAccess::READ.0;
const WRITE: u32 = ShareAccess::WRITE.0;
/// What a crash keeps or loses as a whole, and what a disk reads and writes at least.
const SECTOR_BYTES: u64 = 512;

impl Admitted {
    pub(super) fn is_done(&self) -> bool {
        self.pieces.is_empty()
    }

    pub(super) fn result(&self) -> WriteResult {
        WriteResult {
            count: self.count,
            committed: self.stability,
            verifier: self.verifier,
        }
    }

    fn lasts(&self) -> Lasts {
        match self.stability {
            Stability::Unstable => Lasts::AfterSync,
            Stability::DataSync | Stability::FileSync => Lasts::AtOnce,
        }
    }
}

impl State {
    /// Whether a client may read or write a file, and by which right.
    fn admit(&mut self, client: u64, stateid: &Stateid, file: u64, share: u32) -> Result<Right, Status> {
        if *stateid == Stateid::ANONYMOUS && self.options.quirks.grace_for_anonymous && self.is_in_grace() {
            return Err(Status::GRACE);
        }
        self.rights.admit(stateid, client, file, share, self.life)
    }

    /// How much of so many bytes is moved.
    fn moved(&mut self, len_bytes: u64, bytes_max: u32) -> u64 {
        let len_bytes = len_bytes.min(bytes_max.into());
        let sectors = len_bytes / SECTOR_BYTES;
        if sectors > 1 && self.dice.one_in(self.options.mishaps.short_one_in) {
            return (1 + self.dice.below(sectors - 1)) * SECTOR_BYTES;
        }
        len_bytes
    }

    pub(super) fn read(&mut self, client: u64, number: u64, read: &Read) -> Result<Bytes, Status> {
        let file = self.tree.file(number).ok_or(Status::ISDIR)?;
        self.admit(client, &read.stateid, number, READ)?;
        let limit = self.options.limits.read_bytes_max;
        let len_bytes = self.moved(read.count.into(), limit);
        let bytes = self.tree.read(file, read.offset, len_bytes);
        let is_end = read.offset + bytes.len() as u64 >= self.tree.len_bytes(file);
        Ok(Bytes { bytes, is_end })
    }

    pub(super) fn write(
        &mut self,
        client: u64,
        number: u64,
        write: &Write<'_>,
    ) -> Result<WriteResult, Status> {
        let mut admitted = self.admit_write(client, number, write)?;
        while !admitted.is_done() {
            self.write_piece(&mut admitted, client);
        }
        if self.options.quirks.forgets_makers {
            self.tree.forget_maker(number);
        }
        Ok(admitted.result())
    }

    fn admit_write(&mut self, client: u64, number: u64, write: &Write<'_>) -> Result<Admitted, Status> {
        let file = self.tree.file(number).ok_or(Status::ISDIR)?;
        let right = self.admit(client, &write.stateid, number, WRITE)?;
        let limit = self.options.limits.write_bytes_max;
        let count = self.moved(write.data.len() as u64, limit);
        let bytes = write.data.get(..index(count)).unwrap_or_default();
        let stability = match write.stability {
            Stability::Unstable if self.options.quirks.is_stable => Stability::FileSync,
            asked => asked,
        };
        Ok(Admitted {
            file,
            number,
            right,
            pieces: vec![(write.offset, bytes.to_vec())],
            count: u32::try_from(count).expect("it is no more than a record"),
            stability,
            verifier: self.verifier(),
        })
    }

    /// Lets a WRITE in that is carried out in parts; `None` if it is not let in.
    pub(super) fn admit_slow(
        &mut self,
        client: u64,
        handle: &FileHandle,
        write: &Write<'_>,
    ) -> Option<Admitted> {
        let mut admitted = self.admit_write(client, number(handle)?, write).ok()?;
        let (mut offset, mut bytes) = admitted.pieces.pop()?;
        for _ in 0..self.dice.below(4) {
            let sectors = bytes.len() as u64 / SECTOR_BYTES;
            if sectors < 2 {
                break;
            }
            let cut = (1 + self.dice.below(sectors - 1)) * SECTOR_BYTES;
            let rest = bytes.split_off(index(cut));
            admitted.pieces.push((offset, bytes));
            (offset, bytes) = (offset + cut, rest);
        }
        admitted.pieces.push((offset, bytes));
        self.dice.shuffle(&mut admitted.pieces);
        Some(admitted)
    }

    /// Carries out one part of a WRITE.
    pub(super) fn write_piece(&mut self, admitted: &mut Admitted, client: u64) {
        let Some((offset_bytes, bytes)) = admitted.pieces.pop() else {
            return;
        };
        self.tree
            .write(admitted.file, offset_bytes, &bytes, admitted.lasts());
        self.log(
            client,
            admitted.number,
            (offset_bytes, bytes.len() as u64),
            admitted.right,
        );
    }

    pub(super) fn deallocate(&mut self, client: u64, number: u64, range: &Allocation) -> Result<(), Status> {
        let file = self.tree.file(number).ok_or(Status::ISDIR)?;
        let right = self.admit(client, &range.stateid, number, WRITE)?;
        if !self.options.quirks.deallocates {
            return Err(Status::NOTSUPP);
        }
        let end = range.offset.checked_add(range.length).ok_or(Status::INVAL)?;
        let end = end.min(self.tree.len_bytes(file));
        if range.offset < end {
            self.tree.zero(file, range.offset, end - range.offset);
            self.log(client, number, (range.offset, end - range.offset), right);
        }
        Ok(())
    }

    /// Where data or a hole begin: a block that holds nothing but zeros is one.
    pub(super) fn seek(&mut self, client: u64, number: u64, seek: &Seek) -> Result<SeekResult, Status> {
        let file = self.tree.file(number).ok_or(Status::ISDIR)?;
        self.admit(client, &seek.stateid, number, READ)?;
        let len_bytes = self.tree.len_bytes(file);
        if !self.options.quirks.seeks {
            return Err(Status::NOTSUPP);
        }
        if seek.offset >= len_bytes {
            return Err(Status::NXIO);
        }
        if self.dice.one_in(self.options.hostility.astray_one_in) {
            let anywhere = [
                0,
                1,
                seek.offset.wrapping_sub(1),
                seek.offset,
                seek.offset + 1,
                len_bytes,
                u64::MAX,
            ];
            return Ok(SeekResult {
                eof: self.dice.one_in(4),
                offset: self.dice.pick(&anywhere),
            });
        }
        let block_bytes = self.options.limits.block_bytes;
        let first = seek.offset / block_bytes * block_bytes;
        let content = self.tree.read(file, first, u64::MAX);
        let is_sought = |block: &[u8]| block.iter().any(|byte| *byte != 0) == (seek.what == Content::Data);
        let found = content.chunks(index(block_bytes)).position(is_sought);
        let found = found.map(|block| (first + block as u64 * block_bytes).max(seek.offset));
        match (found, seek.what) {
            (Some(offset), _) => Ok(SeekResult { eof: false, offset }),
            (None, Content::Data) if self.options.quirks.refuses_to_seek_nothing => Err(Status::NXIO),
            // Behind its end each file is a hole.
            (None, _) => Ok(SeekResult {
                eof: true,
                offset: len_bytes,
            }),
        }
    }

    /// Makes a range hold what a range of another file holds.
    pub(super) fn clone_range(
        &mut self,
        client: u64,
        (from, to): (u64, u64),
        range: &CloneRange,
    ) -> Result<(), Status> {
        let source = self.tree.file(from).ok_or(Status::WRONG_TYPE)?;
        let destination = self.tree.file(to).ok_or(Status::WRONG_TYPE)?;
        self.admit(client, &range.source_stateid, from, READ)?;
        let right = self.admit(client, &range.destination_stateid, to, WRITE)?;
        if !self.options.quirks.clones {
            return Err(Status::NOTSUPP);
        }
        let len_bytes = match range.count {
            0 => u64::MAX,
            count => count,
        };
        let bytes = self.tree.read(source, range.source_offset, len_bytes);
        if range.count != 0 && bytes.len() as u64 != range.count {
            return Err(Status::INVAL);
        }
        self.tree
            .write(destination, range.destination_offset, &bytes, Lasts::AfterSync);
        self.log(client, to, (range.destination_offset, bytes.len() as u64), right);
        Ok(())
    }

    pub(super) fn resize(&mut self, client: u64, number: u64, setattr: &Setattr) -> Result<(), Status> {
        let file = self.tree.file(number).ok_or(Status::ISDIR)?;
        let right = self.admit(client, &setattr.stateid, number, WRITE)?;
        let size = setattr.attributes.size.ok_or(Status::ATTRNOTSUPP)?;
        let before = self.tree.len_bytes(file);
        // A growth that was said to have failed may have made it longer, where nobody has written.
        let cut_off = self.tree.read(file, size, u64::MAX);
        if cut_off.iter().any(|byte| *byte != 0) {
            self.complaints
                .push(format!("a SETATTR cuts off what is written behind {size}"));
        }
        self.tree.grow(file, size);
        self.log(client, number, (before, size.saturating_sub(before)), right);
        Ok(())
    }

    fn log(&mut self, client: u64, number: u64, (offset_bytes, len_bytes): (u64, u64), right: Right) {
        let client = self.clients.get(client);
        let client = client.map_or_else(Vec::new, |client| client.owner.owner_id.clone());
        self.events.push(Event::Wrote(Change {
            client,
            name: self.name_of(number),
            offset_bytes,
            len_bytes,
            right,
        }));
    }
}

fn index(bytes: u64) -> usize {
    usize::try_from(bytes).expect("this is a 64-bit monitor")
}
