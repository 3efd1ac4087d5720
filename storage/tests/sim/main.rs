//! The storage simulator: images of every kind on a host that does its worst, judged by an oracle.
//!
//! `make sim` runs many seeds, `SEED=n make sim` repeats one. A seed decides everything.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test's panic is its failure"
)]

mod buffers;
mod export;
mod lane;
mod life;
mod memory;
mod passing;
mod remote;
mod workload;

use coracle_storage::sim::image::KINDS;
use coracle_storage::sim::nfs::options::Limits;
use coracle_storage::sim::seeds;

/// Fewer: a network and a target take their time, and `make sim` runs thousands.
const REMOTE_SEEDS: u64 = 500;

#[test]
fn every_image_keeps_its_promises_on_every_host() {
    seeds::run(10_000, |seed| {
        let kind = usize::try_from(seed).unwrap() % KINDS.len();
        life::simulate(&KINDS[kind], seed);
    });
}

#[test]
fn a_disk_on_a_target_keeps_its_promises_whatever_happens_on_the_way() {
    seeds::run(REMOTE_SEEDS, remote::life::simulate);
}

#[test]
fn a_unit_is_written_by_nobody_but_its_last_heir() {
    seeds::run(REMOTE_SEEDS, remote::heirs::simulate);
}

#[test]
fn a_unit_is_gone_on_with_until_its_generation_is_raised() {
    remote::keeping::check();
}

#[test]
fn a_unit_without_records_is_not_gone_on_with() {
    remote::keeping::check_unrecorded();
}

#[test]
fn the_generation_of_a_unit_is_raised_where_its_records_are() {
    remote::keeping::check_elsewhere();
}

#[test]
fn a_hostile_target_breaks_nothing_for_good() {
    seeds::run(REMOTE_SEEDS, remote::hostile::simulate);
}

#[test]
fn a_mistake_of_a_target_is_never_believed() {
    seeds::run(REMOTE_SEEDS, remote::hostile::simulate_mistakes);
}

#[test]
fn a_disk_is_soon_served_again_and_sleeps_until_then() {
    seeds::run(REMOTE_SEEDS, remote::outage::simulate);
}

#[test]
fn what_an_old_connection_has_delivered_is_stopped() {
    seeds::run(REMOTE_SEEDS, remote::outage::simulate_strays);
}

#[test]
fn a_disk_on_an_export_keeps_its_promises_whatever_happens_on_the_way() {
    seeds::run(REMOTE_SEEDS, export::life::simulate);
}

#[test]
fn a_server_that_grants_too_little_is_told_from_one_that_breaks_off() {
    let one_at_a_time = Limits {
        slots: 1,
        ..Limits::default()
    };
    export::life::check_narrow(one_at_a_time, "takes 1 requests at a time");
    let short = Limits {
        message_bytes_max: 36_863,
        ..Limits::default()
    };
    export::life::check_narrow(short, "of 36863 bytes each");
}

#[test]
fn an_image_on_an_export_is_written_by_nobody_but_its_last_owner() {
    seeds::run(REMOTE_SEEDS, export::heirs::simulate);
}

#[test]
fn an_image_on_an_export_is_gone_on_with_until_its_generation_is_raised() {
    export::keeping::check();
}

#[test]
fn a_step_that_was_torn_is_no_generation() {
    export::keeping::check_torn();
}

#[test]
fn zeros_keep_their_space_on_an_export_unless_it_may_be_freed() {
    export::keeping::check_space();
}

#[test]
fn the_generation_of_an_image_on_an_export_is_raised_where_its_records_are() {
    export::keeping::check_elsewhere();
}

#[test]
fn a_machine_writes_no_more_when_another_has_taken_its_lock() {
    seeds::run(REMOTE_SEEDS, export::heirs::simulate_hand_over);
}

#[test]
fn a_hostile_server_breaks_nothing_for_good() {
    seeds::run(REMOTE_SEEDS, export::hostile::simulate);
}

#[test]
fn a_disk_on_an_export_is_soon_served_again_and_sleeps_until_then() {
    seeds::run(REMOTE_SEEDS, export::outage::simulate);
}

#[test]
fn what_was_stuck_in_a_server_does_no_harm_later() {
    seeds::run(REMOTE_SEEDS, export::outage::simulate_strays);
}

#[test]
fn what_a_server_loses_while_it_goes_on_is_written_again() {
    seeds::run(REMOTE_SEEDS, export::lapse::simulate);
}

#[test]
fn nothing_is_written_after_the_lease_by_a_machine_that_was_stopped() {
    seeds::run(REMOTE_SEEDS, export::stopped::simulate);
}

#[test]
fn a_reader_goes_around_holes_and_around_nothing_else() {
    seeds::run(REMOTE_SEEDS, export::sparse::simulate);
}

#[test]
fn a_reader_of_holes_comes_to_an_end_whatever_the_server_says() {
    seeds::run(REMOTE_SEEDS, export::sparse::simulate_lies);
}
