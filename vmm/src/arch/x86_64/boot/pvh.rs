//! PVH's start info, version 1, with memory map and module list
//! (Xen's `public/arch-x86/hvm/start_info.h`).

use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{Address, Bytes, GuestMemoryMmap};

use super::{BootError, Initrd, layout, memory_map};

const MAGIC: u32 = 0x336e_c578;
/// The first version that has a memory map.
const VERSION: u32 = 1;

/// Writes the start info and what it points to; the command line is already in its place.
pub(super) fn write(memory: &GuestMemoryMmap, initrd: Option<Initrd>) -> Result<(), BootError> {
    let map: Vec<hvm_memmap_table_entry> = memory_map::ranges(memory)
        .iter()
        .map(|range| hvm_memmap_table_entry {
            addr: range.start,
            size: range.size_bytes,
            type_: range.kind as u32,
            reserved: 0,
        })
        .collect();
    let info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        flags: 0,
        nr_modules: initrd.map_or(0, |_| 1),
        modlist_paddr: initrd.map_or(0, |_| layout::PVH_MODULES.0),
        cmdline_paddr: layout::COMMAND_LINE.0,
        rsdp_paddr: layout::RSDP.0,
        memmap_paddr: layout::PVH_MEMORY_MAP.0,
        memmap_entries: u32::try_from(map.len()).expect("a handful of entries"),
        reserved: 0,
    };
    let written = || {
        memory.write_obj(info, layout::PVH_START_INFO)?;
        if let Some(initrd) = initrd {
            let module = hvm_modlist_entry {
                paddr: initrd.address.0,
                size: initrd.size_bytes,
                ..Default::default()
            };
            memory.write_obj(module, layout::PVH_MODULES)?;
        }
        let mut at = layout::PVH_MEMORY_MAP;
        for entry in map {
            memory.write_obj(entry, at)?;
            at = at.unchecked_add(size_of::<hvm_memmap_table_entry>() as u64);
        }
        Ok(())
    };
    written().map_err(|source| BootError::Write {
        what: "PVH start info",
        source,
    })
}
