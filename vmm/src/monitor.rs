//! The `vmm` thread: it owns the configuration and the machine, and does what messages say.
//!
//! Nobody else has a `&mut` to either, so there is no lock around them. It never waits for storage: what takes its time is
//! begun, and looked after between other messages.

mod balloon;
mod memory_hotplug;
mod migration;
mod opening;
mod operation;
mod plug;
mod pmem;
mod postcopy;
mod snapshot;
#[cfg(test)]
mod tests;
mod wakeup;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use coracle_devices::mmds::Mmds;
use coracle_devices::power::EndSignal;
use coracle_devices::virtio::blk::LossSignal;
use coracle_devices::virtio::device::Patience;
use coracle_devices::virtio::net::PartialNetworkInterface;
use coracle_devices::virtio::vsock::Listener;
use coracle_storage::lease::Owner;
use serde_json::Value;
use vmm_sys_util::timerfd::TimerFd;

use crate::api::http::Content;
use crate::api::server::Server;
use crate::api::verbs::{permitted, permitted_meanwhile};
use crate::api::{Answer, Calls, Data, Fault, Verb};
use crate::cli::StartTimes;
use crate::config::{
    Config, ConfigError, FullConfig, InstanceInfo, MetricsConfig, MigrationStage, RateLimiterGroup, Version,
    VsockConfig, VsockError,
};
use crate::console::{Console, Input};
use crate::end::{End, Ending};
use crate::event_loop::{EventLoop, Message, Source, Watch};
use crate::keys::TrustedKeys;
use crate::logger;
use crate::machine::handover::Yielded;
use crate::machine::plan::Plan;
use crate::machine::report;
use crate::machine::{self, Drives, Machine, Pause, Paused, Pausing, Plugged, Refused, Running, Stranded};
use crate::metrics::{ProcessReport, Registry, Section, WRITE_PERIOD_S};
use crate::migration::stream::Stream;
use crate::migration::wire::Wire;
use crate::seccomp;
use crate::signals::StopSignals;

use self::operation::{Asker, Operation, Reaction};
use self::wakeup::{Wakeup, errno};

/// The machine, in whatever phase it is.
#[derive(Default)]
enum Guest {
    #[default]
    NotStarted,
    Running(Machine<Running>),
    /// As long as an operation lasts.
    Pausing(Machine<Pausing>),
    Paused(Machine<Paused>),
    Stranded(Machine<Stranded>),
    /// Whoever wins the next step of its leases has it; the machine itself is with the thread that asks them.
    Yielded(Option<Machine<Yielded>>),
}

impl Guest {
    /// The drives, if they can be changed now.
    fn drives(&mut self) -> Option<Drives<'_>> {
        match self {
            Self::Running(machine) => Some(machine.drives()),
            Self::Paused(machine) => Some(machine.drives()),
            Self::Stranded(machine) => Some(machine.drives()),
            Self::NotStarted | Self::Pausing(_) | Self::Yielded(_) => None,
        }
    }

    /// Which disk is lost, and to whom.
    fn loss(&self) -> Option<String> {
        let (drive_id, reason) = match self {
            // Another's disks are no loss.
            Self::NotStarted | Self::Yielded(_) => None,
            Self::Running(machine) => machine.losses().next(),
            Self::Pausing(machine) => machine.losses().next(),
            Self::Paused(machine) => machine.losses().next(),
            Self::Stranded(machine) => machine.losses().next(),
        }?;
        Some(format!("drive `{drive_id}` is lost: {reason}"))
    }
}

/// One machine and everything that is done to it.
pub struct Monitor {
    id: String,
    owner: Owner,
    /// Whose snapshots it loads, if not everybody's.
    trusted: Option<TrustedKeys>,
    config: Config,
    /// What the guest may ask for about itself.
    mmds: Arc<Mmds>,
    guest: Guest,
    /// After the guest, whose disks may still have what it holds.
    operation: Option<Operation>,
    ending: Ending,
    /// Where the end of a machine that was loaded is announced by what brings its memory in.
    memory_ending: Option<Ending>,
    guest_end: Arc<EndSignal>,
    event_loop: EventLoop,
    wakeup: Wakeup,
    /// What tells of the loss of each drive.
    losses: BTreeMap<String, Watch>,
    /// How often the guest was told of a device that it has not looked at.
    times_told: u32,
    calls: Option<Calls>,
    console: Option<Console>,
    metrics: Registry,
    latencies: Arc<Latencies>,
    process: ProcessReport,
    /// The source of a machine that is about to run here.
    wire: Option<Wire<Stream>>,
    /// Somebody has asked the process to stop, which others still need.
    is_put_off: bool,
}

/// How long the last pause and the last resume took, in microseconds.
#[derive(Debug, Default)]
struct Latencies {
    pause_us: AtomicU64,
    resume_us: AtomicU64,
}

/// The host has no descriptor or thread left for the monitor itself.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// An eventfd or a timer.
    #[error("cannot make a descriptor for the event loop")]
    Descriptor(#[from] io::Error),
    /// Epoll.
    #[error("cannot make the event loop")]
    Epoll(#[from] event_manager::Error),
}

impl Monitor {
    /// A monitor of a machine that is not started yet; what it counts is told by `metrics`, too.
    ///
    /// # Errors
    ///
    /// When the host has no descriptors left.
    pub fn new(
        id: String,
        config: Config,
        stop: StopSignals,
        mut metrics: Registry,
    ) -> Result<Self, MonitorError> {
        let mut event_loop = EventLoop::new()?;
        let ending = Ending::new()?;
        let guest_end = EndSignal::new()?;
        event_loop.watch(Source::Ending(ending.clone()));
        event_loop.watch(Source::GuestEnd(Arc::clone(&guest_end), ending.clone()));
        event_loop.watch(Source::Stop(stop));
        let period = Duration::from_secs(WRITE_PERIOD_S);
        let mut metrics_due = TimerFd::new().map_err(errno)?;
        metrics_due.reset(period, Some(period)).map_err(errno)?;
        event_loop.watch(Source::MetricsDue(metrics_due));
        let wakeup = Wakeup::new(&mut event_loop)?;
        let latencies = Arc::<Latencies>::default();
        register(&latencies, &mut metrics);
        let process = ProcessReport::default();
        process.register(&mut metrics);
        let mmds = Arc::<Mmds>::default();
        report::metadata(&mmds, &mut metrics);
        Ok(Self {
            owner: Owner::of_this_process(&id),
            id,
            trusted: None,
            config,
            mmds,
            guest: Guest::NotStarted,
            operation: None,
            ending,
            memory_ending: None,
            guest_end,
            event_loop,
            wakeup,
            losses: BTreeMap::new(),
            times_told: 0,
            calls: None,
            console: None,
            metrics,
            latencies,
            process,
            wire: None,
            is_put_off: false,
        })
    }

    /// Lets the metadata of the guest have so many bytes as text.
    pub fn limit_metadata(&self, bytes_max: usize) {
        self.mmds.limit(bytes_max);
    }

    /// From now on only snapshots are loaded that one of `keys` has signed.
    pub fn trust_only(&mut self, keys: TrustedKeys) {
        self.trusted = Some(keys);
    }

    /// Answers the `calls` of `server` from now on, so long after the `start` of the process.
    pub fn answer(&mut self, calls: Calls, server: &Server, start: StartTimes) {
        self.process.is_up(start);
        self.event_loop.watch(Source::Calls(calls.as_raw_fd()));
        self.calls = Some(calls);
        server.request_counters().register(&mut self.metrics);
    }

    /// Starts the machine of a configuration file, after the logger and the metrics that it names; one whose images are
    /// elsewhere only begins to start, and if it does not, that ends [`Self::serve`].
    ///
    /// # Errors
    ///
    /// What an API client would be told.
    pub fn apply_and_start(&mut self) -> Result<(), Fault> {
        if let Some(logger) = self.config.logger() {
            logger::configure(logger).map_err(|error| Fault::from_error(&error))?;
        }
        if let Some(metrics) = self.config.metrics() {
            self.metrics
                .write_to(metrics, &self.id)
                .map_err(|error| Fault::from_error(&error))?;
        }
        match self.take_on(Verb::Start)? {
            Reaction::Done(_) => {}
            Reaction::Begun(work) => self.begin(work, Asker::ConfigFile),
        }
        Ok(())
    }

    /// Serves messages until the machine ends or somebody stops the process.
    ///
    /// # Errors
    ///
    /// When the event loop itself fails.
    pub fn serve(&mut self) -> Result<End, event_manager::Error> {
        loop {
            match self.event_loop.wait()? {
                Message::Calls => self.answer_calls(),
                Message::Ended => {
                    let endings = [Some(&self.ending), self.memory_ending.as_ref()];
                    if let Some(end) = endings.into_iter().flatten().find_map(Ending::announced) {
                        return Ok(self.explained(end));
                    }
                }
                Message::Stop(signal) => {
                    if self.puts_off(signal) {
                        continue;
                    }
                    self.process.stopped_by(signal);
                    return Ok(End::Stopped { by: signal });
                }
                Message::MetricsDue => self.metrics.write(),
                Message::Progress => {
                    self.wakeup.quiet();
                    self.advance();
                }
                Message::Reminder => {
                    self.wakeup.reminded();
                    self.tell_again();
                }
                Message::DiskLost { drive_id, reason } => {
                    log::error!("drive `{drive_id}` is lost, and the guest is stopped for good: {reason}");
                    self.advance();
                }
                Message::Console(event) => {
                    if let Some(console) = &mut self.console {
                        console.serve(event, &mut self.event_loop);
                    }
                }
            }
        }
    }

    fn answer_calls(&mut self) {
        while let Some(call) = self.calls.as_mut().and_then(Calls::take) {
            match self.take_on(call.verb) {
                Ok(Reaction::Done(data)) => call.reply.send(Ok(data)),
                Ok(Reaction::Begun(work)) => self.begin(work, Asker::Client(call.reply)),
                Err(fault) => call.reply.send(Err(fault)),
            }
        }
    }

    /// Says where metrics go, as the command line has it.
    ///
    /// # Errors
    ///
    /// What an API client would be told.
    pub fn write_metrics_to(&mut self, metrics: MetricsConfig) -> Result<(), Fault> {
        self.take_on(Verb::PutMetrics(metrics)).map(drop)
    }

    /// Does what one verb says, or begins to, if it is allowed now.
    fn take_on(&mut self, verb: Verb) -> Result<Reaction, Fault> {
        permitted(self.phase(), verb.kind())?;
        if let Some(operation) = &self.operation {
            permitted_meanwhile(operation.kind(), verb.kind())?;
        }
        match verb {
            Verb::Start => self.start(),
            Verb::PutDrive(drive) => self.put_drive(drive),
            Verb::PatchDrive(patch) => self.patch_drive(patch),
            Verb::DeleteDrive(id) => self.unplug(Plugged::Drive, &id),
            Verb::PutNetworkInterface(network) => self.put_network(network),
            Verb::DeleteNetworkInterface(id) => self.unplug(Plugged::Network, &id),
            Verb::Pause => Ok(self.pause()),
            Verb::Resume => self.begin_to_resume(),
            Verb::CreateSnapshot(files) => self.create_snapshot(files),
            Verb::LoadSnapshot(load) => self.load_snapshot(*load),
            Verb::SendMigration(send) => self.send_migration(*send),
            Verb::ReceiveMigration(receive) => self.receive_migration(*receive),
            other => self.execute(other).map(Reaction::Done),
        }
    }

    /// What is asked for, by a verb that only asks.
    fn told(&self, verb: &Verb) -> Option<Data> {
        Some(match verb {
            Verb::GetInstance => {
                let instance = InstanceInfo::new(&self.id, self.phase());
                Data::json(&instance.because(self.guest.loss()))
            }
            Verb::GetVersion => Data::json(&Version::current()),
            Verb::GetMachineConfig => Data::json(self.config.machine()),
            Verb::GetConfig => Data::json(&FullConfig::from(&self.config)),
            Verb::GetMetrics => Data::Body(Content::Prometheus, self.metrics.prometheus()),
            Verb::GetMmds => Data::json(&self.mmds.content()),
            Verb::GetSnapshot => Data::json(&self.snapshot_progress()),
            Verb::GetMigration => Data::json(&self.migration_status()),
            Verb::WatchMigration => {
                let status = self.migration_status();
                Data::line(&status, status.state == MigrationStage::Idle)
            }
            _ => return None,
        })
    }

    /// Does what takes no time.
    fn execute(&mut self, verb: Verb) -> Answer {
        if let Some(data) = self.told(&verb) {
            return Ok(data);
        }
        match verb {
            Verb::PutMachineConfig(machine) => self.config.set_machine(machine)?,
            Verb::PatchMachineConfig(patch) => self.config.patch_machine(&patch)?,
            Verb::PutCpuConfig(cpu) => self.config.set_cpu(cpu),
            Verb::PutBootSource(source) => {
                // Opened again at the start; a path that is wrong is better heard of now.
                source.open().map_err(ConfigError::from)?;
                self.config.set_boot_source(source)?;
            }
            Verb::PutRateLimiterGroup(group) => self.config.insert_group(group)?,
            Verb::PatchRateLimiterGroup(patch) => self.patch_group(&patch)?,
            Verb::PatchNetworkInterface(patch) => self.patch_network(&patch)?,
            Verb::PutMmdsConfig(mmds) => self.config.set_mmds(mmds)?,
            Verb::PutMmds(content) => self.put_metadata(content)?,
            Verb::PatchMmds(patch) => {
                let patched = self.mmds.patch(patch);
                patched.map_err(|error| Fault::from_error(&error))?;
            }
            Verb::PutVsock(vsock) => self.put_vsock(vsock)?,
            verb @ (Verb::PutBalloon(_)
            | Verb::PatchBalloon(_)
            | Verb::GetBalloon
            | Verb::GetBalloonStatistics
            | Verb::PatchBalloonStatistics(_)
            | Verb::StartHinting(_)
            | Verb::GetHintingStatus
            | Verb::StopHinting) => return self.attend_balloon(&verb),
            verb @ (Verb::PutMemoryHotplug(_) | Verb::PatchMemoryHotplug(_) | Verb::GetMemoryHotplug) => {
                return self.attend_memory_hotplug(&verb);
            }
            Verb::PutEntropy(entropy) => self.config.set_entropy(entropy),
            Verb::PutPmem(pmem) => self.put_pmem(pmem)?,
            Verb::PatchPmem(patch) => self.patch_pmem(&patch)?,
            Verb::PutSerial(serial) => self.config.set_serial(serial),
            Verb::PutLogger(logger) => {
                logger::configure(&logger).map_err(|error| Fault::from_error(&error))?;
                self.config.set_logger(logger);
            }
            Verb::PutMetrics(metrics) => self.put_metrics(&metrics)?,
            Verb::FlushMetrics => self.metrics.write(),
            Verb::SendCtrlAltDel => self.press_ctrl_alt_del()?,
            Verb::CancelSnapshot => self.cancel_snapshot(),
            Verb::CancelMigration => self.cancel_migration()?,
            Verb::RecoverMigration(recover) => self.recover_migration(*recover)?,
            Verb::GetInstance
            | Verb::GetVersion
            | Verb::GetMachineConfig
            | Verb::GetConfig
            | Verb::GetMetrics
            | Verb::GetMmds
            | Verb::GetSnapshot
            | Verb::GetMigration
            | Verb::WatchMigration => unreachable!("what only asks is told"),
            Verb::Start
            | Verb::PutDrive(_)
            | Verb::PatchDrive(_)
            | Verb::DeleteDrive(_)
            | Verb::PutNetworkInterface(_)
            | Verb::DeleteNetworkInterface(_)
            | Verb::Pause
            | Verb::Resume
            | Verb::CreateSnapshot(_)
            | Verb::LoadSnapshot(_)
            | Verb::SendMigration(_)
            | Verb::ReceiveMigration(_) => unreachable!("what takes its time is begun"),
        }
        Ok(Data::Empty)
    }

    /// Builds what was opened, and lets it run.
    fn run(&mut self, plan: Plan) -> Result<(), Fault> {
        let machine = self.build(plan, &self.config)?;
        confine()?;
        // A machine that cannot run is taken apart again: nobody could start another beside it.
        let machine = machine
            .resume()
            .map_err(|Refused { error, .. }| Fault::from_error(&error))?;
        self.attend(&machine);
        self.guest = Guest::Running(machine);
        Ok(())
    }

    /// Builds what was opened, as `config` has it.
    fn build(&self, mut plan: Plan, config: &Config) -> Result<Machine<Paused>, Fault> {
        if let Some(mmds) = config.mmds() {
            plan.serve_metadata(mmds, &self.mmds);
        }
        machine::build(plan, &self.ending, &self.guest_end).map_err(|error| Fault::from_error(&error))
    }

    /// Looks after the console, the counts and the disks of a machine that is here to stay.
    fn attend<P>(&mut self, machine: &Machine<P>) {
        let has_file = self
            .config
            .serial()
            .is_some_and(|serial| serial.serial_out_path.is_some());
        let input = if has_file { Input::None } else { Input::Standard };
        // What the guest has written meanwhile waits, and calls for attention.
        self.console = Some(Console::attach(
            Arc::clone(machine.serial()),
            input,
            &mut self.event_loop,
        ));
        // It may have been saved before it heard of a device.
        self.wakeup.remind();
        machine.register(&mut self.metrics);
        for loss in machine.loss_signals() {
            self.watch_loss(Arc::clone(loss));
        }
    }

    /// Hears of the loss of a drive from now on.
    fn watch_loss(&mut self, loss: Arc<LossSignal>) {
        let drive_id = loss.drive_id().to_owned();
        let watch = self.event_loop.watch(Source::Loss(loss));
        self.losses.insert(drive_id, watch);
    }

    /// Replaces what the guest may ask for about itself.
    ///
    /// # Errors
    ///
    /// What an API client would be told.
    pub fn put_metadata(&self, content: Value) -> Result<(), Fault> {
        self.mmds.put(content).map_err(|error| Fault::from_error(&error))
    }

    fn put_metrics(&mut self, metrics: &MetricsConfig) -> Result<(), Fault> {
        let mut config = self.config.clone();
        config.set_metrics(metrics.clone())?;
        self.metrics
            .write_to(metrics, &self.id)
            .map_err(|error| Fault::from_error(&error))?;
        self.config = config;
        Ok(())
    }

    fn patch_group(&mut self, patch: &RateLimiterGroup) -> Result<(), Fault> {
        let mut config = self.config.clone();
        config.patch_group(patch)?;
        if let Some(drives) = self.guest.drives() {
            let limited = drives.limit_group(&patch.group_id, patch.limits());
            limited.map_err(|error| Fault::from_error(&error))?;
        }
        self.config = config;
        Ok(())
    }

    fn put_vsock(&mut self, vsock: VsockConfig) -> Result<(), Fault> {
        let mut config = self.config.clone();
        let path = vsock.uds_path.clone();
        config.set_vsock(vsock)?;
        // Made at the start; whether it can be is better heard of now.
        Listener::check(&path).map_err(|error| ConfigError::from(VsockError::from(error)))?;
        self.config = config;
        Ok(())
    }

    fn patch_network(&mut self, patch: &PartialNetworkInterface) -> Result<(), Fault> {
        self.config.patch_network(patch)?;
        match &self.guest {
            Guest::Running(machine) => machine.limit_network(patch),
            Guest::Pausing(machine) => machine.limit_network(patch),
            Guest::Paused(machine) => machine.limit_network(patch),
            Guest::Stranded(machine) => machine.limit_network(patch),
            Guest::NotStarted | Guest::Yielded(_) => {}
        }
        Ok(())
    }

    fn press_ctrl_alt_del(&self) -> Result<(), Fault> {
        match &self.guest {
            Guest::Running(machine) => machine.press_ctrl_alt_del(),
            Guest::Pausing(machine) => machine.press_ctrl_alt_del(),
            Guest::Paused(machine) => machine.press_ctrl_alt_del(),
            Guest::Stranded(machine) => machine.press_ctrl_alt_del(),
            Guest::NotStarted | Guest::Yielded(_) => return Ok(()),
        }
        .map_err(|error| Fault::from_error(&error))
    }

    /// Ends the machine, if there is one: the guest is stopped, its devices are drained, its last
    /// output is handed over, its disks are closed. Then the metrics have their last line.
    pub fn retire(mut self) {
        let settled = match self.guest {
            Guest::NotStarted | Guest::Yielded(None) => None,
            Guest::Yielded(Some(machine)) => {
                machine.retire();
                None
            }
            Guest::Paused(machine) => Some(Pause::Paused(machine)),
            Guest::Stranded(machine) => Some(Pause::Stranded(machine)),
            Guest::Running(machine) => Some(machine.pause()),
            // Whoever asked is told that the machine ended meanwhile.
            Guest::Pausing(machine) => Some(machine.poll(Patience::WithinLimit)),
        };
        // Not before: the guest writes until it stands still.
        if let Some(console) = &self.console {
            console.finish();
        }
        match settled {
            None => {}
            Some(Pause::Paused(machine)) if machine.fetcher().is_some() => postcopy::end_flushed(machine),
            Some(Pause::Paused(machine)) => machine.retire(),
            Some(Pause::Stranded(machine)) => machine.retire(),
            Some(Pause::Refused(Refused { machine, error })) => {
                let why = Fault::from_error(&error).message;
                log::error!("the machine did not drain at its end: {why}");
                // Taking it apart would wait for the same disk again; it ends with the process.
                std::mem::forget(machine);
            }
            Some(Pause::Pending(..)) => unreachable!("who is patient is never told that it goes on"),
        }
        if let Some(operation) = self.operation {
            plug::finish(operation.work, &self.wakeup.notice());
        }
        self.metrics.write();
    }

    fn resume(&mut self) -> Result<(), Fault> {
        confine()?;
        match std::mem::take(&mut self.guest) {
            Guest::Paused(machine) => {
                let begun = Instant::now();
                let (guest, outcome) = match machine.resume() {
                    Ok(machine) => (Guest::Running(machine), Ok(())),
                    Err(Refused { machine, error }) => {
                        (Guest::Paused(machine), Err(Fault::from_error(&error)))
                    }
                };
                self.guest = guest;
                took(&self.latencies.resume_us, begun);
                outcome
            }
            other => {
                let is_stranded = matches!(other, Guest::Stranded(_));
                self.guest = other;
                match self.guest.loss() {
                    Some(loss) if is_stranded => Err(Fault::bad_request(format!(
                        "{loss}; this guest cannot go on without it: end the process"
                    ))),
                    _ => Ok(()),
                }
            }
        }
    }
}

/// Notes how long something took that was begun then.
/// This thread has done what only a start takes.
fn confine() -> Result<(), Fault> {
    seccomp::confine_vmm().map_err(|error| Fault::from_error(&error))
}

fn took(latency_us: &AtomicU64, begun: Instant) {
    let us = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
    latency_us.store(us, Ordering::Relaxed);
}

fn register(latencies: &Arc<Latencies>, metrics: &mut Registry) {
    let latencies = Arc::clone(latencies);
    let report = move |section: &mut Section| {
        section.gauge("pause_vm", latencies.pause_us.load(Ordering::Relaxed));
        section.gauge("resume_vm", latencies.resume_us.load(Ordering::Relaxed));
    };
    metrics.add("latencies_us", Box::new(report));
}
