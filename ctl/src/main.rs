//! `coraclectl`: the client that people and CI jobs type.

mod api;
mod binary;
mod client;
mod clone;
mod completions;
mod confirm;
mod deadline;
mod discovery;
mod disk;
mod guest;
mod here;
mod http;
mod info;
mod ladder;
mod lease;
mod migrate;
mod name;
mod output;
mod pause;
mod process;
mod ps;
mod run;
mod runtime_dir;
mod signals;
mod snapshot;
mod stop;
mod summary;
mod table;
mod terminal;

use std::error::Error as StdError;
use std::ffi::OsString;
use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue};
use clap::{CommandFactory, Parser, Subcommand};
use serde_json::json;

use self::output::Format;
use self::pause::Phase;

/// A verb has failed.
const EXIT_FAILURE: u8 = 1;
/// The command line is wrong.
const EXIT_USAGE: u8 = 2;
/// `run` or `exec` has failed by itself: a status that guests rarely use, and the one that container tools
/// return in this case.
const EXIT_RUN_FAILURE: u8 = 125;

/// Run and drive Coracle machines
#[derive(Debug, Parser)]
#[command(
    name = "coraclectl",
    version,
    arg_required_else_help = true,
    after_help = "\
Exit status:
  0    the verb has done what it says
  1    it has failed, or the machine's API has refused; standard error says why
  2    the command line is wrong
`run` returns the guest's status and `exec` the command's, and 125 in place of 1 and 2: see their --help."
)]
struct Cli {
    /// Print JSON: results on standard output, errors on standard error
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Run(Box<run::RunArgs>),
    #[command(visible_aliases = ["ls", "list"])]
    Ps(ps::PsArgs),
    Info(info::InfoArgs),
    /// Pause a machine: its vCPUs stand still, its disks are drained
    Pause(pause::PhaseArgs),
    /// Let a paused machine run again
    Resume(pause::PhaseArgs),
    Stop(stop::StopArgs),
    Exec(Box<guest::ExecArgs>),
    Cp(guest::CopyArgs),
    Lease(lease::LeaseArgs),
    Disk(disk::DiskArgs),
    Snapshot(snapshot::SnapshotArgs),
    Clone(Box<clone::CloneArgs>),
    Migrate(migrate::MigrateArgs),
    Receive(Box<migrate::ReceiveArgs>),
    Certs(migrate::CertsArgs),
    Api(api::ApiArgs),
    Completions(completions::CompletionsArgs),
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return ExitCode::from(refuse(with_hint(error))),
    };
    let format = if cli.json { Format::Json } else { Format::Text };
    match dispatch(&cli.verb, format) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            output::report(error.as_ref(), format);
            ExitCode::from(if matches!(cli.verb, Verb::Run(_) | Verb::Exec(_)) {
                EXIT_RUN_FAILURE
            } else {
                EXIT_FAILURE
            })
        }
    }
}

fn dispatch(verb: &Verb, format: Format) -> Result<u8, Box<dyn StdError>> {
    match verb {
        Verb::Run(args) => return Ok(run::run(args, format)?),
        Verb::Snapshot(args) => return Ok(snapshot::snapshot(args, format)?),
        Verb::Clone(args) => return Ok(clone::clone(args, format)?),
        Verb::Receive(args) => return migrate::receive(args, format),
        Verb::Exec(args) => return Ok(guest::exec(args, format)?),
        Verb::Api(args) => return Ok(api::api(args, format)?),
        Verb::Ps(args) => ps::ps(args, format)?,
        Verb::Info(args) => info::info(args, format)?,
        Verb::Pause(args) => pause::set_phase(args, Phase::Paused, format)?,
        Verb::Resume(args) => pause::set_phase(args, Phase::Resumed, format)?,
        Verb::Stop(args) => stop::stop(args, format)?,
        Verb::Cp(args) => guest::copy(args, format)?,
        Verb::Lease(args) => lease::lease(args, format)?,
        Verb::Disk(args) => disk::disk(args, format)?,
        Verb::Migrate(args) => migrate::migrate(args, format)?,
        Verb::Certs(args) => migrate::certs(args, format)?,
        Verb::Completions(args) => completions::completions(args, Cli::command())?,
    }
    Ok(0)
}

/// Points who types `kill`, as container tools have it, to what does that here.
fn with_hint(mut error: clap::Error) -> clap::Error {
    let unknown = error.get(ContextKind::InvalidSubcommand);
    if matches!(unknown, Some(ContextValue::String(verb)) if verb == "kill") {
        let hint = "`coraclectl stop --force <VM>` ends a machine without asking its guest";
        error.insert(
            ContextKind::Suggested,
            ContextValue::StyledStrs(vec![hint.into()]),
        );
    }
    error
}

/// Prints what the parser has to say, which is also how help and the version come; returns the status.
fn refuse(error: clap::Error) -> u8 {
    if error.use_stderr() && asks_for_json(std::env::args_os()) {
        output::note_json(&json!({ "error": one_line(&error.to_string()), "causes": [] }));
    } else {
        // Nowhere is left to say that neither output can be written.
        let _ = error.print();
    }
    if error.use_stderr() {
        usage_status(std::env::args_os())
    } else {
        0
    }
}

/// Whether a command line that could not be read has the flag `--json`.
fn asks_for_json(arguments: impl Iterator<Item = OsString>) -> bool {
    arguments
        .skip(1)
        .take_while(|argument| argument != "--")
        .any(|argument| argument == "--json")
}

/// The parser's message without its prefix and without the usage that follows it.
fn one_line(message: &str) -> String {
    let message = message.strip_prefix("error: ").unwrap_or(message);
    let reason = ["\n\nUsage:", "\n\nFor more information"]
        .iter()
        .filter_map(|end| message.split_once(end))
        .map(|(reason, _)| reason)
        .min_by_key(|reason| reason.len())
        .unwrap_or(message);
    let paragraphs = reason
        .split("\n\n")
        .map(|paragraph| paragraph.split_whitespace().collect::<Vec<_>>().join(" "));
    paragraphs.collect::<Vec<_>>().join("; ")
}

/// What a wrong command line returns: a `run` must not look like a guest that returned 2, nor an `exec` like a command.
fn usage_status(arguments: impl Iterator<Item = OsString>) -> u8 {
    let verb = arguments
        .skip(1)
        .find(|argument| !argument.as_encoded_bytes().starts_with(b"-"));
    if verb.is_some_and(|verb| verb == "run" || verb == "exec") {
        EXIT_RUN_FAILURE
    } else {
        EXIT_USAGE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn json_is_asked_for_before_the_arguments_end() {
        let asks = |line: &str| asks_for_json(line.split(' ').map(OsString::from));
        assert!(asks("coraclectl --json nonsense") && asks("coraclectl run --cpus x --json"));
        assert!(!asks("coraclectl api -- --json") && !asks("--json ps"));
    }

    #[test]
    fn a_wrong_run_does_not_look_like_a_guests_status() {
        let status = |line: &str| usage_status(line.split(' ').map(OsString::from));
        assert_eq!(status("coraclectl run --disk"), EXIT_RUN_FAILURE);
        assert_eq!(status("coraclectl --json run"), EXIT_RUN_FAILURE);
        assert_eq!(status("coraclectl exec --wait x web ls"), EXIT_RUN_FAILURE);
        assert_eq!(status("coraclectl ps run"), EXIT_USAGE);
        assert_eq!(status("coraclectl"), EXIT_USAGE);
    }
}
