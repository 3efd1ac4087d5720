//! An image on an iSCSI target: what a guest notices of the network, of other owners, and of a user's mistakes.

mod boot;
mod double_start;
mod faults;
mod messages;
mod shapes;
mod storage;

use std::path::Path;

use coracle_tests::Outcome;
use coracle_tests::case::{Case, Context};
use coracle_tests::environment::Need;
use serde_json::{Value, json};

use self::storage::Storage;
use crate::network::{self, patience, with};

/// What takes long comes first; the rows of a matrix and of schedules are kept one by one in a soak.
pub(crate) const CASES: &[Case] = &[
    case(
        "linux_boots_from_it_as_nobody_and_elsewhere_after_a_broken_lease",
        Need::KvmAndRoot,
        boot::run,
    ),
    case("no_fault_shows_when_it_is_idle", Need::Kvm, faults::idle),
    case("no_fault_shows_in_a_login", Need::Kvm, faults::login),
    case("no_fault_shows_in_a_read", Need::Kvm, faults::read),
    case("no_fault_shows_in_a_write", Need::Kvm, faults::write),
    case("no_fault_shows_in_a_flush", Need::Kvm, faults::flush),
    case("no_fault_shows_in_an_unmap", Need::Kvm, faults::unmap),
    case("no_fault_shows_in_a_reservation", Need::Kvm, faults::reservation),
    case(
        "a_disk_has_one_writer_at_a_time_1",
        Need::Kvm,
        double_start::one_writer,
    ),
    case(
        "a_disk_has_one_writer_at_a_time_2",
        Need::Kvm,
        double_start::one_writer,
    ),
    case(
        "a_disk_has_one_writer_at_a_time_3",
        Need::Kvm,
        double_start::one_writer,
    ),
    case(
        "a_disk_has_one_writer_at_a_time_4",
        Need::Kvm,
        double_start::one_writer,
    ),
    case(
        "a_disk_has_one_writer_at_a_time_5",
        Need::Kvm,
        double_start::one_writer,
    ),
    case(
        "a_writer_that_takes_no_lease_is_found_out",
        Need::Kvm,
        double_start::unleased,
    ),
    case(
        "a_target_that_says_nothing_costs_the_api_nothing",
        Need::Kvm,
        patience::api::<Storage>,
    ),
    case(
        "a_pause_on_a_silent_target_fails_in_time",
        Need::Kvm,
        patience::pause::<Storage>,
    ),
    case(
        "a_monitor_dies_at_once_beside_a_silent_target",
        Need::Kvm,
        patience::death::<Storage>,
    ),
    case(
        "a_disk_without_a_ring_goes_on_when_its_server_does",
        Need::Kvm,
        patience::without_a_ring::<Storage>,
    ),
    case(
        "a_guest_is_told_after_the_time_that_was_asked_for",
        Need::Kvm,
        patience::report::<Storage>,
    ),
    case(
        "patterns_come_back_from_every_kind_of_target",
        Need::Kvm,
        shapes::run,
    ),
    case(
        "two_units_of_one_target_serve_one_machine_side_by_side",
        Need::Kvm,
        shapes::two_units,
    ),
    case("a_read_only_unit_is_read", Need::Kvm, shapes::read_only),
    case(
        "the_second_portal_serves_when_the_first_is_dead",
        Need::Kvm,
        shapes::portals,
    ),
    case(
        "every_mistake_has_a_message_that_says_what_to_do",
        Need::Kvm,
        messages::run,
    ),
];

const fn case(name: &'static str, need: Need, run: fn(&Context) -> Outcome) -> Case {
    Case { name, need, run }
}

/// A drive that is this URL, with the record of its lease beside the test.
fn drive(url: &str, lease_at: &Path) -> Value {
    with(network::drive(url), "lease_at", json!(lease_at.join("record")))
}
