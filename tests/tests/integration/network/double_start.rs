//! Random schedules of two writers of one image behind a network, one of whom takes no lease.

use coracle_tests::case::{Context, text};
use coracle_tests::harness::double_start::{Backend, run};
use coracle_tests::seed::Seed;
use coracle_tests::{Outcome, ensure};

/// Among some schedules there is one that starts a writer beside another; then the oracle sees a foreign block.
pub(crate) fn unleased<B: Backend>(context: &Context, disk: impl Fn() -> Outcome<B>) -> Outcome {
    let mut seed = context.seed.clone();
    for _ in 0..40 {
        let schedule = Seed::from(seed.draw());
        let Err(failed) = run(&context.environment, &disk()?, &schedule) else {
            continue;
        };
        let said = text(&failed);
        if said.contains("there is nothing to break") {
            // Nor is there: nobody took a lease. This schedule came to that before two writers met.
            continue;
        }
        ensure!(
            said.contains("who did not hold the lease then"),
            "it was found out, but not by what it wrote: {said}"
        );
        return Ok(());
    }
    Err("40 schedules with a writer that takes no lease went unnoticed".into())
}
