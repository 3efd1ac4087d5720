//! Interrupt controllers, timer and clock out of KVM and into it.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
};
use kvm_ioctls::VmFd;

use super::super::failed;
use super::{StateError, VmState, bytes};

/// One of the three controllers behind KVM_GET_IRQCHIP.
struct Chip {
    name: &'static str,
    number: u32,
}

const PIC_MASTER: Chip = Chip {
    name: "first PIC's registers",
    number: KVM_IRQCHIP_PIC_MASTER,
};
const PIC_SLAVE: Chip = Chip {
    name: "second PIC's registers",
    number: KVM_IRQCHIP_PIC_SLAVE,
};
const IOAPIC: Chip = Chip {
    name: "IOAPIC's registers",
    number: KVM_IRQCHIP_IOAPIC,
};

impl VmState {
    /// Reads a machine whose interrupt lines rest.
    ///
    /// # Errors
    ///
    /// The ioctl that failed.
    pub(in crate::kvm) fn save(vm: &VmFd) -> Result<Self, StateError> {
        Ok(Self {
            pic_master: PIC_MASTER.save(vm)?,
            pic_slave: PIC_SLAVE.save(vm)?,
            ioapic: IOAPIC.save(vm)?,
            pit: bytes::of(&vm.get_pit2().map_err(failed("KVM_GET_PIT2"))?),
            clock_ns: vm.get_clock().map_err(failed("KVM_GET_CLOCK"))?.clock,
        })
    }

    /// Gives a machine this state, the timer after the controllers that take its interrupt.
    ///
    /// # Errors
    ///
    /// What is damaged in the state, or the ioctl that failed.
    pub(in crate::kvm) fn restore(&self, vm: &VmFd) -> Result<(), StateError> {
        PIC_MASTER.restore(vm, &self.pic_master)?;
        PIC_SLAVE.restore(vm, &self.pic_slave)?;
        IOAPIC.restore(vm, &self.ioapic)?;
        let pit = bytes::to(&self.pit, "timer's registers")?;
        vm.set_pit2(&pit).map_err(failed("KVM_SET_PIT2"))?;
        // Without KVM_CLOCK_REALTIME the clock goes on from where it was: a guest sees no jump.
        let clock = kvm_clock_data {
            clock: self.clock_ns,
            ..Default::default()
        };
        Ok(vm.set_clock(&clock).map_err(failed("KVM_SET_CLOCK"))?)
    }
}

impl Chip {
    fn save(&self, vm: &VmFd) -> Result<Vec<u8>, StateError> {
        let mut chip = kvm_irqchip {
            chip_id: self.number,
            ..Default::default()
        };
        vm.get_irqchip(&mut chip).map_err(failed("KVM_GET_IRQCHIP"))?;
        Ok(bytes::of(&chip))
    }

    fn restore(&self, vm: &VmFd, state: &[u8]) -> Result<(), StateError> {
        let chip: kvm_irqchip = bytes::to(state, self.name)?;
        if chip.chip_id != self.number {
            return Err(StateError::Chip {
                chip: self.name,
                number: chip.chip_id,
            });
        }
        Ok(vm.set_irqchip(&chip).map_err(failed("KVM_SET_IRQCHIP"))?)
    }
}
