//! From a URL to an image that can be used, or to an operator's look at its lease.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::Path;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::backend::Access;
use crate::lease::{Chain, Incarnation, Lock, Owner, Terms};
use crate::reactor::Reactor;
use crate::remote::dialogue::{self, Dialogue};
use crate::remote::lease::RemoteLease;

use super::bringup::{Past, Refused, Up, attempt, bring_up, enter};
use super::chap::{Authentication, Credentials};
use super::disk::Disk;
use super::error::IscsiError;
use super::handover::UnitChain;
use super::initiator::Initiator;
use super::login::{LoginPlan, SessionType};
use super::name::IscsiName;
use super::operator::Operator;
use super::pdu::Isid;
use super::plan::{Keyring, Plan};
use super::portal::{Host, Portal};
use super::procedure::Data;
use super::scsi::cdb;
use super::scsi::reservation::ReservationKey;
use super::url::{ImageName, IscsiUrl};
use crate::secret::Secret;

/// How long opening an image may take.
const OPEN_LIMIT: Duration = Duration::from_secs(20);
/// How long it may take to find out what a stranger may do.
const STRANGER_LIMIT: Duration = Duration::from_secs(5);
/// The naming authority of initiators that nobody has named.
const INITIATOR_PREFIX: &str = "iqn.2026-11.dev.coracle:";
/// What we receive in one data segment.
const DATA_SEGMENT_BYTES_MAX: u32 = 1 << 20;
/// How much is copied and kept because a target may forget it.
const UNCOMMITTED_BYTES_MAX: usize = 16 << 20;

/// An image that was opened, and which one it is.
pub(crate) struct Opened {
    pub(crate) disk: Disk,
    pub(crate) name: ImageName,
    /// Its lease, for whoever holds it; a disk that only reads has none.
    pub(crate) lease: Option<RemoteLease>,
}

/// Logs in to the target that `url` names, and takes the lease of the unit.
pub(crate) fn open(url: &str, access: Access, terms: &Terms<'_>) -> Result<Opened, IscsiError> {
    let (plan, name) = plan(url, access, terms)?;
    let plan = Arc::new(plan);
    let (dialogue, mut up) = begun(dialogue::plain(), &plan, &Past::default())?;
    let may_zero = up.unit.limits.unmap_blocks > 0 || up.unit.limits.write_same_blocks > 0;
    if plan.lock == Lock::Exclusive && may_zero && !fences_unmap(&plan) {
        log::warn!(
            "{}: the target lets others than the holder of the reservation unmap blocks, so nothing is discarded there, \
             and zeros are written",
            plan.name
        );
        up.unit.limits.unmap_blocks = 0;
        up.unit.limits.write_same_blocks = 0;
    }
    let chain = match plan.lock {
        Lock::Exclusive => Some(Box::new(UnitChain::of(&plan))),
        Lock::Shared | Lock::None => None,
    };
    let disk = dialogue.into_disk(|initiator| Disk::new(plan, up, initiator))?;
    let lease = chain.map(|chain| RemoteLease::new(chain, disk.standing()));
    Ok(Opened { disk, name, lease })
}

/// Whether the reservation of the unit, which this process has by another session, keeps a stranger from UNMAP as it should
/// (SBC-3, table 13): tgtd says that it did it. What cannot be found out is taken at its worst.
fn fences_unmap(plan: &Plan) -> bool {
    let stranger = Arc::new(plan.for_stranger());
    let asked = converse(dialogue::plain(), &stranger, STRANGER_LIMIT);
    let asked = asked.and_then(|mut dialogue| {
        dialogue.run(|port| {
            let plan = Arc::clone(&stranger);
            async move {
                enter(&port, &plan).await?;
                let (cdb, nothing) = cdb::unmap(&[]);
                let refused = attempt(&port, cdb, Data::Out(nothing)).await.err();
                port.logout().await;
                Ok(matches!(refused, Some(Refused::Conflict(_))))
            }
        })
    });
    asked.unwrap_or(false)
}

/// The same as [`open`] on a simulated host, which keeps copies of `uncommitted_bytes_max` at most.
pub(crate) fn open_simulated(
    io: impl Reactor,
    url: &str,
    terms: &Terms<'_>,
    uncommitted_bytes_max: usize,
) -> Result<Disk, IscsiError> {
    let (plan, _) = plan(url, Access::ReadWrite, terms)?;
    let plan = Arc::new(Plan {
        uncommitted_bytes_max,
        ..plan
    });
    let (dialogue, up) = begun(io, &plan, &Past::default())?;
    dialogue.into_disk(|initiator| Disk::new(plan, up, initiator))
}

/// A dialogue with the target of `plan`.
pub(super) fn converse<R: Reactor>(
    io: R,
    plan: &Plan,
    limit: Duration,
) -> Result<Dialogue<R, Initiator>, IscsiError> {
    let portal = plan.portals.first().copied();
    let portal = portal.expect("a name that was resolved has an address");
    let initiator = Initiator::new(portal, plan.lun);
    Dialogue::new(io, initiator, plan.portals.clone(), limit)
}

/// A session of `plan` after those of the `past`, and what it has found; it breaks off when it is dropped.
fn begun<R: Reactor>(
    io: R,
    plan: &Arc<Plan>,
    past: &Past,
) -> Result<(Dialogue<R, Initiator>, Up), IscsiError> {
    let mut dialogue = converse(io, plan, OPEN_LIMIT)?;
    let up = dialogue.run(|port| bring_up(port, Arc::clone(plan), past.clone()))?;
    Ok((dialogue, up))
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

impl Operator {
    /// Whoever looks after the unit that `url` names, as `owner`; its lease records are named after `at` if that is given.
    /// The secrets that the URL names are read now, and once.
    ///
    /// # Errors
    ///
    /// When the URL or a secret makes no sense, or a host's name has no address.
    pub fn new(url: &str, at: Option<&str>, owner: &Owner) -> Result<Self, IscsiError> {
        let terms = Terms {
            at,
            ..Terms::new(Lock::None, owner)
        };
        plan(url, Access::ReadWrite, &terms).map(|(plan, _)| Self::of(Arc::new(plan)))
    }
}

pub(super) fn plan(url: &str, access: Access, terms: &Terms<'_>) -> Result<(Plan, ImageName), IscsiError> {
    let url: IscsiUrl = url.parse()?;
    let initiator = match &url.options.initiator {
        Some(name) => name.clone(),
        None => initiator_of(&terms.owner.vm),
    };
    let login = LoginPlan {
        initiator,
        isid: next_isid(terms.owner),
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
        succession: terms.succession,
        keys: Arc::new(Keyring::of(terms.owner.incarnation)),
        begun: Mutex::default(),
        chain: chain
            .map_err(|error| IscsiError::Records {
                image: url.to_string(),
                source: Box::new(error),
            })?
            .map(Arc::new),
        is_immutable: url.options.base_immutable,
        takes_over: terms.network.takes_over.map(ReservationKey),
        reaped: Incarnation::reaped().to_vec(),
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

/// The initiator's part of the names of the sessions that are made from one plan. Two plans of a process have different ones,
/// also where both are of one unit: or the target would end the session of one for that of the other (RFC 7143, 6.3.5), and each
/// would take its place back for ever.
pub(super) fn next_isid(owner: &Owner) -> Isid {
    static PLANS: AtomicU16 = AtomicU16::new(0);
    let [_, _, _, d, e, ..] = owner.incarnation.bytes();
    let [random, a, b, c] = isid_stem(owner);
    let qualifier = u16::from_be_bytes([d, e]) ^ PLANS.fetch_add(1, Ordering::Relaxed);
    let [d, e] = qualifier.to_be_bytes();
    Isid([random, a, b, c, d, e])
}

/// What all of an incarnation's begin with, before its qualifiers: that they are random (11.12.5), and its 24 bits.
pub(crate) fn isid_stem(owner: &Owner) -> [u8; 4] {
    const RANDOM: u8 = 0x80;
    let [a, b, c, ..] = owner.incarnation.bytes();
    [RANDOM, a, b, c]
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

#[cfg(test)]
mod tests;
