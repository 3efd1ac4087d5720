//! Every boot protocol hands over what it should.

use std::time::Duration;

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
