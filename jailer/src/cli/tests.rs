use std::ffi::OsString;
use std::path::PathBuf;

use super::*;

fn parsed(words: &str) -> Result<Request, CliError> {
    match parse(words.split_whitespace().map(OsString::from))? {
        Asked::Jail(request) => Ok(*request),
        Asked::Text(text) => panic!("a text: {text}"),
    }
}

/// The flags that have to be there, and these.
fn with(words: &str) -> Result<Request, CliError> {
    parsed(&format!(
        "--id vm1 --exec-file /bin/coracle --uid 123 --gid 100 {words}"
    ))
}

fn refused(words: &str) -> String {
    with(words).expect_err(words).to_string()
}

#[test]
fn the_documented_call_is_understood() {
    let request = with(
        "--cgroup cpuset.mems=0 --cgroup cpuset.cpus=0-3 --netns /var/run/netns/mine --daemonize --new-pid-ns \
         --cgroup-version 1 --parent-cgroup all/external --chroot-base-dir /srv/x --resource-limit fsize=250000000 \
         --resource-limit no-file=1024 -- --config-file /vm.json --id",
    )
    .expect("it is documented");
    assert_eq!(request.id, "vm1");
    assert_eq!((request.uid, request.gid), (123, 100));
    assert_eq!(request.base, PathBuf::from("/srv/x"));
    let settings: Vec<_> = request
        .cgroups
        .iter()
        .map(|s| (s.file.as_str(), s.value.as_str()))
        .collect();
    assert_eq!(settings, [("cpuset.mems", "0"), ("cpuset.cpus", "0-3")]);
    assert_eq!(request.parent_cgroup, Some(PathBuf::from("all/external")));
    assert_eq!(request.netns, Some(PathBuf::from("/var/run/netns/mine")));
    assert!(request.daemonize && request.new_pid_ns);
    assert_eq!(request.limits.file_size, Some(250_000_000));
    assert_eq!(request.limits.no_file, Some(1024));
    assert_eq!(request.arguments, ["--config-file", "/vm.json", "--id"]);
    assert!(!request.cleanup && request.supervision.is_none() && request.files.is_empty());
}

#[test]
fn what_is_left_out_is_firecrackers_default() {
    let request = with("").expect("nothing more is needed");
    assert_eq!(request.base, PathBuf::from("/srv/jailer"));
    assert_eq!(request.cgroup_version, CgroupVersion::V1);
    assert_eq!(request.limits, Limits::default());
    assert!(request.arguments.is_empty());
}

#[test]
fn a_flag_that_is_needed_is_missed_by_name() {
    for (flag, words) in [
        ("--id", "--exec-file a --uid 1 --gid 1"),
        ("--exec-file", "--id a --uid 1 --gid 1"),
        ("--uid", "--id a --exec-file a --gid 1"),
        ("--gid", "--id a --exec-file a --uid 1"),
    ] {
        let text = parsed(words).expect_err(words).to_string();
        assert_eq!(text, format!("{flag} is missing; see --help"));
    }
}

#[test]
fn words_that_make_no_sense_are_refused_with_their_flag() {
    for (words, part) in [
        ("--frob", "`--frob` is no flag"),
        ("frob", "`frob` is no flag"),
        ("--node 0", "`--node` is no flag"),
        ("--netns", "--netns FILE"),
        ("--netns --daemonize", "--netns FILE"),
        ("--daemonize=yes", "--daemonize takes no value"),
        ("--uid 5", "--uid is given more than once"),
        ("--cgroup-version 3", "--cgroup-version is `3`"),
        ("--resource-limit no-file=-1", "no-file=-1"),
        ("--resource-limit nofile=1", "nofile=1"),
        ("--resource-limit fsize", "fsize"),
        ("--restart always --supervise", "--restart is `always`"),
        ("--restart on-failure", "give --supervise too"),
        ("--record x", "give --supervise too"),
        (
            "--supervise --restart-limit many --restart on-failure",
            "--restart-limit is `many`",
        ),
        ("--supervise --daemonize", "--record"),
        ("--fd 2", "--fd is `2`"),
        ("--fd x", "--fd is `x`"),
    ] {
        let text = refused(words);
        assert!(text.contains(part), "{words}: {text}");
    }
}

#[test]
fn names_that_lead_elsewhere_are_refused() {
    for id in ["", ".", "..", "a/b", "../a", "a_b", &"a".repeat(65), "a\u{e9}"] {
        assert!(matches!(super::id(id), Err(CliError::Id { .. })), "{id}");
    }
    assert!(super::id(&"a".repeat(64)).is_ok());
    for words in [
        "--parent-cgroup ../a",
        "--parent-cgroup /a",
        "--parent-cgroup a/../b",
        "--parent-cgroup ./a",
    ] {
        assert!(
            matches!(with(words), Err(CliError::ParentCgroup { .. })),
            "{words}"
        );
    }
    for words in [
        "--cgroup ../x.y=1",
        "--cgroup a/b.c=1",
        "--cgroup x=1",
        "--cgroup ..=1",
        "--cgroup a.b=",
        "--cgroup a.b",
    ] {
        assert!(matches!(with(words), Err(CliError::Cgroup { .. })), "{words}");
    }
    for words in ["--file /a/../b", "--file :name", "--file ../b:name"] {
        assert!(matches!(with(words), Err(CliError::File { .. })), "{words}");
    }
    for words in [
        "--file /a:../b",
        "--file /a:/b",
        "--file /a:.",
        "--file /a:b/../c",
        "--fd 5:../x",
        "--file /a:",
    ] {
        assert!(matches!(with(words), Err(CliError::Name { .. })), "{words}");
    }
    for number in ["-1", "4294967295", "4294967296", "root", ""] {
        let words = format!("--id a --exec-file a --gid 1 --uid={number}");
        assert!(matches!(parsed(&words), Err(CliError::Number { .. })), "{number}");
    }
}

#[test]
fn files_have_the_names_that_they_are_given() {
    let request =
        with("--file /images/root.img --file=/k:boot/vmlinux --fd 7:disk --fd 8").expect("all are good");
    let path = |path: &str| Source::Path(path.into());
    let files: Vec<_> = request
        .files
        .into_iter()
        .map(|shown| (shown.source, shown.name.map(|name| name.display().to_string())))
        .collect();
    assert_eq!(
        files,
        [
            (path("/images/root.img"), None),
            (path("/k"), Some("boot/vmlinux".to_owned())),
            (Source::Fd(7), Some("disk".to_owned())),
            (Source::Fd(8), None),
        ]
    );
    let many = "--file /a ".repeat(FILES_MAX + 1);
    assert!(matches!(with(&many), Err(CliError::Files { .. })));
}

#[test]
fn a_value_may_have_an_equals_sign() {
    let request = with("--cgroup io.max=8:0=1").expect("it is split at the first");
    assert_eq!(request.cgroups.first().map(|s| s.value.as_str()), Some("8:0=1"));
}

#[test]
fn restarts_have_a_policy_and_a_limit() {
    let never = with("--supervise")
        .expect("it is good")
        .supervision
        .expect("it is asked for");
    assert_eq!(never.restarts_max, 0);
    let words = "--supervise --restart on-failure --restart-limit 3 --restart-delay-ms 99999999";
    let some = with(words)
        .expect("it is good")
        .supervision
        .expect("it is asked for");
    assert_eq!(
        (some.restarts_max, some.delay.as_millis()),
        (3, u128::from(RESTART_DELAY_MS_MAX))
    );
}

#[test]
fn help_names_every_flag() {
    let Ok(Asked::Text(text)) = parse(["--help".into()]) else {
        panic!("help is a text");
    };
    for flag in ["--id", "--netns", "--cleanup", "--restart-delay-ms", "--fd"] {
        assert!(text.contains(flag), "{flag}: {text}");
    }
}
