//! `coraclectl ps`: the machines that run on this host.

use std::thread;
use std::time::Duration;

use clap::Args;
use serde_json::json;
use thiserror::Error;

use crate::client::ClientError;
use crate::discovery::{Found, Host};
use crate::output::{Format, OutputError, note, path_text, print, print_json};
use crate::summary::Summary;
use crate::table::{Table, memory, span};

/// One silent monitor must not hold up the list for longer than this.
const ANSWER_WAIT: Duration = Duration::from_secs(2);
/// How many monitors are asked at once.
const ASKED_AT_ONCE_MAX: usize = 16;

/// List the machines that run on this host
///
/// Shows those in this user's runtime directories and those whose monitor is found in /proc.
#[derive(Debug, Args)]
pub(crate) struct PsArgs {}

/// Why there is no list.
#[derive(Debug, Error)]
pub(crate) enum PsError {
    #[error(transparent)]
    Output(#[from] OutputError),
}

/// Prints the machines that run.
///
/// # Errors
///
/// When they cannot be printed; one that does not answer is a row that says so.
pub(crate) fn ps(_: &PsArgs, format: Format) -> Result<(), PsError> {
    let host = Host::look();
    for name in &host.cleaned {
        note(format_args!("removed the directory that {name} has left behind"));
    }
    let answers = ask_all(&host.found);
    // One that has ended while the others were asked is not running.
    let running = answers.into_iter().filter(|(_, answer)| !has_ended(answer));
    match format {
        Format::Json => print_json(&running.map(|(found, answer)| row_json(found, &answer)).collect())?,
        Format::Text => {
            let mut table = Table::new(["ID", "STATE", "PID", "VCPUS", "MEMORY", "UPTIME", "SOCKET"]);
            running.for_each(|(found, answer)| table.push(row(found, &answer)));
            print(table)?;
        }
    }
    Ok(())
}

type Answer = Result<Summary, ClientError>;

fn ask_all(found: &[Found]) -> Vec<(&Found, Answer)> {
    let mut answers = Vec::with_capacity(found.len());
    for some in found.chunks(ASKED_AT_ONCE_MAX) {
        thread::scope(|scope| {
            let asked = some
                .iter()
                .map(|one| (one, scope.spawn(|| Summary::ask(&one.socket, ANSWER_WAIT))));
            let asked: Vec<_> = asked.collect();
            answers.extend(asked.into_iter().map(|(one, thread)| {
                (
                    one,
                    thread
                        .join()
                        .expect("a question that panics ends the whole process"),
                )
            }));
        });
    }
    answers
}

fn has_ended(answer: &Answer) -> bool {
    matches!(
        answer,
        Err(ClientError::NoSocket { .. } | ClientError::NobodyListens { .. })
    )
}

/// What the state column says of a monitor that gave no answer.
fn problem(error: &ClientError) -> &'static str {
    match error {
        ClientError::TimedOut { .. } | ClientError::Closed { .. } => "Not answering",
        ClientError::Connect { .. } => "No permission",
        _ => "Unknown",
    }
}

fn row(found: &Found, answer: &Answer) -> [String; 7] {
    let socket = path_text(&found.socket);
    match answer {
        Ok(summary) => [
            summary.id.clone(),
            summary.state.clone(),
            summary.pid.to_string(),
            summary.vcpus.map(|count| count.to_string()).unwrap_or_default(),
            summary.memory_mib.map(memory).unwrap_or_default(),
            summary.uptime_seconds.map(span).unwrap_or_default(),
            socket,
        ],
        Err(error) => {
            let none = String::new;
            [
                found.id.clone(),
                problem(error).to_owned(),
                none(),
                none(),
                none(),
                none(),
                socket,
            ]
        }
    }
}

fn row_json(found: &Found, answer: &Answer) -> serde_json::Value {
    match answer {
        Ok(summary) => json!(summary),
        Err(error) => json!({
            "id": found.id,
            "state": problem(error),
            "error": error.to_string(),
            "socket": path_text(&found.socket),
        }),
    }
}
