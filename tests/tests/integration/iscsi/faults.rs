//! The steps and faults of iSCSI.

use coracle_tests::Outcome;
use coracle_tests::case::Context;
use coracle_tests::harness::proxy::Step;

use super::storage::Storage;
use crate::network::faults;

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
    let mut matrix = faults::matrix("iscsi", FAULTS, name);
    if step == Step::Login {
        let fault = [("fault", "wrong digest")];
        matrix = matrix.impossible(&fault, "digests begin after the login");
    }
    faults::run::<Storage>(context, &matrix, step)
}
