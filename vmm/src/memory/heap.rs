//! The heap of this process.
#![expect(
    unsafe_code,
    reason = "the C library's allocator is told by a call without a safe form"
)]

/// Has all threads share one heap. Each of them would have one of its own, which takes 64 MiB of addresses and some pages, and
/// asks the kernel for what no filter of theirs has to allow then. To be called while there is one thread.
pub fn share_one() {
    // SAFETY: it changes a number of the allocator. If it is refused, threads have heaps, and their filters say so.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}
