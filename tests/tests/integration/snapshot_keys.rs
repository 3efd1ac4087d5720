//! Snapshots that are signed and encrypted: a guest goes on from what its own keys have made, and from nothing else.

use std::path::{Path, PathBuf};
use std::time::Duration;

use coracle_tests::case::{Case, Context, text};
use coracle_tests::environment::Need;
use coracle_tests::guest::Machine;
use coracle_tests::monitor::{Launch, Monitor};
use coracle_tests::seed::Seed;
use coracle_tests::{Outcome, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "a_signed_and_encrypted_guest_goes_on_by_pager_and_as_a_whole",
        need: Need::KvmAndMountNamespace,
        run: goes_on,
    },
    Case {
        name: "only_what_a_trusted_key_has_signed_is_loaded",
        need: Need::Kvm,
        run: refuses_others,
    },
    Case {
        name: "no_change_of_a_signed_or_encrypted_snapshot_is_seen_by_its_guest",
        need: Need::Kvm,
        run: refuses_changes,
    },
    Case {
        name: "coraclectl_signs_encrypts_merges_and_checks_snapshots",
        need: Need::Kvm,
        run: coraclectl_keeps_keys,
    },
];

const SOON: Duration = Duration::from_secs(60);

/// Two signers, as openssl has made them, each with its public half.
const ALICE: [&str; 2] = [
    "MC4CAQAwBQYDK2VwBCIEIFF7UUjlXdKfq1awAJ81hdFPXh5N9srvwTE7OgpXgJaz",
    "MCowBQYDK2VwAyEA/7dWB5Ge7x3C7GM5gdyvfCY41zw30HgRmhml/aNCc1M=",
];
const MALLORY: [&str; 2] = [
    "MC4CAQAwBQYDK2VwBCIEIBmEg0Xo+3lTaKHmWZ5u4R7QuUjvYqZXqs3qpRJrHOE4",
    "MCowBQYDK2VwAyEAz83fwFEckkYg/CWk9a0Fb/eTf7gwPYcaZg+J8jtW/4U=",
];

/// A directory with keys, and with what is made by them.
struct Desk {
    directory: tempfile::TempDir,
}

impl Desk {
    fn new() -> Outcome<Self> {
        let desk = Self {
            directory: tempfile::tempdir()?,
        };
        for (name, [private, public]) in [("alice", ALICE), ("mallory", MALLORY)] {
            let block =
                |kind: &str, text: &str| format!("-----BEGIN {kind}-----\n{text}\n-----END {kind}-----\n");
            std::fs::write(desk.path(&format!("{name}.key")), block("PRIVATE KEY", private))?;
            std::fs::write(desk.path(&format!("{name}.pub")), block("PUBLIC KEY", public))?;
        }
        std::fs::write(desk.path("secret"), "0123456789abcdef".repeat(4) + "\n")?;
        std::fs::write(desk.path("other-secret"), [7; 32])?;
        Ok(desk)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn create(&self, name: &str, kind: &str) -> Value {
        json!({
            "snapshot_path": self.path(&format!("{name}.state")),
            "mem_file_path": self.path(&format!("{name}.memory")),
            "snapshot_type": kind,
        })
    }

    fn load(&self, name: &str) -> Value {
        json!({
            "snapshot_path": self.path(&format!("{name}.state")),
            "mem_backend": { "backend_type": "File", "backend_path": self.path(&format!("{name}.memory")) },
            "resume_vm": true,
        })
    }

    fn file(&self, name: &str) -> Value {
        json!({ "file": self.path(name) })
    }
}

/// The same JSON with other members.
fn with<const N: usize>(mut body: Value, members: [(&str, Value); N]) -> Value {
    if let Some(object) = body.as_object_mut() {
        object.extend(members.map(|(name, value)| (name.to_owned(), value)));
    }
    body
}

fn config(context: &Context, words: &str) -> Value {
    Machine::unikernel(&context.environment, words)
        .memory_mib(64)
        .config()
}

fn started(launch: Launch, config: &Value) -> Outcome<Monitor> {
    let monitor = launch.start()?;
    monitor.configure(config)?;
    monitor.start_instance()?;
    Ok(monitor)
}

fn killed(monitor: Monitor) -> Outcome {
    monitor.signal(Signal::KILL)?;
    monitor.wait(SOON)?;
    Ok(())
}

fn says(monitor: &Monitor, path: &str, body: &Value, part: &str) -> Outcome {
    let answer = monitor.request("PUT", path, Some(body))?;
    ensure!(
        answer.status == 400 && answer.fault().contains(part),
        "{part}: {body}: {} {}",
        answer.status,
        answer.body
    );
    Ok(())
}

/// The key is behind a descriptor once and in a file then; the guest checks its own memory and registers.
fn goes_on(context: &Context) -> Outcome {
    let desk = Desk::new()?;
    let number = context.seed.clone().below(1 << 30);
    let words = format!(
        "do=hello do=dirty:mib=8,ms=50,seed={number} do=registers:ms=1000,seed={number} do=dirty:mib=24,ms=50,seed=7"
    );
    let secret = desk.path("secret");
    let inherits = format!("exec 9<'{}' && exec \"$@\"", secret.display());
    let launch = Launch::new(&context.environment)?.by_way_of(["sh", "-c", &inherits, "sh"]);
    let monitor = started(launch, &config(context, &words))?;
    monitor.console.wait_for("registers: ready", SOON)?;
    monitor.set_state("Paused")?;
    let keys = [
        ("signing_key", desk.file("alice.key")),
        ("encryption_key", json!({ "fd": 9 })),
    ];
    let create = with(desk.create("s", "Full"), keys);
    monitor.must("PUT", "/snapshot/create", Some(&create))?;
    let said = monitor.console.text();
    killed(monitor)?;
    let state = std::fs::read(desk.path("s.state"))?;
    let says = |part: &str| state.windows(part.len()).any(|bytes| bytes == part.as_bytes());
    ensure!(
        says("signature") && says("memory"),
        "the names of sections are told"
    );
    ensure!(!says("boot-source"), "the configuration can be read");

    let load = with(
        desk.load("s"),
        [
            ("trusted_keys", json!(desk.path("alice.pub"))),
            ("encryption_key", desk.file("secret")),
        ],
    );
    let refuses = context
        .environment
        .after_mounting("mount --bind /dev/null /dev/userfaultfd");
    for (before, is_whole) in [(&[][..], false), (&refuses[..], true)] {
        let launch = Launch::new(&context.environment)?.by_way_of(before.iter().map(String::as_str));
        let monitor = launch.start()?;
        monitor.must("PUT", "/snapshot/load", Some(&load))?;
        let log = monitor.log()?;
        ensure!(
            log.contains("guest memory is loaded as a whole") == is_whole,
            "{log}"
        );
        let ended = monitor.wait(SOON)?;
        ended.expect(0)?;
        let all = said.clone() + &ended.console;
        ensure!(
            all.contains("registers: ok") && all.matches("dirty: ok").count() == 2,
            "{all}"
        );
    }
    Ok(())
}

/// A guest that is saved as each of these says, in the order of the names.
fn saved(context: &Context, desk: &Desk, snapshots: &[(&str, Value)]) -> Outcome {
    let words = "do=hello do=dirty:mib=4,ms=20,seed=3 do=tick:ms=1,count=100000";
    let monitor = started(Launch::new(&context.environment)?, &config(context, words))?;
    monitor.console.wait_for("tick: n=1 ", SOON)?;
    monitor.set_state("Paused")?;
    for (name, keys) in snapshots {
        let mut create = desk.create(name, "Full");
        if let (Some(create), Some(keys)) = (create.as_object_mut(), keys.as_object()) {
            create.extend(keys.clone());
        }
        monitor.must("PUT", "/snapshot/create", Some(&create))?;
    }
    killed(monitor)
}

fn refuses_others(context: &Context) -> Outcome {
    let desk = Desk::new()?;
    let (alice, secret) = (desk.file("alice.key"), desk.file("secret"));
    saved(
        context,
        &desk,
        &[
            ("plain", json!({})),
            ("signed", json!({ "signing_key": alice })),
            ("both", json!({ "signing_key": alice, "encryption_key": secret })),
            ("more", json!({ "signing_key": alice, "encryption_key": secret })),
        ],
    )?;
    let trusted = |name: &str| ("trusted_keys", json!(desk.path(name)));
    let key = |name: &str| ("encryption_key", desk.file(name));
    let off = || ("verify", json!("off"));
    let uffd = || {
        (
            "mem_backend",
            json!({ "backend_type": "Uffd", "backend_path": "/nowhere" }),
        )
    };
    let other_memory = json!({ "backend_type": "File", "backend_path": desk.path("more.memory") });

    let monitor = Launch::new(&context.environment)?.start()?;
    let load = |name| desk.load(name);
    for (body, part) in [
        (with(load("plain"), [trusted("alice.pub")]), "it is not signed"),
        (with(load("signed"), [trusted("mallory.pub")]), "is no key in"),
        (
            with(load("signed"), [trusted("alice.pub"), off()]),
            "only what a key in",
        ),
        (
            with(load("signed"), [trusted("alice.pub"), uffd()]),
            "only what a key in",
        ),
        (
            with(load("signed"), [trusted("alice.key")]),
            "a PRIVATE KEY in it",
        ),
        (
            with(load("signed"), [trusted("nowhere")]),
            "cannot read the trusted keys",
        ),
        (with(load("plain"), [key("secret")]), "it is not encrypted"),
        (load("both"), "say where its key is"),
        (
            with(load("both"), [key("other-secret")]),
            "encrypted with another key",
        ),
        (with(load("both"), [key("alice.pub")]), "64 hexadecimal digits"),
        (
            with(load("both"), [key("secret"), off()]),
            "decrypted as it is checked",
        ),
        (
            with(load("both"), [key("secret"), ("mem_backend", other_memory)]),
            "take the two files of one snapshot",
        ),
    ] {
        says(&monitor, "/snapshot/load", &body, part)?;
    }
    // Nothing of that was loaded, and what is right is.
    let body = with(load("both"), [trusted("alice.pub"), key("secret")]);
    monitor.must("PUT", "/snapshot/load", Some(&body))?;
    monitor.console.wait_for("tick: n=", SOON)?;
    killed(monitor)?;
    the_command_line_demands_a_signature_too(context, &desk)
}

fn the_command_line_demands_a_signature_too(context: &Context, desk: &Desk) -> Outcome {
    let list = desk.path("alice.pub").to_string_lossy().into_owned();
    let monitor = Launch::new(&context.environment)?
        .arguments(["--trusted-keys", &list])
        .start()?;
    says(
        &monitor,
        "/snapshot/load",
        &desk.load("plain"),
        "it is not signed",
    )?;
    let off = with(desk.load("signed"), [("verify", json!("off"))]);
    says(&monitor, "/snapshot/load", &off, "only what a key in")?;
    let wider = with(
        desk.load("signed"),
        [("trusted_keys", json!(desk.path("mallory.pub")))],
    );
    says(&monitor, "/snapshot/load", &wider, "is no key in")?;
    monitor.must("PUT", "/snapshot/load", Some(&desk.load("signed")))?;
    monitor.console.wait_for("tick: n=", SOON)?;
    killed(monitor)?;
    let nobody = Launch::new(&context.environment)?.arguments(["--trusted-keys", "/nowhere"]);
    let ended = nobody.spawn()?.wait(SOON)?;
    ensure!(
        ended.status.code() == Some(152) && ended.errors.contains("cannot read the trusted keys"),
        "{:?}: {}",
        ended.status,
        ended.errors
    );
    Ok(())
}

fn refuses_changes(context: &Context) -> Outcome {
    let desk = Desk::new()?;
    let (alice, secret) = (desk.file("alice.key"), desk.file("secret"));
    saved(
        context,
        &desk,
        &[
            ("signed", json!({ "signing_key": alice })),
            ("secret", json!({ "encryption_key": secret })),
            ("both", json!({ "signing_key": alice, "encryption_key": secret })),
        ],
    )?;
    let mut seed = context.seed.clone();
    let names = ["signed", "secret", "both"].into_iter().cycle();
    for (number, name) in (0..context.count(18, 1000)).zip(names) {
        let is_of_state = number % 2 == 0;
        for part in ["state", "memory"] {
            std::fs::copy(
                desk.path(&format!("{name}.{part}")),
                desk.path(&format!("bad.{part}")),
            )?;
        }
        let victim = desk.path(if is_of_state { "bad.state" } else { "bad.memory" });
        let place = changed(&victim, &mut seed)?;
        let mut load = desk.load("bad");
        if name != "secret" {
            load = with(load, [("trusted_keys", json!(desk.path("alice.pub")))]);
        }
        if name != "signed" {
            load = with(load, [("encryption_key", desk.file("secret"))]);
        }
        let monitor = Launch::new(&context.environment)?.start()?;
        let answer = monitor.request("PUT", "/snapshot/load", Some(&load))?;
        if answer.status == 400 {
            continue;
        }
        ensure!(!is_of_state, "{name}, {place}: loaded: {}", answer.body);
        let ended = monitor.wait(SOON)?;
        ended
            .expect(164)
            .map_err(|e| format!("{name}, {place}: {}", text(&e)))?;
    }
    Ok(())
}

/// Flips a bit of what the file has, cuts it short, or puts one of its pages in the place of another.
fn changed(path: &Path, seed: &mut Seed) -> Outcome<String> {
    let mut bytes = std::fs::read(path)?;
    let pages: Vec<usize> = (0..bytes.len() / 4096)
        .filter(|page| {
            bytes
                .chunks(4096)
                .nth(*page)
                .is_some_and(|page| page.iter().any(|byte| *byte != 0))
        })
        .collect();
    let before = bytes.clone();
    let what = seed.below(4);
    let page = 4096 * *seed.pick(&pages).ok_or("the file has no whole page")?;
    let mut place = String::new();
    if what == 0 {
        let len = page + usize::try_from(seed.below(4096))?;
        bytes.truncate(len);
        place = format!("cut to {len}");
    } else if what == 1 {
        let other = 4096 * *seed.pick(&pages).ok_or("the file has no whole page")?;
        bytes.copy_within(other..other + 4096, page);
        place = format!("{page} is that of {other}");
    }
    // Two pages may be the same.
    if bytes == before {
        let (at, bit) = (page + usize::try_from(seed.below(4096))?, seed.below(8));
        *bytes.get_mut(at).ok_or("it lies within")? ^= 1 << bit;
        place = format!("bit {bit} of byte {at}");
    }
    std::fs::write(path, bytes)?;
    Ok(format!("{}: {place}", path.display()))
}

/// Runs `coraclectl snapshot` with these words; of each that has an `@` before it the path on the desk.
fn coraclectl(context: &Context, desk: &Desk, words: &str) -> Outcome<Result<String, String>> {
    let words = words.split_whitespace().map(|word| match word.strip_prefix('@') {
        Some(name) => desk.path(name).into_os_string(),
        None => word.into(),
    });
    let done = std::process::Command::new(&context.environment.coraclectl)
        .arg("snapshot")
        .args(words)
        .env("XDG_RUNTIME_DIR", desk.directory.path())
        .stdin(std::process::Stdio::null())
        .output()?;
    let [out, errors] = [done.stdout, done.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    Ok(if done.status.success() {
        Ok(out)
    } else {
        Err(errors)
    })
}

fn coraclectl_keeps_keys(context: &Context) -> Outcome {
    let desk = Desk::new()?;
    let words = "do=hello do=tick:ms=20,count=60 do=dirty:mib=8,ms=50,seed=5";
    let mut config = config(context, words);
    if let Some(machine) = config.pointer_mut("/machine-config") {
        *machine = with(machine.take(), [("track_dirty_pages", json!(true))]);
    }
    let monitor = started(Launch::new(&context.environment)?, &config)?;
    monitor.console.wait_for("tick: n=1 ", SOON)?;
    let socket = monitor.socket().to_string_lossy().into_owned();
    let ok = |words: &str| -> Outcome<String> {
        let done = coraclectl(context, &desk, words)?;
        done.map_err(|errors| format!("{words}: {errors}").into())
    };
    let refused = |words: &str, part: &str| -> Outcome {
        let errors = coraclectl(context, &desk, words)?.err().unwrap_or_default();
        ensure!(errors.contains(part), "{words}: {part}: {errors}");
        Ok(())
    };
    let keys = "--signing-key @alice.key --encryption-key @secret";
    ok(&format!("create {socket} @a.state @a.memory {keys}"))?;
    monitor.console.wait_for("tick: n=3 ", SOON)?;
    ok(&format!(
        "create {socket} @b.state @b.memory {keys} --diff --stay-paused"
    ))?;
    killed(monitor)?;

    let keys = "--trusted-keys @alice.pub --encryption-key @secret";
    let info = ok(&format!("info @b.state {keys}"))?;
    for part in ["AES-256-GCM and BLAKE3", ALICE[1], "kind           diff"] {
        ensure!(info.contains(part), "{part}: {info}");
    }
    refused("info @b.state", "say where its key is")?;
    let merge = "merge @a.state @a.memory @b.state @b.memory @m.state @m.memory";
    refused(&format!("{merge} {keys}"), "say who signs it")?;
    ensure!(!desk.path("m.state").exists(), "it was refused");
    ok(&format!("{merge} {keys} --signing-key @alice.key"))?;
    let verified = ok(&format!("verify @m.state @m.memory {keys}"))?;
    ensure!(verified.contains(ALICE[1]), "{verified}");
    refused(
        "verify @m.state @m.memory --trusted-keys @mallory.pub",
        "is no key in",
    )?;
    refused(
        "verify @m.state @m.memory --encryption-key @other-secret",
        "encrypted with another key",
    )?;
    refused(
        &format!("verify @m.state @a.memory {keys}"),
        "take the two files of one snapshot",
    )?;
    let done = std::process::Command::new(&context.environment.coraclectl)
        .args(["clone", "--count", "1"])
        .args([desk.path("m.state"), desk.path("m.memory")])
        .env("XDG_RUNTIME_DIR", desk.directory.path())
        .output()?;
    let errors = String::from_utf8_lossy(&done.stderr);
    ensure!(errors.contains("save it again without"), "{errors}");
    let monitor = context.environment.coracle.display();
    let said = ok(&format!("load @m.state @m.memory {keys} --monitor {monitor}"))?;
    ensure!(
        said.contains("tick: n=59") && said.contains("dirty: ok"),
        "{said}"
    );
    Ok(())
}
