//! State out of one machine and into another, and files that lie.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test's panic is its failure"
)]

mod running;
mod unusual;

use std::io::Write;
use std::time::{Duration, Instant};

use coracle_devices::vmgenid::GenerationId;
use kvm_ioctls::{Kvm, VcpuFd};

use super::*;
use crate::arch::x86_64::cpu::{Cpu, Smt, Topology};
use crate::arch::x86_64::template::CpuTemplate;
use crate::arch::x86_64::{layout, testing};
use crate::kvm::vm::{DirtyLog, Vm};
use crate::memory::{Backing, PageSize, allocate};

const TSC: u32 = 0x10;

/// A machine whose only vCPU is as after power-on.
fn fresh(kvm: &Kvm) -> (VcpuFd, Vm) {
    let memory = allocate(2, Backing::Anonymous, PageSize::Base).unwrap();
    let vm = Vm::new(kvm, memory, None, DirtyLog::On).unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    let topology = Topology::new(1, Smt::Off).unwrap();
    let cpu = Cpu::new(kvm, topology, CpuTemplate::default()).unwrap();
    cpu.configure(&vcpu, 0).unwrap();
    (vcpu, vm)
}

/// What of a state does not go on by itself.
fn at_rest(state: &VcpuState) -> VcpuState {
    let mut state = state.clone();
    state.msrs.retain(|msr| msr.index != TSC);
    state
}

/// Compares part by part, so that a failure says which one.
fn assert_same(restored: &VcpuState, saved: &VcpuState) {
    let (restored, saved) = (at_rest(restored), at_rest(saved));
    assert_eq!(restored.cpuid, saved.cpuid, "CPUID");
    assert_eq!(restored.sregs, saved.sregs, "segments");
    assert_eq!(restored.regs, saved.regs, "general registers");
    assert!(restored.xsave == saved.xsave, "XSAVE");
    assert_eq!(restored.xcrs, saved.xcrs, "XCRs");
    assert_eq!(restored.debug_regs, saved.debug_regs, "debug registers");
    assert_eq!(restored.lapic, saved.lapic, "LAPIC");
    assert_eq!(restored.msrs, saved.msrs, "MSRs");
    assert_eq!(restored.events, saved.events, "events");
    assert_eq!(restored, saved);
}

#[test]
fn a_restored_vcpu_equals_the_one_that_was_saved() {
    let Some(kvm) = testing::kvm("a_restored_vcpu_equals_the_one_that_was_saved") else {
        return;
    };
    let (vcpu, vm) = fresh(&kvm);
    let usual = VcpuState::save(&vcpu, vm.state_shape()).unwrap();
    unusual::vcpu(&vcpu, &usual);
    let saved = VcpuState::save(&vcpu, vm.state_shape()).unwrap();
    unusual::assert_differs_everywhere(&saved, &usual);

    let (vcpu, vm) = fresh(&kvm);
    saved.restore(&vcpu, vm.state_shape()).unwrap();
    let restored = VcpuState::save(&vcpu, vm.state_shape()).unwrap();
    assert_same(&restored, &saved);
}

#[test]
fn a_restored_machine_has_the_controllers_and_the_timer_of_the_one_that_was_saved() {
    let test = "a_restored_machine_has_the_controllers_and_the_timer_of_the_one_that_was_saved";
    let Some(kvm) = testing::kvm(test) else {
        return;
    };
    let (_vcpu, vm) = fresh(&kvm);
    let saved = unusual::machine(&vm.save().unwrap());
    let (_vcpu, vm) = fresh(&kvm);
    vm.restore(&saved).unwrap();
    let mut restored = vm.save().unwrap();
    assert!(
        restored.clock_ns >= saved.clock_ns,
        "the clock goes on from where it was"
    );
    assert!(
        restored.clock_ns < saved.clock_ns + 60_000_000_000,
        "and does not jump"
    );
    restored.clock_ns = saved.clock_ns;
    unusual::forget_load_times(&mut restored);
    assert_eq!(restored, saved);
}

#[test]
fn a_byte_string_of_another_length_is_refused() {
    let Some(kvm) = testing::kvm("a_byte_string_of_another_length_is_refused") else {
        return;
    };
    let (vcpu, vm) = fresh(&kvm);
    let good = VcpuState::save(&vcpu, vm.state_shape()).unwrap();
    let fields: [fn(&mut VcpuState) -> &mut Vec<u8>; 7] = [
        |state| &mut state.sregs,
        |state| &mut state.regs,
        |state| &mut state.xcrs,
        |state| &mut state.debug_regs,
        |state| &mut state.lapic,
        |state| &mut state.events,
        |state| &mut state.xsave,
    ];
    for field in fields {
        let len = field(&mut good.clone()).len();
        for wrong in [0, 1, len - 1, len + 1, 1 << 24] {
            let mut state = good.clone();
            field(&mut state).resize(wrong, 1);
            let error = state.restore(&vcpu, vm.state_shape()).unwrap_err();
            assert!(
                matches!(error, StateError::Length { .. } | StateError::Xsave { .. }),
                "{len} -> {wrong}: {error}"
            );
        }
    }
    let good = vm.save().unwrap();
    let fields: [fn(&mut VmState) -> &mut Vec<u8>; 4] = [
        |state| &mut state.pic_master,
        |state| &mut state.pic_slave,
        |state| &mut state.ioapic,
        |state| &mut state.pit,
    ];
    for field in fields {
        let len = field(&mut good.clone()).len();
        for wrong in [0, 1, len - 1, len + 1, 1 << 24] {
            let mut state = good.clone();
            field(&mut state).resize(wrong, 1);
            let error = vm.restore(&state).unwrap_err();
            assert!(
                matches!(error, StateError::Length { .. }),
                "{len} -> {wrong}: {error}"
            );
        }
    }
}

#[test]
fn an_area_of_a_host_with_more_features_is_taken_if_they_were_not_used() {
    let test = "an_area_of_a_host_with_more_features_is_taken_if_they_were_not_used";
    let Some(kvm) = testing::kvm(test) else {
        return;
    };
    let (vcpu, vm) = fresh(&kvm);
    let mut state = VcpuState::save(&vcpu, vm.state_shape()).unwrap();
    state.xsave.resize(state.xsave.len() + 8192, 0);
    state.restore(&vcpu, vm.state_shape()).unwrap();
    *state.xsave.last_mut().unwrap() = 1;
    let error = state.restore(&vcpu, vm.state_shape()).unwrap_err();
    assert!(matches!(error, StateError::Xsave { .. }), "{error}");
}

#[test]
fn an_absurd_list_or_value_is_refused_and_named() {
    let Some(kvm) = testing::kvm("an_absurd_list_or_value_is_refused_and_named") else {
        return;
    };
    let (vcpu, vm) = fresh(&kvm);
    let good = VcpuState::save(&vcpu, vm.state_shape()).unwrap();
    let refused = |change: &dyn Fn(&mut VcpuState), what: &str| {
        let mut state = good.clone();
        change(&mut state);
        let error = state.restore(&vcpu, vm.state_shape()).unwrap_err();
        assert!(error.to_string().contains(what), "{what}: {error}");
    };
    let msr = MsrState { index: 1, value: 2 };
    refused(&|state| state.msrs = vec![msr; 1_000_000], "1000000");
    let entry = good.cpuid[0];
    refused(&|state| state.cpuid = vec![entry; 257], "257");
    refused(&|state| state.cpuid = vec![entry; 1_000_000], "1000000");
    let absent = MsrState {
        index: 0xdead_beef,
        value: 0x77,
    };
    refused(&|state| state.msrs.push(absent), "0xdeadbeef");
    refused(&|state| state.mp_state = 99, "KVM_SET_MP_STATE");
    refused(&|state| state.tsc_khz = Some(1), "1 kHz");
    // Paging without protection.
    refused(
        &|state| {
            unusual::edit(&mut state.sregs, |sregs: &mut kvm_bindings::kvm_sregs| {
                sregs.cr0 = 1 << 31
            })
        },
        "KVM_SET_SREGS",
    );

    let good = vm.save().unwrap();
    let mut state = good.clone();
    state.pic_slave = state.pic_master.clone();
    let error = vm.restore(&state).unwrap_err();
    assert!(error.to_string().contains("second PIC"), "{error}");
}

#[test]
fn no_byte_of_a_state_makes_a_restore_panic() {
    let Some(kvm) = testing::kvm("no_byte_of_a_state_makes_a_restore_panic") else {
        return;
    };
    let (vcpu, vm) = fresh(&kvm);
    let good = VcpuState::save(&vcpu, vm.state_shape()).unwrap();
    let fields: [fn(&mut VcpuState) -> &mut Vec<u8>; 6] = [
        |state| &mut state.sregs,
        |state| &mut state.regs,
        |state| &mut state.xcrs,
        |state| &mut state.debug_regs,
        |state| &mut state.lapic,
        |state| &mut state.events,
    ];
    let mut taken = 0;
    for field in fields {
        for value in [0, 0x5a, 0xff] {
            let mut state = good.clone();
            field(&mut state).fill(value);
            taken += u32::from(state.restore(&vcpu, vm.state_shape()).is_ok());
        }
    }
    assert!(taken > 0, "KVM takes some of it");
    good.restore(&vcpu, vm.state_shape()).unwrap();
    assert_same(&VcpuState::save(&vcpu, vm.state_shape()).unwrap(), &good);
}

#[test]
fn no_byte_of_a_controller_makes_a_restore_panic() {
    let Some(kvm) = testing::kvm("no_byte_of_a_controller_makes_a_restore_panic") else {
        return;
    };
    let (_vcpu, vm) = fresh(&kvm);
    let good = vm.save().unwrap();
    let mut taken = 0;
    for value in [0, 0x5a, 0xff] {
        let mut state = good.clone();
        let chips = [&mut state.pic_master, &mut state.pic_slave, &mut state.ioapic];
        for chip in chips {
            // Behind the controller's number.
            chip[8..].fill(value);
        }
        taken += u32::from(vm.restore(&state).is_ok());
        let mut state = good.clone();
        state.pit.fill(value);
        state.clock_ns = u64::from_le_bytes([value; 8]);
        taken += u32::from(vm.restore(&state).is_ok());
    }
    assert!(taken > 0, "KVM takes some of it");
    vm.restore(&good).unwrap();
}

#[test]
fn page_directory_pointers_come_along_although_memory_has_others() {
    let test = "page_directory_pointers_come_along_although_memory_has_others";
    let Some(kvm) = testing::kvm(test) else {
        return;
    };
    let (vcpu, vm) = fresh(&kvm);
    let mut state = VcpuState::save(&vcpu, vm.state_shape()).unwrap();
    unusual::edit(&mut state.sregs, unusual::page_by_four_pointers);
    state.pdptrs = Some([0x6001, 0x7001, 0x8001, 0x9001]);
    state.restore(&vcpu, vm.state_shape()).unwrap();
    let restored = VcpuState::save(&vcpu, vm.state_shape()).unwrap();
    if restored.pdptrs.is_none() {
        let line =
            format!("NOT RUN: {test}, to its end: this KVM takes the pointers and does not tell them\n");
        std::io::stderr().write_all(line.as_bytes()).unwrap();
        return;
    }
    assert_eq!(restored.pdptrs, state.pdptrs);
}

#[test]
fn a_guest_that_has_guests_is_not_saved() {
    let Some(kvm) = testing::kvm("a_guest_that_has_guests_is_not_saved") else {
        return;
    };
    let (vcpu, vm) = fresh(&kvm);
    let mut sregs = vcpu.get_sregs().unwrap();
    sregs.efer |= 1 << 12;
    if vcpu.set_sregs(&sregs).is_err() {
        // A processor without nested virtualization cannot be in it.
        let state = VcpuState::save(&vcpu, vm.state_shape());
        assert!(state.is_ok(), "{state:?}");
        return;
    }
    let error = VcpuState::save(&vcpu, vm.state_shape()).unwrap_err();
    assert!(error.to_string().contains("nested"), "{error}");
}

#[test]
fn a_restored_guest_is_told_of_its_new_generation() {
    let Some(kvm) = testing::kvm("a_restored_guest_is_told_of_its_new_generation") else {
        return;
    };
    let (vcpu, vm) = fresh(&kvm);
    let generation = GenerationId::new(layout::VMGENID).unwrap();
    vm.connect_interrupt(generation.line(), layout::EVENT_IRQ)
        .unwrap();
    let mut lapic = VcpuState::save(&vcpu, vm.state_shape()).unwrap();
    lapic.lapic[0xf1] = 1;
    lapic.restore(&vcpu, vm.state_shape()).unwrap();
    let mut controllers = vm.save().unwrap();
    unusual::unmask(&mut controllers.ioapic, layout::EVENT_IRQ, 0x51);
    vm.restore(&controllers).unwrap();

    generation.announce().unwrap();
    // KVM raises the line from a thread of its own.
    let deadline = Instant::now() + Duration::from_secs(10);
    while !unusual::is_waiting(&vcpu.get_lapic().unwrap(), 0x51) {
        assert!(Instant::now() < deadline, "the interrupt does not come");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn state_survives_being_written_and_read() {
    let Some(kvm) = testing::kvm("state_survives_being_written_and_read") else {
        return;
    };
    let (vcpu, vm) = fresh(&kvm);
    let state = VcpuState::save(&vcpu, vm.state_shape()).unwrap();
    let text = serde_json::to_vec(&state).unwrap();
    assert_eq!(serde_json::from_slice::<VcpuState>(&text).unwrap(), state);
    let state = vm.save().unwrap();
    let text = serde_json::to_vec(&state).unwrap();
    assert_eq!(serde_json::from_slice::<VmState>(&text).unwrap(), state);
}
