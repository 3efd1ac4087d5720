//! `coraclectl`: the client that people and CI jobs type.

mod api;
mod client;
mod completions;
mod deadline;
mod discovery;
mod http;
mod info;
mod ladder;
mod name;
mod output;
mod pause;
mod process;
mod ps;
mod run;
mod runtime_dir;
mod signals;
mod stop;
mod summary;
mod table;
mod terminal;

use std::error::Error as StdError;
use std::ffi::OsString;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use self::output::Format;
use self::pause::Phase;

/// A verb has failed.
const EXIT_FAILURE: u8 = 1;
/// The command line is wrong.
const EXIT_USAGE: u8 = 2;
/// `run` has failed by itself: a status that guests rarely use, and the one that container tools
/// return in this case.
const EXIT_RUN_FAILURE: u8 = 125;

/// Run and drive Coracle machines
#[derive(Debug, Parser)]
#[command(
    version,
    arg_required_else_help = true,
    after_help = "\
Exit status:
  0    the verb has done what it says
  1    it has failed, or the machine's API has refused; standard error says why
  2    the command line is wrong
`run` returns the guest's status, and 125 in place of 1 and 2: see `coraclectl run --help`."
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
    Ps(ps::PsArgs),
    Info(info::InfoArgs),
    /// Pause a machine: its vCPUs stand still, its disks are drained
    Pause(pause::PhaseArgs),
    /// Let a paused machine run again
    Resume(pause::PhaseArgs),
    Stop(stop::StopArgs),
    Api(api::ApiArgs),
    Completions(completions::CompletionsArgs),
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Nowhere is left to say that neither output can be written.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() {
                usage_status(std::env::args_os())
            } else {
                0
            });
        }
    };
    let format = if cli.json { Format::Json } else { Format::Text };
    match dispatch(&cli.verb, format) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            output::report(error.as_ref(), format);
            ExitCode::from(if matches!(cli.verb, Verb::Run(_)) {
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
        Verb::Api(args) => return Ok(api::api(args, format)?),
        Verb::Ps(args) => ps::ps(args, format)?,
        Verb::Info(args) => info::info(args, format)?,
        Verb::Pause(args) => pause::set_phase(args, Phase::Paused, format)?,
        Verb::Resume(args) => pause::set_phase(args, Phase::Resumed, format)?,
        Verb::Stop(args) => stop::stop(args, format)?,
        Verb::Completions(args) => completions::completions(args, Cli::command())?,
    }
    Ok(0)
}

/// What a wrong command line returns: a `run` must not look like a guest that returned 2.
fn usage_status(arguments: impl Iterator<Item = OsString>) -> u8 {
    let verb = arguments
        .skip(1)
        .find(|argument| !argument.as_encoded_bytes().starts_with(b"-"));
    if verb.is_some_and(|verb| verb == "run") {
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
    fn a_wrong_run_does_not_look_like_a_guests_status() {
        let status = |line: &str| usage_status(line.split(' ').map(OsString::from));
        assert_eq!(status("coraclectl run --disk"), EXIT_RUN_FAILURE);
        assert_eq!(status("coraclectl --json run"), EXIT_RUN_FAILURE);
        assert_eq!(status("coraclectl ps run"), EXIT_USAGE);
        assert_eq!(status("coraclectl"), EXIT_USAGE);
    }
}
