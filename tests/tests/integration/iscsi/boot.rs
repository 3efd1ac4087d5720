//! Linux boots from a target as a host's user who may use /dev/kvm and nothing else; a killed one's lease is broken.

use std::process::Command;

use coracle_tests::case::Context;
use coracle_tests::guest::{Linux, copy_image};
use coracle_tests::harness::iscsi::target::{Lun, Plan, Target};
use coracle_tests::{Outcome, ensure};
use serde_json::json;

use crate::network::{boot, says};

pub(super) fn run(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    boot::open_to_all(directory.path(), 0o777)?;
    let image = directory.path().join("image");
    copy_image(&Linux::read(&context.environment)?.rootfs, &image)?;
    let target = Target::start(Plan::default().lun(Lun::of(&image)?))?;
    let lease_at = directory.path().join("record");
    let members = [
        ("path_on_host", json!(target.url(1))),
        ("lease_at", json!(lease_at)),
    ];
    boot::run(context, &members, |start| {
        says(&boot::refused(start)?, "first")?;
        let broken = Command::new(&context.environment.coraclectl)
            .args(["lease", "break", &target.url(1), "--yes", "--lease-at"])
            .arg(&lease_at)
            .output()?;
        let said = String::from_utf8_lossy(&broken.stderr).into_owned();
        ensure!(broken.status.success(), "the lease cannot be broken: {said}");
        Ok(())
    })
}
