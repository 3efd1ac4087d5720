//! Migrations: a guest goes on in another process while it works, and whatever dies, at most one has it.

mod around;
mod compress;
mod copy;
mod ctl;
mod failures;
mod golden;
mod jailed;
mod linux;
mod middle;
mod pace;
mod place;
mod played;
mod postcopy;
mod sockets;
mod strangers;
mod streams;

use std::path::Path;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use coracle_tests::case::{Case, Context, text};
use coracle_tests::certificates::Authority;
use coracle_tests::environment::Need;
use coracle_tests::guest::Machine;
use coracle_tests::harness::receiver::Receiver;
use coracle_tests::monitor::{Launch, Monitor};
use coracle_tests::seed::Seed;
use coracle_tests::{Outcome, ensure};
use coracle_vmm::migration::tls::TlsFiles;

use self::failures::survives_every_failure;
use self::pace::fast_writers_are_slowed_down_or_stopped;
use self::place::Place;
use crate::snapshot::has_worked;
use serde_json::{Value, json};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "a_guest_goes_from_one_process_to_the_next_while_it_works",
        need: Need::Kvm,
        run: goes_from_one_to_the_next,
    },
    Case {
        name: "a_guest_takes_its_disk_on_a_server_along",
        need: Need::Kvm,
        run: takes_its_disk_along,
    },
    Case {
        name: "linux_goes_along_with_what_it_reads_and_writes",
        need: Need::Kvm,
        run: linux::goes_along,
    },
    Case {
        name: "a_guest_goes_around_three_hosts_and_nobody_between_them_reads_it",
        need: Need::KvmAndHosts,
        run: around::goes_around,
    },
    Case {
        name: "a_guest_goes_from_jail_to_jail_on_other_hosts",
        need: Need::KvmAndHosts,
        run: jailed::goes_from_jail_to_jail,
    },
    Case {
        name: "streams_that_are_kept_from_each_version_are_taken",
        need: Need::Kvm,
        run: golden::streams_are_taken,
    },
    Case {
        name: "whatever_happens_at_any_message_one_process_has_the_guest",
        need: Need::Kvm,
        run: survives_every_failure,
    },
    Case {
        name: "a_guest_that_writes_faster_than_is_sent_is_slowed_down_or_stopped",
        need: Need::Kvm,
        run: fast_writers_are_slowed_down_or_stopped,
    },
    Case {
        name: "a_guest_that_writes_too_fast_goes_on_before_its_memory_is_there",
        need: Need::Kvm,
        run: postcopy::goes_on_without,
    },
    Case {
        name: "whatever_happens_at_any_message_of_a_fetch_one_process_has_the_guest_or_its_disk_is_free",
        need: Need::Kvm,
        run: postcopy::survives_every_failure,
    },
    Case {
        name: "a_source_whose_connection_is_lost_while_memory_is_fetched_calls_again",
        need: Need::Kvm,
        run: postcopy::finds_each_other_again,
    },
    Case {
        name: "a_migration_whose_way_is_gone_is_recovered_by_another",
        need: Need::Kvm,
        run: postcopy::is_recovered_by_another_way,
    },
    Case {
        name: "a_guest_whose_source_dies_while_memory_is_fetched_ends_and_its_disk_is_whole",
        need: Need::Kvm,
        run: postcopy::dies_with_its_source,
    },
    Case {
        name: "a_source_whose_target_dies_while_memory_is_fetched_says_so",
        need: Need::Kvm,
        run: postcopy::dies_with_its_target,
    },
    Case {
        name: "a_source_from_which_memory_is_fetched_is_not_stopped_by_the_way",
        need: Need::Kvm,
        run: postcopy::is_not_stopped_by_the_way,
    },
    Case {
        name: "a_target_without_userfaultfd_has_the_guest_when_its_memory_is_there",
        need: Need::Kvm,
        run: postcopy::goes_without_where_it_cannot,
    },
    Case {
        name: "a_guest_takes_disks_of_its_host_along_while_it_writes_them",
        need: Need::Kvm,
        run: copy::goes_along,
    },
    Case {
        name: "what_was_acknowledged_is_on_the_copy_and_nobody_takes_what_was_left_behind",
        need: Need::Kvm,
        run: copy::loses_nothing,
    },
    Case {
        name: "a_copy_that_is_given_up_is_gone",
        need: Need::Kvm,
        run: copy::leaves_nothing_behind,
    },
    Case {
        name: "disks_that_cannot_go_along_are_refused_before_a_byte_moves",
        need: Need::KvmAndMountNamespace,
        run: copy::are_told,
    },
    Case {
        name: "a_guest_takes_what_its_overlay_has_along",
        need: Need::Kvm,
        run: copy::takes_its_overlay_along,
    },
    Case {
        name: "a_disk_that_does_not_fit_stays_with_its_guest",
        need: Need::KvmAndMountNamespace,
        run: copy::does_not_fit,
    },
    Case {
        name: "a_disk_that_goes_along_is_whole_before_memory_is_fetched",
        need: Need::Kvm,
        run: copy::is_whole_before_its_memory,
    },
    Case {
        name: "whatever_happens_at_any_message_of_a_copy_one_process_has_the_guest_or_its_disk_is_whole",
        need: Need::Kvm,
        run: copy::survives_every_failure,
    },
    Case {
        name: "memory_goes_by_several_streams_while_it_is_written",
        need: Need::Kvm,
        run: streams::memory_goes_by_several,
    },
    Case {
        name: "a_stream_that_is_lost_loses_the_migration_and_the_guest_runs_on",
        need: Need::Kvm,
        run: streams::one_that_is_lost_loses_the_migration,
    },
    Case {
        name: "a_migration_that_is_given_up_waits_for_none_of_its_streams",
        need: Need::Kvm,
        run: streams::all_are_cut_when_it_is_given_up,
    },
    Case {
        name: "who_does_not_know_its_token_joins_no_migration",
        need: Need::Kvm,
        run: streams::strangers_join_nothing,
    },
    Case {
        name: "memory_is_packed_where_it_is_asked_for_or_a_slow_link_makes_it_pay",
        need: Need::Kvm,
        run: compress::is_packed_where_it_pays,
    },
    Case {
        name: "coraclectl_makes_certificates_receives_and_sends",
        need: Need::Kvm,
        run: ctl::moves_a_machine,
    },
    Case {
        name: "coraclectl_takes_a_disk_along",
        need: Need::Kvm,
        run: ctl::takes_a_disk_along,
    },
    Case {
        name: "coraclectl_starts_the_receiver_and_ends_one_that_gets_no_machine",
        need: Need::Kvm,
        run: ctl::starts_the_receiver,
    },
    Case {
        name: "strangers_and_other_machines_are_refused_and_the_guest_runs_on",
        need: Need::Kvm,
        run: strangers::are_refused,
    },
    Case {
        name: "a_target_that_would_fetch_memory_later_is_not_asked_to",
        need: Need::Kvm,
        run: strangers::need_not_have_memory_later,
    },
    Case {
        name: "a_target_that_is_never_done_holds_no_guest_up",
        need: Need::Kvm,
        run: strangers::hold_no_guest_up,
    },
    Case {
        name: "images_that_are_read_are_looked_at_before_a_guest_is_let_go_that_nobody_could_give_back",
        need: Need::Kvm,
        run: strangers::images_that_are_read_are_looked_at,
    },
    Case {
        name: "another_image_than_the_one_that_is_offered_is_refused",
        need: Need::Kvm,
        run: strangers::disks_are_refused,
    },
    Case {
        name: "an_image_that_is_only_read_is_the_same_on_both_sides",
        need: Need::Kvm,
        run: strangers::images_are_compared,
    },
    Case {
        name: "the_socket_of_a_guest_is_made_where_it_arrives",
        need: Need::Kvm,
        run: sockets::are_made_where_it_arrives,
    },
];

const SOON: Duration = Duration::from_secs(60);
const PERIOD: Duration = Duration::from_millis(2);

/// The hosts of one test, which are one.
struct Hosts {
    tls: Value,
}

impl Hosts {
    fn new(directory: &Path) -> Outcome<Self> {
        Ok(Self {
            tls: Authority::new(directory)?.host("127.0.0.1")?,
        })
    }

    /// A receiver that listens, what its call comes to, and where it listens.
    fn receiver(&self, context: &Context) -> Outcome<(Monitor, JoinHandle<Outcome>, String)> {
        self.receiver_of(context, &json!({}))
    }

    /// The same with other members in what it is asked.
    fn receiver_of(
        &self,
        context: &Context,
        members: &Value,
    ) -> Outcome<(Monitor, JoinHandle<Outcome>, String)> {
        self.receiver_by(Launch::new(&context.environment)?, members)
    }

    fn receiver_by(
        &self,
        launch: Launch,
        members: &Value,
    ) -> Outcome<(Monitor, JoinHandle<Outcome>, String)> {
        let mut body = json!({ "listen": "127.0.0.1:0", "tls": self.tls });
        merge(&mut body, members);
        Ok(Receiver::of(launch.start()?, &body)?.into_parts())
    }

    /// The guest of `source` is not sent to a receiver that `launch` starts, for the reason `why`, when the target and the source
    /// are asked with these members.
    fn refuse(&self, source: &Monitor, launch: Launch, [receive, send]: [&Value; 2], why: &str) -> Outcome {
        let (receiver, call, to) = self.receiver_by(launch, receive)?;
        let mut body = self.send(&to);
        merge(&mut body, send);
        let answer = source.request("PUT", "/migration/send", Some(&body))?;
        ensure!(
            answer.status == 400 && answer.fault().contains(why),
            "{why}: {}",
            answer.body
        );
        receiver.must("DELETE", "/migration", None)?;
        ensure!(
            call.join().is_ok_and(|call| call.is_err()),
            "{why}: it has received"
        );
        Ok(())
    }

    fn files(&self) -> Outcome<TlsFiles> {
        Ok(serde_json::from_value(self.tls.clone())?)
    }

    fn send(&self, to: &str) -> Value {
        json!({ "to": to, "tls": self.tls })
    }
}

fn goes_from_one_to_the_next(context: &Context) -> Outcome {
    let mut seed = context.seed.clone();
    for round in 0..context.count(4, 300) {
        one_move(context, &mut seed, &["a file"]).map_err(|e| format!("round {round}: {}", text(&e)))?;
    }
    Ok(())
}

/// The same with disks that are on servers, and with one of each kind.
fn takes_its_disk_along(context: &Context) -> Outcome {
    let mut seed = context.seed.clone();
    for round in 0..context.count(1, 100) {
        for kinds in [&["NFS"][..], &["iSCSI"], &["iSCSI", "a file", "NFS"]] {
            one_move(context, &mut seed, kinds)
                .map_err(|e| format!("round {round}, {kinds:?}: {}", text(&e)))?;
        }
    }
    Ok(())
}

/// Moves a guest that works, with one disk of each of `kinds`; it works with the first.
fn one_move(context: &Context, seed: &mut Seed, kinds: &[&str]) -> Outcome {
    let directory = tempfile::tempdir()?;
    let hosts = Hosts::new(directory.path())?;
    let places: Vec<Place> = kinds
        .iter()
        .map(|kind| Place::new(kind, directory.path(), 16))
        .collect::<Outcome<_>>()?;
    let number = seed.below(1 << 30);
    let vcpus = 1 + u32::try_from(seed.below(2))?;
    let words = format!(
        "do=hello do=dirty:mib=8,ms=300,seed={number} do=registers:ms=300,seed={number} \
         do=pattern-write:mib=16,seed={number},bs=65536,depth=8 do=flush do=vcpus:count={vcpus},ms=100 \
         do=pattern-verify:mib=16,seed={number},bs=4096,depth=16 do=dirty:mib=16,ms=300,seed=7"
    );
    let machine = Machine::unikernel(&context.environment, &words)
        .vcpus(vcpus)
        .memory_mib(64);
    let drives = ["d", "e", "f"].into_iter().zip(&places);
    let config = drives
        .fold(machine, |machine, (id, place)| machine.drive(place.drive(id)))
        .config();
    let mut monitor = Launch::new(&context.environment)?.start()?;
    monitor.configure(&config)?;
    monitor.start_instance()?;
    monitor.console.wait_for("hello", SOON)?;
    let mut said = String::new();
    for _ in 0..=seed.below(2) {
        thread::sleep(Duration::from_micros(seed.below(400_000)));
        let (receiver, call, to) = hosts.receiver(context)?;
        let sent = monitor.request("PUT", "/migration/send", Some(&hosts.send(&to)));
        if !matches!(&sent, Ok(answer) if answer.status == 204) {
            receiver.must("DELETE", "/migration", None)?;
            ensure!(call.join().is_ok_and(|call| call.is_err()), "it has received");
            let sent = sent.map(|answer| answer.fault());
            ensure!(!monitor.is_running()?, "it was not sent, and runs: {sent:?}");
            break;
        }
        call.join().map_err(|_| "a thread has panicked")??;
        let ended = std::mem::replace(&mut monitor, receiver).wait(SOON)?;
        ended.expect(0)?;
        said.push_str(&ended.console);
    }
    let ended = monitor.wait(SOON)?;
    has_worked(&ended, said, &format!("{words}, {vcpus} vCPUs"))
}

fn merge(body: &mut Value, other: &Value) {
    if let (Some(body), Some(other)) = (body.as_object_mut(), other.as_object()) {
        body.extend(other.clone());
    }
}
