//! What is said of a machine before it is sent.

use coracle_devices::virtio::blk::DriveConfig;
use coracle_storage::copy::OriginalError;

use super::fault;
use crate::api::Fault;
use crate::config::{Config, MigrationSend};
use crate::machine::{Machine, Running};
use crate::migration::disks::Copied;
use crate::migration::hello::{CopyOffer, Hello, NotSent};
use crate::monitor::Monitor;

impl Monitor {
    /// What is said of the machine first, and the drives that go along.
    pub(super) fn hello(
        &self,
        machine: &Machine<Running>,
        asked: &MigrationSend,
    ) -> Result<(Hello, Vec<Copied>), Fault> {
        let copied = &asked.copy_disks;
        let copies = copies(&self.config, machine, copied).map_err(|error| fault(&error))?;
        let offers = copies.iter().map(offer_of).collect::<Result<_, _>>();
        let hello = Hello::new(
            &self.id,
            &self.config,
            machine.offers(copied),
            machine.cpuid(),
            offers.map_err(|error| fault(&error))?,
        );
        let hotplug = machine.memory_hotplug().zip(self.config.memory_hotplug());
        let hotplug = hotplug.map(|(control, config)| control.status(config));
        let hello = Hello {
            hotplug_mib: hotplug.map_or(0, |has| has.plugged_size_mib.max(has.requested_size_mib)),
            streams: asked.streams,
            postcopy: asked.allow_postcopy,
            ..hello.map_err(|error| fault(&error))?
        };
        Ok((hello, copies))
    }

    /// The drives that only read, and do not go along: what their images look like is told, so that the guest does not go on with
    /// others.
    pub(super) fn read_images(&mut self, copied: &[String]) -> Vec<DriveConfig> {
        let Some(drives) = self.guest.drives() else {
            return Vec::new();
        };
        let read = self.config.drives().iter();
        let read = read.filter(|drive| drive.only_reads() && !copied.contains(&drive.drive_id));
        // Another image that has its name by now would be compared with the wrong one.
        let (named, nameless): (Vec<_>, Vec<_>) = read.partition(|drive| {
            let path = drive.path_on_host.as_deref().unwrap_or_default();
            drives.has_image(&drive.drive_id, path)
        });
        for drive in nameless {
            log::warn!(
                "migration: the image of drive `{}` has no name any more, so it is not known whether the target has the same",
                drive.drive_id
            );
        }
        named.into_iter().cloned().collect()
    }
}

/// The drives that go along, of those that `config` says `machine` has.
fn copies(config: &Config, machine: &Machine<Running>, ids: &[String]) -> Result<Vec<Copied>, NotSent> {
    let copied = ids.iter().enumerate().map(|(number, id)| {
        if ids.iter().take(number).any(|other| other == id) {
            return Err(NotSent::Twice(id.clone()));
        }
        let drive = config.drives().iter().find(|drive| drive.drive_id == *id);
        let path = match drive {
            None => return Err(NotSent::NoDrive(id.clone())),
            Some(drive) if drive.overlay.as_ref().is_some_and(|overlay| !overlay.keep) => {
                return Err(NotSent::Temporary(id.clone()));
            }
            Some(drive) => drive.own_file().unwrap_or_default(),
        };
        if coracle_storage::open::is_remote(path) {
            return Err(NotSent::Network(id.clone()));
        }
        let copied = machine
            .copied(id, path)
            .ok_or_else(|| NotSent::NoDrive(id.clone()))?;
        copied.map_err(|source| unreadable(id, source))
    });
    copied.collect()
}

/// What is said of one of them before anything of it moves.
fn offer_of(copied: &Copied) -> Result<CopyOffer, NotSent> {
    let data_bytes = copied.original.data_bytes();
    Ok(CopyOffer {
        id: copied.id.clone(),
        size_bytes: copied.original.size_bytes(),
        data_bytes: data_bytes.map_err(|source| unreadable(&copied.id, source))?,
    })
}

fn unreadable(id: &str, source: OriginalError) -> NotSent {
    let id = id.to_owned();
    NotSent::Unreadable { id, source }
}
