//! What a guest asks its host about itself.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use coracle_tests::case::{Case, Context};
use coracle_tests::environment::Need;
use coracle_tests::guest::{Linux, Machine, run};
use coracle_tests::harness::hosts::Star;
use coracle_tests::monitor::{Launch, Monitor};
use coracle_tests::{Outcome, ensure};
use serde_json::{Value, json};

use super::snapshot::{Files, killed, saved, started};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "linux_asks_for_its_metadata_with_a_token_and_gets_none_without",
        need: Need::KvmAndHosts,
        run: asks,
    },
    Case {
        name: "a_snapshot_takes_along_how_metadata_are_asked_for_and_not_what_they_are",
        need: Need::KvmAndHosts,
        run: goes_along,
    },
    Case {
        name: "what_makes_no_sense_is_an_error_that_says_what_to_do",
        need: Need::KvmAndHosts,
        run: makes_no_sense,
    },
];

/// A boot takes ten seconds where kernel code is emulated, and each program half of one.
const END_WITHIN: Duration = Duration::from_secs(240);
const HOST: IpAddr = IpAddr::V4(Ipv4Addr::new(172, 16, 0, 1));
/// What the guest does: its address, a way, a token, and two requests of which one has it.
const WORDS: &str = r#"run "ifconfig eth0 172.16.0.2 up; ip route add 169.254.169.254 dev eth0;
    T=$(printf 'PUT /latest/api/token HTTP/1.0\r\nX-metadata-token-ttl-seconds: 60\r\n\r\n' | nc 169.254.169.254 80 | tail -n 1);
    wget -q -O - --header X-metadata-token:$T http://169.254.169.254/latest/id;
    wget -O - http://169.254.169.254/latest/id 2>&1 | grep -q 401""#;

fn machine(context: &Context, directory: &std::path::Path, words: &str) -> Outcome<Machine> {
    let network = json!([{ "iface_id": "eth0", "host_dev_name": "tap0" }]);
    let mmds = json!({ "network_interfaces": ["eth0"], "version": "V2" });
    Ok(Linux::read(&context.environment)?
        .machine("smp", directory, words)?
        .part("network-interfaces", network)
        .part("mmds-config", mmds))
}

fn asks(context: &Context) -> Outcome {
    let star = Star::new(0)?;
    star.server.bridge(HOST, &["tap0"])?;
    let mut seed = context.seed.clone();
    let id = format!("i-{:016x}", seed.draw());
    let launch = Launch::new(&context.environment)?;
    let metadata = launch.directory().join("test-metadata.json");
    std::fs::write(&metadata, json!({ "latest": { "id": id } }).to_string())?;
    let machine = machine(context, launch.directory(), &WORDS.replace('\n', " "))?;
    let metadata = metadata.to_str().ok_or("a path of the test's is UTF-8")?;
    let launch = launch.arguments(["--metadata", metadata]);
    let ended = star.server.inside(|| run(launch, &machine, END_WITHIN))??;
    ended.expect(0)?;
    ensure!(ended.console.contains(&id), "{}", ended.console);
    Ok(())
}

fn json_of(monitor: &Monitor, path: &str) -> Outcome<Value> {
    Ok(serde_json::from_str(&monitor.must("GET", path, None)?.body)?)
}

fn goes_along(context: &Context) -> Outcome {
    let star = Star::new(0)?;
    star.server.bridge(HOST, &["tap0"])?;
    let directory = tempfile::tempdir()?;
    let config = machine(context, directory.path(), "run true")?.config();
    let host = &star.server;
    let first = host.inside(|| started(context, &config))??;
    first.must("PUT", "/mmds", Some(&json!({ "a": { "b": 1 } })))?;
    first.must("PATCH", "/mmds", Some(&json!({ "a": { "c": 2 } })))?;
    let content = json_of(&first, "/mmds")?;
    ensure!(content == json!({ "a": { "b": 1, "c": 2 } }), "{content}");
    let files = Files::in_directory(directory.path(), "test-metadata");
    saved(&first, &files, "Full")?;
    killed(first)?;
    let second = host.inside(|| Launch::new(&context.environment)?.start())??;
    second.must("PUT", "/snapshot/load", Some(&files.load("lazy")))?;
    let config = json_of(&second, "/vm/config")?;
    let mmds = config.get("mmds-config").cloned().unwrap_or_default();
    let expected = json!({
        "version": "V2", "network_interfaces": ["eth0"], "ipv4_address": "169.254.169.254", "imds_compat": false
    });
    ensure!(mmds == expected, "{mmds}");
    let content = json_of(&second, "/mmds")?;
    ensure!(content == json!({}), "{content}");
    second.wait(END_WITHIN)?.expect(0)
}

fn makes_no_sense(context: &Context) -> Outcome {
    let star = Star::new(0)?;
    star.server.bridge(HOST, &["tap0"])?;
    let launch = || {
        let launch = Launch::new(&context.environment)?;
        launch.arguments(["--mmds-size-limit", "20"]).start()
    };
    let monitor = star.server.inside(launch)??;
    let network = json!({ "iface_id": "eth0", "host_dev_name": "tap0" });
    monitor.must("PUT", "/network-interfaces/eth0", Some(&network))?;
    for (method, path, body, words) in [
        (
            "PUT",
            "/mmds/config",
            json!({ "network_interfaces": [] }),
            "at least one",
        ),
        (
            "PUT",
            "/mmds/config",
            json!({ "network_interfaces": ["eth1"] }),
            "`eth1`",
        ),
        (
            "PUT",
            "/mmds/config",
            json!({ "network_interfaces": ["eth0"], "ipv4_address": "10.0.0.1" }),
            "link-local",
        ),
        ("PATCH", "/mmds", json!({ "a": 1 }), "PUT /mmds"),
        (
            "PUT",
            "/mmds",
            json!({ "a": "more than twenty" }),
            "--mmds-size-limit",
        ),
    ] {
        let answer = monitor.request(method, path, Some(&body))?;
        ensure!(answer.status == 400, "{body}: {answer:?}");
        ensure!(answer.fault().contains(words), "{body}: {answer:?}");
    }
    let config = json!({ "network_interfaces": ["eth0"], "imds_compat": true });
    monitor.must("PUT", "/mmds/config", Some(&config))?;
    monitor.must("PUT", "/mmds", Some(&json!({ "a": 1 }))).map(drop)
}
