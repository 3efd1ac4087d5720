//! A monitor under test: started, asked, watched, and gone at the end of the test whatever happens.

use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::Outcome;
use crate::console::Console;
use crate::environment::Environment;
use crate::http::{Answer, Connection};
use crate::jailing::{Jailing, Wish};
use crate::process::Process;

/// How long a monitor may take from its start to its API's first answer, on a busy machine.
const READY_SECONDS_MAX: u64 = 20;

/// Distinguishes the directories of this process.
static NEXT_DIRECTORY: AtomicU64 = AtomicU64::new(0);

/// How to start a monitor.
#[derive(Debug)]
pub struct Launch {
    /// How it is put into a jail, if this run has its monitors there.
    jailing: Option<Jailing>,
    program: PathBuf,
    before: Vec<String>,
    arguments: Vec<String>,
    directory: tempfile::TempDir,
    has_socket: bool,
    has_log: bool,
}

/// A running monitor. Dropping it kills the process and removes its directory.
#[derive(Debug)]
pub struct Monitor {
    child: Child,
    input: Option<ChildStdin>,
    /// Standard output: the guest's serial port.
    pub console: Console,
    /// Standard error: warnings and the reason of the end.
    pub errors: Console,
    kept: Kept,
}

/// Directories of a monitor, which go away with this value.
#[derive(Debug)]
pub struct Kept {
    directory: tempfile::TempDir,
    /// Where its jail is, if it is in one of this run.
    _jail: Option<tempfile::TempDir>,
}

/// How a monitor ended.
#[derive(Debug)]
pub struct Ended {
    /// The status of the process.
    pub status: ExitStatus,
    /// All that it wrote to standard output.
    pub console: String,
    /// All that it wrote to standard error.
    pub errors: String,
    /// What is left in its directory, the names that the test put there aside.
    pub left_behind: Vec<String>,
}

impl Launch {
    /// A monitor with an API socket in a directory of its own.
    ///
    /// # Errors
    ///
    /// When the directory cannot be made.
    pub fn new(environment: &Environment) -> Outcome<Self> {
        Ok(Self {
            jailing: environment.jailing.clone(),
            ..Self::of(&environment.coracle)?
        })
    }

    /// The same of any program with Firecracker's command line.
    ///
    /// # Errors
    ///
    /// When the directory cannot be made.
    pub fn of(program: &Path) -> Outcome<Self> {
        // In lower case: some clients write the socket's path as the host of a URL, whose case is lost.
        let number = NEXT_DIRECTORY.fetch_add(1, Ordering::Relaxed);
        let name = format!("coracle-test-{}-{number}", std::process::id());
        let directory = tempfile::Builder::new().prefix(&name).rand_bytes(0).tempdir()?;
        Ok(Self {
            jailing: None,
            program: program.into(),
            before: vec![],
            arguments: vec![],
            directory,
            has_socket: true,
            has_log: true,
        })
    }

    /// Any other program, which gets the arguments it is given and no more.
    ///
    /// # Errors
    ///
    /// When the directory cannot be made.
    pub fn bare(program: &Path) -> Outcome<Self> {
        Ok(Self {
            has_log: false,
            ..Self::of(program)?.without_socket()
        })
    }

    /// The directory of this monitor: what a test puts there goes away with it.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Adds arguments.
    #[must_use]
    pub fn arguments<'a>(mut self, arguments: impl IntoIterator<Item = &'a str>) -> Self {
        self.arguments.extend(arguments.into_iter().map(str::to_owned));
        self
    }

    /// Starts the monitor by way of another program, which gets the monitor's command line as its last arguments.
    #[must_use]
    pub fn by_way_of<'a>(mut self, command: impl IntoIterator<Item = &'a str>) -> Self {
        self.before = command.into_iter().map(str::to_owned).collect();
        self
    }

    /// Takes the configuration from a file; the API stays.
    ///
    /// # Errors
    ///
    /// When the file cannot be written.
    pub fn config(mut self, config: &Value) -> Outcome<Self> {
        let mut config = config.clone();
        if let Some(template @ Value::Object(_)) = config.get_mut("cpu-config") {
            // The API takes the template itself, a configuration file its path.
            let path = self.directory().join("test-cpu-template.json");
            std::fs::write(&path, template.to_string())?;
            *template = Value::String(path.display().to_string());
        }
        let path = self.directory().join("config.json");
        std::fs::write(&path, config.to_string())?;
        self.arguments
            .extend(["--config-file".to_owned(), path.display().to_string()]);
        Ok(self)
    }

    /// Another program than the one that is tested: a copy of it, say.
    #[must_use]
    pub fn program(mut self, program: &Path) -> Self {
        program.clone_into(&mut self.program);
        self
    }

    /// No API.
    #[must_use]
    pub fn without_api(self) -> Self {
        self.without_socket().arguments(["--no-api"])
    }

    /// No API socket of its own: the arguments say what there is instead.
    #[must_use]
    pub fn without_socket(mut self) -> Self {
        self.has_socket = false;
        self
    }

    /// The command that starts the process, for a test that has pipes of its own, and what has to be kept until its end.
    ///
    /// # Errors
    ///
    /// When what it needs cannot be made.
    pub fn command(self) -> Outcome<(Command, Kept)> {
        let socket = self.directory().join("api.sock");
        let mut arguments = vec![];
        if self.has_socket {
            arguments.extend(["--api-sock".to_owned(), socket.display().to_string()]);
        }
        if self.has_log {
            // The log has a file of its own, so that it does not come between the letters of the guest.
            let log = self.directory().join("test-log");
            std::fs::write(&log, "")?;
            // Whoever the monitor runs as.
            std::fs::set_permissions(&log, std::os::unix::fs::PermissionsExt::from_mode(0o666))?;
            arguments.extend(["--log-path".to_owned(), log.display().to_string()]);
        }
        arguments.extend(self.arguments);
        let (words, jail) = match &self.jailing {
            None => {
                let mut words = self.before;
                words.push(self.program.display().to_string());
                words.extend(arguments);
                (words, None)
            }
            Some(jailing) => {
                let jailed = jailing.of(Wish {
                    before: &self.before,
                    program: &self.program,
                    directory: self.directory.path(),
                    arguments,
                })?;
                (jailed.words, Some(jailed.base))
            }
        };
        let (program, arguments) = words.split_first().ok_or("there is a program")?;
        let mut command = Command::new(program);
        command.args(arguments).current_dir(self.directory.path());
        Ok((
            command,
            Kept {
                directory: self.directory,
                _jail: jail,
            },
        ))
    }

    /// Starts the process and waits for nothing.
    ///
    /// # Errors
    ///
    /// When the program cannot be started.
    pub fn spawn(self) -> Outcome<Monitor> {
        let (mut command, kept) = self.command()?;
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| format!("cannot start {}: {e}", command.get_program().display()))?;
        let input = child.stdin.take();
        let console = Console::read(child.stdout.take().ok_or("stdout was asked for")?);
        let errors = Console::read(child.stderr.take().ok_or("stderr was asked for")?);
        Ok(Monitor {
            child,
            input,
            console,
            errors,
            kept,
        })
    }

    /// Starts the process and waits until its API answers.
    ///
    /// # Errors
    ///
    /// When it does not start, ends at once, or stays silent.
    pub fn start(self) -> Outcome<Monitor> {
        let jailing = self.jailing.clone();
        let mut monitor = self.spawn()?;
        let deadline = Instant::now() + Duration::from_secs(READY_SECONDS_MAX);
        while std::os::unix::net::UnixStream::connect(monitor.socket()).is_err() {
            if let Some(status) = monitor.child.try_wait()? {
                return Err(format!("ended at once ({status}): {}", monitor.errors.finish()).into());
            }
            crate::ensure!(Instant::now() < deadline, "no API: {}", monitor.errors.text());
            std::thread::sleep(Duration::from_millis(1));
        }
        if let Some(jailing) = jailing {
            jailing.holds(monitor.process())?;
        }
        Ok(monitor)
    }
}

impl Monitor {
    /// The path of the API socket.
    pub fn socket(&self) -> PathBuf {
        self.kept.directory.path().join("api.sock")
    }

    /// The directory of this monitor.
    pub fn directory(&self) -> &Path {
        self.kept.directory.path()
    }

    /// The process, seen from outside.
    pub fn process(&self) -> Process {
        Process(self.child.id())
    }

    /// What the monitor has logged so far.
    ///
    /// # Errors
    ///
    /// When the file cannot be read.
    pub fn log(&self) -> Outcome<String> {
        Ok(std::fs::read_to_string(self.directory().join("test-log"))?)
    }

    /// A new connection to the API.
    ///
    /// # Errors
    ///
    /// When nobody listens.
    pub fn connect(&self) -> Outcome<Connection> {
        Connection::open(&self.socket())
    }

    /// One request on a connection of its own.
    ///
    /// # Errors
    ///
    /// When there is no answer.
    pub fn request(&self, method: &str, path: &str, body: Option<&Value>) -> Outcome<Answer> {
        self.connect()?
            .request(method, path, body.map(Value::to_string).as_deref())
    }

    /// A request that the monitor must take: 200 or 204.
    ///
    /// # Errors
    ///
    /// When it refuses.
    pub fn must(&self, method: &str, path: &str, body: Option<&Value>) -> Outcome<Answer> {
        let answer = self.request(method, path, body)?;
        crate::ensure!(
            matches!(answer.status, 200 | 204),
            "{method} {path} {}: {} {}",
            body.map(Value::to_string).unwrap_or_default(),
            answer.status,
            answer.body
        );
        Ok(answer)
    }

    /// Configures the machine by one request for each part of a configuration file's content.
    ///
    /// # Errors
    ///
    /// When the monitor refuses a part.
    pub fn configure(&self, config: &Value) -> Outcome {
        let mut parts: Vec<_> = config.as_object().into_iter().flatten().collect();
        // It names network interfaces, which have to be there.
        parts.sort_by_key(|(part, _)| *part == "mmds-config");
        for (part, content) in parts {
            let part = match part.as_str() {
                "mmds-config" => "mmds/config",
                "memory-hotplug" => "hotplug/memory",
                part => part,
            };
            match content {
                Value::Array(items) => {
                    for item in items {
                        let names = ["drive_id", "iface_id", "group_id", "id"];
                        let id = names.iter().find_map(|name| item.get(name)?.as_str());
                        let id = id.unwrap_or_default();
                        self.must("PUT", &format!("/{part}/{id}"), Some(item))?;
                    }
                }
                _ => drop(self.must("PUT", &format!("/{part}"), Some(content))?),
            }
        }
        Ok(())
    }

    /// Starts the machine.
    ///
    /// # Errors
    ///
    /// When the monitor refuses.
    pub fn start_instance(&self) -> Outcome {
        self.must(
            "PUT",
            "/actions",
            Some(&serde_json::json!({ "action_type": "InstanceStart" })),
        )
        .map(drop)
    }

    /// Pauses or resumes: `Paused` or `Resumed`.
    ///
    /// # Errors
    ///
    /// When the monitor refuses.
    pub fn set_state(&self, state: &str) -> Outcome {
        self.must("PATCH", "/vm", Some(&serde_json::json!({ "state": state })))
            .map(drop)
    }

    /// Types bytes on the guest's serial port.
    ///
    /// # Errors
    ///
    /// When the monitor has closed its standard input.
    pub fn type_in(&mut self, bytes: &[u8]) -> Outcome {
        let input = self.input.as_mut().ok_or("standard input is closed")?;
        input.write_all(bytes)?;
        Ok(input.flush()?)
    }

    /// Closes standard input.
    pub fn close_input(&mut self) {
        self.input = None;
    }

    /// Whether the process still runs.
    ///
    /// # Errors
    ///
    /// When the kernel does not know.
    pub fn is_running(&mut self) -> Outcome<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Sends a signal.
    ///
    /// # Errors
    ///
    /// When the process is gone.
    pub fn signal(&self, signal: rustix::process::Signal) -> Outcome {
        let id = rustix::process::Pid::from_child(&self.child);
        Ok(rustix::process::kill_process(id, signal)?)
    }

    /// Waits for the end of the process.
    ///
    /// # Errors
    ///
    /// When the time is over first; then it is killed.
    pub fn wait(mut self, limit: Duration) -> Outcome<Ended> {
        let deadline = Instant::now() + limit;
        let status = loop {
            match self.child.try_wait()? {
                Some(status) => break status,
                None if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(2)),
                None => {
                    let (console, errors) = (self.console.text(), self.errors.text());
                    return Err(format!(
                        "still runs after {limit:?}; console:\n{console}\nerrors:\n{errors}"
                    )
                    .into());
                }
            }
        };
        let ours = ["config.json"];
        let entries = std::fs::read_dir(self.directory())?;
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let left_behind = names
            .filter(|name| !ours.contains(&name.as_str()) && !name.starts_with("test-"))
            .collect();
        Ok(Ended {
            status,
            console: self.console.finish(),
            errors: self.errors.finish(),
            left_behind,
        })
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        // Both fail only when the process is gone already, which is what is wanted.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl Ended {
    /// Checks that the process ended by itself with this status, and left nothing in its directory.
    ///
    /// # Errors
    ///
    /// When not.
    pub fn expect(&self, status: u8) -> Outcome {
        crate::ensure!(
            self.status.code() == Some(i32::from(status)),
            "ended with {:?}, signal {:?}, not {status}; console:\n{}\nerrors:\n{}",
            self.status.code(),
            self.status.signal(),
            self.console,
            self.errors
        );
        crate::ensure!(self.left_behind.is_empty(), "left behind: {:?}", self.left_behind);
        Ok(())
    }
}
