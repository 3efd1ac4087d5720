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
