//! The local interrupt pins: LINT0 takes the PIC's interrupts, LINT1 is NMI, as firmware leaves
//! them.

use kvm_bindings::kvm_lapic_state;
use kvm_ioctls::VcpuFd;

/// Why the pins could not be set.
#[derive(Debug, thiserror::Error)]
#[error("{ioctl} failed: the interrupt controller must exist before the processors")]
pub struct LapicError {
    ioctl: &'static str,
    #[source]
    source: kvm_ioctls::Error,
}

const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
const DELIVERY_MODE: u32 = 0x700;
const MODE_NMI: u32 = 0x400;
const MODE_EXTINT: u32 = 0x700;

/// Sets both pins' delivery mode and leaves everything else as it is.
pub fn set_pins(vcpu: &VcpuFd) -> Result<(), LapicError> {
    let mut lapic = vcpu.get_lapic().map_err(|source| LapicError {
        ioctl: "KVM_GET_LAPIC",
        source,
    })?;
    set_delivery_mode(&mut lapic, LVT_LINT0, MODE_EXTINT);
    set_delivery_mode(&mut lapic, LVT_LINT1, MODE_NMI);
    vcpu.set_lapic(&lapic).map_err(|source| LapicError {
        ioctl: "KVM_SET_LAPIC",
        source,
    })
}

fn set_delivery_mode(lapic: &mut kvm_lapic_state, register: usize, mode: u32) {
    let bytes = lapic
        .regs
        .get_mut(register..register + 4)
        .expect("the page has all registers");
    let old = bytes
        .iter()
        .rev()
        .fold(0u32, |value, byte| value << 8 | u32::from(byte.cast_unsigned()));
    let new = old & !DELIVERY_MODE | mode;
    for (byte, new) in bytes.iter_mut().zip(new.to_le_bytes()) {
        *byte = new.cast_signed();
    }
}

#[cfg(test)]
#[expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test's panic is its failure"
)]
mod tests {
    use super::*;
    use crate::arch::x86_64::testing;

    fn register(lapic: &kvm_lapic_state, at: usize) -> u32 {
        let bytes: Vec<u8> = lapic.regs[at..at + 4]
            .iter()
            .map(|byte| byte.cast_unsigned())
            .collect();
        u32::from_le_bytes(bytes.try_into().unwrap())
    }

    #[test]
    fn the_pins_take_the_pics_interrupts_and_nmi() {
        let Some(vm) = testing::vm("the_pins_take_the_pics_interrupts_and_nmi", 1) else {
            return;
        };
        set_pins(&vm.vcpus[0]).unwrap();
        let lapic = vm.vcpus[0].get_lapic().unwrap();
        assert_eq!(register(&lapic, LVT_LINT0) & DELIVERY_MODE, MODE_EXTINT);
        assert_eq!(register(&lapic, LVT_LINT1) & DELIVERY_MODE, MODE_NMI);
    }

    #[test]
    fn other_bits_of_a_register_stay() {
        let mut lapic = kvm_lapic_state::default();
        lapic.regs[LVT_LINT0] = 0x20;
        lapic.regs[LVT_LINT0 + 1] = 0x05;
        lapic.regs[LVT_LINT0 + 2] = 0x01;
        set_delivery_mode(&mut lapic, LVT_LINT0, MODE_NMI);
        assert_eq!(register(&lapic, LVT_LINT0), 0x1_0420);
    }
}
