//! The boot processor's registers, segments and page tables at a kernel's entry.
//!
//! PVH: flat 32-bit segments, paging off, `ebx` = start info. 64-bit Linux: long mode, the low
//! 4 GiB mapped one to one, `rsi` = zero page. The other processors need none of this: they wait
//! for the guest's INIT and SIPI.

use kvm_bindings::{kvm_fpu, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::boot::{Entry, EntryMode};
use super::layout;

/// Why the boot processor could not be set up.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the text of an error is its documentation")]
pub enum RegsError {
    #[error("cannot write the {what} to guest memory")]
    Table {
        what: &'static str,
        #[source]
        source: GuestMemoryError,
    },
    #[error("{ioctl} failed")]
    Kvm {
        ioctl: &'static str,
        #[source]
        source: kvm_ioctls::Error,
    },
}

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS is always set; interrupts are off.
const RFLAGS: u64 = 2;

const PRESENT_WRITABLE: u64 = 0b11;
const PAGE_2_MIB: u64 = 1 << 7;
const PAGE_BYTES: u64 = 4096;
/// Long mode starts with as many GiB mapped as lie below 4 GiB.
const GIB_MAPPED: u64 = 4;

/// The FPU's control word and SSE's MXCSR as after FNINIT and reset.
const FPU_CONTROL: u16 = 0x37f;
const MXCSR: u32 = 0x1f80;

/// Points the boot processor at `entry`, and writes the tables that its mode needs to memory.
pub fn enter(vcpu: &VcpuFd, memory: &GuestMemoryMmap, entry: &Entry) -> Result<(), RegsError> {
    let gdt = Gdt::new(entry.mode);
    gdt.write(memory)?;
    let mut sregs = vcpu.get_sregs().map_err(kvm("KVM_GET_SREGS"))?;
    gdt.select(&mut sregs);
    match entry.mode {
        EntryMode::Pvh => {
            sregs.cr0 = CR0_PE | CR0_ET;
            sregs.cr4 = 0;
        }
        EntryMode::Linux64 => {
            write_page_tables(memory).map_err(|source| RegsError::Table {
                what: "page tables",
                source,
            })?;
            sregs.cr3 = layout::PML4.0;
            sregs.cr4 |= CR4_PAE;
            sregs.cr0 |= CR0_PE | CR0_ET | CR0_PG;
            sregs.efer |= EFER_LME | EFER_LMA;
        }
    }
    vcpu.set_sregs(&sregs).map_err(kvm("KVM_SET_SREGS"))?;
    vcpu.set_regs(&general(entry)).map_err(kvm("KVM_SET_REGS"))
}

/// Sets the floating-point unit as it is after reset and FNINIT.
pub fn reset_fpu(vcpu: &VcpuFd) -> Result<(), RegsError> {
    let fpu = kvm_fpu {
        fcw: FPU_CONTROL,
        mxcsr: MXCSR,
        ..Default::default()
    };
    vcpu.set_fpu(&fpu).map_err(kvm("KVM_SET_FPU"))
}

fn kvm(ioctl: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> RegsError {
    move |source| RegsError::Kvm { ioctl, source }
}

fn general(entry: &Entry) -> kvm_regs {
    let mut regs = kvm_regs {
        rip: entry.address.0,
        rflags: RFLAGS,
        ..Default::default()
    };
    match entry.mode {
        EntryMode::Pvh => regs.rbx = layout::PVH_START_INFO.0,
        EntryMode::Linux64 => {
            regs.rsi = layout::ZERO_PAGE.0;
            regs.rsp = layout::BOOT_STACK.0;
            regs.rbp = layout::BOOT_STACK.0;
        }
    }
    regs
}

/// Descriptors at the selectors that the Linux protocol names: code 0x10, data 0x18, TSS 0x20.
struct Gdt {
    code: Descriptor,
    data: Descriptor,
    tss: Descriptor,
}

const CODE_INDEX: u16 = 2;
const DATA_INDEX: u16 = 3;
const TSS_INDEX: u16 = 4;
const GDT_ENTRIES: usize = 5;

/// One segment in the form that both the table and KVM are made from.
#[derive(Clone, Copy)]
struct Descriptor {
    limit: u32,
    kind: u8,
    /// Code or data, not a system segment.
    user: u8,
    wide: Width,
}

#[derive(Clone, Copy, PartialEq)]
enum Width {
    Bits32,
    Bits64,
    System,
}

impl Gdt {
    fn new(mode: EntryMode) -> Gdt {
        let code_width = match mode {
            EntryMode::Pvh => Width::Bits32,
            EntryMode::Linux64 => Width::Bits64,
        };
        Gdt {
            // Execute and read, accessed.
            code: Descriptor {
                limit: 0xffff_ffff,
                kind: 0xb,
                user: 1,
                wide: code_width,
            },
            // Read and write, accessed.
            data: Descriptor {
                limit: 0xffff_ffff,
                kind: 0x3,
                user: 1,
                wide: Width::Bits32,
            },
            // Busy TSS: VM entry asks for one. Nothing uses it.
            tss: Descriptor {
                limit: 0x67,
                kind: 0xb,
                user: 0,
                wide: Width::System,
            },
        }
    }

    fn write(&self, memory: &GuestMemoryMmap) -> Result<(), RegsError> {
        let table = [0, 0, self.code.entry(), self.data.entry(), self.tss.entry()];
        let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        memory
            .write_slice(&bytes, layout::BOOT_GDT)
            .and_then(|()| memory.write_obj(0u64, layout::BOOT_IDT))
            .map_err(|source| RegsError::Table {
                what: "segment descriptors",
                source,
            })
    }

    fn select(&self, sregs: &mut kvm_bindings::kvm_sregs) {
        let data = self.data.segment(DATA_INDEX);
        sregs.cs = self.code.segment(CODE_INDEX);
        sregs.ds = data;
        sregs.es = data;
        sregs.fs = data;
        sregs.gs = data;
        sregs.ss = data;
        sregs.tr = self.tss.segment(TSS_INDEX);
        sregs.gdt.base = layout::BOOT_GDT.0;
        sregs.gdt.limit = u16::try_from(GDT_ENTRIES * 8 - 1).expect("39");
        sregs.idt.base = layout::BOOT_IDT.0;
        sregs.idt.limit = 7;
    }
}

impl Descriptor {
    fn granular(self) -> bool {
        self.limit > 0xf_ffff
    }

    /// The eight bytes in the table; bases are all zero (SDM volume 3, 3.4.5).
    fn entry(self) -> u64 {
        let limit = u64::from(if self.granular() {
            self.limit >> 12
        } else {
            self.limit
        });
        let access = u64::from(self.kind | self.user << 4 | 1 << 7);
        let mut flags = u64::from(self.granular()) << 3;
        flags |= match self.wide {
            Width::Bits32 => 1 << 2,
            Width::Bits64 => 1 << 1,
            Width::System => 0,
        };
        limit & 0xffff | access << 40 | (limit >> 16) << 48 | flags << 52
    }

    fn segment(self, index: u16) -> kvm_segment {
        kvm_segment {
            base: 0,
            limit: self.limit,
            selector: index * 8,
            type_: self.kind,
            present: 1,
            dpl: 0,
            db: u8::from(self.wide == Width::Bits32),
            s: self.user,
            l: u8::from(self.wide == Width::Bits64),
            g: u8::from(self.granular()),
            ..Default::default()
        }
    }
}

fn write_page_tables(memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    memory.write_obj(layout::PDPT.0 | PRESENT_WRITABLE, layout::PML4)?;
    for gib in 0..GIB_MAPPED {
        let directory = layout::PAGE_DIRECTORIES.unchecked_add(gib * PAGE_BYTES);
        memory.write_obj(
            directory.0 | PRESENT_WRITABLE,
            layout::PDPT.unchecked_add(gib * 8),
        )?;
        write_page_directory(memory, directory, gib << 30)?;
    }
    Ok(())
}

fn write_page_directory(
    memory: &GuestMemoryMmap,
    at: GuestAddress,
    first_byte: u64,
) -> Result<(), GuestMemoryError> {
    let pages = (0..512u64).map(|page| (first_byte + (page << 21)) | PAGE_2_MIB | PRESENT_WRITABLE);
    let bytes: Vec<u8> = pages.flat_map(u64::to_le_bytes).collect();
    memory.write_slice(&bytes, at)
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
    use crate::memory::{Backing, PageSize, allocate};

    #[test]
    fn descriptors_match_the_processor_manual() {
        let pvh = Gdt::new(EntryMode::Pvh);
        assert_eq!(pvh.code.entry(), 0x00cf_9b00_0000_ffff);
        assert_eq!(pvh.data.entry(), 0x00cf_9300_0000_ffff);
        assert_eq!(pvh.tss.entry(), 0x0000_8b00_0000_0067);
        assert_eq!(Gdt::new(EntryMode::Linux64).code.entry(), 0x00af_9b00_0000_ffff);
    }

    #[test]
    fn the_page_tables_map_four_gib_to_themselves() {
        let memory = allocate(1, Backing::Anonymous, PageSize::Base).unwrap();
        write_page_tables(&memory).unwrap();
        let read = |at: u64| memory.read_obj::<u64>(GuestAddress(at)).unwrap();
        let table = |entry: u64| entry & !0xfff;
        for address in [0u64, 0x20_0000, 0x1234_5678, 0xc000_0000, 0xffff_ffff] {
            let pdpt = table(read(layout::PML4.0 + (address >> 39) * 8));
            let directory = table(read(pdpt + (address >> 30) * 8));
            let page = read(directory + ((address >> 21) & 511) * 8);
            assert_eq!(page, (address & !0x1f_ffff) | 0x83, "{address:#x}");
        }
        assert_eq!(read(layout::PDPT.0 + 4 * 8), 0);
    }

    #[test]
    fn a_vcpu_takes_the_state_of_each_entry() {
        let Some(vm) = testing::vm("a_vcpu_takes_the_state_of_each_entry", 1) else {
            return;
        };
        let vcpu = &vm.vcpus[0];
        let memory = allocate(1, Backing::Anonymous, PageSize::Base).unwrap();
        reset_fpu(vcpu).unwrap();
        assert_eq!(vcpu.get_fpu().unwrap().fcw, FPU_CONTROL);

        let entry = Entry {
            address: GuestAddress(0x10_0020),
            mode: EntryMode::Pvh,
        };
        enter(vcpu, &memory, &entry).unwrap();
        let (regs, sregs) = (vcpu.get_regs().unwrap(), vcpu.get_sregs().unwrap());
        assert_eq!(
            (regs.rip, regs.rbx, regs.rflags),
            (0x10_0020, layout::PVH_START_INFO.0, RFLAGS)
        );
        assert_eq!((sregs.cr0 & (CR0_PE | CR0_PG), sregs.cr4), (CR0_PE, 0));
        assert_eq!((sregs.cs.db, sregs.cs.l, sregs.cs.limit), (1, 0, 0xffff_ffff));

        let entry = Entry {
            address: GuestAddress(0x100_0000),
            mode: EntryMode::Linux64,
        };
        enter(vcpu, &memory, &entry).unwrap();
        let (regs, sregs) = (vcpu.get_regs().unwrap(), vcpu.get_sregs().unwrap());
        assert_eq!((regs.rip, regs.rsi), (0x100_0000, layout::ZERO_PAGE.0));
        assert_eq!((sregs.cr3, sregs.efer), (layout::PML4.0, EFER_LME | EFER_LMA));
        assert_eq!(
            (sregs.cs.selector, sregs.cs.l, sregs.ds.selector),
            (0x10, 1, 0x18)
        );
    }
}
