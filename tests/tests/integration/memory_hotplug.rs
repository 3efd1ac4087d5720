//! Memory that comes to a guest that runs, and goes back to its host.

use std::time::{Duration, Instant};

use coracle_tests::case::{Case, Context, text};
use coracle_tests::certificates::Authority;
use coracle_tests::environment::Need;
use coracle_tests::guest::{Linux, Machine};
use coracle_tests::harness::receiver::Receiver;
use coracle_tests::monitor::{Launch, Monitor};
use coracle_tests::{Outcome, ensure};
use serde_json::{Value, json};

use super::snapshot::{Files, coraclectl, killed, loaded, saved, started, with};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "memory_comes_and_goes_and_its_host_has_it_back",
        need: Need::Kvm,
        run: comes_and_goes,
    },
    Case {
        name: "memory_that_has_come_goes_along_with_snapshots_and_diffs",
        need: Need::Kvm,
        run: is_saved,
    },
    Case {
        name: "memory_that_has_come_goes_along_to_another_process",
        need: Need::Kvm,
        run: migrates,
    },
    Case {
        name: "a_target_without_memory_for_what_is_to_come_refuses",
        need: Need::Kvm,
        run: is_refused_without_memory,
    },
    Case {
        name: "a_guest_plugs_no_more_than_it_is_given_and_reaches_nothing_else",
        need: Need::Kvm,
        run: is_held,
    },
    Case {
        name: "linux_plugs_memory_and_has_more_of_it",
        need: Need::Kvm,
        run: linux_has_more,
    },
    Case {
        name: "what_memory_that_comes_cannot_do_is_an_error_that_says_so",
        need: Need::Nothing,
        run: what_cannot_be,
    },
];

const SOON: Duration = Duration::from_secs(60);
const BOOT_MIB: u32 = 64;
const TOTAL_MIB: u64 = 256;

fn machine(context: &Context, words: &str) -> Machine {
    Machine::unikernel(&context.environment, words)
        .memory_mib(BOOT_MIB)
        .part("memory-hotplug", json!({ "total_size_mib": TOTAL_MIB }))
}

fn request(monitor: &Monitor, mib: u64) -> Outcome {
    monitor.must(
        "PATCH",
        "/hotplug/memory",
        Some(&json!({ "requested_size_mib": mib })),
    )?;
    Ok(())
}

fn status(monitor: &Monitor) -> Outcome<Value> {
    monitor.must("GET", "/hotplug/memory", None)?.json()
}

fn plugged(monitor: &Monitor) -> Outcome<u64> {
    let status = status(monitor)?;
    let mib = status.get("plugged_size_mib").and_then(Value::as_u64);
    Ok(mib.ok_or_else(|| format!("no plugged_size_mib in {status}"))?)
}

/// Has the guest have `mib` MiB more, or less, and waits until it has.
fn resized(monitor: &Monitor, mib: u64) -> Outcome {
    request(monitor, mib)?;
    let said = format!("mem-follow: ok plugged_mib={mib}\n");
    monitor.console.wait_for(&said, SOON)?;
    ensure!(plugged(monitor)? == mib, "{}", status(monitor)?);
    Ok(())
}

/// Has a guest give back all of it, which is the last thing that it does.
fn ends(monitor: Monitor) -> Outcome {
    request(&monitor, 0)?;
    let ended = monitor.wait(SOON)?;
    ended.expect(0)?;
    ensure!(
        ended.console.contains("mem-follow: ok plugged_mib=0\n"),
        "{}",
        ended.console
    );
    Ok(())
}

fn resident_mib(monitor: &Monitor) -> Outcome<u64> {
    Ok(monitor.process().resident_kib_of_mapping(TOTAL_MIB << 20)? >> 10)
}

fn comes_and_goes(context: &Context) -> Outcome {
    for (backing, all) in [("anonymous", 0), ("memfd", 1)] {
        let words = format!(
            "do=hello do=mem-follow:mib=140 do=mem-verify do=mem-follow:mib=6 do=mem-verify do=mem-follow:mib=10 \
             do=mem-verify do=mem-follow:mib=0,all={all} do=mem-follow:mib=2"
        );
        let config = with(
            machine(context, &words).config(),
            "/machine-config",
            "memory_backing",
            json!(backing),
        );
        let monitor = started(context, &config)?;
        monitor.console.wait_for("mem-follow: ready", SOON)?;
        let before = resident_mib(&monitor)?;
        resized(&monitor, 140)?;
        let most = resident_mib(&monitor)?;
        ensure!(most >= before + 140, "{backing}: {before} MiB, then {most}");
        resized(&monitor, 6)?;
        let less = resident_mib(&monitor)?;
        ensure!(
            less <= before + 8,
            "{backing}: {before} MiB, then {most}, then {less}"
        );
        resized(&monitor, 10)?;
        resized(&monitor, 0)?;
        let least = resident_mib(&monitor)?;
        ensure!(least <= before + 2, "{backing}: {before} MiB, then {least}");
        let metrics = monitor.must("GET", "/metrics", None)?.body;
        for counted in ["plug_bytes_total 150994944", "unplug_bytes_total 150994944"] {
            ensure!(metrics.contains(counted), "{backing}: {metrics}");
        }
        request(&monitor, 2)?;
        monitor.wait(SOON)?.expect(0)?;
    }
    Ok(())
}

/// What a guest does that is saved between two of its steps.
const STEPS: &str = "do=hello do=mem-follow:mib=132 do=mem-verify do=mem-follow:mib=4 do=mem-verify do=mem-follow:mib=136 \
                     do=mem-verify do=mem-follow:mib=0";

/// Lets a guest that has 132 MiB do the rest.
fn goes_on(monitor: Monitor) -> Outcome {
    ensure!(plugged(&monitor)? == 132, "{}", status(&monitor)?);
    for mib in [4, 136] {
        resized(&monitor, mib)?;
    }
    ends(monitor)
}

fn is_saved(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let config = machine(context, STEPS).config();
    let config = with(config, "/machine-config", "track_dirty_pages", json!(true));
    let first = started(context, &config)?;
    resized(&first, 132)?;
    let full = Files::in_directory(directory.path(), "test-full");
    saved(&first, &full, "Full")?;
    first.set_state("Resumed")?;
    resized(&first, 4)?;
    let diff = Files::in_directory(directory.path(), "test-diff");
    saved(&first, &diff, "Diff")?;
    first.set_state("Resumed")?;
    resized(&first, 136)?;
    let grown = Files::in_directory(directory.path(), "test-grown");
    saved(&first, &grown, "Diff")?;
    killed(first)?;
    for verify in ["lazy", "off"] {
        let monitor = loaded(context, &full, verify)?;
        goes_on(monitor).map_err(|e| format!("{verify}: {}", text(&e)))?;
    }
    // A machine that was loaded, saved with less than it had, and then with more again.
    for verify in ["lazy", "off"] {
        let again = Files::in_directory(directory.path(), &format!("test-again-{verify}"));
        let monitor = loaded(context, &full, verify)?;
        resized(&monitor, 4)?;
        saved(&monitor, &again, "Full")?;
        killed(monitor)?;
        let monitor = loaded(context, &again, "lazy")?;
        ensure!(plugged(&monitor)? == 4, "{verify}: {}", status(&monitor)?);
        resized(&monitor, 136)?;
        ends(monitor)?;
    }
    let parts = [&full, &diff, &grown];
    let merged = parts.into_iter().skip(1).enumerate().try_fold(
        Files {
            state: full.state.clone(),
            memory: full.memory.clone(),
        },
        |merged, (number, part)| -> Outcome<Files> {
            let next = Files::in_directory(directory.path(), &format!("test-merged{number}"));
            let paths = [
                &merged.state,
                &merged.memory,
                &part.state,
                &part.memory,
                &next.state,
                &next.memory,
            ];
            coraclectl(context, &["merge"], &paths)?;
            Ok(next)
        },
    )?;
    let monitor = loaded(context, &merged, "lazy")?;
    ensure!(plugged(&monitor)? == 136, "{}", status(&monitor)?);
    ends(monitor)
}

fn migrates(context: &Context) -> Outcome {
    for postcopy in [false, true] {
        let directory = tempfile::tempdir()?;
        let source = started(context, &machine(context, STEPS).config())?;
        resized(&source, 132)?;
        let tls = Authority::new(directory.path())?.host("127.0.0.1")?;
        let receive = json!({ "listen": "127.0.0.1:0", "tls": tls });
        let receiver = Receiver::of(Launch::new(&context.environment)?.start()?, &receive)?;
        let mut send = json!({ "to": receiver.to(), "tls": tls });
        if postcopy {
            for (member, value) in [
                ("allow_postcopy", json!(true)),
                ("timeout_s", json!(0)),
                ("downtime_ms", json!(1)),
            ] {
                send = with(send, "", member, value);
            }
        }
        source.must("PUT", "/migration/send", Some(&send))?;
        let arrived = receiver.received()?;
        goes_on(arrived).map_err(|e| format!("postcopy {postcopy}: {}", text(&e)))?;
    }
    Ok(())
}

fn is_refused_without_memory(context: &Context) -> Outcome {
    // More than a host for tests has.
    const MUCH_MIB: u64 = 512 << 10;
    let directory = tempfile::tempdir()?;
    let machine = Machine::unikernel(&context.environment, "do=hello do=registers:ms=100000,seed=1")
        .memory_mib(BOOT_MIB)
        .part(
            "memory-hotplug",
            json!({ "total_size_mib": MUCH_MIB, "slot_size_mib": 1024 }),
        );
    let source = started(context, &machine.config())?;
    source.console.wait_for("registers: ready", SOON)?;
    let tls = Authority::new(directory.path())?.host("127.0.0.1")?;
    let receive = json!({ "listen": "127.0.0.1:0", "tls": tls });
    // Never in a jail: what its host has to give is nothing that is known there.
    let receiver = Receiver::of(Launch::of(&context.environment.coracle)?.start()?, &receive)?;
    let send = json!({ "to": receiver.to(), "tls": tls });
    // The guest has plugged nothing, and may at any time.
    request(&source, MUCH_MIB)?;
    let answer = source.request("PUT", "/migration/send", Some(&send))?;
    let words = format!(
        "the guest has {} MiB of memory, of which {MUCH_MIB} MiB have come while it ran or are to come",
        MUCH_MIB + u64::from(BOOT_MIB)
    );
    ensure!(
        answer.status == 400 && answer.body.contains(&words),
        "{} {}",
        answer.status,
        answer.body
    );
    Ok(())
}

fn is_held(context: &Context) -> Outcome {
    // Of the second slot nothing is plugged: what is written there is nowhere.
    let words = "do=hello do=mem-hostile do=mem-follow:mib=6 do=mem-hostile do=mem-touch:offset_mib=130,seed=77 do=mem-verify \
                 do=mem-follow:mib=0,all=1 do=mem-touch:offset_mib=0,seed=78 do=mem-hostile do=mem-follow:mib=132";
    let monitor = started(context, &machine(context, words).config())?;
    monitor.console.wait_for("mem-hostile: ok", SOON)?;
    let before = resident_mib(&monitor)?;
    resized(&monitor, 6)?;
    monitor
        .console
        .wait_for("mem-touch: offset_mib=130 found=", SOON)?;
    request(&monitor, 0)?;
    monitor.console.wait_for("mem-touch: offset_mib=0 found=", SOON)?;
    let said = monitor.console.text();
    ensure!(
        !said.contains("found=0x4d") && !said.contains("found=0x4e"),
        "what is written to no memory is read again: {said}"
    );
    ensure!(resident_mib(&monitor)? <= before + 1, "{before} MiB before");
    request(&monitor, 132)?;
    let ended = monitor.wait(SOON)?;
    ended.expect(0)?;
    ensure!(
        ended.console.matches("mem-hostile: ok").count() == 3,
        "{}",
        ended.console
    );
    Ok(())
}

/// A boot takes ten seconds where kernel code is emulated, and a memory block some more.
const LINUX_WITHIN: Duration = Duration::from_secs(240);

fn total_kib(console: &str) -> Vec<u64> {
    let lines = console.lines().filter_map(|line| line.strip_prefix("MemTotal:"));
    lines
        .filter_map(|rest| rest.trim().strip_suffix("kB")?.trim().parse().ok())
        .collect()
}

fn linux_has_more(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let words = "run while true; do grep MemTotal /proc/meminfo; sleep 1; done";
    let machine = Linux::read(&context.environment)?
        .machine("smp", directory.path(), words)?
        .read_only_root()
        .memory_mib(128)
        .part("memory-hotplug", json!({ "total_size_mib": 128 }));
    let config = machine.config();
    let arguments = config
        .pointer("/boot-source/boot_args")
        .and_then(Value::as_str)
        .ok_or("the machine has boot arguments")?
        .replacen(" -- ", " memhp_default_state=online -- ", 1);
    let config = with(config, "/boot-source", "boot_args", json!(arguments));
    let monitor = started(context, &config)?;
    monitor.console.wait_for("MemTotal:", LINUX_WITHIN)?;
    let begun = Instant::now();
    request(&monitor, 128)?;
    // The kernel says so when it has a page frame for each of them, which it makes one by one.
    let has_more = |totals: &[u64]| match totals {
        [before, .., after] => *after >= before + (120 << 10),
        _ => false,
    };
    while !has_more(&total_kib(&monitor.console.text())) {
        ensure!(
            begun.elapsed() < LINUX_WITHIN,
            "{}; console:\n{}",
            status(&monitor)?,
            monitor.console.text()
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    ensure!(plugged(&monitor)? == 128, "{}", status(&monitor)?);
    killed(monitor)
}

/// Asks for something that is refused with these words.
fn refused(monitor: &Monitor, method: &str, body: Option<Value>, words: &str) -> Outcome {
    let answer = monitor.request(method, "/hotplug/memory", body.as_ref())?;
    ensure!(answer.status == 400, "{method} {body:?}: {answer:?}");
    ensure!(answer.fault().contains(words), "{method} {body:?}: {answer:?}");
    Ok(())
}

fn what_cannot_be(context: &Context) -> Outcome {
    let monitor = Launch::new(&context.environment)?.start()?;
    let put = |body: Value, words: &str| refused(&monitor, "PUT", Some(body), words);
    put(json!({}), "total_size_mib")?;
    put(
        json!({ "total_size_mib": 100 }),
        "total_size_mib is 100; choose a multiple of slot_size_mib (128)",
    )?;
    put(
        json!({ "total_size_mib": 128, "block_size_mib": 3 }),
        "block_size_mib is 3; choose a power of two",
    )?;
    put(
        json!({ "total_size_mib": 128, "slot_size_mib": 64 }),
        "slot_size_mib is 64; choose a multiple of block_size_mib (2), at least 128",
    )?;
    put(json!({ "total_size_mib": 1 << 30 }), "at most 524288")?;
    put(json!({ "total_size_mib": 128, "more": 1 }), "unknown field")?;
    refused(&monitor, "GET", None, "not supported before starting")?;
    let patch = |mib: u64| Some(json!({ "requested_size_mib": mib }));
    refused(&monitor, "PATCH", patch(2), "not supported before starting")?;
    let asked = json!({ "total_size_mib": 256, "block_size_mib": 4 });
    monitor.must("PUT", "/hotplug/memory", Some(&asked))?;
    let expected = json!({ "total_size_mib": 256, "block_size_mib": 4, "slot_size_mib": 128 });
    let config = monitor.must("GET", "/vm/config", None)?.json()?;
    ensure!(config.get("memory-hotplug") == Some(&expected), "{config}");
    if context.environment.lacks(Need::Kvm).is_none() {
        what_cannot_be_of_a_guest(context)?;
    }
    Ok(())
}

fn what_cannot_be_of_a_guest(context: &Context) -> Outcome {
    let patch = |mib: u64| Some(json!({ "requested_size_mib": mib }));
    let monitor = started(
        context,
        &machine(context, "do=hello do=spin:seconds=forever").config(),
    )?;
    let put = Some(json!({ "total_size_mib": 256 }));
    refused(&monitor, "PUT", put, "not supported after starting")?;
    let words = "choose a multiple of block_size_mib (2), at most total_size_mib (256)";
    for mib in [1, 3, 257, 258, 1 << 20] {
        refused(&monitor, "PATCH", patch(mib), words)?;
    }
    request(&monitor, 256)?;
    let expected = json!({
        "total_size_mib": 256, "block_size_mib": 2, "slot_size_mib": 128, "plugged_size_mib": 0, "requested_size_mib": 256,
    });
    ensure!(status(&monitor)? == expected, "{}", status(&monitor)?);
    let without = Machine::unikernel(&context.environment, "do=hello do=spin:seconds=forever");
    let monitor = started(context, &without.config())?;
    refused(
        &monitor,
        "GET",
        None,
        "has no memory that comes and goes: set it with PUT /hotplug/memory",
    )?;
    refused(&monitor, "PATCH", patch(2), "has no memory that comes and goes")?;
    Ok(())
}
