//! The kernel loader. An input is how to boot, the initrd and then the kernel:
//!
//! | bytes | |
//! |---|---|
//! | 1 | protocol, in the two low bits; bit 2: there is an initrd |
//! | 1 | memory: 2^n MiB, up to 32 |
//! | 1 | length of the kernel's file, as a power of two; 0: as long as its bytes |
//! | 2 | length of the initrd |

use std::fs::File;
use std::io::Write;

use coracle_vmm::arch::x86_64::boot::cmdline::Cmdline;
use coracle_vmm::arch::x86_64::boot::{BootProtocol, BootSource, EntryMode, load};
use coracle_vmm::arch::x86_64::layout;
use coracle_vmm::memory::{Backing, PageSize, allocate, low_memory_end};
use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::Input;

const START_INFO_MAGIC: u32 = 0x336e_c578;
const ZERO_PAGE_HEADER: u64 = 0x202;

pub(crate) fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let flags = input.u8();
    let protocol = match flags & 3 {
        0 => BootProtocol::Pvh,
        1 => BootProtocol::Linux64,
        _ => BootProtocol::Auto,
    };
    let mib = 1 << (input.u8() % 6);
    let length_power = input.u8() % 50;
    let initrd_bytes = input.u16();
    let initrd = (flags & 4 != 0).then(|| file(input.take(initrd_bytes.into())));
    let kernel = file(input.rest());
    if length_power > 0 {
        kernel.set_len(1 << length_power).expect("a memfd can be sparse");
    }
    let cmdline = Cmdline::compose(Some("console=ttyS0 -- init"), None, &[]).expect("a short line");
    let memory = allocate(mib, Backing::Anonymous, PageSize::Base).expect("a little memory");
    let source = BootSource {
        kernel: &kernel,
        initrd: initrd.as_ref(),
        cmdline: &cmdline,
        protocol,
        rng_seed: [0x5a; 32],
    };
    match load(&memory, &source) {
        Ok(entry) => {
            let end = low_memory_end(&memory);
            assert!(
                (layout::HIGH_LOAD_START..end).contains(&entry.address),
                "{entry:?}"
            );
            check_tables(&memory, entry.mode, &cmdline);
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// What the loader wrote for the kernel is there, and where others write there is nothing of the kernel.
fn check_tables(memory: &GuestMemoryMmap, mode: EntryMode, cmdline: &Cmdline) {
    let line = cmdline.as_c_str().to_bytes_with_nul();
    let mut written = vec![0; line.len()];
    memory
        .read_slice(&mut written, layout::COMMAND_LINE)
        .expect("low memory is memory");
    assert_eq!(written, line);
    // Where the machine's tables go, which the loader knows nothing of.
    let reserved = layout::HIGH_LOAD_START.0 - layout::MP_TABLE.0;
    let mut tables = vec![0; usize::try_from(reserved).expect("less than 1 MiB")];
    memory
        .read_slice(&mut tables, layout::MP_TABLE)
        .expect("low memory is memory");
    assert!(tables.iter().all(|byte| *byte == 0), "the kernel lies over them");
    let (at, magic) = match mode {
        EntryMode::Pvh => (layout::PVH_START_INFO, START_INFO_MAGIC),
        EntryMode::Linux64 => (
            GuestAddress(layout::ZERO_PAGE.0 + ZERO_PAGE_HEADER),
            u32::from_le_bytes(*b"HdrS"),
        ),
    };
    let found: u32 = memory.read_obj(at).expect("low memory is memory");
    assert_eq!(found, magic, "{mode:?}");
}

fn file(bytes: &[u8]) -> File {
    let memfd = memfd_create("fuzz", MemfdFlags::CLOEXEC).expect("a descriptor is free: none leaks");
    let mut file = File::from(memfd);
    file.write_all(bytes).expect("a memfd takes a few bytes");
    file
}
