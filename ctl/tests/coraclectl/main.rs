//! `coraclectl` as its users run it: as a process, with a monitor that does what each test needs.
//!
//! The monitor is this executable again: `coraclectl` starts it with `--api-sock`, which tells it from
//! the harness. Its `--id` says how it behaves. What a real monitor does is tested elsewhere.
#![expect(
    clippy::indexing_slicing,
    reason = "JSON that lacks a field is a failure of the test"
)]

mod create;
mod disk;
mod lease;
mod monitor;
mod run;
mod terminal;
mod verbs;
mod workbench;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.iter().any(|argument| argument == "--api-sock") {
        return monitor::behave(&arguments);
    }
    let tests = run::TESTS
        .iter()
        .chain(verbs::TESTS)
        .chain(lease::TESTS)
        .chain(disk::TESTS)
        .chain(create::TESTS)
        .chain(terminal::TESTS);
    let trials = tests.map(|(name, test)| {
        Trial::test(*name, || {
            test();
            Ok(())
        })
    });
    libtest_mimic::run(&Arguments::from_args(), trials.collect()).exit_code()
}

/// A test, by its name.
type Test = (&'static str, fn());

/// Names each function in a list after itself.
macro_rules! tests {
    ($($test:ident),* $(,)?) => {
        pub(crate) const TESTS: &[crate::Test] = &[$((stringify!($test), $test)),*];
    };
}
pub(crate) use tests;
