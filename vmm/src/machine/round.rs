//! What all disks of a paused machine are asked for at once: to have everything on the medium before a snapshot, to take their
//! fences down before another has them, to raise their generations before the guest writes again.

use std::time::{Duration, Instant};

use coracle_devices::virtio::blk::{BlkControl, ControlError, Errand};
use coracle_devices::virtio::device::{Notice, Patience};
use coracle_storage::backend::Access;
use coracle_storage::open::OpenError;

use super::change::Progress;
use super::flush::{Flush, PmemFlushError};
use super::pmem::PmemSlot;
use super::{DriveSlot, Machine, Paused};

/// How long each may take.
const ERRAND_MAX: Duration = Duration::from_secs(30);
/// How often records of the host are looked after, beside the notice.
const LOOK_PERIOD: Duration = Duration::from_millis(50);

/// A round under way, to be looked after by [`Machine::poll_round`].
pub struct Round {
    errands: Vec<(usize, Errand)>,
    /// The drive whose records, on this host, are being made.
    recording: Vec<usize>,
    /// The same of pmem devices.
    recording_pmem: Vec<usize>,
    /// Files that are being put on their media, by their pmem device.
    flushes: Vec<(usize, Flush)>,
    raises: bool,
    /// The drive that is asked when all others are done.
    last: Option<usize>,
    notice: Notice,
    until: Instant,
}

/// Why a disk is not ready; the machine stays paused.
#[derive(Debug, thiserror::Error)]
pub enum RoundError {
    /// It did not do what it was asked for.
    #[error("drive `{id}`")]
    Drive {
        /// The drive.
        id: String,
        /// Why.
        #[source]
        source: ControlError,
    },
    /// Its lease is not recorded.
    #[error("drive `{id}`")]
    Lease {
        /// The drive.
        id: String,
        /// Why.
        #[source]
        source: OpenError,
    },
    /// What was stored in persistent memory is not on its medium.
    #[error("pmem device `{id}`")]
    Pmem {
        /// The device.
        id: String,
        /// Why.
        #[source]
        source: PmemFlushError,
    },
    /// The lease of its file is not recorded.
    #[error("pmem device `{id}`")]
    PmemLease {
        /// The device.
        id: String,
        /// Why.
        #[source]
        source: OpenError,
    },
}

impl Machine<Paused> {
    /// Begins to have everything on the medium that was written to the disks, whatever their `cache_type`, or stored in
    /// persistent memory.
    ///
    /// # Errors
    ///
    /// When the worker of a disk is gone, or the host has no thread left.
    pub fn begin_flush(&self, notice: &Notice) -> Result<Round, RoundError> {
        let mut round = self.begin_errands(notice, |control| control.begin_flush(ERRAND_MAX, notice))?;
        for (at, pmem) in self.writable_pmem() {
            let begun = pmem.begin_flush(notice);
            round
                .flushes
                .push((at, begun.map_err(|source| pmem.unflushed(source))?));
        }
        Ok(round)
    }

    /// Begins to take the fences down of those disks that have them themselves, and to say of the images of `copied` that they
    /// stay behind. The machine is to be handed over then
    /// ([`Self::hand_over`]), or to stay if that fails ([`Self::stay`]): otherwise it does not have these disks back.
    ///
    /// # Errors
    ///
    /// When the worker of a disk is gone, or the host has no thread left.
    pub fn begin_yield(&mut self, notice: &Notice, copied: &[String]) -> Result<Round, RoundError> {
        let mut round = self.begin_errands(notice, |control| control.begin_yield(ERRAND_MAX, notice))?;
        let written: Vec<usize> = self.writable_drives().map(|(at, _)| at).collect();
        for at in written {
            let drive = self.parts.drives.get_mut(at).expect(KEEPS_ITS_PLACE);
            if copied.contains(&drive.id) {
                let rung = notice.clone();
                let begun = drive.hold.begin_move_away(&move || rung.ring());
                begun.map_err(|source| drive.unrecorded(source))?;
                round.recording.push(at);
            }
        }
        Ok(round)
    }

    fn begin_errands(
        &self,
        notice: &Notice,
        begin: impl Fn(&BlkControl) -> Result<Errand, ControlError>,
    ) -> Result<Round, RoundError> {
        let mut round = Round::new(notice);
        for (at, drive) in self.writable_drives() {
            let errand = begin(&drive.control).map_err(|source| drive.failed(source))?;
            round.errands.push((at, errand));
        }
        Ok(round)
    }

    /// Begins to raise the generations of the disks: no snapshot of the machine can be gone on with beside them any more.
    ///
    /// # Errors
    ///
    /// When the worker of a disk is gone, or the host has no thread left.
    pub fn begin_raise(&mut self, notice: &Notice) -> Result<Round, RoundError> {
        let mut round = Round {
            raises: true,
            ..Round::new(notice)
        };
        let mut written: Vec<usize> = self.writable_drives().map(|(at, _)| at).collect();
        let is_taken_over = |at: &usize| {
            self.parts
                .drives
                .get(*at)
                .is_some_and(|drive| drive.is_taken_over)
        };
        if let Some(first) = written.iter().position(is_taken_over) {
            // Its step decides: once that is made, nobody can have the machine back.
            round.last = Some(written.remove(first));
        }
        for at in written {
            self.begin_raise_of(at, &mut round, notice)?;
        }
        let stored: Vec<usize> = self.writable_pmem().map(|(at, _)| at).collect();
        for at in stored {
            let pmem = self.parts.pmem.get_mut(at).expect(KEEPS_ITS_PLACE);
            let rung = notice.clone();
            let begun = pmem.hold.begin_raise(&move || rung.ring());
            begun.map_err(|source| pmem.unrecorded(source))?;
            round.recording_pmem.push(at);
        }
        self.go_to_last(&mut round, notice)?;
        Ok(round)
    }

    fn begin_raise_of(&mut self, at: usize, round: &mut Round, notice: &Notice) -> Result<(), RoundError> {
        let drive = self.parts.drives.get_mut(at).expect(KEEPS_ITS_PLACE);
        let errand = drive.control.begin_raise(ERRAND_MAX, notice);
        round
            .errands
            .push((at, errand.map_err(|source| drive.failed(source))?));
        let rung = notice.clone();
        let begun = drive.hold.begin_raise(&move || rung.ring());
        begun.map_err(|source| drive.unrecorded(source))?;
        round.recording.push(at);
        Ok(())
    }

    /// Asks the last drive, if all others are done. Says whether there was one.
    fn go_to_last(&mut self, round: &mut Round, notice: &Notice) -> Result<bool, RoundError> {
        if !round.errands.is_empty() || !round.is_recorded() {
            return Ok(false);
        }
        let Some(at) = round.last.take() else {
            return Ok(false);
        };
        self.begin_raise_of(at, round, notice)?;
        Ok(true)
    }

    /// Goes on with `round`.
    pub fn poll_round(&mut self, round: &mut Round, patience: Patience) -> Progress<Result<(), RoundError>> {
        let mut outcome = Ok(());
        round.errands.retain(|(at, errand)| match errand.poll(patience) {
            None => true,
            Some(answer) => {
                let drive = self.parts.drives.get(*at).expect(KEEPS_ITS_PLACE);
                if let Err(source) = answer {
                    outcome = Err(drive.failed(source));
                }
                false
            }
        });
        let drives = &mut self.parts.drives;
        round.recording.retain(|at| {
            let drive = drives.get_mut(*at).expect(KEEPS_ITS_PLACE);
            if patience == Patience::None && !drive.hold.is_settled() {
                return true;
            }
            if let Err(source) = drive.hold.settle() {
                outcome = Err(drive.unrecorded(source));
            }
            false
        });
        if let Err(error) = self.poll_pmem(round, patience) {
            outcome = Err(error);
        }
        if outcome.is_err() {
            return Progress::Done(outcome);
        }
        let notice = round.notice.clone();
        match self.go_to_last(round, &notice) {
            Ok(false) => {}
            Ok(true) => return self.poll_round(round, patience),
            Err(error) => return Progress::Done(Err(error)),
        }
        if round.errands.is_empty() && round.is_recorded() && round.flushes.is_empty() {
            self.parts.is_remembered &= !round.raises;
            return Progress::Done(Ok(()));
        }
        // An errand ends by itself at its time. Whoever records waits for the host as long as that takes.
        let until = if round.is_recorded() {
            round.until
        } else {
            Instant::now() + LOOK_PERIOD
        };
        Progress::Pending { until }
    }

    /// The same for persistent memory.
    fn poll_pmem(&mut self, round: &mut Round, patience: Patience) -> Result<(), RoundError> {
        let (mut outcome, slots) = (Ok(()), &mut self.parts.pmem);
        round.flushes.retain(|(at, flush)| match flush.poll(patience) {
            None => true,
            Some(answer) => {
                if let Err(source) = answer {
                    outcome = Err(slots.get(*at).expect(KEEPS_ITS_PLACE).unflushed(source));
                }
                false
            }
        });
        round.recording_pmem.retain(|at| {
            let pmem = slots.get_mut(*at).expect(KEEPS_ITS_PLACE);
            if patience == Patience::None && !pmem.hold.is_settled() {
                return true;
            }
            if let Err(source) = pmem.hold.settle() {
                outcome = Err(pmem.unrecorded(source));
            }
            false
        });
        outcome
    }

    fn writable_pmem(&self) -> impl Iterator<Item = (usize, &PmemSlot)> {
        let slots = self.parts.pmem.iter().enumerate();
        slots.filter(|(_, slot)| slot.medium.access() == Access::ReadWrite)
    }

    fn writable_drives(&self) -> impl Iterator<Item = (usize, &DriveSlot)> {
        let drives = self.parts.drives.iter().enumerate();
        drives.filter(|(_, drive)| drive.control.access() == Access::ReadWrite)
    }
}

const KEEPS_ITS_PLACE: &str = "a drive keeps the place that it was put in";

impl Round {
    fn new(notice: &Notice) -> Self {
        Self {
            errands: Vec::new(),
            recording: Vec::new(),
            recording_pmem: Vec::new(),
            flushes: Vec::new(),
            raises: false,
            last: None,
            notice: notice.clone(),
            until: Instant::now() + ERRAND_MAX,
        }
    }

    fn is_recorded(&self) -> bool {
        self.recording.is_empty() && self.recording_pmem.is_empty()
    }
}

impl PmemSlot {
    fn unflushed(&self, source: PmemFlushError) -> RoundError {
        let id = self.id.clone();
        RoundError::Pmem { id, source }
    }

    fn unrecorded(&self, source: OpenError) -> RoundError {
        let id = self.id.clone();
        RoundError::PmemLease { id, source }
    }
}

impl DriveSlot {
    fn failed(&self, source: ControlError) -> RoundError {
        let id = self.id.clone();
        RoundError::Drive { id, source }
    }

    fn unrecorded(&self, source: OpenError) -> RoundError {
        let id = self.id.clone();
        RoundError::Lease { id, source }
    }
}
