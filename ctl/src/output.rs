//! What a verb prints: text for people, or one JSON document for programs.

use std::error::Error as StdError;
use std::fmt::Display;
use std::io::{self, Write};
use std::path::Path;

use serde_json::{Value, json};
use thiserror::Error;

use crate::table::printable;

/// Whom the output is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// People.
    Text,
    /// Programs.
    Json,
}

/// Why output could not be written.
#[derive(Debug, Error)]
#[error("cannot write to standard output")]
pub(crate) struct OutputError(#[source] io::Error);

/// Writes `bytes` to standard output; a reader that has gone away is no error.
///
/// # Errors
///
/// When standard output cannot be written for another reason.
pub(crate) fn print_bytes(bytes: &[u8]) -> Result<(), OutputError> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(OutputError(error)),
        _ => Ok(()),
    }
}

/// Writes `text` to standard output.
///
/// # Errors
///
/// As [`print_bytes`].
pub(crate) fn print(text: impl Display) -> Result<(), OutputError> {
    print_bytes(text.to_string().as_bytes())
}

/// Writes `value` to standard output, on one line.
///
/// # Errors
///
/// As [`print_bytes`].
pub(crate) fn print_json(value: &Value) -> Result<(), OutputError> {
    print(format_args!("{value}\n"))
}

/// Tells people something that is not a verb's output, on standard error.
pub(crate) fn note(text: impl Display) {
    // Nowhere is left to say that standard error cannot be written.
    let _ = writeln!(io::stderr(), "coraclectl: {}", printable(&text.to_string()));
}

/// Tells programs something that is not a verb's output, as one line of JSON on standard error.
pub(crate) fn note_json(value: &Value) {
    // As for `note`.
    let _ = writeln!(io::stderr(), "{value}");
}

/// Tells whoever called why the verb has failed, with every cause, on standard error.
pub(crate) fn report(error: &dyn StdError, format: Format) {
    let causes: Vec<String> = causes(error).collect();
    match format {
        Format::Json => note_json(&json!({ "error": error.to_string(), "causes": causes })),
        Format::Text => {
            note(error);
            causes
                .iter()
                .for_each(|cause| note(format_args!("  because: {cause}")));
        }
    }
}

/// Each `source` below `error`.
pub(crate) fn causes(error: &dyn StdError) -> impl Iterator<Item = String> {
    std::iter::successors(error.source(), |&cause| cause.source()).map(ToString::to_string)
}

/// What `error` says, with every cause, on one line.
pub(crate) fn joined(error: &(dyn StdError + 'static)) -> String {
    let texts: Vec<String> = std::iter::once(error.to_string()).chain(causes(error)).collect();
    texts.join(": ")
}

/// A path as JSON: paths that are not UTF-8 lose what JSON cannot say.
pub(crate) fn path_text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
