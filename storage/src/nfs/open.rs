//! From a URL to an image that can be used.

use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::backend::{Access, Backend};
use crate::lease::{Chain, Incarnation, Lock, Terms};
use crate::reactor::Reactor;
use crate::remote::dialogue::{self, Dialogue};
use crate::remote::lease::RemoteLease;

use super::bringup::{Past, Up, bring_up};
use super::client::Client;
use super::disk::Disk;
use super::error::NfsError;
use super::handover::FileChain;
use super::plan::{Plan, User};
use super::rpc::{Credential, SysCredential};
use super::stateless;
use super::url::{Host, ImageName, NfsUrl, PORT, Version};

/// How long opening an image may take.
const OPEN_LIMIT: Duration = Duration::from_secs(30);
/// How much is copied and kept because a server may forget it.
const UNCOMMITTED_BYTES_MAX: usize = 16 << 20;

/// An image that was opened, and which one it is.
pub(crate) struct Opened {
    pub(crate) disk: Box<dyn Backend>,
    pub(crate) name: ImageName,
    /// Its lease, for whoever holds it; a disk that only reads has none.
    pub(crate) lease: Option<RemoteLease>,
}

/// Makes a session with the server that `url` names, opens the file, and takes its lease.
pub(crate) fn open(url: &str, access: Access, terms: &Terms<'_>) -> Result<Opened, NfsError> {
    let parsed: NfsUrl = url.parse()?;
    check_version(&parsed, access, terms.lock)?;
    if parsed.options.version == Some(Version::V3) {
        let disk = Box::new(stateless::open(stateless_plan(&parsed, terms)?)?);
        let name = parsed.image;
        return Ok(Opened {
            disk,
            name,
            lease: None,
        });
    }
    let (plan, name) = plan(url, access, terms)?;
    let plan = Arc::new(plan);
    let chain = match terms.lock {
        Lock::Exclusive => Some(Box::new(FileChain::new(url, terms)?)),
        Lock::Shared | Lock::None => None,
    };
    let (dialogue, up) = begun(dialogue::plain(), &plan)?;
    let disk = dialogue.into_disk(|client| Disk::new(plan, up, client))?;
    let lease = chain.map(|chain| RemoteLease::new(chain, disk.standing()));
    let disk = Box::new(disk);
    Ok(Opened { disk, name, lease })
}

/// The same as [`open`] on a simulated host, which keeps copies of `uncommitted_bytes_max` at most.
pub(crate) fn open_simulated(
    io: impl Reactor,
    url: &str,
    terms: &Terms<'_>,
    uncommitted_bytes_max: usize,
) -> Result<Disk, NfsError> {
    let (plan, _) = plan(url, Access::ReadWrite, terms)?;
    let plan = Arc::new(Plan {
        uncommitted_bytes_max,
        ..plan
    });
    let (dialogue, up) = begun(io, &plan)?;
    dialogue.into_disk(|client| Disk::new(plan, up, client))
}

/// Whether `url` makes sense. Nobody is asked over the network.
pub(crate) fn check(url: &str, access: Access, lock: Lock) -> Result<(), NfsError> {
    let url: NfsUrl = url.parse()?;
    check_version(&url, access, lock)
}

/// Which file `url` names.
pub(crate) fn image_name(url: &str) -> Option<ImageName> {
    url.parse().ok().map(|url: NfsUrl| url.image)
}

/// A session of `plan`, and what it has found; it breaks off when it is dropped.
fn begun<R: Reactor>(io: R, plan: &Arc<Plan>) -> Result<(Dialogue<R, Client>, Up), NfsError> {
    let mut dialogue = converse(io, plan, OPEN_LIMIT)?;
    let up = dialogue.run(|port| bring_up(port, Arc::clone(plan), Past::default()))?;
    Ok((dialogue, up))
}

/// A dialogue with the server of `plan`.
pub(super) fn converse<R: Reactor>(
    io: R,
    plan: &Plan,
    limit: Duration,
) -> Result<Dialogue<R, Client>, NfsError> {
    let server = plan.servers.first().copied();
    let server = server.expect("a name that was resolved has an address");
    Dialogue::new(io, Client::new(server), plan.servers.clone(), limit)
}

pub(super) fn plan(url: &str, access: Access, terms: &Terms<'_>) -> Result<(Plan, ImageName), NfsError> {
    let url: NfsUrl = url.parse()?;
    if url.options.version == Some(Version::V3) {
        return Err(NfsError::Unfenced);
    }
    let chain = terms.at.map(|at| Chain::of(std::path::Path::new(at))).transpose();
    let (user, credential) = caller(&url);
    let kept = url.options.uncommitted_bytes_max.map(usize::try_from);
    let plan = Plan {
        name: url.to_string(),
        servers: resolved(&url.image)?,
        path: url.image.path.clone(),
        version: url.options.version,
        user,
        credential: Arc::new(credential),
        client: client_of(terms.owner.incarnation),
        access,
        lock: terms.lock,
        owner: terms.owner.clone(),
        succession: terms.succession,
        chain: chain.map_err(|error| NfsError::Records {
            image: url.to_string(),
            source: Box::new(error),
        })?,
        report_after: terms.network.timeout,
        uncommitted_bytes_max: kept.and_then(Result::ok).unwrap_or(UNCOMMITTED_BYTES_MAX),
    };
    Ok((plan, url.image))
}

/// The same of an image that is only read, by NFSv3.
fn stateless_plan(url: &NfsUrl, terms: &Terms<'_>) -> Result<stateless::Plan, NfsError> {
    let (user, credential) = caller(url);
    Ok(stateless::Plan {
        name: url.to_string(),
        servers: resolved(&url.image)?,
        port: url.image.port,
        mount_port: url.options.mount_port,
        path: url.image.path.clone(),
        user,
        credential: Arc::new(credential),
        report_after: terms.network.timeout,
    })
}

/// Who calls, as the URL has it.
pub(super) fn caller(url: &NfsUrl) -> (User, Credential) {
    let options = &url.options;
    let user = User {
        uid: options.uid.unwrap_or_else(|| rustix::process::geteuid().as_raw()),
        gid: options.gid.unwrap_or_else(|| rustix::process::getegid().as_raw()),
    };
    let credential = SysCredential {
        stamp: 0,
        machine_name: b"coracle".to_vec(),
        uid: user.uid,
        gid: user.gid,
        gids: options.groups.clone().unwrap_or_default(),
    };
    (user, Credential::Sys(credential))
}

/// NFSv3 has no state, and so nothing that fences a writer: neither our own nor another's.
fn check_version(url: &NfsUrl, access: Access, lock: Lock) -> Result<(), NfsError> {
    match (url.options.version, access, lock) {
        (Some(Version::V3), Access::ReadWrite, _) => Err(NfsError::Unfenced),
        (Some(Version::V3), Access::ReadOnly, Lock::Shared) if !url.options.base_immutable => {
            Err(NfsError::NotProtected)
        }
        _ => Ok(()),
    }
}

/// Another client for each image of this process, and its name says whose. A second start of the same machine is a stranger to
/// the server.
fn client_of(incarnation: Incarnation) -> Vec<u8> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let serial = NEXT.fetch_add(1, Ordering::Relaxed);
    // Of one length, so that a simulation of it is the same each time.
    format!("{} {serial:08x}", client_prefix(incarnation)).into_bytes()
}

/// How the names of all clients of a process begin.
pub(crate) fn client_prefix(incarnation: Incarnation) -> String {
    format!("coracle {incarnation}")
}

fn resolved(image: &ImageName) -> Result<Vec<SocketAddr>, NfsError> {
    let port = image.port.unwrap_or(PORT);
    match &image.host {
        Host::V4(address) => Ok(vec![(*address, port).into()]),
        Host::V6(address) => Ok(vec![(*address, port).into()]),
        Host::Name(name) => {
            let found = (name.as_str(), port).to_socket_addrs();
            let found = found.map_err(|source| NfsError::Resolve {
                host: name.clone(),
                source,
            })?;
            Ok(found.collect())
        }
    }
}
