//! A guest that is slowed down: its vCPUs run for a share of the time.

use std::time::Duration;

use super::{Machine, Running};
use crate::kvm::vcpu::Vcpu;

impl<P> Machine<P> {
    /// Has the vCPUs run for so many thousandths of the time from now on, as long as they are nudged.
    pub fn set_share(&self, permille: u32) {
        self.parts.share.set(permille);
    }
}

impl Machine<Running> {
    /// Has vCPUs rest that have run for more than their share. Says when that is to be done again, if it is.
    pub fn nudge(&self) -> Option<Duration> {
        let period = self.parts.share.period()?;
        for error in self.parts.vcpus.iter().filter_map(|vcpu| Vcpu::nudge(vcpu).err()) {
            log::warn!("the guest is not slowed down: {error}");
        }
        Some(period)
    }
}
