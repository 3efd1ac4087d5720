//! A KVM for tests, where there is one.

use std::io::Write;

use kvm_ioctls::{Kvm, VcpuFd, VmFd};

/// A virtual machine with an interrupt controller and processors, but no memory.
pub(crate) struct TestVm {
    pub(crate) kvm: Kvm,
    pub(crate) vcpus: Vec<VcpuFd>,
    pub(crate) vm: VmFd,
}

/// Makes a machine; where /dev/kvm can't be opened, says on the uncaptured stderr which `test`
/// did not run, and why.
pub(crate) fn vm(test: &str, vcpus: u8) -> Option<TestVm> {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => {
            let line = format!("NOT RUN: {test}: /dev/kvm: {error}\n");
            std::io::stderr()
                .write_all(line.as_bytes())
                .expect("stderr can be written");
            return None;
        }
    };
    let vm = kvm.create_vm().expect("KVM makes a machine");
    vm.create_irq_chip().expect("KVM has an interrupt controller");
    let vcpus = (0..vcpus)
        .map(|index| vm.create_vcpu(index.into()).expect("KVM makes a processor"))
        .collect();
    Some(TestVm { kvm, vcpus, vm })
}
