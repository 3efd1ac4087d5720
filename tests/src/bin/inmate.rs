//! A program that a test puts into a jail in place of a monitor. The last word of its command line says what it does.

#![expect(
    unsafe_code,
    reason = "it forks, and hands a filter of system calls to the kernel"
)]

use std::process::ExitCode;

fn main() -> ExitCode {
    let outcome = match std::env::args().next_back().as_deref() {
        Some("refused-call") => refused_call(),
        Some("kvm") => std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .map(drop),
        Some("leaves-a-child") => leaves_a_child(),
        _ => Err(std::io::ErrorKind::Unsupported.into()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("inmate: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Ends before a process that it has made, which has left its session.
fn leaves_a_child() -> std::io::Result<()> {
    // SAFETY: this process has one thread.
    if unsafe { libc::fork() } == 0 {
        rustix::process::setsid()?;
        loop {
            std::thread::sleep(std::time::Duration::from_secs(3600));
        }
    }
    Ok(())
}

/// Calls what its own filter ends a process for.
fn refused_call() -> std::io::Result<()> {
    let statement = |code: u32, jt, jf, k| libc::sock_filter {
        code: u16::try_from(code).unwrap_or_default(),
        jt,
        jf,
        k,
    };
    let refused = u32::try_from(libc::SYS_sync).unwrap_or_default();
    let mut filter = [
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, refused),
        statement(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_KILL_PROCESS),
        statement(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: u16::try_from(filter.len()).unwrap_or_default(),
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: the program and its instructions are there while the kernel copies them.
    let set = unsafe {
        libc::prctl(
            libc::PR_SET_SECCOMP,
            libc::SECCOMP_MODE_FILTER,
            &raw const program,
        )
    };
    if set != 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: it has no arguments.
    unsafe { libc::sync() };
    Ok(())
}
