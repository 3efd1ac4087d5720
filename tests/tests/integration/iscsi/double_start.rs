//! Random schedules of two writers of one image on a target: it has one writer at a time.

use coracle_tests::Outcome;
use coracle_tests::case::Context;
use coracle_tests::harness::double_start::{IMAGE_BYTES, run};
use coracle_tests::harness::iscsi::disk::Disk;
use coracle_tests::seed::Seed;

use crate::network::double_start;

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

pub(super) fn unleased(context: &Context) -> Outcome {
    double_start::unleased(context, || {
        Ok(Disk::with_record_in_a_file(IMAGE_BYTES)?.unleased())
    })
}
