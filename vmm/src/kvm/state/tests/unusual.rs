//! Values that no fresh machine has.

use std::arch::x86_64::__cpuid_count;

use kvm_bindings::{
    KVM_MP_STATE_HALTED, Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_pit_state2,
    kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::super::{VcpuState, VmState, bytes, xsave};

/// Everything that a guest with AVX-512 can enable (x87, SSE, AVX, AVX-512).
const XCR0: u64 = 0b1110_0111;
/// Where XSAVE's area says which parts it has.
const XSTATE_BV: usize = 512;

const MSRS: [(u32, u64); 8] = [
    (0x174, 0x10),
    (0x277, 0x0007_0106_0007_0406),
    (0x2ff, 0xc00),
    (0x200, 0x8000_0006),
    (0x6e0, 0x00ff_ffff_ffff_ffff),
    (0xc000_0082, 0xffff_ffff_8123_4560),
    (0xc000_0102, 0xffff_8880_1234_5000),
    // kvmclock, on, at 0x1000.
    (0x4b56_4d01, 0x1001),
];

/// Changes a structure in its bytes.
pub(super) fn edit<T: FromBytes + IntoBytes + Immutable>(state: &mut Vec<u8>, change: impl FnOnce(&mut T)) {
    let mut structure = bytes::to(state, "bytes of a test").unwrap();
    change(&mut structure);
    *state = bytes::of(&structure);
}

/// Gives a vCPU, whose state is `usual`, another in every part.
pub(super) fn vcpu(vcpu: &VcpuFd, usual: &VcpuState) {
    vcpu.set_sregs(&long_mode(vcpu.get_sregs().unwrap())).unwrap();
    vcpu.set_regs(&general()).unwrap();
    let supported = usual
        .cpuid
        .iter()
        .find(|entry| (entry.leaf, entry.subleaf) == (0xd, 0));
    let xcr0 = XCR0 & supported.map_or(1, |entry| u64::from(entry.eax));
    let mut area = usual.xsave.clone();
    fill_vectors(&mut area, xcr0);
    xsave::restore(vcpu, &area, area.len()).unwrap();
    let mut xcrs: kvm_xcrs = vcpu.get_xcrs().unwrap();
    xcrs.xcrs[0].value = xcr0;
    vcpu.set_xcrs(&xcrs).unwrap();
    let debug = kvm_debugregs {
        db: [0x1000, 0x2000, 0x3000, 0x4000],
        dr6: 0xffff_0ff1,
        dr7: 0x402,
        ..Default::default()
    };
    vcpu.set_debug_regs(&debug).unwrap();
    vcpu.set_lapic(&local_controller(vcpu.get_lapic().unwrap()))
        .unwrap();
    let entries = MSRS.map(|(index, data)| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    });
    let taken = vcpu.set_msrs(&Msrs::from_entries(&entries).unwrap()).unwrap();
    assert_eq!(taken, MSRS.len(), "this KVM has all of them");
    let mut events: kvm_vcpu_events = vcpu.get_vcpu_events().unwrap();
    events.nmi.masked = 1;
    events.nmi.pending = 1;
    events.interrupt.shadow = 1;
    vcpu.set_vcpu_events(&events).unwrap();
    let mp_state = KVM_MP_STATE_HALTED;
    vcpu.set_mp_state(kvm_mp_state { mp_state }).unwrap();
}

/// Whether a test that compares states compares anything.
pub(super) fn assert_differs_everywhere(unusual: &VcpuState, usual: &VcpuState) {
    assert_ne!(unusual.sregs, usual.sregs);
    assert_ne!(unusual.regs, usual.regs);
    assert_ne!(unusual.xsave, usual.xsave);
    assert_ne!(unusual.xcrs, usual.xcrs);
    assert_ne!(unusual.debug_regs, usual.debug_regs);
    assert_ne!(unusual.lapic, usual.lapic);
    assert_ne!(unusual.events, usual.events);
    assert_ne!(unusual.mp_state, usual.mp_state);
    for (index, value) in MSRS {
        let saved = unusual.msrs.iter().find(|msr| msr.index == index);
        assert_eq!(saved.map(|msr| msr.value), Some(value), "MSR {index:#x}");
    }
}

fn long_mode(mut sregs: kvm_sregs) -> kvm_sregs {
    sregs.cr0 = 0x8005_0033;
    sregs.cr2 = 0xdead_0000;
    sregs.cr3 = 0x9000;
    // PAE, PGE, OSFXSR, OSXMMEXCPT, OSXSAVE.
    sregs.cr4 = 1 << 5 | 1 << 7 | 1 << 9 | 1 << 10 | 1 << 18;
    sregs.efer = 1 | 1 << 8 | 1 << 10 | 1 << 11;
    sregs.fs.base = 0x7f12_3456_7000;
    sregs.gs.base = 0xffff_8880_0000_1000;
    sregs.gdt.base = 0xffff_fe00_0000_1000;
    sregs.gdt.limit = 0x7f;
    sregs.idt.base = 0xffff_fe00_0000_0000;
    sregs.idt.limit = 0xfff;
    (sregs.cs.base, sregs.cs.selector, sregs.cs.l, sregs.cs.db) = (0, 0x10, 1, 0);
    sregs
}

/// Protected mode with PAE paging.
pub(super) fn page_by_four_pointers(sregs: &mut kvm_sregs) {
    sregs.cr0 = 0x8000_0011;
    sregs.cr3 = 0x5000;
    sregs.cr4 = 1 << 5;
    sregs.efer = 0;
}

fn general() -> kvm_regs {
    kvm_regs {
        rax: 1,
        rbx: 2,
        rcx: 3,
        rdx: 4,
        rsi: 5,
        rdi: 6,
        rsp: 0xffff_c900_0000_3f58,
        rbp: 8,
        r8: 9,
        r9: 10,
        r10: 11,
        r11: 12,
        r12: 13,
        r13: 14,
        r14: 15,
        r15: u64::MAX,
        rip: 0xffff_ffff_8100_0000,
        rflags: 0x4_0ad7,
    }
}

/// Puts a pattern into the registers of each part in `xcr0`.
fn fill_vectors(area: &mut [u8], xcr0: u64) {
    // x87's control word, MXCSR, ST0 to ST7 (ten bytes each), XMM0 to 15.
    area[0] = 0x7e;
    area[24..28].copy_from_slice(&0x1fa0_u32.to_le_bytes());
    for register in 0..8 {
        pattern(&mut area[32 + 16 * register..][..10], register);
    }
    pattern(&mut area[160..416], 16);
    for part in (2..63).filter(|part| xcr0 >> part & 1 != 0) {
        let place = __cpuid_count(0xd, part);
        let (offset, size) = (place.ebx as usize, place.eax as usize);
        pattern(&mut area[offset..offset + size], part as usize);
    }
    area[XSTATE_BV..XSTATE_BV + 8].copy_from_slice(&xcr0.to_le_bytes());
}

fn pattern(bytes: &mut [u8], seed: usize) {
    for (at, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::try_from((at * 7 + seed * 31 + 1) % 251).unwrap();
    }
}

/// Enabled, with a priority, a timer by the time stamp counter, and interrupt 0x61 waiting.
fn local_controller(mut lapic: kvm_lapic_state) -> kvm_lapic_state {
    let registers = [
        (0x80, 0x50),
        (0xf0, 0x1ff),
        (0x230, 1 << 1),
        (0x320, 2 << 17 | 0xef),
        (0x350, 0x1_0700),
        (0x380, 0x1234),
        (0x3e0, 0b1011),
    ];
    for (register, value) in registers {
        for (to, from) in lapic.regs[register..].iter_mut().zip(u32::to_le_bytes(value)) {
            *to = from.cast_signed();
        }
    }
    lapic
}

/// Where a controller's registers begin in `kvm_irqchip`.
const CHIP: usize = 8;

/// A state of the machine with other values than `usual`.
pub(super) fn machine(usual: &VmState) -> VmState {
    let mut state = usual.clone();
    // Which interrupts wait, are masked and are served; where their vectors begin.
    state.pic_master[CHIP + 1..CHIP + 6].copy_from_slice(&[0x10, 0xfb, 0x04, 0, 0x30]);
    state.pic_slave[CHIP + 5] = 0x38;
    unmask(&mut state.ioapic, 5, 0x45);
    edit(&mut state.pit, |pit: &mut kvm_pit_state2| {
        // Mode 2, both bytes, 100 Hz.
        (pit.channels[0].mode, pit.channels[0].count) = (2, 11932);
        (pit.channels[2].mode, pit.channels[2].gate) = (3, 1);
        pit.channels[2].count = 0x1234;
    });
    forget_load_times(&mut state);
    state.clock_ns = 3_600_000_000_000;
    assert_ne!(state.pic_master, usual.pic_master);
    assert_ne!(state.ioapic, usual.ioapic);
    state
}

/// Sends line `irq`, by its edge, to processor 0 as `vector` (kvm_ioapic_state: 24 bytes, then the table of lines).
pub(super) fn unmask(ioapic: &mut [u8], irq: u32, vector: u8) {
    let entry = CHIP + 24 + 8 * usize::try_from(irq).unwrap();
    ioapic[entry..entry + 8].copy_from_slice(&u64::from(vector).to_le_bytes());
}

/// Whether `vector` waits for the processor (IRR: 32 vectors in every 16 bytes).
pub(super) fn is_waiting(lapic: &kvm_lapic_state, vector: u8) -> bool {
    let (word, bit) = (usize::from(vector / 32), vector % 32);
    let byte = lapic.regs[0x200 + 0x10 * word + usize::from(bit / 8)];
    byte.cast_unsigned() >> (bit % 8) & 1 == 1
}

/// When the timer's counters were loaded, by the host's clock: KVM loads them anew in a restore.
pub(super) fn forget_load_times(state: &mut VmState) {
    edit(&mut state.pit, |pit: &mut kvm_pit_state2| {
        for channel in &mut pit.channels {
            channel.count_load_time = 0;
        }
    });
}
