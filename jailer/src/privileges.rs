//! Rights are given away here, for good.

use std::io;

use rustix::process::{Gid, Uid};
use rustix::thread::{
    CapabilitySet, CapabilitySets, remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
    set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};

use crate::plan::Standing;

/// Makes this process one of that user and group without any capability, and without a way to get one: no program that it
/// executes gives it more than it has.
///
/// # Errors
///
/// When the kernel refuses; then the process has to end.
pub(crate) fn drop_all(standing: Standing, uid: u32, gid: u32) -> Result<(), PrivilegeError> {
    // While there is still the right to: also root in the jail is to get nothing back by an exec.
    for number in 0..u64::BITS {
        match remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << number)) {
            Ok(()) => {}
            // The kernel's last one was the one before.
            Err(rustix::io::Errno::INVAL) if number > 0 => break,
            Err(error) => return refused("remove capabilities from the bounding set")(error),
        }
    }
    if standing == Standing::Root {
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        set_thread_groups(&[]).or_else(refused("leave the groups of this process"))?;
        set_thread_res_gid(gid, gid, gid).or_else(refused("become a process of --gid"))?;
        set_thread_res_uid(uid, uid, uid).or_else(refused("become a process of --uid"))?;
    }
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, none).or_else(refused("give up all capabilities"))?;
    set_no_new_privs(true).or_else(refused("set no_new_privs"))
}

fn refused(what: &'static str) -> impl FnOnce(rustix::io::Errno) -> Result<(), PrivilegeError> {
    move |source| {
        Err(PrivilegeError {
            what,
            source: source.into(),
        })
    }
}

/// Why rights are still there.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what}; root in a container may not have the right to")]
pub(crate) struct PrivilegeError {
    what: &'static str,
    #[source]
    source: io::Error,
}
