//! Where things are in the guest's physical address space, and which interrupt lines they have.
//! I/O ports are constants of their devices, where a PC has them.
//!
//! What a guest can see is where Firecracker has it, so that images made for it find their
//! devices. Below 1 MiB:
//!
//! ```text
//! 0x00500  GDT, IDT of the boot processor
//! 0x06000  PVH start info, its module list, its memory map     or
//! 0x07000  Linux's zero page, page tables from 0x09000, setup_data at 0x10000
//! 0x20000  command line
//! 0x9fc00  MP table, end of usable low memory
//! 0xde000  VMClock
//! 0xdf000  VM generation ID
//! 0xe0000  ACPI: RSDP, then the other tables
//! ```

use coracle_devices::virtio::mmio::MMIO_LEN;
use coracle_devices::vmclock::VmClock;
use vm_memory::GuestAddress;

/// The boot processor's segment descriptors.
pub const BOOT_GDT: GuestAddress = GuestAddress(0x500);
/// The boot processor's empty interrupt table.
pub const BOOT_IDT: GuestAddress = GuestAddress(0x560);
/// `hvm_start_info` of the PVH protocol.
pub const PVH_START_INFO: GuestAddress = GuestAddress(0x6000);
/// `hvm_modlist_entry` for the initrd.
pub const PVH_MODULES: GuestAddress = GuestAddress(0x6040);
/// `hvm_memmap_table_entry` array.
pub const PVH_MEMORY_MAP: GuestAddress = GuestAddress(0x7000);
/// `boot_params` of the 64-bit Linux protocol; never used together with PVH.
pub const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
/// The stack that the 64-bit entry gets.
pub const BOOT_STACK: GuestAddress = GuestAddress(0x8ff0);
/// The top-level page table of the 64-bit entry.
pub const PML4: GuestAddress = GuestAddress(0x9000);
/// The second level, which maps 4 GiB.
pub const PDPT: GuestAddress = GuestAddress(0xa000);
/// Four page directories, one for each GiB.
pub const PAGE_DIRECTORIES: GuestAddress = GuestAddress(0xb000);
/// The list of `setup_data` nodes.
pub const SETUP_DATA: GuestAddress = GuestAddress(0x1_0000);
/// The command line.
pub const COMMAND_LINE: GuestAddress = GuestAddress(0x2_0000);

/// The MP table, at the last KiB of base memory, where kernels look first. From here to 1 MiB is
/// reserved in the guest's memory map.
pub const MP_TABLE: GuestAddress = GuestAddress(0x9_fc00);
/// The room up to the end of base memory.
pub const MP_TABLE_BYTES_MAX: usize = 0x400;
/// The page of the VMClock.
pub const VMCLOCK: VmClock = VmClock(GuestAddress(0xd_e000));
/// The page of the VM generation ID.
pub const VMGENID: GuestAddress = GuestAddress(0xd_f000);
/// The ACPI root pointer, at the start of the range that kernels search.
pub const RSDP: GuestAddress = GuestAddress(0xe_0000);
/// The other ACPI tables.
pub const ACPI_TABLES: GuestAddress = GuestAddress(0xe_0040);
/// Kernels load from here on.
pub const HIGH_LOAD_START: GuestAddress = GuestAddress(0x10_0000);

/// Memory ends here and goes on at [`HIGH_MEMORY_START`].
pub const MMIO_GAP_START: GuestAddress = GuestAddress(0xc000_0000);
/// The boot timer, where it was asked for; nothing else lies in its page.
pub const BOOT_TIMER: GuestAddress = GuestAddress(0xc000_0000);
/// The boot timer's page.
pub const BOOT_TIMER_BYTES: u64 = 0x1000;
/// The first virtio-mmio window.
pub const VIRTIO_MMIO_START: GuestAddress = GuestAddress(0xc000_1000);
/// The window of one virtio-mmio device, and the distance to the next.
pub const VIRTIO_MMIO_BYTES: u32 = 0x1000;
const _: () = assert!(
    VIRTIO_MMIO_BYTES as u64 == MMIO_LEN,
    "a window holds the transport's registers"
);
/// The interrupt controller.
pub const IOAPIC: u32 = 0xfec0_0000;
/// The local APICs.
pub const LAPIC: u32 = 0xfee0_0000;
/// One page for KVM_SET_IDENTITY_MAP_ADDR (Intel without unrestricted guests).
pub const IDENTITY_MAP: GuestAddress = GuestAddress(0xfffb_c000);
/// Three pages for KVM_SET_TSS_ADDR.
pub const TSS: GuestAddress = GuestAddress(0xfffb_d000);
/// Memory above the gap.
pub const HIGH_MEMORY_START: GuestAddress = GuestAddress(1 << 32);

/// Files that the guest has in its address space (virtio-pmem) begin here, or behind memory that reaches further: 256 GiB, within
/// the 39 bits of the smallest processors that run virtual machines.
pub const PMEM_START: GuestAddress = GuestAddress(256 << 30);
/// They end here, 2 TiB.
pub const PMEM_END: GuestAddress = GuestAddress(2 << 40);

/// The first interrupt line for virtio-mmio devices (0 to 4 belong to the PC).
pub const VIRTIO_IRQ_FIRST: u32 = 5;
/// The last line of the IOAPIC.
pub const IRQ_LAST: u32 = 23;
/// As many virtio-mmio devices as there are lines, one line for events set aside.
pub const VIRTIO_DEVICES_MAX: u32 = IRQ_LAST - VIRTIO_IRQ_FIRST;
/// Where a guest finds one virtio-mmio device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioWindow {
    /// The first of [`VIRTIO_MMIO_BYTES`] bytes.
    pub address: u64,
    /// Its interrupt line.
    pub irq: u32,
}

impl VirtioWindow {
    /// All of them.
    pub fn all() -> impl Iterator<Item = VirtioWindow> {
        (0..).map_while(VirtioWindow::of_device)
    }

    /// The window of the device number `index`, as long as there are lines.
    pub fn of_device(index: u32) -> Option<VirtioWindow> {
        (index < VIRTIO_DEVICES_MAX).then(|| VirtioWindow {
            address: VIRTIO_MMIO_START.0 + u64::from(index) * u64::from(VIRTIO_MMIO_BYTES),
            irq: VIRTIO_IRQ_FIRST + index,
        })
    }
}

/// The line of the generic event device, for the VM generation ID, the VMClock and devices that come: the last one.
pub const EVENT_IRQ: u32 = IRQ_LAST;
/// The most virtual processors of a machine.
pub const VCPUS_MAX: u8 = 32;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_virtio_window_is_its_own_and_so_is_its_line() {
        let windows: Vec<_> = VirtioWindow::all().collect();
        assert_eq!(
            windows.first(),
            Some(&VirtioWindow {
                address: 0xc000_1000,
                irq: 5
            })
        );
        assert_eq!(
            windows.last(),
            Some(&VirtioWindow {
                address: 0xc001_2000,
                irq: 22
            })
        );
        assert!(windows.iter().all(|window| window.irq != EVENT_IRQ));
    }
}
