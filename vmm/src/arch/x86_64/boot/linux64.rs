//! The zero page of the 64-bit Linux protocol (Linux's `Documentation/arch/x86/boot.rst`).

use linux_loader::loader::bootparam::{SETUP_RNG_SEED, boot_e820_entry, boot_params, setup_header};
use vm_memory::{Bytes, GuestMemoryMmap};

use super::{BootError, BootSource, Initrd, Kernel, layout, memory_map};

const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
/// What an ELF kernel is told, having no header of its own: the newest protocol we follow.
const VERSION: u16 = 0x020f;
/// A loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
/// Must not be zero; the default of CONFIG_PHYSICAL_ALIGN is a multiple of it.
const KERNEL_ALIGNMENT: u32 = 0x20_0000;
const LOADED_HIGH: u8 = 1;

/// Writes the zero page and a random seed behind it.
pub(super) fn write(
    memory: &GuestMemoryMmap,
    kernel: &Kernel,
    initrd: Option<Initrd>,
    source: &BootSource<'_>,
) -> Result<(), BootError> {
    let low = |address: u64| u32::try_from(address).expect("loaded below 4 GiB");
    let mut header = kernel.header.unwrap_or_else(|| setup_header {
        kernel_alignment: KERNEL_ALIGNMENT,
        version: VERSION,
        loadflags: LOADED_HIGH,
        ..Default::default()
    });
    header.boot_flag = BOOT_FLAG;
    header.header = HEADER_MAGIC;
    header.type_of_loader = LOADER_UNDEFINED;
    header.cmd_line_ptr = low(layout::COMMAND_LINE.0);
    header.cmdline_size = u32::try_from(source.cmdline.as_c_bytes().len()).expect("bounded");
    header.setup_data = layout::SETUP_DATA.0;
    if let Some(initrd) = initrd {
        header.ramdisk_image = low(initrd.address.0);
        header.ramdisk_size = low(initrd.size_bytes);
    }
    let mut params = boot_params {
        hdr: header,
        acpi_rsdp_addr: layout::RSDP.0,
        ..Default::default()
    };
    let map = memory_map::ranges(memory);
    params.e820_entries = u8::try_from(map.len()).expect("a handful of entries");
    let mut table = params.e820_table;
    for (entry, range) in table.iter_mut().zip(&map) {
        *entry = boot_e820_entry {
            addr: range.start,
            size: range.size_bytes,
            r#type: range.kind as u32,
        };
    }
    params.e820_table = table;
    let seed = seed_node(&source.rng_seed);
    memory
        .write_obj(params, layout::ZERO_PAGE)
        .and_then(|()| memory.write_slice(&seed, layout::SETUP_DATA))
        .map_err(|source| BootError::Write {
            what: "zero page",
            source,
        })
}

/// A `setup_data` node: no next one, type, length, then the seed, which the kernel erases.
fn seed_node(seed: &[u8; 32]) -> Vec<u8> {
    let length = u32::try_from(seed.len()).expect("32");
    let mut node = Vec::with_capacity(16 + seed.len());
    node.extend_from_slice(&0u64.to_le_bytes());
    node.extend_from_slice(&SETUP_RNG_SEED.to_le_bytes());
    node.extend_from_slice(&length.to_le_bytes());
    node.extend_from_slice(seed);
    node
}
