//! Drives and network interfaces: what is configured before the start, comes while the guest runs, and goes again.

use std::sync::mpsc::channel;
use std::time::Duration;

use coracle_devices::virtio::blk::DriveConfig;
use coracle_devices::virtio::device::Notice;
use coracle_devices::virtio::net::{NetworkInterfaceConfig, Tap};

use super::opening::Opening;
use super::operation::{Course, Reaction, Work};
use super::{Guest, Monitor};
use crate::api::verbs::Underway;
use crate::api::{Data, Fault};
use crate::config::{Config, ConfigError, NetworkError};
use crate::machine::{Machine, Newcomer, PlugError, Plugged, Running, Socket};

/// A device that is being opened, and the configuration once it is there.
pub(super) struct Plugging {
    opening: Opening<Result<Newcomer, PlugError>>,
    config: Config,
}

impl Monitor {
    /// Takes a drive into the configuration, or begins to plug it into a guest that runs.
    pub(super) fn put_drive(&mut self, drive: DriveConfig) -> Result<Reaction, Fault> {
        if matches!(self.guest, Guest::NotStarted) {
            // Opened and leased at the start; a path that is wrong is better heard of now.
            drive
                .check_image(&self.owner)
                .map_err(|error| Fault::from_error(&error))?;
            self.config.insert_drive(drive)?;
            return Ok(Reaction::Done(Data::Empty));
        }
        let id = drive.drive_id.clone();
        let mut config = self.config.clone();
        config.plug_drive(drive)?;
        let drive = config.drives().iter().find(|drive| drive.drive_id == id);
        let drive = drive.expect("it was added just now").clone();
        let (owner, machine) = (self.owner.clone(), self.running()?);
        let (groups, socket) = (machine.limit_groups(), socket(machine)?);
        self.begin_to_plug(config, move || Newcomer::drive(&drive, &owner, &groups, socket))
    }

    /// The same for a network interface.
    pub(super) fn put_network(&mut self, network: NetworkInterfaceConfig) -> Result<Reaction, Fault> {
        if matches!(self.guest, Guest::NotStarted) {
            let mut config = self.config.clone();
            config.insert_network(network.clone())?;
            // Opened again at the start, like a kernel.
            Tap::open(&network.host_dev_name, network.pairs())
                .map_err(|error| ConfigError::from(NetworkError::from(error)))?;
            self.config = config;
            return Ok(Reaction::Done(Data::Empty));
        }
        let mut config = self.config.clone();
        config.plug_network(network.clone())?;
        let socket = socket(self.running()?)?;
        self.begin_to_plug(config, move || Newcomer::network(&network, socket))
    }

    /// Opens nothing before there is a place: a lease that is taken for nothing bothers others.
    fn begin_to_plug(
        &self,
        config: Config,
        open: impl FnOnce() -> Result<Newcomer, PlugError> + Send + 'static,
    ) -> Result<Reaction, Fault> {
        let opening = Opening::begin("open", &self.wakeup.notice(), open);
        let opening = opening.map_err(|error| Fault::from_error(&error))?;
        Ok(Reaction::Begun(Work::Plug(Box::new(Plugging {
            opening,
            config,
        }))))
    }

    fn running(&mut self) -> Result<&mut Machine<Running>, Fault> {
        match &mut self.guest {
            Guest::Running(machine) => Ok(machine),
            _ => Err(Underway::Pause.fault()),
        }
    }

    pub(super) fn go_on_plugging(&mut self, plugging: Box<Plugging>) -> Course {
        let newcomer = match plugging.opening.poll() {
            None => return Course::Pending(Work::Plug(plugging), None),
            Some(Ok(newcomer)) => newcomer,
            Some(Err(error)) => return Course::Over(Err(Fault::from_error(&error))),
        };
        let Guest::Running(machine) = &mut self.guest else {
            unreachable!("a machine does not change its phase while a device comes");
        };
        let (kind, loss) = (newcomer.kind(), newcomer.loss_signal());
        machine.plug(newcomer);
        machine.register_last(kind, &mut self.metrics);
        if let Some(loss) = loss {
            self.watch_loss(loss);
        }
        self.config = plugging.config;
        self.times_told = 0;
        self.wakeup.remind();
        Course::Over(Ok(()))
    }

    /// Tells a guest again of devices of which it has not heard: one that boots does not listen yet, and forgets.
    pub(super) fn tell_again(&mut self) {
        let is_due = match &self.guest {
            Guest::Running(machine) => {
                let is_unheard = machine.tell_again();
                self.times_told = if is_unheard {
                    self.times_told.saturating_add(1)
                } else {
                    0
                };
                if self.times_told == TOLD_MAX {
                    log::warn!(
                        "the guest has not looked at a device that has come: it boots, or was booted without ACPI (`acpi=off`)"
                    );
                }
                is_unheard
            }
            Guest::Pausing(_) | Guest::Paused(_) => true,
            Guest::NotStarted | Guest::Stranded(_) | Guest::Yielded(_) => false,
        };
        if is_due {
            self.wakeup.remind();
        }
    }

    /// Begins to take a device out of a guest that runs.
    pub(super) fn unplug(&mut self, kind: Plugged, id: &str) -> Result<Reaction, Fault> {
        let mut config = self.config.clone();
        match kind {
            Plugged::Drive => config.unplug_drive(id)?,
            Plugged::Network => config.unplug_network(id)?,
        }
        // Its server may take its time, and KVM waits for vCPUs: without a thread for that nothing is begun.
        let (give, given) = channel();
        let closing = Opening::begin("close", &self.wakeup.notice(), move || drop(given.recv()));
        let closing = closing.map_err(|error| Fault::from_error(&error))?;
        let departed = self.running()?.unplug(kind, id);
        let departed = departed.map_err(|error| Fault::from_error(&error))?;
        give.send(departed).expect("it waits for that");
        self.metrics.remove_device(kind.section(), id);
        if kind == Plugged::Drive
            && let Some(watch) = self.losses.remove(id)
        {
            self.event_loop.unwatch(watch);
        }
        self.config = config;
        Ok(Reaction::Begun(Work::Unplug(closing)))
    }
}

/// Ends what a device that was to come or to go has left, once the guest does not run any more: an end in order gives leases
/// back. Another thread does, as this one may not disconnect a device.
pub(super) fn finish(work: Work, notice: &Notice) {
    let closing = match work {
        Work::Unplug(closing) => Ok(closing),
        Work::Plug(plugging) => Opening::begin("close", notice, move || {
            drop(plugging.opening.wait(FINISH_MAX));
        }),
        _ => return,
    };
    match closing.map(|closing| closing.wait(FINISH_MAX)) {
        Ok(Some(())) => {}
        Ok(None) => log::error!("what is behind a device that comes or goes is not closed in time"),
        Err(error) => log::error!("what is behind a device that was to come is not closed in order: {error}"),
    }
}

/// So often a guest is told before the log says that it does not listen.
const TOLD_MAX: u32 = 10;
/// How long the end of the process waits for what is being closed.
const FINISH_MAX: Duration = Duration::from_secs(15);

fn socket(machine: &Machine<Running>) -> Result<Socket, Fault> {
    machine.socket().map_err(|error| Fault::from_error(&error))
}
