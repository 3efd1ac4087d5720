//! A disk keeps what was written to it, by every engine and in every mode.

use std::path::Path;
use std::time::{Duration, Instant};

use coracle_tests::case::{Case, Context, text};
use coracle_tests::environment::Need;
use coracle_tests::guest::{Machine, blank_image, run};
use coracle_tests::monitor::{Ended, Launch};
use coracle_tests::{Outcome, ensure};
use serde_json::{Value, json};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "a_gibibyte_of_patterns_comes_back",
        need: Need::Kvm,
        run: a_gibibyte_of_patterns_comes_back,
    },
    Case {
        name: "patterns_come_back_in_every_mode",
        need: Need::Kvm,
        run: patterns_come_back_in_every_mode,
    },
    Case {
        name: "what_was_flushed_is_in_the_image",
        need: Need::Kvm,
        run: what_was_flushed_is_in_the_image,
    },
    Case {
        name: "requests_beyond_the_rules_fail_alone",
        need: Need::Kvm,
        run: requests_beyond_the_rules_fail_alone,
    },
    Case {
        name: "a_read_only_disk_refuses_writes",
        need: Need::Kvm,
        run: a_read_only_disk_refuses_writes,
    },
    Case {
        name: "discarded_ranges_become_zeroes",
        need: Need::Kvm,
        run: discarded_ranges_become_zeroes,
    },
    Case {
        name: "a_running_guest_gets_another_image",
        need: Need::Kvm,
        run: a_running_guest_gets_another_image,
    },
    Case {
        name: "a_limited_disk_is_as_slow_as_asked",
        need: Need::Kvm,
        run: a_limited_disk_is_as_slow_as_asked,
    },
    Case {
        name: "a_new_limit_applies_at_once",
        need: Need::Kvm,
        run: a_new_limit_applies_at_once,
    },
    Case {
        name: "without_io_uring_disks_work_and_say_so",
        need: Need::Kvm,
        run: without_io_uring_disks_work_and_say_so,
    },
    Case {
        name: "an_image_that_shrinks_is_an_error_in_the_guest",
        need: Need::Kvm,
        run: an_image_that_shrinks,
    },
    Case {
        name: "eighteen_disks_are_told_apart",
        need: Need::Kvm,
        run: many_disks_are_told_apart,
    },
];

const END_WITHIN: Duration = Duration::from_secs(60);
const MIB: u64 = 1 << 20;

fn a_gibibyte_of_patterns_comes_back(context: &Context) -> Outcome {
    let seed = context.seed.clone().below(1 << 31);
    let words = format!(
        "do=pattern-write:mib=1024,bs=1048576,depth=8,seed={seed} do=flush \
         do=pattern-verify:mib=1024,bs=1048576,depth=8,seed={seed}"
    );
    let ended = with_disk(context, &words, 1024, json!({ "cache_type": "Writeback" }))?;
    ended.expect(0)?;
    says(&ended, "pattern-verify: ok sectors=2097152")
}

fn patterns_come_back_in_every_mode(context: &Context) -> Outcome {
    let mut rows = Vec::new();
    for engine in ["Async", "Sync"] {
        for cache in ["Unsafe", "Writeback"] {
            for wait in ["poll", "irq"] {
                for (block_bytes, depth) in [
                    (512, 1),
                    (512, 64),
                    (4096, 1),
                    (4096, 32),
                    (65536, 8),
                    (1 << 22, 2),
                ] {
                    rows.push((engine, cache, wait, block_bytes, depth));
                }
            }
        }
    }
    let mut seed = context.seed.clone();
    let chosen = usize::try_from(context.count(8, 1000))?;
    for (engine, cache, wait, block_bytes, depth) in seed.sample(&rows, chosen) {
        let mib = if *block_bytes < 4096 { 1 } else { 16 };
        let arguments = format!(
            "mib={mib},offset_mib=3,bs={block_bytes},depth={depth},wait={wait},seed={}",
            seed.below(1 << 20)
        );
        let words =
            format!("do=pattern-write:{arguments} do=pattern-verify:{arguments} do=read-check-zero:mib=3");
        let ended = with_disk(
            context,
            &words,
            32,
            json!({ "io_engine": engine, "cache_type": cache }),
        )?;
        ended
            .expect(0)
            .map_err(|e| format!("{engine} {cache} {arguments}: {}", text(&e)))?;
    }
    Ok(())
}

/// The pattern of one machine is found by another, that has the image by the other engine.
fn what_was_flushed_is_in_the_image(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let image = directory.path().join("image");
    blank_image(&image, 16)?;
    let write = Machine::unikernel(&context.environment, "do=pattern-write:seed=7,wait=irq do=flush");
    run(
        Launch::new(&context.environment)?,
        &write.drive(drive(&image, json!({ "cache_type": "Writeback" }))),
        END_WITHIN,
    )?
    .expect(0)?;
    let first = std::fs::read(&image)?;
    ensure!(
        first
            .chunks(512)
            .all(|sector| sector.iter().any(|byte| *byte != 0)),
        "a sector of the image is empty"
    );
    let verify = Machine::unikernel(&context.environment, "do=pattern-verify:seed=7");
    run(
        Launch::new(&context.environment)?,
        &verify.drive(drive(&image, json!({ "io_engine": "Sync" }))),
        END_WITHIN,
    )?
    .expect(0)
}

fn requests_beyond_the_rules_fail_alone(context: &Context) -> Outcome {
    for engine in ["Async", "Sync"] {
        for wait in ["poll", "irq"] {
            let words =
                format!("do=out-of-range:wait={wait} do=unsupported:wait={wait} do=identity do=capacity");
            let ended = with_disk(
                context,
                &words,
                4,
                json!({ "io_engine": engine, "cache_type": "Writeback" }),
            )?;
            ended
                .expect(0)
                .map_err(|e| format!("{engine} {wait}: {}", text(&e)))?;
            says(&ended, "capacity: sectors=8192 ")?;
        }
    }
    Ok(())
}

fn a_read_only_disk_refuses_writes(context: &Context) -> Outcome {
    for engine in ["Async", "Sync"] {
        let ended = with_disk(
            context,
            "do=read-only",
            4,
            json!({ "io_engine": engine, "is_read_only": true }),
        )?;
        ended.expect(0)?;
    }
    Ok(())
}

fn discarded_ranges_become_zeroes(context: &Context) -> Outcome {
    let words = "do=capacity do=pattern-write:seed=3 do=write-zeroes:mib=2,offset_mib=1 \
                 do=pattern-verify:mib=1,seed=3 do=pattern-verify:mib=1,offset_mib=3,seed=3";
    let offered = with_disk(context, "do=capacity", 8, json!({}))?.console;
    if offered.contains("write_zeroes_sectors_max=0") {
        // As with Firecracker's drives: what is not offered cannot be asked for.
        let ended = with_disk(context, "do=write-zeroes:mib=1", 8, json!({}))?;
        return ended.expect(2);
    }
    with_disk(context, words, 8, json!({}))?.expect(0)
}

fn a_running_guest_gets_another_image(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let (first, second) = (directory.path().join("first"), directory.path().join("second"));
    blank_image(&first, 4)?;
    blank_image(&second, 4)?;
    let words = "do=pattern-write:mib=4,seed=1 do=tick:ms=200,count=10 do=pattern-write:mib=4,seed=2 do=exit:status=3";
    let machine = Machine::unikernel(&context.environment, words).disk("d", &first);
    let monitor = Launch::new(&context.environment)?
        .config(&machine.config())?
        .start()?;
    monitor.console.wait_for("tick: n=0", END_WITHIN)?;
    let body = json!({ "drive_id": "d", "path_on_host": second });
    monitor.must("PATCH", "/drives/d", Some(&body))?;
    let held = monitor.process().descriptors()?;
    ensure!(
        !held.iter().any(|path| path == &first),
        "the old image is still open"
    );
    monitor.wait(END_WITHIN)?.expect(3)?;
    for (image, seed) in [(&first, 1), (&second, 2)] {
        let machine = Machine::unikernel(
            &context.environment,
            &format!("do=pattern-verify:mib=4,seed={seed}"),
        );
        run(
            Launch::new(&context.environment)?,
            &machine.disk("d", image),
            END_WITHIN,
        )?
        .expect(0)
        .map_err(|e| format!("seed {seed}: {}", text(&e)))?;
    }
    Ok(())
}

fn a_limited_disk_is_as_slow_as_asked(context: &Context) -> Outcome {
    // 8 MiB at 4 MiB/s, the first 4 of which the full bucket gives at once; then 64 requests at 32 a second.
    let rows = [
        (
            json!({ "bandwidth": { "size": 4 * MIB, "refill_time": 1000 } }),
            "mib=8,bs=65536,depth=4",
            800,
        ),
        (
            json!({ "ops": { "size": 32, "refill_time": 1000 } }),
            "mib=4,bs=65536,depth=4",
            800,
        ),
    ];
    for (limiter, arguments, at_least_ms) in rows {
        for engine in ["Async", "Sync"] {
            let start = Instant::now();
            let words = format!("do=pattern-write:{arguments}");
            with_disk(
                context,
                &words,
                16,
                json!({ "io_engine": engine, "rate_limiter": limiter }),
            )?
            .expect(0)?;
            let taken = start.elapsed();
            ensure!(
                taken >= Duration::from_millis(at_least_ms),
                "{engine} {limiter}: {taken:?}"
            );
            ensure!(taken < Duration::from_secs(15), "{engine} {limiter}: {taken:?}");
        }
    }
    Ok(())
}

fn a_new_limit_applies_at_once(context: &Context) -> Outcome {
    let launch = Launch::new(&context.environment)?;
    let disk = launch.directory().join("test-disk");
    blank_image(&disk, 16)?;
    // Without the second limit this would take 17 minutes.
    let limiter = json!({ "ops": { "size": 1, "refill_time": 4000 } });
    let machine = Machine::unikernel(
        &context.environment,
        "do=hello do=pattern-write:mib=16,bs=65536,depth=4",
    )
    .drive(drive(&disk, json!({ "rate_limiter": limiter })));
    let monitor = launch.config(&machine.config())?.start()?;
    monitor.console.wait_for("hello", END_WITHIN)?;
    std::thread::sleep(Duration::from_millis(200));
    // A bucket of size 0 is no limit.
    let unlimited = json!({ "drive_id": "d", "rate_limiter": { "ops": { "size": 0, "refill_time": 0 } } });
    monitor.must("PATCH", "/drives/d", Some(&unlimited))?;
    monitor.wait(Duration::from_secs(20))?.expect(0)
}

fn without_io_uring_disks_work_and_say_so(context: &Context) -> Outcome {
    let launch = Launch::new(&context.environment)?;
    let log = launch.directory().join("test-log");
    let disk = launch.directory().join("test-disk");
    blank_image(&disk, 8)?;
    let kept = tempfile::NamedTempFile::new()?;
    let machine = Machine::unikernel(
        &context.environment,
        "do=pattern-write:seed=1 do=pattern-verify:seed=1 do=tick:ms=500,count=2",
    )
    .drive(drive(&disk, json!({ "io_engine": "Async" })));
    let launch = launch
        .by_way_of([env!("CARGO_BIN_EXE_refuse"), "io_uring"])
        .config(&machine.config())?;
    let monitor = launch.start()?;
    monitor.console.wait_for("tick: n=1", END_WITHIN)?;
    std::fs::copy(&log, kept.path())?;
    let ended = monitor.wait(END_WITHIN)?;
    ended.expect(0)?;
    let said = format!("{}{}", ended.errors, std::fs::read_to_string(kept.path())?);
    ensure!(said.contains("io_uring"), "no warning about io_uring in:\n{said}");
    Ok(())
}

fn an_image_that_shrinks(context: &Context) -> Outcome {
    for engine in ["Async", "Sync"] {
        let launch = Launch::new(&context.environment)?;
        let disk = launch.directory().join("test-disk");
        blank_image(&disk, 8)?;
        let words = "do=hello do=tick:ms=200,count=5 do=read-check-zero:mib=8";
        let machine = Machine::unikernel(&context.environment, words)
            .drive(drive(&disk, json!({ "io_engine": engine })));
        let mut monitor = launch.config(&machine.config())?.start()?;
        monitor.console.wait_for("tick: n=0", END_WITHIN)?;
        std::fs::OpenOptions::new()
            .write(true)
            .open(&disk)?
            .set_len(MIB)?;
        ensure!(monitor.is_running()?, "{engine}: the monitor has died of it");
        // The guest's own check fails; what matters is that it is the guest's.
        monitor
            .wait(END_WITHIN)?
            .expect(1)
            .map_err(|e| format!("{engine}: {}", text(&e)))?;
    }
    Ok(())
}

fn many_disks_are_told_apart(context: &Context) -> Outcome {
    const DISKS: u64 = 18;
    let launch = Launch::new(&context.environment)?;
    // The guest drives eight disks at most; which eight is up to the seed.
    let mut words = String::from("do=info");
    let mut machine_drives = Vec::new();
    for number in 0..DISKS {
        let path = launch.directory().join(format!("test-disk{number}"));
        blank_image(&path, number + 1)?;
        machine_drives.push(drive_named(&format!("d{number}"), &path, &json!({})));
    }
    for number in 0..4 {
        words.push_str(&format!(" do=capacity:dev={number}"));
    }
    let machine = Machine::unikernel(&context.environment, &words);
    let machine = machine_drives.into_iter().fold(machine, Machine::drive);
    let ended = run(launch, &machine, END_WITHIN)?;
    ended.expect(0)?;
    says(&ended, &format!("devices={DISKS} "))?;
    for number in 0..4 {
        says(
            &ended,
            &format!("capacity: sectors={} ", (number + 1) * MIB / 512),
        )?;
    }
    Ok(())
}

/// Runs the unikernel guest with one blank disk.
fn with_disk(context: &Context, words: &str, mib: u64, extra: Value) -> Outcome<Ended> {
    let launch = Launch::new(&context.environment)?;
    let disk = launch.directory().join("test-disk");
    blank_image(&disk, mib)?;
    run(
        launch,
        &Machine::unikernel(&context.environment, words).drive(drive(&disk, extra)),
        END_WITHIN,
    )
}

fn drive(path: &Path, extra: Value) -> Value {
    drive_named("d", path, &extra)
}

fn drive_named(id: &str, path: &Path, extra: &Value) -> Value {
    let mut drive =
        json!({ "drive_id": id, "path_on_host": path, "is_root_device": false, "is_read_only": false });
    for (key, value) in extra.as_object().into_iter().flatten() {
        if let Some(drive) = drive.as_object_mut() {
            drive.insert(key.clone(), value.clone());
        }
    }
    drive
}

fn says(ended: &Ended, text: &str) -> Outcome {
    ensure!(
        ended.console.contains(text),
        "no '{text}' in:\n{}\n{}",
        ended.console,
        ended.errors
    );
    Ok(())
}
