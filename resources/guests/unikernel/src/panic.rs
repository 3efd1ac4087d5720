//! The last words: Rust panics and exceptions of the CPU.

#![expect(unsafe_code, reason = "reads the frame that the CPU pushed")]

use core::panic::PanicInfo;
use core::sync::atomic::{AtomicBool, Ordering};

use crate::{ending, say};

/// What the stubs leave on the stack: the vector, the error code or 0, and where it happened.
#[repr(C)]
struct Frame {
    vector: u64,
    error_code: u64,
    rip: u64,
}

unsafe extern "C" {
    static page_fault_address: u64;
}

/// Set while a panic is printed: a second one on the way ends at once.
static PANICKING: AtomicBool = AtomicBool::new(false);

#[unsafe(no_mangle)]
extern "C" fn exception_entry(frame: &Frame) -> ! {
    if PANICKING.swap(true, Ordering::Relaxed) {
        ending::triple_fault()
    }
    // SAFETY: only the page-fault entry writes it, which has run before this.
    let address = unsafe { (&raw const page_fault_address).read_volatile() };
    say!(
        "panic: exception vector={} error_code={:#x} rip={:#x} cr2={address:#x}\n",
        frame.vector,
        frame.error_code,
        frame.rip
    );
    ending::finish(ending::STATUS_PANIC)
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    if PANICKING.swap(true, Ordering::Relaxed) {
        ending::triple_fault()
    }
    say!("panic: {}", info.message());
    if let Some(location) = info.location() {
        say!(" at {}:{}", location.file(), location.line());
    }
    say!("\n");
    ending::finish(ending::STATUS_PANIC)
}
