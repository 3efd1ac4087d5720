//! Snapshots as the `vmm` thread sees them: what is begun, and looked after between other messages.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use coracle_devices::virtio::device::Patience;
use coracle_storage::draft::is_one_place;
use coracle_storage::overlay;

use super::opening::Opening;
use super::operation::{Course, Reaction, Work};
use super::{Guest, Monitor};
use crate::api::{Data, Fault};
use crate::config::{Disks, SnapshotCreate, SnapshotLoad, SnapshotProgress, SnapshotStage, SnapshotType};
use crate::end::Ending;
use crate::event_loop::Source;
use crate::machine::{Machine, Paused, Progress, Round};
use crate::snapshot::contents::{CONFIG, ConfigState, ORIGIN, OriginState};
use crate::snapshot::create::{self, CreateError};
use crate::snapshot::load::{self, LoadError, Loaded};
use crate::snapshot::memory;
use crate::state::Sections;

/// A snapshot that is being made of the paused machine.
///
/// ```text
///   Flushing ──all is on the medium──► state saved ──► Writing, on a thread ──► over
/// ```
pub(super) enum Making {
    /// The disks have what was written put onto their media.
    Flushing(Round, Box<SnapshotCreate>, Arc<memory::Progress>),
    /// Memory and state are being written.
    Writing(
        Opening<Result<memory::MemoryId, CreateError>>,
        Arc<memory::Progress>,
    ),
}

impl Monitor {
    /// Begins to make a snapshot.
    pub(super) fn create_snapshot(&mut self, files: SnapshotCreate) -> Result<Reaction, Fault> {
        self.check_complete("Create snapshot")?;
        files.check().map_err(|error| create_fault(&error))?;
        self.check_places(&files)?;
        let notice = self.wakeup.notice();
        let machine = self.paused()?;
        if files.include_disks {
            machine.overlays().map_err(|error| create_fault(&error))?;
        }
        let round = machine.begin_flush(&notice);
        let round = round.map_err(|error| create_fault(&error))?;
        Ok(Reaction::Begun(Work::Snapshot(Making::Flushing(
            round,
            Box::new(files),
            Arc::default(),
        ))))
    }

    /// Whether nothing is in the way of either file that must not be replaced: the other one, or the image of a drive.
    fn check_places(&self, files: &SnapshotCreate) -> Result<(), Fault> {
        let (state, memory) = (&files.snapshot_path, &files.mem_file_path);
        if is_one_place(state, memory) {
            return Err(Fault::bad_request(
                "Create snapshot error: mem_file_path and snapshot_path are the same file",
            ));
        }
        for pmem in self.config.pmem() {
            let is_file = |path: &&String| is_one_place(path, &pmem.path_on_host);
            if let Some(path) = [state, memory].into_iter().find(is_file) {
                return Err(Fault::bad_request(format!(
                    "Create snapshot error: `{path}` is the file of pmem device `{}`: name another file",
                    pmem.id
                )));
            }
        }
        for drive in self.config.drives() {
            let layers = drive.overlay.as_ref();
            let images = [
                drive.path_on_host.as_ref(),
                layers.map(|layers| &layers.base),
                layers
                    .map(|layers| &layers.path)
                    .filter(|path| *path != overlay::MEMORY),
            ];
            for image in images.into_iter().flatten() {
                let is_image = |path: &&String| is_one_place(path, image);
                if let Some(path) = [state, memory].into_iter().find(is_image) {
                    return Err(Fault::bad_request(format!(
                        "Create snapshot error: `{path}` is the image of drive `{}`: name another file",
                        drive.drive_id
                    )));
                }
            }
        }
        Ok(())
    }

    /// The machine, if it stands still and nothing of it is lost.
    fn paused(&mut self) -> Result<&mut Machine<Paused>, Fault> {
        let loss = self.guest.loss();
        match &mut self.guest {
            Guest::Paused(machine) => Ok(machine),
            _ => Err(Fault::bad_request(format!(
                "Create snapshot error: {}",
                loss.unwrap_or_else(|| "the microVM does not stand still".to_owned())
            ))),
        }
    }

    pub(super) fn go_on_making(&mut self, making: Making) -> Course {
        match making {
            // What the disks were asked for, they may do or not: a flush changes nothing.
            Making::Flushing(_, _, progress) if progress.is_cancelled() => {
                Course::Over(Err(create_fault(&CreateError::Cancelled)))
            }
            Making::Flushing(mut round, files, progress) => {
                let machine = match self.paused() {
                    Ok(machine) => machine,
                    Err(fault) => return Course::Over(Err(fault)),
                };
                match machine.poll_round(&mut round, Patience::None) {
                    Progress::Pending { until } => {
                        let making = Making::Flushing(round, files, progress);
                        Course::Pending(Work::Snapshot(making), Some(until))
                    }
                    Progress::Done(Err(error)) => Course::Over(Err(create_fault(&error))),
                    Progress::Done(Ok(())) => match self.begin_writing(*files, progress) {
                        Ok(making) => self.go_on_making(making),
                        Err(fault) => Course::Over(Err(fault)),
                    },
                }
            }
            Making::Writing(opening, progress) => match opening.poll() {
                None => Course::Pending(Work::Snapshot(Making::Writing(opening, progress)), None),
                Some(Err(error)) => Course::Over(Err(create_fault(&error))),
                Some(Ok(id)) => {
                    if let Ok(machine) = self.paused()
                        && let Err(error) = machine.is_saved_as(id)
                    {
                        log::warn!("the next diff snapshot is larger than it needs to be: {error}");
                    }
                    Course::Over(Ok(()))
                }
            },
        }
    }

    /// Saves the state, and begins to write it and the memory.
    fn begin_writing(
        &mut self,
        files: SnapshotCreate,
        progress: Arc<memory::Progress>,
    ) -> Result<Making, Fault> {
        let mut sections = Sections::default();
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH);
        sections.add(
            ORIGIN,
            &OriginState {
                vm: self.id.clone(),
                taken_unix_s: since_1970.map_or(0, |time| time.as_secs()),
            },
        );
        sections.add(CONFIG, &ConfigState::from(&self.config));
        let machine = self.paused()?;
        let state = machine.save().map_err(|error| create_fault(&error))?;
        state.write(&mut sections);
        let pages = match files.snapshot_type {
            SnapshotType::Full => machine.all_pages(),
            SnapshotType::Diff => machine.written_pages().map_err(|error| create_fault(&error))?,
        };
        let overlays = files.include_disks.then(|| machine.overlays()).transpose();
        let overlays = overlays.map_err(|error| create_fault(&error))?;
        let job = create::Job {
            files,
            sections,
            memory: Arc::clone(machine.memory()),
            pages,
            overlays,
            progress: Arc::clone(&progress),
        };
        let opening = Opening::begin("snapshot", &self.wakeup.notice(), move || job.run());
        let opening = opening.map_err(|error| create_fault(&error))?;
        Ok(Making::Writing(opening, progress))
    }

    /// Begins to load a snapshot.
    pub(super) fn load_snapshot(&mut self, load: SnapshotLoad) -> Result<Reaction, Fault> {
        if !self.config.is_untouched() {
            return Err(Fault::bad_request(
                "Load snapshot error: Loading a microVM snapshot not allowed after configuring boot-specific resources.",
            ));
        }
        load.memory().map_err(|error| load_fault(&error))?;
        load.check().map_err(|error| load_fault(&error))?;
        let resume = load.resume_vm;
        // What a load that fails has announced is for nobody.
        let ending = Ending::new().map_err(|error| load_fault(&error))?;
        let job = load::Job {
            load,
            process: self.config.clone(),
            owner: self.owner.clone(),
            trusted: self.trusted.clone(),
            ending,
        };
        let opening = Opening::begin("open", &self.wakeup.notice(), move || job.run().map(Box::new));
        let opening = opening.map_err(|error| load_fault(&error))?;
        Ok(Reaction::Begun(Work::Load(opening, resume)))
    }

    pub(super) fn go_on_loading(
        &mut self,
        opening: Opening<Result<Box<Loaded>, LoadError>>,
        resume: bool,
    ) -> Course {
        let Loaded {
            plan,
            config,
            disks,
            ending,
        } = match opening.poll() {
            None => return Course::Pending(Work::Load(opening, resume), None),
            Some(Err(error)) => return Course::Over(Err(load_fault(&error))),
            Some(Ok(loaded)) => *loaded,
        };
        let machine = match self.build(plan, &config) {
            Ok(machine) => machine,
            Err(Fault { message, status }) => {
                let message = format!("Load snapshot error: {message}");
                return Course::Over(Err(Fault { status, message }));
            }
        };
        self.config = config;
        if disks == Disks::Detached {
            machine.announce_disks();
        }
        self.event_loop.watch(Source::Ending(ending.clone()));
        self.memory_ending = Some(ending);
        self.attend(&machine);
        self.guest = Guest::Paused(machine);
        if !resume {
            return Course::Over(Ok(()));
        }
        match self.begin_to_resume() {
            Ok(Reaction::Begun(work)) => self.go_on(work),
            Ok(Reaction::Done(_)) => Course::Over(Ok(())),
            Err(fault) => Course::Over(Err(fault)),
        }
    }

    /// Lets the guest run on; where a snapshot remembers the disks, only once they have another generation.
    pub(super) fn begin_to_resume(&mut self) -> Result<Reaction, Fault> {
        let notice = self.wakeup.notice();
        match &mut self.guest {
            Guest::Paused(machine) if machine.is_remembered() => {
                let round = machine.begin_raise(&notice);
                let round = round.map_err(|error| Fault::from_error(&error))?;
                Ok(Reaction::Begun(Work::Resume(round)))
            }
            _ => self.resume().map(|()| Reaction::Done(Data::Empty)),
        }
    }

    pub(super) fn go_on_resuming(&mut self, mut round: Round) -> Course {
        let Guest::Paused(machine) = &mut self.guest else {
            // Lost meanwhile: a resume says why it cannot be.
            return Course::Over(self.resume());
        };
        match machine.poll_round(&mut round, Patience::None) {
            Progress::Pending { until } => Course::Pending(Work::Resume(round), Some(until)),
            Progress::Done(Err(error)) => Course::Over(Err(Fault::from_error(&error))),
            Progress::Done(Ok(())) => Course::Over(self.resume()),
        }
    }

    /// How far a snapshot is.
    pub(super) fn snapshot_progress(&self) -> SnapshotProgress {
        let progress = |state, done_bytes, total_bytes| SnapshotProgress {
            state,
            done_bytes,
            total_bytes,
        };
        match self.operation.as_ref().map(|operation| &operation.work) {
            Some(Work::Snapshot(Making::Flushing(..))) => progress(SnapshotStage::Creating, 0, 0),
            Some(Work::Snapshot(Making::Writing(_, written))) => progress(
                SnapshotStage::Creating,
                written.done_bytes(),
                written.total_bytes(),
            ),
            Some(Work::Load(..)) => progress(SnapshotStage::Loading, 0, 0),
            _ => match self.guest.loading() {
                Some((loaded, total)) if loaded < total => progress(SnapshotStage::Loading, loaded, total),
                _ => progress(SnapshotStage::Idle, 0, 0),
            },
        }
    }

    /// Gives up the snapshot that is being made, if there is one.
    pub(super) fn cancel_snapshot(&mut self) {
        if let Some(Work::Snapshot(Making::Flushing(_, _, progress) | Making::Writing(_, progress))) =
            self.operation.as_ref().map(|operation| &operation.work)
        {
            progress.cancel();
            self.advance();
        }
    }
}

impl Guest {
    /// How much of its memory has been loaded, of how much, where that goes on.
    fn loading(&self) -> Option<(u64, u64)> {
        let progress = match self {
            Self::Running(machine) => machine.loading(),
            Self::Pausing(machine) => machine.loading(),
            Self::Paused(machine) => machine.loading(),
            Self::Stranded(_) | Self::NotStarted | Self::Yielded(_) => None,
        }?;
        Some((progress.loaded_bytes(), progress.total_bytes()))
    }
}

fn create_fault(error: &dyn std::error::Error) -> Fault {
    let Fault { message, status } = Fault::from_error(error);
    Fault {
        status,
        message: format!("Create snapshot error: {message}"),
    }
}

fn load_fault(error: &dyn std::error::Error) -> Fault {
    let Fault { message, status } = Fault::from_error(error);
    Fault {
        status,
        message: format!("Load snapshot error: {message}"),
    }
}
