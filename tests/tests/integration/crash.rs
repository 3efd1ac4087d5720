//! A monitor that is killed under load leaves an image on which nothing that was acknowledged is lost.
//!
//! The page cache survives the monitor, so this shows the order of writes and that nothing acknowledged is kept in the
//! monitor; what an unsent flush would cost, only a cache that forgets can show: `harness::proxy`.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use coracle_tests::case::{Case, Context, text};
use coracle_tests::environment::Need;
use coracle_tests::guest::Linux;
use coracle_tests::monitor::Launch;
use coracle_tests::seed::Seed;
use coracle_tests::{Outcome, ensure};
use rustix::process::Signal;
use serde_json::json;

pub(crate) const CASES: &[Case] = &[Case {
    name: "ext4_keeps_what_was_acknowledged_before_a_kill",
    need: Need::Kvm,
    run: ext4_keeps_what_was_acknowledged_before_a_kill,
}];

/// A boot takes ten seconds where kernel code is emulated, and ten times that on a host with ten times its work.
const RECORD_WITHIN: Duration = Duration::from_secs(240);
const RECORD_KIB: u64 = 8;
/// A kill comes after so many records at most: a second or two of work where kernel code is emulated.
const RECORDS_MAX: u64 = 40;
/// And then within such a time, so that it falls anywhere between two acknowledgements.
const MICROSECONDS_MAX: u64 = 60_000;

fn ext4_keeps_what_was_acknowledged_before_a_kill(context: &Context) -> Outcome {
    let mut seed = context.seed.clone();
    for crash in 0..context.count(1, 20) {
        let engine = if crash % 2 == 0 { "Async" } else { "Sync" };
        survive(context, engine, &mut seed).map_err(|e| format!("crash {crash}, {engine}: {}", text(&e)))?;
    }
    Ok(())
}

/// One boot, one kill, and what is on the disk then.
fn survive(context: &Context, engine: &str, seed: &mut Seed) -> Outcome {
    let first_seed = seed.below(1 << 31);
    let directory = tempfile::tempdir()?;
    let words = format!("records 1000000 {RECORD_KIB} {first_seed}");
    let machine = Linux::read(&context.environment)?
        .machine("smp", directory.path(), &words)?
        .root("cache_type", &json!("Writeback"))
        .root("io_engine", &json!(engine));
    let monitor = Launch::new(&context.environment)?
        .config(&machine.config())?
        .start()?;
    let last = 1 + seed.below(RECORDS_MAX);
    monitor
        .console
        .wait_for(&format!("init: record {last}\r"), RECORD_WITHIN)?;
    std::thread::sleep(Duration::from_micros(seed.below(MICROSECONDS_MAX)));
    monitor.signal(Signal::KILL)?;
    let ended = monitor.wait(Duration::from_secs(20))?;
    let acknowledged = acknowledged(&ended.console);
    ensure!(
        acknowledged >= last,
        "{acknowledged} of {last} records on the console:\n{}",
        ended.console
    );

    let image = directory.path().join("test-root.ext4");
    replay(&image)?;
    let found = directory.path().join("found");
    std::fs::create_dir(&found)?;
    let request = format!("rdump /data/records {}", found.display());
    let dumped = Command::new("/sbin/debugfs")
        .args(["-R", &request])
        .arg(&image)
        .output()?;
    for number in 1..=acknowledged {
        let path = found.join("records").join(number.to_string());
        let content = std::fs::read(&path).map_err(|e| {
            let said = String::from_utf8_lossy(&dumped.stderr);
            format!("record {number} of {acknowledged} is not there: {e}; {said}")
        })?;
        let mut expected = Seed::from(first_seed + number);
        let words = (0..RECORD_KIB * 1024 / 8).flat_map(|_| expected.draw().to_le_bytes());
        ensure!(
            content == words.collect::<Vec<u8>>(),
            "record {number} of {acknowledged} holds something else than was acknowledged"
        );
    }
    Ok(())
}

/// The last record that the guest has said to be safe, in a whole line.
fn acknowledged(console: &str) -> u64 {
    // A line that the kill has cut off would name another number.
    let whole = console.split_inclusive('\n').filter(|line| line.ends_with('\n'));
    let numbers = whole.filter_map(|line| line.trim_end().strip_prefix("init: record ")?.parse().ok());
    numbers.max().unwrap_or(0)
}

/// Replays the journal, which must be all that there is to do.
fn replay(image: &Path) -> Outcome {
    let check = |how: &str| -> Outcome<(Option<i32>, String)> {
        let checked = Command::new("/sbin/e2fsck").arg(how).arg(image).output()?;
        let said = String::from_utf8_lossy(&checked.stdout).into_owned();
        Ok((checked.status.code(), said))
    };
    // -p repairs what is sure to be harmless and names it. It is silent about the totals in the superblock alone,
    // which the kernel counts at each mount and does not keep.
    let (status, said) = check("-fp")?;
    ensure!(
        said.contains("recovering journal"),
        "the disk was quiet when its monitor was killed: {said}"
    );
    let is_expected = |line: &str| line.ends_with(": recovering journal") || line.ends_with(" blocks");
    ensure!(
        matches!(status, Some(0 | 1)) && said.lines().all(is_expected),
        "e2fsck -fp ended with {status:?}: {said}"
    );
    let (status, said) = check("-fn")?;
    ensure!(
        status == Some(0),
        "e2fsck -fn after the replay: {status:?} {said}"
    );
    Ok(())
}
