//! Tiny kernels, a few dozen instructions each, that say what a boot protocol handed over.
//!
//! They are assembled with the tests and wrapped into an ELF file or a bzImage here, so every boot protocol can be
//! tested in milliseconds and with values that no real kernel would use. Each prints one line, `probe PROTOCOL
//! cmdline=<…> initrd=<…> rsdp=1`, with what it found, and ends with status 42 by the exit device, or by the
//! keyboard controller where there is none.

#![expect(
    unsafe_code,
    reason = "the assembled bytes lie between two symbols of the linker"
)]

use std::arch::global_asm;
use std::path::{Path, PathBuf};

use crate::Outcome;

/// Where the probes are loaded: 1 MiB, as Linux.
const LOAD_ADDRESS: u64 = 0x10_0000;
/// The status that a probe ends with.
pub const PROBE_STATUS: u8 = 42;

// The 64-bit Linux protocol: RSI is the address of boot_params (Linux, Documentation/arch/x86/boot.rst and zero-page.rst).
global_asm!(
    ".section .rodata.probe64, \"a\"",
    ".balign 16",
    "probe64_start:",
    "mov rbx, rsi",
    "mov dx, 0x3f8",
    "lea rsi, [rip + 60f]",
    "call 20f",
    // hdr.header
    "cmp dword ptr [rbx + 0x202], 0x53726448",
    "jne 90f",
    "lea rsi, [rip + 61f]",
    "call 20f",
    // hdr.cmd_line_ptr
    "mov esi, dword ptr [rbx + 0x228]",
    "call 20f",
    "lea rsi, [rip + 62f]",
    "call 20f",
    // hdr.ramdisk_image, ramdisk_size
    "mov ecx, dword ptr [rbx + 0x21c]",
    "mov esi, dword ptr [rbx + 0x218]",
    "call 30f",
    "lea rsi, [rip + 63f]",
    "call 20f",
    // acpi_rsdp_addr
    "mov rsi, qword ptr [rbx + 0x70]",
    "call 40f",
    "90: lea rsi, [rip + 64f]",
    "call 20f",
    "mov dx, 0x604",
    "mov al, 42",
    "out dx, al",
    "mov dx, 0x64",
    "mov al, 0xfe",
    "out dx, al",
    "91: hlt",
    "jmp 91b",
    // Prints the text at RSI up to its NUL.
    "20: test rsi, rsi",
    "jz 22f",
    "21: mov al, byte ptr [rsi]",
    "test al, al",
    "jz 22f",
    "out dx, al",
    "inc rsi",
    "jmp 21b",
    "22: ret",
    // Prints the ECX bytes at RSI.
    "30: test ecx, ecx",
    "jz 31f",
    "mov al, byte ptr [rsi]",
    "out dx, al",
    "inc rsi",
    "dec ecx",
    "jmp 30b",
    "31: ret",
    // Prints 1 if RSI points to an RSDP, else 0.
    "40: mov al, 0x30",
    "test rsi, rsi",
    "jz 41f",
    "mov rcx, 0x2052545020445352",
    "cmp qword ptr [rsi], rcx",
    "jne 41f",
    "inc al",
    "41: out dx, al",
    "ret",
    "60: .asciz \"probe linux64\"",
    "61: .asciz \" cmdline=<\"",
    "62: .asciz \"> initrd=<\"",
    "63: .asciz \"> rsdp=\"",
    "64: .asciz \"\\n\"",
    "probe64_end:",
    ".previous",
);

// PVH: 32-bit protected mode, EBX is the address of hvm_start_info (Xen, include/public/arch-x86/hvm/start_info.h).
global_asm!(
    ".section .rodata.probe_pvh, \"a\"",
    ".balign 16",
    "probe_pvh_start:",
    ".code32",
    "mov esp, 0x9f000",
    "mov dx, 0x3f8",
    // A call leaves the address of the text behind it: there is no addressing relative to EIP.
    "call 3f",
    ".asciz \"probe pvh\"",
    "3: pop esi",
    "call 20f",
    "cmp dword ptr [ebx], 0x336ec578",
    "jne 90f",
    "call 3f",
    ".asciz \" cmdline=<\"",
    "3: pop esi",
    "call 20f",
    // cmdline_paddr
    "mov esi, dword ptr [ebx + 24]",
    "call 20f",
    "call 3f",
    ".asciz \"> initrd=<\"",
    "3: pop esi",
    "call 20f",
    // nr_modules, modlist_paddr
    "cmp dword ptr [ebx + 12], 0",
    "je 2f",
    "mov edi, dword ptr [ebx + 16]",
    "mov esi, dword ptr [edi]",
    "mov ecx, dword ptr [edi + 8]",
    "call 30f",
    "2: call 3f",
    ".asciz \"> rsdp=\"",
    "3: pop esi",
    "call 20f",
    // rsdp_paddr
    "mov esi, dword ptr [ebx + 32]",
    "call 40f",
    "90: call 3f",
    ".asciz \"\\n\"",
    "3: pop esi",
    "call 20f",
    "mov dx, 0x604",
    "mov al, 42",
    "out dx, al",
    "mov dx, 0x64",
    "mov al, 0xfe",
    "out dx, al",
    "91: hlt",
    "jmp 91b",
    "20: test esi, esi",
    "jz 22f",
    "21: mov al, byte ptr [esi]",
    "test al, al",
    "jz 22f",
    "out dx, al",
    "inc esi",
    "jmp 21b",
    "22: ret",
    "30: test ecx, ecx",
    "jz 31f",
    "mov al, byte ptr [esi]",
    "out dx, al",
    "inc esi",
    "dec ecx",
    "jmp 30b",
    "31: ret",
    "40: mov al, 0x30",
    "test esi, esi",
    "jz 41f",
    "cmp dword ptr [esi], 0x20445352",
    "jne 41f",
    "cmp dword ptr [esi + 4], 0x20525450",
    "jne 41f",
    "inc al",
    "41: out dx, al",
    "ret",
    ".code64",
    "probe_pvh_end:",
    ".previous",
);

/// The protocol that a probe is entered by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// An ELF file with a PVH note.
    Pvh,
    /// An ELF file without one: the 64-bit Linux protocol at its entry point.
    Linux64,
    /// A bzImage: the 64-bit Linux protocol at 0x200 behind its load address.
    BzImage,
}

impl Protocol {
    /// The name that the probe prints.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pvh => "pvh",
            Self::Linux64 | Self::BzImage => "linux64",
        }
    }
}

/// Writes a probe for this protocol into the directory.
///
/// # Errors
///
/// When the file cannot be written.
pub fn write(protocol: Protocol, directory: &Path) -> Outcome<PathBuf> {
    let image = match protocol {
        Protocol::Pvh => elf(pvh_code(), Note::Pvh),
        Protocol::Linux64 => elf(linux64_code(), Note::None),
        Protocol::BzImage => bzimage(linux64_code()),
    };
    let path = directory.join(format!("test-probe-{protocol:?}"));
    std::fs::write(&path, image)?;
    Ok(path)
}

/// Writes a kernel that halts for ever and takes no interrupt.
///
/// # Errors
///
/// When the file cannot be written.
pub fn write_idle(path: &Path) -> Outcome {
    // cli; hlt; jmp to the hlt
    Ok(std::fs::write(path, elf(&[0xfa, 0xf4, 0xeb, 0xfd], Note::None))?)
}

/// Writes a kernel that tells the boot timer that it has booted, and halts for ever.
///
/// # Errors
///
/// When the file cannot be written.
pub fn write_booted(path: &Path) -> Outcome {
    // mov ebx, 0xc0000000; mov byte [ebx], 123; cli; hlt; jmp to the hlt
    let code = [0xbb, 0, 0, 0, 0xc0, 0xc6, 0x03, 123, 0xfa, 0xf4, 0xeb, 0xfd];
    Ok(std::fs::write(path, elf(&code, Note::Pvh))?)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Note {
    Pvh,
    None,
}

fn linux64_code() -> &'static [u8] {
    unsafe extern "C" {
        static probe64_start: u8;
        static probe64_end: u8;
    }
    between(&raw const probe64_start, &raw const probe64_end)
}

fn pvh_code() -> &'static [u8] {
    unsafe extern "C" {
        static probe_pvh_start: u8;
        static probe_pvh_end: u8;
    }
    between(&raw const probe_pvh_start, &raw const probe_pvh_end)
}

fn between(start: *const u8, end: *const u8) -> &'static [u8] {
    let length = end.addr() - start.addr();
    // SAFETY: both symbols bound one block that the assembler above put into read-only memory, start first.
    unsafe { std::slice::from_raw_parts(start, length) }
}

/// An ELF executable with one loaded segment, and a PVH note if asked for.
fn elf(code: &[u8], note: Note) -> Vec<u8> {
    const HEADER_BYTES: u64 = 64;
    const SEGMENT_BYTES: u64 = 56;
    const CODE_OFFSET: u64 = 0x1000;
    // XEN_ELFNOTE_PHYS32_ENTRY: owner "Xen", type 18, a 4-byte address.
    let mut note_bytes = Vec::new();
    for word in [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), 0x10_0000] {
        note_bytes.extend(u32::to_le_bytes(word));
    }
    let note_offset = HEADER_BYTES + 2 * SEGMENT_BYTES;
    let segments: u16 = if note == Note::Pvh { 2 } else { 1 };
    let code_length = u64::try_from(code.len()).unwrap_or_default();

    let mut image = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    image.extend([2, 0, 62, 0, 1, 0, 0, 0]); // ET_EXEC, EM_X86_64, EV_CURRENT
    for address in [LOAD_ADDRESS, HEADER_BYTES, 0] {
        image.extend(address.to_le_bytes()); // e_entry, e_phoff, e_shoff
    }
    image.extend(0u32.to_le_bytes()); // e_flags
    for field in [64, 56, segments, 64, 0, 0] {
        image.extend(u16::to_le_bytes(field));
    }
    let mut segment = |kind: u32, flags: u32, fields: [u64; 6]| {
        image.extend(kind.to_le_bytes());
        image.extend(flags.to_le_bytes());
        fields.iter().for_each(|field| image.extend(field.to_le_bytes()));
    };
    segment(
        1,
        7,
        [
            CODE_OFFSET,
            LOAD_ADDRESS,
            LOAD_ADDRESS,
            code_length,
            code_length,
            0x1000,
        ],
    );
    segment(4, 4, [note_offset, 0, 0, 20, 20, 4]);
    image.extend(note_bytes);
    image.resize(usize::try_from(CODE_OFFSET).unwrap_or_default(), 0);
    image.extend(code);
    image
}

/// A bzImage of protocol 2.15 with one setup sector and the code at the 64-bit entry point.
fn bzimage(code: &[u8]) -> Vec<u8> {
    const SECTOR_BYTES: usize = 512;
    let mut image = vec![0; 2 * SECTOR_BYTES];
    let mut put = |offset: usize, bytes: &[u8]| {
        image
            .splice(offset..offset + bytes.len(), bytes.iter().copied())
            .count()
    };
    put(0x1f1, &[1]); // setup_sects
    put(0x1f4, &0x100u32.to_le_bytes()); // syssize, in 16-byte units
    put(0x1fe, &0xaa55u16.to_le_bytes()); // boot_flag
    put(0x200, &[0xeb, 0x66]); // jump over the header, whose length this is
    put(0x202, b"HdrS");
    put(0x206, &0x020fu16.to_le_bytes()); // version
    put(0x211, &[1]); // loadflags: LOADED_HIGH
    put(0x214, &0x10_0000u32.to_le_bytes()); // code32_start
    put(0x22c, &0x7fff_ffffu32.to_le_bytes()); // initrd_addr_max
    put(0x230, &0x20_0000u32.to_le_bytes()); // kernel_alignment
    put(0x236, &1u16.to_le_bytes()); // xloadflags: XLF_KERNEL_64
    put(0x238, &2047u32.to_le_bytes()); // cmdline_size
    put(0x258, &LOAD_ADDRESS.to_le_bytes()); // pref_address
    put(0x260, &0x10_0000u32.to_le_bytes()); // init_size
    // The 32-bit entry comes first; the 64-bit one lies 0x200 behind it.
    image.resize(image.len() + 0x200, 0xf4);
    image.extend(code);
    image.resize(2 * SECTOR_BYTES + 0x1000, 0);
    image
}
