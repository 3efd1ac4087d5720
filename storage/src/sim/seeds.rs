//! Many seeds, on all processors; what to run the environment says: `SEED=n`, or `SEEDS=n` of them.
#![expect(clippy::print_stdout, reason = "people want to see seeds per second")]

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Runs `simulate` with `count` seeds, or with those that the environment names. It panics when something is wrong.
///
/// # Panics
///
/// When a simulation does, with its seed and how to repeat it.
pub fn run(count: u64, simulate: impl Fn(u64) + Sync) {
    let seeds = seeds(count);
    let started = Instant::now();
    if let Some((seed, reason)) = first_failure(seeds.clone(), simulate) {
        panic!("seed {seed}: {reason}\nrepeat it with: SEED={seed} make sim");
    }
    let count = seeds.end - seeds.start;
    let millis = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    let rate = count * 1_000 / millis.max(1);
    println!("{count} seeds in {millis} ms: {rate} seeds per second");
}

fn seeds(count: u64) -> Range<u64> {
    let number = |name: &str| {
        let text = std::env::var(name).ok()?;
        let number = text.parse::<u64>();
        Some(number.unwrap_or_else(|_| panic!("{name}={text} is no number")))
    };
    match number("SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("SEEDS").unwrap_or(count),
    }
}

/// A seed whose simulation panics, and what it says.
fn first_failure(seeds: Range<u64>, simulate: impl Fn(u64) + Sync) -> Option<(u64, String)> {
    let next = AtomicU64::new(seeds.start);
    let failed: Mutex<Option<(u64, String)>> = Mutex::new(None);
    let locked = || failed.lock().unwrap_or_else(PoisonError::into_inner);
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end || locked().is_some() {
                        return;
                    }
                    // What a simulation has broken goes away with it.
                    let run = catch_unwind(AssertUnwindSafe(|| simulate(seed)));
                    if let Err(panic) = run {
                        let text = panic.downcast_ref::<String>().map(String::as_str);
                        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
                        locked().get_or_insert((seed, text.unwrap_or("no reason given").to_owned()));
                    }
                }
            });
        }
    });
    failed.into_inner().unwrap_or_else(PoisonError::into_inner)
}
