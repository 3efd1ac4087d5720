//! Every test in full, one after the other; a run that was stopped goes on where it was.
//!
//! What has passed is kept in a file, under a key of all that was tested: another build starts anew.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hasher};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use coracle_tests::Outcome;
use coracle_tests::case::{Case, Context, Extent, text};
use coracle_tests::environment::Environment;
use serde::{Deserialize, Serialize};

/// The variable that asks for this instead of the samples: the path of the file.
pub(crate) const VARIABLE: &str = "CORACLE_SOAK";

/// What was reached so far.
#[derive(Default, Serialize, Deserialize)]
struct State {
    /// Of the programs and guests that were tested.
    key: u64,
    /// Every random choice came from it.
    seed: u64,
    /// The rows that have passed, with their seconds.
    passed: BTreeMap<String, u64>,
}

/// Runs every case whose name contains the filter and that has not passed yet.
pub(crate) fn run(
    path: &Path,
    filter: &str,
    groups: &[(&str, &[Case])],
    environment: &Arc<Environment>,
) -> ExitCode {
    let seed = environment.seed.number();
    let mut state = match key(environment) {
        Ok(key) => State::read(path)
            .filter(|state| state.key == key)
            .unwrap_or(State {
                key,
                seed,
                ..State::default()
            }),
        Err(failed) => {
            eprintln!("{}", text(&failed));
            return ExitCode::FAILURE;
        }
    };
    println!(
        "SEED={} {} rows have passed before, {}",
        state.seed,
        state.passed.len(),
        path.display()
    );
    let (mut failed, mut skipped) = (0, 0);
    let rows = groups.iter().flat_map(|(group, cases)| {
        cases
            .iter()
            .map(move |case| (format!("{group}::{}", case.name), case))
    });
    for (name, case) in rows.filter(|(name, _)| name.contains(filter)) {
        if state.passed.contains_key(&name) {
            println!("{name}: passed before");
            continue;
        }
        if let Some(reason) = environment.lacks(case.need) {
            println!("{name}: not here: {reason}");
            skipped += 1;
            continue;
        }
        match row(&name, case, state.seed, environment) {
            Ok(seconds) => {
                println!("{name}: passed in {seconds} s");
                state.passed.insert(name, seconds);
                if let Err(cause) = state.write(path) {
                    eprintln!("{}: {}", path.display(), text(&cause));
                }
            }
            Err(cause) => {
                println!("{name}: FAILED: {}", text(&cause));
                failed += 1;
            }
        }
    }
    println!(
        "{} passed, {failed} failed, {skipped} skipped",
        state.passed.len()
    );
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Runs one case in full and returns how many seconds it took.
fn row(name: &str, case: &Case, seed: u64, environment: &Arc<Environment>) -> Outcome<u64> {
    let context = Context {
        environment: Arc::clone(environment),
        seed: coracle_tests::seed::Seed::from(seed).stream(name),
        extent: Extent::Full,
    };
    let start = Instant::now();
    (case.run)(&context)?;
    Ok(start.elapsed().as_secs())
}

/// A number of the programs and guests under test, and of this program.
fn key(environment: &Environment) -> Outcome<u64> {
    let mut hasher = DefaultHasher::new();
    let this = std::env::current_exe()?;
    for path in [&environment.coracle, &environment.unikernel, &this] {
        hasher.write(&std::fs::read(path).map_err(|e| format!("{}: {e}", path.display()))?);
    }
    Ok(hasher.finish())
}

impl State {
    /// What a run before this one left, if it can be read.
    fn read(path: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(path).ok()?).ok()
    }

    /// Replaces the file in one step: a run may be stopped at any time.
    fn write(&self, path: &Path) -> Outcome {
        let beside: PathBuf = path.with_extension("part");
        std::fs::create_dir_all(path.parent().unwrap_or(Path::new(".")))?;
        std::fs::write(&beside, serde_json::to_vec_pretty(self)?)?;
        Ok(std::fs::rename(beside, path)?)
    }
}
