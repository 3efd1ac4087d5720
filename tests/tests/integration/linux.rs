//! A real Linux finds, drives and leaves every device.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use coracle_tests::case::{Case, Context};
use coracle_tests::environment::Need;
use coracle_tests::guest::{Linux, run};
use coracle_tests::monitor::{Ended, Launch};
use coracle_tests::seed::Seed;
use coracle_tests::{Outcome, ensure};
use serde_json::json;

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "what_linux_writes_to_its_disk_is_in_the_image_afterwards",
        need: Need::Kvm,
        run: what_linux_writes_to_its_disk_is_in_the_image_afterwards,
    },
    Case {
        name: "two_vcpus_run_at_the_same_time",
        need: Need::Kvm,
        run: two_vcpus_run_at_the_same_time,
    },
    Case {
        name: "a_kernel_that_knows_only_acpi_finds_every_device",
        need: Need::Kvm,
        run: a_kernel_that_knows_only_acpi_finds_every_device,
    },
    Case {
        name: "a_compressed_kernel_boots",
        need: Need::Kvm,
        run: a_compressed_kernel_boots,
    },
    Case {
        name: "a_read_only_root_stays_as_it_was",
        need: Need::Kvm,
        run: a_read_only_root_stays_as_it_was,
    },
];

/// A boot takes ten seconds where kernel code is emulated, and ten times that on a host with ten times its work.
const END_WITHIN: Duration = Duration::from_secs(240);

fn what_linux_writes_to_its_disk_is_in_the_image_afterwards(context: &Context) -> Outcome {
    const KIB: u64 = 512;
    let seed = context.seed.clone().below(1 << 31);
    let words =
        format!("hello disk-write /data/pattern {KIB} {seed} disk-read /data/pattern {KIB} {seed} exit 0");
    let launch = Launch::new(&context.environment)?;
    let directory = tempfile::tempdir()?;
    let machine = Linux::read(&context.environment)?.machine("smp", directory.path(), &words)?;
    let ended = run(launch, &machine, END_WITHIN)?;
    ended.expect(0)?;
    says(&ended, "hello from Linux")?;

    let image = directory.path().join("test-root.ext4");
    let found = directory.path().join("found");
    debugfs(&format!("dump /data/pattern {}", found.display()), &image)?;
    let mut expected = Seed::from(seed);
    let words = (0..KIB * 1024 / 8).flat_map(|_| expected.draw().to_le_bytes());
    ensure!(
        std::fs::read(found)? == words.collect::<Vec<u8>>(),
        "the image holds something else than the pattern"
    );
    let checked = Command::new("/sbin/e2fsck").args(["-fn"]).arg(&image).output()?;
    ensure!(
        checked.status.success(),
        "e2fsck: {}",
        String::from_utf8_lossy(&checked.stdout)
    );
    Ok(())
}

fn two_vcpus_run_at_the_same_time(context: &Context) -> Outcome {
    let launch = Launch::new(&context.environment)?;
    let linux = Linux::read(&context.environment)?;
    let machine = linux
        .machine("smp", launch.directory(), "hello cpus exit 3")?
        .vcpus(2);
    let ended = run(launch, &machine, END_WITHIN)?;
    ended.expect(3)?;
    says(&ended, "CPUs online: 2")?;
    says(&ended, "cpus: 2 met, 0 failed")
}

fn a_kernel_that_knows_only_acpi_finds_every_device(context: &Context) -> Outcome {
    let launch = Launch::new(&context.environment)?;
    let data = launch.directory().join("test-data");
    coracle_tests::guest::blank_image(&data, 8)?;
    let linux = Linux::read(&context.environment)?;
    let machine = linux
        .machine(
            "acpi",
            launch.directory(),
            "devices disk-write /dev/vdb 64 5 poweroff",
        )?
        .disk("data", &data)
        .part("entropy", json!({}));
    let ended = run(launch, &machine, END_WITHIN)?;
    // Power-off is the exit device's peer: it needs the FADT.
    ended.expect(0)?;
    for device in ["virtio_blk", "virtio_rng", "hwrng"] {
        says(&ended, device)?;
    }
    ensure!(
        ended.errors.contains("powered off"),
        "the reason of the end: {}",
        ended.errors
    );
    Ok(())
}

fn a_compressed_kernel_boots(context: &Context) -> Outcome {
    let launch = Launch::new(&context.environment)?;
    let linux = Linux::read(&context.environment)?;
    let machine = linux.compressed_machine("smp", launch.directory(), "hello exit 4")?;
    let ended = run(launch, &machine, END_WITHIN)?;
    ended.expect(4)?;
    says(&ended, "hello from Linux")
}

fn a_read_only_root_stays_as_it_was(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let linux = Linux::read(&context.environment)?;
    let machine = linux
        .machine("smp", directory.path(), "disk-write /data/pattern 4 1")?
        .read_only_root();
    let image = directory.path().join("test-root.ext4");
    let before = std::fs::read(&image)?;
    let ended = run(Launch::new(&context.environment)?, &machine, END_WITHIN)?;
    ensure!(
        ended.status.code() != Some(0),
        "a write to a read-only root succeeded: {}",
        ended.console
    );
    says(&ended, "init: ")?;
    ensure!(
        std::fs::read(&image)? == before,
        "the image of a read-only drive has changed"
    );
    Ok(())
}

fn says(ended: &Ended, text: &str) -> Outcome {
    let (console, errors, status) = (&ended.console, &ended.errors, ended.status);
    ensure!(
        console.contains(text),
        "no '{text}' in:\n{console}\n{errors}\n{status}"
    );
    Ok(())
}

fn debugfs(request: &str, image: &Path) -> Outcome {
    let done = Command::new("/sbin/debugfs")
        .args(["-R", request])
        .arg(image)
        .output()?;
    ensure!(
        done.status.success(),
        "debugfs {request}: {}",
        String::from_utf8_lossy(&done.stderr)
    );
    Ok(())
}
