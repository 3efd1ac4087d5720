//! Kernels built for the purpose, sound and broken, and the memory that they would start with.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test's panic is its failure"
)]

use std::io::Write;

use linux_loader::loader::bootparam::{XLF_KERNEL_64, boot_params, setup_header};
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::ByteValued;

use super::*;
use crate::memory::{Backing, PageSize, allocate};

const MIB: u64 = 1 << 20;
const SEED: [u8; 32] = [0x5a; 32];

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn memory(mib: u64) -> std::sync::Arc<GuestMemoryMmap> {
    allocate(mib, Backing::Anonymous, PageSize::Base).unwrap()
}

/// A small ELF kernel: one segment of `CODE`, and perhaps a PVH note after another note.
struct Elf {
    address: u64,
    entry: u64,
    memory_bytes: u64,
    file_bytes: u64,
    pvh: Option<u32>,
}

const CODE: &[u8; 8] = b"\xf4kernel\xf4";
const CODE_OFFSET: u64 = 0x200;

impl Default for Elf {
    fn default() -> Elf {
        Elf {
            address: MIB,
            entry: MIB + 1,
            memory_bytes: 0x3000,
            file_bytes: CODE.len() as u64,
            pvh: Some(0x10_0004),
        }
    }
}

impl Elf {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; 0x200];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[16] = 2;
        bytes[18] = 62;
        bytes[24..32].copy_from_slice(&self.entry.to_le_bytes());
        bytes[32..40].copy_from_slice(&64u64.to_le_bytes());
        bytes[54] = 56;
        bytes[56] = 2;
        let mut segment = |at: usize, kind: u32, fields: [(usize, u64); 4]| {
            bytes[at..at + 4].copy_from_slice(&kind.to_le_bytes());
            for (offset, value) in fields {
                bytes[at + offset..at + offset + 8].copy_from_slice(&value.to_le_bytes());
            }
        };
        let notes = self.notes();
        segment(
            64,
            1,
            [
                (8, CODE_OFFSET),
                (24, self.address),
                (32, self.file_bytes),
                (40, self.memory_bytes),
            ],
        );
        segment(120, 4, [(8, 0x100), (24, 0), (32, notes.len() as u64), (40, 0)]);
        bytes[0x100..0x100 + notes.len()].copy_from_slice(&notes);
        bytes.extend_from_slice(CODE);
        bytes
    }

    fn notes(&self) -> Vec<u8> {
        let note = |name: &[u8], kind: u32, descriptor: &[u8]| {
            let mut note = Vec::new();
            for value in [name.len(), descriptor.len(), usize::try_from(kind).unwrap()] {
                note.extend_from_slice(&u32::try_from(value).unwrap().to_le_bytes());
            }
            for part in [name, descriptor] {
                note.extend_from_slice(part);
                note.resize(note.len().next_multiple_of(4), 0);
            }
            note
        };
        let mut notes = note(b"Linux\0", 0x101, b"12345");
        if let Some(entry) = self.pvh {
            notes.extend(note(b"Xen\0", 18, &u64::from(entry).to_le_bytes()));
        }
        notes
    }
}

/// A bzImage of one setup sector and `payload_bytes` that is nothing but header.
fn bzimage(change: impl FnOnce(&mut setup_header), payload_bytes: usize) -> Vec<u8> {
    let mut header = setup_header {
        setup_sects: 1,
        header: u32::from_le_bytes(*b"HdrS"),
        version: 0x020f,
        loadflags: 1,
        code32_start: 0x10_0000,
        xloadflags: XLF_KERNEL_64,
        cmdline_size: 255,
        pref_address: 0x100_0000,
        init_size: 0x20_0000,
        initrd_addr_max: 0x7fff_ffff,
        ..Default::default()
    };
    change(&mut header);
    let mut bytes = vec![0x90; 1024 + payload_bytes];
    let at = 0x1f1;
    bytes[at..at + size_of::<setup_header>()].copy_from_slice(header.as_slice());
    bytes
}

fn boot(
    memory: &GuestMemoryMmap,
    kernel: &[u8],
    initrd: Option<&[u8]>,
    protocol: BootProtocol,
) -> Result<Entry, BootError> {
    let cmdline = Cmdline::compose(Some("console=ttyS0"), None, &[]).unwrap();
    let initrd = initrd.map(file);
    let kernel = file(kernel);
    let source = BootSource {
        kernel: &kernel,
        initrd: initrd.as_ref(),
        cmdline: &cmdline,
        protocol,
        rng_seed: SEED,
    };
    load(memory, &source)
}

fn refusal(kernel: &[u8], initrd: Option<&[u8]>, protocol: BootProtocol) -> String {
    boot(&memory(16), kernel, initrd, protocol)
        .unwrap_err()
        .to_string()
}

#[test]
fn an_elf_kernel_starts_by_pvh_where_it_can() {
    let memory = memory(16);
    let entry = boot(&memory, &Elf::default().bytes(), None, BootProtocol::Auto).unwrap();
    assert_eq!(
        entry,
        Entry {
            address: GuestAddress(0x10_0004),
            mode: EntryMode::Pvh
        }
    );
    let code: [u8; 8] = memory.read_obj(GuestAddress(MIB)).unwrap();
    assert_eq!(&code, CODE);
}

#[test]
fn an_elf_kernel_without_a_note_starts_by_the_linux_protocol() {
    let elf = Elf {
        pvh: None,
        ..Elf::default()
    }
    .bytes();
    let entry = boot(&memory(16), &elf, None, BootProtocol::Auto).unwrap();
    assert_eq!(
        entry,
        Entry {
            address: GuestAddress(MIB + 1),
            mode: EntryMode::Linux64
        }
    );
    assert!(refusal(&elf, None, BootProtocol::Pvh).contains("CONFIG_PVH=y"));
}

#[test]
fn the_linux_protocol_can_be_asked_for() {
    let entry = boot(&memory(16), &Elf::default().bytes(), None, BootProtocol::Linux64).unwrap();
    assert_eq!(entry.mode, EntryMode::Linux64);
}

#[test]
fn pvh_start_info_points_to_everything() {
    let memory = memory(16);
    boot(
        &memory,
        &Elf::default().bytes(),
        Some(b"initrd"),
        BootProtocol::Pvh,
    )
    .unwrap();
    let info: hvm_start_info = memory.read_obj(layout::PVH_START_INFO).unwrap();
    assert_eq!((info.magic, info.version), (0x336e_c578, 1));
    assert_eq!(info.rsdp_paddr, layout::RSDP.0);
    let mut line = [0; 14];
    memory
        .read_slice(&mut line, GuestAddress(info.cmdline_paddr))
        .unwrap();
    assert_eq!(&line, b"console=ttyS0\0");
    let module: hvm_modlist_entry = memory.read_obj(GuestAddress(info.modlist_paddr)).unwrap();
    assert_eq!(
        (info.nr_modules, module.paddr, module.size),
        (1, 16 * MIB - 4096, 6)
    );
    let initrd: [u8; 6] = memory.read_obj(GuestAddress(module.paddr)).unwrap();
    assert_eq!(&initrd, b"initrd");
    assert_eq!(info.memmap_entries, 3);
    let last: hvm_memmap_table_entry = memory.read_obj(GuestAddress(info.memmap_paddr + 48)).unwrap();
    assert_eq!((last.addr, last.size, last.type_), (MIB, 15 * MIB, 1));
}

#[test]
fn the_zero_page_points_to_everything() {
    let memory = memory(16);
    boot(
        &memory,
        &Elf::default().bytes(),
        Some(b"initrd"),
        BootProtocol::Linux64,
    )
    .unwrap();
    let page: boot_params = memory.read_obj(layout::ZERO_PAGE).unwrap();
    let header = page.hdr;
    let (magic, flag, loader) = (header.header, header.boot_flag, header.type_of_loader);
    assert_eq!((magic, flag, loader), (0x5372_6448, 0xaa55, 0xff));
    let (line, line_bytes) = (header.cmd_line_ptr, header.cmdline_size);
    assert_eq!((u64::from(line), line_bytes), (layout::COMMAND_LINE.0, 14));
    let (image, size) = (header.ramdisk_image, header.ramdisk_size);
    assert_eq!((u64::from(image), size), (16 * MIB - 4096, 6));
    let (rsdp, entries, last) = (page.acpi_rsdp_addr, page.e820_entries, page.e820_table[2]);
    assert_eq!((rsdp, entries), (layout::RSDP.0, 3));
    let (start, bytes, kind) = (last.addr, last.size, last.r#type);
    assert_eq!((start, bytes, kind), (MIB, 15 * MIB, 1));
    let mut node = [0; 48];
    memory
        .read_slice(&mut node, GuestAddress(header.setup_data))
        .unwrap();
    assert_eq!(node[..8], [0; 8], "it is the last node");
    assert_eq!(node[8..16], [9, 0, 0, 0, 32, 0, 0, 0]);
    assert_eq!(node[16..], SEED);
}

#[test]
fn a_bzimage_starts_at_its_64_bit_entry_and_keeps_its_header() {
    let memory = memory(32);
    let entry = boot(&memory, &bzimage(|_| {}, 4096), None, BootProtocol::Auto).unwrap();
    assert_eq!(
        entry,
        Entry {
            address: GuestAddress(0x10_0200),
            mode: EntryMode::Linux64
        }
    );
    let payload: u32 = memory.read_obj(GuestAddress(0x10_0200)).unwrap();
    assert_eq!(payload, 0x9090_9090);
    let page: boot_params = memory.read_obj(layout::ZERO_PAGE).unwrap();
    let (preferred, init_size) = (page.hdr.pref_address, page.hdr.init_size);
    assert_eq!((preferred, init_size), (0x100_0000, 0x20_0000));
}

#[test]
fn an_initrd_stays_clear_of_where_a_bzimage_unpacks() {
    let memory = memory(32);
    let image = bzimage(|header| header.initrd_addr_max = 0x13f_ffff, 4096);
    boot(&memory, &image, Some(&[1; 0x10_0000]), BootProtocol::Auto).unwrap();
    let page: boot_params = memory.read_obj(layout::ZERO_PAGE).unwrap();
    let start = page.hdr.ramdisk_image;
    assert_eq!(start, 0x130_0000);
    let error = boot(&memory, &image, Some(&[1; 0x20_1000]), BootProtocol::Auto).unwrap_err();
    assert!(
        matches!(
            error,
            BootError::InitrdTooLarge {
                kernel_end: 0x120_0000,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn a_bzimage_that_cannot_start_says_why() {
    let old = bzimage(|header| header.version = 0x0206, 4096);
    assert!(refusal(&old, None, BootProtocol::Auto).contains("boot protocol 2.06"));
    let narrow = bzimage(|header| header.xloadflags = 0, 4096);
    assert!(refusal(&narrow, None, BootProtocol::Auto).contains("no 64-bit entry"));
    let large = bzimage(|header| header.init_size = 0x1000_0000, 4096);
    let text = refusal(&large, None, BootProtocol::Auto);
    assert!(
        text.contains("0x11000000") && text.contains("at least 272 MiB"),
        "{text}"
    );
    let empty = bzimage(|_| {}, 0);
    assert!(refusal(&empty, None, BootProtocol::Auto).contains("damaged"));
    assert!(refusal(&bzimage(|_| {}, 4096), None, BootProtocol::Pvh).contains("no PVH entry"));
}

#[test]
fn a_kernel_that_does_not_fit_says_by_how_much() {
    let large = Elf {
        memory_bytes: 64 * MIB,
        ..Elf::default()
    }
    .bytes();
    let text = refusal(&large, None, BootProtocol::Auto);
    assert!(
        text.contains("0x100000 to 0x4100000") && text.contains("at least 65 MiB"),
        "{text}"
    );
    let low = Elf {
        address: 0x8000,
        ..Elf::default()
    }
    .bytes();
    assert!(refusal(&low, None, BootProtocol::Auto).contains("0x8000, below 0x100000"));
    let endless = Elf {
        memory_bytes: u64::MAX,
        ..Elf::default()
    }
    .bytes();
    assert!(matches!(
        boot(&memory(16), &endless, None, BootProtocol::Auto),
        Err(BootError::KernelTooLarge { .. })
    ));
}

#[test]
fn a_damaged_elf_file_says_where() {
    let outside = Elf {
        entry: 0x20_0000,
        pvh: None,
        ..Elf::default()
    }
    .bytes();
    assert!(refusal(&outside, None, BootProtocol::Auto).contains("entry point 0x200000"));
    let cut = Elf {
        file_bytes: 0x1000,
        ..Elf::default()
    }
    .bytes();
    assert!(refusal(&cut, None, BootProtocol::Auto).contains("takes 4096 bytes at offset 512"));
    let inverted = Elf {
        memory_bytes: 4,
        ..Elf::default()
    }
    .bytes();
    assert!(refusal(&inverted, None, BootProtocol::Auto).contains("8 bytes for 4 of memory"));
    let mut headers = Elf::default().bytes();
    headers[57] = 0xff;
    assert!(refusal(&headers, None, BootProtocol::Auto).contains("65282 program headers"));
    let short = &Elf::default().bytes()[..40];
    assert!(refusal(short, None, BootProtocol::Auto).contains("cut off at 40 bytes"));
}

#[test]
fn an_initrd_that_does_not_fit_says_by_how_much() {
    let kernel = Elf::default().bytes();
    let text = refusal(&kernel, Some(&vec![1; 15 << 20]), BootProtocol::Auto);
    assert!(
        text.contains("15728640 bytes") && text.contains("at least 18 MiB"),
        "{text}"
    );
    assert!(refusal(&kernel, Some(b""), BootProtocol::Auto).contains("empty"));
}

#[test]
fn a_command_line_longer_than_the_kernel_takes_is_refused() {
    let memory = memory(32);
    let cmdline = Cmdline::compose(Some(&"x".repeat(300)), None, &[]).unwrap();
    let kernel = file(&bzimage(|_| {}, 4096));
    let protocol = BootProtocol::Auto;
    let source = BootSource {
        kernel: &kernel,
        initrd: None,
        cmdline: &cmdline,
        protocol,
        rng_seed: SEED,
    };
    let text = load(&memory, &source).unwrap_err().to_string();
    assert!(text.contains("301 bytes") && text.contains("takes 255"), "{text}");
}

proptest::proptest! {
    /// Whatever a file holds, loading it ends, with an entry inside the guest's memory or an error.
    #[test]
    fn no_kernel_file_can_break_the_loader(
        changes in proptest::collection::vec((0usize..0x208, proptest::num::u8::ANY), 0..12),
        cut in 0usize..0x210,
    ) {
        let memory = memory(16);
        for mut bytes in [Elf::default().bytes(), bzimage(|_| {}, 64)] {
            for (at, byte) in &changes {
                bytes[*at] = *byte;
            }
            for kernel in [&bytes[..], &bytes[..cut.min(bytes.len())]] {
                if let Ok(entry) = boot(&memory, kernel, None, BootProtocol::Auto) {
                    assert!(entry.address.0 < 16 * MIB);
                }
            }
        }
    }
}
