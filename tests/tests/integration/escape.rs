//! Ways out of a monitor's jail and past its filters, each tried by a program in the monitor's place: what refuses it, by name.
//!
//! A row says what each thread of a monitor is told, and what a process without filters is told by the jail alone. Outside of a
//! jail the same program must not be told that, or the row would show nothing.

mod landlock;
mod limits;
mod paths;
mod rare;
mod rows;

use std::collections::BTreeMap;
use std::fs;
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use coracle_tests::case::{Case, Context};
use coracle_tests::environment::Need;
use coracle_tests::harness::hosts::Star;
use coracle_tests::harness::jail::{Jail, UID};
use coracle_tests::process::copy_program;
use coracle_tests::{Outcome, ensure};
use serde::Deserialize;
use serde_json::{Value, json};

use self::rows::{Found, PLACES, PROCESSES, ROWS, Row};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "each_way_out_is_refused_by_the_filter_or_the_jail",
        need: Need::KvmAndHosts,
        run: each_way_out,
    },
    Case {
        name: "root_in_a_jail_has_no_way_out_either",
        need: Need::KvmAndHosts,
        run: root_has_no_way_out,
    },
    Case {
        name: "processes_of_the_host_are_out_of_reach_without_a_pid_namespace",
        need: Need::KvmAndRoot,
        run: processes_are_out_of_reach,
    },
    Case {
        name: "limits_hold_for_files_processes_and_memory",
        need: Need::KvmRootAndLimitCgroups,
        run: limits::each_limit,
    },
    Case {
        name: "each_thread_may_do_what_is_rare",
        need: Need::Nothing,
        run: rare::by_each_thread,
    },
    Case {
        name: "what_a_configuration_does_not_name_is_out_of_reach_without_an_api",
        need: Need::Landlock,
        run: landlock::unnamed_files,
    },
    Case {
        name: "a_vcpu_opens_nothing_whatever_its_filter_lets_by",
        need: Need::Landlock,
        run: landlock::threads_that_open_nothing,
    },
    Case {
        name: "paths_of_the_api_lead_only_to_what_is_in_the_jail",
        need: Need::KvmAndRoot,
        run: paths::of_the_api,
    },
];

const SOON: Duration = Duration::from_secs(120);
/// The program that tries.
const ESCAPE: &str = env!("CARGO_BIN_EXE_escape");
/// What a monitor ends with whose filters have refused a call.
const REFUSED: i32 = 148;

/// What a jail must not lead to. It is all there, and anybody may use it who gets there.
struct Outside {
    directory: tempfile::TempDir,
    victim: Child,
    service: TcpListener,
    socket: String,
    _listener: UnixListener,
}

impl Outside {
    fn new() -> Outcome<Self> {
        let directory = tempfile::tempdir()?;
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777))?;
        let secret = directory.path().join("secret");
        fs::write(&secret, "secret")?;
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o666))?;
        lay_links(directory.path(), &secret)?;
        // Users other than root have to get to it.
        copy_program(Path::new(ESCAPE), &directory.path().join("escape"))?;
        let socket = format!("coracle-test-{}", directory.path().display());
        Ok(Self {
            victim: Command::new("sleep").arg("3600").stdin(Stdio::null()).spawn()?,
            service: TcpListener::bind("127.0.0.1:0")?,
            _listener: UnixListener::bind_addr(&SocketAddr::from_abstract_name(&socket)?)?,
            socket,
            directory,
        })
    }

    /// What the program is to try, with the links in `directory`.
    fn task(&self, attempts: &[&str], places: &[&str], directory: &str) -> Outcome<Value> {
        Ok(json!({
            "attempts": attempts,
            "places": places,
            "pid": self.victim.id(),
            "port": self.service.local_addr()?.port(),
            "socket": self.socket,
            "secret": self.directory.path().join("secret"),
            "directory": directory,
        }))
    }

    /// What `attempts` come to outside of a jail, where there is no filter.
    fn found_here(&self, attempts: &[&str], by_way_of: &[&str]) -> Outcome<Outcomes> {
        let here = self.directory.path().display().to_string();
        let task = self.task(attempts, &["bare"], &here)?.to_string();
        let program = self.directory.path().join("escape");
        let (first, rest) = by_way_of.split_first().ok_or("there is a program")?;
        let output = Command::new(first).args(rest).arg(program).arg(task).output()?;
        let Output {
            status,
            stdout,
            stderr,
        } = output;
        ensure!(status.success(), "{status}: {}", String::from_utf8_lossy(&stderr));
        read(&String::from_utf8(stdout)?)
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        // Both fail only when it is gone.
        drop(self.victim.kill());
        drop(self.victim.wait());
    }
}

/// A link to the secret by its name, and one by many steps upwards.
fn lay_links(directory: &Path, secret: &Path) -> Outcome {
    symlink(secret, directory.join("link"))?;
    let up = "../".repeat(16);
    Ok(symlink(
        format!("{up}.{}", secret.display()),
        directory.join("dots"),
    )?)
}

/// A line of the program's.
#[derive(Debug, Deserialize)]
struct Line {
    attempt: String,
    place: String,
    status: Option<i32>,
    signal: Option<i32>,
    said: String,
}

/// What has come of each attempt at each place.
type Outcomes = BTreeMap<(String, String), Found>;

fn read(lines: &str) -> Outcome<Outcomes> {
    let mut found = BTreeMap::new();
    for line in lines.lines().filter(|line| line.starts_with('{')) {
        let line: Line = serde_json::from_str(line)?;
        let outcome = Found::of(&line);
        let is_new = found.insert((line.attempt, line.place), outcome).is_none();
        ensure!(is_new, "an attempt is made twice");
    }
    Ok(found)
}

/// What the attempts come to in a jail with these flags.
fn found_in_jail(
    context: &Context,
    outside: &Outside,
    rows: &[&Row],
    shape: impl FnOnce(Jail) -> Jail,
) -> Outcome<BTreeMap<(String, String), Found>> {
    let attempts: Vec<&str> = rows.iter().map(|row| row.attempt).collect();
    let task = outside.task(&attempts, PLACES, "/")?.to_string();
    // With a program in it that could be run: else there is none.
    let jail = shape(Jail::of(&context.environment, ESCAPE.as_ref())?).flags(["--copy-exec"]);
    let jail = jail.arguments([task.as_str()]);
    fs::create_dir_all(jail.root())?;
    lay_links(&jail.root(), &outside.directory.path().join("secret"))?;
    let ended = jail.spawn()?.monitor.wait(SOON)?;
    ensure!(ended.status.code() == Some(0), "{ended:?}");
    read(&ended.console)
}

/// Every row of the table, in a jail whose flags are the recommended ones.
fn each_way_out(context: &Context) -> Outcome {
    let star = Star::new(0)?;
    let netns = star.server.path();
    let outside = Outside::new()?;
    let rows: Vec<&Row> = ROWS.iter().collect();
    let attempts: Vec<&str> = rows.iter().map(|row| row.attempt).collect();
    let mut here = outside.found_here(&attempts, &["unshare", "--mount", "--"])?;
    let found = found_in_jail(context, &outside, &rows, |jail| {
        jail.flags(["--new-pid-ns", "--netns", &netns])
    })?;
    // For files the user counts, too: it may read them where it sees them.
    let id = UID.to_string();
    let as_user = ["setpriv", "--reuid", &id, "--regid", &id, "--clear-groups", "--"];
    let files: Vec<&str> = attempts
        .iter()
        .copied()
        .filter(|name| rows::is_of_files(name))
        .collect();
    ensure!(files.len() == 5, "{files:?}");
    for (key, found) in outside.found_here(&files, &as_user)? {
        ensure!(found == Found::Nobody, "{key:?} for a user outside: {found}");
        here.insert(key, found);
    }
    judge(&rows, &here, &found, |row| row.jail)
}

fn root_has_no_way_out(context: &Context) -> Outcome {
    let star = Star::new(0)?;
    let netns = star.server.path();
    let outside = Outside::new()?;
    let rows: Vec<&Row> = ROWS.iter().collect();
    let attempts: Vec<&str> = rows.iter().map(|row| row.attempt).collect();
    let here = outside.found_here(&attempts, &["unshare", "--mount", "--"])?;
    let found = found_in_jail(context, &outside, &rows, |jail| {
        jail.user(0).flags(["--new-pid-ns", "--netns", &netns])
    })?;
    judge(&rows, &here, &found, |row| {
        if row.attempt == "become-root" {
            "nobody"
        } else {
            row.jail
        }
    })
}

fn processes_are_out_of_reach(context: &Context) -> Outcome {
    let outside = Outside::new()?;
    let rows: Vec<&Row> = ROWS
        .iter()
        .filter(|row| PROCESSES.contains(&row.attempt))
        .collect();
    ensure!(rows.len() == PROCESSES.len(), "each of these has a row");
    let here = outside.found_here(PROCESSES, &["unshare", "--mount", "--"])?;
    let found = found_in_jail(context, &outside, &rows, |jail| jail)?;
    // It knows their numbers, and is nobody whom they have to listen to.
    judge(&rows, &here, &found, |_| "EPERM")
}

/// Compares what was found with the table, and tells all differences at once.
fn judge(
    rows: &[&Row],
    here: &BTreeMap<(String, String), Found>,
    found: &BTreeMap<(String, String), Found>,
    jail: impl Fn(&Row) -> &'static str,
) -> Outcome {
    let mut wrong = Vec::new();
    for row in rows {
        let of = |place: &str| (row.attempt.to_owned(), place.to_owned());
        let control = here.get(&of("bare")).ok_or("it was tried outside")?;
        let by_jail = jail(row);
        // What a host does not have it refuses to everybody: to its own root, too.
        let by_host = match control {
            Found::Error(name) => name.as_str(),
            _ => by_jail,
        };
        if control.to_string() == by_jail && by_jail != "nobody" || by_host == "ENOSYS" {
            println!(
                "{}: {control} outside of a jail, too: only the filters are shown to refuse it here",
                row.attempt
            );
        }
        for place in PLACES {
            let expected = row.expected(place, by_jail);
            match found.get(&of(place)) {
                Some(found) if found.to_string() == expected => {}
                Some(found) if found.to_string() == row.expected(place, by_host) => {}
                Some(found) => wrong.push(format!("{} on {place}: {found}, not {expected}", row.attempt)),
                None => wrong.push(format!("{} on {place} was not tried", row.attempt)),
            }
        }
    }
    ensure!(
        found.len() == rows.len() * PLACES.len(),
        "{} attempts",
        found.len()
    );
    ensure!(wrong.is_empty(), "\n{}", wrong.join("\n"));
    Ok(())
}
