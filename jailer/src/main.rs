//! `coracle-jailer`: puts a monitor into a jail, and can look after it there.

mod cgroup;
mod cli;
mod death;
mod enter;
mod jail;
mod launch;
mod ledger;
mod lives;
mod mount;
mod place;
mod plan;
mod privileges;
mod process;
mod signals;
mod supervise;

use std::error::Error;
use std::io::{self, Write as _};
use std::process::ExitCode;

use cli::{Asked, Request, Source};
use launch::{LaunchError, Times};
use plan::{Plan, PlanError};

fn main() -> ExitCode {
    let times = Times::now();
    let asked = match cli::parse(std::env::args_os().skip(1)) {
        Ok(asked) => asked,
        Err(error) => return failed(&error),
    };
    let request = match asked {
        Asked::Text(text) => {
            let written = io::stdout().write_all(text.as_bytes());
            return if written.is_ok() {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            };
        }
        Asked::Jail(request) => *request,
    };
    match run(request, times) {
        Ok(status) => status,
        Err(error) => failed(&error),
    }
}

fn run(request: Request, times: Times) -> Result<ExitCode, Failure> {
    let kept: Vec<i32> = request
        .files
        .iter()
        .filter_map(|shown| match shown.source {
            Source::Fd(number) => Some(number),
            Source::Path(_) => None,
        })
        .collect();
    process::close_all_but(&kept).map_err(|source| Failure::Descriptors { source })?;
    // Before this process opens anything itself: what it has at a number must not pass for what was given.
    let given = plan::given(&kept)?;
    let is_to_stay = request.cleanup || request.supervision.is_some();
    let plan = Plan::open(request, &given)?;
    Ok(if is_to_stay {
        supervise::stay(&plan, times)?
    } else {
        launch::leave_alone(&plan, times)?
    })
}

fn failed(error: &dyn Error) -> ExitCode {
    // If nobody reads it, the status still says it.
    let _ = writeln!(io::stderr(), "coracle-jailer: {}", chain(error));
    ExitCode::FAILURE
}

/// An error with its causes.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// Why there is no monitor in a jail.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("cannot close inherited descriptors")]
    Descriptors {
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error(transparent)]
    Launch(#[from] LaunchError),
}
