//! The client on simulated hosts.

use crate::backend::Backend;
use crate::lease::{Owner, Terms};
use crate::nfs::{self, NfsError};
use crate::reactor::Reactor;

/// How the names of an owner's clients begin, by which a server knows them.
pub fn prefix(owner: &Owner) -> String {
    nfs::client_prefix(owner.incarnation)
}

/// Opens the image that `url` names, to be written, on a reactor of a host that has joined the network of its server. What
/// the server may forget is kept up to `uncommitted_bytes_max`.
///
/// # Errors
///
/// As when an image is opened on any host.
pub fn open(
    io: impl Reactor,
    url: &str,
    terms: &Terms<'_>,
    uncommitted_bytes_max: usize,
) -> Result<Box<dyn Backend>, NfsError> {
    let disk = nfs::open_simulated(io, url, terms, uncommitted_bytes_max)?;
    Ok(Box::new(disk))
}
