//! What a source says of its machine before a byte of memory moves, and what the target says to that.

use coracle_devices::virtio::blk::DriveConfig;
use coracle_storage::lease::{Incarnation, Offer, Owner, Succession};
use serde::{Deserialize, Serialize};

use super::wire::PROTOCOL_VERSION;
use crate::config::Config;
use crate::machine::disks::Course;
use crate::machine::handover;
use crate::snapshot::contents::ConfigState;

/// The first message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`PROTOCOL_VERSION`].
    pub version: u32,
    /// The version of the program, for people.
    pub written_by: String,
    /// The machine's name.
    pub vm: String,
    /// What was configured.
    pub config: ConfigState,
    /// The drives that are written, the one that decides first.
    pub drives: Vec<DriveOffer>,
}

/// What is offered of the lease of one drive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DriveOffer {
    /// The drive.
    pub id: String,
    /// The number of the newest step of its lease.
    pub epoch: u64,
    /// Whose that is.
    pub incarnation: [u8; 16],
}

impl DriveOffer {
    /// What the lease is taken over by.
    pub fn offer(&self) -> Offer {
        Offer {
            epoch: self.epoch,
            incarnation: Incarnation::from_bytes(self.incarnation),
        }
    }
}

/// Why a machine cannot be sent at all.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the text of an error is its documentation")]
pub enum NotSent {
    #[error(
        "drive `{0}` has no record of its lease that could decide who writes it: before the machine is started, give it a \
         `lease_at`, or format an iSCSI unit by `coraclectl disk create`, and leave `lock` as it is"
    )]
    Unrecorded(String),
    #[error(
        "drive `{0}` has a temporary overlay, which is this process's own: give it `\"keep\": true` in a shared place"
    )]
    Temporary(String),
}

impl Hello {
    /// What is said of the machine `vm`.
    ///
    /// # Errors
    ///
    /// Why it cannot be sent.
    pub fn new(vm: &str, config: &Config, offers: Vec<handover::DriveOffer>) -> Result<Self, NotSent> {
        let is_temporary = |overlay: &coracle_storage::overlay::OverlayConfig| !overlay.keep;
        for drive in config.drives() {
            if drive.overlay.as_ref().is_some_and(is_temporary) {
                return Err(NotSent::Temporary(drive.drive_id.clone()));
            }
        }
        let drives = offers.into_iter().map(|drive| {
            let offer = drive.offer.ok_or_else(|| NotSent::Unrecorded(drive.id.clone()))?;
            Ok(DriveOffer {
                id: drive.id,
                epoch: offer.epoch,
                incarnation: offer.incarnation.bytes(),
            })
        });
        Ok(Self {
            version: PROTOCOL_VERSION,
            written_by: env!("CARGO_PKG_VERSION").to_owned(),
            vm: vm.to_owned(),
            config: ConfigState::from(config),
            drives: drives.collect::<Result<_, _>>()?,
        })
    }

    /// How the image of `drive` is taken up: it is taken over if it is offered.
    pub fn course_of(&self, drive: &DriveConfig) -> Course {
        let offered = self.drives.iter().find(|offered| offered.id == drive.drive_id);
        Course::Own(offered.map_or(Succession::Raises, |offered| {
            Succession::TakesOver(offered.offer())
        }))
    }

    /// Everything that keeps the machine from going on here as `owner`, each with what to do about it, and otherwise its
    /// configuration.
    ///
    /// # Errors
    ///
    /// One line for each.
    pub fn check(&self, owner: &Owner) -> Result<Config, Vec<String>> {
        if self.version != PROTOCOL_VERSION {
            return Err(vec![format!(
                "the source, Coracle {}, speaks version {} of the migration protocol, and this one speaks {PROTOCOL_VERSION}: \
                 use the same version on both hosts",
                self.written_by, self.version
            )]);
        }
        let config = self
            .config
            .config()
            .map_err(|error| vec![crate::api::chain(&error)])?;
        let mut problems = Vec::new();
        for drive in config.drives() {
            let offer = self.drives.iter().find(|offered| offered.id == drive.drive_id);
            let checked = match offer {
                Some(offered) => drive.check_offer(owner, offered.offer()),
                None => drive.check_image(owner),
            };
            if let Err(error) = checked {
                problems.push(crate::api::chain(&error));
            }
        }
        if problems.is_empty() {
            Ok(config)
        } else {
            Err(problems)
        }
    }
}
