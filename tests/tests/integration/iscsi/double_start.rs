//! Random schedules of two writers of one image on a target: it has one writer at a time.

use coracle_tests::case::{Context, text};
use coracle_tests::harness::double_start::{IMAGE_BYTES, run};
use coracle_tests::harness::iscsi::disk::Disk;
use coracle_tests::seed::Seed;
use coracle_tests::{Outcome, ensure};

/// Every other schedule has the record of the lease in the image's own tail.
pub(super) fn one_writer(context: &Context) -> Outcome {
    let mut seed = context.seed.clone();
    for number in 0..context.count(2, 100) {
        let schedule = Seed::from(seed.draw());
        let disk = if number % 2 == 0 {
            Disk::with_record_in_a_file(IMAGE_BYTES)?
        } else {
            Disk::with_record_in_its_tail(&context.environment, IMAGE_BYTES)?
        };
        run(&context.environment, &disk, &schedule)?;
    }
    Ok(())
}

/// Among some schedules there is one that starts a writer beside another; then the oracle sees a foreign block.
pub(super) fn unleased(context: &Context) -> Outcome {
    let mut seed = context.seed.clone();
    for _ in 0..40 {
        let disk = Disk::with_record_in_a_file(IMAGE_BYTES)?.unleased();
        let schedule = Seed::from(seed.draw());
        let Err(failed) = run(&context.environment, &disk, &schedule) else {
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
