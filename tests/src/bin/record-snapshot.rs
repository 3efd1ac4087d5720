//! Keeps a snapshot of today's format for the tests of all later versions: `make record-snapshot`.

use std::process::ExitCode;

use coracle_tests::case::text;
use coracle_tests::environment::Environment;
use coracle_tests::golden::GoldenSnapshot;

fn main() -> ExitCode {
    match GoldenSnapshot::record(&Environment::read()) {
        Ok(kept) => {
            println!("{} and {}", kept.state.display(), kept.memory.display());
            ExitCode::SUCCESS
        }
        Err(failed) => {
            eprintln!("{}", text(&failed));
            ExitCode::FAILURE
        }
    }
}
