//! Runs a program to which the kernel refuses io_uring, as container profiles do: `refuse io_uring PROGRAM ARGUMENT…`.

#![expect(
    unsafe_code,
    reason = "prctl and the filter it takes have no safe wrapper among our crates"
)]

use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let Some(("io_uring", [program, arguments @ ..])) =
        words.split_first().map(|(f, rest)| (f.as_str(), rest))
    else {
        eprintln!("usage: refuse io_uring PROGRAM ARGUMENT…");
        return ExitCode::FAILURE;
    };
    if let Err(cause) = refuse(libc::SYS_io_uring_setup) {
        eprintln!("refuse: no filter: {cause}");
        return ExitCode::FAILURE;
    }
    let cause = Command::new(program).args(arguments).exec();
    eprintln!("refuse: {program}: {cause}");
    ExitCode::FAILURE
}

/// Has the kernel answer EPERM to a system call, in this process and all that it becomes or starts.
fn refuse(call: libc::c_long) -> std::io::Result<()> {
    let call = u32::try_from(call).map_err(std::io::Error::other)?;
    let statement = |code: u32, k: u32| instruction(code, (0, 0), k);
    let mut program = [
        // The number of the call is the first word of seccomp_data.
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0),
        instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, (0, 1), call),
        statement(
            libc::BPF_RET | libc::BPF_K,
            libc::SECCOMP_RET_ERRNO | libc::EPERM.unsigned_abs(),
        ),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
    ];
    let filter = libc::sock_fprog {
        len: 4,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: this option takes a number and touches no memory.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })?;
    // SAFETY: the filter and the program that it points to outlive the call, which copies them.
    check(unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter) })
}

fn instruction(code: u32, (jt, jf): (u8, u8), k: u32) -> libc::sock_filter {
    libc::sock_filter {
        code: u16::try_from(code).unwrap_or_default(),
        jt,
        jf,
        k,
    }
}

fn check(result: libc::c_int) -> std::io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error())
    }
}
