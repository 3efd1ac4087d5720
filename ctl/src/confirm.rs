//! A yes from whoever sits at the terminal, before something is lost.

use std::io::{self, BufRead, IsTerminal, Write};

use thiserror::Error;

use crate::output::note;

/// Why something was not done.
#[derive(Debug, Error)]
pub(crate) enum ConfirmError {
    #[error("{0} needs a yes, and there is no terminal to ask for it: give --yes if it is certain")]
    NoTerminal(&'static str),
    #[error("nothing was changed")]
    Declined,
    #[error("cannot ask")]
    Ask(#[source] io::Error),
}

/// What there is to say yes to.
pub(crate) struct Question<'a> {
    /// What is to be done, for who cannot be asked.
    pub(crate) action: &'static str,
    /// What comes of it.
    pub(crate) consequence: &'a str,
    /// What is asked then.
    pub(crate) question: &'static str,
}

/// Returns when somebody has said yes.
///
/// # Errors
///
/// When nobody can, or somebody says no.
pub(crate) fn confirm(asked: &Question<'_>) -> Result<(), ConfirmError> {
    if !io::stdin().is_terminal() {
        return Err(ConfirmError::NoTerminal(asked.action));
    }
    note(asked.consequence);
    let mut stderr = io::stderr();
    write!(stderr, "{} [y/N] ", asked.question)
        .and_then(|()| stderr.flush())
        .map_err(ConfirmError::Ask)?;
    let mut answer = String::new();
    io::stdin()
        .lock()
        .read_line(&mut answer)
        .map_err(ConfirmError::Ask)?;
    if matches!(answer.trim(), "y" | "Y" | "yes") {
        Ok(())
    } else {
        Err(ConfirmError::Declined)
    }
}
