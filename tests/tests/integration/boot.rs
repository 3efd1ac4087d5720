//! Every boot protocol hands over what it should.

use std::time::{Duration, Instant};

use coracle_tests::case::{Case, Context};
use coracle_tests::environment::Need;
use coracle_tests::guest::Machine;
use coracle_tests::monitor::{Ended, Launch};
use coracle_tests::probe::{self, PROBE_STATUS, Protocol};
use coracle_tests::{Outcome, ensure};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "an_elf_kernel_with_a_pvh_note_gets_start_info",
        need: Need::Kvm,
        run: |context| hands_over(context, Protocol::Pvh),
    },
    Case {
        name: "an_elf_kernel_without_a_note_gets_the_zero_page",
        need: Need::Kvm,
        run: |context| hands_over(context, Protocol::Linux64),
    },
    Case {
        name: "a_bzimage_gets_the_zero_page",
        need: Need::Kvm,
        run: |context| hands_over(context, Protocol::BzImage),
    },
    Case {
        name: "a_guest_that_says_that_it_has_booted_is_timed_in_the_log",
        need: Need::Kvm,
        run: is_timed,
    },
];

const END_WITHIN: Duration = Duration::from_secs(20);

/// The probe finds the command line, the initial RAM disk and the ACPI tables.
fn hands_over(context: &Context, protocol: Protocol) -> Outcome {
    let launch = Launch::new(&context.environment)?;
    let kernel = probe::write(protocol, launch.directory())?;
    let initrd = launch.directory().join("test-initrd");
    std::fs::write(&initrd, "a RAM disk of 29 bytes, no mo")?;
    let config = Machine::new(&kernel, "first second=2").initrd(&initrd).config();
    let ended = launch.without_api().config(&config)?.spawn()?.wait(END_WITHIN)?;
    let line = printed(&ended)?;
    for part in [
        format!("probe {} cmdline=<first second=2", protocol.name()),
        "initrd=<a RAM disk of 29 bytes, no mo>".to_owned(),
        "rsdp=1".to_owned(),
    ] {
        ensure!(line.contains(&part), "no '{part}' in '{line}'");
    }
    ended.expect(PROBE_STATUS)
}

fn is_timed(context: &Context) -> Outcome {
    let launch = Launch::new(&context.environment)?.arguments(["--boot-timer"]);
    let kernel = launch.directory().join("test-kernel");
    probe::write_booted(&kernel)?;
    let monitor = launch.config(&Machine::new(&kernel, "").config())?.start()?;
    let deadline = Instant::now() + END_WITHIN;
    let line = loop {
        let log = monitor.log()?;
        if let Some((_, line)) = log.split_once("Guest-boot-time = ") {
            break line.lines().next().unwrap_or_default().to_owned();
        }
        ensure!(Instant::now() < deadline, "no boot time in the log:\n{log}");
        std::thread::sleep(Duration::from_millis(5));
    };
    // 61234 us 61 ms,   9876 CPU us 9 CPU ms
    let words: Vec<&str> = line.split_whitespace().collect();
    let [us, "us", ms, "ms,", cpu_us, "CPU", "us", cpu_ms, "CPU", "ms"] = words.as_slice() else {
        return Err(format!("not Firecracker's line: '{line}'").into());
    };
    for (us, ms) in [(us, ms), (cpu_us, cpu_ms)] {
        let (us, ms): (u64, u64) = (us.parse()?, ms.parse()?);
        ensure!(us > 0 && us / 1000 == ms, "'{line}'");
    }
    Ok(())
}

/// The line that a probe printed.
fn printed(ended: &Ended) -> Outcome<String> {
    let line = ended
        .console
        .lines()
        .find_map(|line| line.find("probe ").and_then(|at| line.get(at..)));
    Ok(line.map(str::to_owned).ok_or_else(|| {
        format!(
            "no probe in the console:\n{}\nerrors:\n{}\nstatus: {}",
            ended.console, ended.errors, ended.status
        )
    })?)
}
