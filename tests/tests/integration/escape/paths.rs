//! Paths that clients of the API name: whatever they say, they lead to what is in the jail.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;

use coracle_tests::case::Context;
use coracle_tests::certificates::Authority;
use coracle_tests::guest::Machine;
use coracle_tests::harness::jail::{Jail, Jailed, UID};
use coracle_tests::monitor::{Launch, Monitor};
use coracle_tests::{Outcome, ensure, tree};
use rustix::process::Signal;
use serde_json::{Value, json};

use super::{SOON, lay_links};

/// Where a path stands in the body of a request.
const HERE: &str = "PATH";
/// A file in the jail like the one outside, and a directory that is the monitor's.
const INSIDE: &str = "/inside";
/// What is said of a name that is none: by the host, and of images.
const NOT_THERE: [&str; 4] = [
    "No such file or directory",
    "there is no image",
    "there is no state file",
    "there is no memory file",
];

/// What is asked, in which phase, and what for.
struct Request {
    verb: &'static str,
    url: &'static str,
    body: Value,
    use_of_it: Use,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Use {
    /// What is there is read, at the latest when the machine starts.
    Reads,
    /// Something is made there, or what is there is replaced.
    Writes,
}

/// Every member of a request that is a path on this host; what the table lacks is found in the API's description.
const MEMBERS: &[(&str, &str)] = &[
    ("BootSource", "initrd_path"),
    ("BootSource", "kernel_image_path"),
    ("DriveConfig", "path_on_host"),
    ("DriveOverride", "overlay_path"),
    ("DriveOverride", "path_on_host"),
    ("LoggerConfig", "log_path"),
    ("MemBackend", "backend_path"),
    ("MetricsConfig", "metrics_path"),
    ("PartialDrive", "path_on_host"),
    ("PmemConfig", "path_on_host"),
    ("SerialConfig", "serial_out_path"),
    ("SnapshotCreate", "mem_file_path"),
    ("SnapshotCreate", "snapshot_path"),
    ("SnapshotLoad", "mem_file_path"),
    ("SnapshotLoad", "snapshot_path"),
    ("VsockConfig", "uds_path"),
    ("VsockOverride", "uds_path"),
];

fn drive(more: &Value) -> Value {
    let mut drive = json!({ "drive_id": "d", "is_root_device": false, "is_read_only": true, "lock": "none" });
    if let (Some(drive), Some(more)) = (drive.as_object_mut(), more.as_object()) {
        drive.extend(more.clone());
    }
    drive
}

fn request(verb: &'static str, url: &'static str, use_of_it: Use, body: Value) -> Request {
    Request {
        verb,
        url,
        body,
        use_of_it,
    }
}

/// Of a process that has been configured for nothing yet.
fn fresh() -> Vec<Request> {
    use Use::Reads;
    let tls = |name: &str| {
        let mut tls = json!({ "certificate": "/host.crt", "key": "/host.key", "ca": "/ca.crt" });
        if let Some(place) = tls.get_mut(name) {
            *place = json!(HERE);
        }
        json!({ "listen": "127.0.0.1:0", "tls": tls })
    };
    let load = |state: &str, memory: &str| {
        let memory = json!({ "backend_type": "File", "backend_path": memory });
        json!({ "snapshot_path": state, "mem_backend": memory })
    };
    let mut keyed = load(INSIDE, INSIDE);
    if let Some(keyed) = keyed.as_object_mut() {
        keyed.insert("trusted_keys".to_owned(), json!(HERE));
    }
    vec![
        request("PUT", "/migration/receive", Reads, tls("certificate")),
        request("PUT", "/migration/receive", Reads, tls("key")),
        request("PUT", "/migration/receive", Reads, tls("ca")),
        request("PUT", "/snapshot/load", Reads, keyed),
        request("PUT", "/snapshot/load", Reads, load("/state", HERE)),
        request("PUT", "/snapshot/load", Reads, load(HERE, INSIDE)),
    ]
}

/// Before a machine runs.
fn before() -> Vec<Request> {
    use Use::{Reads, Writes};
    vec![
        request("PUT", "/boot-source", Reads, json!({ "kernel_image_path": HERE })),
        request(
            "PUT",
            "/boot-source",
            Reads,
            json!({ "kernel_image_path": "/kernel", "initrd_path": HERE }),
        ),
        request("PUT", "/drives/d", Reads, drive(&json!({ "path_on_host": HERE }))),
        request(
            "PUT",
            "/drives/d",
            Reads,
            drive(&json!({ "overlay": { "base": HERE, "path": "memory" }, "is_read_only": false })),
        ),
        request(
            "PUT",
            "/drives/d",
            Writes,
            drive(&json!({ "overlay": { "base": INSIDE, "path": HERE }, "is_read_only": false })),
        ),
        request(
            "PUT",
            "/pmem/p",
            Reads,
            json!({ "id": "p", "path_on_host": HERE, "read_only": true }),
        ),
        request(
            "PUT",
            "/vsock",
            Writes,
            json!({ "guest_cid": 3, "uds_path": HERE }),
        ),
        request("PUT", "/logger", Writes, json!({ "log_path": HERE })),
        request("PUT", "/metrics", Writes, json!({ "metrics_path": HERE })),
        request("PUT", "/serial", Writes, json!({ "serial_out_path": HERE })),
    ]
}

/// While it runs.
fn running() -> Vec<Request> {
    use Use::Reads;
    let send = json!({
        "to": "127.0.0.1:1", "tls": { "certificate": HERE, "key": "/host.key", "ca": "/ca.crt" }
    });
    vec![
        request("PUT", "/migration/send", Reads, send),
        request(
            "PATCH",
            "/drives/disk",
            Reads,
            json!({ "drive_id": "disk", "path_on_host": HERE }),
        ),
    ]
}

/// While it is paused.
fn after() -> Vec<Request> {
    use Use::Writes;
    vec![
        request(
            "PUT",
            "/snapshot/create",
            Writes,
            json!({ "snapshot_path": HERE, "mem_file_path": "/run/other-memory" }),
        ),
        request(
            "PUT",
            "/snapshot/create",
            Writes,
            json!({ "snapshot_path": "/run/other-state", "mem_file_path": HERE }),
        ),
    ]
}

/// A file of the host that anybody may read and write, in a directory where anybody may make others.
struct Target {
    directory: tempfile::TempDir,
    content: Vec<u8>,
    /// What else is put into each jail.
    gifts: tempfile::TempDir,
}

impl Target {
    fn new(context: &Context) -> Outcome<Self> {
        let directory = tempfile::tempdir()?;
        // A kernel that is an image as well.
        let mut content = fs::read(&context.environment.unikernel)?;
        content.resize(content.len().next_multiple_of(512), 0);
        let gifts = tempfile::tempdir()?;
        Authority::new(gifts.path())?.host("host")?;
        let target = Self {
            directory,
            content,
            gifts,
        };
        fs::write(target.path(), &target.content)?;
        fs::set_permissions(target.path(), fs::Permissions::from_mode(0o666))?;
        fs::set_permissions(target.directory.path(), fs::Permissions::from_mode(0o777))?;
        Ok(target)
    }

    fn path(&self) -> std::path::PathBuf {
        self.directory.path().join("target")
    }

    /// Every way to say it.
    fn said(&self) -> Vec<String> {
        let path = self.path().display().to_string();
        let fresh = self.directory.path().join("fresh").display().to_string();
        vec![
            format!("/../../../../../..{path}"),
            format!("../../../../../..{path}"),
            format!("/run/../../..{path}"),
            format!("/proc/1/root{path}"),
            format!("/proc/self/root/..{path}"),
            "/link".to_owned(),
            "/dots".to_owned(),
            format!("/../../../../../..{fresh}"),
            fresh,
            path,
        ]
    }

    fn is_as_it_was(&self, after: &str) -> Outcome {
        ensure!(
            fs::read(self.path())? == self.content,
            "{after}: it was written to"
        );
        let names: Vec<_> = fs::read_dir(self.directory.path())?
            .flatten()
            .map(|entry| entry.file_name())
            .collect();
        ensure!(names == ["target"], "{after}: {names:?} are there");
        Ok(())
    }
}

/// A body with that path in its place.
fn with_path(body: &Value, path: &str) -> Value {
    match body {
        Value::String(text) if text == HERE => json!(path),
        Value::Object(members) => members
            .iter()
            .map(|(name, value)| (name.clone(), with_path(value, path)))
            .collect(),
        other => other.clone(),
    }
}

/// Whether the monitor has found nothing at that path; what it names at its start it may look for then.
fn finds_nothing(monitor: &Monitor, request: &Request, path: &str) -> Outcome<bool> {
    let body = with_path(&request.body, path);
    let answer = monitor.request(request.verb, request.url, Some(&body));
    let answer = answer.map_err(|error| {
        let said = monitor.errors.text();
        format!(
            "{} {body}: {}: {said}",
            request.url,
            coracle_tests::case::text(&error)
        )
    })?;
    let text = answer.body.to_string();
    ensure!(
        (200..500).contains(&answer.status),
        "{} {path}: {} {text}",
        request.url,
        answer.status
    );
    Ok(answer.status == 400 && NOT_THERE.iter().any(|said| text.contains(said)))
}

fn check(monitor: &Monitor, requests: &[Request], target: &Target, wrong: &mut Vec<String>) -> Outcome {
    for request in requests {
        let name = format!("{} {} {}", request.verb, request.url, request.body);
        for path in target.said() {
            let is_nothing = finds_nothing(monitor, request, &path)?;
            if request.use_of_it == Use::Reads && !is_nothing {
                wrong.push(format!("{name}: `{path}` is something in the jail"));
            }
            target.is_as_it_was(&format!("{name} with {path}"))?;
        }
        // The request itself is one that looks at the path, however that is said.
        for path in [INSIDE, "/run/../inside", "run/../inside"] {
            if request.use_of_it == Use::Reads && finds_nothing(monitor, request, path)? {
                wrong.push(format!("{name}: there is nothing at {path}"));
            }
        }
    }
    Ok(())
}

/// The table has what the API's description has.
fn has_every_member() -> Outcome {
    let description: Value = serde_json::from_str(&tree::read(Path::new("resources/openapi.json")))?;
    let schemas = description
        .pointer("/components/schemas")
        .and_then(Value::as_object);
    let mut found = BTreeMap::new();
    for (schema, content) in schemas.ok_or("there are schemas")? {
        let members = content
            .get("properties")
            .and_then(Value::as_object)
            .into_iter()
            .flatten();
        for (member, _) in members.filter(|(name, _)| name.ends_with("_path") || *name == "path_on_host") {
            found.insert((schema.as_str(), member.as_str()), ());
        }
    }
    let found: Vec<(&str, &str)> = found.into_keys().collect();
    ensure!(
        found == MEMBERS,
        "paths of the API that this table lacks, or more: {found:?}"
    );
    Ok(())
}

fn jail(context: &Context, target: &Target) -> Outcome<(Jail, Value)> {
    let words = "do=tick:ms=20,count=1000000";
    let machine = Machine::unikernel(&context.environment, words).drive(json!({
        "drive_id": "disk", "path_on_host": INSIDE, "is_root_device": false, "is_read_only": true, "lock": "none"
    }));
    let jail = Jail::new(&context.environment)?
        .flags(["--new-pid-ns", "--cleanup"])
        .arguments(["--level", "Error"]);
    fs::create_dir_all(jail.root())?;
    lay_links(&jail.root(), &target.path())?;
    fs::write(target.gifts.path().join("inside"), &target.content)?;
    for gift in fs::read_dir(target.gifts.path())? {
        let gift = gift?;
        let shown = jail.root().join(gift.file_name());
        fs::copy(gift.path(), &shown)?;
        chown(&shown, Some(UID), Some(UID))?;
    }
    jail.kernel_of(&machine)
}

pub(super) fn of_the_api(context: &Context) -> Outcome {
    has_every_member()?;
    let target = Target::new(context)?;
    outside_it_is_there(context, &target)?;
    let mut wrong = Vec::new();
    let (free, config) = jail(context, &target)?;
    let jailed: Jailed = free.start()?;
    jailed.monitor.configure(&config)?;
    jailed.monitor.start_instance()?;
    jailed.monitor.console.wait_for("tick: n=3", SOON)?;
    check(&jailed.monitor, &running(), &target, &mut wrong)?;
    jailed.monitor.set_state("Paused")?;
    check(&jailed.monitor, &after(), &target, &mut wrong)?;
    let body = json!({ "snapshot_path": "/run/state", "mem_file_path": "/run/memory" });
    jailed.monitor.must("PUT", "/snapshot/create", Some(&body))?;
    for name in ["state", "memory"] {
        fs::copy(jailed.root.join("run").join(name), target.gifts.path().join(name))?;
    }
    ends(jailed)?;
    for requests in [fresh(), before()] {
        let (free, _) = jail(context, &target)?;
        let jailed: Jailed = free.start()?;
        check(&jailed.monitor, &requests, &target, &mut wrong)?;
        ends(jailed)?;
    }
    ensure!(wrong.is_empty(), "\n{}", wrong.join("\n"));
    Ok(())
}

/// The files that this test has put into the jail stay there, and go with its directory.
fn ends(mut jailed: Jailed) -> Outcome {
    jailed.monitor.signal(Signal::TERM)?;
    jailed.ends(SOON)
}

/// A monitor without a jail finds what the jailed ones must not find, as the same user.
fn outside_it_is_there(context: &Context, target: &Target) -> Outcome {
    let id = UID.to_string();
    let place = tempfile::tempdir()?;
    fs::set_permissions(place.path(), fs::Permissions::from_mode(0o755))?;
    let program = place.path().join("coracle");
    fs::copy(&context.environment.coracle, &program)?;
    let launch = Launch::new(&context.environment)?.program(&program).by_way_of([
        "setpriv",
        "--reuid",
        &id,
        "--regid",
        &id,
        "--clear-groups",
        "--",
    ]);
    chown(launch.directory(), Some(UID), Some(UID))?;
    let monitor = launch.start()?;
    for request in before() {
        let path = target.path().display().to_string();
        let is_drive = request.url == "/drives/d" && request.use_of_it == Use::Reads;
        if is_drive || request.url == "/boot-source" && request.body.get("initrd_path").is_none() {
            ensure!(
                !finds_nothing(&monitor, &request, &path)?,
                "{} finds it outside",
                request.url
            );
        }
    }
    target.is_as_it_was("outside")
}
