//! Drives and network interfaces: what is configured before the start, comes while the guest runs, and goes again.

use coracle_devices::virtio::blk::DriveConfig;
use coracle_devices::virtio::net::{NetworkInterfaceConfig, Tap};

use super::opening::Opening;
use super::operation::{Course, Reaction, Work};
use super::{Guest, Monitor};
use crate::api::{Data, Fault};
use crate::config::{Config, ConfigError, NetworkError};
use crate::event_loop::Source;
use crate::machine::{Machine, Newcomer, PlugError, Plugged, Running};

/// A device that is being opened, and the configuration once it is there.
pub(super) struct Plugging {
    opening: Opening<Result<Newcomer, PlugError>>,
    config: Config,
    id: String,
}

impl Monitor {
    /// Takes a drive into the configuration, or begins to plug it into a guest that runs.
    pub(super) fn put_drive(&mut self, drive: DriveConfig) -> Result<Reaction, Fault> {
        let Guest::Running(machine) = &self.guest else {
            // Opened and leased at the start; a path that is wrong is better heard of now.
            drive
                .check_image(&self.owner)
                .map_err(|error| Fault::from_error(&error))?;
            self.config.insert_drive(drive)?;
            return Ok(Reaction::Done(Data::Empty));
        };
        let id = drive.drive_id.clone();
        let mut config = self.config.clone();
        config.plug_drive(drive)?;
        let drive = config.drives().iter().find(|drive| drive.drive_id == id);
        let drive = drive.expect("it was added just now").clone();
        let (owner, groups) = (self.owner.clone(), machine.limit_groups());
        let open = move || Newcomer::drive(&drive, &owner, &groups);
        self.begin_to_plug(machine, config, id, open)
    }

    /// The same for a network interface.
    pub(super) fn put_network(&mut self, network: NetworkInterfaceConfig) -> Result<Reaction, Fault> {
        let Guest::Running(machine) = &self.guest else {
            // Opened again at the start, like a kernel.
            Tap::open(&network.host_dev_name)
                .map_err(|error| ConfigError::from(NetworkError::from(error)))?;
            self.config.insert_network(network)?;
            return Ok(Reaction::Done(Data::Empty));
        };
        let id = network.iface_id.clone();
        let mut config = self.config.clone();
        config.plug_network(network.clone())?;
        let open = move || Newcomer::network(&network);
        self.begin_to_plug(machine, config, id, open)
    }

    fn begin_to_plug(
        &self,
        machine: &Machine<Running>,
        config: Config,
        id: String,
        open: impl FnOnce() -> Result<Newcomer, PlugError> + Send + 'static,
    ) -> Result<Reaction, Fault> {
        // Before anything is opened: a lease that is taken for nothing bothers others.
        machine
            .check_vacancy()
            .map_err(|error| Fault::from_error(&error))?;
        let opening = Opening::begin("open", &self.wakeup.notice(), open);
        let opening = opening.map_err(|error| Fault::from_error(&error))?;
        Ok(Reaction::Begun(Work::Plug(Box::new(Plugging {
            opening,
            config,
            id,
        }))))
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
        if let Err(error) = machine.plug(newcomer) {
            return Course::Over(Err(Fault::from_error(&error)));
        }
        machine.register_last(kind, &mut self.metrics);
        let Plugging { config, id, .. } = *plugging;
        if let Some(loss) = loss {
            self.losses.insert(id, self.event_loop.watch(Source::Loss(loss)));
        }
        self.config = config;
        Course::Over(Ok(()))
    }

    /// Begins to take a device out of a guest that runs.
    pub(super) fn unplug(&mut self, kind: Plugged, id: &str) -> Result<Reaction, Fault> {
        let Guest::Running(machine) = &mut self.guest else {
            unreachable!("nothing goes but while the guest runs");
        };
        let mut config = self.config.clone();
        match kind {
            Plugged::Drive => config.unplug_drive(id)?,
            Plugged::Network => config.unplug_network(id)?,
        }
        let departed = machine.unplug(kind, id);
        let departed = departed.map_err(|error| Fault::from_error(&error))?;
        self.metrics.remove_device(kind.section(), id);
        if kind == Plugged::Drive
            && let Some(watch) = self.losses.remove(id)
        {
            self.event_loop.unwatch(watch);
        }
        self.config = config;
        // Its server may take its time; without a thread it is closed here.
        let closing = Opening::begin("close", &self.wakeup.notice(), move || drop(departed));
        Ok(match closing {
            Ok(closing) => Reaction::Begun(Work::Unplug(closing)),
            Err(_) => Reaction::Done(Data::Empty),
        })
    }
}
