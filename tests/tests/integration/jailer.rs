//! Monitors in jails: what they can and cannot do there, how they end, and what is left of them.

mod causes;
mod launcher;
mod leftovers;
mod limits;
mod refusals;
mod rootless;
mod sample;
mod shown;
mod storage;
mod supervised;

use std::time::Duration;

use coracle_tests::case::{Case, Context};
use coracle_tests::environment::Need;
use coracle_tests::guest::Machine;
use coracle_tests::harness::jail::Jail;
use coracle_tests::{Outcome, ensure};
use rustix::process::Signal;
use serde_json::json;

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "jails_that_end_in_any_way_leave_nothing",
        need: Need::KvmAndRoot,
        run: leftovers::jails_that_end_in_any_way,
    },
    Case {
        name: "a_start_that_fails_at_any_step_leaves_nothing",
        need: Need::KvmRootAndTrace,
        run: leftovers::a_start_that_fails_at_any_step,
    },
    Case {
        name: "a_jailer_that_is_killed_at_any_step_leaves_nothing",
        need: Need::KvmRootAndTrace,
        run: leftovers::a_jailer_that_is_killed_at_any_step,
    },
    Case {
        name: "what_a_monitor_has_started_ends_with_its_jail",
        need: Need::KvmAndRoot,
        run: leftovers::what_a_monitor_has_started,
    },
    Case {
        name: "a_guest_boots_in_a_jail_and_its_status_is_passed_on",
        need: Need::KvmAndRoot,
        run: a_guest_boots_in_a_jail,
    },
    Case {
        name: "without_our_flags_the_jailer_becomes_the_monitor",
        need: Need::KvmAndRoot,
        run: the_jailer_becomes_the_monitor,
    },
    Case {
        name: "signals_are_passed_on",
        need: Need::KvmAndRoot,
        run: supervised::signals_are_passed_on,
    },
    Case {
        name: "a_failed_monitor_is_started_again_up_to_a_limit",
        need: Need::KvmAndRoot,
        run: supervised::a_failed_monitor_is_started_again,
    },
    Case {
        name: "sockets_of_a_killed_monitor_are_not_in_the_way_of_the_next",
        need: Need::KvmAndRoot,
        run: supervised::sockets_of_a_killed_monitor_are_not_in_the_way,
    },
    Case {
        name: "a_restart_that_fails_is_recorded",
        need: Need::KvmAndRoot,
        run: supervised::a_restart_that_fails_is_recorded,
    },
    Case {
        name: "a_daemon_tells_of_its_start_and_ends_by_a_signal",
        need: Need::KvmAndRoot,
        run: supervised::a_daemon_tells_of_its_start,
    },
    Case {
        name: "the_monitor_has_nothing_but_what_it_needs",
        need: Need::KvmRootAndMemoryCgroup,
        run: limits::the_monitor_has_nothing_but_what_it_needs,
    },
    Case {
        name: "a_cgroup_of_version_2_is_entered_as_it_is",
        need: Need::KvmRootAndUnifiedCgroup,
        run: limits::a_cgroup_of_version_2_is_entered,
    },
    Case {
        name: "root_in_a_jail_has_no_rights_either",
        need: Need::KvmAndRoot,
        run: limits::root_has_no_rights_either,
    },
    Case {
        name: "the_cause_of_each_death_is_recorded",
        need: Need::KvmAndRoot,
        run: causes::each_death,
    },
    Case {
        name: "a_monitor_that_is_killed_for_want_of_memory_is_known",
        need: Need::KvmRootAndMemoryCgroup,
        run: causes::want_of_memory,
    },
    Case {
        name: "a_snapshot_in_the_jail_survives_its_cleanup",
        need: Need::KvmAndRoot,
        run: shown::a_snapshot_survives,
    },
    Case {
        name: "the_monitor_is_shown_in_the_jail_and_copied_where_it_has_to_be",
        need: Need::KvmAndRoot,
        run: shown::the_monitor_is_shown_or_copied,
    },
    Case {
        name: "mounts_of_the_host_and_of_a_jail_stay_apart_where_the_hosts_are_shared",
        need: Need::KvmAndRoot,
        run: shown::mounts_stay_apart,
    },
    Case {
        name: "a_second_start_leaves_a_jail_that_runs_as_it_is",
        need: Need::KvmAndRoot,
        run: refusals::a_second_start,
    },
    Case {
        name: "a_disk_is_shown_by_path_or_descriptor_and_nobody_else_holds_it",
        need: Need::KvmAndRoot,
        run: shown::a_disk_is_shown,
    },
    Case {
        name: "disks_on_servers_are_reached_from_the_hosts_network_and_from_another",
        need: Need::KvmAndHosts,
        run: storage::servers_are_reached,
    },
    Case {
        name: "a_restart_has_the_lease_of_those_before_it_and_a_stranger_has_not",
        need: Need::KvmAndRoot,
        run: storage::a_restart_has_its_lease,
    },
    Case {
        name: "links_and_ways_out_are_refused_at_each_path",
        need: Need::KvmAndRoot,
        run: refusals::links_and_ways_out,
    },
    Case {
        name: "what_is_in_the_way_is_named",
        need: Need::KvmAndRoot,
        run: refusals::what_is_in_the_way,
    },
    Case {
        name: "a_launcher_for_firecrackers_jailer_works",
        need: Need::KvmAndRoot,
        run: launcher::a_launcher_works,
    },
    Case {
        name: "a_sample_of_all_other_tests_holds_in_jails",
        need: Need::KvmAndRoot,
        run: sample::in_each_mode,
    },
    Case {
        name: "an_ordinary_user_jails_a_guest",
        need: Need::KvmAndRoot,
        run: rootless::a_guest_boots,
    },
    Case {
        name: "what_an_ordinary_user_cannot_have_is_an_error_that_says_why",
        need: Need::KvmAndRoot,
        run: rootless::what_cannot_be_had,
    },
];

const SOON: Duration = Duration::from_secs(30);

/// By the API in the jail, as a launcher does it.
fn a_guest_boots_in_a_jail(context: &Context) -> Outcome {
    for (flags, status) in [
        (&["--supervise", "--cleanup"][..], 7),
        (&["--cleanup", "--new-pid-ns"][..], 0),
    ] {
        let machine = Machine::unikernel(&context.environment, &format!("do=hello do=exit:status={status}"));
        // Or what it says would be between the letters of the guest.
        let jail = Jail::new(&context.environment)?.arguments(["--level", "Error"]);
        let jail = jail.flags(flags.iter().copied());
        let (jail, config) = jail.kernel_of(&machine)?;
        let jailed = jail.start()?;
        jailed.monitor.configure(&config)?;
        jailed.monitor.start_instance()?;
        let ended = jailed.end(SOON)?;
        ensure!(ended.console.contains("hello"), "{ended:?}");
        ensure!(ended.status.code() == Some(status), "{flags:?}: {ended:?}");
    }
    Ok(())
}

fn the_jailer_becomes_the_monitor(context: &Context) -> Outcome {
    let machine = Machine::unikernel(&context.environment, "do=hello do=exit:status=9");
    let jail = Jail::new(&context.environment)?.arguments(["--level", "Error"]);
    // As a launcher for Firecracker does it: what the guest needs is put into the jail beforehand.
    std::fs::create_dir_all(jail.root())?;
    std::fs::copy(&context.environment.unikernel, jail.root().join("kernel"))?;
    let mut config = machine.config();
    *config
        .pointer_mut("/boot-source/kernel_image_path")
        .ok_or("there is a kernel")? = json!("kernel");
    let jailed = jail.start()?;
    ensure!(
        jailed.process()? == jailed.monitor.process(),
        "the file has {:?}, the process is {:?}",
        jailed.process()?,
        jailed.monitor.process()
    );
    // What was started where and when is in its metrics.
    let line = std::fs::read_to_string(format!("/proc/{}/cmdline", jailed.process()?.0))?;
    for flag in [
        "--id",
        "--start-time-us",
        "--start-time-cpu-us",
        "--parent-cpu-time-us",
    ] {
        ensure!(line.split('\0').any(|word| word == flag), "no {flag} in {line:?}");
    }
    jailed.monitor.configure(&config)?;
    jailed.monitor.start_instance()?;
    let root = jailed.root.clone();
    jailed.monitor.console.wait_for("hello", SOON)?;
    for name in [
        "coracle",
        "coracle.pid",
        "kernel",
        "dev/kvm",
        "dev/net/tun",
        "dev/urandom",
        "run",
    ] {
        ensure!(root.join(name).exists(), "no {name} in the jail");
    }
    let ended = jailed.monitor.wait(SOON)?;
    ensure!(ended.status.code() == Some(9), "{ended:?}");
    Ok(())
}

/// Kills a process by its number.
fn kill(process: coracle_tests::process::Process, signal: Signal) -> Outcome {
    let raw = i32::try_from(process.0)?;
    let pid = rustix::process::Pid::from_raw(raw).ok_or("a process has a number")?;
    Ok(rustix::process::kill_process(pid, signal)?)
}
