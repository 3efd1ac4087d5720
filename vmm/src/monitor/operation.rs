//! What the `vmm` thread has begun and looks after, one thing at a time, while it serves other calls.

use std::time::{Duration, Instant};

use coracle_devices::virtio::blk::{self, PartialDrive};
use coracle_devices::virtio::device::Patience;
use coracle_storage::open::{self, Image};

use super::migration::{Receiving, Sending};
use super::opening::Opening;
use super::plug::Plugging;
use super::snapshot::Making;
use super::{Guest, Monitor};
use crate::api::verbs::Underway;
use crate::api::{Data, Fault, Reply};
use crate::config::{Config, Phase};
use crate::end::End;
use crate::machine::plan::{Plan, PlanError};
use crate::machine::{DriveChange, DriveChangeError, Pause, Progress, Refused, Round};
use crate::snapshot::load::{LoadError, Loaded};

/// One thing that takes its time.
pub(super) struct Operation {
    pub(super) work: Work,
    asker: Asker,
    begun: Instant,
}

/// When a guest of a lost disk that could not be stopped is asked again.
const STRAND_PERIOD: Duration = Duration::from_secs(1);

/// Whom to tell.
pub(super) enum Asker {
    /// A client of the API.
    Client(Reply),
    /// Whoever started the process with a configuration file.
    ConfigFile,
    /// Nobody: it had to be.
    Nobody,
}

/// What is done. The parts of the machine that take part in it know how far it is.
pub(super) enum Work {
    /// The images of the machine are being opened.
    Start(Opening<Result<Plan, PlanError>>),
    /// The guest is [`Guest::Pausing`].
    Pause,
    /// The next image of a drive is being opened.
    OpenImage(Opening<Result<Image, Fault>>, Box<Patch>),
    /// A drive takes another image, or its image grows.
    ChangeDrive(Box<DriveChange>, Box<Patch>),
    /// A device comes.
    Plug(Box<Plugging>),
    /// What was behind a device that has gone is being closed.
    Unplug(Opening<()>),
    /// A snapshot is being made.
    Snapshot(Making),
    /// A snapshot is being loaded, and its guest is to run on, or not.
    Load(Opening<Result<Box<Loaded>, LoadError>>, bool),
    /// The disks are being made ready for the guest to run on.
    Resume(Round),
    /// The machine is being sent to another process.
    Send(Box<Sending>),
    /// A machine is being taken from another process.
    Receive(Receiving),
    /// Its disks are being made ready for the guest to run on.
    Arrive(Round),
}

/// What remains to be done of a `PATCH /drives`.
pub(super) struct Patch {
    asked: PartialDrive,
    /// The configuration, once all is done: it says what is, not what was wished.
    config: Config,
    /// The size that the image is to have, as long as it does not.
    size_bytes: Option<u64>,
}

/// What a verb has led to.
pub(super) enum Reaction {
    /// It is done.
    Done(Data),
    /// It is begun.
    Begun(Work),
}

/// How far work has come.
pub(super) enum Course {
    /// It goes on: look again when the bell rings, or then.
    Pending(Work, Option<Instant>),
    Over(Result<(), Fault>),
}

impl Operation {
    pub(super) fn kind(&self) -> Underway {
        match self.work {
            Work::Start(_) => Underway::Start,
            Work::Pause => Underway::Pause,
            Work::OpenImage(..) | Work::ChangeDrive(..) => Underway::DriveChange,
            Work::Plug(_) | Work::Unplug(_) => Underway::Plug,
            Work::Snapshot(_) => Underway::SnapshotCreate,
            Work::Load(..) => Underway::SnapshotLoad,
            Work::Resume(_) => Underway::Resume,
            Work::Send(_) | Work::Receive(_) | Work::Arrive(_) => Underway::Migration,
        }
    }
}

impl Monitor {
    /// Looks after `work` from now on, and tells `asker` how it went.
    pub(super) fn begin(&mut self, work: Work, asker: Asker) {
        self.operation = Some(Operation {
            work,
            asker,
            begun: Instant::now(),
        });
        self.advance();
    }

    /// Goes on with what was begun, as far as it goes.
    pub(super) fn advance(&mut self) {
        let Some(operation) = self.operation.take() else {
            return self.strand();
        };
        let Operation { work, asker, begun } = operation;
        let is_pause = matches!(work, Work::Pause);
        match self.go_on(work) {
            Course::Pending(work, due) => {
                self.wakeup.set_due(due);
                self.operation = Some(Operation { work, asker, begun });
            }
            Course::Over(outcome) => {
                self.wakeup.set_due(None);
                let has_failed = outcome.is_err();
                if is_pause && !has_failed {
                    super::took(&self.latencies.pause_us, begun);
                }
                self.tell(asker, outcome);
                if is_pause && has_failed {
                    // A guest that has to stand still is asked again, but not at once.
                    let again = self.guest.loss().map(|_| Instant::now() + STRAND_PERIOD);
                    self.wakeup.set_due(again);
                } else {
                    self.strand();
                }
            }
        }
    }

    fn tell(&self, asker: Asker, outcome: Result<(), Fault>) {
        match (asker, outcome) {
            (Asker::Client(reply), outcome) => reply.send(outcome.map(|()| Data::Empty)),
            (Asker::ConfigFile, Err(Fault { message: reason, .. })) => {
                self.ending.announce(End::NotStarted { reason });
            }
            (Asker::Nobody, Err(fault)) => log::error!("{}", fault.message),
            (Asker::ConfigFile | Asker::Nobody, Ok(())) => {}
        }
    }

    pub(super) fn go_on(&mut self, work: Work) -> Course {
        match work {
            Work::Snapshot(making) => self.go_on_making(making),
            Work::Load(opening, resume) => self.go_on_loading(opening, resume),
            Work::Resume(round) => self.go_on_resuming(round),
            Work::Send(sending) => self.go_on_sending(sending),
            Work::Receive(receiving) => self.go_on_receiving(receiving),
            Work::Arrive(round) => self.go_on_arriving(round),
            Work::Start(opening) => match opening.poll() {
                None => Course::Pending(Work::Start(opening), None),
                Some(plan) => {
                    let plan = plan.map_err(|error| Fault::from_error(&error));
                    Course::Over(plan.and_then(|plan| self.run(plan)))
                }
            },
            Work::Pause => self.go_on_pausing(),
            Work::Plug(plugging) => self.go_on_plugging(plugging),
            Work::Unplug(closing) => match closing.poll() {
                None => Course::Pending(Work::Unplug(closing), None),
                Some(()) => Course::Over(Ok(())),
            },
            Work::OpenImage(opening, patch) => match opening.poll() {
                None => Course::Pending(Work::OpenImage(opening, patch), None),
                Some(Ok(image)) => self.use_image(image, patch),
                Some(Err(fault)) => Course::Over(Err(fault)),
            },
            Work::ChangeDrive(mut change, patch) => {
                let Some(mut drives) = self.guest.drives() else {
                    unreachable!("a machine does not change its phase under a change of a drive");
                };
                match drives.poll(&mut change) {
                    Progress::Pending { until } => {
                        Course::Pending(Work::ChangeDrive(change, patch), Some(until))
                    }
                    Progress::Done(Ok(())) => self.patch_on(patch),
                    Progress::Done(Err(error)) => Course::Over(Err(Fault::from_error(&error))),
                }
            }
        }
    }

    fn go_on_pausing(&mut self) -> Course {
        let Guest::Pausing(machine) = std::mem::take(&mut self.guest) else {
            unreachable!("a pause goes on while the guest is pausing");
        };
        let (guest, course) = match machine.poll(Patience::None) {
            Pause::Pending(machine, until) => {
                (Guest::Pausing(machine), Course::Pending(Work::Pause, Some(until)))
            }
            Pause::Paused(machine) => (Guest::Paused(machine), Course::Over(Ok(()))),
            Pause::Stranded(machine) => (Guest::Stranded(machine), Course::Over(Ok(()))),
            Pause::Refused(Refused { machine, error }) => (
                Guest::Running(machine),
                Course::Over(Err(Fault::from_error(&error))),
            ),
        };
        self.guest = guest;
        course
    }

    /// Lets the guest stand still, or leaves it so, if a disk of it is lost.
    fn strand(&mut self) {
        if self.guest.loss().is_none() {
            return;
        }
        match std::mem::take(&mut self.guest) {
            Guest::Running(machine) => {
                self.guest = Guest::Pausing(machine.begin_pause(&self.wakeup.notice()));
                self.begin(Work::Pause, Asker::Nobody);
            }
            Guest::Paused(machine) => self.guest = Guest::Stranded(machine.strand()),
            other => self.guest = other,
        }
    }

    /// Begins to pause, if there is anything to pause.
    pub(super) fn pause(&mut self) -> Reaction {
        match std::mem::take(&mut self.guest) {
            Guest::Running(machine) => {
                self.guest = Guest::Pausing(machine.begin_pause(&self.wakeup.notice()));
                Reaction::Begun(Work::Pause)
            }
            other => {
                self.guest = other;
                Reaction::Done(Data::Empty)
            }
        }
    }

    /// Opens what was configured, builds it and lets it run; a failure leaves nothing behind, and the configuration can
    /// be mended.
    pub(super) fn start(&mut self) -> Result<Reaction, Fault> {
        if !self.config.has_remote_image() {
            let plan = Plan::new(&self.config, &self.owner).map_err(|error| Fault::from_error(&error))?;
            return self.run(plan).map(|()| Reaction::Done(Data::Empty));
        }
        let (config, owner) = (self.config.clone(), self.owner.clone());
        let opening = Opening::begin("open", &self.wakeup.notice(), move || Plan::new(&config, &owner));
        let opening = opening.map_err(|error| Fault::from_error(&error))?;
        Ok(Reaction::Begun(Work::Start(opening)))
    }

    /// Begins to change a drive; what opens an image may wait for whoever has it, and does so elsewhere.
    pub(super) fn patch_drive(&mut self, asked: PartialDrive) -> Result<Reaction, Fault> {
        let mut config = self.config.clone();
        config.patch_drive(&asked)?;
        let drive = config
            .drives()
            .iter()
            .find(|drive| drive.drive_id == asked.drive_id);
        let drive = drive.expect("the patch was taken, so the drive is there").clone();
        let failed = |error: DriveChangeError| Fault::from_error(&error);
        let mut drives = self.guest.drives().ok_or_else(|| Underway::Pause.fault())?;
        drives.check(&asked.drive_id).map_err(failed)?;
        let mut size_bytes = asked.size_bytes;
        let has_image = |path: &String| drives.has_image(&asked.drive_id, path);
        let next = asked.path_on_host.clone().filter(|path| !has_image(path));
        if let (Some(path), None) = (&asked.path_on_host, &next)
            && !open::is_remote(path)
        {
            // The same image again: it may have grown from outside. A server is asked only if a size is named.
            let now_bytes = open::size_bytes(path).map_err(|error| Fault::from_error(&error))?;
            size_bytes = size_bytes.or(Some(now_bytes));
        }
        let mut patch = Box::new(Patch {
            asked,
            config,
            size_bytes,
        });
        if next.is_none() {
            let has_path = self
                .config
                .drives()
                .iter()
                .any(|had| had.drive_id == drive.drive_id && had.path_on_host == drive.path_on_host);
            if drive.path_on_host.as_deref().is_some_and(open::is_remote) && !has_path {
                return Err(Fault::bad_request(format!(
                    "drive `{}` has that image by another URL, and its session keeps the portals, the user and the options of \
                     that: leave path_on_host out, or start the machine anew",
                    drive.drive_id
                )));
            }
            return settled(self.patch_on(patch));
        }
        if let Some(at) = &drive.lease_at {
            return Err(Fault::bad_request(format!(
                "drive `{}` keeps the records of its lease at `{at}`, and they are those of the image that it has: \
                 leave path_on_host out",
                drive.drive_id
            )));
        }
        // Its lease is taken before the old one goes: a failure leaves the old disk serving.
        let (owner, size_bytes) = (self.owner.clone(), patch.size_bytes.take());
        let open = move || {
            let mut image = drive
                .open_image(&owner)
                .map_err(|error| Fault::from_error(&error))?;
            if let Some(size_bytes) = size_bytes {
                image.backend = blk::grown(image.backend, size_bytes).map_err(|source| {
                    let id = drive.drive_id.clone();
                    Fault::from_error(&DriveChangeError::Control { id, source })
                })?;
            }
            Ok(image)
        };
        let opening = Opening::begin("open", &self.wakeup.notice(), open);
        let opening = opening.map_err(|error| Fault::from_error(&error))?;
        Ok(Reaction::Begun(Work::OpenImage(opening, patch)))
    }

    fn use_image(&mut self, image: Image, patch: Box<Patch>) -> Course {
        let notice = self.wakeup.notice();
        let Some(mut drives) = self.guest.drives() else {
            unreachable!("a machine does not change its phase under a change of a drive");
        };
        match drives.begin_replace(&patch.asked.drive_id, image, &notice) {
            Ok(change) => self.go_on(Work::ChangeDrive(Box::new(change), patch)),
            Err(error) => Course::Over(Err(Fault::from_error(&error))),
        }
    }

    /// What comes after the image of a patch: its size, then the limits, then the configuration.
    fn patch_on(&mut self, mut patch: Box<Patch>) -> Course {
        let notice = self.wakeup.notice();
        let Some(mut drives) = self.guest.drives() else {
            unreachable!("a machine does not change its phase under a change of a drive");
        };
        let id = &patch.asked.drive_id;
        if let Some(size_bytes) = patch.size_bytes.take() {
            return match drives.begin_grow(id, size_bytes, &notice) {
                Ok(change) => self.go_on(Work::ChangeDrive(Box::new(change), patch)),
                Err(error) => Course::Over(Err(Fault::from_error(&error))),
            };
        }
        if let Some(limits) = patch.asked.rate_limiter
            && let Err(error) = drives.limit(id, limits)
        {
            return Course::Over(Err(Fault::from_error(&error)));
        }
        self.config = patch.config;
        Course::Over(Ok(()))
    }

    /// The phase that clients are told: a guest that is being paused still runs.
    pub(super) fn phase(&self) -> Phase {
        match self.guest {
            Guest::NotStarted => Phase::NotStarted,
            Guest::Running(_) | Guest::Pausing(_) => Phase::Running,
            Guest::Paused(_) | Guest::Stranded(_) | Guest::Yielded(_) => Phase::Paused,
        }
    }
}

fn settled(course: Course) -> Result<Reaction, Fault> {
    match course {
        Course::Pending(work, _) => Ok(Reaction::Begun(work)),
        Course::Over(outcome) => outcome.map(|()| Reaction::Done(Data::Empty)),
    }
}
