//! An image has one writer: among our own machines, beside QEMU, and by whatever name.

use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use coracle_tests::case::{Case, Context};
use coracle_tests::environment::{Environment, Need};
use coracle_tests::guest::{Machine, blank_image, run};
use coracle_tests::monitor::{Launch, Monitor};
use coracle_tests::{Outcome, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "a_second_machine_is_refused_by_name_and_the_first_runs_on",
        need: Need::Kvm,
        run: a_second_machine_is_refused,
    },
    Case {
        name: "a_killed_machine_leaves_its_image_free",
        need: Need::Kvm,
        run: a_killed_machine_leaves_its_image_free,
    },
    Case {
        name: "an_ended_machine_leaves_its_image_free",
        need: Need::Kvm,
        run: an_ended_machine_leaves_its_image_free,
    },
    Case {
        name: "qemu_and_we_refuse_each_others_images",
        need: Need::Kvm,
        run: qemu_and_we_refuse_each_other,
    },
    Case {
        name: "one_machine_writes_an_image_once_by_whatever_name",
        need: Need::Kvm,
        run: one_machine_writes_an_image_once,
    },
    Case {
        name: "a_descriptor_is_one_more_name_of_an_image",
        need: Need::Kvm,
        run: a_descriptor_is_one_more_name,
    },
    Case {
        name: "three_machines_read_one_image",
        need: Need::Kvm,
        run: three_machines_read_one_image,
    },
    Case {
        name: "a_change_to_a_leased_image_leaves_the_old_one_serving",
        need: Need::Kvm,
        run: a_change_to_a_leased_image,
    },
    Case {
        name: "a_change_to_another_image_frees_the_old_one",
        need: Need::Kvm,
        run: a_change_frees_the_old_image,
    },
    Case {
        name: "a_change_to_an_image_that_does_not_grow_leaves_the_old_one",
        need: Need::Kvm,
        run: a_change_that_does_not_grow,
    },
    Case {
        name: "a_second_node_of_a_device_is_no_second_device",
        need: Need::KvmAndLoopDevice,
        run: a_second_node_of_a_device,
    },
    Case {
        name: "a_device_that_another_host_holds_is_refused_until_that_is_broken",
        need: Need::KvmAndLoopDevice,
        run: a_device_that_another_host_holds,
    },
    Case {
        name: "an_image_without_a_place_for_records_has_a_lock_only",
        need: Need::KvmAndRoot,
        run: an_image_without_a_place_for_records,
    },
    Case {
        name: "a_descriptor_that_cannot_be_opened_again_is_refused",
        need: Need::KvmAndRoot,
        run: a_descriptor_that_cannot_be_opened_again,
    },
    Case {
        name: "a_lease_is_shown_and_that_of_the_living_is_not_broken",
        need: Need::Kvm,
        run: a_lease_is_shown,
    },
];

const SOON: Duration = Duration::from_secs(20);

fn a_second_machine_is_refused(context: &Context) -> Outcome {
    let place = tempfile::tempdir()?;
    let image = place.path().join("image");
    blank_image(&image, 1)?;
    let mut first = writing(context, "vm1", &image)?;
    let pid = format!("VM `vm1` (pid {} on ", first.process().0);
    let second = Launch::new(&context.environment)?.arguments(["--id", "vm2"]);
    // From a file, by the API before the start: it is heard of at once, each time.
    let from_file = run(second, &hello(context).disk("d", &image), SOON)?;
    ensure!(!from_file.status.success(), "{from_file:?}");
    ensure!(
        from_file.errors.contains(&pid) && from_file.errors.contains("generation 1 is held by"),
        "{}",
        from_file.errors
    );
    let by_api = Launch::new(&context.environment)?.start()?;
    let answer = by_api.request("PUT", "/drives/d", Some(&drive("d", &image)))?;
    ensure!(
        answer.status == 400 && answer.body.contains(&pid),
        "{} {}",
        answer.status,
        answer.body
    );
    ensure!(first.is_running()?, "the first has ended of it");
    let ticks = first.console.text().len();
    first
        .console
        .wait_until("more ticks", SOON, |text| (text.len() > ticks + 60).then_some(()))
}

fn a_killed_machine_leaves_its_image_free(context: &Context) -> Outcome {
    let place = tempfile::tempdir()?;
    let image = place.path().join("image");
    blank_image(&image, 1)?;
    for generation in 1..=context.count(10, 200) {
        let killed = writing(context, "vm1", &image)?;
        says(&image, "phase held", generation)?;
        killed.signal(Signal::KILL)?;
        killed.wait(SOON)?;
        says(&image, "phase held", generation)?;
    }
    Ok(())
}

fn an_ended_machine_leaves_its_image_free(context: &Context) -> Outcome {
    let place = tempfile::tempdir()?;
    let image = place.path().join("image");
    blank_image(&image, 1)?;
    for generation in 1..=3 {
        let machine = hello(context).disk("d", &image);
        run(Launch::new(&context.environment)?, &machine, SOON)?.expect(0)?;
        says(&image, "phase released", generation)?;
    }
    let monitor = writing(context, "vm1", &image)?;
    monitor.set_state("Paused")?;
    monitor.signal(Signal::TERM)?;
    monitor.wait(SOON)?.expect(143)?;
    says(&image, "phase released", 4)?;
    let names: Vec<_> = std::fs::read_dir(place.path())?
        .map(|entry| Ok(entry?.file_name()))
        .collect::<std::io::Result<_>>()?;
    ensure!(names.len() == 3, "not the image and two records: {names:?}");
    Ok(())
}

fn qemu_and_we_refuse_each_other(context: &Context) -> Outcome {
    let place = tempfile::tempdir()?;
    let image = place.path().join("image");
    blank_image(&image, 1)?;
    let ours = writing(context, "vm1", &image)?;
    for readonly in ["off", "on"] {
        let theirs = Qemu::command(&image, readonly).output()?;
        ensure!(
            !theirs.status.success() && text(&theirs).contains("write\" lock"),
            "readonly={readonly}: {}",
            text(&theirs)
        );
    }
    drop(ours);
    is_unlocked(&image)?;
    let theirs = Qemu::opens(&image, "off")?;
    let writes = hello(context).disk("d", &image);
    let reads = hello(context).drive(read_only("d", &image));
    for machine in [&writes, &reads] {
        let refused = run(Launch::new(&context.environment)?, machine, SOON)?;
        ensure!(
            !refused.status.success() && refused.errors.contains("such as QEMU, has it open to write"),
            "{refused:?}"
        );
    }
    drop(theirs);
    // Readers agree with one another.
    let theirs = Qemu::opens(&image, "on")?;
    run(Launch::new(&context.environment)?, &reads, SOON)?.expect(0)?;
    let refused = run(Launch::new(&context.environment)?, &writes, SOON)?;
    ensure!(
        !refused.status.success() && refused.errors.contains("in use by readers"),
        "{refused:?}"
    );
    drop(theirs);
    let reader = ticking(
        context,
        Launch::new(&context.environment)?,
        read_only("d", &image),
    )?;
    let theirs = Qemu::command(&image, "off").output()?;
    ensure!(
        !theirs.status.success(),
        "QEMU writes what we read: {}",
        text(&theirs)
    );
    drop(Qemu::opens(&image, "on")?);
    drop(reader);
    Ok(())
}

fn one_machine_writes_an_image_once(context: &Context) -> Outcome {
    let place = tempfile::tempdir()?;
    let image = place.path().join("image");
    blank_image(&image, 1)?;
    let (hard, soft) = (place.path().join("hard"), place.path().join("soft"));
    std::fs::hard_link(&image, &hard)?;
    std::os::unix::fs::symlink(&image, &soft)?;
    let has_it = "has it already as another disk";
    for (other, expected) in [(&image, has_it), (&hard, "open to write"), (&soft, has_it)] {
        one_of_two_is_refused(context, &image, other, expected)?;
    }
    let machine = hello(context).disk("one", &image).drive(read_only("two", &soft));
    let refused = run(Launch::new(&context.environment)?, &machine, SOON)?;
    ensure!(!refused.status.success(), "it is read and written: {refused:?}");
    Ok(())
}

/// Two names of one image are refused for two disks, whichever comes first.
fn one_of_two_is_refused(context: &Context, image: &Path, other: &Path, expected: &str) -> Outcome {
    for (first, second) in [(image, other), (other, image)] {
        let machine = hello(context).disk("one", first).disk("two", second);
        let refused = run(Launch::new(&context.environment)?, &machine, SOON)?;
        ensure!(
            !refused.status.success() && refused.errors.contains("`two`"),
            "{} and {}: {refused:?}",
            first.display(),
            second.display()
        );
        ensure!(refused.errors.contains(expected), "{}", refused.errors);
    }
    Ok(())
}

fn a_descriptor_is_one_more_name(context: &Context) -> Outcome {
    let place = tempfile::tempdir()?;
    let image = place.path().join("image");
    blank_image(&image, 1)?;
    let file = std::fs::File::options().read(true).write(true).open(&image)?;
    rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::empty())?;
    for way in ["/dev/fd", "/proc/self/fd"] {
        let name = Path::new(way).join(file.as_raw_fd().to_string());
        one_of_two_is_refused(context, &image, &name, "has it already as another disk")?;
        // Alone it is as good as a path.
        let machine = hello(context).disk("one", &name);
        run(Launch::new(&context.environment)?, &machine, SOON)?.expect(0)?;
    }
    Ok(())
}

fn three_machines_read_one_image(context: &Context) -> Outcome {
    let place = tempfile::tempdir()?;
    let image = place.path().join("image");
    blank_image(&image, 1)?;
    let mut readers = Vec::new();
    for _ in 0..3 {
        let launch = Launch::new(&context.environment)?;
        readers.push(ticking(context, launch, read_only("d", &image))?);
    }
    let writes = hello(context).disk("d", &image);
    let refused = run(Launch::new(&context.environment)?, &writes, SOON)?;
    ensure!(
        !refused.status.success() && refused.errors.contains("in use by readers"),
        "{refused:?}"
    );
    for reader in &mut readers {
        ensure!(reader.is_running()?, "a reader has ended of it");
    }
    ensure!(
        std::fs::read_dir(place.path())?.count() == 1,
        "a reader has left a record"
    );
    for reader in readers {
        reader.signal(Signal::KILL)?;
        reader.wait(SOON)?;
    }
    run(Launch::new(&context.environment)?, &writes, SOON)?.expect(0)
}

fn a_change_to_a_leased_image(context: &Context) -> Outcome {
    let place = tempfile::tempdir()?;
    let (theirs, ours) = (place.path().join("theirs"), place.path().join("ours"));
    blank_image(&theirs, 4)?;
    blank_image(&ours, 4)?;
    let _first = writing(context, "vm1", &theirs)?;
    let words = "do=pattern-write:mib=4,seed=1 do=tick:ms=200,count=10 do=pattern-verify:mib=4,seed=1 do=exit:status=3";
    let machine = Machine::unikernel(&context.environment, words).disk("d", &ours);
    let monitor = Launch::new(&context.environment)?
        .config(&machine.config())?
        .start()?;
    monitor.console.wait_for("tick: n=0", SOON)?;
    let change = |path: &Path| json!({ "drive_id": "d", "path_on_host": path });
    let refused = monitor.request("PATCH", "/drives/d", Some(&change(&theirs)))?;
    ensure!(
        refused.status == 400 && refused.body.contains("VM `vm1`"),
        "{} {}",
        refused.status,
        refused.body
    );
    says(&ours, "phase held", 1)?;
    // The image that it has anyway is no conflict, by whatever name.
    let soft = place.path().join("soft");
    std::os::unix::fs::symlink(&ours, &soft)?;
    for path in [&ours, &soft] {
        monitor.must("PATCH", "/drives/d", Some(&change(path)))?;
    }
    says(&ours, "phase held", 1)?;
    monitor.wait(SOON * 3)?.expect(3)
}

fn a_change_that_does_not_grow(context: &Context) -> Outcome {
    let place = tempfile::tempdir()?;
    let (first, second) = (place.path().join("first"), place.path().join("second"));
    blank_image(&first, 1)?;
    blank_image(&second, 1)?;
    let monitor = writing(context, "vm1", &first)?;
    for size_bytes in [512, (2 << 20) + 1, u64::MAX - 511] {
        let body = json!({ "drive_id": "d", "path_on_host": second, "size_bytes": size_bytes });
        let refused = monitor.request("PATCH", "/drives/d", Some(&body))?;
        ensure!(
            refused.status == 400 && refused.body.contains("is as it was"),
            "{} {}",
            refused.status,
            refused.body
        );
        ensure!(
            record(&first)?.contains("phase held"),
            "the old image is not held"
        );
        ensure!(
            record(&second)?.contains("phase released"),
            "the new image is held"
        );
    }
    let body = json!({ "drive_id": "d", "path_on_host": second, "size_bytes": 2 << 20 });
    monitor.must("PATCH", "/drives/d", Some(&body))?;
    ensure!(second.metadata()?.len() == 2 << 20, "the new image has not grown");
    ensure!(
        record(&second)?.contains("phase held"),
        "the new image is not held"
    );
    Ok(())
}

fn a_change_frees_the_old_image(context: &Context) -> Outcome {
    let place = tempfile::tempdir()?;
    let (first, second) = (place.path().join("first"), place.path().join("second"));
    blank_image(&first, 1)?;
    blank_image(&second, 1)?;
    let monitor = writing(context, "vm1", &first)?;
    let mut generation = 0;
    for state in ["Resumed", "Paused"] {
        if state == "Paused" {
            monitor.set_state(state)?;
        }
        generation += 1;
        for (to, from) in [(&second, &first), (&first, &second)] {
            let body = json!({ "drive_id": "d", "path_on_host": to });
            monitor.must("PATCH", "/drives/d", Some(&body))?;
            ensure!(
                record(from)?.contains("phase released"),
                "{state}: the old image is still held"
            );
            ensure!(
                record(to)?.contains("phase held"),
                "{state}: the new image is not held"
            );
        }
    }
    says(&second, "phase released", generation)?;
    let other = hello(context).disk("d", &second);
    run(Launch::new(&context.environment)?, &other, SOON)?.expect(0)
}

fn a_second_node_of_a_device(context: &Context) -> Outcome {
    let place = tempfile::tempdir()?;
    let image = place.path().join("image");
    blank_image(&image, 1)?;
    let device = LoopDevice::of(&image)?;
    let second = place.path().join("second-node");
    let made = Command::new("cp")
        .arg("-a")
        .arg(&device.0)
        .arg(&second)
        .status()?;
    ensure!(made.success(), "no second node can be made");
    let _first = writing(context, "vm1", &device.0)?;
    for node in [&device.0, &second] {
        let machine = hello(context).disk("d", node);
        let refused = run(Launch::new(&context.environment)?, &machine, SOON)?;
        ensure!(
            !refused.status.success() && refused.errors.contains("the block device is in use"),
            "{}: {refused:?}",
            node.display()
        );
    }
    Ok(())
}

fn a_device_that_another_host_holds(context: &Context) -> Outcome {
    let place = tempfile::tempdir()?;
    let (image, at) = (place.path().join("image"), place.path().join("leases"));
    blank_image(&image, 1)?;
    let device = LoopDevice::of(&image)?;
    let disk = json!({
        "drive_id": "d", "path_on_host": device.0, "is_root_device": false, "lease_at": at
    });
    let machine = hello(context).drive(disk);
    run(Launch::new(&context.environment)?, &machine, SOON)?.expect(0)?;
    says(&at, "phase released", 1)?;
    // As a machine leaves it that ran on another host, which has lost its power.
    let mut fields = record(&at)?
        .replace("epoch 2", "epoch 3")
        .replace("phase released", "phase held");
    fields.truncate(fields.find("crc32c").ok_or("a record has a checksum")?);
    let host = fields
        .lines()
        .find(|line| line.starts_with("host "))
        .ok_or("a record has a host")?;
    let fields = fields.replace(host, "host elsewhere.invalid");
    let sum = crc32c::crc32c(fields.as_bytes());
    std::fs::write(
        place.path().join("leases.lease.3"),
        format!("{fields}crc32c {sum:08x}\n"),
    )?;
    let refused = run(Launch::new(&context.environment)?, &machine, SOON)?;
    ensure!(
        !refused.status.success() && refused.errors.contains("on elsewhere.invalid) since"),
        "{refused:?}"
    );
    let broken = Command::new(&context.environment.coraclectl)
        .args(["lease", "break", "--yes", "--lease-at"])
        .arg(&at)
        .arg(&device.0)
        .output()?;
    ensure!(broken.status.success(), "{}", text(&broken));
    run(Launch::new(&context.environment)?, &machine, SOON)?.expect(0)?;
    says(&at, "phase released", 2)
}

fn an_image_without_a_place_for_records(context: &Context) -> Outcome {
    let place = tempfile::tempdir()?;
    let image = place.path().join("image");
    blank_image(&image, 1)?;
    let mode = std::os::unix::fs::PermissionsExt::from_mode;
    std::fs::set_permissions(place.path(), mode(0o555))?;
    // Root as it is in a container: permissions count.
    let launch = || -> Outcome<Launch> {
        let launch = Launch::new(&context.environment)?;
        Ok(launch.by_way_of(["setpriv", "--bounding-set=-dac_override"]))
    };
    let log = tempfile::NamedTempFile::new()?;
    let logger = json!({ "log_path": log.path(), "level": "Info" });
    let machine = hello(context).disk("d", &image).part("logger", logger);
    run(launch()?, &machine, SOON)?.expect(0)?;
    let said = std::fs::read_to_string(log.path())?;
    ensure!(
        said.contains("has a lock only, and so no migration and no restore beside the disk"),
        "{said}"
    );
    ensure!(std::fs::read_dir(place.path())?.count() == 1, "a record was made");
    // Once there are records, going on without would make their generation a lie.
    run(Launch::new(&context.environment)?, &machine, SOON)?.expect(0)?;
    let refused = run(launch()?, &machine, SOON)?;
    ensure!(
        !refused.status.success() && refused.errors.contains("its records cannot be continued"),
        "{refused:?}"
    );
    Ok(())
}

fn a_descriptor_that_cannot_be_opened_again(context: &Context) -> Outcome {
    let place = tempfile::tempdir()?;
    let image = place.path().join("image");
    blank_image(&image, 1)?;
    std::fs::set_permissions(&image, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    let file = std::fs::File::options().read(true).write(true).open(&image)?;
    rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::empty())?;
    let name = PathBuf::from(format!("/dev/fd/{}", file.as_raw_fd()));
    let (launch, machine) = as_nobody(context)?;
    let refused = run(launch, &machine.disk("d", &name), SOON)?;
    ensure!(
        !refused.status.success() && refused.errors.contains("is a descriptor that was handed in"),
        "{refused:?}"
    );
    Ok(())
}

fn a_lease_is_shown(context: &Context) -> Outcome {
    let place = tempfile::tempdir()?;
    let image = place.path().join("image");
    blank_image(&image, 1)?;
    let ask = |arguments: &[&str]| {
        Command::new(&context.environment.coraclectl)
            .args(arguments)
            .arg(&image)
            .stdin(Stdio::null())
            .output()
    };
    let monitor = writing(context, "vm1", &image)?;
    let shown: Value = serde_json::from_slice(&ask(&["--json", "lease", "show"])?.stdout)?;
    let of_record = |name: &str| shown.get("record").and_then(|record| record.get(name)).cloned();
    ensure!(shown.get("fence") == Some(&json!("writer")), "{shown}");
    ensure!(of_record("vm") == Some(json!("vm1")), "{shown}");
    ensure!(of_record("pid") == Some(json!(monitor.process().0)), "{shown}");
    let broken = ask(&["lease", "break", "--yes"])?;
    ensure!(
        !broken.status.success() && text(&broken).contains(&format!("`kill {}`", monitor.process().0)),
        "{}",
        text(&broken)
    );
    monitor.signal(Signal::KILL)?;
    monitor.wait(SOON)?;
    let broken = ask(&["lease", "break", "--yes"])?;
    ensure!(broken.status.success(), "{}", text(&broken));
    ensure!(record(&image)?.contains("phase broken"), "{}", record(&image)?);
    let machine = hello(context).disk("d", &image);
    run(Launch::new(&context.environment)?, &machine, SOON)?.expect(0)
}

/// A machine that says hello and ends.
fn hello(context: &Context) -> Machine {
    Machine::unikernel(&context.environment, "do=hello")
}

/// A monitor that runs as a user who owns nothing, and a machine of which that user may read the guest.
fn as_nobody(context: &Context) -> Outcome<(Launch, Machine)> {
    let launch = Launch::new(&context.environment)?;
    // Where the build directory is private, the other user needs copies of the programs.
    let program = launch.directory().join("test-coracle");
    std::fs::copy(&context.environment.coracle, &program)?;
    let mut environment = Environment::clone(&context.environment);
    environment.unikernel = launch.directory().join("test-guest");
    std::fs::copy(&context.environment.unikernel, &environment.unikernel)?;
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    std::fs::set_permissions(launch.directory(), open)?;
    let launch = launch.program(&program);
    let launch = launch.by_way_of(["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]);
    Ok((launch, Machine::unikernel(&environment, "do=hello")))
}

fn drive(id: &str, image: &Path) -> Value {
    json!({ "drive_id": id, "path_on_host": image, "is_root_device": false })
}

fn read_only(id: &str, image: &Path) -> Value {
    json!({ "drive_id": id, "path_on_host": image, "is_root_device": false, "is_read_only": true })
}

/// The machine `id`, which has the image and runs.
fn writing(context: &Context, id: &str, image: &Path) -> Outcome<Monitor> {
    let launch = Launch::new(&context.environment)?.arguments(["--id", id]);
    ticking(context, launch, drive("d", image))
}

fn ticking(context: &Context, launch: Launch, drive: Value) -> Outcome<Monitor> {
    let machine = Machine::unikernel(&context.environment, "do=tick:ms=50,count=1000000").drive(drive);
    let monitor = launch.config(&machine.config())?.start()?;
    monitor.console.wait_for("tick: n=0", SOON)?;
    Ok(monitor)
}

/// The newest record beside an image.
fn record(image: &Path) -> Outcome<String> {
    let prefix = format!(
        "{}.lease.",
        image.file_name().unwrap_or_default().to_string_lossy()
    );
    let mut newest = None;
    for entry in std::fs::read_dir(image.parent().ok_or("an image is in a directory")?)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let number: Option<u64> = name.strip_prefix(&prefix).and_then(|number| number.parse().ok());
        newest = newest.max(number);
    }
    let newest = newest.ok_or("there is no record")?;
    Ok(std::fs::read_to_string(format!(
        "{}.lease.{newest}",
        image.display()
    ))?)
}

fn says(image: &Path, phase: &str, generation: u32) -> Outcome {
    let record = record(image)?;
    ensure!(
        record.contains(&format!("{phase}\n")) && record.contains(&format!("\ngeneration {generation}\n")),
        "not {phase} and generation {generation}:\n{record}"
    );
    Ok(())
}

fn text(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// A machine of QEMU's that has an image and stands still.
struct Qemu(Child);

impl Qemu {
    fn command(image: &Path, readonly: &str) -> Command {
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-accel", "tcg", "-nodefaults", "-display", "none", "-S", "-drive"]);
        command.arg(format!(
            "file={},format=raw,if=none,id=d,readonly={readonly}",
            image.display()
        ));
        command.args(["-device", "virtio-blk-pci,drive=d,romfile="]);
        command.stdin(Stdio::null());
        command
    }

    fn opens(image: &Path, readonly: &str) -> Outcome<Self> {
        let before = locks(image)?;
        let mut qemu = Self(Self::command(image, readonly).spawn()?);
        let deadline = Instant::now() + SOON;
        // It says nothing when it is ready; its locks do, the last of which says that nobody else may write.
        let denials = |locks: &[String]| locks.iter().filter(|lock| lock.ends_with(" 201 201")).count();
        while denials(&locks(image)?) == denials(&before) {
            ensure!(qemu.0.try_wait()?.is_none(), "QEMU has ended");
            ensure!(Instant::now() < deadline, "QEMU takes no lock");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(qemu)
    }
}

/// What the kernel has of locks on an image.
fn locks(image: &Path) -> Outcome<Vec<String>> {
    let inode = std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(image)?);
    let all = std::fs::read_to_string("/proc/locks")?;
    let ours = all.lines().filter(|line| line.contains(&format!(":{inode} ")));
    Ok(ours.map(|line| line.trim_end().to_owned()).collect())
}

/// Waits until the locks of a killed monitor have fallen: the kernel takes its rings down a moment after it.
fn is_unlocked(image: &Path) -> Outcome {
    let deadline = Instant::now() + SOON;
    while !locks(image)?.is_empty() {
        ensure!(Instant::now() < deadline, "still locked: {:?}", locks(image)?);
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // Both fail only when the process is gone already, which is what is wanted.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// A block device with a file behind it, which goes away with the test.
struct LoopDevice(PathBuf);

impl LoopDevice {
    fn of(file: &Path) -> Outcome<Self> {
        let made = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(file)
            .output()?;
        ensure!(made.status.success(), "losetup: {}", text(&made));
        Ok(Self(PathBuf::from(String::from_utf8(made.stdout)?.trim())))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // It goes at the latest when its last user does.
        drop(Command::new("losetup").arg("--detach").arg(&self.0).status());
    }
}
