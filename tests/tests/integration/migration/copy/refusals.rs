//! Disks that cannot go along, and what is said of them.

use std::path::{Path, PathBuf};

use coracle_tests::case::Context;
use coracle_tests::guest::{Machine, blank_image};
use coracle_tests::harness::receiver::Receiver;
use coracle_tests::monitor::{Launch, Monitor};
use coracle_tests::{Outcome, ensure};
use serde_json::{Value, json};

use super::super::{Hosts, SOON, merge};
use super::{SLOW_BYTES_PER_S, along, drive, merged, patterned, running};

/// A guest that nobody gets, with a disk `d`, a disk `l` whose records are elsewhere, and a disk `o` that is an overlay.
struct Staying<'a> {
    context: &'a Context,
    hosts: Hosts,
    source: Monitor,
    directory: &'a Path,
}

impl<'a> Staying<'a> {
    fn start(context: &'a Context, directory: &'a Path) -> Outcome<Self> {
        patterned(&directory.join("from"), 16, 4, 5)?;
        std::fs::write(directory.join("theirs"), "theirs")?;
        std::fs::create_dir(directory.join("small"))?;
        blank_image(&directory.join("base"), 1)?;
        blank_image(&directory.join("recorded"), 1)?;
        let recorded = json!({ "lease_at": directory.join("records") });
        let overlay = json!({ "base": directory.join("base"), "path": directory.join("over"), "keep": true });
        let config = Machine::unikernel(&context.environment, "do=hello do=tick:ms=10,count=1000000")
            .memory_mib(32)
            .disk("d", &directory.join("from"))
            .drive(merged(drive("l", &directory.join("recorded"), 1), &recorded))
            .drive(json!({
                "drive_id": "o", "is_root_device": false, "cache_type": "Writeback", "overlay": overlay
            }))
            .config();
        let source = Launch::new(&context.environment)?.start()?;
        source.configure(&config)?;
        source.start_instance()?;
        source.console.wait_for("hello", SOON)?;
        Ok(Self {
            context,
            hosts: Hosts::new(directory)?,
            source,
            directory,
        })
    }

    /// It is not sent, for the reason `why`, when both sides are asked so.
    fn is_refused(&self, receive: &Value, send: &Value, why: &str) -> Outcome {
        let launch = with_small(self.context, &self.directory.join("small"), 1)?;
        self.hosts.refuse(&self.source, launch, [receive, send], why)?;
        ensure!(!self.directory.join("to").exists(), "{why}: a copy was left");
        Ok(())
    }
}

impl Staying<'_> {
    /// Nothing but copies is written, so no lease decides: whatever keeps one of them from being leased at the target has to be
    /// found before the guest is let go.
    fn would_be_lost(&self, at: &dyn Fn(&str) -> PathBuf) -> Outcome {
        let copied = json!({ "copy_disks": ["d", "l", "o"] });
        let received = |d: Value, l: Value| {
            let mut drives = [
                json!({ "drive_id": "d", "path_on_host": at("to") }),
                json!({ "drive_id": "l", "path_on_host": at("to-l"), "lease_at": at("to-l") }),
                json!({ "drive_id": "o", "overlay_path": at("to-o") }),
            ];
            merge(&mut drives[0], &d);
            merge(&mut drives[1], &l);
            json!({ "overrides": { "drives": drives } })
        };
        let one_place = "drives `d` and `l`, which both go along, would be recorded in one place";
        let same = json!({ "lease_at": at("one") });
        self.is_refused(&received(same.clone(), same), &copied, one_place)?;
        let beside_d = json!({ "lease_at": at("to") });
        self.is_refused(&received(json!({}), beside_d), &copied, one_place)?;
        let no_files = json!({ "lease_at": "/proc/to" });
        self.is_refused(
            &received(json!({}), no_files),
            &copied,
            // In a jail it is not even there.
            " in /proc: ",
        )?;
        std::fs::write(at("to.lease.7"), "no record")?;
        self.is_refused(
            &received(json!({}), json!({})),
            &copied,
            "the newest lease record",
        )?;
        std::fs::remove_file(at("to.lease.7"))?;
        // It comes to stand there while the disk goes along.
        let record = json!({ "path_on_host": at("to.lease.1") });
        self.is_refused(&received(json!({}), record), &copied, "the newest lease record")
    }
}

/// A monitor that has a file system of so many MiB at `small`.
fn with_small(context: &Context, small: &Path, mib: u32) -> Outcome<Launch> {
    let mount = format!("mount -t tmpfs -o size={mib}m none {}", small.display());
    let way = context.environment.after_mounting(&mount);
    Ok(Launch::new(&context.environment)?.by_way_of(way.iter().map(String::as_str)))
}

/// What cannot go along, and where it cannot go, is said before a byte moves.
pub(in super::super) fn are_told(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let guest = Staying::start(context, directory.path())?;
    let at = |name: &str| directory.path().join(name);
    let path = |path: PathBuf| along("d", &path).0;
    let copied = |ids: &[&str]| json!({ "copy_disks": ids });
    let (nowhere, d) = (json!({}), copied(&["d"]));
    let there = "is there already, and the copy would replace it";
    let over_nothing = json!({ "drive_id": "o", "overlay_path": at("to"), "overlay_base": at("other") });
    let over_nothing = json!({ "overrides": { "drives": [over_nothing] } });
    let small = "has 1 MiB left, and 4 MiB are to be copied there";
    guest.is_refused(&nowhere, &d, there)?;
    guest.is_refused(&path(at("theirs")), &d, there)?;
    guest.is_refused(&path(at("small").join("to")), &d, small)?;
    let no_directory = "cannot look for the directory of the copy";
    guest.is_refused(&path(at("no").join("to")), &d, no_directory)?;
    guest.is_refused(&path("nfs://a/b/c".into()), &d, "a copy is a file of this host")?;
    guest.is_refused(&path(at("to")), &copied(&[]), "there is no image")?;
    guest.is_refused(&nowhere, &copied(&["o"]), there)?;
    let records = "records of its own";
    guest.is_refused(&along("l", &at("to")).0, &copied(&["l"]), records)?;
    guest.is_refused(&over_nothing, &copied(&["o", "d"]), "there is no image")?;
    guest.would_be_lost(&at)?;
    guest.is_refused(
        &nowhere,
        &copied(&["x"]),
        "drive `x`, which the machine does not have",
    )?;
    guest.is_refused(&nowhere, &copied(&["d", "d"]), "names drive `d` twice")?;
    ensure!(std::fs::read(at("theirs"))? == b"theirs", "it was replaced");
    let console = &guest.source.console;
    let seen = console.text().matches("tick: ").count();
    console
        .wait_for(&format!("tick: n={} ", seen + 5), SOON)
        .map(drop)
}

/// A target whose disk becomes full says so, and the guest runs on.
pub(in super::super) fn does_not_fit(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let hosts = Hosts::new(directory.path())?;
    let (from, small) = (directory.path().join("from"), directory.path().join("small"));
    std::fs::create_dir(&small)?;
    patterned(&from, 16, 1, 5)?;
    let words = "do=hello do=pattern-write:seed=6 do=tick:ms=10,count=1000000";
    let source = running(context, words, drive("d", &from, 4 << 10))?;
    let (receive, send) = along("d", &small.join("to"));
    let launch = with_small(context, &small, 4)?;
    let receive = merged(json!({ "listen": "127.0.0.1:0", "tls": hosts.tls }), &receive);
    let (_receiver, call, to) = Receiver::of(launch.start()?, &receive)?.into_parts();
    let body = merged(hosts.send(&to), &send);
    let body = merged(body, &json!({ "bandwidth_limit": SLOW_BYTES_PER_S }));
    let answer = source.request("PUT", "/migration/send", Some(&body))?;
    ensure!(
        answer.status == 400
            && answer.fault().contains("No space left")
            && answer.fault().contains("runs on here"),
        "{}",
        answer.body
    );
    ensure!(call.join().is_ok_and(|call| call.is_err()), "it has received");
    source.console.wait_for("tick: n=5 ", SOON).map(drop)
}
