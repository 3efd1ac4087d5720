//! The initrd: at the top of low memory, above the kernel.

use std::fs::File;

use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::image::Image;
use super::{BootError, Initrd, Kernel};
use crate::memory::low_memory_end;

const PAGE_BYTES: u64 = 4096;

/// Copies `file` as high as the memory and the kernel's own limit allow, on a page boundary.
pub(super) fn load(memory: &GuestMemoryMmap, file: &File, kernel: &Kernel) -> Result<Initrd, BootError> {
    let image = Image::new(file, "initrd")?;
    if image.len_bytes == 0 {
        return Err(BootError::EmptyInitrd);
    }
    let top = low_memory_end(memory).0.min(kernel.initrd_last.saturating_add(1));
    let start = top
        .checked_sub(image.len_bytes)
        .map(|start| start & !(PAGE_BYTES - 1));
    let start = start
        .filter(|start| *start >= kernel.end)
        .ok_or(BootError::InitrdTooLarge {
            initrd_bytes: image.len_bytes,
            kernel_end: kernel.end,
            top,
        })?;
    let size = usize::try_from(image.len_bytes).expect("fits in guest memory");
    image.copy(memory, GuestAddress(start), 0, size)?;
    Ok(Initrd {
        address: GuestAddress(start),
        size_bytes: image.len_bytes,
    })
}
