//! What the other verbs promise.

use std::os::unix::net::UnixListener;

use serde_json::{Value, json};

use crate::tests;
use crate::workbench::{Workbench, is_gone, stderr, until};

tests![
    ps_and_info_show_a_running_machine,
    a_machine_is_paused_and_resumed_by_name_and_by_socket,
    a_machine_that_does_not_run_is_an_error_that_says_where_to_look,
    a_monitor_that_does_not_answer_is_a_row_that_says_so,
    stop_asks_the_guest_first,
    stop_resumes_a_paused_guest_so_that_it_can_shut_down,
    stop_ends_the_monitor_of_a_deaf_guest,
    a_forced_stop_does_not_ask_the_guest,
    api_prints_the_answer_and_fails_on_a_refusal,
    every_shell_gets_a_script,
    the_scripts_are_for_the_programs_own_name,
    a_wrong_command_line_is_json_where_json_is_asked_for,
    who_knows_other_tools_finds_the_verb,
];

fn ps_and_info_show_a_running_machine() {
    let bench = Workbench::new();
    let _machine = bench.start("web", &[]);
    let row = bench.ps("web");
    assert_eq!(
        (&row["state"], &row["vcpus"], &row["memory_mib"]),
        (&json!("Running"), &json!(2), &json!(256))
    );
    let text = String::from_utf8(bench.output(&["ps"]).stdout).expect("ps prints text");
    assert!(text.starts_with("ID") && text.contains("\nweb "), "{text}");
    let info: Value = serde_json::from_slice(&bench.output(&["info", "web", "--json"]).stdout).expect("JSON");
    assert_eq!(
        (&info["summary"]["id"], &info["config"]),
        (&json!("web"), &json!({ "drives": [] }))
    );
    let text = String::from_utf8(bench.output(&["info", "web"]).stdout).expect("info prints text");
    assert!(text.contains("memory    256M\n"), "{text}");
}

fn a_machine_is_paused_and_resumed_by_name_and_by_socket() {
    let bench = Workbench::new();
    let _machine = bench.start("web", &[]);
    assert!(bench.output(&["pause", "web"]).status.success());
    assert_eq!(bench.ps("web")["state"], "Paused");
    let socket = bench.dir("web").join("api.sock");
    assert!(
        bench
            .output(&["resume", socket.to_str().expect("scratch paths are UTF-8")])
            .status
            .success()
    );
    assert_eq!(bench.ps("web")["state"], "Running");
}

fn a_machine_that_does_not_run_is_an_error_that_says_where_to_look() {
    let bench = Workbench::new();
    for verb in ["info", "pause", "resume", "stop"] {
        let output = bench.output(&[verb, "not-here"]);
        assert_eq!(output.status.code(), Some(1));
        assert!(stderr(&output).contains("no machine named not-here is running: `coraclectl ps`"));
        let output = bench.output(&[verb, "/no/such.sock", "--json"]);
        assert_eq!(output.status.code(), Some(1));
        let report: Value = serde_json::from_slice(&output.stderr).expect("errors are JSON");
        assert!(
            report["error"]
                .as_str()
                .is_some_and(|error| error.contains("/no/such.sock")),
            "{report}"
        );
    }
}

fn a_monitor_that_does_not_answer_is_a_row_that_says_so() {
    let bench = Workbench::new();
    std::fs::create_dir_all(bench.dir("stuck")).expect("the place is ours");
    let _listener = UnixListener::bind(bench.dir("stuck").join("api.sock")).expect("the place is ours");
    assert_eq!(bench.ps("stuck")["state"], "Not answering");
}

fn stop_asks_the_guest_first() {
    let bench = Workbench::new();
    let machine = bench.start("web", &[]);
    let output = bench.output(&["stop", "web", "--json"]);
    let said: Value = serde_json::from_slice(&output.stdout).expect("stop prints JSON");
    assert_eq!((&said["vm"], &said["ended_by"]), (&json!("web"), &json!("guest")));
    assert_eq!(machine.wait().status.code(), Some(0));
    assert!(bench.is_clean());
}

fn stop_resumes_a_paused_guest_so_that_it_can_shut_down() {
    let bench = Workbench::new();
    let machine = bench.start("web", &[]);
    assert!(bench.output(&["pause", "web"]).status.success());
    let output = bench.output(&["stop", "web"]);
    assert!(stderr(&output).contains("it is resumed"), "{}", stderr(&output));
    assert_eq!(machine.wait().status.code(), Some(0));
}

fn stop_ends_the_monitor_of_a_deaf_guest() {
    let bench = Workbench::new();
    let machine = bench.start("deaf", &[]);
    let monitor = machine.monitor();
    let output = bench.output(&["stop", "deaf", "--timeout", "0"]);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(said, "deaf: stopped, the monitor ended on SIGTERM\n");
    assert_eq!(machine.wait().status.code(), Some(143));
    until("the monitor is gone", || is_gone(monitor));
    assert!(bench.is_clean());
}

fn a_forced_stop_does_not_ask_the_guest() {
    let bench = Workbench::new();
    let machine = bench.start("web", &["--keep"]);
    assert!(bench.output(&["stop", "web", "--force"]).status.success());
    assert_eq!(machine.wait().status.code(), Some(143));
    assert!(!bench.requests("web").contains("SendCtrlAltDel"));
}

fn api_prints_the_answer_and_fails_on_a_refusal() {
    let bench = Workbench::new();
    let _machine = bench.start("web", &[]);
    let output = bench.output(&["api", "--vm", "web", "get", "/machine-config"]);
    let answer: Value = serde_json::from_slice(&output.stdout).expect("the answer is JSON");
    assert_eq!(
        (output.status.code(), &answer["vcpu_count"]),
        (Some(0), &json!(2))
    );
    let output = bench.output(&["api", "--vm", "web", "PUT", "/nothing", "{}"]);
    assert_eq!(
        (output.status.code(), output.stdout.as_slice()),
        (Some(1), &b""[..])
    );
    assert!(
        stderr(&output).contains("refused with status 400: Invalid request"),
        "{}",
        stderr(&output)
    );
}

fn every_shell_gets_a_script() {
    let bench = Workbench::new();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let output = bench.output(&["completions", shell]);
        assert!(output.status.success());
        let script = String::from_utf8(output.stdout).expect("a script is text");
        assert!(
            script.contains("cpu-template") && script.contains("resume"),
            "{shell}"
        );
    }
}

fn the_scripts_are_for_the_programs_own_name() {
    let bench = Workbench::new();
    let print = |arguments: &[&str]| {
        String::from_utf8(bench.output(arguments).stdout).expect("what it prints is text")
    };
    let bash = print(&["completions", "bash"]);
    let registered = bash
        .lines()
        .any(|line| line.contains("complete -F _coraclectl ") && line.ends_with(" coraclectl"));
    assert!(registered, "{bash}");
    assert!(print(&["completions", "zsh"]).starts_with("#compdef coraclectl\n"));
    assert!(print(&["--version"]).starts_with("coraclectl "));
}

fn a_wrong_command_line_is_json_where_json_is_asked_for() {
    let bench = Workbench::new();
    for (arguments, status, expected) in [
        (&["run", "--json"][..], 125, "--kernel <PATH>"),
        (
            &["run", "--kernel", "k", "--memory", "lots", "--json"],
            125,
            "128MB",
        ),
        (&["--json", "frobnicate"], 2, "frobnicate"),
        (&["--json", "kill", "web"], 2, "stop --force"),
        (&["--json"], 2, "subcommand"),
    ] {
        let output = bench.output(arguments);
        assert_eq!(output.status.code(), Some(status), "{arguments:?}");
        let report: Value = serde_json::from_slice(&output.stderr).expect("errors are JSON");
        let error = report["error"].as_str().expect("the error is text");
        assert!(
            error.contains(expected) && !error.contains("Usage"),
            "{arguments:?}: {error}"
        );
        assert_eq!(report["causes"], json!([]));
    }
    let help = bench.output(&["--json", "--help"]);
    assert!(help.status.success() && help.stdout.starts_with(b"Run and drive"));
}

fn who_knows_other_tools_finds_the_verb() {
    let bench = Workbench::new();
    for alias in ["ls", "list"] {
        let output = bench.output(&[alias]);
        assert!(
            output.status.success() && output.stdout.starts_with(b"ID "),
            "{alias}"
        );
    }
    let output = bench.output(&["kill", "web"]);
    assert!(
        stderr(&output).contains("`coraclectl stop --force <VM>`"),
        "{}",
        stderr(&output)
    );
}
