//! The target: files that become the disks of a machine when all of them is there.

use std::sync::{Arc, Mutex, MutexGuard};

use coracle_devices::virtio::blk::{DriveConfig, DriveError};
use coracle_storage::changes::BLOCK_BYTES;
use coracle_storage::copy::{Duplicate, DuplicateError, GRAIN_BYTES};
use coracle_storage::lease::Owner;

use super::{BLOCKS_HEAD_BYTES, HOLES_BYTES};
use crate::migration::hello::CopyOffer;

/// The disks of one migration, in the order in which they were offered.
#[derive(Debug, Default)]
pub struct Copies {
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    disks: Vec<Disk>,
    is_given_up: bool,
}

#[derive(Debug)]
struct Disk {
    duplicate: Duplicate,
    drive: DriveConfig,
    owner: Owner,
    /// Somebody has looked whether it fits what it stands on.
    is_checked: bool,
    /// What may still come of it: in blocks, with one for each message.
    left: u64,
}

/// Why a part of a disk is not taken.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the text of an error is its documentation")]
pub enum CopyError {
    #[error("a message of a part of a disk is too short for one")]
    Short,
    #[error("nothing was said of a disk {0} that goes along")]
    NoDisk(u32),
    #[error("more is sent of a disk than a migration needs")]
    TooMuch,
    #[error(
        "the leases of drives `{one}` and `{other}`, which both go along, would be recorded in one place: give one of them \
         another `lease_at` where it arrives (`overrides`)"
    )]
    SharedRecords { one: String, other: String },
    #[error("the copies of disks were given up")]
    GivenUp,
    #[error(transparent)]
    Duplicate(#[from] DuplicateError),
    #[error("a disk that comes along does not fit what it stands on here")]
    Ground(#[from] DriveError),
}

/// How many times its size a disk may be sent, and how many messages a block may come by each time.
const TIMES_MAX: u64 = 64;
const MESSAGES_MAX: u64 = BLOCK_BYTES / GRAIN_BYTES as u64 + 1;

const NO_PANIC: &str = "no holder of copies panics";

impl Copies {
    /// Makes a file for each of `offers`, where one of `drives` has its image.
    ///
    /// # Errors
    ///
    /// Why one cannot be made.
    ///
    /// # Panics
    ///
    /// When there is no such drive: offers are checked before.
    pub fn create(
        &self,
        offers: &[CopyOffer],
        drives: &[DriveConfig],
        owner: &Owner,
    ) -> Result<(), CopyError> {
        for offer in offers {
            let drive = drives.iter().find(|drive| drive.drive_id == offer.id);
            let drive = drive.expect("only what the machine has is taken");
            let path = drive.own_file().unwrap_or_default();
            let duplicate = Duplicate::create(path, drive.lease_at.as_deref(), offer.size_bytes, owner)?;
            log::info!(
                "migration: the disk of drive {:?} goes along, and is copied into `{path}`",
                offer.id
            );
            let blocks = offer.size_bytes.div_ceil(BLOCK_BYTES);
            let mut taken = self.lock()?;
            let shares = |disk: &&Disk| disk.duplicate.shares_records_with(&duplicate);
            if let Some(other) = taken.disks.iter().find(shares) {
                return Err(CopyError::SharedRecords {
                    one: other.drive.drive_id.clone(),
                    other: offer.id.clone(),
                });
            }
            taken.disks.push(Disk {
                duplicate,
                drive: drive.clone(),
                owner: owner.clone(),
                is_checked: false,
                left: blocks.saturating_mul(TIMES_MAX * (MESSAGES_MAX + 1)),
            });
        }
        Ok(())
    }

    /// Takes in a part of a disk; says how long it is, in bytes.
    ///
    /// # Errors
    ///
    /// When there is no such part, or the host does not take it.
    pub fn take_blocks(&self, body: &[u8]) -> Result<u64, CopyError> {
        let (head, bytes) = body
            .split_first_chunk::<BLOCKS_HEAD_BYTES>()
            .ok_or(CopyError::Short)?;
        let [n0, n1, n2, n3, offset @ ..] = *head;
        let len_bytes = bytes.len() as u64;
        self.with(u32::from_le_bytes([n0, n1, n2, n3]), len_bytes, |duplicate| {
            duplicate.write(u64::from_le_bytes(offset), bytes)
        })
    }

    /// Takes in that a part of a disk is zeros; says how long it is, in bytes.
    ///
    /// # Errors
    ///
    /// As [`Self::take_blocks`].
    pub fn take_holes(&self, body: &[u8]) -> Result<u64, CopyError> {
        let body: &[u8; HOLES_BYTES] = body.try_into().map_err(|_| CopyError::Short)?;
        let [n0, n1, n2, n3, rest @ ..] = *body;
        let [o0, o1, o2, o3, o4, o5, o6, o7, len @ ..] = rest;
        let offset_bytes = u64::from_le_bytes([o0, o1, o2, o3, o4, o5, o6, o7]);
        let len_bytes = u64::from_le_bytes(len);
        self.with(u32::from_le_bytes([n0, n1, n2, n3]), len_bytes, |duplicate| {
            duplicate.zero(offset_bytes, len_bytes)
        })
    }

    /// Puts all that has come on its media. The first time, when all of each disk has come once, overlays are looked at: what
    /// they say of their bases does not change any more.
    ///
    /// # Errors
    ///
    /// When the host cannot, or an overlay is over another base.
    pub fn sync(&self) -> Result<(), CopyError> {
        self.each(|disk| {
            disk.duplicate.sync()?;
            disk.check()
        })
    }

    /// The same, and the files themselves: then they are there, whatever happens to this host.
    ///
    /// # Errors
    ///
    /// As [`Self::sync`].
    pub fn finish(&self) -> Result<(), CopyError> {
        self.each(|disk| {
            disk.duplicate.finish()?;
            disk.check()
        })
    }

    /// Has them be opened as images.
    ///
    /// # Errors
    ///
    /// When they were given up.
    pub fn open_up(&self) -> Result<(), CopyError> {
        self.each(|disk| {
            disk.duplicate.open_up();
            Ok(())
        })
    }

    /// Has them stay: from now on this host may be the only one that has what the guest writes.
    pub fn keep(&self) {
        for disk in &mut self.any().disks {
            disk.duplicate.keep();
        }
    }

    /// Removes those that are not kept; nothing is taken any more.
    pub fn give_up(&self) {
        let mut taken = self.any();
        taken.is_given_up = true;
        taken.disks.clear();
    }

    fn with(
        &self,
        number: u32,
        len_bytes: u64,
        take: impl FnOnce(&mut Duplicate) -> Result<(), DuplicateError>,
    ) -> Result<u64, CopyError> {
        let mut taken = self.lock()?;
        let place = usize::try_from(number).ok();
        let disk = place.and_then(|place| taken.disks.get_mut(place));
        let disk = disk.ok_or(CopyError::NoDisk(number))?;
        let cost = 1 + len_bytes / BLOCK_BYTES;
        disk.left = disk.left.checked_sub(cost).ok_or(CopyError::TooMuch)?;
        take(&mut disk.duplicate)?;
        Ok(len_bytes)
    }

    fn each(&self, change: impl Fn(&mut Disk) -> Result<(), CopyError>) -> Result<(), CopyError> {
        self.lock()?.disks.iter_mut().try_for_each(change)
    }

    fn lock(&self) -> Result<MutexGuard<'_, Taken>, CopyError> {
        let taken = self.any();
        if taken.is_given_up {
            return Err(CopyError::GivenUp);
        }
        Ok(taken)
    }

    fn any(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().expect(NO_PANIC)
    }
}

impl Disk {
    fn check(&mut self) -> Result<(), CopyError> {
        if !self.is_checked {
            self.drive.check_copied(&self.owner)?;
            self.is_checked = true;
        }
        Ok(())
    }
}

/// Copies that somebody else makes, on a thread that may be left behind: dropped, it gives them up.
#[derive(Debug)]
pub struct Abandoned(Option<Arc<Copies>>);

impl Abandoned {
    /// Those of `copies`, unless [`Self::never_mind`] is said.
    pub fn unless_done(copies: &Arc<Copies>) -> Self {
        Self(Some(Arc::clone(copies)))
    }

    /// Whoever makes them has come to an end with them.
    pub fn never_mind(&mut self) {
        self.0 = None;
    }
}

impl Drop for Abandoned {
    fn drop(&mut self) {
        if let Some(copies) = self.0.take() {
            copies.give_up();
        }
    }
}
