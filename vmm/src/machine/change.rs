//! The drives of a machine, whatever phase it is in, and changes of them that are under way.

use std::time::{Duration, Instant};

use coracle_devices::virtio::balloon::BalloonControl;
use coracle_devices::virtio::blk::{Changed, ControlError, ImageChange};
use coracle_devices::virtio::device::{Notice, Patience};
use coracle_devices::virtio::mem::MemControl;
use coracle_devices::virtio::mmio::{MmioTransport, Pause};
use coracle_devices::virtio::net::PartialNetworkInterface;
use coracle_storage::limit::RateLimiterConfig;
use coracle_storage::open::{Hold, Image};

use super::places::VirtioSlot;
use super::{DriveSlot, Machine, Parts, Paused, Running, Stranded, TransitionError};

/// The drives of one machine.
pub struct Drives<'m> {
    parts: &'m mut Parts,
    guest: GuestIs,
}

/// Whether the devices of a machine serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum GuestIs {
    Running,
    Still,
}

/// Why a drive could not be changed; it goes on as it was.
#[derive(Debug, thiserror::Error)]
pub enum DriveChangeError {
    /// There is no such drive.
    #[error("there is no drive `{0}`; GET /vm/config lists them")]
    Unknown(String),
    /// It is lost.
    #[error("drive `{id}` is lost, and stays what it was: {reason}")]
    Lost {
        /// The drive.
        id: String,
        /// Who has it.
        reason: String,
    },
    /// Its queue could not be drained, or not be started again.
    #[error(transparent)]
    Device(#[from] TransitionError),
    /// It was asked to grow, and whoever has the image has not answered.
    #[error(
        "the image of drive `{id}` has not grown yet: its storage does not answer, and may do it when it does. Then ask again, \
         or the guest is not told"
    )]
    Growing {
        /// The drive's id.
        id: String,
    },
    /// The image or the limits are not taken.
    #[error("drive `{id}` is as it was")]
    Control {
        /// The drive's id.
        id: String,
        /// Why.
        #[source]
        source: ControlError,
    },
}

/// A change of one drive's image, to be looked after by [`Drives::poll`].
///
/// ```text
///   Stop ──drained──► Replace ──► Resume ──► over        Grow ──► Announce ──► over
/// ```
///
/// The guest may run on all the while; its requests to this drive wait.
pub struct DriveChange {
    id: String,
    notice: Notice,
    stage: Stage,
}

enum Stage {
    Stop(Option<Image>),
    Stopping(Option<Image>),
    Replace(ImageChange, Option<Hold>),
    /// The device serves again, and its guest hears of another shape; the old image's lease ends after that.
    Resume(Option<Result<Hold, DriveChangeError>>),
    Grow(ImageChange),
    Announce,
}

/// How far something has come.
pub enum Progress<T> {
    /// It goes on: look again when the notice rings, or then.
    Pending {
        /// Then.
        until: Instant,
    },
    /// It is over.
    Done(T),
}

/// How long others are served while a vCPU has a device's registers.
const LOCKED_PERIOD: Duration = Duration::from_millis(5);

impl Machine<Running> {
    /// Its drives.
    pub fn drives(&mut self) -> Drives<'_> {
        Drives {
            parts: &mut self.parts,
            guest: GuestIs::Running,
        }
    }
}

impl Machine<Paused> {
    /// Its drives.
    pub fn drives(&mut self) -> Drives<'_> {
        Drives {
            parts: &mut self.parts,
            guest: GuestIs::Still,
        }
    }
}

impl Machine<Stranded> {
    /// Its drives; those that are not lost can be changed.
    pub fn drives(&mut self) -> Drives<'_> {
        Drives {
            parts: &mut self.parts,
            guest: GuestIs::Still,
        }
    }
}

impl<P> Machine<P> {
    /// What controls memory that comes and goes, if there may be any.
    pub fn memory_hotplug(&self) -> Option<&MemControl> {
        self.parts.memory_hotplug.as_ref()
    }

    /// The balloon, if there is one.
    pub fn balloon(&self) -> Option<&BalloonControl> {
        self.parts.balloon.as_ref()
    }

    /// Tells the guest to look again at the size of each disk.
    pub fn announce_disks(&self) {
        for (_, slot) in self.parts.drives.iter().zip(&self.parts.devices) {
            slot.lock().announce_configuration();
        }
    }

    /// Changes the limits that `patch` names of a network interface, if there is one of that name.
    pub fn limit_network(&self, patch: &PartialNetworkInterface) {
        let network = self
            .parts
            .networks
            .iter()
            .find(|network| network.id == patch.iface_id);
        if let Some(network) = network {
            network
                .control
                .limit(patch.rx_rate_limiter, patch.tx_rate_limiter);
        }
    }
}

impl Drives<'_> {
    /// Whether `path` names the image that drive `id` has, by whatever name.
    pub fn has_image(&self, id: &str, path: &str) -> bool {
        let drive = self.parts.drives.iter().find(|drive| drive.id == id);
        drive.is_some_and(|drive| drive.hold.is_of(path))
    }

    /// Changes the limits of drive `id`.
    ///
    /// # Errors
    ///
    /// When there is no such drive, or its worker is gone.
    pub fn limit(&self, id: &str, limits: RateLimiterConfig) -> Result<(), DriveChangeError> {
        let drive = self.parts.drives.iter().find(|drive| drive.id == id);
        let drive = drive.ok_or_else(|| DriveChangeError::Unknown(id.to_owned()))?;
        drive
            .control
            .set_limiter(&limits)
            .map_err(|source| drive.refused(source))
    }

    /// Changes the limits that the drives of group `id` share.
    ///
    /// # Errors
    ///
    /// When the worker of a drive is gone. No drive is in a group that is not there: then nothing happens.
    pub fn limit_group(&self, id: &str, limits: RateLimiterConfig) -> Result<(), DriveChangeError> {
        let Some(group) = self.parts.groups.iter().find(|group| group.id == id) else {
            return Ok(());
        };
        group.limiter.update(&limits, Instant::now());
        let members = self.parts.drives.iter();
        for drive in members.filter(|drive| drive.group.as_deref() == Some(id)) {
            drive
                .control
                .reconsider()
                .map_err(|source| drive.refused(source))?;
        }
        Ok(())
    }

    /// Says whether drive `id` can be changed at all.
    ///
    /// # Errors
    ///
    /// When there is no such drive, or it is lost.
    pub fn check(&mut self, id: &str) -> Result<(), DriveChangeError> {
        let (drive, _) = self.parts.drive_in_slot(id)?;
        match drive.control.loss().reason() {
            None => Ok(()),
            Some(reason) => Err(DriveChangeError::Lost {
                id: id.to_owned(),
                reason: reason.to_owned(),
            }),
        }
    }

    /// Begins to give drive `id` another image. While the guest runs its queue is drained first, and waits; the other
    /// devices serve on.
    ///
    /// # Errors
    ///
    /// As [`Self::check`].
    pub fn begin_replace(
        &mut self,
        id: &str,
        image: Image,
        notice: &Notice,
    ) -> Result<DriveChange, DriveChangeError> {
        self.check(id)?;
        Ok(DriveChange {
            id: id.to_owned(),
            notice: notice.clone(),
            stage: Stage::Stop(Some(image)),
        })
    }

    /// Begins to make the image of drive `id` `size_bytes` long; the guest is told if it was shorter.
    ///
    /// # Errors
    ///
    /// As [`Self::check`]; or it would have to shrink.
    pub fn begin_grow(
        &mut self,
        id: &str,
        size_bytes: u64,
        notice: &Notice,
    ) -> Result<DriveChange, DriveChangeError> {
        self.check(id)?;
        let (drive, _) = self.parts.drive_in_slot(id)?;
        let change = drive.control.begin_grow(size_bytes, notice);
        Ok(DriveChange {
            id: id.to_owned(),
            notice: notice.clone(),
            stage: Stage::Grow(change.map_err(|source| drive.refused(source))?),
        })
    }

    /// Goes on with `change`; when it has failed the drive has the image that it had, and serves as it did.
    pub fn poll(&mut self, change: &mut DriveChange) -> Progress<Result<(), DriveChangeError>> {
        loop {
            let (drive, slot) = match self.parts.drive_in_slot(&change.id) {
                Ok(found) => found,
                Err(error) => return Progress::Done(Err(error)),
            };
            match change.step(drive, slot, self.guest) {
                Step::Next(stage) => change.stage = stage,
                Step::Wait(until) => return Progress::Pending { until },
                Step::Over(outcome) => return Progress::Done(outcome),
            }
        }
    }
}

enum Step {
    Next(Stage),
    Wait(Instant),
    Over(Result<(), DriveChangeError>),
}

impl DriveChange {
    fn step(&mut self, drive: &mut DriveSlot, slot: &VirtioSlot, guest: GuestIs) -> Step {
        match &mut self.stage {
            Stage::Stop(image) => with(slot, |transport| {
                transport.begin_pause(&self.notice);
                Step::Next(Stage::Stopping(image.take()))
            }),
            Stage::Stopping(image) => with(slot, |transport| match transport.poll_pause(Patience::None) {
                Pause::Pending { until } => Step::Wait(until),
                Pause::Refused(error) => Step::Over(Err(slot.failed(error).into())),
                Pause::Paused => {
                    let Image { backend, hold } = image.take().expect("an image is used once");
                    Step::Next(match drive.control.begin_replace(backend, &self.notice) {
                        Ok(change) => Stage::Replace(change, Some(hold)),
                        Err(source) => Stage::Resume(Some(Err(drive.refused(source)))),
                    })
                }
            }),
            Stage::Replace(change, hold) => match change.poll(Patience::None) {
                None => Step::Wait(change.until()),
                Some(outcome) => {
                    let hold = hold.take().expect("an image has one hold");
                    Step::Next(Stage::Resume(Some(drive.replaced(outcome, hold))))
                }
            },
            Stage::Resume(outcome) => with(slot, |transport| {
                let outcome = outcome.take().expect("a change has one outcome");
                if guest == GuestIs::Running
                    && let Err(error) = transport.resume()
                {
                    return Step::Over(Err(slot.failed(error).into()));
                }
                if outcome.is_ok() {
                    transport.announce_configuration();
                }
                Step::Over(outcome.map(drop))
            }),
            Stage::Grow(change) => match change.poll(Patience::None) {
                None => Step::Wait(change.until()),
                Some(Ok(Changed::Geometry)) => Step::Next(Stage::Announce),
                Some(Ok(Changed::Nothing)) => Step::Over(Ok(())),
                Some(Err(ControlError::Late)) => {
                    let id = drive.id.clone();
                    Step::Over(Err(DriveChangeError::Growing { id }))
                }
                Some(Err(source)) => Step::Over(Err(drive.refused(source))),
            },
            Stage::Announce => with(slot, |transport| {
                transport.announce_configuration();
                Step::Over(Ok(()))
            }),
        }
    }
}

/// Goes on with the device's registers, or later when a vCPU has them.
fn with(slot: &VirtioSlot, step: impl FnOnce(&mut MmioTransport) -> Step) -> Step {
    match slot.try_lock() {
        Some(mut transport) => step(&mut transport),
        None => Step::Wait(Instant::now() + LOCKED_PERIOD),
    }
}

impl Parts {
    /// A drive, and its device.
    fn drive_in_slot(&mut self, id: &str) -> Result<(&mut DriveSlot, &VirtioSlot), DriveChangeError> {
        let mut drives = self.drives.iter_mut().zip(&self.devices);
        let found = drives.find(|(drive, _)| drive.id == id);
        found.ok_or_else(|| DriveChangeError::Unknown(id.to_owned()))
    }
}

impl DriveSlot {
    /// Keeps what makes the new image ours, and returns what made the old one; or neither.
    fn replaced(
        &mut self,
        outcome: Result<Changed, ControlError>,
        hold: Hold,
    ) -> Result<Hold, DriveChangeError> {
        match outcome {
            Ok(_) => Ok(std::mem::replace(&mut self.hold, hold)),
            Err(source) => {
                // The new image is still open.
                if let ControlError::Late = source {
                    self.hold.keep(hold);
                }
                Err(self.refused(source))
            }
        }
    }

    fn refused(&self, source: ControlError) -> DriveChangeError {
        DriveChangeError::Control {
            id: self.id.clone(),
            source,
        }
    }
}
