//! The storage simulator: images of every kind on a host that does its worst, judged by an oracle.
//!
//! `make sim` runs many seeds, `SEED=n make sim` repeats one. A seed decides everything.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test's panic is its failure"
)]

mod buffers;
mod lane;
mod life;
mod workload;

use coracle_storage::sim::image::KINDS;
use coracle_storage::sim::seeds;

#[test]
fn every_image_keeps_its_promises_on_every_host() {
    seeds::run(10_000, |seed| {
        let kind = usize::try_from(seed).unwrap() % KINDS.len();
        life::simulate(&KINDS[kind], seed);
    });
}
