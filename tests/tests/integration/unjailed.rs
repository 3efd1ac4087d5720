//! The tests that a run in jails leaves out, with the reason why each could not say anything there.

use coracle_tests::jailing::Mode;

/// A part of the tests, by the beginning of their names, and why they are left out of a run in jails.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unjailed {
    /// The whole name of a test, or its group with `::`.
    pub(crate) name: &'static str,
    /// The one mode in which it is left out; `None`: in both.
    pub(crate) only: Option<Mode>,
    /// Why.
    pub(crate) reason: &'static str,
}

const fn both(name: &'static str, reason: &'static str) -> Unjailed {
    Unjailed {
        name,
        only: None,
        reason,
    }
}

const fn by_root(name: &'static str, reason: &'static str) -> Unjailed {
    Unjailed {
        name,
        only: Some(Mode::Root),
        reason,
    }
}

const OWN_NODES: &str = "root's jail has nodes of its own, whatever is mounted on the host's";
const NO_DESCRIPTORS: &str = "the jailer closes every descriptor that is handed in";
const LOOP_DEVICE: &str = "the node of its loop device is not the jail's user's to open";
const BY_THE_CLIENT: &str = "coraclectl starts the monitor, and makes no jails";

const BY_ANOTHER_CLIENT: &str = "the client starts the monitor itself, and makes no jails";

/// All of them.
pub(crate) const UNJAILED: &[Unjailed] = &[
    both("landlock::", "it is about monitors that have no jail"),
    both("jailer::", "it makes jails of its own"),
    both("escape::", "it makes jails of its own"),
    both("ctl::run_ends_with_the_guests_status", BY_THE_CLIENT),
    both(
        "ctl::runs_with_a_disk_a_tap_and_a_socket_leave_nothing",
        BY_THE_CLIENT,
    ),
    both("disposable::", BY_THE_CLIENT),
    both("clients::a_published_client_in_rust_drives_it", BY_ANOTHER_CLIENT),
    both(
        "clients::a_published_client_in_rust_puts_it_into_a_jail",
        "it makes a jail of its own",
    ),
    both(
        "ctl::a_running_machine_is_listed_paused_and_stopped",
        BY_THE_CLIENT,
    ),
    both(
        "clone::clones_go_on_with_the_same_memory_and_are_told_apart",
        BY_THE_CLIENT,
    ),
    both(
        "clone::a_clone_that_cannot_be_started_leaves_nothing_behind",
        BY_THE_CLIENT,
    ),
    both(
        "clone::clones_write_to_disks_of_their_own_over_one_that_stays_as_it_is",
        BY_THE_CLIENT,
    ),
    both(
        "clone::what_a_killed_coraclectl_has_started_is_known_and_can_be_ended",
        BY_THE_CLIENT,
    ),
    both(
        "snapshot::coraclectl_saves_a_machine_describes_it_and_goes_on_with_it",
        BY_THE_CLIENT,
    ),
    both(
        "snapshot_keys::coraclectl_signs_encrypts_merges_and_checks_snapshots",
        BY_THE_CLIENT,
    ),
    both(
        "snapshot_disks::a_snapshot_that_was_overtaken_goes_on_detached_only_and_leaves_its_disk_alone",
        BY_THE_CLIENT,
    ),
    both(
        "migration::coraclectl_makes_certificates_receives_and_sends",
        BY_THE_CLIENT,
    ),
    both("migration::coraclectl_takes_a_disk_along", BY_THE_CLIENT),
    both(
        "migration::coraclectl_starts_the_receiver_and_ends_one_that_gets_no_machine",
        BY_THE_CLIENT,
    ),
    both(
        "errors::a_user_without_permission_is_told",
        "a jail has one user, who may use its nodes",
    ),
    both(
        "errors::wrong_arguments_are_refused",
        "the jailer refuses a wrong --id before there is a monitor",
    ),
    by_root("errors::a_host_without_kvm_is_named", OWN_NODES),
    by_root(
        "migration::a_target_without_userfaultfd_has_the_guest_when_its_memory_is_there",
        OWN_NODES,
    ),
    both("lease::a_descriptor_is_one_more_name_of_an_image", NO_DESCRIPTORS),
    both("net::a_tap_whose_descriptor_is_handed_in_serves", NO_DESCRIPTORS),
    both(
        "net::a_tap_whose_descriptors_are_handed_in_serves_each_pair",
        NO_DESCRIPTORS,
    ),
    both(
        "lease::a_descriptor_that_cannot_be_opened_again_is_refused",
        NO_DESCRIPTORS,
    ),
    both(
        "snapshot_keys::a_signed_and_encrypted_guest_goes_on_by_pager_and_as_a_whole",
        NO_DESCRIPTORS,
    ),
    both(
        "lease::a_second_node_of_a_device_is_no_second_device",
        LOOP_DEVICE,
    ),
    both(
        "lease::a_device_that_another_host_holds_is_refused_until_that_is_broken",
        LOOP_DEVICE,
    ),
    both(
        "lease::an_image_without_a_place_for_records_has_a_lock_only",
        "it compares root with and without a right over files, and nobody in a jail has that",
    ),
    both(
        "snapshot_damage::a_monitor_killed_at_any_write_of_a_snapshot_leaves_the_last_one_or_none",
        "strace would count the system calls by which the jail is made",
    ),
];

/// Why a test is left out in this mode, if it is.
pub(crate) fn reason(name: &str, mode: Mode) -> Option<&'static str> {
    UNJAILED
        .iter()
        .find(|left_out| left_out.covers(name) && left_out.only.is_none_or(|only| only == mode))
        .map(|left_out| left_out.reason)
}

impl Unjailed {
    /// Whether a test is meant.
    pub(crate) fn covers(&self, name: &str) -> bool {
        name == self.name || self.name.ends_with("::") && name.starts_with(self.name)
    }
}
