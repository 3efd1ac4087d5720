//! `coraclectl completions`: the script that teaches a shell the verbs and flags.

use clap::{Args, Command};
use clap_complete::Shell;

use crate::output::{OutputError, print_bytes};

/// Print a completion script for a shell
///
/// For bash: `source <(coraclectl completions bash)`.
#[derive(Debug, Args)]
pub(crate) struct CompletionsArgs {
    /// Which shell
    shell: Shell,
}

/// Prints the script for `command`.
///
/// # Errors
///
/// When standard output cannot be written.
pub(crate) fn completions(args: &CompletionsArgs, mut command: Command) -> Result<(), OutputError> {
    let mut script = Vec::new();
    let name = command.get_name().to_owned();
    clap_complete::generate(args.shell, &mut command, name, &mut script);
    print_bytes(&script)
}
