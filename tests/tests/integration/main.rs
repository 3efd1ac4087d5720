//! Starts real monitors and looks at them from outside.
//!
//! A test that this machine cannot run is reported as ignored, with the reason; the random choices of the others come
//! from one seed, which is printed.

mod api;
mod attacks;
mod boot;
mod ends;
mod errors;
mod lifecycle;
mod linux;
mod signals;

use std::process::ExitCode;
use std::sync::Arc;

use coracle_tests::case::{Case, text};
use coracle_tests::environment::Environment;
use libtest_mimic::Arguments;

/// Every test, in groups.
const GROUPS: &[(&str, &[Case])] = &[
    ("boot", boot::CASES),
    ("api", api::CASES),
    ("ends", ends::CASES),
    ("linux", linux::CASES),
    ("errors", errors::CASES),
    ("lifecycle", lifecycle::CASES),
    ("signals", signals::CASES),
    ("attacks", attacks::CASES),
];

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let environment = Arc::new(Environment::read());
    if let Err(missing) = environment.check() {
        eprintln!("{}", text(&missing));
        return ExitCode::FAILURE;
    }
    println!("SEED={}", environment.seed.number());
    let cases = GROUPS
        .iter()
        .flat_map(|(group, cases)| cases.iter().map(move |case| (group, case)));
    let trials = cases
        .map(|(group, case)| case.into_trial(group, &environment))
        .collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}
