//! Records what Firecracker answers to the requests of the comparison: `FIRECRACKER=path make record-api`.

use std::process::ExitCode;

use coracle_tests::Outcome;
use coracle_tests::case::text;
use coracle_tests::environment::Environment;
use coracle_tests::exchange::{Exchange, ask, golden, requests};
use coracle_tests::monitor::Launch;

fn main() -> ExitCode {
    match record() {
        Ok(count) => {
            println!("{count} exchanges are in {}", golden().display());
            ExitCode::SUCCESS
        }
        Err(failed) => {
            eprintln!("{}", text(&failed));
            ExitCode::FAILURE
        }
    }
}

fn record() -> Outcome<usize> {
    let environment = Environment::read();
    let firecracker = environment
        .firecracker
        .ok_or("set FIRECRACKER to the path of its binary")?;
    let mut lines = Vec::new();
    for request in requests() {
        let launch = Launch::of(&firecracker)?.arguments(["--no-seccomp"]);
        let exchange: Exchange = ask(launch, &request)?;
        lines.push(serde_json::to_string(&exchange)?);
    }
    // One exchange in a line: a new version of Firecracker then shows as lines that differ.
    std::fs::create_dir_all(golden().parent().ok_or("the file has a directory")?)?;
    std::fs::write(golden(), format!("[\n{}\n]\n", lines.join(",\n")))?;
    Ok(lines.len())
}
