//! A KVM for tests, where there is one.

use std::io::Write;

use kvm_ioctls::{Kvm, VcpuFd, VmFd};

/// A virtual machine with an interrupt controller and processors, but no memory.
pub(crate) struct TestVm {
    pub(crate) kvm: Kvm,
    pub(crate) vcpus: Vec<VcpuFd>,
    pub(crate) vm: VmFd,
}

/// Opens /dev/kvm; where that can't be done, says on the uncaptured stderr which `test` did not run, and why.
pub(crate) fn kvm(test: &str) -> Option<Kvm> {
    Kvm::new()
        .inspect_err(|error| {
            let line = format!("NOT RUN: {test}: /dev/kvm: {error}\n");
            std::io::stderr()
                .write_all(line.as_bytes())
                .expect("stderr can be written");
        })
        .ok()
}

/// Makes a machine, where there is a KVM.
pub(crate) fn vm(test: &str, vcpus: u8) -> Option<TestVm> {
    let kvm = kvm(test)?;
    let vm = kvm.create_vm().expect("KVM makes a machine");
    vm.create_irq_chip().expect("KVM has an interrupt controller");
    let vcpus = (0..vcpus)
        .map(|index| vm.create_vcpu(index.into()).expect("KVM makes a processor"))
        .collect();
    Some(TestVm { kvm, vcpus, vm })
}
