//! The API answers as Firecracker's does, in every phase.

use std::time::{Duration, Instant};

use coracle_tests::case::{Case, Context, Extent};
use coracle_tests::environment::Need;
use coracle_tests::exchange::{Exchange, Files, PHASES, Phase, ask, recorded, requests};
use coracle_tests::monitor::Launch;
use coracle_tests::shape::missing;
use coracle_tests::{Outcome, ensure};
use serde_json::{Value, json};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "every_request_was_recorded",
        need: Need::Nothing,
        run: every_request_was_recorded,
    },
    Case {
        name: "answers_are_those_of_firecracker",
        need: Need::Kvm,
        run: answers_are_those_of_firecracker,
    },
    Case {
        name: "the_records_are_what_firecracker_answers",
        need: Need::KvmAndFirecracker,
        run: the_records_are_what_firecracker_answers,
    },
    Case {
        name: "what_was_put_is_what_is_got",
        need: Need::Kvm,
        run: what_was_put_is_what_is_got,
    },
    Case {
        name: "metrics_are_there_in_every_phase",
        need: Need::Kvm,
        run: metrics_are_there_in_every_phase,
    },
    Case {
        name: "flushed_metrics_are_lines_of_json",
        need: Need::Kvm,
        run: flushed_metrics_are_lines_of_json,
    },
    Case {
        name: "log_lines_have_firecrackers_form",
        need: Need::Kvm,
        run: log_lines_have_firecrackers_form,
    },
    Case {
        name: "a_body_that_is_too_large_is_refused",
        need: Need::Nothing,
        run: a_body_that_is_too_large_is_refused,
    },
    Case {
        name: "nonsense_on_the_socket_is_answered",
        need: Need::Nothing,
        run: nonsense_on_the_socket_is_answered,
    },
    Case {
        name: "requests_can_share_a_connection",
        need: Need::Nothing,
        run: requests_can_share_a_connection,
    },
    Case {
        name: "a_silent_client_delays_nobody",
        need: Need::Nothing,
        run: a_silent_client_delays_nobody,
    },
    Case {
        name: "a_client_that_reads_nothing_delays_nobody",
        need: Need::Nothing,
        run: a_deaf_client_delays_nobody,
    },
    Case {
        name: "clients_that_come_and_go_leave_nothing",
        need: Need::Nothing,
        run: clients_that_come_and_go_leave_nothing,
    },
];

/// Where we answer otherwise on purpose: the phase's request, our status, the reason.
const DIFFERENT_ON_PURPOSE: &[(&str, &str, u16, &str)] = &[(
    "PUT /metrics",
    r#""unknown":1"#,
    400,
    "unknown fields are refused everywhere",
)];

const SOON: Duration = Duration::from_secs(2);

fn every_request_was_recorded(_: &Context) -> Outcome {
    let recorded: Vec<_> = recorded()?.into_iter().map(|exchange| exchange.request).collect();
    ensure!(
        recorded == requests(),
        "the requests have changed; run: FIRECRACKER=path make record-api"
    );
    Ok(())
}

fn answers_are_those_of_firecracker(context: &Context) -> Outcome {
    let mut differences = Vec::new();
    for expected in recorded()? {
        let found = ask(Launch::new(&context.environment)?, &expected.request)?;
        differences.extend(difference(&expected, &found));
    }
    ensure!(
        differences.is_empty(),
        "{} differences:\n{}",
        differences.len(),
        differences.join("\n")
    );
    Ok(())
}

fn the_records_are_what_firecracker_answers(context: &Context) -> Outcome {
    let firecracker = context
        .environment
        .firecracker
        .as_deref()
        .ok_or("a Firecracker is needed")?;
    let mut differences = Vec::new();
    for expected in recorded()? {
        let found = ask(
            Launch::of(firecracker)?.arguments(["--no-seccomp"]),
            &expected.request,
        )?;
        if found != expected {
            differences.push(format!("{expected:?}, now {} {}", found.status, found.shape));
        }
    }
    ensure!(
        differences.is_empty(),
        "{} differences:\n{}",
        differences.len(),
        differences.join("\n")
    );
    Ok(())
}

/// What differs between the recorded answer and ours, unless it is meant to.
fn difference(expected: &Exchange, found: &Exchange) -> Option<String> {
    let request = &expected.request;
    let name = format!("{} {}", request.method, request.path);
    let body = request.body.as_deref().unwrap_or("-");
    let on_purpose = DIFFERENT_ON_PURPOSE
        .iter()
        .find(|(n, part, ..)| *n == name && body.contains(part));
    let status = on_purpose.map_or(expected.status, |(_, _, status, _)| *status);
    let lacking = if on_purpose.is_some() {
        vec![]
    } else {
        missing(&expected.shape, &found.shape)
    };
    (found.status != status || !lacking.is_empty()).then(|| {
        format!(
            "{:?} {name} {body}: {}, not {status}; {lacking:?}",
            request.phase, found.status
        )
    })
}

fn what_was_put_is_what_is_got(context: &Context) -> Outcome {
    let launch = Launch::new(&context.environment)?;
    let files = Files::make(launch.directory())?;
    let monitor = launch.start()?;
    files.reach(&monitor, Phase::Configured)?;
    let drive = json!({
        "drive_id": "scratch", "path_on_host": files.fill_in("{other_disk}"), "is_root_device": false,
        "is_read_only": true, "cache_type": "Writeback", "io_engine": "Sync",
        "rate_limiter": { "ops": { "size": 100, "one_time_burst": 10, "refill_time": 1000 } }
    });
    monitor.must("PUT", "/drives/scratch", Some(&drive))?;
    for phase in [Phase::Configured, Phase::Running] {
        if phase == Phase::Running {
            monitor.start_instance()?;
        }
        let config = monitor.must("GET", "/vm/config", None)?.json()?;
        let drives = config
            .get("drives")
            .and_then(Value::as_array)
            .ok_or("there are drives")?;
        ensure!(drives.len() == 2, "{phase:?}: {drives:?}");
        let got = drives
            .iter()
            .find(|d| d.get("drive_id") == drive.get("drive_id"))
            .ok_or("scratch is gone")?;
        for (key, value) in drive.as_object().into_iter().flatten() {
            ensure!(
                covers(got.get(key).unwrap_or(&Value::Null), value),
                "{phase:?}: {key} is not {value}: {got}"
            );
        }
        ensure!(
            config.pointer("/machine-config/mem_size_mib") == Some(&json!(64)),
            "{phase:?}: {config}"
        );
        ensure!(
            config.pointer("/boot-source/boot_args") == Some(&json!("quiet")),
            "{phase:?}: {config}"
        );
    }
    Ok(())
}

/// Whether `found` has at least what `expected` has.
fn covers(found: &Value, expected: &Value) -> bool {
    match (found, expected) {
        (Value::Object(found), Value::Object(expected)) => expected
            .iter()
            .all(|(key, value)| found.get(key).is_some_and(|found| covers(found, value))),
        _ => found == expected,
    }
}

fn metrics_are_there_in_every_phase(context: &Context) -> Outcome {
    for phase in PHASES {
        let launch = Launch::new(&context.environment)?;
        let files = Files::make(launch.directory())?;
        let monitor = launch.start()?;
        files.reach(&monitor, phase)?;
        let answer = monitor.must("GET", "/metrics", None)?;
        let kind = answer.header("content-type").unwrap_or_default();
        ensure!(kind.starts_with("text/plain"), "{phase:?}: {kind}");
        ensure!(
            answer.body.contains("# TYPE "),
            "{phase:?}: no Prometheus text:\n{}",
            answer.body
        );
        for line in answer
            .body
            .lines()
            .filter(|line| !line.starts_with('#') && !line.is_empty())
        {
            let number = line.rsplit_once(' ').map(|(_, number)| number.parse::<f64>());
            ensure!(
                matches!(number, Some(Ok(_))),
                "{phase:?}: '{line}' ends in no number"
            );
            ensure!(
                line.starts_with("coracle_"),
                "{phase:?}: '{line}' is not in our name space"
            );
        }
    }
    Ok(())
}

fn flushed_metrics_are_lines_of_json(context: &Context) -> Outcome {
    let launch = Launch::new(&context.environment)?;
    let files = Files::make(launch.directory())?;
    let metrics = launch.directory().join("test-metrics");
    let monitor = launch.start()?;
    monitor.must("PUT", "/metrics", Some(&json!({ "metrics_path": metrics })))?;
    files.reach(&monitor, Phase::Running)?;
    for _ in 0..2 {
        monitor.must("PUT", "/actions", Some(&json!({ "action_type": "FlushMetrics" })))?;
    }
    let text = std::fs::read_to_string(&metrics)?;
    ensure!(text.lines().count() >= 2, "two flushes make two lines:\n{text}");
    for line in text.lines() {
        let value: Value = serde_json::from_str(line).map_err(|e| format!("{e} in {line}"))?;
        for group in [
            "utc_timestamp_ms",
            "api_server",
            "block",
            "get_api_requests",
            "put_api_requests",
            "patch_api_requests",
            "latencies_us",
            "uart",
            "vcpu",
        ] {
            ensure!(value.get(group).is_some(), "no {group} in {line}");
        }
    }
    Ok(())
}

fn log_lines_have_firecrackers_form(context: &Context) -> Outcome {
    let launch =
        Launch::new(&context.environment)?.arguments(["--id", "a-name", "--level", "Info", "--show-level"]);
    let files = Files::make(launch.directory())?;
    let monitor = launch.start()?;
    files.reach(&monitor, Phase::Running)?;
    let log = monitor.log()?;
    ensure!(!log.is_empty(), "nothing was logged");
    for line in log.lines() {
        // 2026-11-23T14:22:48.344530749 [a-name:main:INFO] words
        let (time, rest) = line
            .split_once(' ')
            .ok_or_else(|| format!("no time in '{line}'"))?;
        ensure!(
            time.len() == 29 && time.as_bytes().get(10) == Some(&b'T'),
            "'{time}' is no such time"
        );
        let (source, _) = rest
            .split_once("] ")
            .ok_or_else(|| format!("no source in '{line}'"))?;
        let parts: Vec<&str> = source.trim_start_matches('[').split(':').collect();
        ensure!(
            matches!(parts.as_slice(), ["a-name", _, "INFO" | "WARN" | "ERROR"]),
            "'{source}' in '{line}'"
        );
    }
    Ok(())
}

fn a_body_that_is_too_large_is_refused(context: &Context) -> Outcome {
    let monitor = Launch::new(&context.environment)?
        .arguments(["--http-api-max-payload-size", "1000"])
        .start()?;
    let body = format!(
        "{{\"vcpu_count\":1,\"mem_size_mib\":64,\"huge_pages\":\"{}\"}}",
        "x".repeat(5000)
    );
    let answer = monitor
        .connect()?
        .request("PUT", "/machine-config", Some(&body))?;
    ensure!(
        matches!(answer.status, 400 | 413),
        "{} {}",
        answer.status,
        answer.body
    );
    ensure!(
        answer.body.contains("1000"),
        "the limit is not named: {}",
        answer.body
    );
    monitor.must("GET", "/version", None)?;

    // Announced, never sent: nobody waits for it.
    let mut connection = monitor.connect()?;
    connection.send(b"PUT /machine-config HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n")?;
    let answer = connection.answer()?;
    ensure!(
        matches!(answer.status, 400 | 413),
        "{} {}",
        answer.status,
        answer.body
    );
    Ok(())
}

fn nonsense_on_the_socket_is_answered(context: &Context) -> Outcome {
    let mut monitor = Launch::new(&context.environment)?.start()?;
    let endless = [b"GET /".as_slice(), &[b'a'; 100_000]].concat();
    let headers = [
        b"GET / HTTP/1.1\r\n".as_slice(),
        &b"X-Header: 1\r\n".repeat(10_000),
        b"\r\n",
    ]
    .concat();
    let rows: [&[u8]; 8] = [
        b"\0\0\0\0\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"PUT /actions HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"PUT /actions HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        b"PUT /actions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        &endless,
        &headers,
    ];
    for row in rows {
        let head = String::from_utf8_lossy(row.get(..row.len().min(60)).unwrap_or_default()).into_owned();
        let mut connection = monitor.connect()?;
        // The monitor may close as soon as it has seen enough.
        drop(connection.send(row));
        match connection.answer() {
            Ok(answer) => ensure!((400..500).contains(&answer.status), "{head:?}: {}", answer.status),
            Err(_) => ensure!(
                connection.is_closed_within(SOON),
                "{head:?}: neither answered nor closed"
            ),
        }
        ensure!(monitor.is_running()?, "{head:?} ended the monitor");
        monitor.must("GET", "/version", None)?;
    }
    Ok(())
}

fn requests_can_share_a_connection(context: &Context) -> Outcome {
    let monitor = Launch::new(&context.environment)?.start()?;
    let mut connection = monitor.connect()?;
    for _ in 0..50 {
        ensure!(
            connection.request("GET", "/version", None)?.status == 200,
            "a version is always told"
        );
        let refused = connection.request("PUT", "/machine-config", Some("{}"))?;
        ensure!(refused.status == 400, "{}", refused.status);
    }
    // Two at once, and one in two pieces.
    connection.send(b"GET /version HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\n\r\nGET /ver")?;
    ensure!(connection.answer()?.body.contains("version"), "the first of two");
    ensure!(connection.answer()?.body.contains("state"), "the second of two");
    connection.send(b"sion HTTP/1.1\r\n\r\n")?;
    ensure!(connection.answer()?.status == 200, "the third, in two pieces");
    Ok(())
}

fn a_silent_client_delays_nobody(context: &Context) -> Outcome {
    let monitor = Launch::new(&context.environment)?.start()?;
    let mut silent = Vec::new();
    for start in [
        "",
        "GET",
        "GET / HTTP/1.1\r\nHost:",
        "PUT /actions HTTP/1.1\r\nContent-Length: 100\r\n\r\n{\"act",
    ] {
        let mut connection = monitor.connect()?;
        connection.send(start.as_bytes())?;
        silent.push(connection);
    }
    answers_soon(|| monitor.must("GET", "/version", None).map(drop))
}

fn a_deaf_client_delays_nobody(context: &Context) -> Outcome {
    let monitor = Launch::new(&context.environment)?.start()?;
    let mut deaf = monitor.connect()?;
    // Its answers fill the socket's buffer; a monitor that waits for it answers nobody else.
    let many = b"GET /vm/config HTTP/1.1\r\n\r\n".repeat(200);
    for _ in 0..20 {
        // Once the monitor has had enough of it, it closes.
        if deaf.send_some(&many).is_err() {
            break;
        }
    }
    answers_soon(|| monitor.must("GET", "/version", None).map(drop))
}

fn answers_soon(request: impl Fn() -> Outcome) -> Outcome {
    for _ in 0..20 {
        let start = Instant::now();
        request()?;
        ensure!(start.elapsed() < SOON, "an answer took {:?}", start.elapsed());
    }
    Ok(())
}

fn clients_that_come_and_go_leave_nothing(context: &Context) -> Outcome {
    let count = if context.extent == Extent::Full {
        20_000
    } else {
        300
    };
    let monitor = Launch::new(&context.environment)?.start()?;
    monitor.must("GET", "/version", None)?;
    std::thread::sleep(Duration::from_millis(50));
    let before = monitor.process().holdings()?;
    for number in 0..count {
        let mut connection = monitor.connect()?;
        match number % 3 {
            0 => drop(connection.request("GET", "/version", None)?),
            1 => connection.send(b"PUT /actions HTTP/1.1\r\nContent-Length: 9\r\n\r\n{")?,
            _ => {}
        }
    }
    // The monitor sees the last ones go a moment later.
    let deadline = Instant::now() + SOON;
    loop {
        let after = monitor.process().holdings()?;
        if after.descriptors == before.descriptors && after.threads == before.threads {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "after {count} clients {after:?}, before {before:?}"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}
