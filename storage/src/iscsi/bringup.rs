//! The beginning of each session: who the target is, what the unit is, and whose it is.

use std::sync::Arc;
use std::time::Duration;

use crate::backend::Access;
use crate::lease::Lock;
use crate::remote::dialogue;
use crate::request::{Durability, Failure};

use super::error::IscsiError;
use super::login::{Login, LoginError, LoginFailure, Negotiated, Progress};
use super::plan::Plan;
use super::portal::{Host, Portal};
use super::procedure::{Data, Port};
use super::reservation::{self, Tenure};
use super::scsi::capacity::{CAPACITY_BYTES, Capacity};
use super::scsi::cdb::{self, Cdb, ModePage, VpdPage};
use super::scsi::designator::Designator;
use super::scsi::inquiry::{Inquiry, Qualifier};
use super::scsi::luns::{Lun, LunList};
use super::scsi::mode::Mode;
use super::scsi::parameter::ParameterError;
use super::scsi::sense::{Verdict, verdict};
use super::scsi::vpd::{BlockLimits, Provisioning, SupportedPages};
use super::tail::{Header, Tail};
use super::unit::{Cache, Fua, Limits, Unit, UnitMode};

/// What earlier sessions have left behind.
#[derive(Clone, Debug, Default)]
pub(super) struct Past {
    /// The unit as it was.
    pub(super) unit: Option<Unit>,
    /// The lease as it was.
    pub(super) tenure: Option<Tenure>,
    /// Changes that the last connection may still deliver.
    pub(super) strays: bool,
}

/// A session that can be used.
#[derive(Debug)]
pub(super) struct Up {
    pub(super) unit: Unit,
    pub(super) tenure: Option<Tenure>,
}

/// Why there is none.
pub(super) type Stop = dialogue::Stop<IscsiError>;

/// Why a command did not succeed.
#[derive(Debug)]
pub(super) enum Refused {
    /// Another has the reservation, which keeps us from this command.
    Conflict(&'static str),
    /// Anything else.
    Stop(Stop),
}

/// How often a unit may have something to say before it does what it was asked.
const ATTENTIONS_MAX: u32 = 32;
/// How long a unit may be busy: a target that has just been started makes its units ready one after the other.
const BUSY_WAIT: Duration = Duration::from_millis(100);
const BUSY_WAITS_MAX: u32 = 50;
/// The data of commands that describe a unit.
const INQUIRY_BYTES: u16 = 96;
const PAGE_BYTES: u16 = 1024;
const MODE_BYTES: u8 = 252;
const LUNS_BYTES: u16 = 8 + 8 * 64;

/// Logs in, looks at the unit and takes its lease.
pub(super) async fn bring_up(port: Port, plan: Arc<Plan>, past: Past) -> Result<Up, Stop> {
    enter(&port, &plan).await?;
    let mut unit = identify(&port, &plan).await?;
    if let Some(before) = &past.unit {
        check_same(before, &unit)?;
    }
    check_access(&plan, &unit)?;
    let tenure = match (plan.lock, &past.tenure) {
        (Lock::Exclusive, Some(tenure)) => Some(reservation::reclaim(&port, &plan, &unit, tenure).await?),
        (Lock::Exclusive, None) => Some(reservation::claim(&port, &plan, &unit).await?),
        (Lock::Shared, _) => {
            reservation::check_unwritten(&port, &plan, &unit).await?;
            None
        }
        (Lock::None, _) => None,
    };
    if tenure.is_some() && unit.mode.is_none() {
        // The reservation was that of our own last session.
        unit.mode = mode(&port).await?;
        check_access(&plan, &unit)?;
    }
    if past.strays {
        // The old session can write no more, if its key was preempted; what it had been asked to write before may
        // still be on its way to the medium.
        reservation::reset(&port).await?;
    }
    Ok(Up { unit, tenure })
}

/// Logs in.
pub(super) async fn enter(port: &Port, plan: &Plan) -> Result<(), Stop> {
    let terms = log_in(port, plan).await?;
    port.enter_full_feature(terms).await;
    Ok(())
}

async fn log_in(port: &Port, plan: &Plan) -> Result<Negotiated, Stop> {
    let failed = |error: LoginError| match error.failure() {
        LoginFailure::Passing => Stop::Later(error.into()),
        LoginFailure::Absent | LoginFailure::Lasting => Stop::Never(error.into()),
    };
    let mut login = Login::new(&plan.login, random());
    loop {
        let (request, text) = login.request();
        let (response, text) = port.login(request, text).await;
        match login.response(&response, &text).map_err(failed)? {
            Progress::Continue => {}
            Progress::Done(terms) => return Ok(terms),
            Progress::Redirected(to) => return Err(elsewhere(&to.portal)),
        }
    }
}

/// The next connection goes to `portal`. Names are resolved when an image is opened, and not by its I/O thread.
fn elsewhere(portal: &Portal) -> Stop {
    match &portal.host {
        Host::V4(address) => Stop::Elsewhere((*address, portal.port).into()),
        Host::V6(address) => Stop::Elsewhere((*address, portal.port).into()),
        Host::Name(_) => Stop::Never(IscsiError::NamedElsewhere {
            portal: portal.to_string(),
        }),
    }
}

/// Bytes for a challenge.
fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    crate::lease::fill_random(&mut bytes);
    bytes
}

/// Asks the unit what it is, and looks for the reserved tail.
pub(super) async fn identify(port: &Port, plan: &Plan) -> Result<Unit, Stop> {
    let mut unit = identify_without_tail(port, plan).await?;
    unit.tail = read_tail(port, &unit).await?;
    if let Some(tail) = &unit.tail {
        unit.size_bytes = tail.guest_bytes();
    }
    Ok(unit)
}

/// The same of the unit alone.
pub(super) async fn identify_without_tail(port: &Port, plan: &Plan) -> Result<Unit, Stop> {
    let lun = plan.lun.number().unwrap_or(u16::MAX);
    let told = run(port, cdb::inquiry(INQUIRY_BYTES), Data::In(INQUIRY_BYTES.into())).await;
    let told = match told {
        Err(Stop::Later(IscsiError::NoUnit { .. })) => return Err(no_unit(port, lun).await),
        told => told?,
    };
    let inquiry = Inquiry::parse(&told).map_err(|source| Stop::data("INQUIRY", source))?;
    if inquiry.qualifier != Qualifier::Connected {
        return Err(no_unit(port, lun).await);
    }
    if !inquiry.is_disk() {
        let what = inquiry.device_type.to_string();
        return Err(Stop::Never(IscsiError::NotADisk { lun, what }));
    }
    run(port, cdb::test_unit_ready(), Data::None).await?;
    let pages = Pages::of(port).await?;
    let cdb = cdb::read_capacity(CAPACITY_BYTES);
    let capacity = run(port, cdb, Data::In(CAPACITY_BYTES as usize)).await?;
    let capacity = Capacity::parse(&capacity).map_err(|source| Stop::data("READ CAPACITY(16)", source))?;
    let unit = Unit {
        block_bytes: capacity.block_bytes,
        physical_block_bytes: capacity.physical_block_bytes,
        capacity_bytes: capacity.size_bytes,
        size_bytes: capacity.size_bytes,
        mode: mode(port).await?,
        limits: pages.limits(&capacity),
        identity: pages.identity,
        tail: None,
    };
    if unit.size_bytes < u64::from(unit.block_bytes) {
        return Err(Stop::Never(IscsiError::TooSmall {
            size_bytes: unit.size_bytes,
        }));
    }
    Ok(unit)
}

/// The vital product data.
struct Pages {
    identity: Option<Designator>,
    limits: Option<BlockLimits>,
    provisioning: Option<Provisioning>,
}

impl Pages {
    async fn of(port: &Port) -> Result<Self, Stop> {
        let supported = match page(port, VpdPage::Supported).await? {
            Some(bytes) => {
                Some(SupportedPages::parse(&bytes).map_err(|source| Stop::data("INQUIRY", source))?)
            }
            None => None,
        };
        let has = |page| supported.as_ref().is_some_and(|supported| supported.has(page));
        let failed = |source| Stop::data("INQUIRY", source);
        let mut pages = Self {
            identity: None,
            limits: None,
            provisioning: None,
        };
        if has(VpdPage::DeviceIdentification)
            && let Some(bytes) = page(port, VpdPage::DeviceIdentification).await?
        {
            pages.identity = Designator::best(&bytes).map_err(failed)?;
        }
        if has(VpdPage::BlockLimits)
            && let Some(bytes) = page(port, VpdPage::BlockLimits).await?
        {
            pages.limits = Some(BlockLimits::parse(&bytes).map_err(failed)?);
        }
        if has(VpdPage::Provisioning)
            && let Some(bytes) = page(port, VpdPage::Provisioning).await?
        {
            pages.provisioning = Some(Provisioning::parse(&bytes).map_err(failed)?);
        }
        Ok(pages)
    }

    fn limits(&self, capacity: &Capacity) -> Limits {
        let transfer_max = Limits::TRANSFER_BYTES_MAX / capacity.block_bytes;
        let told = self.limits.as_ref().and_then(|limits| limits.transfer_blocks_max);
        let unmaps = capacity.is_provisioned && self.provisioning.as_ref().is_none_or(|how| how.unmap);
        let unmap_max = self
            .limits
            .as_ref()
            .map_or(0, |limits| match limits.unmap_descriptors_max {
                0 => 0,
                _ => limits.unmap_blocks_max,
            });
        let write_same_max = self
            .limits
            .as_ref()
            .and_then(|limits| limits.write_same_blocks_max);
        Limits {
            transfer_blocks: told.map_or(transfer_max, |told| told.min(transfer_max)).max(1),
            unmap_blocks: if unmaps { unmap_max } else { 0 },
            write_same_blocks: u32::try_from(write_same_max.unwrap_or(u64::from(WRITE_SAME_BLOCKS)))
                .unwrap_or(WRITE_SAME_BLOCKS)
                .min(WRITE_SAME_BLOCKS),
            write_same_unmaps: capacity.reads_zeros
                && self.provisioning.as_ref().is_some_and(|how| how.write_same),
        }
    }
}

/// What one WRITE SAME does where the unit sets no limit: a second's work of a slow disk.
const WRITE_SAME_BLOCKS: u32 = 1 << 17;

/// A page of the vital product data, unless the unit has none of that kind.
async fn page(port: &Port, page: VpdPage) -> Result<Option<Vec<u8>>, Stop> {
    let cdb = cdb::inquiry_vpd(page, PAGE_BYTES);
    match attempt(port, cdb, Data::In(PAGE_BYTES.into())).await {
        Ok(bytes) => Ok(Some(bytes)),
        Err(refused) => refused.unless_unsupported(),
    }
}

/// What the mode pages say; `None` if another session has the unit reserved (SPC-4, table 66).
async fn mode(port: &Port) -> Result<Option<UnitMode>, Stop> {
    for page in [ModePage::Caching, ModePage::All] {
        let cdb = cdb::mode_sense_6(page, MODE_BYTES);
        let told = match attempt(port, cdb, Data::In(MODE_BYTES.into())).await {
            Ok(bytes) => Some(bytes),
            Err(Refused::Conflict(_)) => return Ok(None),
            Err(refused) => refused.unless_unsupported()?,
        };
        if let Some(bytes) = told {
            let mode = Mode::parse_6(&bytes).map_err(|source| Stop::data("MODE SENSE", source))?;
            return Ok(Some(UnitMode::from(mode)));
        }
    }
    // A unit that says nothing of itself.
    Ok(Some(UnitMode {
        is_write_protected: false,
        cache: Cache::Volatile(Fua::Missing),
    }))
}

impl From<Mode> for UnitMode {
    fn from(mode: Mode) -> Self {
        Self {
            is_write_protected: mode.is_write_protected,
            cache: match mode.caching {
                Some(caching) if !caching.write_cache => Cache::None,
                _ if mode.takes_fua => Cache::Volatile(Fua::Supported),
                _ => Cache::Volatile(Fua::Missing),
            },
        }
    }
}

async fn no_unit(port: &Port, lun: u16) -> Stop {
    let cdb = cdb::report_luns(LUNS_BYTES.into());
    let told = run(port, cdb, Data::In(LUNS_BYTES.into())).await;
    let list = told.ok().and_then(|bytes| LunList::parse(&bytes).ok());
    let luns = list.map(|list| list.luns.into_iter().filter_map(Lun::number).collect());
    Stop::Never(IscsiError::NoUnit {
        lun,
        luns: luns.unwrap_or_default(),
    })
}

/// Where lease records are kept on the unit, if it was formatted for that.
async fn read_tail(port: &Port, unit: &Unit) -> Result<Option<Tail>, Stop> {
    let Some(layout) = Tail::layout(unit.capacity_bytes, unit.block_bytes) else {
        return Ok(None);
    };
    let range = layout.header();
    let len = range.end - range.start;
    let cdb = cdb::read(unit.blocks(range.start, len), Durability::Cached);
    let bytes = run(
        port,
        cdb,
        Data::In(usize::try_from(len).expect("a header is short")),
    )
    .await?;
    let identity = unit
        .identity
        .as_ref()
        .map(Designator::identity)
        .unwrap_or_default();
    match Header::of_unit(layout, &identity, &bytes) {
        Ok(header) => Ok(header.map(|header| header.tail())),
        Err(source) => Err(Stop::Never(IscsiError::Tail(source))),
    }
}

/// Whether a unit is the one that it was.
fn check_same(before: &Unit, now: &Unit) -> Result<(), Stop> {
    let named = |unit: &Unit| {
        unit.identity
            .as_ref()
            .map_or("nothing".to_owned(), ToString::to_string)
    };
    if before.identity != now.identity {
        return Err(Stop::Later(IscsiError::OtherUnit {
            before: named(before),
            now: named(now),
        }));
    }
    if before.tail.is_some() && before.tail != now.tail {
        return Err(Stop::Later(IscsiError::OtherTail));
    }
    if now.size_bytes < before.size_bytes || now.block_bytes != before.block_bytes {
        return Err(Stop::Later(IscsiError::Shrunk {
            before_bytes: before.size_bytes,
            now_bytes: now.size_bytes,
        }));
    }
    Ok(())
}

/// Whether a unit may be used as it is asked for.
fn check_access(plan: &Plan, unit: &Unit) -> Result<(), Stop> {
    match plan.access {
        Access::ReadWrite if unit.is_write_protected() => Err(Stop::Never(IscsiError::WriteProtected {
            initiator: plan.login.initiator.to_string(),
        })),
        Access::ReadOnly if plan.lock == Lock::Shared && unit.mode.is_none() => {
            Err(Stop::Never(IscsiError::Reserved {
                image: plan.name.clone(),
                key: None,
            }))
        }
        Access::ReadOnly if plan.lock == Lock::Shared && !unit.is_write_protected() && !plan.is_immutable => {
            Err(Stop::Never(IscsiError::NotProtected))
        }
        _ => Ok(()),
    }
}

/// Runs a command to its end, and returns what it has moved to us.
pub(super) async fn run(port: &Port, cdb: Cdb, data: Data) -> Result<Vec<u8>, Stop> {
    attempt(port, cdb, data).await.map_err(Refused::into_stop)
}

/// The same for a command that may meet another's reservation.
pub(super) async fn attempt(port: &Port, cdb: Cdb, data: Data) -> Result<Vec<u8>, Refused> {
    let (mut attentions, mut waits) = (0, 0);
    loop {
        let reply = port.command(cdb, data.clone()).await;
        let failed = |wrap: fn(IscsiError) -> Stop| {
            Refused::Stop(wrap(IscsiError::Command {
                command: cdb::name(&cdb),
                status: reply.status,
                sense: reply.sense,
            }))
        };
        match verdict(reply.status, reply.sense) {
            Verdict::Good => return Ok(reply.data),
            Verdict::Conflict => return Err(Refused::Conflict(cdb::name(&cdb))),
            Verdict::Retry(_) | Verdict::CapacityChanged | Verdict::ReservationChanged => {
                attentions += 1;
                if attentions > ATTENTIONS_MAX {
                    return Err(failed(Stop::Later));
                }
            }
            Verdict::BusyLater => {
                waits += 1;
                if waits > BUSY_WAITS_MAX {
                    return Err(failed(Stop::Later));
                }
                port.sleep(BUSY_WAIT).await;
            }
            Verdict::LunMissing => {
                return Err(Refused::Stop(Stop::Later(IscsiError::NoUnit {
                    lun: u16::MAX,
                    luns: Vec::new(),
                })));
            }
            Verdict::Failed(Failure::Unsupported) => return Err(failed(Stop::Never)),
            Verdict::Deferred(_) | Verdict::Failed(_) | Verdict::Miscompare => {
                return Err(failed(Stop::Later));
            }
        }
    }
}

impl Refused {
    /// What it means where no conflict is expected.
    pub(super) fn into_stop(self) -> Stop {
        match self {
            Self::Stop(stop) => stop,
            Self::Conflict(command) => Stop::Later(IscsiError::Command {
                command,
                status: super::scsi::sense::Status::RESERVATION_CONFLICT,
                sense: None,
            }),
        }
    }

    /// `None` if the unit does not know what it was asked.
    fn unless_unsupported<T>(self) -> Result<Option<T>, Stop> {
        match self {
            Self::Stop(Stop::Never(IscsiError::Command { .. })) => Ok(None),
            other => Err(other.into_stop()),
        }
    }
}

impl Stop {
    /// An answer that makes no sense.
    pub(super) fn data(command: &'static str, source: ParameterError) -> Self {
        Self::Later(IscsiError::Data { command, source })
    }
}
