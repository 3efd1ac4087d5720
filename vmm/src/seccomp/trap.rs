//! The end of a process that asks for what its filter refuses: it says which call it was, and of which thread.
#![expect(
    unsafe_code,
    reason = "filters, signal handlers and what a signal says have no safe form"
)]

use std::cell::Cell;
use std::ffi::c_void;
use std::io;
use std::mem::MaybeUninit;
use std::ptr;

#[path = "../../../resources/seccomp/names.rs"]
mod names;

/// What the process ends with then.
pub const EXIT_BAD_SYSTEM_CALL: u8 = 148;

/// Bytes of a name of a thread that are told.
const NAME_BYTES: usize = 32;
/// `si_code` of a call that a filter has trapped (include/uapi/asm-generic/siginfo.h).
const SYS_SECCOMP: libc::c_int = 1;
/// Where `si_syscall` stands in a `siginfo_t`: behind three numbers, padding, and the address of the call.
const SYSCALL_OFFSET_BYTES: usize = 24;

thread_local! {
    static NAME: Cell<([u8; NAME_BYTES], usize)> = const { Cell::new(([0; NAME_BYTES], 0)) };
}

/// How this thread is called in the message.
pub(super) fn name_thread(name: &str) {
    let mut bytes = [0; NAME_BYTES];
    let len = bytes
        .iter_mut()
        .zip(name.bytes())
        .map(|(to, from)| *to = from)
        .count();
    NAME.set((bytes, len));
}

/// Has a refused call end the process with a message. The caller is the thread `name`.
pub(super) fn install(name: &str) -> io::Result<()> {
    name_thread(name);
    // SAFETY: all zeros are a set of signals and a number of flags; the handler is set next.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    let handler: extern "C" fn(libc::c_int, *const libc::siginfo_t, *mut c_void) = tell;
    action.sa_sigaction = handler as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
    // SAFETY: the handler does only what a handler may, and ends the process.
    match unsafe { libc::sigaction(libc::SIGSYS, &raw const action, ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Puts a filter on this thread. By `flags`, what it refuses stands in the kernel's log, too, where that is kept.
pub(super) fn set_filter(program: &[libc::sock_filter], flags: libc::c_ulong) -> io::Result<()> {
    // SAFETY: it takes no memory of ours.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let program = libc::sock_fprog {
        len: u16::try_from(program.len()).map_err(io::Error::other)?,
        filter: program.as_ptr().cast_mut(),
    };
    let mode = libc::SECCOMP_SET_MODE_FILTER;
    // SAFETY: the kernel copies the program, and does not change it.
    let set = unsafe { libc::syscall(libc::SYS_seccomp, mode, flags, &raw const program) };
    if set < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

extern "C" fn tell(_: libc::c_int, info: *const libc::siginfo_t, _: *mut c_void) {
    // SAFETY: the kernel has put it there for the handler.
    let code = unsafe { (*info).si_code };
    let call = (code == SYS_SECCOMP).then(|| {
        // SAFETY: it points into what the kernel has put there.
        let number = unsafe { info.cast::<u8>().add(SYSCALL_OFFSET_BYTES) };
        // SAFETY: with this code, a number stands there.
        unsafe { number.cast::<u32>().read_unaligned() }
    });
    let (name, len) = NAME.get();
    let mut message = Message::default();
    message.add(b"coracle: thread `");
    message.add(name.get(..len).unwrap_or_default());
    match call {
        Some(number) => {
            message.add(b"` was refused system call ");
            message.add_number(number);
            message.add(b" (");
            message.add(names::name(number).unwrap_or("unknown").as_bytes());
            message.add(b") by its filter: if it should be allowed, say so with this line; --no-seccomp runs without\n");
        }
        None => message.add(b"` got SIGSYS from another process\n"),
    }
    message.tell();
    // SAFETY: it ends the process, and runs nothing of it.
    unsafe { libc::_exit(i32::from(EXIT_BAD_SYSTEM_CALL)) }
}

/// Text that is put together without asking for memory.
struct Message {
    bytes: [u8; 256],
    len: usize,
}

impl Default for Message {
    fn default() -> Self {
        Self {
            bytes: [0; 256],
            len: 0,
        }
    }
}

impl Message {
    fn add(&mut self, bytes: &[u8]) {
        let room = self.bytes.iter_mut().skip(self.len);
        self.len += room.zip(bytes).map(|(to, from)| *to = *from).count();
    }

    fn add_number(&mut self, number: u32) {
        let mut divisor = 1_000_000_000;
        while divisor > 1 && number / divisor == 0 {
            divisor /= 10;
        }
        while divisor > 0 {
            self.add(&[b'0' + u8::try_from(number / divisor % 10).unwrap_or_default()]);
            divisor /= 10;
        }
    }

    fn tell(&self) {
        // SAFETY: the bytes are there, and nobody else has them. If it fails there is nobody to tell.
        let _ = unsafe { libc::write(libc::STDERR_FILENO, self.bytes.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_has_names_and_numbers_and_an_end() {
        let mut message = Message::default();
        message.add(b"call ");
        for number in [0, 7, 41, 4_294_967_295] {
            message.add_number(number);
            message.add(b" ");
        }
        assert_eq!(
            message.bytes.get(..message.len),
            Some(&b"call 0 7 41 4294967295 "[..])
        );
        message.add(&[b'x'; 500]);
        assert_eq!(message.len, 256);
    }
}
