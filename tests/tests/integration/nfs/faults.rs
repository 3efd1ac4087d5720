//! The steps and faults of NFS.

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
    "restart outside grace",
    "restart without records",
    "stop",
    "lease expiry",
    "wrong length",
    "wrong sequence",
    "odd answer",
    "old connection late",
    "power",
    "power and restart",
];

pub(super) fn connect(context: &Context) -> Outcome {
    run(context, "connect", Step::Connect)
}

pub(super) fn client_id(context: &Context) -> Outcome {
    run(context, "client id", Step::ClientId)
}

pub(super) fn session(context: &Context) -> Outcome {
    run(context, "create session", Step::Login)
}

pub(super) fn open(context: &Context) -> Outcome {
    run(context, "open", Step::Open)
}

pub(super) fn idle(context: &Context) -> Outcome {
    run(context, "idle renewal", Step::Idle)
}

pub(super) fn read(context: &Context) -> Outcome {
    run(context, "read", Step::Read)
}

pub(super) fn write(context: &Context) -> Outcome {
    run(context, "write unstable", Step::Write)
}

pub(super) fn commit(context: &Context) -> Outcome {
    run(context, "commit", Step::Flush)
}

pub(super) fn reclaim(context: &Context) -> Outcome {
    run(context, "reclaim", Step::Reclaim)
}

pub(super) fn lock(context: &Context) -> Outcome {
    run(context, "lock", Step::Reservation)
}

pub(super) fn deallocate(context: &Context) -> Outcome {
    run(context, "deallocate", Step::Unmap)
}

fn run(context: &Context, name: &'static str, step: Step) -> Outcome {
    let mut matrix = faults::matrix("nfs", FAULTS, name).impossible(
        &[("mode", "plain"), ("fault", "power and restart")],
        "without a volatile cache nothing is forgotten",
    );
    if matches!(step, Step::Connect | Step::ClientId | Step::Login) {
        let fault = [("fault", "wrong sequence")];
        matrix = matrix.impossible(&fault, "a call that makes a session is in none");
    }
    faults::run::<Storage>(context, &matrix, step)
}
