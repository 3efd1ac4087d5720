//! From a URL to an image that can be used, or to an operator's look at its lease.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::backend::Access;
use crate::lease::{Chain, Lock, Owner, Record, Terms};
use crate::reactor::Reactor;

use super::bringup::{Past, bring_up};
use super::chap::{Authentication, Credentials};
use super::dialogue::{self, Dialogue};
use super::disk::Disk;
use super::error::IscsiError;
use super::login::{LoginPlan, SessionType};
use super::name::IscsiName;
use super::operator::{self, Replace, UnitStanding};
use super::pdu::Isid;
use super::plan::{Keyring, Plan};
use super::portal::{Host, Portal};
use super::scsi::reservation::ReservationKey;
use super::secret::Secret;
use super::url::{ImageName, IscsiUrl};

/// How long opening an image may take.
const OPEN_LIMIT: Duration = Duration::from_secs(20);
/// The naming authority of initiators that nobody has named.
const INITIATOR_PREFIX: &str = "iqn.2026-11.dev.coracle:";
/// What we receive in one data segment.
const DATA_SEGMENT_BYTES_MAX: u32 = 1 << 20;
/// How much is copied and kept because a target may forget it.
const UNCOMMITTED_BYTES_MAX: usize = 32 << 20;

/// An image that was opened, and which one it is.
pub(crate) struct Opened {
    pub(crate) disk: Disk,
    pub(crate) name: ImageName,
}

/// Logs in to the target that `url` names, and takes the lease of the unit.
pub(crate) fn open(url: &str, access: Access, terms: &Terms<'_>) -> Result<Opened, IscsiError> {
    let (plan, name) = plan(url, access, terms)?;
    let disk = open_plan(dialogue::plain(), Arc::new(plan))?;
    Ok(Opened { disk, name })
}

/// The same on a simulated host, which keeps copies of `uncommitted_bytes_max` at most.
pub(crate) fn open_simulated(
    io: impl Reactor,
    url: &str,
    terms: &Terms<'_>,
    uncommitted_bytes_max: usize,
) -> Result<Disk, IscsiError> {
    let (plan, _) = plan(url, Access::ReadWrite, terms)?;
    let plan = Plan {
        uncommitted_bytes_max,
        ..plan
    };
    open_plan(io, Arc::new(plan))
}

fn open_plan(io: impl Reactor, plan: Arc<Plan>) -> Result<Disk, IscsiError> {
    let mut dialogue = Dialogue::new(io, Arc::clone(&plan), OPEN_LIMIT)?;
    let up = dialogue.run(|port| bring_up(port, Arc::clone(&plan), Past::default()))?;
    dialogue.into_disk(up)
}

/// Whether `url` makes sense and the secrets that it names can be read. Nobody is asked over the network.
pub(crate) fn check(url: &str) -> Result<(), IscsiError> {
    let url: IscsiUrl = url.parse()?;
    authentication(&url).map(drop)
}

/// Which unit `url` names.
pub(crate) fn image_name(url: &str) -> Option<ImageName> {
    url.parse().ok().map(|url: IscsiUrl| url.image)
}

/// Looks at the lease of the unit that `url` names, whose records are named after `at` if that is given. Changes nothing.
///
/// # Errors
///
/// When the unit cannot be reached or makes no sense.
pub fn inspect(url: &str, at: Option<&str>, owner: &Owner) -> Result<UnitStanding, IscsiError> {
    operator::inspect(dialogue::plain(), operators_plan(url, at, owner)?)
}

/// Declares the lease of the unit that `url` names broken, as `owner`: its holder is fenced, what it had under way
/// has ended, and the next who wants the lease gets
/// it. The record that says so, if there is a place for records.
///
/// # Errors
///
/// When there is nothing to break, or it cannot be done.
pub fn break_lease(url: &str, at: Option<&str>, owner: &Owner) -> Result<Option<Record>, IscsiError> {
    operator::break_lease(dialogue::plain(), operators_plan(url, at, owner)?)
}

/// The same on a simulated host.
pub(crate) fn break_lease_simulated(
    io: impl Reactor,
    url: &str,
    owner: &Owner,
) -> Result<Option<Record>, IscsiError> {
    operator::break_lease(io, operators_plan(url, None, owner)?)
}

/// Makes a reserved tail for lease records at the end of the unit that `url` names. What a guest has written before the tail
/// stays. Returns how many bytes a guest sees from now on.
///
/// # Errors
///
/// When somebody has the unit, when it has a tail that is not to be replaced, or when it cannot be done.
pub fn create(url: &str, replace: Replace, owner: &Owner) -> Result<u64, IscsiError> {
    operator::create(dialogue::plain(), operators_plan(url, None, owner)?, replace)
}

/// The same on a simulated host.
pub(crate) fn create_simulated(io: impl Reactor, url: &str, owner: &Owner) -> Result<u64, IscsiError> {
    operator::create(io, operators_plan(url, None, owner)?, Replace::Never)
}

fn operators_plan(url: &str, at: Option<&str>, owner: &Owner) -> Result<Arc<Plan>, IscsiError> {
    let terms = Terms {
        at,
        ..Terms::new(Lock::None, owner)
    };
    plan(url, Access::ReadWrite, &terms).map(|(plan, _)| Arc::new(plan))
}

fn plan(url: &str, access: Access, terms: &Terms<'_>) -> Result<(Plan, ImageName), IscsiError> {
    let url: IscsiUrl = url.parse()?;
    let initiator = match &url.options.initiator {
        Some(name) => name.clone(),
        None => initiator_of(&terms.owner.vm),
    };
    let login = LoginPlan {
        initiator,
        isid: isid_of(terms.owner),
        session: SessionType::Normal(url.image.target.clone()),
        authentication: authentication(&url)?,
        header_digest: url.options.header_digest,
        data_digest: url.options.data_digest,
        max_recv_data_segment_length: DATA_SEGMENT_BYTES_MAX,
    };
    let chain = terms.at.map(|at| Chain::of(Path::new(at))).transpose();
    let plan = Plan {
        name: url.to_string(),
        portals: resolved(&url.portals)?,
        lun: url.image.lun,
        login: Arc::new(login),
        access,
        lock: terms.lock,
        owner: terms.owner.clone(),
        keys: Keyring::of(terms.owner.incarnation),
        begun: Mutex::default(),
        chain: chain.map_err(|error| IscsiError::Records {
            image: url.to_string(),
            source: Box::new(error),
        })?,
        is_immutable: url.options.base_immutable,
        takes_over: terms.network.takes_over.map(ReservationKey),
        report_after: terms.network.timeout,
        uncommitted_bytes_max: UNCOMMITTED_BYTES_MAX,
    };
    Ok((plan, url.image))
}

/// The name of the initiator of a machine: the same in each of its lives.
fn initiator_of(vm: &str) -> IscsiName {
    let plain: String = vm
        .to_lowercase()
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || ".-:".contains(c) {
                c
            } else {
                '-'
            }
        })
        .take(INITIATOR_CHARS_MAX)
        .collect();
    let name = format!("{INITIATOR_PREFIX}{plain}");
    name.parse()
        .expect("it has been made of nothing but what a name may have")
}

/// A name has up to 223 bytes (RFC 7143, 4.2.7.1).
const INITIATOR_CHARS_MAX: usize = 190;

/// The initiator's part of the name of a session: at random (RFC 7143, 11.12.5), by the incarnation.
pub(crate) fn isid_of(owner: &Owner) -> Isid {
    const RANDOM: u8 = 0x80;
    let [.., a, b, c, d, e] = owner.incarnation.bytes();
    Isid([RANDOM, a, b, c, d, e])
}

fn authentication(url: &IscsiUrl) -> Result<Option<Authentication>, IscsiError> {
    let (Some(user), Some(secret)) = (&url.user, &url.options.chap_secret) else {
        return Ok(None);
    };
    let own = Credentials {
        user: user.clone(),
        secret: Secret::read(secret)?,
    };
    let target = match &url.options.mutual {
        Some(mutual) => Some(Credentials {
            user: mutual.user.clone(),
            secret: Secret::read(&mutual.secret)?,
        }),
        None => None,
    };
    Ok(Some(Authentication::new(own, target, url.options.chap)?))
}

fn resolved(portals: &[Portal]) -> Result<Vec<SocketAddr>, IscsiError> {
    let mut addresses = Vec::new();
    for portal in portals {
        match &portal.host {
            Host::V4(address) => addresses.push((*address, portal.port).into()),
            Host::V6(address) => addresses.push((*address, portal.port).into()),
            Host::Name(name) => {
                let found = (name.as_str(), portal.port).to_socket_addrs();
                addresses.extend(found.map_err(|source| IscsiError::Resolve {
                    host: name.clone(),
                    source,
                })?);
            }
        }
    }
    Ok(addresses)
}
