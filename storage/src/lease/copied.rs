//! The leases of an image whose machine moves with a copy: that of the image, which stays behind, and that of the new file.
//!
//! ```text
//!   image    held ──► moved, fence up ──► the machine is gone: fence down
//!                       └── it stays after all ──► reclaimed
//!   copy     nothing, fence up while it is filled ──► fence down ──► leased like any image
//! ```

use std::fs::File;
use std::sync::Arc;

use super::fence::ofd::{self, Role};
use super::{
    Candidate, Chain, ChainError, Lease, LeaseError, Lock, Mark, Owner, Phase, Place, Record, Step,
    StepThread, Terms,
};

impl Lease {
    /// Begins to say, durably, that the machine goes on elsewhere with a copy: from then on nobody takes the image up by mistake.
    /// The fence stays up. Over with [`Self::settle`]; `done` is called when that does not wait any more. Of a lease that is not
    /// recorded nothing changes.
    ///
    /// # Errors
    ///
    /// Why it is not begun; then the lease is as it was.
    pub(crate) fn begin_move_away(&mut self, done: impl FnOnce() + Send + 'static) -> Result<(), LeaseError> {
        self.settle()?;
        let Mark::Made(last) = &self.mark else {
            return Ok(());
        };
        let last = last.clone();
        let leave = move || match last.next(Phase::Moved, &last.record.owner) {
            Ok(step) => (Some(step), Ok(())),
            // It may be there and not be known to be durable.
            Err(error) => (Some(last.newest_of_ours().unwrap_or(last)), Err(error)),
        };
        let thread = StepThread::begin(leave, done);
        self.mark = Mark::Coming(thread.map_err(LeaseError::no_thread(&self.path))?);
        Ok(())
    }

    /// Has the machine go on here after all. To be repeated if it fails.
    pub(super) fn stay(&mut self) -> Result<(), LeaseError> {
        if let Err(error) = self.settle() {
            log::warn!("`{}` is not left behind: {error}", self.path);
        }
        let Mark::Made(step) = &self.mark else {
            return Ok(());
        };
        if step.record.phase != Phase::Moved {
            return Ok(());
        }
        let newest = self.newest(step)?;
        let is_ours = newest.owner.incarnation == step.record.owner.incarnation;
        let last = Step {
            chain: Arc::clone(&step.chain),
            record: newest,
        };
        let stays = if is_ours && last.record.phase == Phase::Reclaimed {
            last.chain
                .complete(&last.record)
                .map_err(|source| self.failed(source))?;
            last
        } else {
            let back = last.next(Phase::Reclaimed, &step.record.owner);
            back.map_err(|source| self.failed(source))?
        };
        self.mark = Mark::Made(stays);
        Ok(())
    }
}

impl Step {
    fn newest_of_ours(&self) -> Option<Self> {
        let newest = self.chain.newest().ok().flatten()?;
        let is_ours = newest.owner.incarnation == self.record.owner.incarnation;
        is_ours.then(|| Self {
            chain: Arc::clone(&self.chain),
            record: newest,
        })
    }
}

/// The claim of whoever fills a new file: until it is dropped nobody else has the file as an image.
#[derive(Debug)]
pub(crate) struct Claim {
    file: Arc<File>,
    path: String,
    /// Where its records will be, if they will be anywhere.
    chain: Option<Chain>,
}

impl Claim {
    /// Puts the fence of the new file at `path` up, which `file` has open, and has `owner` say in its records, which are named
    /// after `at` if that is given, that an image that was there before, and was left behind, is not there any more. When it
    /// returns, the file could be leased as an image: whoever finds that it cannot when the guest is on its way has lost it.
    ///
    /// # Errors
    ///
    /// Who has it, or why that cannot be said.
    pub(crate) fn take(
        file: &Arc<File>,
        path: &str,
        at: Option<&str>,
        owner: &Owner,
    ) -> Result<Self, LeaseError> {
        let terms = Terms {
            at,
            ..Terms::new(Lock::Exclusive, owner)
        };
        let candidate = Candidate {
            file,
            path,
            terms: &terms,
        };
        candidate.take_fence(Role::Writer)?;
        let mut claim = Self {
            file: Arc::clone(file),
            path: path.to_owned(),
            chain: None,
        };
        let Place::Chain(chain) = candidate.place()? else {
            return Ok(claim);
        };
        let failed = |source| candidate.failed(source);
        let last = chain.newest().map_err(failed)?;
        let over = Record::after(last.as_ref(), Phase::Released, owner)
            .ok_or_else(|| failed(ChainError::Exhausted))?;
        match chain.try_out(&over) {
            // It will have a lock only, as any image there.
            Err(ChainError::NoPlace { .. }) if last.is_none() && at.is_none() => return Ok(claim),
            tried => tried.map_err(failed)?,
        }
        let chain = claim.chain.insert(chain);
        let Some(last) = last else {
            return Ok(claim);
        };
        // Records beside the file are of what was there before, and the fence says that nobody has that. Those in a place of
        // their own may be the very image's that is copied.
        if let Some(at) = at
            && !matches!(last.phase, Phase::Moved | Phase::Released | Phase::Broken)
        {
            return Err(LeaseError::RecordsInUse {
                path: path.to_owned(),
                at: at.to_owned(),
                record: Box::new(last),
            });
        }
        if last.phase == Phase::Moved {
            chain.append(&over).map_err(failed)?;
        }
        Ok(claim)
    }

    /// Says whether nothing stands in the way of the records of the image that the file is about to be.
    ///
    /// # Errors
    ///
    /// What does.
    pub(crate) fn check(&self) -> Result<(), LeaseError> {
        let newest = self.chain.as_ref().map(Chain::newest).transpose();
        newest.map(drop).map_err(|source| LeaseError::Chain {
            path: self.path.clone(),
            source,
        })
    }

    /// Whether the records of both would be in one place: only one of the files can be an image then.
    pub(crate) fn shares_records_with(&self, other: &Self) -> bool {
        match (&self.chain, &other.chain) {
            (Some(ours), Some(theirs)) => ours.is_same(theirs),
            _ => false,
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if let Err(error) = ofd::release(&self.file) {
            log::warn!(
                "the lock on `{}` ends with its descriptor only: {error}",
                self.path
            );
        }
    }
}
