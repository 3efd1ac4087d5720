//! What became of the targets of a benchmark, and who could not be measured.

use libtest_mimic::Failed;

use super::table::Field;
use super::target::Target;
use crate::{Outcome, ensure};

/// The targets so far.
#[derive(Debug, Default)]
pub struct Tally {
    targets_met: usize,
    /// What was not reached, in words.
    targets_missed: Vec<String>,
    /// Who could not be measured, and why.
    failures: Vec<String>,
}

impl Tally {
    /// Who could not be measured in a row, and why, each in words.
    pub fn failures(&self) -> &[String] {
        &self.failures
    }

    /// Keeps that a contender of `row` could not be measured.
    pub fn fail(&mut self, row: &str, contender: &str, failure: &Failed) {
        let reason = failure.message().unwrap_or("failed").trim();
        self.failures.push(format!("{row}: {contender}: {reason}"));
    }

    /// Judges the targets of `row`, prints what became of each, and counts it.
    pub fn judge(&mut self, row: &str, targets: &[Target], field: &Field<'_>) {
        for target in targets {
            let text = target.text();
            let Some(verdict) = target.judge(field.iter().copied()) else {
                println!("  {text}: not measured");
                continue;
            };
            if verdict.is_met {
                println!("  {text}: {:.2}x, met", verdict.reached);
                self.targets_met += 1;
            } else {
                println!("  {text}: {:.2}x, NOT MET", verdict.reached);
                self.targets_missed
                    .push(format!("{row}: {text}: {:.2}x", verdict.reached));
            }
        }
    }

    /// Keeps, and prints, what became of a target of `row` that is compared with nobody.
    pub fn note(&mut self, row: &str, text: &str, is_met: bool) {
        if is_met {
            println!("  {text}, met");
            self.targets_met += 1;
        } else {
            println!("  {text}, NOT MET");
            self.targets_missed.push(format!("{row}: {text}"));
        }
    }

    /// Prints how many targets were met and which were not.
    ///
    /// # Errors
    ///
    /// When somebody could not be measured.
    pub fn finish(self) -> Outcome {
        println!(
            "\ntargets: {} met, {} not met",
            self.targets_met,
            self.targets_missed.len()
        );
        for missed in &self.targets_missed {
            println!("  {missed}");
        }
        ensure!(
            self.failures.is_empty(),
            "could not measure\n{}",
            self.failures.join("\n")
        );
        Ok(())
    }
}
