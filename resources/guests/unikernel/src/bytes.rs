//! The memory functions that compiled Rust calls and that no C library provides here.

#![expect(unsafe_code, reason = "these are the primitives below every slice copy")]

use core::arch::asm;

// Written with string instructions: a loop would be compiled into a call of the function itself.

#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, bytes: usize) -> *mut u8 {
    // SAFETY: the caller vouches for `bytes` readable and writable bytes, as C demands; DF is clear by the ABI.
    unsafe {
        asm!("rep movsb", inout("rcx") bytes => _, inout("rdi") to => _, inout("rsi") from => _,
            options(nostack, preserves_flags));
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, bytes: usize) -> *mut u8 {
    if to.addr().wrapping_sub(from.addr()) >= bytes {
        // SAFETY: forwards is right here: `to` does not lie inside `from`; the rest is the caller's promise.
        return unsafe { memcpy(to, from, bytes) };
    }
    let last = bytes.wrapping_sub(1);
    // SAFETY: the caller vouches for `bytes` bytes, which is not 0 where the ranges overlap; DF is restored.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rcx") bytes => _, inout("rdi") to.wrapping_add(last) => _,
            inout("rsi") from.wrapping_add(last) => _, options(nostack));
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, value: i32, bytes: usize) -> *mut u8 {
    let [value, ..] = value.to_le_bytes();
    // SAFETY: the caller vouches for `bytes` writable bytes; DF is clear by the ABI.
    unsafe {
        asm!("rep stosb", inout("rcx") bytes => _, inout("rdi") to => _, in("al") value,
            options(nostack, preserves_flags));
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(one: *const u8, other: *const u8, bytes: usize) -> i32 {
    for index in 0..bytes {
        // SAFETY: the caller vouches for `bytes` readable bytes at `one`.
        let left = unsafe { one.wrapping_add(index).read_volatile() };
        // SAFETY: the caller vouches for `bytes` readable bytes at `other`.
        let right = unsafe { other.wrapping_add(index).read_volatile() };
        if left != right {
            return i32::from(left) - i32::from(right);
        }
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(one: *const u8, other: *const u8, bytes: usize) -> i32 {
    // SAFETY: the same promise of the caller.
    unsafe { memcmp(one, other, bytes) }
}
