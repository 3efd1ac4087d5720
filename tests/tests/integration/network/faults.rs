//! Every fault of a network and of a server, at every step of a session: the guest notices nothing but time.

use std::sync::{Mutex, PoisonError};

use coracle_tests::Outcome;
use coracle_tests::case::{Context, text};
use coracle_tests::harness::matrix::Matrix;
use coracle_tests::harness::proxy::Step;
use coracle_tests::seed::Seed;

use super::Stepped;
use super::cell::Scene;

/// How soon a guest goes on is a time on a clock: cells that run side by side would measure each other.
static ALONE: Mutex<()> = Mutex::new(());
/// Cells of each step in a sample.
const SAMPLE: usize = 2;

/// The faults at one step, with a server's memory and without.
pub(crate) fn matrix(name: &'static str, faults: &[&'static str], step: &'static str) -> Matrix {
    Matrix::new(name)
        .axis("mode", &["plain", "volatile"])
        .axis("fault", faults)
        .axis("step", &[step])
        .impossible(
            &[("mode", "plain"), ("fault", "power")],
            "without a volatile cache nothing is forgotten",
        )
}

/// Runs the cells of a step.
pub(crate) fn run<S: Stepped>(context: &Context, matrix: &Matrix, step: Step) -> Outcome {
    let mut seed = context.seed.clone();
    let mut cells = seed.stream("cells");
    let report = matrix.run(context.extent, SAMPLE, &mut seed, |cell| {
        let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let number = cells.draw();
        let scene = Scene::<S>::new(context, cell, step, Seed::from(number));
        let survived = scene.and_then(|scene| scene.survive(cell.value("fault")?));
        survived.map_err(|e| format!("cell {number}: {}", text(&e)).into())
    })?;
    report.expect_passed()
}
