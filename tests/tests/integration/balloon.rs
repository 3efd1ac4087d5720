//! Memory that a real Linux gives back to its host, and takes again.

use std::time::{Duration, Instant};

use coracle_tests::case::{Case, Context};
use coracle_tests::environment::Need;
use coracle_tests::guest::{Linux, Machine};
use coracle_tests::monitor::{Launch, Monitor};
use coracle_tests::{Outcome, ensure};
use serde_json::{Value, json};

use super::snapshot::{Files, killed, loaded, saved, started, with};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "what_linux_has_freed_goes_back_to_the_host_by_itself_and_when_it_is_asked",
        need: Need::Kvm,
        run: frees,
    },
    Case {
        name: "a_balloon_grows_moves_with_its_guest_and_shrinks_where_memory_runs_out",
        need: Need::Kvm,
        run: grows_and_shrinks,
    },
    Case {
        name: "what_a_balloon_cannot_do_is_an_error_that_says_so",
        need: Need::Nothing,
        run: what_cannot_be,
    },
    Case {
        name: "what_a_balloon_cannot_do_while_its_guest_runs_is_an_error_that_says_so",
        need: Need::Kvm,
        run: what_cannot_be_of_a_guest,
    },
];

/// A boot takes ten seconds where kernel code is emulated, and a page some tenths of a millisecond.
const END_WITHIN: Duration = Duration::from_secs(240);
const USED_MIB: u64 = 32;
/// Of what was used, how much comes back at least: Linux tells of blocks of 4 MiB that are free as a whole.
const FREED_MIB_MIN: u64 = 12;
const PAGES_PER_MIB: u64 = 256;

fn machine(
    context: &Context,
    memory_mib: u32,
    words: &str,
    balloon: Value,
) -> Outcome<(tempfile::TempDir, Machine)> {
    let directory = tempfile::tempdir()?;
    let machine = Linux::read(&context.environment)?
        .machine("smp", directory.path(), words)?
        .read_only_root()
        .memory_mib(memory_mib)
        .part("balloon", balloon);
    Ok((directory, machine))
}

/// How much of the guest's memory is resident.
fn resident_mib(monitor: &Monitor, memory_mib: u32) -> Outcome<u64> {
    let bytes = u64::from(memory_mib) << 20;
    Ok(monitor.process().resident_kib_of_mapping(bytes)? >> 10)
}

fn wait_until(what: &str, mut condition: impl FnMut() -> Outcome<bool>) -> Outcome {
    let begun = Instant::now();
    while !condition()? {
        ensure!(begun.elapsed() < END_WITHIN, "it takes too long: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

fn get(monitor: &Monitor, path: &str) -> Outcome<Value> {
    monitor.must("GET", path, None)?.json()
}

/// A member of the last statistics.
fn told(monitor: &Monitor, member: &str) -> Outcome<u64> {
    let statistics = get(monitor, "/balloon/statistics")?;
    Ok(statistics.get(member).and_then(Value::as_u64).unwrap_or(u64::MAX))
}

fn frees(context: &Context) -> Outcome {
    // Linux 6.1 reports while there is more than 128 MiB free.
    const MEMORY_MIB: u32 = 256;
    let balloon = json!({
        "amount_mib": 0, "deflate_on_oom": false, "stats_polling_interval_s": 1, "free_page_reporting": true,
        "free_page_hinting": true,
    });
    let words = format!("use-memory {USED_MIB} count 200 use-memory {USED_MIB} exit 7");
    let (_directory, machine) = machine(context, MEMORY_MIB, &words, balloon.clone())?;
    let mut monitor = started(context, &machine.config())?;
    let used = format!("use-memory: {USED_MIB} MiB used, 0 pages wrong");
    monitor.console.wait_for(&used, END_WITHIN)?;
    let before = resident_mib(&monitor, MEMORY_MIB)?;
    monitor.console.wait_for("count 0", END_WITHIN)?;
    let most = before - FREED_MIB_MIN;
    wait_until("free memory goes back by itself", || {
        Ok(resident_mib(&monitor, MEMORY_MIB)? <= most)
    })?;
    wait_until("statistics", || {
        Ok(told(&monitor, "free_memory")? < u64::from(MEMORY_MIB) << 20)
    })?;
    let total = told(&monitor, "total_memory")?;
    ensure!(
        total > 200 << 20 && total < u64::from(MEMORY_MIB) << 20,
        "{total}"
    );

    monitor.must("PATCH", "/balloon/hinting/start", None)?;
    wait_until("the guest has its memory back", || {
        let status = get(&monitor, "/balloon/hinting/status")?;
        Ok(status.get("host_cmd") == Some(&json!(1)))
    })?;
    let metrics = monitor.must("GET", "/metrics", None)?.body;
    let counted = |name: &str| {
        let line = metrics
            .lines()
            .find(|line| line.contains(name) && !line.starts_with('#'));
        line.and_then(|line| line.rsplit(' ').next()?.parse().ok())
            .unwrap_or(0_u64)
    };
    ensure!(counted("free_page_report_freed") >= USED_MIB << 20, "{metrics}");
    ensure!(counted("free_page_hint_freed") >= USED_MIB << 20, "{metrics}");
    ensure!(
        counted("free_page_hint_fails") + counted("free_page_report_fails") == 0,
        "{metrics}"
    );
    ensure!(
        get(&monitor, "/balloon")? == balloon,
        "{:?}",
        get(&monitor, "/balloon")
    );
    // All of it can be used again.
    monitor.type_in(b"\n")?;
    let ended = monitor.wait(END_WITHIN)?;
    ended.expect(7)?;
    ensure!(ended.console.matches(&used).count() == 2, "{}", ended.console);
    Ok(())
}

fn grows_and_shrinks(context: &Context) -> Outcome {
    const MEMORY_MIB: u32 = 96;
    const AMOUNT_MIB: u64 = 56;
    let balloon = json!({ "amount_mib": 0, "deflate_on_oom": true, "stats_polling_interval_s": 1 });
    let words = format!("use-memory {USED_MIB} count 200 use-memory 40 exit 7");
    let (directory, machine) = machine(context, MEMORY_MIB, &words, balloon)?;
    let config = with(
        machine.config(),
        "/machine-config",
        "memory_backing",
        json!("memfd"),
    );
    let first = started(context, &config)?;
    first.console.wait_for("count 0", END_WITHIN)?;
    let before = resident_mib(&first, MEMORY_MIB)?;
    let grow = json!({ "amount_mib": AMOUNT_MIB });
    first.must("PATCH", "/balloon", Some(&grow))?;
    wait_until("the balloon grows", || {
        Ok(told(&first, "actual_mib")? == AMOUNT_MIB)
    })?;
    ensure!(
        told(&first, "target_pages")? == AMOUNT_MIB * PAGES_PER_MIB,
        "the target"
    );
    // What the guest had used lies in the balloon now, or is left to it.
    let after = resident_mib(&first, MEMORY_MIB)?;
    ensure!(
        after + USED_MIB / 2 <= before,
        "{before} MiB before, {after} after"
    );
    let free = told(&first, "free_memory")?;
    ensure!(
        free < 40 << 20,
        "{free} bytes are free, which is more than there can be"
    );

    let files = Files::in_directory(directory.path(), "test-balloon");
    saved(&first, &files, "Full")?;
    killed(first)?;
    let mut second = loaded(context, &files, "lazy")?;
    ensure!(told(&second, "actual_mib")? == AMOUNT_MIB, "it came along");
    let config = get(&second, "/balloon")?;
    ensure!(config.get("amount_mib") == Some(&json!(AMOUNT_MIB)), "{config}");
    let here = resident_mib(&second, MEMORY_MIB)?;
    ensure!(
        here + AMOUNT_MIB / 2 <= u64::from(MEMORY_MIB),
        "{here} MiB came along"
    );
    // The program needs more than there is outside the balloon.
    second.type_in(b"\n")?;
    let ended = second.wait(END_WITHIN)?;
    ended.expect(7)?;
    ensure!(
        ended.console.contains("use-memory: 40 MiB used, 0 pages wrong"),
        "{}",
        ended.console
    );
    Ok(())
}

/// Asks for something that is refused with these words.
fn refused(monitor: &Monitor, method: &str, path: &str, body: Option<Value>, words: &str) -> Outcome {
    let answer = monitor.request(method, path, body.as_ref())?;
    ensure!(answer.status == 400, "{method} {path}: {answer:?}");
    ensure!(answer.fault().contains(words), "{method} {path}: {answer:?}");
    Ok(())
}

fn amount(mib: u32) -> Option<Value> {
    Some(json!({ "amount_mib": mib }))
}

fn every(seconds: u32) -> Option<Value> {
    Some(json!({ "stats_polling_interval_s": seconds }))
}

fn balloon(mib: u32) -> Value {
    json!({ "amount_mib": mib, "deflate_on_oom": false })
}

/// What is about a guest that runs.
const OF_A_GUEST: [(&str, &str); 4] = [
    ("GET", "/balloon/statistics"),
    ("GET", "/balloon/hinting/status"),
    ("PATCH", "/balloon/hinting/start"),
    ("PATCH", "/balloon/hinting/stop"),
];

fn what_cannot_be(context: &Context) -> Outcome {
    let monitor = Launch::new(&context.environment)?.start()?;
    let refused = |method: &str, path: &str, body, words: &str| refused(&monitor, method, path, body, words);
    refused("GET", "/balloon", None, "has no balloon")?;
    refused("PATCH", "/balloon", amount(1), "has no balloon")?;
    refused("PATCH", "/balloon/statistics", every(1), "has no balloon")?;
    refused("PUT", "/balloon", Some(balloon(129)), "more than the 128 MiB")?;
    refused("PUT", "/balloon", amount(1), "deflate_on_oom")?;
    monitor.must("PUT", "/balloon", Some(&balloon(100)))?;
    monitor.must("PATCH", "/balloon", amount(128).as_ref())?;
    refused("PATCH", "/balloon", amount(129), "more than the 128 MiB")?;
    let smaller = json!({ "mem_size_mib": 127 });
    refused("PATCH", "/machine-config", Some(smaller), "amount_mib of 128")?;
    refused("PATCH", "/balloon/statistics", every(1), "cannot become")?;
    for (method, path) in OF_A_GUEST {
        refused(method, path, None, "not supported before starting")?;
    }
    let expected = json!({
        "amount_mib": 128, "deflate_on_oom": false, "stats_polling_interval_s": 0, "free_page_hinting": false,
        "free_page_reporting": false,
    });
    ensure!(
        get(&monitor, "/balloon")? == expected,
        "{:?}",
        get(&monitor, "/balloon")
    );
    let config = get(&monitor, "/vm/config")?;
    ensure!(config.get("balloon") == Some(&expected), "{config}");
    Ok(())
}

fn what_cannot_be_of_a_guest(context: &Context) -> Outcome {
    let monitor = Launch::new(&context.environment)?.start()?;
    let refused = |method: &str, path: &str, body, words: &str| refused(&monitor, method, path, body, words);
    let machine = Machine::unikernel(&context.environment, "do=hello do=tick:ms=10,count=1000000");
    monitor.configure(&machine.memory_mib(64).part("balloon", balloon(1)).config())?;
    monitor.start_instance()?;
    for (method, path) in OF_A_GUEST {
        let words = if path.ends_with("statistics") {
            "has no statistics"
        } else {
            "takes no hints"
        };
        refused(method, path, None, words)?;
    }
    refused("PATCH", "/balloon/statistics", every(1), "cannot become")?;
    refused(
        "PUT",
        "/balloon",
        Some(balloon(1)),
        "not supported after starting",
    )?;
    refused("PATCH", "/balloon", amount(65), "more than the 64 MiB")?;
    monitor.must("PATCH", "/balloon", amount(7).as_ref())?;
    let config = get(&monitor, "/balloon")?;
    ensure!(config.get("amount_mib") == Some(&json!(7)), "{config}");
    Ok(())
}
