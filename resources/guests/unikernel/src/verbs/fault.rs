//! `fault`: the ways in which a guest dies.

#![expect(unsafe_code, reason = "faults on purpose")]

use core::arch::asm;

use instrument::cmdline::{ArgumentError, Command};

use super::Failure;
use crate::{ending, say, tables};

/// The first address that no table maps.
const UNMAPPED: u64 = 512 << 30;
/// An address that is not canonical.
const IMPOSSIBLE: u64 = 1 << 63;

/// Faults as `kind=` says. Returns only where the host executes what others cannot emulate.
pub fn fault(command: &Command<'static>) -> Result<(), Failure> {
    command.allow(&["kind"])?;
    match command.text("kind") {
        // SAFETY: #GP; its handler does not return.
        Some("gp") => unsafe {
            asm!("mov {scratch}, [{scratch}]", "ud2", scratch = in(reg) IMPOSSIBLE, options(noreturn))
        },
        // SAFETY: #PF; its handler does not return.
        Some("pf") => unsafe {
            asm!("mov {scratch}, [{scratch}]", "ud2", scratch = in(reg) UNMAPPED, options(noreturn))
        },
        // SAFETY: #UD; its handler does not return.
        Some("ud") => unsafe { asm!("ud2", options(noreturn)) },
        // SAFETY: #DE; its handler does not return.
        Some("de") => unsafe {
            asm!(
                "xor eax, eax",
                "xor edx, edx",
                "xor ecx, ecx",
                "div ecx",
                "ud2",
                options(noreturn)
            )
        },
        // SAFETY: #SS; its handler has a stack of its own and does not return.
        Some("stack") => unsafe {
            asm!("mov rsp, {nowhere}", "push rax", "ud2", nowhere = in(reg) IMPOSSIBLE, options(noreturn))
        },
        Some("triple") => ending::triple_fault(),
        Some("emulation") => {
            tables::make_breakpoint_unemulated();
            // SAFETY: int3 executes POPCNT on EAX at CPL 0 and returns, or the host gives up.
            unsafe { asm!("int3", inout("eax") 0xffu32 => _) };
            tables::fill_interrupt_descriptors();
            say!("fault: the host executed the instruction\n");
            Ok(())
        }
        kind => {
            let choices = "gp, pf, ud, de, stack, triple, emulation";
            Err(ArgumentError::Impossible {
                key: "kind",
                value: kind.unwrap_or_default(),
                choices,
            }
            .into())
        }
    }
}
