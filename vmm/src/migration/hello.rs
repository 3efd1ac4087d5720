//! What a source says of its machine before a byte of memory moves, and what the target says to that.

use coracle_devices::virtio::blk::DriveConfig;
use coracle_devices::virtio::vsock::Listener;
use coracle_storage::copy::{OriginalError, Room};
use coracle_storage::lease::{Incarnation, Offer, Owner, Succession};
use coracle_storage::likeness::Likeness;
use coracle_storage::open;
use serde::{Deserialize, Serialize};

use super::join::Token;
use super::wire::{PROTOCOL_VERSION, PROTOCOL_VERSION_MIN};
use crate::config::{Config, HugePages, MachineConfig, Overrides, STREAMS_MAX};
use crate::kvm::state::CpuidEntryState;
use crate::machine::check_processors;
use crate::machine::disks::Course;
use crate::machine::handover;
use crate::machine::state::MachineState;
use crate::snapshot::contents::ConfigState;
use crate::state::whole;

/// The first message. The version and who wrote it stand first in that of each version, so that it can be refused by name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`PROTOCOL_VERSION`], or that of a source that is older.
    pub version: u32,
    /// The version of the program, for people.
    pub written_by: String,
    /// The machine's name.
    pub vm: String,
    /// What was configured.
    pub config: ConfigState,
    /// The drives that are written and do not go along, the one that decides first.
    pub drives: Vec<DriveOffer>,
    /// Connections that memory comes by, this one among them.
    pub streams: u8,
    /// Whether the guest may be handed over before its memory is there.
    pub postcopy: bool,
    /// What the guest's first processor answers to CPUID; nothing where that is not known.
    pub cpuid: Vec<CpuidEntryState>,
    /// The drives whose images go along.
    pub copies: Vec<CopyOffer>,
    /// The drives that only read, as far as it is known what their images look like.
    pub images: Vec<ImageOffer>,
    /// How much memory the guest has beside what it has booted with, or is to have, in MiB: whichever is more.
    pub hotplug_mib: u64,
}

/// What version 3 said first.
#[derive(Deserialize)]
struct HelloV3 {
    version: u32,
    written_by: String,
    vm: String,
    config: ConfigState,
    drives: Vec<DriveOffer>,
    streams: u8,
    postcopy: bool,
    cpuid: Vec<CpuidEntryState>,
    copies: Vec<CopyOffer>,
    images: Vec<ImageOffer>,
}

impl From<HelloV3> for Hello {
    fn from(hello: HelloV3) -> Self {
        Self {
            version: hello.version,
            written_by: hello.written_by,
            vm: hello.vm,
            config: hello.config,
            drives: hello.drives,
            streams: hello.streams,
            postcopy: hello.postcopy,
            cpuid: hello.cpuid,
            copies: hello.copies,
            images: hello.images,
            hotplug_mib: 0,
        }
    }
}

/// What version 2 said first.
#[derive(Deserialize)]
struct HelloV2 {
    version: u32,
    written_by: String,
    vm: String,
    config: ConfigState,
    drives: Vec<DriveOffer>,
    streams: u8,
    postcopy: bool,
    cpuid: Vec<CpuidEntryState>,
}

impl From<HelloV2> for Hello {
    fn from(hello: HelloV2) -> Self {
        Self {
            version: hello.version,
            written_by: hello.written_by,
            vm: hello.vm,
            config: hello.config,
            drives: hello.drives,
            streams: hello.streams,
            postcopy: hello.postcopy,
            cpuid: hello.cpuid,
            copies: Vec::new(),
            images: Vec::new(),
            hotplug_mib: 0,
        }
    }
}

/// What version 1 said first.
#[derive(Deserialize)]
struct HelloV1 {
    version: u32,
    written_by: String,
    vm: String,
    config: ConfigState,
    drives: Vec<DriveOffer>,
}

impl From<HelloV1> for Hello {
    fn from(hello: HelloV1) -> Self {
        Self {
            version: hello.version,
            written_by: hello.written_by,
            vm: hello.vm,
            config: hello.config,
            drives: hello.drives,
            streams: 1,
            postcopy: false,
            cpuid: Vec::new(),
            copies: Vec::new(),
            images: Vec::new(),
            hotplug_mib: 0,
        }
    }
}

/// Why there is nothing to check.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the text of an error is its documentation")]
pub enum HelloError {
    #[error("what the source says of its machine cannot be read")]
    Unreadable(#[from] postcard::Error),
    #[error(
        "the source, Coracle {written_by}, speaks version {version} of the migration protocol, and this one speaks \
         {PROTOCOL_VERSION_MIN} to {PROTOCOL_VERSION}: use the same version on both hosts"
    )]
    Version { version: u32, written_by: String },
}

/// What a target that will take the machine says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// What further connections of this migration show.
    pub token: Token,
    /// Whether the guest may be handed over before its memory is there.
    pub postcopy: bool,
}

impl Answer {
    /// The body of `ready` for a source that has said `hello`.
    pub fn body(&self, hello: &Hello) -> Vec<u8> {
        match hello.version {
            1 => Vec::new(),
            _ => postcard::to_stdvec(self).expect("plain data can be written"),
        }
    }
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

/// What goes along of one drive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyOffer {
    /// The drive.
    pub id: String,
    /// How long it is.
    pub size_bytes: u64,
    /// How much space its image takes, as far as that is known now.
    pub data_bytes: u64,
}

/// What the image of a drive that only reads looks like.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageOffer {
    /// The drive.
    pub id: String,
    /// How long it is.
    pub size_bytes: u64,
    /// That of [`Likeness`].
    pub fingerprint: u32,
}

impl ImageOffer {
    /// That `drive` has an image that looks so.
    pub fn new(drive: &DriveConfig, likeness: Likeness) -> Self {
        Self {
            id: drive.drive_id.clone(),
            size_bytes: likeness.size_bytes,
            fingerprint: likeness.fingerprint,
        }
    }

    /// What keeps `drive`, which can be opened, from being gone on with by `owner`.
    fn problem(&self, drive: &DriveConfig, owner: &Owner) -> Option<String> {
        let here = match drive.likeness(owner) {
            Ok(likeness) => Self::new(drive, likeness),
            Err(error) => return Some(crate::api::chain(&error)),
        };
        let differs = match (here.size_bytes == self.size_bytes, here == *self) {
            (_, true) => return None,
            (true, false) => "other bytes in some of the places that are compared".to_owned(),
            (false, false) => format!("{} bytes, and not {}", here.size_bytes, self.size_bytes),
        };
        Some(format!(
            "drive `{}` only reads, and the image that it has here is another one than the guest knows, with {differs}: bring \
             the same image to both hosts, or say by `overrides` where it is (`coraclectl receive --disk ID=PATH-OR-URL`)",
            drive.drive_id
        ))
    }
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
    #[error(
        "pmem device `{0}` is a file of this host that the guest has in its address space, and nothing of that moves: have the \
         machine use a drive in its place, or stop it and start it there"
    )]
    Pmem(String),
    #[error("copy_disks names drive `{0}`, which the machine does not have: GET /vm/config lists them")]
    NoDrive(String),
    #[error("copy_disks names drive `{0}` twice")]
    Twice(String),
    #[error("drive `{0}` is on a network, where the other host reaches it too: leave it out of copy_disks")]
    Network(String),
    #[error("drive `{id}` cannot go along")]
    Unreadable {
        id: String,
        #[source]
        source: OriginalError,
    },
}

impl Hello {
    /// What is said of the machine `vm`, whose processors answer `cpuid`, and the drives of `copies` go along.
    ///
    /// # Errors
    ///
    /// Why it cannot be sent.
    pub fn new(
        vm: &str,
        config: &Config,
        offers: Vec<handover::DriveOffer>,
        cpuid: &[CpuidEntryState],
        copies: Vec<CopyOffer>,
    ) -> Result<Self, NotSent> {
        if let Some(pmem) = config.pmem().first() {
            return Err(NotSent::Pmem(pmem.id.clone()));
        }
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
            streams: 1,
            postcopy: false,
            cpuid: cpuid.to_vec(),
            copies,
            images: Vec::new(),
            hotplug_mib: 0,
        })
    }

    /// What of its disks is offered, in words: for whoever finds the journal of a process that is gone.
    pub fn offered(&self) -> String {
        let drives = self.drives.iter();
        let drives = drives.map(|drive| format!("drive `{}` at step {} of its lease", drive.id, drive.epoch));
        let drives: Vec<String> = drives.collect();
        let copies: String = self
            .copies
            .iter()
            .map(|copy| {
                format!(
                    "; drive `{}` goes along as a copy of {} bytes",
                    copy.id, copy.size_bytes
                )
            })
            .collect();
        if drives.is_empty() {
            return format!(
                "no disk of it is written where both sides have it, so no lease decides: a connection that is lost when the \
                 guest is handed over may leave it running nowhere{copies}"
            );
        }
        format!("offered: {}{copies}", drives.join(", "))
    }

    /// What a source of any version that is taken has said.
    ///
    /// # Errors
    ///
    /// [`HelloError`].
    pub fn read(body: &[u8]) -> Result<Self, HelloError> {
        let ((version, written_by), _) = postcard::take_from_bytes(body)?;
        match version {
            1 => Ok(whole::<HelloV1>(body)?.into()),
            2 => Ok(whole::<HelloV2>(body)?.into()),
            3 => Ok(whole::<HelloV3>(body)?.into()),
            PROTOCOL_VERSION => Ok(whole(body)?),
            _ => Err(HelloError::Version { version, written_by }),
        }
    }

    /// How the image of `drive` is taken up: it is taken over if it is offered.
    pub fn course_of(&self, drive: &DriveConfig) -> Course {
        let offered = self.drives.iter().find(|offered| offered.id == drive.drive_id);
        Course::Own(offered.map_or(Succession::Raises, |offered| {
            Succession::TakesOver(offered.offer())
        }))
    }

    /// Everything that keeps the machine from going on here as `owner`, each with what to do about it, and otherwise its
    /// configuration, in which drives are where `overrides` has them. The host can give `available_mib` of memory, if that is
    /// known.
    ///
    /// # Errors
    ///
    /// One line for each.
    pub fn check(
        &self,
        owner: &Owner,
        overrides: &Overrides,
        available_mib: Option<u64>,
    ) -> Result<Config, Vec<String>> {
        let mut config = self
            .config
            .config()
            .map_err(|error| vec![crate::api::chain(&error)])?;
        let mut problems = Vec::new();
        if let Err(errors) = config.override_drives(&overrides.drives) {
            problems.extend(errors.iter().map(|error| format!("`overrides` {error}")));
        }
        if let Err(error) = config.override_networks(&overrides.networks) {
            problems.push(format!("`overrides`: {error}"));
        }
        if let Err(error) = config.override_vsock(overrides.vsock.as_ref()) {
            problems.push(format!("`overrides`: {error}"));
        }
        if let Some(Err(error)) = config.vsock().map(|vsock| Listener::check(&vsock.uds_path)) {
            problems.push(error.to_string());
        }
        if !(1..=STREAMS_MAX).contains(&self.streams) {
            problems.push(format!(
                "its memory is to come by {} streams, and not by 1 to {STREAMS_MAX}",
                self.streams
            ));
        }
        if let Some(pmem) = config.pmem().first() {
            problems.push(NotSent::Pmem(pmem.id.clone()).to_string());
        }
        problems.extend(self.copy_problems(&config, owner));
        for drive in config.drives() {
            if self.copies.iter().any(|copy| copy.id == drive.drive_id) {
                continue;
            }
            let offer = self.drives.iter().find(|offered| offered.id == drive.drive_id);
            let checked = match offer {
                Some(offered) => drive.check_offer(owner, offered.offer()),
                None => drive.check_reach(owner),
            };
            let image = self.images.iter().find(|image| image.id == drive.drive_id);
            match (checked, image) {
                (Err(error), _) => problems.push(crate::api::chain(&error)),
                (Ok(()), Some(image)) if drive.only_reads() => problems.extend(image.problem(drive, owner)),
                (Ok(()), _) => {}
            }
        }
        problems.extend(memory_problem(config.machine(), self.hotplug_mib, available_mib));
        if let Err(error) = check_processors([self.cpuid.as_slice()]) {
            problems.push(crate::api::chain(&error));
        }
        if problems.is_empty() {
            Ok(config)
        } else {
            Err(problems)
        }
    }
}

impl Hello {
    /// Looks again at images of this host that nobody hands over, when nothing else is missing: they may have been moved or taken
    /// since, or be others than those that the guest reads by `state`. Where no lease decides, whoever finds that out after it
    /// was let go has lost the guest.
    ///
    /// # Errors
    ///
    /// What is wrong with one.
    pub fn check_shared(&self, config: &Config, owner: &Owner, state: &MachineState) -> Result<(), String> {
        let is_here = |drive: &&DriveConfig| {
            let is_offered = self.drives.iter().any(|offer| offer.id == drive.drive_id);
            let goes_along = self.copies.iter().any(|copy| copy.id == drive.drive_id);
            let path = drive.path_on_host.as_deref();
            !is_offered && !goes_along && path.is_some_and(|path| !open::is_remote(path))
        };
        for drive in config.drives().iter().filter(is_here) {
            drive
                .check_image(owner)
                .map_err(|error| crate::api::chain(&error))?;
            let path = drive.path_on_host.as_deref().unwrap_or_default();
            let size_bytes = open::size_bytes(path).map_err(|error| crate::api::chain(&error))?;
            let read_bytes = state.drive(&drive.drive_id).map(|saved| saved.size_bytes);
            if let Some(read_bytes) = read_bytes.filter(|read_bytes| *read_bytes != size_bytes) {
                return Err(format!(
                    "drive `{}` reads an image of {read_bytes} bytes, and `{path}` has {size_bytes}: it is another one; name the \
                     right one by `overrides` (`coraclectl receive --disk ID=PATH`)",
                    drive.drive_id
                ));
            }
        }
        Ok(())
    }

    /// What keeps the drives that go along from being made here, where `config` has them.
    fn copy_problems(&self, config: &Config, owner: &Owner) -> Vec<String> {
        let mut room = Room::default();
        let mut problems = Vec::new();
        for (number, copy) in self.copies.iter().enumerate() {
            let named: String = copy.id.chars().take(NAME_CHARS_MAX).collect();
            let is_same = |other: &CopyOffer| other.id == copy.id;
            let is_twice = self.copies.iter().take(number).any(is_same);
            let is_offered = self.drives.iter().any(|drive| drive.id == copy.id);
            let drive = config.drives().iter().find(|drive| drive.drive_id == copy.id);
            let own_file = drive.and_then(|drive| Some((drive, drive.own_file()?)));
            let (Some((drive, path)), false, false) = (own_file, is_twice, is_offered) else {
                problems.push(format!(
                    "the source would have drive {named:?} go along, which is no drive of the machine with a file of its own, or \
                     is said twice"
                ));
                continue;
            };
            if let Err(error) = room.check(path, copy.size_bytes, copy.data_bytes) {
                problems.push(format!("drive {named:?}: {}", crate::api::chain(&error)));
            }
            if let Err(error) = drive.check_ground(owner) {
                problems.push(crate::api::chain(&error));
            }
        }
        problems
    }
}

/// How much of a name is told that somebody else has given.
const NAME_CHARS_MAX: usize = 64;

/// Of memory that may come, what has come or is to come counts. Huge pages are kept apart by the host: it says itself when it has
/// none left.
fn memory_problem(machine: &MachineConfig, hotplug_mib: u64, available_mib: Option<u64>) -> Option<String> {
    let needed_mib = machine.mem_size_mib.saturating_add(hotplug_mib);
    let available_mib = available_mib.filter(|available_mib| *available_mib < needed_mib)?;
    let of_which = match hotplug_mib {
        0 => ",".to_owned(),
        hotplug_mib => format!(", of which {hotplug_mib} MiB have come while it ran or are to come,"),
    };
    let problem = format!(
        "the guest has {needed_mib} MiB of memory{of_which} and this host has {available_mib} MiB left: free some, or send it to \
         another host"
    );
    (machine.huge_pages != HugePages::Hugetlbfs2M).then_some(problem)
}

/// How much memory the host can give without swapping, in MiB, if it says so.
pub fn available_memory_mib() -> Option<u64> {
    available_in(&std::fs::read_to_string("/proc/meminfo").ok()?)
}

/// `MemAvailable` of /proc/meminfo (proc_meminfo(5)).
fn available_in(text: &str) -> Option<u64> {
    let mut lines = text.lines();
    let value = lines.find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = value.trim().strip_suffix("kB")?.trim_end().parse().ok()?;
    Some(kib >> 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_with_too_little_memory_is_told_before_it_is_filled() {
        let machine = MachineConfig {
            mem_size_mib: 512,
            ..MachineConfig::default()
        };
        assert_eq!(memory_problem(&machine, 0, None), None);
        assert_eq!(memory_problem(&machine, 0, Some(512)), None);
        let problem = memory_problem(&machine, 0, Some(511)).unwrap_or_default();
        assert!(
            problem.contains("512 MiB") && problem.contains("511 MiB left"),
            "{problem}"
        );
        assert_eq!(memory_problem(&machine, 256, Some(768)), None);
        let problem = memory_problem(&machine, 256, Some(767)).unwrap_or_default();
        assert!(
            problem.contains("768 MiB") && problem.contains("256 MiB have come"),
            "{problem}"
        );
        assert!(memory_problem(&machine, u64::MAX, Some(1 << 30)).is_some());
        let huge = MachineConfig {
            huge_pages: HugePages::Hugetlbfs2M,
            ..machine
        };
        assert_eq!(memory_problem(&huge, 0, Some(1)), None);
    }

    #[test]
    fn the_kernel_says_what_it_can_give() {
        let text = "MemTotal:       24612345 kB\nMemFree:          123456 kB\nMemAvailable:   10485760 kB\n";
        assert_eq!(available_in(text), Some(10 << 10));
        for text in ["", "MemAvailable: many kB", "MemAvailable: 12"] {
            assert_eq!(available_in(text), None, "{text}");
        }
        assert!(available_memory_mib().is_some());
    }
}
