//! Snapshots: a guest goes on in another process where it was, from what is whole only, and beside disks that nobody has
//! written since.

use std::path::{Path, PathBuf};
use std::time::Duration;

use coracle_tests::case::{Case, Context, text};
use coracle_tests::environment::Need;
use coracle_tests::guest::{Linux, Machine, blank_image};
use coracle_tests::harness::nfs::server::{Plan, Server};
use coracle_tests::monitor::{Ended, Launch, Monitor};
use coracle_tests::seed::Seed;
use coracle_tests::{Outcome, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "a_guest_goes_on_where_it_was_with_its_memory_and_its_disk",
        need: Need::Kvm,
        run: goes_on,
    },
    Case {
        name: "linux_goes_on_in_another_process",
        need: Need::Kvm,
        run: linux_goes_on,
    },
    Case {
        name: "linux_learns_that_it_was_restored_and_seeds_its_random_numbers_anew",
        need: Need::Kvm,
        run: linux_is_told,
    },
    Case {
        name: "a_guest_and_its_disk_on_a_server_go_on_from_a_snapshot_on_it",
        need: Need::Kvm,
        run: goes_on_from_a_server,
    },
    Case {
        name: "a_disk_that_was_written_since_keeps_a_snapshot_from_being_loaded",
        need: Need::Kvm,
        run: refuses_what_was_overtaken,
    },
    Case {
        name: "no_flipped_bit_of_a_snapshot_is_seen_by_its_guest",
        need: Need::Kvm,
        run: refuses_damage,
    },
    Case {
        name: "a_monitor_killed_while_it_makes_a_snapshot_leaves_the_last_one_or_none",
        need: Need::Kvm,
        run: survives_a_kill,
    },
    Case {
        name: "a_snapshot_is_made_and_loaded_at_its_time_only",
        need: Need::Kvm,
        run: keeps_its_times,
    },
    Case {
        name: "coraclectl_saves_a_machine_describes_it_and_goes_on_with_it",
        need: Need::Kvm,
        run: coraclectl_saves_and_loads,
    },
    Case {
        name: "diffs_merge_into_what_the_guest_goes_on_from",
        need: Need::Kvm,
        run: diffs_merge,
    },
];

pub(crate) const SOON: Duration = Duration::from_secs(60);

/// Where a snapshot is.
pub(crate) struct Files {
    pub(crate) state: PathBuf,
    pub(crate) memory: PathBuf,
}

impl Files {
    pub(crate) fn in_directory(directory: &Path, name: &str) -> Self {
        Self {
            state: directory.join(format!("{name}.state")),
            memory: directory.join(format!("{name}.memory")),
        }
    }

    pub(crate) fn create(&self, kind: &str) -> Value {
        json!({ "snapshot_path": self.state, "mem_file_path": self.memory, "snapshot_type": kind })
    }

    pub(crate) fn load(&self, verify: &str) -> Value {
        json!({
            "snapshot_path": self.state,
            "mem_backend": { "backend_type": "File", "backend_path": self.memory },
            "resume_vm": true,
            "verify": verify,
        })
    }
}

/// The same JSON with another member in a part of it.
pub(crate) fn with(mut body: Value, part: &str, member: &str, value: Value) -> Value {
    if let Some(object) = body.pointer_mut(part).and_then(Value::as_object_mut) {
        object.insert(member.to_owned(), value);
    }
    body
}

pub(crate) fn started(context: &Context, config: &Value) -> Outcome<Monitor> {
    let monitor = Launch::new(&context.environment)?.start()?;
    monitor.configure(config)?;
    monitor.start_instance()?;
    Ok(monitor)
}

pub(crate) fn saved(monitor: &Monitor, files: &Files, kind: &str) -> Outcome {
    monitor.set_state("Paused")?;
    monitor.must("PUT", "/snapshot/create", Some(&files.create(kind)))?;
    Ok(())
}

pub(crate) fn killed(monitor: Monitor) -> Outcome {
    monitor.signal(Signal::KILL)?;
    monitor.wait(SOON)?;
    Ok(())
}

pub(crate) fn loaded(context: &Context, files: &Files, verify: &str) -> Outcome<Monitor> {
    let monitor = Launch::new(&context.environment)?.start()?;
    monitor.must("PUT", "/snapshot/load", Some(&files.load(verify)))?;
    Ok(monitor)
}

pub(crate) fn refused(context: &Context, files: &Files) -> Outcome<String> {
    let monitor = Launch::new(&context.environment)?.start()?;
    let answer = monitor.request("PUT", "/snapshot/load", Some(&files.load("lazy")))?;
    ensure!(
        answer.status == 400,
        "it was loaded: {} {}",
        answer.status,
        answer.body
    );
    Ok(answer.fault())
}

/// Pauses a guest at any moment of its work, saves it, kills its monitor and lets it go on in another; it checks itself what it
/// finds in its memory, on its disk and in its processors.
pub(crate) fn goes_on(context: &Context) -> Outcome {
    let mut seed = context.seed.clone();
    for cycle in 0..context.count(6, 1000) {
        one_move(context, &mut seed).map_err(|e| format!("cycle {cycle}: {}", text(&e)))?;
    }
    Ok(())
}

fn one_move(context: &Context, seed: &mut Seed) -> Outcome {
    let directory = tempfile::tempdir()?;
    let disk = directory.path().join("test-disk");
    blank_image(&disk, 16)?;
    let number = seed.below(1 << 30);
    let vcpus = 1 + u32::try_from(seed.below(2))?;
    let words = format!(
        "do=hello do=dirty:mib=8,ms=200,seed={number} do=registers:ms=200,seed={number} \
         do=pattern-write:mib=16,seed={number},bs=65536,depth=8 do=flush do=vcpus:count={vcpus},ms=100 \
         do=pattern-verify:mib=16,seed={number},bs=4096,depth=16 do=dirty:mib=16,ms=100,seed=7"
    );
    let mut config = Machine::unikernel(&context.environment, &words)
        .vcpus(vcpus)
        .memory_mib(64)
        .drive(json!({
            "drive_id": "d", "path_on_host": disk, "is_root_device": false, "is_read_only": false,
            "cache_type": "Writeback"
        }))
        .config();
    if seed.below(2) == 0 {
        config = with(config, "/machine-config", "track_dirty_pages", json!(true));
    }
    let verify = if seed.below(2) == 0 { "lazy" } else { "off" };
    let mut monitor = started(context, &config)?;
    monitor.console.wait_for("hello", SOON)?;
    let files = Files::in_directory(directory.path(), "s");
    let mut said = String::new();
    for _ in 0..=seed.below(2) {
        std::thread::sleep(Duration::from_micros(seed.below(400_000)));
        let paused = json!({ "state": "Paused" });
        if !has_done(&mut monitor, "PATCH", "/vm", &paused)?
            || !has_done(&mut monitor, "PUT", "/snapshot/create", &files.create("Full"))?
        {
            break;
        }
        said.push_str(&monitor.console.text());
        killed(monitor)?;
        monitor = loaded(context, &files, verify)?;
    }
    let ended = monitor.wait(SOON)?;
    has_worked(&ended, said, &format!("{words}, {vcpus} vCPUs, verify {verify}"))
}

/// Whether a machine has done what it was asked for; it has not if its guest was at the end of its work, and how that went is
/// told by its status.
fn has_done(monitor: &mut Monitor, method: &str, path: &str, body: &Value) -> Outcome<bool> {
    const ENDED: &str = "The microVM ended before it could answer.";
    match monitor.request(method, path, Some(body)) {
        Ok(answer) if answer.status == 204 => Ok(true),
        Ok(answer) if answer.fault() == ENDED => Ok(false),
        Ok(answer) => Err(format!("{method} {path}: {} {}", answer.status, answer.body).into()),
        Err(_) if !monitor.is_running()? => Ok(false),
        Err(error) => Err(error),
    }
}

/// The guest of a move has ended well, and of all that its processes have shown, `said` and what the last one did, nothing is
/// missing of its memory, its registers and its disk.
pub(crate) fn has_worked(ended: &Ended, said: String, how: &str) -> Outcome {
    let how = format!("{how}, before: {said}");
    ended.expect(0).map_err(|e| format!("{}: {how}", text(&e)))?;
    let all = said + &ended.console;
    ensure!(
        all.contains("pattern-verify: ok") && all.contains("registers: ok"),
        "{all}: {how}"
    );
    ensure!(all.matches("dirty: ok").count() == 2, "{all}: {how}");
    Ok(())
}

/// State, memory and disk are files of one NFS server, which restarts while the guest's memory is still being loaded.
fn goes_on_from_a_server(context: &Context) -> Outcome {
    const MIB: u64 = 16;
    let mut server = Server::start(Plan::image(MIB << 20))?;
    let number = context.seed.clone().below(1 << 30);
    let words = format!(
        "do=hello do=pattern-write:mib={MIB},seed={number} do=dirty:mib=48,ms=400,seed={number} \
         do=pattern-verify:mib={MIB},seed={number},depth=8 do=pattern-write:mib={MIB},seed=1 do=pattern-verify:mib={MIB},seed=1"
    );
    let config = Machine::unikernel(&context.environment, &words)
        .memory_mib(96)
        .disk("d", Path::new(&server.url("export/image.raw")))
        .config();
    let monitor = started(context, &config)?;
    monitor.console.wait_for("dirty: ready", SOON)?;
    let files = Files {
        state: PathBuf::from(server.url("export/s.state")),
        memory: PathBuf::from(server.url("export/s.memory")),
    };
    saved(&monitor, &files, "Full")?;
    // In good order: the server would keep the lease of one that was killed for its time.
    monitor.signal(Signal::TERM)?;
    monitor.wait(SOON)?;
    coraclectl(context, &["verify"], &[&files.state, &files.memory])?;
    let monitor = loaded(context, &files, "lazy")?;
    server.kill()?;
    server.restart()?;
    let ended = monitor.wait(SOON)?;
    ended.expect(0)?;
    ensure!(
        ended.console.matches("pattern-verify: ok").count() == 2 && ended.console.contains("dirty: ok"),
        "{}",
        ended.console
    );
    let refusal = refused(context, &files)?;
    ensure!(
        refusal.contains("it was of generation 1 then, and is of 2 now"),
        "{refusal}"
    );
    Ok(())
}

/// The records of a Linux guest go on counting, and are all on its disk.
fn linux_goes_on(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let machine =
        Linux::read(&context.environment)?.machine("smp", directory.path(), "records 1000000 4 7")?;
    let monitor = started(context, &machine.config())?;
    let limit = Duration::from_secs(240);
    monitor.console.wait_for("init: record 3\r", limit)?;
    let files = Files::in_directory(directory.path(), "s");
    saved(&monitor, &files, "Full")?;
    let before = last_record(&monitor.console.text());
    killed(monitor)?;
    let monitor = loaded(context, &files, "lazy")?;
    monitor
        .console
        .wait_for(&format!("init: record {}\r", before + 5), limit)?;
    let text = monitor.console.text();
    let expected = format!("init: record {}\r", before + 1);
    ensure!(
        text.contains(&expected),
        "it goes on after record {before}: {text}"
    );
    monitor.signal(Signal::TERM)?;
    monitor.wait(SOON)?;
    Ok(())
}

/// A kernel that finds the generation ID by ACPI says what the notification has it do, each time that it is restored.
fn linux_is_told(context: &Context) -> Outcome {
    const SAID: &str = "random: crng reseeded due to virtual machine fork";
    let directory = tempfile::tempdir()?;
    let machine = Linux::read(&context.environment)?
        .machine("acpi", directory.path(), "count 100")?
        .read_only_root()
        .part("entropy", json!({}));
    let config = machine.config();
    let arguments = config
        .pointer("/boot-source/boot_args")
        .and_then(Value::as_str)
        .ok_or("it has a command line")?;
    // Notices are shown.
    let arguments = arguments.replace("quiet", "loglevel=6");
    let monitor = started(
        context,
        &with(config, "/boot-source", "boot_args", arguments.into()),
    )?;
    let limit = Duration::from_secs(240);
    monitor.console.wait_for("crng init done", limit)?;
    monitor.console.wait_for("init: count 3\r", limit)?;
    let files = Files::in_directory(directory.path(), "s");
    saved(&monitor, &files, "Full")?;
    ensure!(
        !monitor.console.text().contains(SAID),
        "nobody has restored it yet"
    );
    killed(monitor)?;
    for verify in ["lazy", "off"] {
        let monitor = loaded(context, &files, verify)?;
        monitor.console.wait_for(SAID, limit)?;
        killed(monitor)?;
    }
    Ok(())
}

fn last_record(console: &str) -> u64 {
    let numbers = console
        .lines()
        .filter_map(|line| line.trim_end().strip_prefix("init: record ")?.parse().ok());
    numbers.max().unwrap_or(0)
}

fn ticking(context: &Context, disk: &Path) -> Value {
    Machine::unikernel(&context.environment, "do=hello do=tick:ms=20,count=100000")
        .memory_mib(32)
        .disk("d", disk)
        .config()
}

fn refuses_what_was_overtaken(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let disk = directory.path().join("test-disk");
    blank_image(&disk, 1)?;
    let files = Files::in_directory(directory.path(), "s");
    let monitor = started(context, &ticking(context, &disk))?;
    monitor.console.wait_for("tick: n=1 ", SOON)?;
    saved(&monitor, &files, "Full")?;

    // While it is there it has its disk.
    let text = refused(context, &files)?;
    ensure!(text.contains("generation 1 is held by"), "{text}");

    // A load that fails, and one that is not resumed, leave the snapshot good.
    killed(monitor)?;
    let still = Launch::new(&context.environment)?.start()?;
    let load = with(files.load("lazy"), "", "resume_vm", json!(false));
    still.must("PUT", "/snapshot/load", Some(&load))?;
    killed(still)?;

    let first = loaded(context, &files, "lazy")?;
    first.console.wait_for("tick: n=5 ", SOON)?;
    first.signal(Signal::TERM)?;
    first.wait(SOON)?;
    let text = refused(context, &files)?;
    for part in ["drive `d`", "it was of generation 1 then, and is of 2 now"] {
        ensure!(text.contains(part), "{part}: {text}");
    }

    // Resumed after its snapshot: it may have been written.
    let monitor = started(context, &ticking(context, &disk))?;
    monitor.console.wait_for("tick: n=1 ", SOON)?;
    saved(&monitor, &files, "Full")?;
    monitor.set_state("Resumed")?;
    monitor.signal(Signal::TERM)?;
    monitor.wait(SOON)?;
    let text = refused(context, &files)?;
    ensure!(
        text.contains("it was of generation 3 then, and is of 4 now"),
        "{text}"
    );
    Ok(())
}

fn refuses_damage(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let words = "do=hello do=dirty:mib=4,ms=200,seed=3 do=tick:ms=1,count=100000";
    let config = Machine::unikernel(&context.environment, words)
        .memory_mib(16)
        .config();
    let good = Files::in_directory(directory.path(), "good");
    let monitor = started(context, &config)?;
    monitor.console.wait_for("tick: n=1 ", SOON)?;
    saved(&monitor, &good, "Full")?;
    killed(monitor)?;
    let bad = Files::in_directory(directory.path(), "bad");
    let mut seed = context.seed.clone();
    for number in 0..context.count(24, 2000) {
        std::fs::copy(&good.state, &bad.state)?;
        std::fs::copy(&good.memory, &bad.memory)?;
        let is_of_state = number % 2 == 0;
        let place = flip(if is_of_state { &bad.state } else { &bad.memory }, &mut seed)?;
        let monitor = Launch::new(&context.environment)?.start()?;
        let answer = monitor.request("PUT", "/snapshot/load", Some(&bad.load("lazy")))?;
        if answer.status == 400 {
            continue;
        }
        ensure!(
            !is_of_state,
            "{place}: a damaged state was loaded: {}",
            answer.body
        );
        // Whether the guest asks for it or not, the damage is found.
        let ended = monitor.wait(SOON)?;
        ended.expect(164).map_err(|e| format!("{place}: {}", text(&e)))?;
        ensure!(
            ended.errors.contains("guest memory cannot be loaded"),
            "{place}: {}",
            ended.errors
        );
    }
    // The files that all of this was made from are good.
    loaded(context, &good, "lazy")?
        .console
        .wait_for("tick: n=", SOON)?;
    Ok(())
}

/// Flips a bit of what the file has, not of its holes.
fn flip(path: &Path, seed: &mut Seed) -> Outcome<String> {
    let mut bytes = std::fs::read(path)?;
    let pages: Vec<usize> = bytes
        .chunks(4096)
        .enumerate()
        .filter(|(_, page)| page.iter().any(|byte| *byte != 0))
        .map(|(number, _)| number)
        .collect();
    let page = *seed.pick(&pages).ok_or("the file has nothing")?;
    let len = bytes.len().min((page + 1) * 4096) - page * 4096;
    let at = page * 4096 + usize::try_from(seed.below(len as u64))?;
    let bit = seed.below(8);
    let byte = bytes.get_mut(at).ok_or("it lies within")?;
    *byte ^= 1 << bit;
    std::fs::write(path, bytes)?;
    Ok(format!("bit {bit} of byte {at} of {}", path.display()))
}

fn survives_a_kill(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let words = "do=hello do=dirty:mib=32,ms=100,seed=3 do=tick:ms=5,count=100000";
    let config = Machine::unikernel(&context.environment, words)
        .memory_mib(64)
        .config();
    let files = Files::in_directory(directory.path(), "s");
    let mut seed = context.seed.clone();
    let first = started(context, &config)?;
    first.console.wait_for("tick: n=1 ", SOON)?;
    saved(&first, &files, "Full")?;
    killed(first)?;
    let (mut loads, mut refusals) = (0, 0);
    for cycle in 0..context.count(12, 500) {
        let monitor = started(context, &config)?;
        monitor.console.wait_for("tick: n=1 ", SOON)?;
        monitor.set_state("Paused")?;
        let mut connection = monitor.connect()?;
        let body = files.create("Full").to_string();
        let head = format!(
            "PUT /snapshot/create HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        connection.send(head.as_bytes())?;
        std::thread::sleep(Duration::from_micros(seed.below(60_000)));
        killed(monitor)?;
        let monitor = Launch::new(&context.environment)?.start()?;
        let answer = monitor.request("PUT", "/snapshot/load", Some(&files.load("off")))?;
        if answer.status == 204 {
            loads += 1;
            monitor
                .console
                .wait_for("tick: n=", SOON)
                .map_err(|e| format!("cycle {cycle}: {}", text(&e)))?;
            killed(monitor)?;
            continue;
        }
        refusals += 1;
        // Between the two renames, which is told by its name.
        ensure!(
            answer.fault().contains("does not belong to this snapshot"),
            "cycle {cycle}: {}",
            answer.fault()
        );
        let again = started(context, &config)?;
        again.console.wait_for("tick: n=1 ", SOON)?;
        saved(&again, &files, "Full")?;
        killed(again)?;
    }
    ensure!(loads > 0, "{loads} loads, {refusals} refusals");
    Ok(())
}

fn keeps_its_times(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let disk = directory.path().join("test-disk");
    blank_image(&disk, 1)?;
    let files = Files::in_directory(directory.path(), "s");
    let monitor = Launch::new(&context.environment)?.start()?;
    let create = files.create("Full");
    says(
        &monitor,
        "/snapshot/create",
        &create,
        "not supported before starting the microVM",
    )?;
    monitor.configure(&ticking(context, &disk))?;
    says(
        &monitor,
        "/snapshot/load",
        &files.load("lazy"),
        "not allowed after configuring boot-specific resources",
    )?;
    monitor.start_instance()?;
    says(&monitor, "/snapshot/create", &create, "pause it first")?;
    says(
        &monitor,
        "/snapshot/load",
        &files.load("lazy"),
        "not supported after starting the microVM",
    )?;
    monitor.set_state("Paused")?;
    let beside = directory.path().join(".").join("test-disk");
    for (member, value, part) in [
        ("mem_file_path", &files.state, "are the same file"),
        ("mem_file_path", &disk, "is the image of drive `d`"),
        ("snapshot_path", &beside, "is the image of drive `d`"),
    ] {
        let create = with(create.clone(), "", member, json!(value));
        says(&monitor, "/snapshot/create", &create, part)?;
    }
    saved(&monitor, &files, "Full")?;
    killed(monitor)?;

    refuses_what_makes_no_sense(context, directory.path(), &files)
}

fn says(monitor: &Monitor, path: &str, body: &Value, part: &str) -> Outcome {
    let answer = monitor.request("PUT", path, Some(body))?;
    ensure!(
        answer.status == 400 && answer.fault().contains(part),
        "{part}: {} {}",
        answer.status,
        answer.body
    );
    Ok(())
}

fn refuses_what_makes_no_sense(context: &Context, directory: &Path, files: &Files) -> Outcome {
    let fresh = Launch::new(&context.environment)?.start()?;
    let cut = directory.join("cut.state");
    let state = std::fs::read(&files.state)?;
    std::fs::write(&cut, state.get(..1000).ok_or("a state is longer")?)?;
    for (member, value, part) in [
        ("mem_file_path", json!(files.memory), "exclusively"),
        (
            "mem_backend",
            Value::Null,
            "either `mem_backend` or `mem_file_path` is required",
        ),
        (
            "network_overrides",
            json!([{ "iface_id": "a", "host_dev_name": "t" }]),
            "network_overrides",
        ),
        ("vsock_override", json!({ "uds_path": "/v" }), "vsock_override"),
        (
            "snapshot_path",
            json!(directory.join("none")),
            "there is no state file",
        ),
        ("snapshot_path", json!(cut), "it was cut off"),
        (
            "mem_backend",
            json!({ "backend_type": "File", "backend_path": directory.join("none") }),
            "there is no memory file",
        ),
        (
            "snapshot_path",
            json!(files.memory),
            "it is no state of a machine",
        ),
    ] {
        let load = with(files.load("lazy"), "", member, value);
        says(&fresh, "/snapshot/load", &load, part)?;
    }
    // None of that has spoiled the process.
    fresh.must("PUT", "/snapshot/load", Some(&files.load("lazy")))?;
    fresh.console.wait_for("tick: n=", SOON)?;
    let config = fresh.must("GET", "/vm/config", None)?.json()?;
    let drive = config.pointer("/drives/0/drive_id");
    ensure!(drive == Some(&json!("d")), "{config}");
    Ok(())
}

fn coraclectl_saves_and_loads(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let disk = directory.path().join("test-disk");
    blank_image(&disk, 1)?;
    let words = "do=hello do=tick:ms=20,count=100 do=exit:status=7";
    let config = Machine::unikernel(&context.environment, words)
        .memory_mib(32)
        .disk("d", &disk)
        .config();
    let monitor = started(context, &config)?;
    monitor.console.wait_for("tick: n=1 ", SOON)?;
    let files = Files::in_directory(directory.path(), "s");
    let socket = monitor.socket();
    let create = |flags: &[&str]| {
        let verb = [&["create"], flags].concat();
        coraclectl(context, &verb, &[&socket, &files.state, &files.memory])
    };
    ensure!(create(&[])?.contains("runs on"), "it was running");
    monitor.console.wait_for("tick: n=3 ", SOON)?;
    ensure!(create(&["--stay-paused"])?.contains("is paused"), "it stays so");
    let info = coraclectl(context, &["info"], &[&files.state])?;
    for part in [
        "kind           full",
        "mem size mib   32",
        r#""drive_id":"d","generation":2"#,
    ] {
        ensure!(info.contains(part), "{part}: {info}");
    }
    killed(monitor)?;
    let done = std::process::Command::new(&context.environment.coraclectl)
        .args(["snapshot", "load"])
        .args([&files.state, &files.memory])
        .arg("--monitor")
        .arg(&context.environment.coracle)
        .env("XDG_RUNTIME_DIR", directory.path())
        .stdin(std::process::Stdio::null())
        .output()?;
    let (out, errors) = (
        String::from_utf8_lossy(&done.stdout),
        String::from_utf8_lossy(&done.stderr),
    );
    ensure!(done.status.code() == Some(7), "{:?}: {out} {errors}", done.status);
    ensure!(out.contains("tick: n=99"), "{out}");
    Ok(())
}

/// A guest writes memory all the while; its full snapshot and the diffs that follow are merged, and it goes on from what comes
/// of it.
pub(crate) fn diffs_merge(context: &Context) -> Outcome {
    let mut seed = context.seed.clone();
    for cycle in 0..context.count(2, 100) {
        one_chain(context, &mut seed).map_err(|e| format!("cycle {cycle}: {}", text(&e)))?;
    }
    Ok(())
}

fn one_chain(context: &Context, seed: &mut Seed) -> Outcome {
    const DIFFS: usize = 5;
    let directory = tempfile::tempdir()?;
    let disk = directory.path().join("test-disk");
    blank_image(&disk, 16)?;
    let number = seed.below(1 << 30);
    // Memory that the guest writes, and memory that its disk writes.
    let words = format!(
        "do=hello do=pattern-write:mib=16,seed={number} do=dirty:mib=8,ms=900,seed={number} \
         do=pattern-verify:mib=16,seed={number},depth=16 do=dirty:mib=24,ms=300,seed={number} \
         do=pattern-verify:mib=16,seed={number}"
    );
    let config = Machine::unikernel(&context.environment, &words)
        .memory_mib(64)
        .disk("d", &disk)
        .config();
    let config = with(config, "/machine-config", "track_dirty_pages", json!(true));
    let monitor = started(context, &config)?;
    monitor.console.wait_for("pattern-write: ok", SOON)?;
    let part = |number: usize| Files::in_directory(directory.path(), &format!("part{number}"));
    saved(&monitor, &part(0), "Full")?;
    for number in 1..=DIFFS {
        monitor.set_state("Resumed")?;
        std::thread::sleep(Duration::from_micros(seed.below(250_000)));
        saved(&monitor, &part(number), "Diff")?;
    }
    let said = monitor.console.text();
    killed(monitor)?;
    // A diff alone is none to go on from.
    let refusal = refused(context, &part(DIFFS))?;
    ensure!(refusal.contains("is a diff"), "{refusal}");
    let mut merged = part(0);
    for number in 1..=DIFFS {
        let next = Files::in_directory(directory.path(), &format!("merged{number}"));
        coraclectl(
            context,
            &["merge"],
            &[
                &merged.state,
                &merged.memory,
                &part(number).state,
                &part(number).memory,
                &next.state,
                &next.memory,
            ],
        )?;
        merged = next;
    }
    coraclectl(context, &["verify"], &[&merged.state, &merged.memory])?;
    refuses_a_part(context, &merged, part(DIFFS))?;
    let ended = loaded(context, &merged, "lazy")?.wait(SOON)?;
    ended
        .expect(0)
        .map_err(|e| format!("{}: {words}, before: {said}", text(&e)))?;
    let all = said + &ended.console;
    ensure!(
        all.matches("pattern-verify: ok").count() == 2 && all.matches("dirty: ok").count() == 2,
        "{all}"
    );
    Ok(())
}

/// The last diff and what it was merged into are one memory, and only the one file has all of it; also where nothing is checked.
fn refuses_a_part(context: &Context, merged: &Files, diff: Files) -> Outcome {
    let mixed = Files {
        state: merged.state.clone(),
        memory: diff.memory,
    };
    let monitor = Launch::new(&context.environment)?.start()?;
    says(
        &monitor,
        "/snapshot/load",
        &mixed.load("off"),
        "it is the memory of a diff",
    )
}

pub(crate) fn coraclectl(context: &Context, verb: &[&str], paths: &[&PathBuf]) -> Outcome<String> {
    let done = std::process::Command::new(&context.environment.coraclectl)
        .arg("snapshot")
        .args(verb)
        .args(paths)
        .output()?;
    let (out, errors) = (
        String::from_utf8_lossy(&done.stdout),
        String::from_utf8_lossy(&done.stderr),
    );
    ensure!(done.status.success(), "{verb:?}: {errors}");
    Ok(out.into_owned())
}
