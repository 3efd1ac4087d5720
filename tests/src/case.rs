//! A test as data: its name, what it needs, and a plain function.

use libtest_mimic::{Failed, Trial};
use std::sync::Arc;

use crate::Outcome;
use crate::environment::{Environment, Need};
use crate::seed::Seed;

/// What every test is given.
#[derive(Clone, Debug)]
pub struct Context {
    /// The programs and guests.
    pub environment: Arc<Environment>,
    /// The stream of this test's own choices.
    pub seed: Seed,
    /// How much of a matrix to run.
    pub extent: Extent,
}

/// How much of a matrix to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// A seeded sample of it, in seconds.
    Sample,
    /// All of it, however long it takes.
    Full,
}

/// One test.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// What it promises.
    pub name: &'static str,
    /// What it needs of the machine.
    pub need: Need,
    /// Shows the promise, or fails.
    pub run: fn(&Context) -> Outcome,
}

impl Case {
    /// The case as a trial of the test runner, in the group named by its module.
    ///
    /// A need that this machine cannot meet makes the trial *ignored*, with the reason in its kind; so does a reason why it is
    /// left out of this run.
    pub fn into_trial(
        self,
        group: &str,
        environment: &Arc<Environment>,
        left_out: Option<&'static str>,
    ) -> Trial {
        let name = format!("{group}::{}", self.name);
        let context = Context {
            environment: Arc::clone(environment),
            seed: environment.seed.stream(&name),
            extent: Extent::Sample,
        };
        let lacking = environment.lacks(self.need);
        let trial = Trial::test(name, move || (self.run)(&context));
        let kind = match (left_out, lacking) {
            (Some(reason), _) => format!("not in a jail: {reason}"),
            (None, Some(reason)) => format!("not here: {reason}"),
            (None, None) => return trial,
        };
        trial.with_kind(kind).with_ignored_flag(true)
    }
}

impl Context {
    /// One number for a sample, another for the full extent.
    pub fn count(&self, sample: u32, full: u32) -> u32 {
        match self.extent {
            Extent::Sample => sample,
            Extent::Full => full,
        }
    }
}

/// The text of a failure.
pub fn text(failed: &Failed) -> &str {
    failed.message().unwrap_or("failed without a word")
}
