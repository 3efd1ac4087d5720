//! `registers`: what is in the registers stays there, however often the guest is stopped.

#![expect(unsafe_code, reason = "holds values in registers that Rust has no words for")]

use core::arch::asm;

use instrument::cmdline::Command;
use instrument::random::mix;

use super::Failure;
use crate::machine::Machine;
use crate::{cpu, say};

/// What is held: each register once.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(C, align(64))]
struct Held {
    /// ZMM0 to ZMM31; of XMM0 to XMM15 the first 16 bytes of each.
    vectors: [[u64; 8]; 32],
    /// K0 to K7, of which 16 bits count.
    masks: [u64; 8],
    /// R8 to R15.
    general: [u64; 8],
}

/// How long the registers are held before they are looked at: a few milliseconds.
const TURNS: u64 = 4_000_000;
/// CPUID leaf 1, ECX: the registers that XCR0 names may be used.
const OSXSAVE: u32 = 1 << 27;
/// CPUID leaf 7, EBX.
const AVX512F: u32 = 1 << 16;
/// XCR0: SSE, AVX and the three parts of AVX-512.
const XCR0_AVX512: u32 = 0xe6;

impl Held {
    const NOTHING: Self = Self {
        vectors: [[0; 8]; 32],
        masks: [0; 8],
        general: [0; 8],
    };

    /// Another value for each register and round.
    fn of(seed: u64) -> Self {
        let mut held = Self::NOTHING;
        let mut number = seed;
        let mut next = || {
            number = number.wrapping_add(1);
            mix(number)
        };
        for vector in &mut held.vectors {
            vector.fill_with(&mut next);
        }
        held.masks.fill_with(|| next() & 0xffff);
        held.general.fill_with(next);
        held
    }

    /// Only what registers of 16 bytes have.
    fn narrow(mut self) -> Self {
        for (number, vector) in self.vectors.iter_mut().enumerate() {
            let kept = if number < 16 { 2 } else { 0 };
            for word in vector.iter_mut().skip(kept) {
                *word = 0;
            }
        }
        self.masks = [0; 8];
        self
    }
}

/// Holds values in all registers for some time, and finds them there.
pub fn registers(machine: &mut Machine, command: &Command<'static>) -> Result<(), Failure> {
    command.allow(&["seconds", "ms", "seed"])?;
    let milliseconds = command.number("seconds", 1)?.saturating_mul(1000);
    let ticks = machine.clock()?.ticks(command.number("ms", milliseconds)?);
    let seed = command.number("seed", 1)?;
    let is_wide = has_avx512();
    say!("registers: ready {}\n", if is_wide { "AVX-512" } else { "SSE" });
    let (begun, mut rounds) = (cpu::ticks(), 0);
    while cpu::ticks() - begun < ticks {
        let held = Held::of(seed.wrapping_add(rounds << 20));
        let mut found = Held::NOTHING;
        let expected = if is_wide {
            hold_wide(&held, &mut found);
            held
        } else {
            hold_narrow(&held, &mut found);
            held.narrow()
        };
        if found != expected {
            return Err(Failure::Check("a register does not hold what was put into it"));
        }
        rounds += 1;
    }
    say!("registers: ok rounds={rounds}\n");
    Ok(())
}

fn has_avx512() -> bool {
    if cpu::cpuid(1, 0).ecx & OSXSAVE == 0 || cpu::cpuid(7, 0).ebx & AVX512F == 0 {
        return false;
    }
    let enabled: u32;
    // SAFETY: OSXSAVE says that there is an XCR0 to be read.
    unsafe { asm!("xgetbv", in("ecx") 0, out("eax") enabled, out("edx") _, options(nomem, nostack)) };
    enabled & XCR0_AVX512 == XCR0_AVX512
}

fn hold_wide(held: &Held, found: &mut Held) {
    // SAFETY: what is read and written lies within the two, and every register that the compiler knows is named. It knows
    // none of those from XMM16 on, nor the masks.
    unsafe {
        asm!(
            ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31",
            "vmovdqu64 zmm\\i, [rsi + 64 * \\i]",
            ".endr",
            ".irp i,0,1,2,3,4,5,6,7",
            "kmovw k\\i, word ptr [rsi + 2048 + 8 * \\i]",
            ".endr",
            ".irp i,8,9,10,11,12,13,14,15",
            "mov r\\i, [rsi + 2048 + 8 * \\i]",
            ".endr",
            "2: dec rcx",
            "jnz 2b",
            ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31",
            "vmovdqu64 [rdi + 64 * \\i], zmm\\i",
            ".endr",
            ".irp i,0,1,2,3,4,5,6,7",
            "kmovw word ptr [rdi + 2048 + 8 * \\i], k\\i",
            ".endr",
            ".irp i,8,9,10,11,12,13,14,15",
            "mov [rdi + 2048 + 8 * \\i], r\\i",
            ".endr",
            "vzeroupper",
            in("rsi") held, in("rdi") found, inout("rcx") TURNS => _,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _, out("r12") _, out("r13") _, out("r14") _, out("r15") _,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _, out("xmm6") _,
            out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _, out("xmm12") _, out("xmm13") _,
            out("xmm14") _, out("xmm15") _, options(nostack)
        );
    }
}

fn hold_narrow(held: &Held, found: &mut Held) {
    // SAFETY: as above, for registers of 16 bytes.
    unsafe {
        asm!(
            ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
            "movdqu xmm\\i, [rsi + 64 * \\i]",
            ".endr",
            ".irp i,8,9,10,11,12,13,14,15",
            "mov r\\i, [rsi + 2048 + 8 * \\i]",
            ".endr",
            "2: dec rcx",
            "jnz 2b",
            ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
            "movdqu [rdi + 64 * \\i], xmm\\i",
            ".endr",
            ".irp i,8,9,10,11,12,13,14,15",
            "mov [rdi + 2048 + 8 * \\i], r\\i",
            ".endr",
            in("rsi") held, in("rdi") found, inout("rcx") TURNS => _,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _, out("r12") _, out("r13") _, out("r14") _, out("r15") _,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _, out("xmm6") _,
            out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _, out("xmm12") _, out("xmm13") _,
            out("xmm14") _, out("xmm15") _, options(nostack)
        );
    }
}
