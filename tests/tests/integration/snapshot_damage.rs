//! Snapshots that were changed, half made, or made by another version: what is loaded is what was saved, or nothing.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use coracle_tests::case::{Case, Context, Extent, text};
use coracle_tests::console::Console;
use coracle_tests::environment::Need;
use coracle_tests::golden::{self, GoldenSnapshot};
use coracle_tests::guest::{Linux, Machine};
use coracle_tests::harness::nfs::server::{Plan, Server};
use coracle_tests::monitor::{Launch, Monitor};
use coracle_tests::seed::Seed;
use coracle_tests::{Outcome, ensure};
use coracle_vmm::keys::ReadingKeys;
use coracle_vmm::machine::state::{Counts, MachineState};
use coracle_vmm::state::State;
use serde_json::Value;

use super::snapshot::{Files, SOON, killed, loaded, refused, saved, started};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "snapshots_that_are_kept_from_other_versions_go_on",
        need: Need::Kvm,
        run: kept_ones_go_on,
    },
    Case {
        name: "a_newer_format_and_a_newer_section_are_refused_by_name",
        need: Need::Nothing,
        run: newer_ones_are_refused,
    },
    Case {
        name: "no_change_of_a_snapshot_is_seen_by_its_guest",
        need: Need::Kvm,
        run: changes_are_not_seen,
    },
    Case {
        name: "a_load_that_fails_leaves_the_process_for_another",
        need: Need::Kvm,
        run: a_failed_load_does_no_harm,
    },
    Case {
        name: "a_monitor_killed_at_any_write_of_a_snapshot_leaves_the_last_one_or_none",
        need: Need::KvmAndTrace,
        run: survives_a_kill_at_each_write,
    },
    Case {
        name: "a_monitor_killed_while_it_writes_a_snapshot_to_a_server_leaves_the_last_one_or_none",
        need: Need::KvmAndTrace,
        run: survives_a_kill_on_a_server,
    },
];

fn kept_ones_go_on(context: &Context) -> Outcome {
    let kept = GoldenSnapshot::all()?;
    ensure!(!kept.is_empty(), "there is none");
    for snapshot in kept {
        let launch = Launch::new(&context.environment)?;
        GoldenSnapshot::prepare(launch.directory())?;
        let snapshot = snapshot.copied_to(launch.directory())?;
        let monitor = launch.start()?;
        let answer = monitor.request("PUT", "/snapshot/load", Some(&snapshot.load()))?;
        if answer.status == 400
            && answer
                .fault()
                .contains("this host cannot give the guest what its processor has")
        {
            // It was made on a host whose processors have more than those of this one: the files are good, which all of the
            // other checks have shown before this one.
            println!(
                "{} is for another host: {}",
                snapshot.state.display(),
                answer.fault()
            );
            continue;
        }
        ensure!(
            answer.status == 204,
            "{}: {} {}",
            snapshot.state.display(),
            answer.status,
            answer.body
        );
        if let Some(ticks) = is_ahead(context, &snapshot)? {
            // Its guest measures its waits by the TSC, and a host that emulates shows its own, whatever is restored.
            println!(
                "{} was made by a host whose TSC is {ticks} ticks ahead of this one's, which its guest waits for",
                snapshot.state.display()
            );
            continue;
        }
        let ended = monitor.wait(SOON)?;
        ended.expect(golden::STATUS)?;
        ensure!(ended.console.contains(golden::LINE), "{}", ended.console);
    }
    Ok(())
}

/// All of the memory of a kept guest is below these, so such numbers in its registers are times.
const TIMES: std::ops::Range<u64> = 1 << 32..1 << 60;

/// How far the TSC that the guest of `snapshot` has seen last is ahead of that of this host, if this host shows guests its own.
fn is_ahead(context: &Context, snapshot: &GoldenSnapshot) -> Outcome<Option<u64>> {
    if Linux::read(&context.environment)?.host != "emulating" {
        return Ok(None);
    }
    let machine = Machine::unikernel(&context.environment, "do=tick:ms=1,count=1").memory_mib(4);
    let monitor = Launch::new(&context.environment)?.start()?;
    monitor.configure(&machine.config())?;
    monitor.start_instance()?;
    let console = monitor.wait(SOON)?.console;
    let (_, now) = console.split_once("tsc=").ok_or("a tick tells the TSC")?;
    let now: u64 = now.split_whitespace().next().unwrap_or_default().parse()?;
    let bytes = std::fs::read(&snapshot.state)?;
    let mut state = State::parse(&bytes, &ReadingKeys::default())?;
    let counts = Counts { vcpus: 1, virtio: 2 };
    let saved = MachineState::read(&mut state, counts)?;
    let vcpu = saved.vcpus.first().ok_or("it has a processor")?;
    let registers = vcpu
        .regs
        .as_chunks::<8>()
        .0
        .iter()
        .map(|bytes| u64::from_le_bytes(*bytes));
    let seen = registers.filter(|value| TIMES.contains(value)).max();
    Ok(seen.and_then(|seen| seen.checked_sub(now)))
}

/// Where the fields of a state lie: its header, and the header of a section.
const FORMAT_AT: usize = 8;
const HEADER_BYTES: usize = 64;
const SECTION_VERSION_AT: usize = 40;

fn newer_ones_are_refused(context: &Context) -> Outcome {
    let kept = GoldenSnapshot::all()?.pop().ok_or("one is kept")?;
    let good = fs::read(&kept.state)?;
    let directory = tempfile::tempdir()?;
    let files = Files {
        state: directory.path().join("state"),
        memory: kept.memory,
    };

    let mut newer = good.clone();
    let header = newer.get_mut(..HEADER_BYTES).ok_or("it has a header")?;
    field(header, FORMAT_AT)?.copy_from_slice(&99_u32.to_le_bytes());
    let sum = crc32c::crc32c(header.get(..HEADER_BYTES - 4).ok_or("it has a header")?);
    field(header, HEADER_BYTES - 4)?.copy_from_slice(&sum.to_le_bytes());
    fs::write(&files.state, newer)?;
    let refusal = refused(context, &files)?;
    for part in [
        "it has format 99, and this version reads format",
        "load it with the version that wrote it (coracle ",
    ] {
        ensure!(refusal.contains(part), "{part}: {refusal}");
    }

    let mut newer = good;
    let name = b"serial\0";
    let at = newer.windows(name.len()).position(|bytes| bytes == name);
    let section = newer
        .get_mut(at.ok_or("there is a serial port")?..)
        .ok_or("it is there")?;
    field(section, SECTION_VERSION_AT)?.copy_from_slice(&7_u32.to_le_bytes());
    let length = u64::from_le_bytes(section.get(52..60).ok_or("it has a length")?.try_into()?);
    let end = HEADER_BYTES + usize::try_from(length)?;
    let sum = crc32c::crc32c(section.get(..HEADER_BYTES - 4).ok_or("it has a header")?);
    let sum = crc32c::crc32c_append(sum, section.get(HEADER_BYTES..end).ok_or("it has a body")?);
    field(section, HEADER_BYTES - 4)?.copy_from_slice(&sum.to_le_bytes());
    fs::write(&files.state, newer)?;
    let refusal = refused(context, &files)?;
    let part = "section `serial` has version 7, and this version reads ";
    ensure!(refusal.contains(part), "{part}: {refusal}");
    Ok(())
}

fn field(bytes: &mut [u8], at: usize) -> Outcome<&mut [u8]> {
    Ok(bytes.get_mut(at..at + 4).ok_or("it has that field")?)
}

/// A guest that writes memory and then counts.
fn counting(context: &Context, dirty_mib: u32, memory_mib: u32) -> Value {
    let words = format!("do=hello do=dirty:mib={dirty_mib},ms=100,seed=3 do=tick:ms=5,count=100000");
    Machine::unikernel(&context.environment, &words)
        .memory_mib(memory_mib)
        .config()
}

fn counts(monitor: &Monitor) -> Outcome {
    monitor.console.wait_for("tick: n=", SOON).map(drop)
}

/// A paused guest that has counted.
fn paused(context: &Context, config: &Value) -> Outcome<Monitor> {
    paused_of(started(context, config)?)
}

fn paused_of(monitor: Monitor) -> Outcome<Monitor> {
    monitor.console.wait_for("tick: n=1 ", SOON)?;
    monitor.set_state("Paused")?;
    Ok(monitor)
}

/// One that is to be traced. What strace has fail is no system call any more to a filter, which refuses it before strace answers.
fn paused_to_trace(context: &Context, by: By) -> Outcome<Monitor> {
    let launch = Launch::new(&context.environment)?.config(&counting(context, 3, 16))?;
    let launch = match by {
        By::Ring => launch,
        By::Calls => launch.arguments(["--no-seccomp"]),
    };
    paused_of(launch.start()?)
}

fn changes_are_not_seen(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let good = Files::in_directory(directory.path(), "good");
    let monitor = paused(context, &counting(context, 4, 16))?;
    saved(&monitor, &good, "Full")?;
    killed(monitor)?;
    let bad = Files::in_directory(directory.path(), "bad");
    let mut seed = context.seed.clone();
    let mut seen = BTreeMap::<&str, u32>::new();
    for number in 0..context.count(36, 2000) {
        fs::copy(&good.state, &bad.state)?;
        fs::copy(&good.memory, &bad.memory)?;
        let how = change(if number % 3 == 0 { &bad.state } else { &bad.memory }, &mut seed)?;
        let becomes = what_becomes_of(context, &bad).map_err(|e| format!("{how}: {}", text(&e)))?;
        *seen.entry(becomes).or_default() += 1;
    }
    ensure!(seen.contains_key(REFUSED), "{seen:?}");
    counts(&loaded(context, &good, "lazy")?)
}

const REFUSED: &str = "refused";
const LOST: &str = "lost";
const GOES_ON: &str = "goes on";

/// Loads what may be damaged: only what is as it was saved goes on.
fn what_becomes_of(context: &Context, files: &Files) -> Outcome<&'static str> {
    let verified = Command::new(&context.environment.coraclectl)
        .args(["snapshot", "verify"])
        .args([&files.state, &files.memory])
        .output()?;
    let monitor = Launch::new(&context.environment)?.start()?;
    let answer = monitor.request("PUT", "/snapshot/load", Some(&files.load("lazy")))?;
    ensure!(
        matches!(answer.status, 204 | 400),
        "{} {}",
        answer.status,
        answer.body
    );
    if answer.status == 400 {
        ensure!(
            !verified.status.success(),
            "what is good is refused: {}",
            answer.body
        );
        return Ok(REFUSED);
    }
    // Nobody who checks what he reads sees what lies in a hole.
    let found = String::from_utf8_lossy(&verified.stderr);
    let is_in_a_hole = found.contains("where nothing was saved");
    if verified.status.success() || is_in_a_hole {
        counts(&monitor)?;
        return Ok(GOES_ON);
    }
    let ended = monitor
        .wait(SOON)
        .map_err(|_| format!("it runs on, and {found}"))?;
    ended.expect(164)?;
    ensure!(
        ended.errors.contains("guest memory cannot be loaded"),
        "{}",
        ended.errors
    );
    Ok(LOST)
}

/// Changes a file that is not empty, and says how.
fn change(path: &Path, seed: &mut Seed) -> Outcome<String> {
    let mut bytes = fs::read(path)?;
    let unit = *seed.pick(&[1, 64, 512, 4096, 65536]).ok_or("there are some")?;
    let len = bytes.len();
    let mut place = || -> Outcome<usize> { Ok(usize::try_from(seed.below(len as u64))? / unit * unit) };
    let (from, to) = (place()?, place()?);
    let count = unit.min(len - from).min(len - to);
    let kind = seed.below(6);
    match kind {
        0 => *bytes.get_mut(from).ok_or("it lies within")? ^= 1 << seed.below(8),
        1 => bytes.truncate(from),
        2 => bytes.extend(std::iter::repeat_n(0, unit)),
        3 => bytes.copy_within(from..from + count, to),
        4 => drop(bytes.drain(from..from + count)),
        _ => {
            let copy = bytes.get(from..from + count).ok_or("it lies within")?.to_vec();
            bytes.splice(to..to, copy);
        }
    }
    fs::write(path, bytes)?;
    let names = ["flip", "cut", "zeros added", "copied", "taken out", "put in"];
    let name = usize::try_from(kind).ok().and_then(|kind| names.get(kind));
    Ok(format!(
        "{}: {} of {count} bytes, {from} to {to}",
        path.display(),
        name.ok_or("it has a name")?
    ))
}

/// What a load needs at once is damaged; the process stays as it was, and loads the next snapshot that it is given.
fn a_failed_load_does_no_harm(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let good = Files::in_directory(directory.path(), "good");
    let monitor = paused(context, &counting(context, 4, 16))?;
    saved(&monitor, &good, "Full")?;
    killed(monitor)?;
    let bad = Files {
        state: good.state.clone(),
        memory: directory.path().join("bad.memory"),
    };
    let mut bytes = fs::read(&good.memory)?;
    // All that lies where the generation ID does, and nothing of the trailer.
    for at in (0..1 << 20).step_by(64) {
        *bytes.get_mut(at).ok_or("a guest has more than a MiB")? ^= 1;
    }
    fs::write(&bad.memory, bytes)?;
    let monitor = Launch::new(&context.environment)?.start()?;
    let answer = monitor.request("PUT", "/snapshot/load", Some(&bad.load("lazy")))?;
    ensure!(
        answer.status == 400 && answer.fault().contains("guest memory cannot be loaded"),
        "{} {}",
        answer.status,
        answer.body
    );
    monitor.must("PUT", "/snapshot/load", Some(&good.load("lazy")))?;
    counts(&monitor)
}

/// What changes a file or its name.
const CHANGES: &str = "write,pwrite64,pwritev,pwritev2,ftruncate,fallocate,fsync,fdatasync,rename,renameat,renameat2,unlink,\
                       io_uring_enter";

/// How the files are written.
#[derive(Clone, Copy)]
enum By {
    /// Many writes at a time, as the host can.
    Ring,
    /// A system call for each, as where there is no io_uring.
    Calls,
}

/// A strace of a monitor that is to make a snapshot.
struct Trace {
    child: Child,
    log: tempfile::NamedTempFile,
}

impl Trace {
    /// Attaches to all threads of `monitor`; at the `kill`, a system call and its number in a thread, the process is killed
    /// before the call does anything.
    fn attach(monitor: &Monitor, by: By, kill: Option<(&str, u32)>) -> Outcome<Self> {
        let log = tempfile::NamedTempFile::new()?;
        let mut command = Command::new("strace");
        command
            .args(["-f", "-e", &format!("trace={CHANGES},io_uring_setup")])
            .args(["-p", &monitor.process().0.to_string()])
            .arg("-o")
            .arg(log.path());
        if let By::Calls = by {
            command.args(["-e", "inject=io_uring_setup:error=EPERM"]);
        }
        if let Some((call, number)) = kill {
            command.args(["-e", &format!("inject={call}:signal=KILL:when={number}")]);
        }
        let spawned = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn();
        let mut child = spawned.map_err(|e| format!("strace: {e}; run: tests/tools/need strace"))?;
        let said = Console::read(child.stderr.take().ok_or("stderr was asked for")?);
        said.wait_for(" attached", SOON)?;
        Ok(Self { child, log })
    }

    /// How often each thread has called what, at most: each of these is a place to die.
    fn places(mut self) -> Outcome<Vec<(String, u32)>> {
        self.child.wait()?;
        let mut counts = BTreeMap::<(String, String), u32>::new();
        for line in fs::read_to_string(&self.log)?.lines() {
            // A call that another thread has interrupted goes on in a line of its own.
            let Some((head, _)) = line.split_once('(') else {
                continue;
            };
            let mut words = head.split_whitespace();
            let (Some(thread), Some(call), None) = (words.next(), words.next(), words.next()) else {
                continue;
            };
            if CHANGES.split(',').any(|change| change == call) {
                *counts.entry((thread.to_owned(), call.to_owned())).or_default() += 1;
            }
        }
        let mut most = BTreeMap::<String, u32>::new();
        for ((_, call), count) in counts {
            let known = most.entry(call).or_default();
            *known = count.max(*known);
        }
        let places = most
            .into_iter()
            .flat_map(|(call, count)| (1..=count).map(move |number| (call.clone(), number)));
        Ok(places.collect())
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        // What it traces is gone by now, and so it ends by itself; or a test has failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn survives_a_kill_at_each_write(context: &Context) -> Outcome {
    let mut seed = context.seed.clone();
    for by in [By::Calls, By::Ring] {
        let directory = tempfile::tempdir()?;
        let files = Files::in_directory(directory.path(), "s");
        let places = first_snapshot(context, &files, by)?;
        ensure!(
            places
                .iter()
                .any(|(call, number)| call == "rename" && *number == 2),
            "two files get their names: {places:?}"
        );
        for (call, number) in chosen(context, &mut seed, &places) {
            kill_at(context, &files, directory.path(), by, (call, *number))
                .map_err(|e| format!("killed at {call} {number}: {}", text(&e)))?;
        }
    }
    Ok(())
}

/// All of them; or those that count most, and some of the others.
fn chosen<'a>(context: &Context, seed: &mut Seed, places: &'a [(String, u32)]) -> Vec<&'a (String, u32)> {
    if context.extent == Extent::Full {
        return places.iter().collect();
    }
    let is_name = |place: &&(String, u32)| place.0.starts_with("rename");
    let others: Vec<_> = places.iter().filter(|place| !is_name(place)).cloned().collect();
    let some: Vec<(String, u32)> = seed.sample(&others, 5).into_iter().cloned().collect();
    places
        .iter()
        .filter(|place| is_name(place) || some.contains(place))
        .collect()
}

/// Makes one, and returns the places at which the next can be cut off.
fn first_snapshot(context: &Context, files: &Files, by: By) -> Outcome<Vec<(String, u32)>> {
    let monitor = paused_to_trace(context, by)?;
    let trace = Trace::attach(&monitor, by, None)?;
    saved(&monitor, files, "Full")?;
    killed(monitor)?;
    trace.places()
}

fn kill_at(context: &Context, files: &Files, directory: &Path, by: By, place: (&str, u32)) -> Outcome {
    let before = [fs::read(&files.state)?, fs::read(&files.memory)?];
    let monitor = paused_to_trace(context, by)?;
    let trace = Trace::attach(&monitor, by, Some(place))?;
    let answer = monitor.request("PUT", "/snapshot/create", Some(&files.create("Full")));
    if answer.is_ok() {
        // This time there were fewer of them.
        killed(monitor)?;
    } else {
        let ended = monitor.wait(SOON)?;
        ensure!(
            std::os::unix::process::ExitStatusExt::signal(&ended.status) == Some(9),
            "{:?} {}",
            ended.status,
            ended.errors
        );
    }
    drop(trace);
    let after = [fs::read(&files.state)?, fs::read(&files.memory)?];
    let is_new = [before[0] != after[0], before[1] != after[1]];
    ensure!(
        is_new != [true, false],
        "the state has its name before its memory"
    );
    let drafts = drafts(directory)?;
    if is_new == [false, true] {
        let refusal = refused(context, files)?;
        ensure!(refusal.contains("does not belong to this snapshot"), "{refusal}");
        // What was left complete is a snapshot all the same.
    } else {
        counts(&loaded(context, files, "off")?)?;
    }
    for draft in &drafts {
        no_half_is_accepted(context, files, draft)?;
    }
    for draft in drafts {
        fs::remove_file(draft)?;
    }
    if is_new == [false, true] {
        let monitor = paused(context, &counting(context, 3, 16))?;
        saved(&monitor, files, "Full")?;
        killed(monitor)?;
    }
    Ok(())
}

/// What a killed monitor leaves beside the two files: drafts, and nothing else.
fn drafts(directory: &Path) -> Outcome<Vec<PathBuf>> {
    let mut drafts = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let extension = path.extension().and_then(|extension| extension.to_str());
        ensure!(
            matches!(extension, Some("state" | "memory" | "draft")),
            "{} is left",
            path.display()
        );
        if extension == Some("draft") {
            drafts.push(path);
        }
    }
    Ok(drafts)
}

/// Whoever takes a draft for a file of the snapshot is told.
fn no_half_is_accepted(context: &Context, files: &Files, draft: &Path) -> Outcome {
    let is_of_state = draft.display().to_string().contains(".state.");
    let mixed = Files {
        state: if is_of_state { draft } else { &files.state }.to_owned(),
        memory: if is_of_state { &files.memory } else { draft }.to_owned(),
    };
    let monitor = Launch::new(&context.environment)?.start()?;
    let answer = monitor.request("PUT", "/snapshot/load", Some(&mixed.load("off")))?;
    if answer.status == 204 {
        // The memory had its name, and the state was complete: they are one snapshot.
        ensure!(is_of_state, "a draft of memory was taken: {}", draft.display());
        return counts(&monitor);
    }
    ensure!(answer.status == 400, "{} {}", answer.status, answer.body);
    Ok(())
}

fn survives_a_kill_on_a_server(context: &Context) -> Outcome {
    let server = Server::start(Plan::image(1 << 20))?;
    let files = Files {
        state: PathBuf::from(server.url("export/s.state")),
        memory: PathBuf::from(server.url("export/s.memory")),
    };
    let mut seed = context.seed.clone();
    let places = first_snapshot(context, &files, By::Ring)?;
    let count = usize::try_from(context.count(4, 100))?;
    let (mut loads, mut refusals) = (0, 0);
    for (call, number) in seed.sample(&places, count) {
        let monitor = paused(context, &counting(context, 3, 16))?;
        let trace = Trace::attach(&monitor, By::Ring, Some((call, *number)))?;
        let answer = monitor.request("PUT", "/snapshot/create", Some(&files.create("Full")));
        if answer.is_ok() {
            killed(monitor)?;
        } else {
            monitor.wait(SOON)?;
        }
        drop(trace);
        let monitor = Launch::new(&context.environment)?.start()?;
        let answer = monitor.request("PUT", "/snapshot/load", Some(&files.load("lazy")))?;
        if answer.status == 204 {
            loads += 1;
            counts(&monitor)?;
            continue;
        }
        refusals += 1;
        ensure!(
            answer.fault().contains("does not belong to this snapshot"),
            "killed at {call} {number}: {}",
            answer.fault()
        );
        let again = paused(context, &counting(context, 3, 16))?;
        saved(&again, &files, "Full")?;
        killed(again)?;
    }
    ensure!(loads > 0, "{loads} loads, {refusals} refusals");
    Ok(())
}
