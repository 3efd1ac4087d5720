//! The disks of snapshots: left as they are under overlays, or saved with the rest in a directory.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use coracle_tests::case::{Case, Context, text};
use coracle_tests::environment::Need;
use coracle_tests::guest::{Machine, blank_image};
use coracle_tests::monitor::{Launch, Monitor};
use coracle_tests::{Outcome, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "clones_of_one_disk_see_their_own_writes_only_and_the_disk_stays_as_it_was",
        need: Need::Kvm,
        run: clones_go_on_apart,
    },
    Case {
        name: "a_snapshot_that_was_overtaken_goes_on_detached_only_and_leaves_its_disk_alone",
        need: Need::Kvm,
        run: goes_on_detached,
    },
    Case {
        name: "a_snapshot_with_its_overlays_goes_on_any_number_of_times",
        need: Need::Kvm,
        run: goes_on_with_its_overlays,
    },
    Case {
        name: "a_kept_overlay_goes_on_itself_or_as_it_was_saved",
        need: Need::Kvm,
        run: goes_on_from_a_kept_overlay,
    },
    Case {
        name: "a_flipped_bit_of_an_overlay_in_a_snapshot_is_found_and_named",
        need: Need::Kvm,
        run: names_damage,
    },
    Case {
        name: "a_monitor_killed_while_it_saves_disks_leaves_the_last_snapshot_or_the_next",
        need: Need::Kvm,
        run: survives_a_kill,
    },
    Case {
        name: "a_detached_load_says_where_disks_are_now_or_which_others_there_are",
        need: Need::Kvm,
        run: goes_on_elsewhere,
    },
    Case {
        name: "a_snapshot_that_cannot_include_its_disks_is_refused_with_the_remedy",
        need: Need::Kvm,
        run: refuses_what_cannot_be_included,
    },
];

const SOON: Duration = Duration::from_secs(60);
const MIB: u64 = 4;

/// Writes, waits, checks, writes, waits, writes, waits, checks, and ends.
fn words() -> String {
    let pattern = |verb: &str, seed: u32| format!("do=pattern-{verb}:mib={MIB},seed={seed}");
    let wait = "do=tick:ms=20,count=30".to_owned();
    let all = [
        "do=hello".to_owned(),
        pattern("write", 1),
        "do=flush".to_owned(),
        wait.clone(),
        pattern("verify", 1),
        pattern("write", 2),
        wait.clone(),
        pattern("write", 3),
        wait,
        pattern("verify", 3),
    ];
    all.join(" ")
}

fn machine(context: &Context, drive: Value) -> Value {
    Machine::unikernel(&context.environment, &words())
        .memory_mib(32)
        .drive(drive)
        .config()
}

fn disk(path: &Path) -> Value {
    json!({
        "drive_id": "d", "path_on_host": path, "is_root_device": false, "is_read_only": false, "cache_type": "Writeback"
    })
}

fn overlay(base: &Path, path: &str, keep: bool) -> Value {
    json!({
        "drive_id": "d", "is_root_device": false, "cache_type": "Writeback",
        "overlay": { "base": base, "path": path, "keep": keep }
    })
}

/// A snapshot: a state and a memory beside each other, or a directory of both.
struct Place {
    directory: PathBuf,
    is_one: bool,
}

impl Place {
    fn state(&self) -> PathBuf {
        if self.is_one {
            self.directory.clone()
        } else {
            self.directory.join("state")
        }
    }

    fn create(&self) -> Value {
        let mut body =
            json!({ "snapshot_path": self.state(), "mem_file_path": self.directory.join("memory") });
        if self.is_one {
            put(&mut body, "include_disks", json!(true));
        }
        body
    }

    fn load(&self, disks: Option<&str>) -> Value {
        let mut body = json!({
            "snapshot_path": self.state(),
            "mem_backend": { "backend_type": "File", "backend_path": self.directory.join("memory") },
            "resume_vm": true,
        });
        if let Some(disks) = disks {
            put(&mut body, "disks", json!(disks));
        }
        body
    }
}

fn put(body: &mut Value, member: &str, value: Value) {
    if let Some(object) = body.as_object_mut() {
        object.insert(member.to_owned(), value);
    }
}

fn started(context: &Context, config: &Value) -> Outcome<Monitor> {
    let monitor = Launch::new(&context.environment)?.start()?;
    monitor.configure(config)?;
    monitor.start_instance()?;
    Ok(monitor)
}

/// A machine of `drive`, saved after it has written its first pattern; paused.
fn saved(context: &Context, drive: Value, place: &Place) -> Outcome<Monitor> {
    let monitor = started(context, &machine(context, drive))?;
    monitor.console.wait_for("tick: n=1 ", SOON)?;
    monitor.set_state("Paused")?;
    monitor.must("PUT", "/snapshot/create", Some(&place.create()))?;
    Ok(monitor)
}

fn loaded(context: &Context, load: &Value) -> Outcome<Monitor> {
    let monitor = Launch::new(&context.environment)?.start()?;
    monitor.must("PUT", "/snapshot/load", Some(load))?;
    Ok(monitor)
}

fn refused(context: &Context, load: &Value, part: &str) -> Outcome<String> {
    let monitor = Launch::new(&context.environment)?.start()?;
    let answer = monitor.request("PUT", "/snapshot/load", Some(load))?;
    ensure!(
        answer.status == 400 && answer.fault().contains(part),
        "{part}: {} {}",
        answer.status,
        answer.body
    );
    Ok(answer.fault())
}

fn killed(monitor: Monitor) -> Outcome {
    monitor.signal(Signal::KILL)?;
    monitor.wait(SOON)?;
    Ok(())
}

/// Waits until the guest has written so many patterns in this monitor.
fn has_written(monitor: &Monitor, count: usize) -> Outcome {
    monitor.console.wait_until("patterns", SOON, |console| {
        (console.matches("pattern-write: ok").count() >= count).then_some(())
    })
}

/// The guest finds what it has written, and ends well.
fn ends_well(monitor: Monitor) -> Outcome {
    let ended = monitor.wait(SOON)?;
    ended.expect(0)?;
    let found = ended.console.matches("pattern-verify: ok").count();
    ensure!(found == 2, "{}", ended.console);
    Ok(())
}

fn clones_go_on_apart(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("test-disk");
    blank_image(&path, MIB)?;
    let place = Place {
        directory: directory.path().to_owned(),
        is_one: false,
    };
    let first = saved(context, disk(&path), &place)?;
    // Whoever writes it shares it with nobody.
    for disks in ["Clone", "Detached"] {
        refused(context, &place.load(Some(disks)), "generation 1 is held by")?;
    }
    killed(first)?;
    let content = fs::read(&path)?;

    let mut on_disk = place.load(Some("Clone"));
    put(&mut on_disk, "overlay_directory", json!(directory.path()));
    let one = loaded(context, &place.load(Some("Clone")))?;
    let two = loaded(context, &on_disk)?;
    has_written(&one, 2)?;
    one.set_state("Paused")?;
    // It finds the first pattern, not the third of the other; and the other not its second.
    has_written(&two, 1)?;
    two.set_state("Paused")?;
    refused(context, &place.load(None), "cannot lease")?;
    one.set_state("Resumed")?;
    ends_well(one)?;
    two.set_state("Resumed")?;
    ends_well(two)?;
    ensure!(fs::read(&path)? == content, "a clone has written the disk");
    let names: Vec<_> = fs::read_dir(directory.path())?.collect::<Result<_, _>>()?;
    let names = names
        .iter()
        .map(|entry| entry.file_name().to_string_lossy().into_owned());
    let left: Vec<_> = names.filter(|name| name.contains("overlay")).collect();
    ensure!(left.is_empty(), "{left:?}");

    // They have left the snapshot as good as it was; whoever writes the disk itself has not.
    ends_well(loaded(context, &place.load(None))?)?;
    let part = "it was of generation 1 then, and is of 2 now";
    refused(context, &place.load(None), part)?;
    let refusal = refused(context, &place.load(Some("Clone")), part)?;
    ensure!(refusal.contains("drive `d`"), "{refusal}");
    Ok(())
}

fn coraclectl(context: &Context, directory: &Path, arguments: &[&str]) -> Outcome<Output> {
    let mut command = Command::new(&context.environment.coraclectl);
    command.arg("snapshot").args(arguments);
    if arguments.first() == Some(&"load") {
        command.arg("--monitor").arg(&context.environment.coracle);
    }
    Ok(command
        .env("XDG_RUNTIME_DIR", directory)
        .stdin(Stdio::null())
        .output()?)
}

/// Of a snapshot in two files.
fn load_by_coraclectl(context: &Context, place: &Place, flags: &[&str]) -> Outcome<Output> {
    let (state, memory) = (place.state(), place.directory.join("memory"));
    let (state, memory) = (state.to_string_lossy(), memory.to_string_lossy());
    let words = [&["load", &*state, &*memory], flags].concat();
    coraclectl(context, &place.directory, &words)
}

fn said(output: &Output) -> String {
    let (out, errors) = (&output.stdout, &output.stderr);
    format!(
        "{}{}",
        String::from_utf8_lossy(out),
        String::from_utf8_lossy(errors)
    )
}

fn goes_on_detached(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("test-disk");
    blank_image(&path, MIB)?;
    let place = Place {
        directory: directory.path().to_owned(),
        is_one: false,
    };
    // Saved, resumed, written, stopped.
    let first = saved(context, disk(&path), &place)?;
    first.set_state("Resumed")?;
    ends_well(first)?;
    let content = fs::read(&path)?;
    refused(
        context,
        &place.load(None),
        "it was of generation 1 then, and is of 2 now",
    )?;
    // Its guest finds on the disk what was written since: whoever asked for that was told so.
    let detached = loaded(context, &place.load(Some("Detached")))?;
    let ended = detached.wait(SOON)?;
    ensure!(!ended.console.contains("pattern-verify: ok"), "{}", ended.console);
    ensure!(fs::read(&path)? == content, "the disk was written");

    // Restored twice in turn: the second is refused, and goes on detached.
    let again = saved(context, disk(&path), &place)?;
    killed(again)?;
    let restored = loaded(context, &place.load(None))?;
    restored.console.wait_for("tick: n=2 ", SOON)?;
    killed(restored)?;
    refused(
        context,
        &place.load(None),
        "it was of generation 3 then, and is of 4 now",
    )?;
    let content = fs::read(&path)?;
    let load = |flag| load_by_coraclectl(context, &place, &[flag]);
    let cloned = load("--clone")?;
    ensure!(
        !cloned.status.success() && said(&cloned).contains("generation 3"),
        "{}",
        said(&cloned)
    );
    // Nothing was written since but by nobody: the disk is what it was.
    let detached = load("--detached")?;
    ensure!(
        detached.status.success() && said(&detached).matches("pattern-verify: ok").count() == 2,
        "{}",
        said(&detached)
    );
    ensure!(
        fs::read(&path)? == content,
        "the detached machine has written the disk"
    );
    Ok(())
}

fn goes_on_elsewhere(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("test-disk");
    blank_image(&path, MIB)?;
    let place = Place {
        directory: directory.path().to_owned(),
        is_one: false,
    };
    killed(saved(context, disk(&path), &place)?)?;
    // The disk goes elsewhere, with the records of its lease.
    let elsewhere = directory.path().join("elsewhere");
    fs::create_dir(&elsewhere)?;
    for entry in fs::read_dir(directory.path())? {
        let name = entry?.file_name();
        if name.to_string_lossy().starts_with("test-disk") {
            fs::rename(directory.path().join(&name), elsewhere.join(&name))?;
        }
    }
    let at = |id, path: &Path, disks| other_disk(&place, id, path, disks);
    let moved = elsewhere.join("test-disk");
    refused(context, &place.load(None), "there is no image")?;
    // Nothing tells it from another one that was written as often, so whoever knows has to say so.
    for disks in ["Continue", "Clone"] {
        let part = "set `disks` to `Detached` if you know";
        refused(context, &at("d", &moved, disks), part)?;
    }
    let part = "drive_overrides names drive `x`, which the machine does not have";
    refused(context, &at("x", &moved, "Detached"), part)?;
    ends_well(loaded(context, &at("d", &moved, "Detached"))?)?;
    if context.environment.jailing.is_none() {
        let disk = format!("d={}", moved.display());
        let loaded = load_by_coraclectl(context, &place, &["--detached", "--disk", &disk])?;
        ensure!(
            loaded.status.success() && said(&loaded).matches("pattern-verify: ok").count() == 2,
            "{}",
            said(&loaded)
        );
    } else {
        println!("not in a jail: the load by coraclectl, which starts the monitor itself");
    }

    begins_with_another(context, &place, &moved)
}

fn other_disk(place: &Place, id: &str, path: &Path, disks: &str) -> Value {
    let mut load = place.load(Some(disks));
    let others = json!([{ "drive_id": id, "path_on_host": path }]);
    put(&mut load, "drive_overrides", others);
    load
}

/// A guest finds the size of another image, and not what it has written.
fn begins_with_another(context: &Context, place: &Place, first: &Path) -> Outcome {
    let other = first.with_file_name("test-other");
    blank_image(&other, 2 * MIB)?;
    let monitor = started(
        context,
        &Machine::unikernel(
            &context.environment,
            "do=hello do=tick:ms=20,count=30 do=capacity do=pattern-write:seed=9 do=pattern-verify:seed=9",
        )
        .memory_mib(32)
        .drive(disk(first))
        .config(),
    )?;
    monitor.console.wait_for("tick: n=1 ", SOON)?;
    monitor.set_state("Paused")?;
    monitor.must("PUT", "/snapshot/create", Some(&place.create()))?;
    killed(monitor)?;
    let ended = loaded(context, &other_disk(place, "d", &other, "Detached"))?.wait(SOON)?;
    ended.expect(0)?;
    let sectors = format!("capacity: sectors={} ", (2 * MIB) << 11);
    ensure!(ended.console.contains(&sectors), "{}", ended.console);
    let content = fs::read(&other)?;
    ensure!(
        content.iter().all(|byte| *byte == 0),
        "the other disk was written"
    );
    Ok(())
}

fn base(directory: &Path) -> Outcome<PathBuf> {
    let base = directory.join("test-base");
    blank_image(&base, MIB)?;
    Ok(base)
}

fn goes_on_with_its_overlays(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let base = base(directory.path())?;
    let place = Place {
        directory: directory.path().join("s"),
        is_one: true,
    };
    let temporary = directory.path().join("test-overlay");
    for path in ["memory", &temporary.to_string_lossy()] {
        let first = saved(context, overlay(&base, path, false), &place)?;
        // It goes on as well, and writes, while the others begin.
        first.set_state("Resumed")?;
        let one = loaded(context, &place.load(None))?;
        let two = loaded(context, &place.load(Some("Clone")))?;
        has_written(&one, 2)?;
        one.set_state("Paused")?;
        // A snapshot of a machine that has gone on from one, over the last: the second pattern, and no end yet.
        one.must("PUT", "/snapshot/create", Some(&place.create()))?;
        one.set_state("Resumed")?;
        for monitor in [first, one, two] {
            ends_well(monitor)?;
        }
        let third = loaded(context, &place.load(None))?;
        let ended = third.wait(SOON)?;
        ended.expect(0)?;
        ensure!(ended.console.contains("pattern-verify: ok"), "{}", ended.console);
        let beside: Vec<_> = fs::read_dir(directory.path())?.collect::<Result<_, _>>()?;
        ensure!(beside.len() == 2, "{beside:?}");
    }
    ensure!(
        fs::read(&base)?.iter().all(|byte| *byte == 0),
        "the base was written"
    );

    let path = place.state();
    let path = path.to_string_lossy();
    let info = said(&coraclectl(context, directory.path(), &["info", &path])?);
    ensure!(info.contains(r#""is_included":true"#), "{info}");
    let verified = coraclectl(context, directory.path(), &["verify", &path])?;
    ensure!(verified.status.success(), "{}", said(&verified));
    if context.environment.jailing.is_none() {
        let loaded = coraclectl(context, directory.path(), &["load", &path])?;
        ensure!(
            loaded.status.success() && said(&loaded).contains("pattern-verify: ok"),
            "{}",
            said(&loaded)
        );
    } else {
        println!("not in a jail: the load by coraclectl, which starts the monitor itself");
    }
    // Another base is not what the overlay was over.
    fs::write(&base, vec![1; usize::try_from(MIB << 20)?])?;
    refused(
        context,
        &place.load(None),
        "is another image or was changed since",
    )?;
    Ok(())
}

fn goes_on_from_a_kept_overlay(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let base = base(directory.path())?;
    let kept = directory.path().join("test-kept");
    let drive = || overlay(&base, &kept.to_string_lossy(), true);
    let plain = Place {
        directory: directory.path().to_owned(),
        is_one: false,
    };
    let one = Place {
        directory: directory.path().join("s"),
        is_one: true,
    };
    let first = saved(context, drive(), &plain)?;
    first.must("PUT", "/snapshot/create", Some(&one.create()))?;
    refused(context, &plain.load(Some("Clone")), "generation 1 is held by")?;
    // What the snapshot has is nobody's.
    let clone = loaded(context, &one.load(Some("Clone")))?;
    killed(first)?;
    let content = fs::read(&kept)?;
    ends_well(clone)?;
    ends_well(loaded(context, &plain.load(Some("Clone")))?)?;
    ensure!(fs::read(&kept)? == content, "a clone has written the overlay");
    // By default it is the overlay itself that goes on, once.
    ends_well(loaded(context, &one.load(None))?)?;
    ensure!(fs::read(&kept)? != content, "the overlay was not written");
    let part = "it was of generation 1 then, and is of 2 now";
    for load in [one.load(None), plain.load(None), plain.load(Some("Clone"))] {
        refused(context, &load, part)?;
    }
    ends_well(loaded(context, &one.load(Some("Clone")))?)
}

fn names_damage(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let base = base(directory.path())?;
    let place = Place {
        directory: directory.path().join("s"),
        is_one: true,
    };
    killed(saved(context, overlay(&base, "memory", false), &place)?)?;
    let path = place.directory.join("d.overlay");
    let good = fs::read(&path)?;
    let pages: Vec<usize> = good
        .chunks(4096)
        .enumerate()
        .filter(|(_, page)| page.iter().any(|byte| *byte != 0))
        .map(|(number, _)| number)
        .collect();
    let mut seed = context.seed.clone();
    let state = place.state();
    for _ in 0..context.count(12, 500) {
        let page = *seed.pick(&pages).ok_or("the overlay has nothing")?;
        let at = page * 4096 + usize::try_from(seed.below(4096))?;
        let mut bad = good.clone();
        if let Some(byte) = bad.get_mut(at) {
            *byte ^= 1 << seed.below(8);
        }
        fs::write(&path, bad)?;
        let refusal = refused(context, &place.load(None), "d.overlay")?;
        ensure!(refusal.contains("drive `d`"), "byte {at}: {refusal}");
        let verified = coraclectl(context, directory.path(), &["verify", &state.to_string_lossy()])?;
        let text = said(&verified);
        ensure!(
            !verified.status.success() && text.contains("d.overlay"),
            "byte {at}: {text}"
        );
    }
    fs::remove_file(&path)?;
    refused(context, &place.load(None), "d.overlay")?;
    fs::write(&path, good)?;
    ends_well(loaded(context, &place.load(None))?)
}

/// Each monitor writes a pattern of its own into memory and overlay, and is killed while it saves them over those of another.
/// Whoever goes on from what is there then finds the pattern that it remembers.
fn survives_a_kill(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let base = base(directory.path())?;
    let place = Place {
        directory: directory.path().join("s"),
        is_one: true,
    };
    let mut seed = context.seed.clone();
    let begin = |number: u64| {
        let words = format!(
            "do=hello do=pattern-write:mib={MIB},seed={number} do=tick:ms=10,count=20 do=pattern-verify:mib={MIB},seed={number} \
             do=dirty:mib=8,ms=10,seed={number}"
        );
        let config = Machine::unikernel(&context.environment, &words)
            .memory_mib(32)
            .drive(overlay(&base, "memory", false))
            .config();
        let monitor = started(context, &config)?;
        monitor.console.wait_for("tick: n=1 ", SOON)?;
        monitor.set_state("Paused")?;
        Outcome::Ok(monitor)
    };
    let first = begin(1)?;
    first.must("PUT", "/snapshot/create", Some(&place.create()))?;
    killed(first)?;
    for cycle in 2..2 + context.count(10, 500) {
        let monitor = begin(cycle as u64)?;
        let mut connection = monitor.connect()?;
        let body = place.create().to_string();
        let head = format!(
            "PUT /snapshot/create HTTP/1.1\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        connection.send(format!("{head}{body}").as_bytes())?;
        std::thread::sleep(Duration::from_micros(seed.below(80_000)));
        killed(monitor)?;
        let ended = loaded(context, &place.load(None))?.wait(SOON)?;
        let is_well = ended.expect(0).is_ok() && ended.console.contains("pattern-verify: ok");
        ensure!(is_well, "cycle {cycle}: {}", ended.console);
        for entry in fs::read_dir(directory.path())? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            let is_left = name.starts_with("s.") && name.ends_with(".draft");
            ensure!(
                is_left || name == "s" || name == "test-base",
                "cycle {cycle}: {name}"
            );
        }
    }
    // Whoever is not killed clears up.
    let last = begin(1000)?;
    last.must("PUT", "/snapshot/create", Some(&place.create()))?;
    killed(last)?;
    let beside: Vec<_> = fs::read_dir(directory.path())?.collect::<Result<_, _>>()?;
    ensure!(beside.len() == 2, "{beside:?}");
    let ended = loaded(context, &place.load(None))?.wait(SOON)?;
    ended.expect(0).map_err(|e| text(&e).into())
}

fn refuses_what_cannot_be_included(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let base = base(directory.path())?;
    let path = directory.path().join("test-disk");
    blank_image(&path, MIB)?;
    let place = Place {
        directory: directory.path().join("s"),
        is_one: true,
    };
    let says = |monitor: &Monitor, body: &Value, part: &str| {
        let answer = monitor.request("PUT", "/snapshot/create", Some(body))?;
        ensure!(
            answer.status == 400 && answer.fault().contains(part),
            "{part}: {} {}",
            answer.status,
            answer.body
        );
        Outcome::Ok(())
    };
    let in_place = started(context, &machine(context, disk(&path)))?;
    in_place.set_state("Paused")?;
    says(&in_place, &place.create(), "drive `d` is written in place")?;
    killed(in_place)?;

    let monitor = started(context, &machine(context, overlay(&base, "memory", false)))?;
    monitor.set_state("Paused")?;
    for (member, value, part) in [
        ("snapshot_type", json!("Diff"), "snapshot_type has to be Full"),
        ("mem_file_path", json!(directory.path().join("m")), "s/memory`"),
        (
            "snapshot_path",
            json!("nfs://host/export/s"),
            "cannot be on a server",
        ),
    ] {
        let mut body = place.create();
        put(&mut body, member, value);
        says(&monitor, &body, part)?;
    }
    fs::create_dir(&place.directory)?;
    fs::write(place.directory.join("thesis"), "dear")?;
    says(&monitor, &place.create(), "`thesis` in it would be lost")?;
    ensure!(fs::read(place.directory.join("thesis"))? == b"dear", "it is lost");
    fs::remove_file(place.directory.join("thesis"))?;
    monitor.must("PUT", "/snapshot/create", Some(&place.create()))?;
    // Without its overlays there is nothing to go on with.
    let files = Place {
        directory: directory.path().to_owned(),
        is_one: false,
    };
    monitor.must("PUT", "/snapshot/create", Some(&files.create()))?;
    killed(monitor)?;
    for disks in [None, Some("Clone"), Some("Detached")] {
        refused(context, &files.load(disks), "had a temporary overlay")?;
    }
    Ok(())
}
