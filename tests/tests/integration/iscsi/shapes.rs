//! Targets of every kind, and drives of every shape, keep what is written to them.

use coracle_tests::case::Context;
use coracle_tests::guest::{Machine, run as run_machine};
use coracle_tests::harness::iscsi::target::{Lun, Plan, Target, url};
use coracle_tests::monitor::{Ended, Launch};
use coracle_tests::{Outcome, ensure};
use serde_json::{Value, json};

use super::drive;
use crate::network::{says, with};

const MIB: u64 = 1 << 20;
const DISK_MIB: u64 = 32;
const END_WITHIN: std::time::Duration = std::time::Duration::from_secs(60);
/// CHAP asks for 12 bytes or more (RFC 7143, 9.2.1).
const SECRET: &str = "a-secret-of-ours";
const MUTUAL: &str = "a-secret-of-theirs";

/// A kind of target, and what an URL must say to use it. FILES stands for the directory of the secrets.
struct Kind {
    name: &'static str,
    plan: Plan,
    user: &'static str,
    options: &'static str,
    queues: u32,
}

fn kinds() -> Vec<Kind> {
    let kind = |name, plan| Kind {
        name,
        plan,
        user: "",
        options: "",
        queues: 1,
    };
    let disk = || Plan::disk(DISK_MIB * MIB);
    let chap = "?chap_secret_file=FILES/secret";
    let mutual = "?chap_secret_file=FILES/secret&mutual_user=them&mutual_secret_file=FILES/mutual";
    vec![
        kind("as it comes", disk()),
        kind(
            "blocks of 4096",
            Plan::default().lun(Lun::new(DISK_MIB * MIB).block_bytes(4096)),
        ),
        kind(
            "no write cache",
            Plan::default().lun(Lun::new(DISK_MIB * MIB).without_write_cache()),
        ),
        kind("no UNMAP", Plan::default().lun(Lun::new(DISK_MIB * MIB).thick())),
        kind("digests that it insists on", disk().digests()),
        kind(
            "all data solicited",
            disk().key("InitialR2T", "Yes").key("ImmediateData", "No"),
        ),
        kind(
            "small bursts",
            disk()
                .key("MaxBurstLength", "4096")
                .key("FirstBurstLength", "512"),
        ),
        kind("few commands", disk().key("MaxQueueCmd", "2")),
        Kind {
            options: "?header_digest=crc32c&data_digest=crc32c",
            ..kind("digests that we ask for", disk().digests())
        },
        Kind {
            user: "us@",
            options: chap,
            ..kind("CHAP", disk().chap("us", SECRET))
        },
        Kind {
            user: "us@",
            options: mutual,
            ..kind("mutual CHAP", disk().chap("us", SECRET).mutual("them", MUTUAL))
        },
        Kind {
            queues: 2,
            ..kind("two queues in one session", disk())
        },
    ]
}

pub(super) fn run(context: &Context) -> Outcome {
    let mut seed = context.seed.clone();
    for kind in kinds() {
        let name = kind.name;
        let kept = keep(context, kind, seed.below(1 << 20));
        kept.map_err(|e| format!("{name}: {}", coracle_tests::case::text(&e)))?;
    }
    Ok(())
}

fn keep(context: &Context, kind: Kind, seed: u64) -> Outcome {
    let target = Target::start(kind.plan)?;
    let files = tempfile::tempdir()?;
    std::fs::write(files.path().join("secret"), SECRET)?;
    std::fs::write(files.path().join("mutual"), MUTUAL)?;
    let options = kind.options.replace("FILES", &files.path().display().to_string());
    let url = target
        .url(1)
        .replace("iscsi://", &format!("iscsi://{}", kind.user));
    let mut drive = drive(&format!("{url}{options}"), files.path());
    if let Some(drive) = drive.as_object_mut() {
        drive.insert("num_queues".into(), json!(kind.queues));
    }
    let queues = kind.queues;
    let words = format!(
        "do=pattern-write:mib=8,bs=262144,depth=4,seed={seed} do=pattern-write:mib=1,offset_mib=9,bs=4096,depth=16,seed={seed} \
         do=flush do=pattern-verify:mib=8,bs=65536,depth=8,seed={seed} \
         do=pattern-verify:mib=1,offset_mib=9,bs=1048576,depth=1,seed={seed} do=read-check-zero:mib=1,offset_mib=8 \
         do=load:mode=randread,bs=4096,depth=32,queues={queues},ms=200 do=pattern-verify:mib=8,seed={seed}"
    );
    let machine = Machine::unikernel(&context.environment, &words).vcpus(queues);
    let ended = run_machine(
        Launch::new(&context.environment)?,
        &machine.drive(drive),
        END_WITHIN,
    )?;
    ended.expect(0)?;
    says(&ended.console, "errors=0")?;
    tells_no_secret(&ended)
}

/// Each has a session of its own, and neither ends the other's.
pub(super) fn two_units(context: &Context) -> Outcome {
    let bytes = DISK_MIB * MIB;
    let target = Target::start(Plan::disk(bytes).lun(Lun::new(bytes)))?;
    let files = tempfile::tempdir()?;
    let words = "do=pattern-write:mib=8,dev=0,seed=1 do=pattern-write:mib=8,dev=1,seed=2 \
                 do=load:mode=randread,bs=4096,depth=16,ms=500,dev=0 do=pattern-verify:mib=8,dev=1,seed=2 \
                 do=load:mode=randread,bs=4096,depth=16,ms=500,dev=1 do=pattern-verify:mib=8,dev=0,seed=1 do=tick:ms=50,count=20";
    let mut machine = Machine::unikernel(&context.environment, words);
    for (lun, name) in [(1, "first"), (2, "second")] {
        let records = files.path().join(name);
        std::fs::create_dir(&records)?;
        let drive = drive(&target.url(lun), &records);
        machine = machine.drive(with(drive, "drive_id", json!(name)));
    }
    let monitor = Launch::new(&context.environment)?.start()?;
    monitor.configure(&machine.config())?;
    monitor.start_instance()?;
    monitor.console.wait_for("tick: n=1 ", END_WITHIN)?;
    let metrics = monitor.must("GET", "/metrics", None)?.body;
    let again: Vec<&str> = metrics
        .lines()
        .filter(|line| !line.starts_with('#') && line.contains("reconnects"))
        .collect();
    let ended = monitor.wait(END_WITHIN)?;
    ended.expect(0)?;
    ensure!(
        again.len() == 2 && again.iter().all(|line| line.ends_with(" 0")),
        "{again:?}"
    );
    Ok(())
}

fn tells_no_secret(ended: &Ended) -> Outcome {
    for secret in [SECRET, MUTUAL] {
        ensure!(
            !ended.errors.contains(secret),
            "a secret is told: {}",
            ended.errors
        );
    }
    Ok(())
}

pub(super) fn read_only(context: &Context) -> Outcome {
    let target = Target::start(Plan::default().lun(Lun::new(MIB).read_only()))?;
    let drive = reader(&target.url(1));
    let machine = Machine::unikernel(&context.environment, "do=read-check-zero do=capacity").drive(drive);
    let ended = run_machine(Launch::new(&context.environment)?, &machine, END_WITHIN)?;
    ended.expect(0)?;
    says(&ended.console, "read_only=1")
}

fn reader(url: &str) -> Value {
    json!({ "drive_id": "d", "path_on_host": url, "is_root_device": false, "is_read_only": true })
}

/// Of two portals in one URL the second is taken when nobody listens at the first.
pub(super) fn portals(context: &Context) -> Outcome {
    let (mut dead, target) = (Target::start(Plan::disk(MIB))?, Target::start(Plan::disk(MIB))?);
    let first = dead.address();
    dead.kill()?;
    let both = url(first, 1).replace(&first.to_string(), &format!("{first},{}", target.address()));
    let lease = tempfile::tempdir()?;
    let words = "do=pattern-write:seed=3 do=flush do=pattern-verify:seed=3";
    let machine = Machine::unikernel(&context.environment, words).drive(drive(&both, lease.path()));
    run_machine(Launch::new(&context.environment)?, &machine, END_WITHIN)?.expect(0)
}
