//! Linux boots from a server as a host's user who may use /dev/kvm and nothing else, with nothing mounted; what a killed
//! one had is free when its lease has ended.

use std::os::unix::fs::chown;

use coracle_tests::Outcome;
use coracle_tests::case::Context;
use coracle_tests::ensure;
use coracle_tests::guest::{Linux, copy_image};
use coracle_tests::harness::nfs::server::{Export, Plan, Server};
use serde_json::json;

use super::IMAGE;
use crate::network::boot;

pub(super) fn run(context: &Context) -> Outcome {
    let server = Server::start(Plan::default().export(Export::new("export")))?;
    let image = server.path(IMAGE);
    copy_image(&Linux::read(&context.environment)?.rootfs, &image)?;
    // A server without secrets takes users for whom they say they are.
    let user = boot::user(&context.environment);
    for path in [&server.path("export"), &image] {
        chown(path, Some(user), Some(user))?;
    }
    let mounts = || std::fs::read_to_string("/proc/self/mounts");
    let before = mounts()?;
    let members = [("path_on_host", json!(server.url(IMAGE)))];
    boot::run(context, &members, |_| {
        ensure!(mounts()? == before, "something was mounted");
        Ok(())
    })
}
