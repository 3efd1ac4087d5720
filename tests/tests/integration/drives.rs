//! What a drive can be asked for beyond Firecracker: queues, growth, limits that are shared, a cache that is none.

use std::time::{Duration, Instant};

use coracle_tests::case::{Case, Context, text};
use coracle_tests::environment::Need;
use coracle_tests::guest::{Machine, blank_image, run};
use coracle_tests::monitor::{Launch, Monitor};
use coracle_tests::{Outcome, ensure};
use serde_json::{Value, json};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "each_queue_has_a_thread_and_a_vcpu_drives_it",
        need: Need::Kvm,
        run: each_queue_has_a_thread,
    },
    Case {
        name: "a_disk_with_queues_is_paused_resumed_and_replaced_under_load",
        need: Need::Kvm,
        run: a_disk_with_queues_is_paused_resumed_and_replaced,
    },
    Case {
        name: "a_disk_grows_while_its_guest_runs_and_never_shrinks",
        need: Need::Kvm,
        run: a_disk_grows,
    },
    Case {
        name: "drives_of_a_group_share_its_limits_and_delay_no_other",
        need: Need::Kvm,
        run: drives_of_a_group_share_its_limits,
    },
    Case {
        name: "a_rate_is_not_exceeded_and_waiting_costs_nothing",
        need: Need::Kvm,
        run: a_rate_is_not_exceeded,
    },
    Case {
        name: "patterns_come_back_from_a_disk_that_is_written_through",
        need: Need::Kvm,
        run: patterns_come_back_written_through,
    },
    Case {
        name: "what_makes_no_sense_is_refused_with_the_remedy",
        need: Need::Kvm,
        run: what_makes_no_sense_is_refused,
    },
];

const END_WITHIN: Duration = Duration::from_secs(60);
const MIB: u64 = 1 << 20;

/// A drive on a blank image of `mib` MiB, as the API has it.
fn drive(launch: &Launch, id: &str, mib: u64, extra: &Value) -> Outcome<Value> {
    let image = launch.directory().join(format!("test-{id}"));
    blank_image(&image, mib)?;
    let mut drive = json!({ "drive_id": id, "path_on_host": image, "is_root_device": false });
    for (key, value) in extra.as_object().into_iter().flatten() {
        if let Some(drive) = drive.as_object_mut() {
            drive.insert(key.clone(), value.clone());
        }
    }
    Ok(drive)
}

fn each_queue_has_a_thread(context: &Context) -> Outcome {
    for engine in ["Async", "Sync"] {
        let launch = Launch::new(&context.environment)?;
        let extra = json!({ "num_queues": 2, "io_engine": engine, "cache_type": "Writeback" });
        let disk = drive(&launch, "d", 64, &extra)?;
        let words = "do=hello do=load:mode=randwrite,depth=8,queues=2,ms=500,flush_every=64 \
                     do=pattern-write:seed=3 do=pattern-verify:seed=3";
        let machine = Machine::unikernel(&context.environment, words)
            .vcpus(2)
            .drive(disk);
        let monitor = launch.config(&machine.config())?.start()?;
        monitor.console.wait_for("hello", END_WITHIN)?;
        let threads = monitor.process().thread_names()?;
        for name in ["io d", "io d.1"] {
            ensure!(
                threads.iter().any(|thread| thread == name),
                "no `{name}` in {threads:?}"
            );
        }
        monitor
            .wait(END_WITHIN)?
            .expect(0)
            .map_err(|e| format!("{engine}: {}", text(&e)))?;
    }
    Ok(())
}

fn a_disk_with_queues_is_paused_resumed_and_replaced(context: &Context) -> Outcome {
    let launch = Launch::new(&context.environment)?;
    let disk = drive(
        &launch,
        "d",
        64,
        &json!({ "num_queues": 2, "cache_type": "Writeback" }),
    )?;
    let other = launch.directory().join("test-other");
    blank_image(&other, 64)?;
    let words = "do=hello do=load:mode=randwrite,depth=8,queues=2,ms=3000 \
                 do=pattern-write:seed=3 do=pattern-verify:seed=3";
    let machine = Machine::unikernel(&context.environment, words)
        .vcpus(2)
        .drive(disk);
    let monitor = launch.config(&machine.config())?.start()?;
    monitor.console.wait_for("hello", END_WITHIN)?;
    for _ in 0..context.count(10, 1000) {
        monitor.set_state("Paused")?;
        monitor.set_state("Resumed")?;
    }
    monitor.must(
        "PATCH",
        "/drives/d",
        Some(&json!({ "drive_id": "d", "path_on_host": other })),
    )?;
    monitor.wait(END_WITHIN)?.expect(0)
}

fn a_disk_grows(context: &Context) -> Outcome {
    let launch = Launch::new(&context.environment)?;
    let image = launch.directory().join("test-d");
    let disk = drive(&launch, "d", 4, &json!({ "cache_type": "Writeback" }))?;
    let words = "do=pattern-write:seed=1 do=tick:ms=150,count=12 do=capacity \
                 do=pattern-verify:mib=4,seed=1 do=pattern-write:offset_mib=4,mib=4,seed=2 \
                 do=pattern-verify:offset_mib=4,mib=4,seed=2 do=flush do=tick:ms=100,count=12 do=capacity";
    let machine = Machine::unikernel(&context.environment, words).drive(disk);
    let monitor = launch.config(&machine.config())?.start()?;
    monitor.console.wait_for("tick: n=0", END_WITHIN)?;
    let patch = |monitor: &Monitor, change: Value| {
        let mut body = json!({ "drive_id": "d" });
        if let (Some(body), Some(change)) = (body.as_object_mut(), change.as_object()) {
            body.extend(change.clone());
        }
        monitor.request("PATCH", "/drives/d", Some(&body))
    };
    for (size_bytes, remedy) in [(2 * MIB, "cannot shrink"), (8 * MIB + 1, "multiple of 512")] {
        let answer = patch(&monitor, json!({ "size_bytes": size_bytes }))?;
        ensure!(
            answer.status == 400 && answer.body.contains(remedy),
            "{size_bytes}: {}",
            answer.body
        );
    }
    let answer = patch(&monitor, json!({ "size_bytes": 8 * MIB }))?;
    ensure!(answer.status == 204, "{}", answer.body);
    ensure!(
        std::fs::metadata(&image)?.len() == 8 * MIB,
        "the image did not grow"
    );
    monitor
        .console
        .wait_for(&format!("capacity: sectors={} ", 8 * MIB / 512), END_WITHIN)?;
    monitor.console.wait_for("flush: ok", END_WITHIN)?;
    // From outside: the same path is looked at again.
    std::fs::OpenOptions::new()
        .write(true)
        .open(&image)?
        .set_len(16 * MIB)?;
    let answer = patch(&monitor, json!({ "path_on_host": image }))?;
    ensure!(answer.status == 204, "{}", answer.body);
    monitor
        .console
        .wait_for(&format!("capacity: sectors={} ", 16 * MIB / 512), END_WITHIN)?;
    monitor.wait(END_WITHIN)?.expect(0)
}

fn drives_of_a_group_share_its_limits(context: &Context) -> Outcome {
    let launch = Launch::new(&context.environment)?;
    let limits = json!({ "group_id": "slow", "ops": { "size": 32, "refill_time": 1000 } });
    let grouped = json!({ "rate_limiter_group": "slow" });
    let (first, second) = (
        drive(&launch, "a", 4, &grouped)?,
        drive(&launch, "b", 4, &grouped)?,
    );
    let free = drive(&launch, "c", 64, &json!({}))?;
    // 32 operations empty the bucket; then the free drive is as fast as ever, and the other one of the group waits.
    let words = "do=pattern-write:mib=2,bs=65536,dev=0 do=tick:ms=1,count=1 \
                 do=pattern-write:mib=64,bs=65536,dev=2 do=tick:ms=1,count=2 do=pattern-write:mib=2,bs=65536,dev=1";
    let machine = Machine::unikernel(&context.environment, words)
        .drive(first)
        .drive(second)
        .drive(free)
        .part("rate-limiter-groups", json!([limits]));
    let monitor = launch.config(&machine.config())?.start()?;
    monitor.console.wait_for("tick: n=0", END_WITHIN)?;
    let emptied = Instant::now();
    monitor.console.wait_for("tick: n=1", END_WITHIN)?;
    let free_took = emptied.elapsed();
    let ended = monitor.wait(END_WITHIN)?;
    ended.expect(0)?;
    let took = emptied.elapsed();
    ensure!(took >= Duration::from_millis(800), "the group took {took:?}");
    ensure!(
        free_took < took / 2,
        "1024 operations of a free drive took {free_took:?}"
    );
    Ok(())
}

/// 100 MiB/s in buckets of 10 ms: what a guest reads in four seconds, and what the disk's thread did for it.
fn a_rate_is_not_exceeded(context: &Context) -> Outcome {
    const BLOCK_BYTES: u64 = 64 << 10;
    const SECONDS: u64 = 4;
    // The bucket is full at first.
    const BLOCKS: u64 = (100 * SECONDS + 1) * MIB / BLOCK_BYTES;
    let launch = Launch::new(&context.environment)?;
    let limiter = json!({ "bandwidth": { "size": MIB, "refill_time": 10 } });
    let extra = json!({ "rate_limiter": limiter, "cache_type": "Writeback" });
    let disk = drive(&launch, "d", 64, &extra)?;
    let words = format!(
        "do=load:mode=seqread,bs={BLOCK_BYTES},depth=32,seconds={SECONDS},wait=irq do=tick:ms=500,count=2"
    );
    let machine = Machine::unikernel(&context.environment, &words).drive(disk);
    let monitor = launch.config(&machine.config())?.start()?;
    monitor.console.wait_for("tick: n=0", END_WITHIN)?;
    let threads = monitor.process().thread_times()?;
    let busy = threads.iter().find(|thread| thread.name == "io d");
    let busy = busy.ok_or("the disk has a thread")?.total;
    let ended = monitor.wait(END_WITHIN)?;
    ended.expect(0)?;
    let requests = ended.console.split_whitespace().find_map(|word| {
        let (name, value) = word.split_once('=')?;
        (name == "requests").then(|| value.parse::<u64>().ok()).flatten()
    });
    let requests = requests.ok_or_else(|| format!("no requests in:\n{}", ended.console))?;
    // Never more. How close it comes is up to a host that lets the guest ask in time; that the disk does not lose by
    // its own lateness is shown on a simulated clock.
    ensure!(
        (BLOCKS * 4 / 5..=BLOCKS * 101 / 100).contains(&requests),
        "{requests} blocks in {SECONDS} s, and {BLOCKS} were asked for"
    );
    ensure!(
        busy < Duration::from_secs(SECONDS) / 5,
        "the disk's thread ran for {busy:?} of {SECONDS} s"
    );
    Ok(())
}

fn patterns_come_back_written_through(context: &Context) -> Outcome {
    for engine in ["Async", "Sync"] {
        let launch = Launch::new(&context.environment)?;
        let extra = json!({ "cache_type": "Writethrough", "io_engine": engine });
        let disk = drive(&launch, "d", 4, &extra)?;
        let words = "do=capacity do=pattern-write:seed=4 do=pattern-verify:seed=4 do=write-zeroes:mib=1 \
                     do=read-check-zero:mib=1 do=flush";
        let ended = run(
            launch,
            &Machine::unikernel(&context.environment, words).drive(disk),
            END_WITHIN,
        )?;
        ended.expect(0).map_err(|e| format!("{engine}: {}", text(&e)))?;
        ensure!(ended.console.contains(" writeback=0 "), "{}", ended.console);
    }
    Ok(())
}

fn what_makes_no_sense_is_refused(context: &Context) -> Outcome {
    let refused = |extra: Value, groups: Value, remedy: &str| -> Outcome {
        let launch = Launch::new(&context.environment)?;
        let disk = drive(&launch, "d", 4, &extra)?;
        let machine = Machine::unikernel(&context.environment, "do=hello")
            .drive(disk)
            .part("rate-limiter-groups", groups);
        let ended = launch.config(&machine.config())?.spawn()?.wait(END_WITHIN)?;
        ended.expect(152)?;
        ensure!(
            ended.errors.contains(remedy),
            "no '{remedy}' in:\n{}",
            ended.errors
        );
        Ok(())
    };
    for queues in [0, 17] {
        refused(
            json!({ "num_queues": queues }),
            json!([]),
            "`num_queues` is 1 to 16",
        )?;
    }
    refused(
        json!({ "rate_limiter_group": "x" }),
        json!([]),
        "PUT /rate-limiter-groups/x first",
    )?;
    for extra in [json!({ "on_error": "wait" }), json!({ "timeout_ms": 500 })] {
        refused(extra, json!([]), "for images of a network")?;
    }
    refused(json!({}), json!([{ "group_id": "no such name" }]), "alphanumeric")
}
