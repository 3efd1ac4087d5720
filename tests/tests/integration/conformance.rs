//! Every path and every field that our OpenAPI document has, as it says and otherwise, in every phase of a machine: what is
//! answered is what the document says, and all that it says is answered.

mod bodies;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Duration;

use coracle_tests::case::{Case, Context};
use coracle_tests::environment::Need;
use coracle_tests::guest::Machine;
use coracle_tests::monitor::{Launch, Monitor};
use coracle_tests::{Outcome, ensure};
use serde_json::{Value, json};

use self::bodies::{Body, Document};

pub(crate) const CASES: &[Case] = &[Case {
    name: "every_path_and_field_answers_as_the_openapi_document_says_in_every_phase",
    need: Need::Kvm,
    run: answers_as_documented,
}];

const DOCUMENT: &str = include_str!("../../../resources/openapi.json");
const SOON: Duration = Duration::from_secs(30);

/// Answers that take more than one machine, or a network, which not everybody may have, and the tests in which they are given.
const ELSEWHERE: &[(&str, u16, &str)] = &[
    ("DeleteDrive", 204, "hotplug::*"),
    ("DeleteNetworkInterface", 204, "hotplug::*"),
    ("PutMmdsConfig", 204, "metadata::*"),
    ("PutNetworkInterface", 204, "net::*"),
    ("PatchNetworkInterface", 204, "net::*"),
    ("ReceiveMigration", 204, "migration::*"),
    ("RecoverMigration", 204, "migration::postcopy::*"),
    ("SendMigration", 204, "migration::*"),
];

/// Where a machine is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    NotStarted,
    Running,
    Paused,
}

/// What is asked of one machine, and what was answered so far.
struct Survey<'a> {
    document: &'a Document,
    directory: &'a Path,
    answered: BTreeMap<&'a str, BTreeSet<u16>>,
    asked: usize,
}

fn answers_as_documented(context: &Context) -> Outcome {
    let document = Document::parse(DOCUMENT)?;
    let directory = tempfile::tempdir()?;
    let image = directory.path().join("test-disk");
    std::fs::write(&image, vec![0; 1 << 20])?;
    let pmem = directory.path().join("test-pmem");
    std::fs::write(&pmem, vec![0; 1 << 20])?;
    let pmem = json!({ "id": "d", "path_on_host": pmem });
    let mut survey = Survey {
        document: &document,
        directory: directory.path(),
        answered: BTreeMap::new(),
        asked: 0,
    };
    // Its driver has the disk, so that nobody takes that out.
    let machine = Machine::unikernel(
        &context.environment,
        "do=capacity do=hello do=tick:ms=10,count=1000000",
    )
    .memory_mib(32)
    .disk("d", &image)
    .part("pmem", json!([pmem]))
    .part("memory-hotplug", json!({ "total_size_mib": 128 }))
    .part("rate-limiter-groups", json!([{ "group_id": "d" }]))
    .part(
        "balloon",
        json!({
            "amount_mib": 0, "deflate_on_oom": true, "stats_polling_interval_s": 1, "free_page_hinting": true,
            "free_page_reporting": true,
        }),
    );
    let config = machine.config();

    let fresh = Launch::new(&context.environment)?.start()?;
    survey.ask_all(&fresh, Phase::NotStarted)?;
    let kernel = config.get("boot-source").cloned().unwrap_or_default();
    survey.must(&fresh, "PutBootSource", &kernel)?;
    let drive =
        json!({ "drive_id": "d", "path_on_host": image, "is_root_device": false, "is_read_only": true });
    survey.must(&fresh, "PutDrive", &drive)?;
    survey.must(&fresh, "PutPmem", &pmem)?;
    let socket = json!({ "guest_cid": 3, "uds_path": directory.path().join("vsock") });
    survey.must(&fresh, "PutVsock", &socket)?;
    survey.must(&fresh, "PutMemoryHotplug", &json!({ "total_size_mib": 128 }))?;

    let guest = Launch::new(&context.environment)?.start()?;
    guest.configure(&config)?;
    survey.must(
        &guest,
        "StartOrFlushMetricsOrSendCtrlAltDel",
        &json!({ "action_type": "InstanceStart" }),
    )?;
    guest.console.wait_for("hello", SOON)?;
    survey.ask_all(&guest, Phase::Running)?;
    survey.must(
        &guest,
        "PatchDrive",
        &json!({ "drive_id": "d", "path_on_host": image }),
    )?;
    survey.must(&guest, "PauseOrResume", &json!({ "state": "Paused" }))?;
    survey.ask_all(&guest, Phase::Paused)?;
    let file = |name: &str| directory.path().join(name);
    let files =
        json!({ "snapshot_path": file("state"), "mem_file_path": file("memory"), "snapshot_type": "Full" });
    survey.must(&guest, "CreateSnapshot", &files)?;
    drop(guest);
    let other = Launch::new(&context.environment)?.start()?;
    let memory = json!({ "backend_type": "File", "backend_path": file("memory") });
    let load = json!({ "snapshot_path": file("state"), "mem_backend": memory });
    survey.must(&other, "LoadSnapshot", &load)?;
    survey.conclude()
}

impl<'a> Survey<'a> {
    /// Asks for everything, as it may be asked for and as it may not.
    fn ask_all(&mut self, monitor: &Monitor, phase: Phase) -> Outcome {
        let document = self.document;
        for operation in &document.operations {
            for body in document.bodies(operation, "d") {
                let status = self.ask(monitor, &operation.id, &body)?;
                let what = || format!("{} {} {body:?} in {phase:?}", operation.method, operation.path);
                ensure!(
                    !body.is_wrong() || status == 400,
                    "{}: {status}, and it is not what the document has",
                    what()
                );
                if operation.path == "/vm" && phase != Phase::NotStarted {
                    let state = if phase == Phase::Running {
                        "Resumed"
                    } else {
                        "Paused"
                    };
                    monitor.set_state(state)?;
                }
                let now = monitor.must("GET", "/", None)?.json()?;
                let now = now
                    .get("state")
                    .and_then(Value::as_str)
                    .unwrap_or_default()
                    .replace(' ', "");
                ensure!(
                    now.eq_ignore_ascii_case(&format!("{phase:?}")),
                    "{now} after {}",
                    what()
                );
            }
        }
        Ok(())
    }

    /// Asks for what has to be done.
    fn must(&mut self, monitor: &Monitor, id: &str, body: &Value) -> Outcome {
        let status = self.ask(monitor, id, &Body::Fitting(body.clone()))?;
        ensure!((200..300).contains(&status), "{id} {body}: {status}");
        Ok(())
    }

    fn ask(&mut self, monitor: &Monitor, id: &str, body: &Body) -> Outcome<u16> {
        let operation = self.document.operation(id)?;
        let path = operation.path_of("d");
        let text = body.text();
        let mut connection = monitor.connect()?;
        let answer = connection.request(&operation.method, &path, text.as_deref())?;
        ensure!(
            operation.statuses.contains(&answer.status),
            "{} {path} {body:?}: status {} is not documented: {}",
            operation.method,
            answer.status,
            answer.body
        );
        if answer.status == 400 {
            ensure!(
                !answer.fault().is_empty(),
                "{} {path}: {answer:?}",
                operation.method
            );
        }
        if answer.status == 204 {
            ensure!(answer.body.is_empty(), "{} {path}: {answer:?}", operation.method);
        }
        if let (200, Some(schema)) = (answer.status, &operation.answer) {
            self.document.check(schema, &answer.json()?, &operation.path)?;
        }
        self.answered
            .entry(&operation.id)
            .or_default()
            .insert(answer.status);
        self.asked += 1;
        Ok(answer.status)
    }

    /// Whether everything was answered that the document has.
    fn conclude(self) -> Outcome {
        println!(
            "conformance: {} requests for {} operations in {}",
            self.asked,
            self.document.operations.len(),
            self.directory.display()
        );
        let none = BTreeSet::new();
        let mut wrong = Vec::new();
        for operation in &self.document.operations {
            let answered = self.answered.get(operation.id.as_str()).unwrap_or(&none);
            for status in &operation.statuses {
                let elsewhere = ELSEWHERE
                    .iter()
                    .any(|(id, other, _)| *id == operation.id && other == status);
                if !answered.contains(status) && !elsewhere {
                    wrong.push(format!("{} is never answered with {status}", operation.id));
                }
            }
        }
        ensure!(wrong.is_empty(), "{wrong:#?}");
        Ok(())
    }
}
