//! Whoever starts a writer a second time, whatever becomes of the server: the file has one writer at a time.

use std::time::{Duration, Instant};

use coracle_tests::case::Context;
use coracle_tests::guest::{Machine, run as run_machine};
use coracle_tests::harness::double_start::{IMAGE_BYTES, run};
use coracle_tests::harness::nfs::disk::Disk;
use coracle_tests::monitor::{Launch, Monitor};
use coracle_tests::seed::Seed;
use coracle_tests::{Outcome, ensure};
use rustix::process::Signal;

use super::storage::Storage;
use crate::network::{Server, double_start, says};

const SOON: Duration = Duration::from_secs(20);
/// A lease of the server, and what it and a busy host take to notice its end.
const FREED_WITHIN: Duration = Duration::from_secs(5 + 10);

pub(super) fn one_writer(context: &Context) -> Outcome {
    let mut seed = context.seed.clone();
    for _ in 0..context.count(2, 100) {
        let schedule = Seed::from(seed.draw());
        run(&context.environment, &Disk::new(IMAGE_BYTES)?, &schedule)?;
    }
    Ok(())
}

pub(super) fn unleased(context: &Context) -> Outcome {
    double_start::unleased(context, || Ok(Disk::new(IMAGE_BYTES)?.unleased()))
}

/// An identity that both have would make the second a restart of the first, to the server.
pub(super) fn same_machine(context: &Context) -> Outcome {
    let storage = Storage::with_image(IMAGE_BYTES)?;
    let first = writer(context, &storage)?;
    for _ in 0..3 {
        let again = machine(context, &storage, "do=hello");
        let refused = run_machine(launch(context)?, &again, SOON)?;
        ensure!(
            !refused.status.success(),
            "it was started twice: {}",
            refused.errors
        );
        says(&refused.errors, "the-machine")?;
        let before = first.console.text().len();
        let more = |text: &str| (text.len() > before).then_some(());
        first.console.wait_until("another line", SOON, more)?;
    }
    first.signal(Signal::TERM)?;
    let ended = first.wait(SOON)?;
    ensure!(!ended.console.contains("found status"), "{}", ended.console);
    Ok(())
}

/// The server frees it, and nobody else has to do anything.
pub(super) fn freed(context: &Context) -> Outcome {
    let storage = Storage::with_image(IMAGE_BYTES)?;
    let first = writer(context, &storage)?;
    first.signal(Signal::KILL)?;
    first.wait(SOON)?;
    let killed = Instant::now();
    let machine = machine(context, &storage, "do=hello");
    run_machine(launch(context)?, &machine, FREED_WITHIN + SOON)?.expect(0)?;
    let took = killed.elapsed();
    ensure!(took < FREED_WITHIN, "it was free after {took:?}");
    Ok(())
}

/// A machine that writes.
fn writer(context: &Context, storage: &Storage) -> Outcome<Monitor> {
    let words = "do=stamp:writer=1,blocks=64,flush_every=4,ms=1";
    let machine = machine(context, storage, words);
    let monitor = launch(context)?.config(&machine.config())?.start()?;
    monitor.console.wait_for("stamp: acked=", SOON)?;
    Ok(monitor)
}

fn machine(context: &Context, storage: &Storage, words: &str) -> Machine {
    let drive = storage.drive(storage.address(), std::path::Path::new(""));
    Machine::unikernel(&context.environment, words).drive(drive)
}

fn launch(context: &Context) -> Outcome<Launch> {
    Ok(Launch::new(&context.environment)?.arguments(["--id", "the-machine"]))
}
