//! Guests that are stopped in the middle of what they do.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use coracle_devices::bus::{Bus, BusDevice, BusRange};
use coracle_devices::power::EndSignal;
use kvm_bindings::{KVM_MP_STATE_UNINITIALIZED, kvm_regs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::super::bytes;
use super::*;
use crate::arch::x86_64::boot::{Entry, EntryMode};
use crate::arch::x86_64::regs;
use crate::end::Ending;
use crate::kvm::vcpu::{Outside, Vcpu, install_kick_handler};

const CODE: GuestAddress = GuestAddress(0x10_0000);
const REGISTER: u64 = 0xc000_1000;
const IN_PORT: u64 = 0x510;
const OUT_PORT: u64 = 0x604;
/// A guest that takes longer does not come.
const LIMIT: Duration = Duration::from_secs(30);
const ANSWER: u32 = 0x1bad_cafe;

/// `mov ebx, 0xc0001000; mov eax, [rbx]`
const READ_MEMORY: [u8; 7] = [0xbb, 0x00, 0x10, 0x00, 0xc0, 0x8b, 0x03];
/// `mov dx, 0x510; in eax, dx`
const READ_PORT: [u8; 5] = [0x66, 0xba, 0x10, 0x05, 0xed];
/// `mov dx, 0x604; out dx, eax; hlt; jmp -3`
const TELL: [u8; 8] = [0x66, 0xba, 0x04, 0x06, 0xef, 0xf4, 0xeb, 0xfd];

/// A register whose read takes until it is told to go on.
struct Slow {
    entered: Sender<()>,
    go: Receiver<()>,
}

impl BusDevice for Slow {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        self.entered.send(()).unwrap();
        self.go.recv_timeout(LIMIT).unwrap();
        data.copy_from_slice(&ANSWER.to_le_bytes());
    }

    fn write(&mut self, _: u64, _: &[u8]) {}
}

/// A register that passes on what is written to it.
struct Heard(Sender<Vec<u8>>);

impl BusDevice for Heard {
    fn read(&mut self, _: u64, _: &mut [u8]) {}

    fn write(&mut self, _: u64, data: &[u8]) {
        self.0.send(data.to_vec()).unwrap();
    }
}

/// A machine with code in its memory, and the test's ends of its devices.
struct Rig {
    vcpu: VcpuFd,
    vm: Vm,
    outside: Outside,
    entered: Receiver<()>,
    go: Sender<()>,
    heard: Receiver<Vec<u8>>,
}

impl Rig {
    fn new(kvm: &Kvm, code: &[u8]) -> Self {
        install_kick_handler().unwrap();
        let memory = allocate(2, Backing::Anonymous, PageSize::Base).unwrap();
        memory.write_slice(code, CODE).unwrap();
        let vm = Vm::new(kvm, Arc::clone(&memory), None, DirtyLog::On).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let topology = Topology::new(1, Smt::Off).unwrap();
        let cpu = Cpu::new(kvm, topology, CpuTemplate::default()).unwrap();
        cpu.configure(&vcpu, 0).unwrap();
        Self::wired(vcpu, vm, memory)
    }

    fn wired(vcpu: VcpuFd, vm: Vm, memory: Arc<GuestMemoryMmap>) -> Self {
        let (entered_outbox, entered) = channel();
        let (go, go_inbox) = channel();
        let (heard_outbox, heard) = channel();
        let slow: Arc<Mutex<dyn BusDevice>> = Arc::new(Mutex::new(Slow {
            entered: entered_outbox,
            go: go_inbox,
        }));
        let mut mmio = Bus::new();
        mmio.insert(range(REGISTER), "slow", Arc::clone(&slow)).unwrap();
        let mut ports = Bus::new();
        ports.insert(range(IN_PORT), "slow", slow).unwrap();
        let heard_device = Arc::new(Mutex::new(Heard(heard_outbox)));
        ports.insert(range(OUT_PORT), "heard", heard_device).unwrap();
        let outside = Outside {
            ports: Arc::new(ports),
            mmio: Arc::new(mmio),
            memory,
            files: Vec::new(),
            ending: Ending::new().unwrap(),
            guest_end: EndSignal::new().unwrap(),
            counters: Arc::default(),
            share: Arc::default(),
        };
        Self {
            vcpu,
            vm,
            outside,
            entered,
            go,
            heard,
        }
    }

    /// Points the vCPU at the code, in long mode.
    fn boot(&self) {
        let entry = Entry {
            address: CODE,
            mode: EntryMode::Linux64,
        };
        regs::enter(&self.vcpu, &self.outside.memory, &entry).unwrap();
    }
}

fn range(start: u64) -> BusRange {
    BusRange { start, len: 4 }
}

/// Saves a guest that was kicked while a device answered its read, and lets its copy go on.
fn read_across_a_restore(kvm: &Kvm, read: &[u8]) {
    let code = [read, &TELL].concat();
    let rig = Rig::new(kvm, &code);
    rig.boot();
    let vcpu = Vcpu::spawn(0, rig.vcpu, rig.outside).unwrap();
    vcpu.run().unwrap();
    rig.entered.recv_timeout(LIMIT).unwrap();
    vcpu.kick().unwrap();
    rig.go.send(()).unwrap();
    vcpu.wait_parked().unwrap();
    let state = vcpu.save(rig.vm.state_shape()).unwrap();

    let registers: kvm_regs = bytes::to(&state.regs, "general registers").unwrap();
    assert_eq!(registers.rax, u64::from(ANSWER), "the read is completed");
    assert_eq!(
        registers.rip,
        CODE.0 + read.len() as u64,
        "and so is its instruction"
    );
    assert!(rig.heard.try_recv().is_err(), "and the guest has not gone on");

    let copy = Rig::new(kvm, &code);
    // Page tables lie in memory, which is not what this is about.
    copy.boot();
    state.restore(&copy.vcpu, copy.vm.state_shape()).unwrap();
    let vcpu = Vcpu::spawn(0, copy.vcpu, copy.outside).unwrap();
    vcpu.run().unwrap();
    assert_eq!(copy.heard.recv_timeout(LIMIT).unwrap(), ANSWER.to_le_bytes());
    assert!(copy.entered.try_recv().is_err(), "nothing is read twice");
}

#[test]
fn a_guest_that_is_kicked_in_a_read_of_a_device_has_read_it_when_it_is_saved() {
    let test = "a_guest_that_is_kicked_in_a_read_of_a_device_has_read_it_when_it_is_saved";
    let Some(kvm) = testing::kvm(test) else {
        return;
    };
    read_across_a_restore(&kvm, &READ_MEMORY);
    read_across_a_restore(&kvm, &READ_PORT);
}

#[test]
fn a_processor_that_waits_to_be_started_is_saved_and_waits_again() {
    let test = "a_processor_that_waits_to_be_started_is_saved_and_waits_again";
    let Some(kvm) = testing::kvm(test) else {
        return;
    };
    let waiting = |kvm: &Kvm| {
        let rig = Rig::new(kvm, &TELL);
        (rig.vm.create_vcpu(1).unwrap(), rig)
    };
    let (second, rig) = waiting(&kvm);
    let vcpu = Vcpu::spawn(1, second, rig.outside).unwrap();
    vcpu.run().unwrap();
    vcpu.kick().unwrap();
    vcpu.wait_parked().unwrap();
    let state = vcpu.save(rig.vm.state_shape()).unwrap();
    assert_eq!(state.mp_state, KVM_MP_STATE_UNINITIALIZED);

    let (second, rig) = waiting(&kvm);
    state.restore(&second, rig.vm.state_shape()).unwrap();
    let vcpu = Vcpu::spawn(1, second, rig.outside).unwrap();
    let again = vcpu.save(rig.vm.state_shape()).unwrap();
    assert_same(&again, &state);
}

#[test]
fn a_page_that_the_guest_wrote_is_told_once() {
    let Some(kvm) = testing::kvm("a_page_that_the_guest_wrote_is_told_once") else {
        return;
    };
    // mov ebx, 0x150000; mov [rbx], ebx
    let write = [0xbb, 0x00, 0x00, 0x15, 0x00, 0x89, 0x1b];
    let rig = Rig::new(&kvm, &[&write[..], &TELL].concat());
    rig.boot();
    let is_written = |pages: &[Vec<u64>], page: usize| pages[0][page / 64] >> (page % 64) & 1 == 1;
    let before = rig.vm.dirty_pages().unwrap();
    assert_eq!((before.len(), before[0].len()), (1, 512 / 64));
    assert!(!is_written(&before, 0x150));
    let vcpu = Vcpu::spawn(0, rig.vcpu, rig.outside).unwrap();
    vcpu.run().unwrap();
    rig.heard.recv_timeout(LIMIT).unwrap();
    vcpu.kick().unwrap();
    vcpu.wait_parked().unwrap();
    let pages = rig.vm.dirty_pages().unwrap();
    assert!(is_written(&pages, 0x150));
    assert!(!is_written(&pages, 0x151) && !is_written(&pages, 0x14f));
    assert!(!is_written(&rig.vm.dirty_pages().unwrap(), 0x150));
}
