//! Starts real monitors and looks at them from outside.
//!
//! A test that this machine cannot run is reported as ignored, with the reason; the random choices of the others come
//! from one seed, which is printed. `make test` runs samples, `make soak` everything.

mod api;
mod attacks;
mod balloon;
mod boot;
mod clients;
mod clone;
mod conformance;
mod crash;
mod ctl;
mod disk;
mod disposable;
mod double_start;
mod drives;
mod ends;
mod errors;
mod escape;
mod exec;
mod garbage;
mod hostile;
mod hosts;
mod hotplug;
mod iscsi;
mod iscsi_ctl;
mod jailer;
mod landlock;
mod lease;
mod lifecycle;
mod linux;
mod memory;
mod memory_hotplug;
mod metadata;
mod migration;
mod net;
mod network;
mod nfs;
mod nfs_ctl;
mod nfs_v3;
mod overlay;
mod pmem;
mod seccomp;
mod serial;
mod signals;
mod snapshot;
mod snapshot_damage;
mod snapshot_disks;
mod snapshot_io;
mod snapshot_keys;
mod soak;
mod unjailed;
mod vsock;
mod working_set;

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use coracle_tests::case::{Case, text};
use coracle_tests::environment::Environment;
use coracle_tests::jailing::{self, Run};
use coracle_tests::{Outcome, ensure};
use libtest_mimic::Arguments;

/// Every test, in groups; what takes long comes first, so that all CPUs are busy to the end.
const GROUPS: &[(&str, &[Case])] = &[
    ("linux", linux::CASES),
    ("snapshot", snapshot::CASES),
    ("snapshot_damage", snapshot_damage::CASES),
    ("snapshot_io", snapshot_io::CASES),
    ("snapshot_keys", snapshot_keys::CASES),
    ("clone", clone::CASES),
    ("snapshot_disks", snapshot_disks::CASES),
    ("balloon", balloon::CASES),
    ("metadata", metadata::CASES),
    ("migration", migration::CASES),
    ("crash", crash::CASES),
    ("hostile", hostile::CASES),
    ("double_start", double_start::CASES),
    ("disk", disk::CASES),
    ("drives", drives::CASES),
    ("api", api::CASES),
    ("conformance", conformance::CASES),
    ("boot", boot::CASES),
    ("clients", clients::CASES),
    ("ctl", ctl::CASES),
    ("ends", ends::CASES),
    ("errors", errors::CASES),
    ("escape", escape::CASES),
    ("garbage", garbage::CASES),
    ("hosts", hosts::CASES),
    ("hotplug", hotplug::CASES),
    ("iscsi", iscsi::CASES),
    ("iscsi_ctl", iscsi_ctl::CASES),
    ("jailer", jailer::CASES),
    ("landlock", landlock::CASES),
    ("lease", lease::CASES),
    ("lifecycle", lifecycle::CASES),
    ("memory", memory::CASES),
    ("memory_hotplug", memory_hotplug::CASES),
    ("net", net::CASES),
    ("nfs", nfs::CASES),
    ("nfs_ctl", nfs_ctl::CASES),
    ("nfs_v3", nfs_v3::CASES),
    ("overlay", overlay::CASES),
    ("pmem", pmem::CASES),
    ("seccomp", seccomp::CASES),
    ("serial", serial::CASES),
    ("signals", signals::CASES),
    ("vsock", vsock::CASES),
    ("exec", exec::CASES),
    ("disposable", disposable::CASES),
    ("working_set", working_set::CASES),
    ("attacks", attacks::CASES),
];

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let (environment, jails) = match ready() {
        Ok(ready) => ready,
        Err(missing) => {
            eprintln!("{}", text(&missing));
            return ExitCode::FAILURE;
        }
    };
    if let Some(state) = std::env::var_os(soak::VARIABLE) {
        let filter = arguments.filter.as_deref().unwrap_or_default();
        return soak::run(Path::new(&state), filter, GROUPS, &environment);
    }
    println!("SEED={}", environment.seed.number());
    let cases = GROUPS
        .iter()
        .flat_map(|(group, cases)| cases.iter().map(move |case| (group, case)));
    let mode = environment.jailing.as_ref().map(|jailing| jailing.mode);
    let trials = cases
        .map(|(group, case)| {
            let name = format!("{group}::{}", case.name);
            let left_out = mode.and_then(|mode| unjailed::reason(&name, mode));
            case.into_trial(group, &environment, left_out)
        })
        .collect();
    let status = libtest_mimic::run(&arguments, trials).exit_code();
    drop(jails);
    status
}

/// Everything that tests stand on, and the directory of a run in jails, if this is one.
fn ready() -> Outcome<(Arc<Environment>, Option<Run>)> {
    let environment = Environment::read();
    environment.check()?;
    for left_out in unjailed::UNJAILED {
        let mut names = GROUPS
            .iter()
            .flat_map(|(group, cases)| cases.iter().map(move |case| format!("{group}::{}", case.name)));
        ensure!(
            names.any(|name| left_out.covers(&name)),
            "no test is called {}, which unjailed.rs leaves out",
            left_out.name
        );
    }
    let (environment, jails) = jailing::begin(environment)?;
    Ok((Arc::new(environment), jails))
}
