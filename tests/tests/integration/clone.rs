//! Clones: many machines go on from one snapshot, share its memory, and are told apart.

use std::collections::BTreeSet;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use coracle_tests::case::{Case, Context};
use coracle_tests::environment::Need;
use coracle_tests::guest::{Machine, blank_image};
use coracle_tests::monitor::Monitor;
use coracle_tests::process::processes_with;
use coracle_tests::{Outcome, ensure};
use coracle_vmm::arch::x86_64::layout;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::snapshot::{Files, killed, saved, started};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "clones_go_on_with_the_same_memory_and_are_told_apart",
        need: Need::Kvm,
        run: go_on,
    },
    Case {
        name: "a_clone_that_cannot_be_started_leaves_nothing_behind",
        need: Need::Kvm,
        run: one_fails,
    },
    Case {
        name: "a_snapshot_that_cannot_be_cloned_is_refused_before_anything_is_started",
        need: Need::Kvm,
        run: refusals,
    },
    Case {
        name: "clones_write_to_disks_of_their_own_over_one_that_stays_as_it_is",
        need: Need::Kvm,
        run: write_their_own,
    },
    Case {
        name: "what_a_killed_coraclectl_has_started_is_known_and_can_be_ended",
        need: Need::Kvm,
        run: outlives_its_parent,
    },
];

const SOON: Duration = Duration::from_secs(60);
const COUNT: usize = 5;
const GENERATION_ID_BYTES: usize = 16;

/// A runtime directory with clones, which end with the test.
struct Place<'a> {
    context: &'a Context,
    directory: tempfile::TempDir,
}

impl Place<'_> {
    fn new(context: &Context) -> Outcome<Place<'_>> {
        let directory = tempfile::tempdir()?;
        Ok(Place { context, directory })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn files(&self) -> Files {
        Files::in_directory(self.directory.path(), "s")
    }

    fn ctl(&self, arguments: &[&str]) -> Outcome<Output> {
        Ok(Command::new(&self.context.environment.coraclectl)
            .args(arguments)
            .env("XDG_RUNTIME_DIR", self.directory.path())
            .output()?)
    }

    fn must(&self, arguments: &[&str]) -> Outcome<String> {
        let done = self.ctl(arguments)?;
        ensure!(done.status.success(), "{arguments:?}: {done:?}");
        Ok(String::from_utf8_lossy(&done.stdout).into_owned())
    }

    /// `coraclectl clone` of the snapshot, by `monitor`.
    fn clone(&self, monitor: &Path, flags: &[&str]) -> Outcome<Output> {
        let files = self.files();
        let paths = [&files.state, &files.memory, monitor, self.directory.path()]
            .map(|path| path.display().to_string());
        let [state, memory, monitor, consoles] = paths.each_ref().map(String::as_str);
        let fixed = [
            "--json",
            "clone",
            state,
            memory,
            "--monitor",
            monitor,
            "--console",
            consoles,
        ];
        let named = ["--count", "5", "--name-prefix", "c"];
        self.ctl(&[&fixed[..], &named, flags].concat())
    }

    fn console(&self, number: usize) -> String {
        std::fs::read_to_string(self.path(&format!("c-{number}.log"))).unwrap_or_default()
    }

    fn wait_for(&self, number: usize, words: &str) -> Outcome<String> {
        let deadline = Instant::now() + SOON;
        loop {
            let text = self.console(number);
            if text.contains(words) {
                return Ok(text);
            }
            ensure!(
                Instant::now() < deadline,
                "clone {number} does not say '{words}': {text}"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The machines that the client knows.
    fn ids(&self) -> Outcome<BTreeSet<String>> {
        let listed: Value = serde_json::from_str(&self.must(&["--json", "ps"])?)?;
        let here = self.directory.path().display().to_string();
        let machines = listed
            .as_array()
            .or_else(|| listed.as_object()?.values().next()?.as_array());
        let ours = machines
            .into_iter()
            .flatten()
            .filter(|machine| machine.to_string().contains(&here));
        let id = |machine: &Value| Some(machine.get("id")?.as_str()?.to_owned());
        Ok(ours.filter_map(id).collect())
    }

    fn nothing_is_left(&self) -> Outcome {
        let here = self.path("coracle").display().to_string();
        ensure!(processes_with(&here)?.is_empty(), "a monitor is left");
        // What a machine has left that ended by itself is removed by whoever looks next.
        self.must(&["ps"])?;
        let entries = std::fs::read_dir(self.directory.path())?;
        let entries = entries.chain(std::fs::read_dir(self.path("coracle")).into_iter().flatten());
        for entry in entries {
            let name = entry?.file_name().to_string_lossy().into_owned();
            ensure!(!name.starts_with("c-"), "left behind: {name}");
        }
        Ok(())
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let here = self.path("coracle").display().to_string();
        for process in processes_with(&here).into_iter().flatten() {
            // It may just have ended.
            let _ = kill(process.0);
        }
    }
}

fn kill(pid: u32) -> Outcome {
    let pid = Pid::from_raw(i32::try_from(pid)?).ok_or("a process has a number")?;
    Ok(kill_process(pid, Signal::KILL)?)
}

/// Makes the snapshot of a guest with a disk, in `place`; returns the sum of its memory.
fn snapshot_of(place: &Place<'_>, is_read_only: bool) -> Outcome<String> {
    let disk = place.path("test-disk");
    blank_image(&disk, 1)?;
    let words = "do=hello do=dirty:mib=8,ms=1,seed=3 do=tick:ms=10,count=40 do=read-check-zero:mib=1 do=checksum:mib=8 \
                 do=tick:ms=20,count=1000000";
    let drive = json!({
        "drive_id": "d", "path_on_host": disk, "is_root_device": false, "is_read_only": is_read_only
    });
    let config = Machine::unikernel(&place.context.environment, words)
        .memory_mib(64)
        .drive(drive)
        .part(
            "vsock",
            json!({ "guest_cid": 3, "uds_path": place.path("test-v") }),
        )
        .config();
    let monitor = started(place.context, &config)?;
    monitor.console.wait_for("tick: n=1 ", SOON)?;
    saved(&monitor, &place.files(), "Full")?;
    monitor.set_state("Resumed")?;
    let line = monitor.console.wait_for("checksum: mib=8", SOON)?;
    killed(monitor)?;
    Ok(line)
}

fn go_on(context: &Context) -> Outcome {
    let place = Place::new(context)?;
    let sum = snapshot_of(&place, true)?;
    let done = place.clone(&context.environment.coracle, &[])?;
    ensure!(done.status.success(), "{done:?}");
    let told: Value = serde_json::from_slice(&done.stdout)?;
    let clones = told
        .get("clones")
        .and_then(Value::as_array)
        .cloned()
        .unwrap_or_default();
    ensure!(clones.len() == COUNT, "{told}");
    // The files are of no more use to them, whatever becomes of these.
    std::fs::write(place.files().memory, [1; 4096])?;
    let mut generations = BTreeSet::new();
    for number in 1..=COUNT {
        let name = format!("c-{number}");
        let console = place.wait_for(number, &sum)?;
        ensure!(console.contains("read-check-zero: ok"), "{console}");
        ensure!(!console.contains("hello"), "{name} began anew: {console}");
        let instance: Value = serde_json::from_str(&place.must(&["api", "--vm", &name, "GET", "/"])?)?;
        let is = |field, value: &str| instance.get(field) == Some(&json!(value));
        ensure!(is("id", &name) && is("state", "Running"), "{instance}");
        generations.insert(generation(&place, &name)?);
        let socket = place.path(&format!("coracle/{name}/v.sock"));
        ensure!(socket.exists(), "{name} has no socket of its own");
    }
    ensure!(generations.len() == COUNT, "{generations:?}");
    one_is_killed(&place, &clones)?;
    for name in place.ids()? {
        place.must(&["stop", "--force", &name])?;
    }
    for number in 1..=COUNT {
        std::fs::remove_file(place.path(&format!("c-{number}.log")))?;
    }
    place.nothing_is_left()
}

/// What the guest finds at the place of its generation ID.
fn generation(place: &Place<'_>, name: &str) -> Outcome<[u8; GENERATION_ID_BYTES]> {
    let files = Files::in_directory(place.directory.path(), "looked-at");
    let paths = [&files.state, &files.memory].map(|path| path.display().to_string());
    let [state, memory] = paths.each_ref().map(String::as_str);
    place.must(&["snapshot", "create", name, state, memory])?;
    let mut id = [0; GENERATION_ID_BYTES];
    std::fs::File::open(&files.memory)?.read_exact_at(&mut id, layout::VMGENID.0)?;
    Ok(id)
}

/// The others go on.
fn one_is_killed(place: &Place<'_>, clones: &[Value]) -> Outcome {
    let pid = clones.first().and_then(|clone| clone.get("pid")?.as_u64());
    kill(u32::try_from(pid.ok_or("a clone has a process")?)?)?;
    let ticks = |number| place.console(number).matches("tick: n=").count();
    for number in 2..=COUNT {
        let (before, deadline) = (ticks(number), Instant::now() + SOON);
        while ticks(number) < before + 3 {
            ensure!(Instant::now() < deadline, "clone {number} stands still");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    let expected: BTreeSet<String> = (2..=COUNT).map(|number| format!("c-{number}")).collect();
    let ids = place.ids()?;
    ensure!(ids == expected, "{ids:?}");
    Ok(())
}

fn one_fails(context: &Context) -> Outcome {
    let place = Place::new(context)?;
    snapshot_of(&place, true)?;
    let lame = place.path("lame");
    let coracle = context.environment.coracle.display();
    let script = format!(
        "#!/bin/sh\ncase \"$*\" in *'--id c-3 '*) echo no luck >&2; exit 7;; esac\nexec {coracle} \"$@\"\n"
    );
    std::fs::write(&lame, script)?;
    std::fs::set_permissions(&lame, std::fs::Permissions::from_mode(0o700))?;

    let done = place.clone(&lame, &[])?;
    let errors = String::from_utf8_lossy(&done.stderr).into_owned();
    ensure!(
        done.status.code() == Some(1) && done.stdout.is_empty(),
        "{done:?}"
    );
    for part in ["c-3 cannot be started", "exit status: 7", "no luck"] {
        ensure!(errors.contains(part), "{part}: {errors}");
    }
    std::fs::remove_file(place.path("c-3.log"))?;
    place.nothing_is_left()?;

    let done = place.clone(&lame, &["--keep-going"])?;
    let errors = String::from_utf8_lossy(&done.stderr).into_owned();
    ensure!(done.status.code() == Some(1), "{done:?}");
    ensure!(errors.contains("1 of 5 clones cannot be started"), "{errors}");
    let expected: BTreeSet<String> = [1, 2, 4, 5].map(|number| format!("c-{number}")).into();
    let ids = place.ids()?;
    ensure!(ids == expected, "{ids:?}");

    // A name that is taken is found before anything is started.
    let done = place.clone(&context.environment.coracle, &[])?;
    let errors = String::from_utf8_lossy(&done.stderr).into_owned();
    ensure!(
        done.status.code() == Some(1) && errors.contains("a machine named c-1 is running"),
        "{errors}"
    );
    ensure!(place.ids()? == expected, "they run on");
    Ok(())
}

/// Of a guest that writes its disk, and after the load finds what it wrote, writes it anew, and finds that; the monitor stays
/// paused.
fn snapshot_of_a_writer(place: &Place<'_>) -> Outcome<Monitor> {
    let disk = place.path("test-disk");
    blank_image(&disk, 1)?;
    let words = "do=pattern-write:seed=1 do=flush do=tick:ms=10,count=40 do=pattern-verify:seed=1 \
                 do=pattern-write:seed=2 do=flush do=pattern-verify:seed=2 do=hello do=tick:ms=20,count=1000000";
    let drive = json!({
        "drive_id": "d", "path_on_host": disk, "is_root_device": false, "is_read_only": false, "cache_type": "Writeback",
    });
    let config = Machine::unikernel(&place.context.environment, words)
        .memory_mib(64)
        .drive(drive)
        .config();
    let monitor = started(place.context, &config)?;
    monitor.console.wait_for("tick: n=1 ", SOON)?;
    saved(&monitor, &place.files(), "Full")?;
    Ok(monitor)
}

fn write_their_own(context: &Context) -> Outcome {
    let place = Place::new(context)?;
    killed(snapshot_of_a_writer(&place)?)?;
    let before = std::fs::read(place.path("test-disk"))?;
    for flags in [
        &[][..],
        &[
            "--overlay-directory",
            &place.directory.path().display().to_string(),
        ],
    ] {
        let done = place.clone(&context.environment.coracle, flags)?;
        ensure!(done.status.success(), "{done:?}");
        for number in 1..=COUNT {
            let console = place.wait_for(number, "hello")?;
            ensure!(console.matches("pattern-verify: ok").count() == 2, "{console}");
        }
        for name in place.ids()? {
            place.must(&["stop", "--force", &name])?;
        }
        ensure!(
            std::fs::read(place.path("test-disk"))? == before,
            "the disk was written"
        );
        for number in 1..=COUNT {
            std::fs::remove_file(place.path(&format!("c-{number}.log")))?;
        }
        place.nothing_is_left()?;
    }
    let entries = std::fs::read_dir(place.directory.path())?;
    let names: BTreeSet<_> = entries
        .map(|entry| Ok(entry?.file_name()))
        .collect::<Outcome<_>>()?;
    ensure!(
        !names
            .iter()
            .any(|name| name.to_string_lossy().contains("overlay")),
        "{names:?}"
    );
    Ok(())
}

/// Killed while it waits for the third monitor, which takes its time.
fn outlives_its_parent(context: &Context) -> Outcome {
    let place = Place::new(context)?;
    snapshot_of(&place, true)?;
    let slow = place.path("slow");
    let coracle = context.environment.coracle.display();
    let script = format!("#!/bin/sh\ncase \"$*\" in *'--id c-3 '*) sleep 3;; esac\nexec {coracle} \"$@\"\n");
    std::fs::write(&slow, script)?;
    std::fs::set_permissions(&slow, std::fs::Permissions::from_mode(0o700))?;
    let files = place.files();
    let mut client = Command::new(&context.environment.coraclectl)
        .arg("clone")
        .args([&files.state, &files.memory])
        .args(["--count", "3", "--name-prefix", "c", "--monitor"])
        .arg(&slow)
        .arg("--console")
        .arg(place.directory.path())
        .env("XDG_RUNTIME_DIR", place.directory.path())
        .spawn()?;
    let ready = (1..3).try_for_each(|number| place.wait_for(number, "tick: n=").map(drop));
    client.kill()?;
    client.wait()?;
    ready?;
    let ids = |numbers: std::ops::RangeInclusive<usize>| -> BTreeSet<String> {
        numbers.map(|number| format!("c-{number}")).collect()
    };
    // The third loses its directory to whoever looks before it is there, and ends; or it is there, and known.
    let third = place.path("coracle/c-3").display().to_string();
    let (mut known, deadline) = (place.ids()?, Instant::now() + SOON);
    while known != ids(1..=3) && !(known == ids(1..=2) && processes_with(&third)?.is_empty()) {
        ensure!(Instant::now() < deadline, "{known:?}");
        std::thread::sleep(Duration::from_millis(50));
        known = place.ids()?;
    }
    let sum = |number| place.wait_for(number, "checksum: mib=8");
    // They have their memory still, which the client held.
    ensure!(
        sum(1)?.contains("read-check-zero: ok") && sum(2)?.contains("read-check-zero: ok"),
        "they go on"
    );
    for name in known {
        place.must(&["stop", "--force", &name])?;
    }
    for number in 1..=3 {
        std::fs::remove_file(place.path(&format!("c-{number}.log")))?;
    }
    place.nothing_is_left()
}

fn refusals(context: &Context) -> Outcome {
    let place = Place::new(context)?;
    let refusal = |part: &str| -> Outcome {
        let done = place.clone(&context.environment.coracle, &[])?;
        let errors = String::from_utf8_lossy(&done.stderr).into_owned();
        ensure!(
            done.status.code() == Some(1) && errors.contains(part),
            "{part}: {errors}"
        );
        place.nothing_is_left()
    };
    // Its machine is still there, and paused; then it has gone on, and written.
    let monitor = snapshot_of_a_writer(&place)?;
    refusal("drive `d` cannot be shared")?;
    refusal("anonymous-instance")?;
    monitor.set_state("Resumed")?;
    monitor.console.wait_for("hello", SOON)?;
    refusal("drive `d` cannot be shared")?;
    killed(monitor)?;
    refusal("written by")?;

    // One page of its memory.
    snapshot_of(&place, true)?;
    let memory = std::fs::OpenOptions::new()
        .write(true)
        .open(place.files().memory)?;
    memory.write_all_at(&[0x5a; 16], 0x10_0000)?;
    refusal("the memory file is damaged")
}
