//! Commands in a real Linux and files for it, by the agent in it.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use coracle_tests::case::{Case, Context};
use coracle_tests::environment::Need;
use coracle_tests::guest::{Linux, Machine};
use coracle_tests::monitor::{Launch, Monitor};
use coracle_tests::{Outcome, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use super::snapshot::{Files, killed, saved, started, with};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "commands_in_linux_have_their_input_their_outputs_and_their_status",
        need: Need::Kvm,
        run: commands,
    },
    Case {
        name: "files_go_into_linux_and_come_out_of_it",
        need: Need::Kvm,
        run: files,
    },
    Case {
        name: "an_agent_that_is_not_there_is_an_error_that_says_what_to_do",
        need: Need::Kvm,
        run: no_agent,
    },
];

/// A boot takes ten seconds where kernel code is emulated, and each program half a second.
const END_WITHIN: Duration = Duration::from_secs(240);
const LISTENS: &str = "coracle-agent listens";

/// A Linux whose agent listens.
fn linux(context: &Context, directory: &Path) -> Outcome<Monitor> {
    let machine = Linux::read(&context.environment)?
        .machine("smp", directory, "agent")?
        .part(
            "vsock",
            json!({ "guest_cid": 52, "uds_path": directory.join("test-v") }),
        );
    let monitor = started(context, &machine.config())?;
    monitor.console.wait_for(LISTENS, END_WITHIN)?;
    Ok(monitor)
}

/// `coraclectl` with the machine's socket in place of `VM`.
fn ctl(context: &Context, monitor: &Monitor, words: &[&str]) -> Command {
    let socket = monitor.socket().display().to_string();
    let mut command = Command::new(&context.environment.coraclectl);
    command.args(words.iter().map(|word| word.replace("VM", &socket)));
    command
}

fn does(context: &Context, monitor: &Monitor, words: &[&str]) -> Outcome<Output> {
    Ok(ctl(context, monitor, words).stdin(Stdio::null()).output()?)
}

/// What it has written, and with which status it has ended.
fn told(output: &Output) -> (String, String, Option<i32>) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr), output.status.code())
}

fn says(output: &Output, stdout: &str, stderr: &str, status: i32) -> Outcome {
    let (out, err, code) = told(output);
    ensure!(
        out == stdout && err.contains(stderr) && code == Some(status),
        "not {stdout:?}, {stderr:?}, {status}: {out:?}, {err:?}, {code:?}"
    );
    Ok(())
}

fn commands(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let monitor = linux(context, directory.path())?;
    let script = "echo $A; pwd; echo wrong >&2; exit 7";
    let words = ["exec", "--env", "A=b c", "-C", "/tmp", "VM", "sh", "-c", script];
    says(&does(context, &monitor, &words)?, "b c\n/tmp\n", "wrong\n", 7)?;
    says(
        &does(context, &monitor, &["exec", "VM", "--", "no-such-thing"])?,
        "",
        "cannot run no-such-thing",
        127,
    )?;
    says(
        &does(context, &monitor, &["exec", "VM", "/tmp"])?,
        "",
        "cannot run /tmp",
        126,
    )?;

    // One that ends before its input has been heard to its end.
    let endless = format!(
        "yes | {} exec $0 head -n 1",
        context.environment.coraclectl.display()
    );
    for _ in 0..3 {
        let ended = Command::new("sh")
            .arg("-c")
            .arg(&endless)
            .arg(monitor.socket())
            .output()?;
        says(&ended, "y\n", "", 0)?;
    }

    // What is piped in comes out, all of it and in order.
    let mut seed = context.seed.clone();
    let content: Vec<u8> = (0..40_000).flat_map(|_| seed.draw().to_le_bytes()).collect();
    let mut cat = ctl(context, &monitor, &["exec", "VM", "cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut input = cat.stdin.take().ok_or("it has an input")?;
    let sent = content.clone();
    let sender = std::thread::spawn(move || input.write_all(&sent));
    let output = cat.wait_with_output()?;
    sender.join().map_err(|_| "a thread has panicked")??;
    ensure!(
        output.status.success() && output.stdout == content,
        "{} bytes came back, {:?}",
        output.stdout.len(),
        output.status
    );

    ended_from_outside(context, &monitor)?;
    goes_on_in_a_clone(context, directory.path(), monitor)
}

fn ended_from_outside(context: &Context, monitor: &Monitor) -> Outcome {
    // A signal for the client is the command's.
    let mut waits = ctl(
        context,
        monitor,
        &["exec", "VM", "sh", "-c", "echo begun; sleep 1000"],
    )
    .stdin(Stdio::null())
    .stdout(Stdio::piped())
    .spawn()?;
    await_line(&mut waits)?;
    kill_process(Pid::from_child(&waits), Signal::TERM)?;
    ensure!(waits.wait()?.code() == Some(143), "it was not ended by SIGTERM");

    // What it writes until it has ended is waited for.
    let script = "trap 'sleep 7; echo bye; exit 3' TERM; echo begun; while :; do sleep 1; done";
    let mut slow = ctl(context, monitor, &["exec", "VM", "sh", "-c", script])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    await_line(&mut slow)?;
    kill_process(Pid::from_child(&slow), Signal::TERM)?;
    says(&slow.wait_with_output()?, "bye\n", "", 3)?;

    // One whose output nobody reads hears a signal all the same.
    let mut stuck = ctl(context, monitor, &["exec", "VM", "yes"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let begun = Instant::now();
    std::thread::sleep(Duration::from_secs(2));
    kill_process(Pid::from_child(&stuck), Signal::TERM)?;
    let status = loop {
        std::thread::sleep(Duration::from_millis(100));
        if let Some(status) = stuck.try_wait()? {
            break status;
        }
        ensure!(begun.elapsed() < END_WITHIN, "it hears no signal");
    };
    ensure!(status.code() == Some(143), "{status}");

    // A client that is killed takes its command along, and what that has started.
    let left = "sleep 1000 & sleep 1000; wait";
    let mut killed = ctl(
        context,
        monitor,
        &["exec", "VM", "sh", "-c", &format!("echo begun; {left}")],
    )
    .stdin(Stdio::null())
    .stdout(Stdio::piped())
    .spawn()?;
    await_line(&mut killed)?;
    killed.kill()?;
    killed.wait()?;
    let begun = Instant::now();
    loop {
        let words = ["exec", "VM", "sh", "-c", "ps | grep -c '[s]leep 1000'"];
        let (count, _, _) = told(&does(context, monitor, &words)?);
        if count == "0\n" {
            break;
        }
        ensure!(begun.elapsed() < END_WITHIN, "still there: {count}");
    }
    Ok(())
}

/// The agent of a guest that was saved answers where it is loaded.
fn goes_on_in_a_clone(context: &Context, directory: &Path, monitor: Monitor) -> Outcome {
    let files = Files::in_directory(directory, "test-exec");
    saved(&monitor, &files, "Full")?;
    says(
        &does(context, &monitor, &["exec", "VM", "true"])?,
        "",
        "is paused, and nothing in its guest answers: coraclectl resume",
        125,
    )?;
    killed(monitor)?;
    let second = Launch::new(&context.environment)?.start()?;
    let moved = json!({ "uds_path": directory.join("test-w") });
    let load = with(files.load("lazy"), "", "vsock_override", moved);
    second.must("PUT", "/snapshot/load", Some(&load))?;
    says(
        &does(context, &second, &["exec", "VM", "echo", "again"])?,
        "again\n",
        "",
        0,
    )
}

fn await_line(child: &mut Child) -> Outcome {
    let stdout = child.stdout.as_mut().ok_or("it has an output")?;
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line)?;
    ensure!(line == "begun\n", "{line:?}");
    Ok(())
}

fn files(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let monitor = linux(context, directory.path())?;
    let tree = directory.path().join("tree");
    fs::create_dir_all(tree.join("sub"))?;
    let mut seed = context.seed.clone();
    let content: Vec<u8> = (0..30_000).flat_map(|_| seed.draw().to_le_bytes()).collect();
    fs::write(tree.join("sub/content"), &content)?;
    fs::write(tree.join("script"), "#!/bin/sh\necho it runs\n")?;
    fs::set_permissions(tree.join("script"), fs::Permissions::from_mode(0o755))?;
    symlink("sub/content", tree.join("link"))?;
    let text = |path: &Path| path.display().to_string();
    let vm = text(&monitor.socket());
    let copy = |from: &str, to: &str| does(context, &monitor, &["cp", "--vm", &vm, from, to]);

    says(&copy(&text(&tree), ":/tmp")?, "", "", 0)?;
    says(
        &does(context, &monitor, &["exec", "VM", "/tmp/tree/script"])?,
        "it runs\n",
        "",
        0,
    )?;
    says(&copy(&text(&tree), ":/tmp")?, "", "is there and is no file", 1)?;
    says(
        &copy(&text(&tree.join("script")), ":/no/where")?,
        "",
        "no directory /no",
        1,
    )?;

    // The reason is told also where much was still to come.
    let much = directory.path().join("much");
    fs::write(&much, content.repeat(20))?;
    says(&copy(&text(&much), ":/no/where")?, "", "no directory /no", 1)?;

    let back = directory.path().join("back");
    says(&copy(":/tmp/tree", &text(&back))?, "", "", 0)?;
    ensure!(
        fs::read(back.join("sub/content"))? == content
            && fs::read_link(back.join("link"))? == Path::new("sub/content"),
        "another tree has come back"
    );
    ensure!(
        fs::metadata(back.join("script"))?.permissions().mode() & 0o777 == 0o755,
        "its mode is lost"
    );
    says(&copy(":/tmp/none", &text(&back))?, "", "cannot read /tmp/none", 1)?;
    // A file that says it is empty may have something.
    let version = directory.path().join("version");
    says(&copy(":/proc/version", &text(&version))?, "", "", 0)?;
    let told = fs::read_to_string(&version)?;
    ensure!(told.starts_with("Linux version "), "{told:?}");
    // What cannot be read to its end is not there at all.
    let script = "mkdir /tmp/odd && cp /tmp/tree/script /tmp/odd/a && mkfifo /tmp/odd/b";
    says(
        &does(context, &monitor, &["exec", "VM", "sh", "-c", script])?,
        "",
        "",
        0,
    )?;
    says(
        &copy(":/tmp/odd", &text(&back))?,
        "",
        "/tmp/odd/b is neither a file",
        1,
    )?;
    says(&copy("one", "two")?, "", "one of the two paths is the guest's", 1)?;
    ensure!(
        fs::read_dir(&back)?.count() == 3,
        "something is left in {}",
        back.display()
    );
    killed(monitor)
}

fn no_agent(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let machine = Machine::unikernel(&context.environment, "do=tick:ms=10,count=1000000");
    let begun = Instant::now();
    says(
        &Command::new(&context.environment.coraclectl)
            .args(["exec", "--wait", "1", "no-such-machine-here", "true"])
            .output()?,
        "",
        "no machine named no-such-machine-here is running",
        125,
    )?;
    ensure!(
        begun.elapsed() >= Duration::from_secs(1),
        "a machine that may come is not waited for"
    );
    let bare = started(context, &machine.config())?;
    says(
        &does(context, &bare, &["exec", "VM", "true"])?,
        "",
        "has no vsock device",
        125,
    )?;
    let path = directory.path().join("test-v");
    let machine = machine.part("vsock", json!({ "guest_cid": 52, "uds_path": path }));
    let deaf = started(context, &machine.config())?;
    says(
        &does(context, &deaf, &["exec", "VM", "true"])?,
        "",
        "nobody answers on vsock port 1023",
        125,
    )?;
    says(
        &does(
            context,
            &deaf,
            &["cp", "--wait", "1", "--vm", "VM", "/etc/passwd", ":/tmp"],
        )?,
        "",
        "--wait SECONDS",
        1,
    )?;
    Ok(())
}
