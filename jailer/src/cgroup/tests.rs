//! Version 2 against a tree of files, recorded from a host that has all controllers there.

use std::os::unix::ffi::OsStrExt as _;

use super::*;
use crate::cli::{self, Asked};

/// A hierarchy of version 2 as a host with systemd has it; the kernel's files of new cgroups are there beforehand.
fn unified(directory: &Path, group: &str) -> String {
    let controllers = "cpuset cpu io memory hugetlb pids\n";
    let mount = directory.join("uni fied");
    let leaf = mount.join(group);
    fs::create_dir_all(&leaf).expect("it is a new directory");
    let mut path = mount.clone();
    let mut levels = vec![path.clone()];
    for part in Path::new(group).components() {
        path.push(part);
        levels.push(path.clone());
    }
    for level in &levels {
        fs::write(level.join("cgroup.controllers"), controllers).expect("a file");
        fs::write(level.join("cgroup.subtree_control"), "").expect("a file");
        for file in ["cgroup.procs", "memory.max", "pids.max", "io.max"] {
            fs::write(level.join(file), "").expect("a file");
        }
    }
    let path = String::from_utf8(mount.as_os_str().as_bytes().to_vec()).expect("it is a text");
    format!(
        "sysfs /sys sysfs rw 0 0\ncgroup /sys/fs/cgroup/memory cgroup rw,relatime,memory 0 0\n\
         cgroup2 {} cgroup2 rw,nosuid,nsdelegate 0 0\n",
        path.replace(' ', "\\040")
    )
}

fn request(words: &str) -> Request {
    let needed = "--id vm1 --exec-file /bin/coracle --uid 1 --gid 1 ";
    let words = [needed, words].concat();
    match cli::parse(words.split_whitespace().map(Into::into)).expect(&words) {
        Asked::Jail(request) => *request,
        Asked::Text(text) => panic!("a text: {text}"),
    }
}

fn groups(words: &str, mounts: &str) -> Result<Vec<Group>, CgroupError> {
    planned(&request(words), Path::new("coracle"), mounts)
}

fn ledger(groups: &[Group]) -> Ledger {
    let base = fs::File::open("/").expect("there is a root").into();
    Ledger::shared(base, groups.iter().flat_map(Group::items).collect()).expect("there is memory")
}

const V1: &str = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,relatime,cpu,cpuacct 0 0\n\
                  cgroup /sys/fs/cgroup/memory cgroup rw,relatime,memory 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";

#[test]
fn each_hierarchy_of_version_1_gets_one_cgroup() {
    let groups = groups(
        "--cgroup cpu.shares=2 --cgroup memory.limit_in_bytes=9 --cgroup cpuacct.usage=0",
        V1,
    )
    .expect("all are there");
    let found: Vec<_> = groups
        .iter()
        .map(|group| (group.location(), group.settings.len()))
        .collect();
    assert_eq!(
        found,
        [
            ("/sys/fs/cgroup/cpu,cpuacct/coracle/vm1".into(), 2),
            ("/sys/fs/cgroup/memory/coracle/vm1".into(), 1)
        ]
    );
    let items = groups.first().map(Group::items).unwrap_or_default();
    let items: Vec<_> = items
        .iter()
        .map(|item| (item.kind, item.path.as_path()))
        .collect();
    assert_eq!(
        items,
        [
            (Kind::Shared, Path::new("/sys/fs/cgroup/cpu,cpuacct/coracle")),
            (
                Kind::Directory,
                Path::new("/sys/fs/cgroup/cpu,cpuacct/coracle/vm1")
            )
        ]
    );
}

#[test]
fn without_settings_version_1_makes_none() {
    assert_eq!(
        groups("--parent-cgroup a", "").expect("nothing is looked for"),
        []
    );
}

#[test]
fn what_a_host_has_not_is_named() {
    let text = |words, mounts| groups(words, mounts).expect_err(words).to_string();
    assert!(text("--cgroup pids.max=1", V1).contains("`pids`"));
    assert!(text("--cgroup pids.max=1", "proc /proc proc rw 0 0").contains("version 1 is mounted"));
    assert!(text("--cgroup-version 2", "proc /proc proc rw 0 0").contains("version 2 is mounted"));
    // A hierarchy whose controllers are all version 1's.
    let directory = tempfile::tempdir().expect("a directory");
    let mounts = unified(directory.path(), "x");
    fs::write(directory.path().join("uni fied/cgroup.controllers"), "hugetlb\n").expect("a file");
    assert!(text("--cgroup-version 2 --cgroup memory.max=1", &mounts).contains("`memory`"));
}

#[test]
fn version_2_enables_controllers_from_the_root_to_the_cgroup_above() {
    let directory = tempfile::tempdir().expect("a directory");
    let mounts = unified(directory.path(), "all/external/vm1");
    let words = "--cgroup-version 2 --parent-cgroup all/external --cgroup memory.max=1 --cgroup memory.max=2 --cgroup pids.max=3";
    let groups = groups(words, &mounts).expect("they are there");
    let [group] = groups.as_slice() else {
        panic!("{groups:?}");
    };
    group.make(&ledger(&groups)).expect("files take everything");
    group.enter().expect("files take everything");
    let mount = directory.path().join("uni fied");
    let read = |path: &str| fs::read_to_string(mount.join(path)).expect(path);
    assert_eq!(read("all/external/vm1/memory.max"), "2\n");
    assert_eq!(read("all/external/vm1/pids.max"), "3\n");
    assert_eq!(read("all/external/vm1/cgroup.procs"), "0\n");
    assert_eq!(read("all/external/vm1/cgroup.subtree_control"), "");
    // A file of this test keeps the last write only.
    for level in ["", "all/", "all/external/"] {
        assert_eq!(
            read(&format!("{level}cgroup.subtree_control")),
            "+pids\n",
            "{level}"
        );
    }
    // One that another machine is in would end with whoever of the two ends first.
    let error = group.make(&ledger(&groups)).expect_err("somebody is in it");
    assert!(crate::chain(&error).contains("take another --id"), "{error:?}");
    fs::write(mount.join("all/external/vm1/cgroup.procs"), "").expect("a file");
    // One that is enabled is not enabled again: systemd may have processes in the root.
    fs::write(mount.join("cgroup.subtree_control"), "memory pids\n").expect("a file");
    group.make(&ledger(&groups)).expect("files take everything");
    assert_eq!(read("cgroup.subtree_control"), "memory pids\n");
}

#[test]
fn version_2_without_settings_enters_the_cgroup_above_if_there_is_one() {
    let directory = tempfile::tempdir().expect("a directory");
    let mounts = unified(directory.path(), "mine");
    let entered = groups("--cgroup-version 2 --parent-cgroup mine", &mounts).expect("it is there");
    let [group] = entered.as_slice() else {
        panic!("{entered:?}");
    };
    assert_eq!(group.items(), []);
    group.make(&ledger(&entered)).expect("nothing is made");
    group.enter().expect("files take everything");
    let procs = directory.path().join("uni fied/mine/cgroup.procs");
    assert_eq!(fs::read_to_string(procs).expect("it was written"), "0\n");
    let none = groups("--cgroup-version 2 --parent-cgroup other", &mounts).expect("it is not needed");
    assert_eq!(none, []);
}

#[test]
fn kills_for_want_of_memory_are_read_from_either_version() {
    let directory = tempfile::tempdir().expect("a directory");
    let mounts = unified(directory.path(), "coracle/vm1");
    let groups = groups("--cgroup-version 2 --cgroup memory.max=1", &mounts).expect("it is there");
    let leaf = directory.path().join("uni fied/coracle/vm1");
    fs::write(
        leaf.join("memory.events"),
        "low 0\nhigh 0\nmax 9\noom 2\noom_kill 3\noom_group_kill 0\n",
    )
    .expect("a file");
    assert_eq!(groups.first().and_then(Group::oom_kills), Some(3));
    let v1 = Group {
        mount: directory.path().to_owned(),
        path: "v1".into(),
        version: CgroupVersion::V1,
        settings: vec![],
        is_given: false,
    };
    assert_eq!(v1.oom_kills(), None);
    fs::create_dir(directory.path().join("v1")).expect("a directory");
    let control = directory.path().join("v1/memory.oom_control");
    fs::write(control, "oom_kill_disable 0\nunder_oom 0\noom_kill 4\n").expect("a file");
    assert_eq!(v1.oom_kills(), Some(4));
}

#[test]
fn paths_in_the_list_of_mounts_are_unescaped() {
    let line = "cgroup /a\\040b\\134c\\9 cgroup rw,cpu 0 0\n";
    let found = groups("--cgroup cpu.shares=1", line).expect("it is there");
    let location = found.first().map(Group::location);
    assert_eq!(location, Some("/a b\\c\\9/coracle/vm1".into()));
}
