//! The initiator on simulated hosts: images of simulated targets, and what an operator does about their leases.

use crate::backend::Backend;
use crate::iscsi::{self, IscsiError, Operator, Replace};
use crate::lease::{Incarnation, Owner, Record, Terms};
use crate::reactor::Reactor;
use crate::sim::dice::Dice;

/// Somebody who wants a lease: the machine `vm`, in a life of its own.
pub fn owner(vm: &str, dice: &mut Dice) -> Owner {
    Owner {
        incarnation: Incarnation::simulated(dice.draw(), dice.draw()),
        vm: vm.to_owned(),
        host: "simulated".to_owned(),
        pid: 1,
    }
}

/// Whether the session of that ISID, by which a target knows it, is one of an owner's.
pub fn is_owners(isid: [u8; 6], owner: &Owner) -> bool {
    isid.starts_with(&iscsi::isid_stem(owner))
}

/// Opens the image that `url` names, to be written, on a reactor of a host that has joined the network of its target. What
/// the target may forget is kept up to `uncommitted_bytes_max`.
///
/// # Errors
///
/// As when an image is opened on any host.
pub fn open(
    io: impl Reactor,
    url: &str,
    terms: &Terms<'_>,
    uncommitted_bytes_max: usize,
) -> Result<Box<dyn Backend>, IscsiError> {
    let disk = iscsi::open_simulated(io, url, terms, uncommitted_bytes_max)?;
    Ok(Box::new(disk))
}

/// [`Operator::break_lease`] on a simulated host, which is cut off afterwards: something may be in flight there.
///
/// # Errors
///
/// As there.
pub fn break_lease(io: impl Reactor, url: &str, owner: &Owner) -> Result<Option<Record>, IscsiError> {
    Operator::new(url, None, owner)?.break_lease_on(io)
}

/// [`Operator::create`] on a simulated host, which is cut off afterwards: something may be in flight there.
///
/// # Errors
///
/// As there.
pub fn create(io: impl Reactor, url: &str, owner: &Owner) -> Result<u64, IscsiError> {
    Operator::new(url, None, owner)?.create_on(io, Replace::Never)
}
