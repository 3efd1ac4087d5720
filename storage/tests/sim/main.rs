//! The storage simulator: images of every kind on a host that does its worst, judged by an oracle.
//!
//! `make sim` runs `SEEDS` seeds; `SEED=n make sim` repeats one. A seed decides everything.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::print_stdout,
    reason = "a test's panic is its failure, and its seeds per second are to be seen"
)]

mod buffers;
mod kind;
mod lane;
mod life;
mod workload;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use kind::KINDS;

/// Seeds of a run that names none.
const SEEDS: u64 = 10_000;

#[test]
fn every_image_keeps_its_promises_on_every_host() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let (first, count) = match number("SEED") {
        Some(seed) => (seed, 1),
        None => (0, number("SEEDS").unwrap_or(SEEDS)),
    };
    let started = Instant::now();
    let next = AtomicU64::new(first);
    let failed: Mutex<Option<(u64, String)>> = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= first + count || failed.lock().unwrap().is_some() {
                        return;
                    }
                    if let Err(reason) = simulated(seed) {
                        failed.lock().unwrap().get_or_insert((seed, reason));
                    }
                }
            });
        }
    });
    if let Some((seed, reason)) = failed.into_inner().unwrap() {
        panic!("seed {seed}: {reason}\nrepeat it with: SEED={seed} make sim");
    }
    let seconds = started.elapsed().as_secs_f64();
    #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
    let rate = count as f64 / seconds;
    println!("{count} seeds in {seconds:.1} s: {rate:.0} seeds per second");
}

/// Runs one seed, each seed one kind of image; what went wrong, in words.
fn simulated(seed: u64) -> Result<(), String> {
    let kind = &KINDS[usize::try_from(seed).unwrap() % KINDS.len()];
    let run = catch_unwind(AssertUnwindSafe(|| life::simulate(kind, seed)));
    run.map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        format!("{}: {}", kind.name, text.unwrap_or_default())
    })
}
