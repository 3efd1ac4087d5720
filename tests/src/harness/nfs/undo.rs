//! What a power failure takes from files behind a server that loses nothing: writes that were not committed.
//!
//! ```text
//! unstable write ──► noted with what it overwrites ──┬─ answered, then a COMMIT ──► safe
//!                                                    ├─ refused ──► it never was
//!                                                    └─ crash ──► undone, the last one first
//! ```
//!
//! A page cache survives the death of its writer, so with an ordinary server no test notices a COMMIT that was never
//! sent. A proxy that acknowledged writes itself, as that for iSCSI does, would have to speak for the server's sessions:
//! each slot's sequence and its replies, stateids that it cannot check, late duplicates that only the server can tell. So
//! here every message passes, and the server judges all of it; what it was let write is taken back in its files.
//!
//! Only blocks that still hold what was written are taken back: what somebody else has written over them is his.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use super::compound::Slot;

/// The files of one directory of a server, and what of them can be lost.
#[derive(Debug)]
pub(super) struct Undo {
    directory: PathBuf,
    /// By their handles, as far as clients have looked them up by name.
    files: BTreeMap<Vec<u8>, File>,
    /// In the order in which they went to the server.
    writes: BTreeMap<u64, Written>,
    next_number: u64,
    crashes: u64,
    /// How often it had crashed when a slot's last request came: a server answers a repeated one as it did then.
    slots: BTreeMap<Slot, (u32, u64)>,
}

/// One write that is not safe.
#[derive(Debug)]
struct Written {
    handle: Vec<u8>,
    offset: u64,
    before: Vec<u8>,
    data: Vec<u8>,
    is_answered: bool,
}

/// What somebody may have written over in part, or not at all.
const BLOCK_BYTES: usize = 512;
/// Spreads the number of crashes over a verifier, whose own bits servers count up.
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;

impl Undo {
    pub(super) fn new(directory: PathBuf) -> Self {
        Self {
            directory,
            files: BTreeMap::new(),
            writes: BTreeMap::new(),
            next_number: 0,
            crashes: 0,
            slots: BTreeMap::new(),
        }
    }

    /// Takes note which file a handle means. One that is not in the directory can lose nothing.
    pub(super) fn learn(&mut self, handle: &[u8], name: &[u8]) {
        if self.files.contains_key(handle) {
            return;
        }
        let path = self.directory.join(OsStr::from_bytes(name));
        if let Ok(file) = File::options().read(true).write(true).open(path) {
            self.files.insert(handle.to_vec(), file);
        }
    }

    /// What the verifiers in the answer to a request are changed by, given its slot and its number in it.
    pub(super) fn verifier_change(&mut self, place: Option<(Slot, u32)>) -> u64 {
        let mut crashes = self.crashes;
        if let Some((slot, sequence)) = place {
            let last = self.slots.entry(slot).or_insert((sequence, crashes));
            // A late one is older.
            if (1..u32::MAX / 2).contains(&sequence.wrapping_sub(last.0)) {
                *last = (sequence, crashes);
            }
            crashes = last.1;
        }
        crashes.wrapping_mul(SPREAD)
    }

    /// A session begins; it may have the name of one of the server's life before.
    pub(super) fn begin(&mut self, session: &[u8]) {
        self.slots.retain(|slot, _| slot.session != session);
    }

    /// Takes note of a write that goes to the server next; returns its number.
    pub(super) fn note(&mut self, handle: &[u8], offset: u64, data: &[u8]) -> Option<u64> {
        let file = self.files.get(handle)?;
        let mut before = vec![0; data.len()];
        // What is behind the end reads as zeros.
        let mut found = 0;
        while let Some(rest) = before.get_mut(found..).filter(|rest| !rest.is_empty()) {
            match file.read_at(rest, offset.saturating_add(found as u64)) {
                Ok(0) | Err(_) => break,
                Ok(count) => found += count,
            }
        }
        let is_again = |(_, write): &(&u64, &Written)| {
            !write.is_answered && write.offset == offset && write.handle == handle && write.data == data
        };
        // One that is sent again, on another connection, may have been done the first time.
        if let Some((number, _)) = self.writes.iter().find(is_again) {
            return Some(*number);
        }
        let number = self.next_number;
        self.next_number += 1;
        let write = Written {
            handle: handle.to_vec(),
            offset,
            before,
            data: data.to_vec(),
            is_answered: false,
        };
        self.writes.insert(number, write);
        Some(number)
    }

    /// The server has done a write.
    pub(super) fn done(&mut self, number: u64) {
        if let Some(write) = self.writes.get_mut(&number) {
            write.is_answered = true;
        }
    }

    /// There is nothing to take back of a write: the server has refused it, or made it safe.
    pub(super) fn forget(&mut self, number: u64) {
        self.writes.remove(&number);
    }

    /// A range is made safe, as far as its writes were answered: by a COMMIT, or by one that writes over it safely.
    pub(super) fn commit(&mut self, handle: &[u8], range: &Range<u64>) {
        self.writes.retain(|_, write| {
            let end = write.offset.saturating_add(write.data.len() as u64);
            let is_inside = range.start <= write.offset && end <= range.end;
            !(write.is_answered && is_inside && write.handle == handle)
        });
    }

    /// Takes back all that is not safe; returns how many writes that were, with those of which nobody knows whether they
    /// were done.
    pub(super) fn crash(&mut self) -> usize {
        self.crashes += 1;
        let writes = std::mem::take(&mut self.writes);
        for write in writes.values().rev() {
            if let Some(file) = self.files.get(&write.handle) {
                write.take_back(file);
            }
        }
        writes.len()
    }
}

impl Written {
    fn take_back(&self, file: &File) {
        let blocks = self.data.chunks(BLOCK_BYTES).zip(self.before.chunks(BLOCK_BYTES));
        for (number, (data, before)) in blocks.enumerate() {
            let offset = self.offset.saturating_add((number * BLOCK_BYTES) as u64);
            let mut now = vec![0; data.len()];
            let is_there = file.read_exact_at(&mut now, offset).is_ok() && now == data;
            if is_there {
                file.write_all_at(before, offset)
                    .expect("a file that a server writes can be written");
            }
        }
    }
}
