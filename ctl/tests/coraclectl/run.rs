//! What `run` promises to people and CI jobs.

use std::fs::File;
use std::io::Write;
use std::process::Stdio;

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::tests;
use crate::workbench::{Workbench, is_gone, stderr, until};

tests![
    the_guests_status_is_the_status_of_the_run,
    a_guest_that_ends_before_its_start_is_answered_is_not_a_failure,
    the_command_line_becomes_these_requests,
    input_and_output_are_the_guests,
    a_refusal_names_the_step_and_the_fault_and_leaves_nothing,
    a_machine_that_cannot_start_is_refused_in_one_line,
    a_failed_json_run_prints_json_alone,
    a_monitor_that_dies_at_once_is_explained_by_its_log,
    a_monitor_that_is_not_there_is_named_with_the_remedy,
    a_wrong_command_line_ends_with_125,
    a_contradiction_is_found_before_anything_is_started,
    a_name_is_used_by_one_machine_at_a_time,
    sigterm_asks_the_guest_and_ends_with_143,
    a_guest_that_does_not_listen_loses_its_monitor,
    a_second_signal_does_not_wait_for_the_guest,
    a_killed_run_takes_its_monitor_with_it,
    the_last_line_of_a_json_run_says_how_it_ended,
];

fn the_guests_status_is_the_status_of_the_run() {
    let bench = Workbench::new();
    for (name, status) in [("exits-0", 0), ("exits-7", 7), ("exits-255", 255)] {
        let output = bench.run(name, &[]);
        assert_eq!(output.status.code(), Some(status), "{}", stderr(&output));
        assert!(bench.is_clean());
    }
}

fn a_guest_that_ends_before_its_start_is_answered_is_not_a_failure() {
    let bench = Workbench::new();
    let output = bench.run("vanishes-9", &[]);
    assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(9), ""));
    assert!(bench.is_clean());
}

fn the_command_line_becomes_these_requests() {
    let bench = Workbench::new();
    let template = tempfile::NamedTempFile::new().expect("a scratch file");
    std::fs::write(template.path(), "{\"cpuid_modifiers\":[]}").expect("the file is ours");
    let template_path = template.path().to_str().expect("scratch paths are UTF-8");
    let options = "--initrd i --cmdline quiet --memory 1G --cpus 4 --entropy --track-dirty-pages --keep \
                   --disk a.img,ro --disk b.img,id=data --cpu-template";
    let mut options: Vec<&str> = options.split_whitespace().collect();
    options.push(template_path);
    let output = bench.run("exits-0", &options);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let expected = r#"PUT /machine-config {"mem_size_mib":1024,"track_dirty_pages":true,"vcpu_count":4}
PUT /cpu-config {"cpuid_modifiers":[]}
PUT /boot-source {"boot_args":"quiet","initrd_path":"i","kernel_image_path":"vmlinux"}
PUT /drives/disk0 {"drive_id":"disk0","is_read_only":true,"is_root_device":true,"path_on_host":"a.img"}
PUT /drives/data {"drive_id":"data","is_read_only":false,"is_root_device":false,"path_on_host":"b.img"}
PUT /entropy {}
PUT /actions {"action_type":"InstanceStart"}
"#;
    assert_eq!(bench.requests("exits-0"), expected);
}

fn input_and_output_are_the_guests() {
    let bench = Workbench::new();
    let mut input = tempfile::NamedTempFile::new().expect("a scratch file");
    input.write_all(b"line\n\x01x\x03\n").expect("the file is ours");
    let mut command = bench.command(&["run", "--json", "--kernel", "k", "--name", "echoes"]);
    command
        .stdin(File::open(input.path()).expect("the file is there"))
        .stdout(Stdio::piped());
    let output = command.output().expect("coraclectl starts");
    assert_eq!(
        (output.status.code(), output.stdout.as_slice()),
        (Some(0), &b"line\n\x01x\x03\n"[..])
    );
}

fn a_refusal_names_the_step_and_the_fault_and_leaves_nothing() {
    let bench = Workbench::new();
    let output = bench.run("refuses", &[]);
    let expected = "coraclectl: cannot set the kernel: no such\u{fffd} kernel\n";
    assert_eq!(
        (output.status.code(), stderr(&output).as_str()),
        (Some(125), expected)
    );
    assert!(bench.is_clean());
}

fn a_machine_that_cannot_start_is_refused_in_one_line() {
    let bench = Workbench::new();
    let output = bench.run("refuses-to-start", &[]);
    let expected = "coraclectl: cannot start the machine: no memory\n";
    assert_eq!(
        (output.status.code(), stderr(&output).as_str()),
        (Some(125), expected)
    );
    assert!(bench.is_clean());
}

fn a_failed_json_run_prints_json_alone() {
    let bench = Workbench::new();
    let lines = |name| -> Vec<Value> {
        let text = stderr(&bench.run(name, &["--json"]));
        let lines = text
            .lines()
            .map(|line| serde_json::from_str(line).expect("every line is JSON"));
        lines.collect()
    };
    assert_eq!(
        lines("refuses"),
        [json!({ "error": "cannot set the kernel: no such\u{1b} kernel", "causes": [] })]
    );
    let died = lines("dies");
    assert_eq!(
        died[0],
        json!({ "monitor_log": ["first line", "the last words"] })
    );
    assert!(
        died[1]["error"]
            .as_str()
            .is_some_and(|error| error.contains("152"))
    );
}

fn a_monitor_that_dies_at_once_is_explained_by_its_log() {
    let bench = Workbench::new();
    let output = bench.run("dies", &[]);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(125), "{text}");
    assert!(
        text.contains("monitor's log: the last words\n") && text.contains("status: 152"),
        "{text}"
    );
    assert!(bench.is_clean());
}

fn a_monitor_that_is_not_there_is_named_with_the_remedy() {
    let bench = Workbench::new();
    let output = bench.run("x", &["--monitor", "/no/such/monitor"]);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(125), "{text}");
    assert!(
        text.contains("/no/such/monitor: name the program with --monitor"),
        "{text}"
    );
    assert!(bench.is_clean());
}

fn a_wrong_command_line_ends_with_125() {
    let bench = Workbench::new();
    for options in [
        ["--cpus", "0"],
        ["--cpus", "33"],
        ["--memory", "none"],
        ["--disk", "a,ro,x"],
        ["--name", "../x"],
    ] {
        let output = bench.run("x", &options);
        assert_eq!(
            output.status.code(),
            Some(125),
            "{options:?}: {}",
            stderr(&output)
        );
        assert!(!output.stderr.is_empty());
    }
}

fn a_contradiction_is_found_before_anything_is_started() {
    let bench = Workbench::new();
    let output = bench.run("x", &["--disk", "a,root", "--disk", "b,root"]);
    let text = stderr(&output);
    assert!(text.contains("the disks a and b are both the root"), "{text}");
    assert_eq!(output.status.code(), Some(125));
    assert!(!bench.dir("x").exists());
}

fn a_name_is_used_by_one_machine_at_a_time() {
    let bench = Workbench::new();
    let first = bench.start("web", &[]);
    let second = bench.run("web", &[]);
    let text = stderr(&second);
    assert_eq!(second.status.code(), Some(125), "{text}");
    assert!(text.contains("a machine named web is running"), "{text}");
    assert_eq!(bench.ps("web")["state"], "Running");
    first.signal(Signal::TERM);
    first.wait();
    assert!(bench.is_clean());
}

fn sigterm_asks_the_guest_and_ends_with_143() {
    let bench = Workbench::new();
    let machine = bench.start("web", &[]);
    let monitor = machine.monitor();
    machine.signal(Signal::TERM);
    let output = machine.wait();
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(143), "{text}");
    assert!(
        text.contains("the guest is asked to shut down") && !text.contains("the monitor is"),
        "{text}"
    );
    assert!(is_gone(monitor) && bench.is_clean());
}

fn a_guest_that_does_not_listen_loses_its_monitor() {
    let bench = Workbench::new();
    let machine = bench.start("deaf", &["--stop-timeout", "0"]);
    let monitor = machine.monitor();
    machine.signal(Signal::INT);
    let output = machine.wait();
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(130), "{text}");
    assert!(text.contains("the monitor is asked to end"), "{text}");
    assert!(is_gone(monitor) && bench.is_clean());
}

fn a_second_signal_does_not_wait_for_the_guest() {
    let bench = Workbench::new();
    let machine = bench.start("deaf", &["--stop-timeout", "86400"]);
    machine.signal(Signal::TERM);
    until("the guest is asked", || {
        bench.requests("deaf").contains("SendCtrlAltDel")
    });
    machine.signal(Signal::TERM);
    assert_eq!(machine.wait().status.code(), Some(143));
    assert!(bench.is_clean());
}

fn a_killed_run_takes_its_monitor_with_it() {
    let bench = Workbench::new();
    let machine = bench.start("deaf", &[]);
    let monitor = machine.monitor();
    machine.signal(Signal::KILL);
    machine.wait();
    until("the monitor is gone", || is_gone(monitor));
    assert!(bench.dir("deaf").exists(), "nobody was left to remove it");
    let ps = bench.output(&["ps"]);
    assert!(
        stderr(&ps).contains("removed the directory that deaf has left behind"),
        "{}",
        stderr(&ps)
    );
    assert!(bench.is_clean());
}

fn the_last_line_of_a_json_run_says_how_it_ended() {
    let bench = Workbench::new();
    let output = bench.run("exits-7", &["--json"]);
    let text = stderr(&output);
    let last: Value =
        serde_json::from_str(text.lines().last().unwrap_or_default()).expect("the line is JSON");
    assert_eq!(
        (&last["id"], &last["status"]),
        (&Value::from("exits-7"), &Value::from(7))
    );
    assert_eq!(
        (&last["stopped_by"], &last["signal"]),
        (&Value::Null, &Value::Null)
    );
    assert_eq!(last["ended"], "guest_exit");
    assert!(
        text.starts_with("coracle: the guest exited with status 7\n"),
        "{text}"
    );
    let output = bench.run("vanishes-160", &["--json"]);
    let last: Value = serde_json::from_slice(&output.stderr).expect("the line is JSON");
    assert_eq!(
        (&last["status"], last.get("ended")),
        (&json!(160), Some(&Value::Null))
    );
}
