//! Compares what monitors ask of the kernel with the policy of their filters (`make audit-seccomp`).
//!
//! Under the name `coracle` it is a monitor under strace: it starts the one that `CORACLE_AUDITED` names, with its trace in the
//! directory `CORACLE_AUDIT`. Under its own it reads the traces of that directory and says which rules nobody has used, and what
//! was asked for that no rule allows.
#![expect(clippy::print_stdout, reason = "its report is what it is for")]

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use coracle_tests::Outcome;
use coracle_tests::audit::Audit;
use coracle_tests::bench::api::variable;

fn main() -> ExitCode {
    let mut words = std::env::args_os();
    let is_monitor = words
        .next()
        .is_some_and(|name| Path::new(&name).file_name() == Some("coracle".as_ref()));
    let done = if is_monitor { traced(words) } else { report() };
    match done {
        Ok(status) => status,
        Err(error) => {
            println!("audit-seccomp: {}", error.message().unwrap_or("failed"));
            ExitCode::FAILURE
        }
    }
}

/// Becomes the monitor; strace is a grandchild, so that its process is that which the test has started. Returns only why not.
fn traced(words: std::env::ArgsOs) -> Outcome<ExitCode> {
    let trace = variable("CORACLE_AUDIT")?.join(format!("{}.trace", std::process::id()));
    let mut strace = Command::new("strace");
    strace
        .args([
            "-D",
            "-f",
            "--decode-pids=comm",
            "-qq",
            "-e",
            "raw=all",
            "-e",
            "signal=none",
            "-o",
        ])
        .arg(trace)
        .arg(variable("CORACLE_AUDITED")?)
        .args(words);
    Err(format!("strace: {}; run: tests/tools/need strace", strace.exec()).into())
}

fn report() -> Outcome<ExitCode> {
    let policy: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources/seccomp/x86_64.json");
    let mut audit = Audit::new(&fs::read_to_string(policy)?)?;
    for entry in fs::read_dir(variable("CORACLE_AUDIT")?)? {
        // A path in an argument may be anything.
        audit.read(&String::from_utf8_lossy(&fs::read(entry?.path())?));
    }
    let (text, is_well) = audit.report();
    println!("{text}");
    Ok(if is_well {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
