//! Puts a kernel, its initrd and its command line where a boot protocol wants them.
//!
//! | file | protocol | entered |
//! |---|---|---|
//! | ELF with a PVH note | PVH | in 32-bit mode, `ebx` = start info |
//! | ELF without | 64-bit Linux | in long mode, `rsi` = zero page |
//! | bzImage | 64-bit Linux | the same, 0x200 after the start |

mod bzimage;
pub mod cmdline;
mod elf;
mod image;
mod initrd;
mod linux64;
mod memory_map;
mod pvh;

use std::fs::File;
use std::io;

use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use self::cmdline::Cmdline;
use self::image::{Format, Image};
use super::layout;

/// Which protocol to start a kernel by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BootProtocol {
    /// PVH where the kernel offers it, as Firecracker does; else the 64-bit Linux protocol.
    #[default]
    Auto,
    /// PVH, or an error.
    Pvh,
    /// The 64-bit Linux protocol, also for a kernel that offers PVH.
    Linux64,
}

/// What to boot.
pub struct BootSource<'a> {
    /// An ELF `vmlinux` or a bzImage.
    pub kernel: &'a File,
    /// An initial file system, handed over as it is.
    pub initrd: Option<&'a File>,
    /// The complete command line.
    pub cmdline: &'a Cmdline,
    /// How to enter the kernel.
    pub protocol: BootProtocol,
    /// Fresh random bytes for the guest's generator. The Linux protocol has a field for them,
    /// PVH has none.
    pub rng_seed: [u8; 32],
}

/// Where and how the boot processor starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The first instruction.
    pub address: GuestAddress,
    /// The processor's state there.
    pub mode: EntryMode,
}

/// The processor state that a protocol asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryMode {
    /// Flat 32-bit protected mode, paging off.
    Pvh,
    /// Long mode with the low 4 GiB mapped one to one.
    Linux64,
}

/// What a user can get wrong about a kernel or an initrd, with what to do about it.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the text of an error is its documentation")]
pub enum BootError {
    #[error("cannot read the {what}")]
    Read {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("the kernel is {found}; Coracle boots an uncompressed x86-64 ELF `vmlinux` or a bzImage")]
    Format { found: String },
    #[error("the kernel's {what}: the file is damaged or not a kernel")]
    Damaged { what: String },
    #[error("the bzImage {what}: build the kernel with CONFIG_X86_64, version 3.8 or newer")]
    BzImage { what: String },
    #[error("the kernel has no PVH entry: build it with CONFIG_PVH=y, or use the Linux protocol")]
    NoPvhEntry,
    #[error("a bzImage has no PVH entry: boot its `vmlinux`, or use the Linux protocol")]
    PvhBzImage,
    #[error(
        "the kernel wants memory at {start:#x}, below {min:#x} where kernels start (is it an ordinary program?)",
        min = layout::HIGH_LOAD_START.0
    )]
    TooLow { start: u64 },
    #[error(
        "the kernel needs memory from {start:#x} to {end:#x}, but the guest's ends at {memory_end:#x}: \
         give it at least {} MiB", end.div_ceil(1 << 20)
    )]
    KernelTooLarge { start: u64, end: u64, memory_end: u64 },
    #[error("the initrd is an empty file: make it anew, or leave `initrd_path` out")]
    EmptyInitrd,
    #[error(
        "an initrd of {initrd_bytes} bytes does not fit between the kernel's end at {kernel_end:#x} \
         and {top:#x}: give the guest at least {} MiB", (kernel_end + initrd_bytes).div_ceil(1 << 20) + 1
    )]
    InitrdTooLarge {
        initrd_bytes: u64,
        kernel_end: u64,
        top: u64,
    },
    #[error(transparent)]
    Cmdline(#[from] cmdline::CmdlineError),
    #[error("cannot write the {what} to guest memory")]
    Write {
        what: &'static str,
        #[source]
        source: GuestMemoryError,
    },
}

/// Loads everything that `source` names; the boot processor may then start at the entry.
///
/// Nothing else may have been written to guest memory below 1 MiB before, except the tables of
/// [`super::tables`], which lie elsewhere.
pub fn load(memory: &GuestMemoryMmap, source: &BootSource<'_>) -> Result<Entry, BootError> {
    let image = Image::new(source.kernel, "kernel")?;
    let kernel = match image.format()? {
        Format::Elf => elf::load(memory, &image, source.protocol)?,
        Format::BzImage if source.protocol == BootProtocol::Pvh => return Err(BootError::PvhBzImage),
        Format::BzImage => bzimage::load(memory, &image)?,
    };
    source.cmdline.check_length(kernel.cmdline_bytes_max)?;
    memory
        .write_slice(source.cmdline.as_c_bytes(), layout::COMMAND_LINE)
        .map_err(|source| BootError::Write {
            what: "command line",
            source,
        })?;
    let initrd = match source.initrd {
        Some(file) => Some(initrd::load(memory, file, &kernel)?),
        None => None,
    };
    match kernel.entry.mode {
        EntryMode::Pvh => pvh::write(memory, initrd)?,
        EntryMode::Linux64 => linux64::write(memory, &kernel, initrd, source)?,
    }
    Ok(kernel.entry)
}

/// A kernel in guest memory.
struct Kernel {
    entry: Entry,
    /// The first address that the kernel leaves free, counting what it unpacks to.
    end: u64,
    /// The last byte that an initrd may have.
    initrd_last: u64,
    cmdline_bytes_max: usize,
    /// A bzImage's own header, which the zero page repeats.
    header: Option<linux_loader::loader::bootparam::setup_header>,
}

/// An initrd in guest memory.
#[derive(Clone, Copy)]
struct Initrd {
    address: GuestAddress,
    size_bytes: u64,
}

#[cfg(test)]
mod tests;
