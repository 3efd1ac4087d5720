//! Every fault of a network and of a target, at every step of a session: the guest notices nothing but time.

use std::sync::{Mutex, PoisonError};

use coracle_tests::Outcome;
use coracle_tests::case::{Context, text};
use coracle_tests::harness::matrix::Matrix;
use coracle_tests::harness::proxy::Step;
use coracle_tests::seed::Seed;

use super::cell::Scene;

/// How soon a guest goes on is a time on a clock: cells that run side by side would measure each other.
static ALONE: Mutex<()> = Mutex::new(());
/// Cells of each step in a sample.
const SAMPLE: usize = 2;
const FAULTS: &[&str] = &[
    "reset",
    "cut inside",
    "black hole",
    "delay",
    "kill and restart",
    "stop",
    "wrong digest",
    "wrong length",
    "odd answer",
    "old connection late",
    "power",
];

pub(super) fn idle(context: &Context) -> Outcome {
    run(context, "idle", Step::Idle)
}

pub(super) fn login(context: &Context) -> Outcome {
    run(context, "login", Step::Login)
}

pub(super) fn read(context: &Context) -> Outcome {
    run(context, "read", Step::Read)
}

pub(super) fn write(context: &Context) -> Outcome {
    run(context, "write", Step::Write)
}

pub(super) fn flush(context: &Context) -> Outcome {
    run(context, "flush", Step::Flush)
}

pub(super) fn unmap(context: &Context) -> Outcome {
    run(context, "unmap", Step::Unmap)
}

pub(super) fn reservation(context: &Context) -> Outcome {
    run(context, "reservation", Step::Reservation)
}

fn run(context: &Context, name: &'static str, step: Step) -> Outcome {
    let mut matrix = Matrix::new("iscsi")
        .axis("mode", &["plain", "volatile"])
        .axis("fault", FAULTS)
        .axis("step", &[name])
        .impossible(
            &[("mode", "plain"), ("fault", "power")],
            "without a volatile cache nothing is forgotten",
        );
    if step == Step::Login {
        let fault = [("fault", "wrong digest")];
        matrix = matrix.impossible(&fault, "digests begin after the login");
    }
    let mut seed = context.seed.clone();
    let mut cells = seed.stream("cells");
    let report = matrix.run(context.extent, SAMPLE, &mut seed, |cell| {
        let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let number = cells.draw();
        let scene = Scene::new(context, cell, step, Seed::from(number));
        let survived = scene.and_then(|scene| scene.survive(cell.value("fault")?));
        survived.map_err(|e| format!("cell {number}: {}", text(&e)).into())
    })?;
    report.expect_passed()
}
