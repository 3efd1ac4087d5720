//! An image on an NFS server: what a guest notices of the network, of other owners, and of a user's mistakes.

mod boot;
mod double_start;
mod faults;
mod messages;
mod overlay;
mod peer;
mod storage;

use coracle_tests::Outcome;
use coracle_tests::case::{Case, Context};
use coracle_tests::environment::Need;

use self::storage::Storage;
use crate::network::patience;

/// The image on a server with one.
const IMAGE: &str = "export/image.raw";

/// What takes long comes first; the rows of a matrix and of schedules are kept one by one in a soak.
pub(crate) const CASES: &[Case] = &[
    case(
        "linux_boots_from_it_as_nobody_and_elsewhere_after_the_lease_has_ended",
        Need::KvmAndRoot,
        boot::run,
    ),
    case("no_fault_shows_in_a_connection", Need::Kvm, faults::connect),
    case("no_fault_shows_in_a_client_id", Need::Kvm, faults::client_id),
    case("no_fault_shows_in_a_new_session", Need::Kvm, faults::session),
    case("no_fault_shows_in_an_open", Need::Kvm, faults::open),
    case("no_fault_shows_when_it_is_idle", Need::Kvm, faults::idle),
    case("no_fault_shows_in_a_read", Need::Kvm, faults::read),
    case("no_fault_shows_in_a_write", Need::Kvm, faults::write),
    case("no_fault_shows_in_a_commit", Need::Kvm, faults::commit),
    case("no_fault_shows_in_a_reclaim", Need::Kvm, faults::reclaim),
    case("no_fault_shows_in_a_lock", Need::Kvm, faults::lock),
    case("no_fault_shows_in_a_deallocate", Need::Kvm, faults::deallocate),
    case(
        "a_file_on_a_server_has_one_writer_at_a_time_1",
        Need::Kvm,
        double_start::one_writer,
    ),
    case(
        "a_file_on_a_server_has_one_writer_at_a_time_2",
        Need::Kvm,
        double_start::one_writer,
    ),
    case(
        "a_file_on_a_server_has_one_writer_at_a_time_3",
        Need::Kvm,
        double_start::one_writer,
    ),
    case(
        "a_file_on_a_server_has_one_writer_at_a_time_4",
        Need::Kvm,
        double_start::one_writer,
    ),
    case(
        "a_file_on_a_server_has_one_writer_at_a_time_5",
        Need::Kvm,
        double_start::one_writer,
    ),
    case(
        "a_writer_that_takes_no_lease_is_found_out",
        Need::Kvm,
        double_start::unleased,
    ),
    case(
        "the_same_machine_started_again_is_refused_and_the_first_goes_on",
        Need::Kvm,
        double_start::same_machine,
    ),
    case(
        "what_a_killed_machine_had_is_free_when_its_lease_has_ended",
        Need::Kvm,
        double_start::freed,
    ),
    case(
        "another_client_reads_what_the_guest_wrote",
        Need::Kvm,
        peer::reads_back,
    ),
    case(
        "patterns_come_back_by_every_version_and_in_every_shape",
        Need::Kvm,
        peer::shapes,
    ),
    case(
        "a_guest_on_an_overlay_goes_on_when_the_server_of_its_base_does",
        Need::Kvm,
        overlay::goes_on,
    ),
    case(
        "a_server_that_says_nothing_costs_the_api_nothing",
        Need::Kvm,
        patience::api::<Storage>,
    ),
    case(
        "a_pause_on_a_silent_server_fails_in_time",
        Need::Kvm,
        patience::pause::<Storage>,
    ),
    case(
        "a_monitor_dies_at_once_beside_a_silent_server",
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
        "every_mistake_has_a_message_that_says_what_to_do",
        Need::Kvm,
        messages::run,
    ),
    case(
        "whoever_has_the_image_is_named_to_others",
        Need::Kvm,
        messages::holder,
    ),
    case(
        "an_image_where_no_record_can_be_made_is_used_with_its_record_elsewhere",
        Need::Kvm,
        messages::record_elsewhere,
    ),
];

const fn case(name: &'static str, need: Need, run: fn(&Context) -> Outcome) -> Case {
    Case { name, need, run }
}
