//! From the assembly to the first line of Rust, and what the monitor left in memory: PVH's start info.

#![expect(
    unsafe_code,
    reason = "reads structures at addresses that the monitor passes in a register"
)]

use core::arch::global_asm;
use core::slice;

use crate::memory::{Memory, Region};
use crate::tables::{self, CPUS_MAX};
use crate::{ending, machine};
use instrument::cmdline::CommandLine;
use instrument::width::size;

global_asm!(
    include_str!("boot.s"),
    cpus_max = const CPUS_MAX,
    options(att_syntax)
);

unsafe extern "C" {
    static start_info_address: u64;
}

/// What PVH calls `hvm_start_info`, version 1.
#[repr(C)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    modules: u32,
    modules_address: u64,
    command_line_address: u64,
    rsdp_address: u64,
    memory_map_address: u64,
    memory_map_entries: u32,
    reserved: u32,
}

/// One entry of its memory map.
#[repr(C)]
struct MapEntry {
    base: u64,
    bytes: u64,
    kind: u32,
    reserved: u32,
}

const START_INFO_MAGIC: u32 = 0x336e_c578;
const KIND_RAM: u32 = 1;
/// A command line without its end within this much is taken for missing.
const COMMAND_LINE_BYTES_MAX: usize = 65536;

/// The first instruction at CPL 3: the interrupt descriptors come first, so that a fault says what it is.
#[unsafe(no_mangle)]
extern "C" fn start() -> ! {
    tables::prepare_cpu(0);
    tables::fill_interrupt_descriptors();
    // SAFETY: the entry code wrote it before the first line of Rust, and nothing writes it again.
    let address = unsafe { start_info_address };
    // SAFETY: PVH puts the address of a start info into EBX; the low 4 GiB are mapped.
    let Some(info) = (unsafe { (address as *const StartInfo).as_ref() }) else {
        ending::finish(ending::STATUS_USAGE)
    };
    if info.magic != START_INFO_MAGIC || info.version == 0 {
        crate::say!("no PVH start info of version 1 at {address:#x}\n");
        ending::finish(ending::STATUS_USAGE)
    }
    machine::run(
        command_line(info.command_line_address),
        memory_of(info),
        info.rsdp_address,
    )
}

/// The command line; empty where there is none or where it is not UTF-8.
fn command_line(address: u64) -> CommandLine<'static> {
    if address == 0 {
        return CommandLine::new("");
    }
    // SAFETY: PVH promises a NUL-terminated string here, in memory that nothing uses again; the limit is below it.
    let text = unsafe { slice::from_raw_parts(address as *const u8, COMMAND_LINE_BYTES_MAX) };
    let end = text.iter().position(|&byte| byte == 0).unwrap_or(0);
    let text = text.get(..end).unwrap_or_default();
    CommandLine::new(core::str::from_utf8(text).unwrap_or_default())
}

/// The RAM of the memory map.
fn memory_of(info: &StartInfo) -> Memory {
    // SAFETY: PVH promises this many entries at this address; they are mapped, and nothing writes them.
    let entries = unsafe {
        slice::from_raw_parts(
            info.memory_map_address as *const MapEntry,
            size(u64::from(info.memory_map_entries)),
        )
    };
    let ram = entries.iter().filter(|entry| entry.kind == KIND_RAM);
    Memory::new(ram.map(|entry| Region {
        base: entry.base,
        end: entry.base.saturating_add(entry.bytes),
    }))
}
