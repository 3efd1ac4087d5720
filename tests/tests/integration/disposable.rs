//! Commands in guests that are made for them.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

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
        name: "a_guest_whose_coraclectl_is_ended_or_killed_is_gone",
        need: Need::Kvm,
        run: killed,
    },
    Case {
        name: "a_guest_that_cannot_be_made_is_an_error_that_says_what_to_do",
        need: Need::Kvm,
        run: refused,
    },
];

const SOON: Duration = Duration::from_secs(60);

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
        fs::create_dir_all(image.join("bin"))?;
        fs::create_dir(image.join("srv"))?;
        fs::copy("/bin/busybox", image.join("bin/busybox"))?;
        for applet in ["sh", "cat", "ls"] {
            symlink("busybox", image.join("bin").join(applet))?;
        }
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
        let script = "cat > result; echo $A; ls; echo wrong >&2; exit 7";
        let words = [
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
        ensure!(output.stdout == b"b c\nresult\n", "{output:?}");
        ensure!(
            fs::read(place.path("out"))? == b"input",
            "another result was copied"
        );
        ensure!(
            !Path::new(&image).join("srv/result").exists(),
            "the image was written to"
        );
        place.nothing_is_left()?;
    }
    Ok(())
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
    // Whoever looks next removes what it could not.
    let looked = Command::new(&context.environment.coraclectl)
        .arg("ps")
        .env("XDG_RUNTIME_DIR", place.directory.path())
        .output()?;
    ensure!(looked.status.success(), "{looked:?}");
    place.nothing_is_left()
}

/// One whose guest has started to boot.
fn begun(place: &Place<'_>) -> Outcome<Child> {
    let mut child = place
        .in_linux(&["--name=d", &place.image(), "--", "sh"])
        .stderr(Stdio::null())
        .spawn()?;
    let begun = Instant::now();
    while !place.path("coracle/d/vsock").exists() {
        ensure!(begun.elapsed() < SOON, "its guest has not started");
        ensure!(child.try_wait()?.is_none(), "it has ended");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(child)
}

fn refused(context: &Context) -> Outcome {
    let place = Place::new(context)?;
    let image = place.image();
    says(
        &place.in_linux(&[&image]).output()?,
        "coraclectl run IMAGE -- COMMAND",
        125,
    )?;
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
