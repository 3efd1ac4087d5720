//! The `vmm` thread: it owns the configuration and the machine, and does what messages say.
//!
//! Nobody else has a `&mut` to either, so there is no lock around them.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use coracle_devices::power::EndSignal;
use coracle_devices::virtio::blk::{self, PartialDrive};
use coracle_storage::lease::Owner;
use coracle_storage::open;
use vmm_sys_util::timerfd::TimerFd;

use crate::api::http::Content;
use crate::api::server::Server;
use crate::api::verbs::permitted;
use crate::api::{Answer, Calls, Data, Fault, Verb};
use crate::cli::StartTimes;
use crate::config::{Config, ConfigError, FullConfig, InstanceInfo, Phase, RateLimiterGroup, Version};
use crate::console::{Console, Input};
use crate::end::{End, Ending};
use crate::event_loop::{EventLoop, Message, Source};
use crate::logger;
use crate::machine::plan::Plan;
use crate::machine::{self, DriveChangeError, Machine, Paused, Refused, Running};
use crate::metrics::{ProcessReport, Registry, Section, WRITE_PERIOD_S};
use crate::signals::StopSignals;

/// The machine, in whatever phase it is.
#[derive(Default)]
enum Guest {
    #[default]
    NotStarted,
    Running(Machine<Running>),
    Paused(Machine<Paused>),
}

/// One machine and everything that is done to it.
pub struct Monitor {
    id: String,
    owner: Owner,
    config: Config,
    guest: Guest,
    ending: Ending,
    guest_end: Arc<EndSignal>,
    event_loop: EventLoop,
    calls: Option<Calls>,
    console: Option<Console>,
    metrics: Registry,
    latencies: Arc<Latencies>,
    process: ProcessReport,
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
        let latencies = Arc::<Latencies>::default();
        register(&latencies, &mut metrics);
        let process = ProcessReport::default();
        process.register(&mut metrics);
        Ok(Self {
            owner: Owner::of_this_process(&id),
            id,
            config,
            guest: Guest::NotStarted,
            ending,
            guest_end,
            event_loop,
            calls: None,
            console: None,
            metrics,
            latencies,
            process,
        })
    }

    /// Answers the `calls` of `server` from now on, so long after the `start` of the process.
    pub fn answer(&mut self, calls: Calls, server: &Server, start: StartTimes) {
        self.process.is_up(start);
        self.event_loop.watch(Source::Calls(calls.as_raw_fd()));
        self.calls = Some(calls);
        server.request_counters().register(&mut self.metrics);
    }

    /// Starts the machine of a configuration file, after the logger and the metrics that it names.
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
        self.execute(Verb::Start).map(drop)
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
                    if let Some(end) = self.ending.announced() {
                        return Ok(end.clone());
                    }
                }
                Message::Stop(signal) => {
                    self.process.stopped_by(signal);
                    return Ok(End::Stopped { by: signal });
                }
                Message::MetricsDue => self.metrics.write(),
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
            let answer = self.execute(call.verb);
            call.reply.send(answer);
        }
    }

    /// Does what one verb says, if it is allowed in this phase.
    pub fn execute(&mut self, verb: Verb) -> Answer {
        permitted(self.phase(), verb.kind())?;
        match verb {
            Verb::GetInstance => return Ok(Data::json(&InstanceInfo::new(&self.id, self.phase()))),
            Verb::GetVersion => return Ok(Data::json(&Version::current())),
            Verb::GetMachineConfig => return Ok(Data::json(self.config.machine())),
            Verb::GetConfig => return Ok(Data::json(&FullConfig::from(&self.config))),
            Verb::GetMetrics => return Ok(Data::Body(Content::Prometheus, self.metrics.prometheus())),
            Verb::PutMachineConfig(machine) => self.config.set_machine(machine)?,
            Verb::PatchMachineConfig(patch) => self.config.patch_machine(&patch)?,
            Verb::PutCpuConfig(cpu) => self.config.set_cpu(cpu),
            Verb::PutBootSource(source) => {
                // Opened again at the start; a path that is wrong is better heard of now.
                source.open().map_err(ConfigError::from)?;
                self.config.set_boot_source(source)?;
            }
            Verb::PutDrive(drive) => {
                // Opened and leased at the start; likewise.
                drive
                    .check_image(&self.owner)
                    .map_err(|error| Fault::from_error(&error))?;
                self.config.insert_drive(drive)?;
            }
            Verb::PatchDrive(patch) => self.patch_drive(&patch)?,
            Verb::PutRateLimiterGroup(group) => self.config.insert_group(group)?,
            Verb::PatchRateLimiterGroup(patch) => self.patch_group(&patch)?,
            Verb::PutEntropy(entropy) => self.config.set_entropy(entropy),
            Verb::PutSerial(serial) => self.config.set_serial(serial),
            Verb::PutLogger(logger) => {
                logger::configure(&logger).map_err(|error| Fault::from_error(&error))?;
                self.config.set_logger(logger);
            }
            Verb::PutMetrics(metrics) => {
                let mut config = self.config.clone();
                config.set_metrics(metrics.clone())?;
                self.metrics
                    .write_to(&metrics, &self.id)
                    .map_err(|error| Fault::from_error(&error))?;
                self.config = config;
            }
            Verb::FlushMetrics => self.metrics.write(),
            Verb::Start => self.start()?,
            Verb::SendCtrlAltDel => self.press_ctrl_alt_del()?,
            Verb::Pause => self.pause()?,
            Verb::Resume => self.resume()?,
        }
        Ok(Data::Empty)
    }

    fn phase(&self) -> Phase {
        match self.guest {
            Guest::NotStarted => Phase::NotStarted,
            Guest::Running(_) => Phase::Running,
            Guest::Paused(_) => Phase::Paused,
        }
    }

    /// Opens, builds and starts what was configured; a failure leaves nothing behind, and the
    /// configuration can be mended.
    fn start(&mut self) -> Result<(), Fault> {
        let plan = Plan::new(&self.config, &self.owner).map_err(|error| Fault::from_error(&error))?;
        let machine =
            machine::build(plan, &self.ending, &self.guest_end).map_err(|error| Fault::from_error(&error))?;
        // A machine that cannot run is taken apart again: nobody could start another beside it.
        let machine = machine
            .resume()
            .map_err(|Refused { error, .. }| Fault::from_error(&error))?;
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
        machine.register(&mut self.metrics);
        self.guest = Guest::Running(machine);
        Ok(())
    }

    fn patch_drive(&mut self, patch: &PartialDrive) -> Result<(), Fault> {
        // The configuration is changed last: it says what is, not what was wished.
        let mut config = self.config.clone();
        config.patch_drive(patch)?;
        let drive = config
            .drives()
            .iter()
            .find(|drive| drive.drive_id == patch.drive_id);
        let drive = drive.expect("the patch was taken, so the drive is there");
        let mut size_bytes = patch.size_bytes;
        if let Some(path) = &patch.path_on_host
            && self.has_image(&drive.drive_id, path)
        {
            // The same image again: it may have grown from outside.
            let now_bytes = open::size_bytes(path).map_err(|error| Fault::from_error(&error))?;
            size_bytes = size_bytes.or(Some(now_bytes));
        } else if patch.path_on_host.is_some() {
            if let Some(at) = &drive.lease_at {
                return Err(Fault::bad_request(format!(
                    "drive `{}` keeps the records of its lease at `{at}`, and they are those of the image that it has: \
                     leave path_on_host out",
                    drive.drive_id
                )));
            }
            // Its lease is taken before the old one goes: a failure leaves the old disk serving.
            let mut image = drive
                .open_image(&self.owner)
                .map_err(|error| Fault::from_error(&error))?;
            if let Some(size_bytes) = size_bytes.take() {
                image.backend = blk::grown(image.backend, size_bytes).map_err(|source| {
                    let id = drive.drive_id.clone();
                    Fault::from_error(&DriveChangeError::Control { id, source })
                })?;
            }
            match &mut self.guest {
                Guest::Running(machine) => machine.replace_image(&drive.drive_id, image),
                Guest::Paused(machine) => machine.replace_image(&drive.drive_id, image),
                Guest::NotStarted => return Ok(()),
            }
            .map_err(|error| Fault::from_error(&error))?;
        }
        if let Some(size_bytes) = size_bytes {
            match &mut self.guest {
                Guest::Running(machine) => machine.grow_drive(&drive.drive_id, size_bytes),
                Guest::Paused(machine) => machine.grow_drive(&drive.drive_id, size_bytes),
                Guest::NotStarted => return Ok(()),
            }
            .map_err(|error| Fault::from_error(&error))?;
        }
        if let Some(limits) = patch.rate_limiter {
            match &self.guest {
                Guest::Running(machine) => machine.limit_drive(&drive.drive_id, limits),
                Guest::Paused(machine) => machine.limit_drive(&drive.drive_id, limits),
                Guest::NotStarted => return Ok(()),
            }
            .map_err(|error| Fault::from_error(&error))?;
        }
        self.config = config;
        Ok(())
    }

    fn patch_group(&mut self, patch: &RateLimiterGroup) -> Result<(), Fault> {
        let mut config = self.config.clone();
        config.patch_group(patch)?;
        match &self.guest {
            Guest::Running(machine) => machine.limit_group(&patch.group_id, patch.limits()),
            Guest::Paused(machine) => machine.limit_group(&patch.group_id, patch.limits()),
            Guest::NotStarted => return Ok(()),
        }
        .map_err(|error| Fault::from_error(&error))?;
        self.config = config;
        Ok(())
    }

    /// Whether `path` is the image that drive `id` has: it cannot be leased a second time, and need not be.
    fn has_image(&self, id: &str, path: &str) -> bool {
        match &self.guest {
            Guest::Running(machine) => machine.has_image(id, path),
            Guest::Paused(machine) => machine.has_image(id, path),
            Guest::NotStarted => false,
        }
    }

    fn press_ctrl_alt_del(&self) -> Result<(), Fault> {
        match &self.guest {
            Guest::Running(machine) => machine.press_ctrl_alt_del(),
            Guest::Paused(machine) => machine.press_ctrl_alt_del(),
            Guest::NotStarted => return Ok(()),
        }
        .map_err(|error| Fault::from_error(&error))
    }

    /// Ends the machine, if there is one: the guest is stopped, its devices are drained, its last
    /// output is handed over, its disks are closed. Then the metrics have their last line.
    pub fn retire(mut self) {
        let settled = match self.guest {
            Guest::NotStarted => None,
            Guest::Paused(machine) => Some(Ok(machine)),
            Guest::Running(machine) => Some(machine.pause()),
        };
        // Not before: the guest writes until it stands still.
        if let Some(console) = &self.console {
            console.finish();
        }
        match settled {
            None => {}
            Some(Ok(machine)) => machine.retire(),
            Some(Err(Refused { machine, error })) => {
                let why = Fault::from_error(&error).message;
                log::error!("the machine did not drain at its end: {why}");
                // Taking it apart would wait for the same disk again; it ends with the process.
                std::mem::forget(machine);
            }
        }
        self.metrics.write();
    }

    fn pause(&mut self) -> Result<(), Fault> {
        let (guest, outcome) = match std::mem::take(&mut self.guest) {
            Guest::Running(machine) => timed(&self.latencies.pause_us, || {
                settled(machine.pause(), Guest::Paused, Guest::Running)
            }),
            other => (other, Ok(())),
        };
        self.guest = guest;
        outcome
    }

    fn resume(&mut self) -> Result<(), Fault> {
        let (guest, outcome) = match std::mem::take(&mut self.guest) {
            Guest::Paused(machine) => timed(&self.latencies.resume_us, || {
                settled(machine.resume(), Guest::Running, Guest::Paused)
            }),
            other => (other, Ok(())),
        };
        self.guest = guest;
        outcome
    }
}

/// Where a transition has led, and what to tell the client.
fn settled<P, Q>(
    transition: Result<Machine<Q>, Refused<P>>,
    arrived: impl FnOnce(Machine<Q>) -> Guest,
    stayed: impl FnOnce(Machine<P>) -> Guest,
) -> (Guest, Result<(), Fault>) {
    match transition {
        Ok(machine) => (arrived(machine), Ok(())),
        Err(Refused { machine, error }) => (stayed(machine), Err(Fault::from_error(&error))),
    }
}

fn timed<T>(latency_us: &AtomicU64, transition: impl FnOnce() -> T) -> T {
    let begun = Instant::now();
    let outcome = transition();
    latency_us.store(
        u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX),
        Ordering::Relaxed,
    );
    outcome
}

fn register(latencies: &Arc<Latencies>, metrics: &mut Registry) {
    let latencies = Arc::clone(latencies);
    let report = move |section: &mut Section| {
        section.gauge("pause_vm", latencies.pause_us.load(Ordering::Relaxed));
        section.gauge("resume_vm", latencies.resume_us.load(Ordering::Relaxed));
    };
    metrics.add("latencies_us", Box::new(report));
}

fn errno(error: vmm_sys_util::errno::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}
