//! Drives and network interfaces: what is configured before the start, comes while the guest runs, and goes again.

use std::time::Duration;

use coracle_devices::virtio::blk::DriveConfig;
use coracle_devices::virtio::net::{NetworkInterfaceConfig, Tap};

use super::opening::Opening;
use super::operation::{Course, Operation, Reaction, Work};
use super::{Guest, Monitor};
use crate::api::verbs::Underway;
use crate::api::{Data, Fault};
use crate::config::{Config, ConfigError, NetworkError};
use crate::event_loop::Source;
use crate::machine::{Machine, Newcomer, PlugError, Plugged, Running, Socket};

/// A device that is being opened, and the configuration once it is there.
pub(super) struct Plugging {
    opening: Opening<Result<Newcomer, PlugError>>,
    config: Config,
    id: String,
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
        self.begin_to_plug(config, id, move || {
            Newcomer::drive(&drive, &owner, &groups, socket)
        })
    }

    /// The same for a network interface.
    pub(super) fn put_network(&mut self, network: NetworkInterfaceConfig) -> Result<Reaction, Fault> {
        if matches!(self.guest, Guest::NotStarted) {
            // Opened again at the start, like a kernel.
            Tap::open(&network.host_dev_name)
                .map_err(|error| ConfigError::from(NetworkError::from(error)))?;
            self.config.insert_network(network)?;
            return Ok(Reaction::Done(Data::Empty));
        }
        let id = network.iface_id.clone();
        let mut config = self.config.clone();
        config.plug_network(network.clone())?;
        let socket = socket(self.running()?)?;
        self.begin_to_plug(config, id, move || Newcomer::network(&network, socket))
    }

    /// Opens nothing before there is a place: a lease that is taken for nothing bothers others.
    fn begin_to_plug(
        &self,
        config: Config,
        id: String,
        open: impl FnOnce() -> Result<Newcomer, PlugError> + Send + 'static,
    ) -> Result<Reaction, Fault> {
        let opening = Opening::begin("open", &self.wakeup.notice(), open);
        let opening = opening.map_err(|error| Fault::from_error(&error))?;
        Ok(Reaction::Begun(Work::Plug(Box::new(Plugging {
            opening,
            config,
            id,
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
        let Plugging { config, id, .. } = *plugging;
        if let Some(loss) = loss {
            self.losses.insert(id, self.event_loop.watch(Source::Loss(loss)));
        }
        self.config = config;
        self.wakeup.remind();
        Course::Over(Ok(()))
    }

    /// Tells a guest again of devices of which it has not heard: one that boots does not listen yet, and forgets.
    pub(super) fn tell_again(&mut self) {
        if let Guest::Running(machine) = &self.guest
            && machine.tell_again()
        {
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
        let departed = self.running()?.unplug(kind, id);
        let departed = departed.map_err(|error| Fault::from_error(&error))?;
        self.metrics.remove_device(kind.section(), id);
        if kind == Plugged::Drive
            && let Some(watch) = self.losses.remove(id)
        {
            self.event_loop.unwatch(watch);
        }
        self.config = config;
        // Its server may take its time, and KVM waits for vCPUs; without a thread it is closed here.
        let closing = Opening::begin("close", &self.wakeup.notice(), move || drop(departed));
        Ok(match closing {
            Ok(closing) => Reaction::Begun(Work::Unplug(closing)),
            Err(_) => Reaction::Done(Data::Empty),
        })
    }

    /// What was begun to be closed is closed, or nobody waits for it any longer: an end in order gives a lease back.
    pub(super) fn finish_closing(&mut self) {
        if let Some(Operation {
            work: Work::Unplug(closing),
            ..
        }) = &self.operation
            && closing.wait(CLOSE_MAX).is_none()
        {
            log::error!("what was behind a device that has gone is not closed at the end");
        }
    }
}

/// A device that was let go of is drained in less, or left behind.
const CLOSE_MAX: Duration = Duration::from_secs(15);

fn socket(machine: &Machine<Running>) -> Result<Socket, Fault> {
    machine.socket().map_err(|error| Fault::from_error(&error))
}
