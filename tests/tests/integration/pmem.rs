//! Files that a guest has as persistent memory: what it stores there is in them, once it was told so, whatever becomes of the
//! monitor; nobody else writes them meanwhile; and what cannot be is refused.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use coracle_tests::case::{Case, Context};
use coracle_tests::environment::Need;
use coracle_tests::guest::{Linux, Machine, blank_image, run};
use coracle_tests::monitor::{Launch, Monitor};
use coracle_tests::seed::Seed;
use coracle_tests::{Outcome, ensure};
use serde_json::{Value, json};

use super::snapshot::{Files, SOON, killed, loaded, refused, saved, started, with};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "what_a_guest_has_stored_and_flushed_is_in_the_file_when_its_monitor_is_killed",
        need: Need::Kvm,
        run: survives_a_kill,
    },
    Case {
        name: "a_file_of_any_size_is_kept_to_its_last_byte",
        need: Need::Kvm,
        run: any_size,
    },
    Case {
        name: "what_is_read_only_is_read_by_several_and_changed_by_none",
        need: Need::Kvm,
        run: is_read_only,
    },
    Case {
        name: "a_guest_goes_on_elsewhere_with_its_file_unless_that_was_written_since",
        need: Need::Kvm,
        run: goes_on,
    },
    Case {
        name: "a_file_that_is_cut_under_its_guest_ends_the_machine_which_says_why",
        need: Need::Kvm,
        run: is_cut,
    },
    Case {
        name: "no_device_reaches_what_is_no_memory",
        need: Need::Kvm,
        run: |context| {
            ends_well(
                context,
                "do=pmem-write:mib=1 do=pmem-by-disk do=pmem-verify:mib=1",
            )
        },
    },
    Case {
        name: "a_limit_on_flushes_holds_until_it_is_another",
        need: Need::Kvm,
        run: is_limited,
    },
    Case {
        name: "linux_has_its_root_there",
        need: Need::Kvm,
        run: linux_has_its_root_there,
    },
    Case {
        name: "linux_maps_files_there_and_has_what_it_synced_after_a_kill",
        need: Need::Kvm,
        run: linux_maps_files_there,
    },
    Case {
        name: "what_no_pmem_device_can_be_is_an_error_that_says_what_to_do",
        need: Need::Kvm,
        run: what_cannot_be,
    },
];

const SECTOR: u64 = 512;
/// The status of a machine whose memory is lost.
const MEMORY_LOST: u8 = 164;

fn pmem(path: &Path) -> Value {
    json!({ "id": "p", "path_on_host": path })
}

/// A guest that does `words` with one pmem device.
fn machine(context: &Context, words: &str, pmem: &Value) -> Machine {
    Machine::unikernel(&context.environment, words)
        .memory_mib(32)
        .part("pmem", json!([pmem]))
}

fn file(directory: &Path, name: &str, bytes: u64) -> Outcome<PathBuf> {
    let path = directory.join(format!("test-{name}"));
    File::create(&path)?.set_len(bytes)?;
    Ok(path)
}

/// Whether `path` has what the unikernel's `pmem-write` puts into its first `bytes`: by another guest, as a disk.
fn holds(context: &Context, path: &Path, mib: u64, seed: u64) -> Outcome {
    let words = format!("do=pattern-verify:mib={mib},seed={seed}");
    let guest = Machine::unikernel(&context.environment, &words).disk("d", path);
    run(Launch::new(&context.environment)?, &guest, SOON)?.expect(0)
}

fn ends_well(context: &Context, words: &str) -> Outcome {
    let directory = tempfile::tempdir()?;
    let path = file(directory.path(), "pmem", 4 << 20)?;
    let disk = directory.path().join("test-disk");
    blank_image(&disk, 1)?;
    let machine = machine(context, words, &pmem(&path)).disk("d", &disk);
    run(Launch::new(&context.environment)?, &machine, SOON)?.expect(0)
}

fn survives_a_kill(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    for seed in 1..=context.count(2, 100).into() {
        let path = file(directory.path(), "pmem", 4 << 20)?;
        let words = format!("do=pmem-write:seed={seed} do=echo");
        let monitor = started(context, &machine(context, &words, &pmem(&path)).config())?;
        monitor.console.wait_for("pmem-write: ok bytes=4194304", SOON)?;
        let metrics = monitor.must("GET", "/metrics", None)?.body;
        ensure!(counted(&metrics, "flush_count") == 1, "{metrics}");
        killed(monitor)?;
        holds(context, &path, 4, seed)?;
    }
    Ok(())
}

/// What a counter of the device says.
fn counted(metrics: &str, name: &str) -> u64 {
    let line = metrics
        .lines()
        .find(|line| line.contains("pmem") && line.contains(name) && !line.starts_with('#'));
    line.and_then(|line| line.rsplit(' ').next()?.parse().ok())
        .unwrap_or(u64::MAX)
}

fn any_size(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    for bytes in [1, 512, (2 << 20) + 5000] {
        let path = file(directory.path(), "pmem", bytes)?;
        let shown = bytes.next_multiple_of(2 << 20);
        let words = "do=pmem-write:seed=3 do=pmem-verify:seed=3";
        let ended = run(
            Launch::new(&context.environment)?,
            &machine(context, words, &pmem(&path)),
            SOON,
        )?;
        ended.expect(0)?;
        ensure!(
            ended.console.contains(&format!("pmem-write: ok bytes={shown} ")),
            "{bytes}: {}",
            ended.console
        );
        ensure!(
            path.metadata()?.len() == shown,
            "{bytes}: {}",
            path.metadata()?.len()
        );
        holds(context, &path, shown >> 20, 3)?;
    }
    Ok(())
}

fn is_read_only(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let path = file(directory.path(), "pmem", (1 << 20) + 7)?;
    let before: Vec<u8> = (0..=u8::MAX).collect();
    File::options()
        .write(true)
        .open(&path)?
        .write_all_at(&before, 0)?;
    let reader = with(pmem(&path), "", "read_only", true.into());
    let words = "do=pmem-read-only do=pmem-flush do=echo";
    let log = file(directory.path(), "log", 0)?;
    let logger = json!({ "log_path": log, "level": "Info" });
    let guest = machine(context, words, &reader).part("logger", logger);
    let readers: Vec<Monitor> = (0..2)
        .map(|_| started(context, &guest.config()))
        .collect::<Outcome<_>>()?;
    for mut reader in readers {
        reader.console.wait_for("pmem-flush: ok", SOON)?;
        let writer = Launch::new(&context.environment)?.start()?;
        let answer = writer.request("PUT", "/pmem/p", Some(&pmem(&path)))?;
        ensure!(
            answer.status == 400 && answer.fault().contains("cannot lease"),
            "{}",
            answer.body
        );
        reader.type_in(b"exit 0\n")?;
        reader.wait(SOON)?.expect(0)?;
    }
    let said = std::fs::read_to_string(&log)?;
    ensure!(
        said.matches("which is read-only: nothing is kept").count() == 2,
        "{said}"
    );
    let after = std::fs::read(&path)?;
    ensure!(
        after.len() == (1 << 20) + 7 && after.starts_with(&before),
        "it was changed: {} bytes",
        after.len()
    );
    Ok(())
}

fn goes_on(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let path = file(directory.path(), "pmem", 4 << 20)?;
    let words = "do=pmem-write:mib=2,seed=5,flush=0 do=tick:ms=20,count=100 do=pmem-verify:mib=2,seed=5 \
                 do=pmem-write:seed=6 do=exit:status=7";
    let first = started(context, &machine(context, words, &pmem(&path)).config())?;
    first.console.wait_for("tick: n=2", SOON)?;
    let files = Files::in_directory(directory.path(), "test-snapshot");
    first.set_state("Paused")?;
    let onto_it = json!({ "snapshot_path": path, "mem_file_path": files.memory, "snapshot_type": "Full" });
    let answer = first.request("PUT", "/snapshot/create", Some(&onto_it))?;
    ensure!(
        answer.fault().contains("is the file of pmem device `p`"),
        "{}",
        answer.body
    );
    let with_disks = with(files.create("Full"), "", "include_disks", true.into());
    let answer = first.request("PUT", "/snapshot/create", Some(&with_disks))?;
    ensure!(answer.status == 400, "{}", answer.body);
    saved(&first, &files, "Full")?;
    let counts = std::fs::read(&path)?;
    ensure!(counts.iter().any(|byte| *byte != 0), "a snapshot flushes first");
    // Its file is no part of its memory.
    ensure!(
        files.memory.metadata()?.len() < 40 << 20,
        "{:?}",
        files.memory.metadata()
    );
    let answer = refused(context, &files)?;
    ensure!(answer.contains("is held by"), "two at a time: {answer}");
    killed(first)?;

    let cut = File::options().write(true).open(&path)?;
    cut.set_len(2 << 20)?;
    let answer = refused(context, &files)?;
    ensure!(answer.contains("the guest knows one of 4194304"), "{answer}");
    cut.set_len((4 << 20) - SECTOR)?;
    let answer = refused(context, &files)?;
    ensure!(answer.contains("somebody has made it shorter"), "{answer}");
    cut.set_len(4 << 20)?;
    let clone = with(files.load("lazy"), "", "disks", "Clone".into());
    let other = Launch::new(&context.environment)?.start()?;
    let answer = other.request("PUT", "/snapshot/load", Some(&clone))?;
    ensure!(
        answer.fault().contains("no clone can go on with it"),
        "{}",
        answer.body
    );
    drop(other);

    let second = loaded(context, &files, "lazy")?;
    second.wait(SOON)?.expect(7)?;
    holds(context, &path, 4, 6)?;
    let answer = refused(context, &files)?;
    ensure!(answer.contains("generation"), "it was written since: {answer}");
    let detached = with(files.load("lazy"), "", "disks", "Detached".into());
    let third = Launch::new(&context.environment)?.start()?;
    third.must("PUT", "/snapshot/load", Some(&detached))?;
    // What it finds is not what it has stored.
    third.wait(SOON)?.expect(1)
}

fn is_cut(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let path = file(directory.path(), "pmem", 4 << 20)?;
    for then in ["do=tick:ms=100,count=1000", "do=pmem-verify:seed=1 do=pmem-flush"] {
        let words = format!("do=pmem-write:seed=1 do=tick:ms=100,count=8 {then}");
        let monitor = started(context, &machine(context, &words, &pmem(&path)).config())?;
        monitor.console.wait_for("tick: n=1", SOON)?;
        File::options().write(true).open(&path)?.set_len(2 << 20)?;
        let ended = monitor.wait(SOON)?;
        ended.expect(MEMORY_LOST)?;
        let why =
            "pmem device `p`: the file has 2097152 bytes, and not 4194304: somebody has made it shorter";
        ensure!(ended.errors.contains(why), "{}", ended.errors);
        File::options().write(true).open(&path)?.set_len(4 << 20)?;
    }
    Ok(())
}

fn is_limited(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let path = file(directory.path(), "pmem", 2 << 20)?;
    let once = json!({ "ops": { "size": 1, "refill_time": 3_600_000 } });
    let limited = with(pmem(&path), "", "rate_limiter", once);
    let words = "do=pmem-flush do=hello do=pmem-flush:count=3 do=exit:status=7";
    let monitor = started(context, &machine(context, words, &limited).config())?;
    monitor.console.wait_for("hello", SOON)?;
    monitor.set_state("Paused")?;
    monitor.set_state("Resumed")?;
    let config = monitor.must("GET", "/vm/config", None)?.json()?;
    ensure!(
        config.pointer("/pmem/0/rate_limiter/ops/size") == Some(&json!(1)),
        "{config}"
    );
    ensure!(
        !monitor.console.text().contains("hello\r\npmem-flush: ok"),
        "{}",
        monitor.console.text()
    );
    let none = json!({ "id": "p", "rate_limiter": { "ops": { "size": 0, "refill_time": 0 } } });
    monitor.must("PATCH", "/pmem/p", Some(&none))?;
    monitor.wait(SOON)?.expect(7)
}

/// As long as other tests of Linux give it.
const LINUX_WITHIN: Duration = Duration::from_secs(240);

/// What a tool for ext4 says to `arguments`; it may end with these statuses.
fn ext4(tool: &str, arguments: &[&str], statuses: &[i32]) -> Outcome {
    let done = Command::new(tool).args(arguments).output()?;
    ensure!(
        done.status
            .code()
            .is_some_and(|status| statuses.contains(&status)),
        "{tool} {arguments:?}: {}{}",
        String::from_utf8_lossy(&done.stdout),
        String::from_utf8_lossy(&done.stderr)
    );
    Ok(())
}

/// The file of this name in an image of ext4.
fn file_in(image: &Path, name: &str) -> Outcome<Vec<u8>> {
    let found = image.with_extension("found");
    let (request, image) = (format!("dump {name} {}", found.display()), text(image)?);
    ext4("/sbin/debugfs", &["-R", &request, image], &[0])?;
    Ok(std::fs::read(found)?)
}

fn text(path: &Path) -> Outcome<&str> {
    path.to_str()
        .ok_or_else(|| format!("{} is no UTF-8", path.display()).into())
}

fn linux_has_its_root_there(context: &Context) -> Outcome {
    const KIB: u64 = 512;
    let seed = context.seed.clone().below(1 << 31);
    let directory = tempfile::tempdir()?;
    let words = format!("disk-write /data/pattern {KIB} {seed} disk-read /data/pattern {KIB} {seed}");
    let machine = Linux::read(&context.environment)?.machine("smp", directory.path(), &words)?;
    let root = directory.path().join("test-root.ext4");
    let config = with(machine.config(), "", "drives", json!([]));
    let device = json!([{ "id": "root", "path_on_host": root, "root_device": true }]);
    let config = with(config, "", "pmem", device);
    let monitor = started(context, &config)?;
    let ended = monitor.wait(LINUX_WITHIN)?;
    ended.expect(0)?;
    ext4("/sbin/e2fsck", &["-fn", text(&root)?], &[0])?;
    let mut expected = Seed::from(seed);
    let words = (0..KIB * 1024 / 8).flat_map(|_| expected.draw().to_le_bytes());
    ensure!(
        file_in(&root, "/data/pattern")? == words.collect::<Vec<u8>>(),
        "the file holds something else than the pattern"
    );
    Ok(())
}

fn linux_maps_files_there(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let path = file(directory.path(), "pmem", 32 << 20)?;
    ext4(
        "/sbin/mke2fs",
        &["-q", "-t", "ext4", "-b", "4096", text(&path)?],
        &[0],
    )?;
    // The program that runs from there is in the pages of the file, and nowhere else in the guest.
    let words = "run mkdir /tmp/p; mount -t ext4 -o dax /dev/pmem0 /tmp/p && mount|grep pmem && \
                 dd if=/bin/busybox of=/tmp/p/busybox bs=64k conv=fsync && chmod 755 /tmp/p/busybox && \
                 /tmp/p/busybox echo it runs && sleep 1000";
    let machine = Linux::read(&context.environment)?
        .machine("smp", directory.path(), words)?
        .read_only_root()
        .part("pmem", json!([pmem(&path)]));
    let monitor = started(context, &machine.config())?;
    monitor.console.wait_for("dax=always", LINUX_WITHIN)?;
    monitor.console.wait_for("\nit runs", LINUX_WITHIN)?;
    killed(monitor)?;
    // Its journal has what it synced.
    ext4("/sbin/e2fsck", &["-fp", text(&path)?], &[0, 1])?;
    let root = directory.path().join("test-root.ext4");
    ensure!(
        file_in(&path, "/busybox")? == file_in(&root, "/bin/busybox")?,
        "the file holds something else than the program"
    );
    Ok(())
}

fn what_cannot_be(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let path = file(directory.path(), "pmem", 2 << 20)?;
    let empty = file(directory.path(), "empty", 0)?;
    let root = with(pmem(&path), "", "root_device", true.into());
    let monitor = Launch::new(&context.environment)?.start()?;
    for (id, body, why) in [
        (
            "p",
            pmem(&directory.path().join("test-none")),
            "there is no image",
        ),
        (
            "p",
            pmem(&empty),
            "is empty: what a guest has as memory is a regular file",
        ),
        ("p", pmem(directory.path()), "is a directory"),
        ("p", pmem(Path::new("iscsi://a/b/1")), "is no path of this host"),
        (
            "p",
            json!({ "id": "p", "path_on_host": "" }),
            "path_on_host of `p` is empty",
        ),
        ("q", pmem(&path), "does not match the id from the body"),
        ("a-b", pmem(&path), "alphanumeric"),
        ("p", json!({ "id": "p" }), "missing field `path_on_host`"),
    ] {
        let answer = monitor.request("PUT", &format!("/pmem/{id}"), Some(&body))?;
        ensure!(
            answer.status == 400 && answer.fault().contains(why),
            "{why}: {}",
            answer.body
        );
    }
    monitor.must("PUT", "/pmem/p", Some(&root))?;
    let second = with(root.clone(), "", "id", "q".into());
    let drive = json!({ "drive_id": "d", "path_on_host": path, "is_root_device": true });
    for (at, body) in [("/pmem/q", &second), ("/drives/d", &drive)] {
        let answer = monitor.request("PUT", at, Some(body))?;
        ensure!(
            answer.status == 400 && answer.fault().contains("root device already exists"),
            "{}",
            answer.body
        );
    }
    let before = monitor.request("PATCH", "/pmem/p", Some(&json!({ "id": "p" })))?;
    ensure!(before.fault().contains("before starting"), "{}", before.body);
    monitor.configure(&machine(context, "do=hello do=echo", &root).config())?;
    monitor.start_instance()?;
    monitor.console.wait_for("hello", SOON)?;
    let late = monitor.request("PUT", "/pmem/p", Some(&root))?;
    ensure!(late.fault().contains("after starting"), "{}", late.body);
    let nobody = monitor.request("PATCH", "/pmem/q", Some(&json!({ "id": "q" })))?;
    ensure!(nobody.fault().contains("no pmem device `q`"), "{}", nobody.body);
    let tls = json!({ "certificate": "c", "key": "k", "ca": "a" });
    let send = json!({ "to": "127.0.0.1:1", "tls": tls });
    let moved = monitor.request("PUT", "/migration/send", Some(&send))?;
    ensure!(moved.fault().contains("nothing of that moves"), "{}", moved.body);

    let other = Launch::new(&context.environment)?.arguments(["--id", "vm2"]);
    let ended = run(other, &machine(context, "do=hello", &pmem(&path)), SOON)?;
    ensure!(
        !ended.status.success() && ended.errors.contains("is held by"),
        "{}",
        ended.errors
    );
    let disk = Machine::unikernel(&context.environment, "do=hello").disk("d", &path);
    let ended = run(Launch::new(&context.environment)?, &disk, SOON)?;
    ensure!(ended.errors.contains("is held by"), "{}", ended.errors);
    killed(monitor)
}
