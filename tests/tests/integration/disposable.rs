//! Commands in guests that are made for them.

use std::collections::HashSet;
use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use coracle_tests::case::{Case, Context};
use coracle_tests::environment::Need;
use coracle_tests::guest::{Linux, unikernel_words};
use coracle_tests::process::processes_with;
use coracle_tests::{Outcome, ensure};
use rustix::process::{Pid, Signal, kill_process};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "a_command_in_a_guest_of_its_own_leaves_its_outputs_and_nothing_else",
        need: Need::Kvm,
        run: a_command,
    },
    Case {
        name: "guests_that_begin_with_a_warm_snapshot_have_their_own_image_time_and_random_numbers",
        need: Need::Kvm,
        run: warm,
    },
    Case {
        name: "a_guest_whose_coraclectl_is_ended_or_killed_is_gone",
        need: Need::Kvm,
        run: killed,
    },
    Case {
        name: "a_command_that_hears_no_signal_is_given_up_in_time",
        need: Need::Kvm,
        run: given_up,
    },
    Case {
        name: "a_guest_that_cannot_be_made_is_an_error_that_says_what_to_do",
        need: Need::Kvm,
        run: refused,
    },
];

const SOON: Duration = Duration::from_secs(60);
/// How far a guest's clock may be from its host's, which is looked at later.
const CLOCK_S_MAX: u64 = 15;
/// The same, right away.
const COLD_CLOCK_S_MAX: u64 = 6;

/// Where a test keeps what it makes, with a directory that is an image.
struct Place<'a> {
    context: &'a Context,
    directory: tempfile::TempDir,
    kernel: Vec<String>,
}

impl Place<'_> {
    fn new(context: &Context) -> Outcome<Place<'_>> {
        let directory = tempfile::tempdir()?;
        let image = directory.path().join("image");
        root_in(&image)?;
        let scratch = tempfile::tempdir()?;
        let config = Linux::read(&context.environment)?
            .machine("smp", scratch.path(), "nothing")?
            .config();
        let text = |pointer: &str| config.pointer(pointer).and_then(|value| value.as_str());
        let kernel = text("/boot-source/kernel_image_path").ok_or("it has a kernel")?;
        let arguments = text("/boot-source/boot_args").unwrap_or_default();
        let arguments = arguments
            .split_once(" -- ")
            .map_or(arguments, |(kernel, _)| kernel);
        let mut words = vec![format!("--kernel={kernel}"), format!("--cmdline={arguments}")];
        if let Some(template) = config.get("cpu-config") {
            let path = directory.path().join("template.json");
            fs::write(&path, template.to_string())?;
            words.push(format!("--cpu-template={}", path.display()));
        }
        Ok(Place {
            context,
            directory,
            kernel: words,
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn image(&self) -> String {
        self.path("image").display().to_string()
    }

    /// `coraclectl run` with these words behind what says which programs there are.
    fn run(&self, words: &[&str]) -> Command {
        let environment = &self.context.environment;
        let mut command = Command::new(&environment.coraclectl);
        command.arg("run").arg("--monitor").arg(&environment.coracle);
        command.args(words);
        command
            .env("XDG_RUNTIME_DIR", self.directory.path())
            .env("CORACLE_AGENT", &environment.agent)
            .current_dir(self.directory.path())
            .stdin(Stdio::null());
        command
    }

    fn in_linux(&self, words: &[&str]) -> Command {
        let kernel: Vec<&str> = self.kernel.iter().map(String::as_str).collect();
        self.run(&[&kernel, words].concat())
    }

    /// Whoever looks removes what one that was killed could not.
    fn is_looked_at(&self) -> Outcome {
        let looked = Command::new(&self.context.environment.coraclectl)
            .arg("ps")
            .env("XDG_RUNTIME_DIR", self.directory.path())
            .output()?;
        ensure!(looked.status.success(), "{looked:?}");
        Ok(())
    }

    /// No process of the machine, and none of what it was made of.
    fn nothing_is_left(&self) -> Outcome {
        let here = self.directory.path().display().to_string();
        let running = processes_with(&here)?;
        ensure!(running.is_empty(), "{running:?} run on");
        let runtime = self.path("coracle");
        let left = fs::read_dir(&runtime).map_or(0, Iterator::count);
        ensure!(left == 0, "{left} things are left in {}", runtime.display());
        Ok(())
    }
}

fn says(output: &Output, words: &str, status: i32) -> Outcome {
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.code() == Some(status) && said.contains(words),
        "not {words:?} and {status}: {output:?}"
    );
    Ok(())
}

fn a_command(context: &Context) -> Outcome {
    let place = Place::new(context)?;
    let image = place.image();
    for _ in 0..context.count(1, 50) {
        let script = "cat > result; busybox date +%s; echo $A; ls; echo kept > /dev/pmem0; \
                      echo wrong >&2; exit 7";
        fs::File::create(place.path("memory"))?.set_len(16 << 20)?;
        let words = [
            "--pmem=memory",
            "--copy-out=/srv/none",
            "--copy-out=/srv/result:out",
            "-C",
            "/srv",
            "--env=A=b c",
            &image,
            "--",
            "sh",
            "-c",
            script,
        ];
        let mut child = place
            .in_linux(&words)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let mut input = child.stdin.take().ok_or("it has an input")?;
        input.write_all(b"input")?;
        drop(input);
        let output = child.wait_with_output()?;
        says(&output, "wrong\n", 7)?;
        // What cannot be copied hides no status of the command.
        says(&output, "cannot read /srv/none", 7)?;
        let now = unix_s()?;
        let told = String::from_utf8(output.stdout.clone())?;
        let (time, rest) = told.split_once('\n').ok_or("it says the time")?;
        ensure!(rest == "b c\nresult\n", "{output:?}");
        // Of the boot, which takes longer, nothing is missing.
        ensure!(
            now.abs_diff(time.parse()?) < COLD_CLOCK_S_MAX,
            "{time}: now is {now}"
        );
        ensure!(
            fs::read(place.path("out"))? == b"input",
            "another result was copied"
        );
        ensure!(
            !Path::new(&image).join("srv/result").exists(),
            "the image was written to"
        );
        ensure!(
            fs::read(place.path("memory"))?.starts_with(b"kept\n"),
            "what was written to persistent memory is lost"
        );
        place.nothing_is_left()?;
    }
    Ok(())
}

/// What a guest says of random numbers, of the time, and of its image.
#[derive(Debug)]
struct Told {
    random: String,
    unix_s: u64,
    image: String,
}

impl Told {
    fn of(output: &Output) -> Outcome<Self> {
        says(output, "", 0)?;
        let text = String::from_utf8(output.stdout.clone())?;
        let [random, unix_s, image] = text.lines().collect::<Vec<_>>()[..] else {
            return Err(format!("{output:?}").into());
        };
        Ok(Self {
            random: random.to_owned(),
            unix_s: unix_s.parse()?,
            image: image.to_owned(),
        })
    }
}

fn unix_s() -> Outcome<u64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs())
}

fn warm(context: &Context) -> Outcome {
    let place = Place::new(context)?;
    let other = place.path("other");
    root_in(&other)?;
    fs::write(other.join("srv/other"), "")?;
    fs::write(place.path("image/srv/first"), "")?;
    let kept = format!("--warm={}", place.path("warm").display());
    let asks = |words: &[&str], image: &Path| {
        let script = "cat /proc/sys/kernel/random/uuid; busybox date +%s; ls /srv";
        let image = image.display().to_string();
        let words = [&[kept.as_str()], words, &[&image, "--", "sh", "-c", script]].concat();
        let mut command = place.in_linux(&words);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    };
    // Who makes the snapshot is killed, and whoever comes next makes it.
    let mut killed = asks(&[], &other).spawn()?;
    let warming = format!("coracle/warm-{}/vsock", killed.id());
    starts(&mut killed, &place.path(&warming))?;
    killed.kill()?;
    killed.wait()?;

    // Of two at a time one makes it.
    let first = asks(&[], &place.path("image")).spawn()?;
    let second = asks(&[], &other).spawn()?;
    let mut told = vec![
        Told::of(&first.wait_with_output()?)?,
        Told::of(&second.wait_with_output()?)?,
    ];
    // A file system in a partition, of which the kernel in the snapshot has not heard.
    let partitioned = partitioned(&place, &other)?;
    let begun = Instant::now();
    told.push(Told::of(
        &asks(&["--root-device=/dev/vda1"], &partitioned).output()?,
    )?);
    println!("{:?} from a warm snapshot", begun.elapsed());

    let now = unix_s()?;
    for (told, image) in told.iter().zip(["first", "other", "other"]) {
        ensure!(told.image == image, "{told:?}: not the image {image}");
        ensure!(told.unix_s.abs_diff(now) < CLOCK_S_MAX, "{told:?}: now is {now}");
    }
    let drawn: HashSet<&String> = told.iter().map(|told| &told.random).collect();
    ensure!(drawn.len() == told.len(), "{told:?}");
    // One has booted for all.
    let made = fs::read_dir(place.path("warm"))?.count();
    ensure!(made == 1, "{made} snapshots were made");

    // Of one that is damaged its name is told.
    for entry in fs::read_dir(place.path("warm"))? {
        fs::write(entry?.path().join("state"), "nothing")?;
    }
    let damaged = asks(&[], &other).output()?;
    says(&damaged, "which is made anew once it is removed", 125)?;
    place.is_looked_at()?;
    place.nothing_is_left()
}

/// Makes a directory with what a root needs for a command.
fn root_in(directory: &Path) -> Outcome {
    fs::create_dir_all(directory.join("bin"))?;
    fs::create_dir(directory.join("srv"))?;
    fs::copy("/bin/busybox", directory.join("bin/busybox"))?;
    for applet in ["sh", "cat", "ls"] {
        symlink("busybox", directory.join("bin").join(applet))?;
    }
    Ok(())
}

/// A disk whose only partition has the files of a directory.
fn partitioned(place: &Place<'_>, files: &Path) -> Outcome<PathBuf> {
    const FIRST_SECTOR: u32 = 2048;
    const SECTORS: u32 = 64 << 11;
    let (system, path) = (place.path("system"), place.path("disk"));
    fs::File::create(&system)?.set_len(u64::from(SECTORS) * 512)?;
    let made = Command::new("mke2fs")
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .args(["-q", "-t", "ext4", "-d"])
        .args([files, &system])
        .status()?;
    ensure!(made.success(), "mke2fs: {made}");
    // The first entry of a master boot record: its type, where it begins, how long it is.
    let mut disk = vec![0; 446];
    disk.extend([0, 0, 0, 0, 0x83, 0, 0, 0]);
    disk.extend(FIRST_SECTOR.to_le_bytes());
    disk.extend(SECTORS.to_le_bytes());
    disk.resize(510, 0);
    disk.extend([0x55, 0xaa]);
    disk.resize(usize::try_from(FIRST_SECTOR)? * 512, 0);
    disk.extend(fs::read(&system)?);
    fs::write(&path, disk)?;
    Ok(path)
}

fn killed(context: &Context) -> Outcome {
    let place = Place::new(context)?;
    // Asked to end while its guest boots, it does at once, as who was ended by that.
    let mut child = begun(&place)?;
    kill_process(Pid::from_child(&child), Signal::TERM)?;
    ensure!(child.wait()?.code() == Some(143), "it was not ended by SIGTERM");
    place.nothing_is_left()?;

    let mut child = begun(&place)?;
    child.kill()?;
    child.wait()?;
    let begun = Instant::now();
    let here = place.directory.path().display().to_string();
    while !processes_with(&here)?.is_empty() {
        ensure!(begun.elapsed() < SOON, "its monitor runs on");
        std::thread::sleep(Duration::from_millis(5));
    }
    place.is_looked_at()?;
    place.nothing_is_left()
}

/// The last line is an object that says why it was stopped.
fn says_why(output: &Output, why: &str, status: i32) -> Outcome {
    says(output, "", status)?;
    let said = String::from_utf8(output.stderr.clone())?;
    let last: serde_json::Value = serde_json::from_str(said.lines().last().unwrap_or_default())?;
    let is = |name: &str, value: &serde_json::Value| last.get(name) == Some(value);
    ensure!(
        is("ended", &"stopped".into()) && is("stopped_by", &why.into()) && is("status", &status.into()),
        "{said}"
    );
    Ok(())
}

fn given_up(context: &Context) -> Outcome {
    let place = Place::new(context)?;
    let image = place.image();
    let deaf = ["--stop-timeout=1", "--json", &image, "--", "sh", "-c"];
    let script = "trap '' TERM; echo up; while :; do busybox sleep 1; done";
    let mut child = place
        .in_linux(&[&deaf[..], &[script]].concat())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut up = [0; 3];
    child
        .stdout
        .as_mut()
        .ok_or("it has an output")?
        .read_exact(&mut up)?;
    kill_process(Pid::from_child(&child), Signal::TERM)?;
    says_why(&child.wait_with_output()?, "signal", 143)?;
    place.nothing_is_left()?;

    // Whether its guest has booted by then or not.
    let late = place
        .in_linux(&[&["--timeout=15"], &deaf[..], &[script]].concat())
        .output()?;
    says_why(&late, "timeout", 124)?;
    place.nothing_is_left()
}

/// One whose guest has started to boot.
fn begun(place: &Place<'_>) -> Outcome<Child> {
    let mut child = place
        .in_linux(&["--name=d", &place.image(), "--", "sh"])
        .stderr(Stdio::null())
        .spawn()?;
    starts(&mut child, &place.path("coracle/d/vsock"))?;
    Ok(child)
}

/// Waits until a guest has started whose device has this socket.
fn starts(child: &mut Child, vsock: &Path) -> Outcome {
    let begun = Instant::now();
    while !vsock.exists() {
        ensure!(begun.elapsed() < SOON, "its guest has not started");
        ensure!(child.try_wait()?.is_none(), "it has ended");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn refused(context: &Context) -> Outcome {
    let place = Place::new(context)?;
    let image = place.image();
    says(
        &place.in_linux(&[&image]).output()?,
        "coraclectl run IMAGE -- COMMAND",
        125,
    )?;
    fs::write(place.path("odd"), [1; 100])?;
    let odd = place.in_linux(&["odd", "--", "true"]).output()?;
    says(&odd, "no multiple of 512", 125)?;
    let device = place.in_linux(&["/dev/null", "--", "true"]).output()?;
    says(&device, "/dev/null is no image", 125)?;
    let none = place.in_linux(&["none", "--", "true"]).output()?;
    says(&none, "cannot read the image none", 125)?;
    let unikernel = context.environment.unikernel.display().to_string();
    let cmdline = format!("--cmdline={}", unikernel_words("do=hello do=exit:status=3"));
    let words = ["--kernel", &unikernel, &cmdline, &image, "--", "true"];
    let ended = place.run(&words).output()?;
    says(&ended, "the guest has ended before its agent was there", 125)?;
    says(&ended, "guest's console: hello from", 125)?;
    let disk = format!("--disk={image}/bin/busybox,id=image");
    let words = ["--kernel", &unikernel, &disk, &image, "--", "true"];
    says(&place.run(&words).output()?, "two disks have the id image", 125)?;
    let words = ["--kernel", &unikernel, "--agent=none", &image, "--", "true"];
    says(&place.run(&words).output()?, "cannot read the agent none", 125)?;
    place.nothing_is_left()
}
