//! A real virtual processor runs the first instructions of a kernel, by each protocol.
#![expect(unsafe_code, reason = "KVM_SET_USER_MEMORY_REGION is given host addresses")]
#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

use std::io::Write;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VcpuExit;

use super::boot::cmdline::Cmdline;
use super::boot::{self, BootProtocol, BootSource};
use super::cpu::{Cpu, Smt, Topology};
use super::template::CpuTemplate;
use super::{regs, testing};
use crate::memory::{Backing, PageSize, allocate, slots};

/// An ELF file whose one segment, itself, lies at 1 MiB, with `code` at its entry; the same
/// address is in a PVH note.
fn kernel(code: &[u8]) -> std::fs::File {
    const LOAD: u64 = 0x10_0000;
    const NOTE: u64 = 64 + 2 * 56;
    const CODE: u64 = NOTE + 20;
    let segment = |kind: u32, offset: u64, address: u64, size: u64| {
        let fields = [offset, address, address, size, size, 1]
            .map(u64::to_le_bytes)
            .concat();
        [&kind.to_le_bytes()[..], &[7, 0, 0, 0], &fields].concat()
    };
    let size = CODE + code.len() as u64;
    let header = [
        &b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0"[..],
        &[LOAD + CODE, 64, 0].map(u64::to_le_bytes).concat(),
        &[0u16, 0, 64, 56, 2, 0, 0, 0].map(u16::to_le_bytes).concat(),
    ]
    .concat();
    let entry = u32::try_from(LOAD + CODE).unwrap();
    let note = [
        &[4u32, 4, 18].map(u32::to_le_bytes).concat()[..],
        b"Xen\0",
        &entry.to_le_bytes(),
    ]
    .concat();
    let mut file = tempfile::tempfile().unwrap();
    for part in [
        &header,
        &segment(1, 0, LOAD, size),
        &segment(4, NOTE, 0, 20),
        &note,
        code,
    ] {
        file.write_all(part).unwrap();
    }
    file
}

/// Runs `code` by `protocol` until it writes to a port; the port and what it wrote.
fn first_output(test: &str, protocol: BootProtocol, code: &[u8]) -> Option<(u16, Vec<u8>)> {
    let mut machine = testing::vm(test, 1)?;
    let memory = allocate(2, Backing::Anonymous, PageSize::Base).unwrap();
    for slot in slots(&memory) {
        let region = kvm_userspace_memory_region {
            slot: slot.index,
            flags: 0,
            guest_phys_addr: slot.guest_address.0,
            memory_size: slot.size_bytes,
            userspace_addr: slot.host_address,
        };
        // SAFETY: `memory` is dropped after the machine's last instruction, at the end of this function.
        unsafe { machine.vm.set_user_memory_region(region) }.unwrap();
    }
    let (kernel, cmdline) = (kernel(code), Cmdline::compose(None, None, &[]).unwrap());
    let source = BootSource {
        kernel: &kernel,
        initrd: None,
        cmdline: &cmdline,
        protocol,
        rng_seed: [0; 32],
    };
    let entry = boot::load(&memory, &source).unwrap();
    let topology = Topology::new(1, Smt::Off).unwrap();
    let cpu = Cpu::new(&machine.kvm, topology, CpuTemplate::default()).unwrap();
    let mut vcpu = machine.vcpus.pop().unwrap();
    cpu.configure(&vcpu, 0).unwrap();
    regs::enter(&vcpu, &memory, &entry).unwrap();
    match vcpu.run().unwrap() {
        VcpuExit::IoOut(port, data) => Some((port, data.to_vec())),
        exit => panic!("the kernel left by {exit:?}"),
    }
}

#[test]
fn a_pvh_kernel_finds_its_start_info() {
    // mov eax, [ebx]; mov dx, 0x604; out dx, eax
    let code = [0x8b, 0x03, 0x66, 0xba, 0x04, 0x06, 0xef];
    let test = "a_pvh_kernel_finds_its_start_info";
    let Some(output) = first_output(test, BootProtocol::Pvh, &code) else {
        return;
    };
    assert_eq!(output, (0x604, 0x336e_c578u32.to_le_bytes().to_vec()));
}

#[test]
fn a_linux_kernel_finds_its_zero_page() {
    // mov eax, [rsi + 0x202]; mov dx, 0x604; out dx, eax
    let code = [0x8b, 0x86, 0x02, 0x02, 0, 0, 0x66, 0xba, 0x04, 0x06, 0xef];
    let test = "a_linux_kernel_finds_its_zero_page";
    let Some(output) = first_output(test, BootProtocol::Linux64, &code) else {
        return;
    };
    assert_eq!(output, (0x604, b"HdrS".to_vec()));
}
