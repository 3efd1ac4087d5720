//! Migrations as a user asks for them: by `coraclectl`.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::Instant;

use coracle_tests::case::{Context, text};
use coracle_tests::guest::blank_image;
use coracle_tests::{Outcome, ensure};
use serde_json::{Value, json};

use super::{PERIOD, SOON};

/// A host with certificates, and the machines of one user on it.
struct Host<'a> {
    context: &'a Context,
    directory: tempfile::TempDir,
}

impl<'a> Host<'a> {
    fn new(context: &'a Context) -> Outcome<Self> {
        let host = Self {
            context,
            directory: tempfile::tempdir()?,
        };
        let made = host.run(&["certs", "init", "certs", "127.0.0.1"])?;
        ensure!(made.status.success(), "{made:?}");
        blank_image(&host.path().join("disk"), 1)?;
        Ok(host)
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    /// A name that no other test has: machines are found by it wherever they are on this host.
    fn named(&self, name: &str) -> String {
        let directory = self.path().file_name().unwrap_or_default();
        let own: String = directory
            .to_string_lossy()
            .chars()
            .filter(char::is_ascii_alphanumeric)
            .collect();
        format!("{name}-{own}")
    }

    fn coraclectl(&self, arguments: &[&str]) -> Command {
        let environment = &self.context.environment;
        let mut command = Command::new(&environment.coraclectl);
        command
            .args(arguments)
            .env("XDG_RUNTIME_DIR", self.path())
            .env("CORACLE_MONITOR", &environment.coracle)
            .current_dir(self.path())
            .stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) -> Outcome<Output> {
        Ok(self.coraclectl(arguments).output()?)
    }

    /// One that goes on until it ends or is dropped; what it says goes to a file that is called `name`.
    fn begin(&self, name: &str, arguments: &[&str]) -> Outcome<Foreground> {
        let file = fs::File::create(self.path().join(name))?;
        let mut command = self.coraclectl(arguments);
        command.stdout(file.try_clone()?).stderr(file);
        Ok(Foreground(command.spawn()?))
    }

    fn said(&self, name: &str) -> Outcome<String> {
        Ok(String::from_utf8_lossy(&fs::read(self.path().join(name))?).into_owned())
    }

    /// The machine `source`, which says so many words to the console.
    fn source(&self, count: u32) -> Outcome<Foreground> {
        self.source_with(count, &[])
    }

    fn source_with(&self, count: u32, more: &[&str]) -> Outcome<Foreground> {
        let kernel = self.context.environment.unikernel.to_string_lossy().into_owned();
        let words = format!("console=ttyS0 do=hello do=tick:ms=20,count={count} do=exit:status=7");
        let arguments = [
            &["run", "--name", "source", "--memory", "32", "--kernel", &kernel][..],
            &["--disk", "disk,noroot", "--cmdline", &words],
            more,
        ];
        let source = self.begin("source", &arguments.concat())?;
        self.until("the guest does not start", || {
            Ok(self.said("source")?.contains("tick: n=1 "))
        })?;
        Ok(source)
    }

    /// Waits for something that comes soon.
    fn until(&self, what: &str, mut has_come: impl FnMut() -> Outcome<bool>) -> Outcome {
        let until = Instant::now() + SOON;
        while !has_come()? {
            ensure!(Instant::now() < until, "{what}");
            thread::sleep(PERIOD);
        }
        Ok(())
    }

    /// Where that machine waits for another, as soon as it does.
    fn listens(&self, vm: &str) -> Outcome<String> {
        let mut listen = String::new();
        self.until("it does not listen", || {
            let status = self.get(vm, "/migration")?;
            let place = status.get("listen").and_then(Value::as_str);
            listen = place.unwrap_or_default().to_owned();
            Ok(!listen.is_empty())
        })?;
        Ok(listen)
    }

    /// What a machine answers to a GET, if it is there.
    fn get(&self, vm: &str, path: &str) -> Outcome<Value> {
        let asked = self.run(&["api", "--vm", vm, "GET", path])?;
        Ok(serde_json::from_slice(&asked.stdout).unwrap_or_default())
    }
}

impl Drop for Host<'_> {
    /// Ends what a test that has failed has left in the background.
    fn drop(&mut self) {
        for name in ["second", "third"] {
            drop(self.run(&["stop", "--force", &self.named(name)]));
        }
    }
}

/// A process that does not outlive the test.
struct Foreground(Child);

impl Foreground {
    fn status(&mut self) -> Outcome<Option<i32>> {
        Ok(self.0.wait()?.code())
    }
}

impl Drop for Foreground {
    fn drop(&mut self) {
        // It may have ended long ago.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// As a user would: certificates, a receiver in the foreground, a machine in the foreground, and a third call that moves it.
pub(super) fn moves_a_machine(context: &Context) -> Outcome {
    let host = Host::new(context)?;
    let mut source = host.source(150)?;
    // The target's host has the disk under another path.
    symlink(host.path(), host.path().join("elsewhere"))?;
    let disk = host.path().join("elsewhere/disk").display().to_string();
    let named = format!("disk0={disk}");
    let arguments = [
        &["receive", "127.0.0.1:0", "--certs", "certs/127.0.0.1"][..],
        &["--name", "target", "--disk", &named],
    ];
    let mut target = host.begin("target", &arguments.concat())?;
    let listen = host.listens("target")?;
    let to = format!("tls://{listen}");
    let may_wait = ["--allow-postcopy", "--postcopy-wait", "60"];
    let arguments = [
        &["migrate", "source", &to, "--certs", "certs/127.0.0.1"][..],
        &may_wait,
    ];
    let sent = host.run(&arguments.concat())?;
    ensure!(sent.status.success(), "{sent:?}");
    let said = String::from_utf8_lossy(&sent.stdout).into_owned();
    ensure!(said.contains(&format!("source runs on at {listen}: ")), "{said}");
    ensure!(!said.contains("of disks"), "{said}");
    let config = host.get("target", "/vm/config")?;
    let found = config.pointer("/drives/0/path_on_host");
    ensure!(found == Some(&json!(disk)), "{config}");
    let (status, first) = (source.status()?, host.said("source")?);
    ensure!(status == Some(0), "the source ended with {status:?}: {first}");
    let (status, second) = (target.status()?, host.said("target")?);
    ensure!(status == Some(7), "the target ended with {status:?}: {second}");
    ensure!(
        first.contains("hello") && second.contains("tick: n=149"),
        "{first} {second}"
    );
    Ok(())
}

/// The disk goes along, and what is left behind of it can be had by whoever says that it is wanted.
pub(super) fn takes_a_disk_along(context: &Context) -> Outcome {
    let host = Host::new(context)?;
    let mut source = host.source(150)?;
    let second = host.named("second");
    let certs = ["--certs", "certs/127.0.0.1"];
    let copied = ["migrate", "source", "--here", &second, "--copy-disk", "disk0"];
    let refused = host.run(&[&copied[..], &certs].concat())?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(
        !refused.status.success() && said.contains("is there already"),
        "{said}"
    );

    let mut target = host.begin(
        "target",
        &[
            &[
                "receive",
                "127.0.0.1:0",
                "--name",
                "target",
                "--disk",
                "disk0=other",
            ][..],
            &certs,
        ]
        .concat(),
    )?;
    let listen = host.listens("target")?;
    let copied = ["migrate", "source", &listen, "--copy-disk", "disk0", "--json"];
    let sent = host.run(&[&copied[..], &certs].concat())?;
    ensure!(sent.status.success(), "{sent:?}");
    let summary: Value = serde_json::from_slice(&sent.stdout)?;
    ensure!(summary.get("disk_bytes").is_some_and(Value::is_u64), "{summary}");
    let ended = [source.status()?, target.status()?];
    ensure!(
        ended == [Some(0), Some(7)],
        "source and target ended with {ended:?}"
    );

    let show = |disk: &str| -> Outcome<String> {
        let shown = host.run(&["lease", "show", disk])?;
        Ok(String::from_utf8_lossy(&shown.stdout).into_owned())
    };
    let (left, copy) = (show("disk")?, show("other")?);
    ensure!(
        left.contains("left behind: its machine was moved elsewhere"),
        "{left}"
    );
    ensure!(copy.contains("released"), "{copy}");
    let broken = host.run(&["lease", "break", "disk"])?;
    let said = String::from_utf8_lossy(&broken.stderr).into_owned();
    ensure!(!broken.status.success() && said.contains("needs a yes"), "{said}");
    let broken = host.run(&["lease", "break", "disk", "--yes"])?;
    ensure!(
        broken.status.success() && show("disk")?.contains("broken"),
        "{broken:?}"
    );
    Ok(())
}

/// On this host, and by a command; one that does not listen, and one that is refused, are not left behind.
pub(super) fn starts_the_receiver(context: &Context) -> Outcome {
    let host = Host::new(context)?;
    let mut source = host.source_with(400, &["--vsock", "first.sock"])?;
    let (second, third) = (host.named("second"), host.named("third"));
    let certs = ["--certs", "certs/127.0.0.1"];
    let failed = |arguments: &[&str], why: &str| -> Outcome {
        let sent = host.run(&[arguments, &certs[..]].concat())?;
        let said = String::from_utf8_lossy(&sent.stderr).into_owned();
        ensure!(
            !sent.status.success() && said.contains(why),
            "{said}, and not {why}"
        );
        Ok(())
    };
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let to = format!("127.0.0.1:{port}");
    failed(
        &[
            "migrate",
            "source",
            &to,
            "--receiver",
            "echo no host of that name; exit 3",
        ],
        "before it listened: no host of that name",
    )?;
    let here = ["migrate", "source", "--here", &second];
    failed(
        &[&here[..], &["--to-name", "host-b"]].concat(),
        "is not of `host-b`",
    )?;
    failed(&here, "first.sock")?;
    failed(
        &["migrate", "source", &to, "--vsock", "second.sock"],
        "are for a receiver that --here starts",
    )?;
    ensure!(
        host.get(&second, "/")? == Value::Null,
        "the receiver was left behind"
    );

    let sent = host.run(&[&here[..], &["--vsock", "second.sock"], &certs].concat())?;
    ensure!(sent.status.success(), "{sent:?}");
    let status = source.status()?;
    ensure!(status == Some(0), "the source ended with {status:?}");

    let program = context.environment.coraclectl.to_string_lossy().into_owned();
    let line = format!("{program} receive {to} --name {third} --certs certs/127.0.0.1 --vsock third.sock");
    let arguments = [
        &["migrate", &second, &to, "--receiver", &line][..],
        &["--receiver-log", "third", "--json"],
        &certs,
    ];
    let sent = host.run(&arguments.concat())?;
    ensure!(sent.status.success(), "{sent:?}");
    let summary: Value = serde_json::from_slice(&sent.stdout)?;
    ensure!(
        summary.get("receiver_log") == Some(&json!("third")) && summary.get("to") == Some(&json!(to)),
        "{summary}"
    );
    let went_on = host.until("the guest does not go on", || {
        Ok(host.said("third")?.contains("tick: n=399"))
    });
    went_on.map_err(|error| {
        let said = host.said("third").unwrap_or_default();
        format!("{}: {said}", text(&error))
    })?;
    ensure!(
        host.said("source.receiver.log")?.contains("tick: "),
        "the second has said nothing"
    );
    host.until("it does not end", || Ok(host.get(&third, "/")? == Value::Null))
}
