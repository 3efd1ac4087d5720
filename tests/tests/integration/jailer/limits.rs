//! What a jailed monitor has, seen from outside by /proc.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use coracle_tests::case::Context;
use coracle_tests::guest::Machine;
use coracle_tests::harness::hosts::Star;
use coracle_tests::harness::jail::{Jail, Jailed, UID, memory_limit, unified_cgroup};
use coracle_tests::{Outcome, ensure};

use super::SOON;

const MEMORY_BYTES: u64 = 512 << 20;

pub(super) fn the_monitor_has_nothing_but_what_it_needs(context: &Context) -> Outcome {
    let star = Star::new(0)?;
    let netns = star.server.path();
    let machine = Machine::unikernel(&context.environment, "do=tick:ms=20,count=1000000");
    let memory = memory_limit(MEMORY_BYTES).ok_or("this host has the controller")?;
    // A careless parent: descriptors, variables, groups and capabilities to inherit.
    let careless = "exec 7</etc/passwd 9>/dev/null; export SECRET=1; exec setpriv --groups 4,6 \"$@\"";
    let jailed = Jail::new(&context.environment)?
        .flags(["--cleanup", "--new-pid-ns", "--netns", &netns])
        .flags([
            "--resource-limit",
            "fsize=123456789",
            "--resource-limit",
            "no-file=321",
        ])
        .flags(memory.iter().map(String::as_str))
        .by_way_of(["sh", "-c", careless, "sh"])
        .machine(&machine)?
        .start()?;
    jailed.monitor.console.wait_for("tick: n=3", SOON)?;
    has_no_rights(&jailed, UID)?;
    let pid = jailed.process()?.0;
    let read = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}"));
    let limits = read("limits")?;
    for (limit, value) in [("Max open files", "321"), ("Max file size", "123456789")] {
        let line = limits
            .lines()
            .find(|line| line.starts_with(limit))
            .unwrap_or_default();
        ensure!(
            line.split_whitespace().filter(|word| *word == value).count() == 2,
            "{line}"
        );
    }
    ensure!(read("environ")?.is_empty(), "{:?}", read("environ")?);
    let cgroups = read("cgroup")?;
    let own = cgroups.lines().filter(|line| line.contains(jailed.id())).count();
    ensure!(own == 1, "{cgroups}");
    for kind in ["mnt", "pid", "net", "ipc", "uts"] {
        let of = |who: &str| fs::read_link(format!("/proc/{who}/ns/{kind}"));
        ensure!(of(&pid.to_string())? != of("self")?, "{kind} is the host's");
    }
    ensure!(
        fs::read_link(format!("/proc/{pid}/ns/net"))? == fs::read_link(&netns)?,
        "it is on another network"
    );
    let mounts = read("mountinfo")?;
    let places: Vec<_> = mounts.lines().filter_map(|line| line.split(' ').nth(4)).collect();
    ensure!(places == ["/", "/kernel", "/vm.json"], "{mounts}");
    no_stray_descriptors(&jailed)?;
    let ended = {
        jailed.monitor.signal(rustix::process::Signal::TERM)?;
        jailed.end(SOON)?
    };
    ensure!(ended.status.code() == Some(143), "{ended:?}");
    Ok(())
}

pub(super) fn root_has_no_rights_either(context: &Context) -> Outcome {
    let machine = Machine::unikernel(&context.environment, "do=tick:ms=20,count=1000000");
    let jailed = Jail::new(&context.environment)?
        .user(0)
        .flags(["--cleanup"])
        .machine(&machine)?
        .start()?;
    jailed.monitor.console.wait_for("tick: n=3", SOON)?;
    has_no_rights(&jailed, 0)?;
    jailed.monitor.signal(rustix::process::Signal::TERM)?;
    jailed.end(SOON).map(drop)
}

/// Without settings nothing is made: the cgroup that was prepared is entered, and stays.
pub(super) fn a_cgroup_of_version_2_is_entered(context: &Context) -> Outcome {
    let mount = unified_cgroup().ok_or("it is mounted")?;
    let jail = Jail::new(&context.environment)?;
    let parent = format!("for-{}", jail.id);
    let cgroup = Group(mount.join(&parent));
    fs::create_dir(&cgroup.0)?;
    let machine = Machine::unikernel(&context.environment, "do=tick:ms=20,count=1000000");
    let jailed = jail
        .flags(["--cleanup", "--cgroup-version", "2", "--parent-cgroup", &parent])
        .machine(&machine)?
        .start()?;
    let pid = jailed.process()?.0;
    let own = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    ensure!(
        own.lines()
            .any(|line| line.starts_with("0::/") && line.ends_with(&parent)),
        "{own}"
    );
    ensure!(
        fs::read_to_string(cgroup.0.join("cgroup.procs"))?.trim() == pid.to_string(),
        "not alone"
    );
    jailed.monitor.signal(rustix::process::Signal::TERM)?;
    let ended = jailed.monitor.wait(SOON)?;
    ensure!(ended.status.code() == Some(143), "{ended:?}");
    ensure!(cgroup.0.is_dir(), "it was the user's");
    Ok(())
}

/// A cgroup of this test, gone with it.
struct Group(PathBuf);

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

/// One user, one group, no capability, and none to come.
pub(super) fn has_no_rights(jailed: &Jailed, user: u32) -> Outcome {
    let status = fs::read_to_string(format!("/proc/{}/status", jailed.process()?.0))?;
    let lines: BTreeMap<&str, String> = status
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name, value.split_whitespace().collect::<Vec<_>>().join(" ")))
        .collect();
    let four = [user; 4].map(|id| id.to_string()).join(" ");
    let none = "0000000000000000".to_owned();
    let mut expected = vec![("Uid", four.clone()), ("Gid", four), ("NoNewPrivs", "1".into())];
    expected.push(("Groups", String::new()));
    expected.extend(["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"].map(|name| (name, none.clone())));
    for (name, value) in expected {
        ensure!(
            lines.get(name) == Some(&value),
            "{name} is {:?}, not {value}",
            lines.get(name)
        );
    }
    Ok(())
}

/// Nothing that is open leads to a file of the host, but what standard input, output and error are.
fn no_stray_descriptors(jailed: &Jailed) -> Outcome {
    let directory = format!("/proc/{}/fd", jailed.process()?.0);
    for entry in fs::read_dir(&directory)? {
        let entry = entry?;
        let number: u32 = entry.file_name().to_string_lossy().parse()?;
        let target = fs::read_link(entry.path()).unwrap_or_else(|_| PathBuf::from("closed meanwhile"));
        let is_device = target.starts_with("/dev/kvm") || target.starts_with("/dev/net/tun");
        ensure!(
            number < 3 || !target.is_absolute() || is_device,
            "descriptor {number} is {}",
            target.display()
        );
    }
    Ok(())
}
