//! A bzImage: its protected-mode part to 1 MiB, its 64-bit entry 0x200 after that.

use linux_loader::loader::bootparam::{XLF_KERNEL_64, setup_header};
use vm_memory::{ByteValued, GuestAddress, GuestMemoryMmap};

use super::image::Image;
use super::{BootError, Entry, EntryMode, Kernel, cmdline};
use crate::arch::x86_64::layout;
use crate::memory::low_memory_end;

/// The setup header starts here in the file and in the zero page.
const SETUP_HEADER_OFFSET: u64 = 0x1f1;
const SECTOR_BYTES: u64 = 512;
/// Boot protocol 2.12 (Linux 3.8) brought `xloadflags` and with it the 64-bit entry.
const VERSION_MIN: u16 = 0x020c;
const LOADED_HIGH: u8 = 1;
/// The 64-bit entry's distance from the load address.
const ENTRY_64_OFFSET: u64 = 0x200;

/// Copies the kernel and keeps its setup header for the zero page.
pub(super) fn load(memory: &GuestMemoryMmap, image: &Image<'_>) -> Result<Kernel, BootError> {
    let mut header = setup_header::default();
    image.read_into(header.as_mut_slice(), SETUP_HEADER_OFFSET)?;
    let version = header.version;
    let xloadflags = header.xloadflags;
    if version < VERSION_MIN || header.loadflags & LOADED_HIGH == 0 {
        let what = format!(
            "has boot protocol {}.{:02}, older than 2.12",
            version >> 8,
            version & 0xff
        );
        return Err(BootError::BzImage { what });
    }
    if xloadflags & XLF_KERNEL_64 == 0 {
        return Err(BootError::BzImage {
            what: "has no 64-bit entry".into(),
        });
    }
    let setup_bytes = (u64::from(setup_sectors(&header)) + 1) * SECTOR_BYTES;
    let size_bytes = image
        .len_bytes
        .checked_sub(setup_bytes)
        .filter(|bytes| *bytes > ENTRY_64_OFFSET);
    let size_bytes = size_bytes.ok_or_else(|| BootError::Damaged {
        what: format!(
            "setup part of {setup_bytes} bytes leaves nothing of a file of {}",
            image.len_bytes
        ),
    })?;

    let start = layout::HIGH_LOAD_START.0;
    // The kernel unpacks itself at its preferred address, and works within init_size there.
    let unpacked_end = header.pref_address.saturating_add(header.init_size.into());
    let end = unpacked_end.max(start + size_bytes);
    let memory_end = low_memory_end(memory).0;
    if end > memory_end {
        return Err(BootError::KernelTooLarge {
            start,
            end,
            memory_end,
        });
    }
    let size = usize::try_from(size_bytes).expect("fits in guest memory");
    image.copy(memory, GuestAddress(start), setup_bytes, size)?;
    header.code32_start = u32::try_from(start).expect("1 MiB");
    let kernel_max = usize::try_from(header.cmdline_size).unwrap_or(usize::MAX);
    Ok(Kernel {
        entry: Entry {
            address: GuestAddress(start + ENTRY_64_OFFSET),
            mode: EntryMode::Linux64,
        },
        end,
        initrd_last: header.initrd_addr_max.into(),
        cmdline_bytes_max: cmdline::BYTES_MAX.min(kernel_max),
        header: Some(header),
    })
}

/// The protocol counts an absent figure as four.
fn setup_sectors(header: &setup_header) -> u8 {
    match header.setup_sects {
        0 => 4,
        sectors => sectors,
    }
}
