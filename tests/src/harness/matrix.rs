//! Every combination of some axes, each either run or impossible for a reason that is written down.

use std::fmt::{self, Display, Formatter};

use crate::Outcome;
use crate::case::{Extent, text};
use crate::seed::Seed;

/// Axes, and which of their combinations cannot be.
#[derive(Clone, Debug)]
pub struct Matrix {
    name: &'static str,
    axes: Vec<(&'static str, Vec<&'static str>)>,
    impossible: Vec<Impossible>,
}

/// One combination: a value of each axis.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cell(Vec<(&'static str, &'static str)>);

/// Cells that cannot be: those with all of these values.
#[derive(Clone, Debug)]
struct Impossible {
    values: Vec<(&'static str, &'static str)>,
    reason: &'static str,
}

/// What became of every cell.
#[derive(Debug)]
pub struct Report {
    name: &'static str,
    cells: Vec<(Cell, Fate)>,
}

/// What became of a cell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It was run, and its promise held.
    Passed,
    /// It was run, and did not hold.
    Failed(String),
    /// It cannot be, for this reason.
    Impossible(&'static str),
    /// It was not in the sample.
    NotSampled,
}

impl Matrix {
    /// A matrix without axes.
    pub fn new(name: &'static str) -> Self {
        Self {
            name,
            axes: vec![],
            impossible: vec![],
        }
    }

    /// With one more axis.
    #[must_use]
    pub fn axis(mut self, name: &'static str, values: &[&'static str]) -> Self {
        self.axes.push((name, values.to_vec()));
        self
    }

    /// Without the cells that have all of these values, because they cannot be.
    #[must_use]
    pub fn impossible(mut self, values: &[(&'static str, &'static str)], reason: &'static str) -> Self {
        let values = values.to_vec();
        self.impossible.push(Impossible { values, reason });
        self
    }

    /// Runs a seeded sample of so many possible cells, or all of them, and says what became of each. Where `CELLS` is set, those
    /// are run instead whose name contains it.
    ///
    /// # Errors
    ///
    /// When the matrix contradicts itself: a value that no axis has, a reason that fits no cell.
    pub fn run(
        &self,
        extent: Extent,
        sample: usize,
        seed: &mut Seed,
        mut run: impl FnMut(&Cell) -> Outcome,
    ) -> Outcome<Report> {
        self.check()?;
        let cells = self.cells();
        let possible: Vec<&Cell> = cells.iter().filter(|cell| self.reason(cell).is_none()).collect();
        let asked = std::env::var("CELLS").ok();
        let chosen = match (asked, extent) {
            (Some(name), _) => named(&possible, &name),
            (None, Extent::Sample) => seed.sample(&possible, sample).into_iter().copied().collect(),
            (None, Extent::Full) => possible.clone(),
        };
        let mut fate = |cell: &Cell| match self.reason(cell) {
            Some(reason) => Fate::Impossible(reason),
            None if !chosen.contains(&cell) => Fate::NotSampled,
            None => match run(cell) {
                Ok(()) => Fate::Passed,
                Err(failed) => Fate::Failed(text(&failed).to_owned()),
            },
        };
        Ok(Report {
            name: self.name,
            cells: cells.iter().map(|cell| (cell.clone(), fate(cell))).collect(),
        })
    }

    /// The product of the axes, the last one fastest.
    fn cells(&self) -> Vec<Cell> {
        let start = vec![Cell(vec![])];
        self.axes.iter().fold(start, |cells, (axis, values)| {
            let with = |cell: &Cell, value| Cell(cell.0.iter().copied().chain([(*axis, value)]).collect());
            cells
                .iter()
                .flat_map(|cell| values.iter().map(move |value| with(cell, *value)))
                .collect()
        })
    }

    fn reason(&self, cell: &Cell) -> Option<&'static str> {
        self.impossible
            .iter()
            .find(|impossible| impossible.fits(cell))
            .map(|impossible| impossible.reason)
    }

    fn check(&self) -> Outcome {
        let cells = self.cells();
        for impossible in &self.impossible {
            crate::ensure!(
                cells.iter().any(|cell| impossible.fits(cell)),
                "{}: no cell is {:?}, which is said to be impossible: {}",
                self.name,
                impossible.values,
                impossible.reason
            );
        }
        Ok(())
    }
}

/// Those whose name contains `name`.
fn named<'a>(cells: &[&'a Cell], name: &str) -> Vec<&'a Cell> {
    let is_asked = |cell: &&&Cell| cell.to_string().contains(name);
    cells.iter().filter(is_asked).copied().collect()
}

impl Impossible {
    fn fits(&self, cell: &Cell) -> bool {
        self.values.iter().all(|value| cell.0.contains(value))
    }
}

impl Cell {
    /// The cell's value on an axis.
    ///
    /// # Errors
    ///
    /// When there is no such axis.
    pub fn value(&self, axis: &str) -> Outcome<&'static str> {
        let found = self.0.iter().find(|(name, _)| *name == axis);
        Ok(found.ok_or_else(|| format!("the matrix has no axis {axis}"))?.1)
    }
}

impl Display for Cell {
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        for (number, (_, value)) in self.0.iter().enumerate() {
            write!(out, "{}{value}", if number == 0 { "" } else { " x " })?;
        }
        Ok(())
    }
}

impl Report {
    /// What became of each cell.
    pub fn cells(&self) -> &[(Cell, Fate)] {
        &self.cells
    }

    /// Fails with the name of every cell that failed, if one did, or if no cell was run.
    ///
    /// # Errors
    ///
    /// Then.
    pub fn expect_passed(&self) -> Outcome {
        let failed = |(_, fate): &&(Cell, Fate)| matches!(fate, Fate::Failed(_));
        let passed = self.cells.iter().any(|(_, fate)| *fate == Fate::Passed);
        let failures: Vec<String> = self
            .cells
            .iter()
            .filter(failed)
            .map(|(cell, fate)| format!("{cell}: {fate}"))
            .collect();
        crate::ensure!(failures.is_empty(), "{}:\n{}", self.name, failures.join("\n"));
        crate::ensure!(passed, "{}: no cell was run", self.name);
        Ok(())
    }
}

impl Display for Report {
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        for (cell, fate) in &self.cells {
            writeln!(out, "{}: {cell}: {fate}", self.name)?;
        }
        Ok(())
    }
}

impl Display for Fate {
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Passed => write!(out, "passed"),
            Self::Failed(why) => write!(out, "FAILED: {why}"),
            Self::Impossible(reason) => write!(out, "impossible: {reason}"),
            Self::NotSampled => write!(out, "not in this sample"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn six() -> Matrix {
        Matrix::new("six")
            .axis("fault", &["cut", "delay", "corrupt"])
            .axis("step", &["idle", "write"])
            .impossible(
                &[("fault", "corrupt"), ("step", "idle")],
                "nothing is on the wire",
            )
    }

    #[test]
    fn every_cell_is_run_or_impossible_for_a_reason() {
        let mut ran = Vec::new();
        let report = six()
            .run(Extent::Full, 1, &mut Seed::from(1), |cell| {
                ran.push(cell.to_string());
                Ok(())
            })
            .expect("the matrix agrees with itself");
        assert_eq!(
            ran,
            [
                "cut x idle",
                "cut x write",
                "delay x idle",
                "delay x write",
                "corrupt x write"
            ]
        );
        assert_eq!(report.cells().len(), 6);
        assert!(report.expect_passed().is_ok());
        assert!(
            report
                .to_string()
                .contains("six: corrupt x idle: impossible: nothing is on the wire")
        );
    }

    #[test]
    fn a_sample_is_as_large_as_asked_and_the_same_for_the_same_seed() {
        let sample = |seed| {
            let mut ran = Vec::new();
            let report = six().run(Extent::Sample, 2, &mut Seed::from(seed), |cell| {
                ran.push(cell.to_string());
                Ok(())
            });
            assert!(report.is_ok());
            ran
        };
        assert_eq!(sample(7).len(), 2);
        assert_eq!(sample(7), sample(7));
        assert!((0..20).any(|seed| sample(seed) != sample(7)));
    }

    #[test]
    fn cells_can_be_chosen_by_their_names() {
        let cells = six().cells();
        let cells: Vec<&Cell> = cells.iter().collect();
        let names = |name| -> Vec<String> { named(&cells, name).iter().map(ToString::to_string).collect() };
        assert_eq!(names("delay x i"), ["delay x idle"]);
        assert_eq!(names("cut").len(), 2);
        assert!(names("flood").is_empty());
    }

    #[test]
    fn a_cell_that_fails_is_named_and_the_others_are_run_all_the_same() {
        let report = six()
            .run(Extent::Full, 1, &mut Seed::from(1), |cell| {
                crate::ensure!(cell.value("fault")? != "delay", "too late");
                Ok(())
            })
            .expect("the matrix agrees with itself");
        let failed = report.expect_passed().expect_err("two cells failed");
        assert_eq!(
            text(&failed),
            "six:\ndelay x idle: FAILED: too late\ndelay x write: FAILED: too late"
        );
    }

    #[test]
    fn a_reason_that_fits_no_cell_is_a_failure() {
        let stale = six().impossible(&[("fault", "flood")], "long gone");
        assert!(
            stale
                .run(Extent::Full, 1, &mut Seed::from(1), |_| Ok(()))
                .is_err()
        );
        let idle = six()
            .run(Extent::Sample, 0, &mut Seed::from(1), |_| Ok(()))
            .expect("the matrix agrees with itself");
        assert!(idle.expect_passed().is_err());
    }
}
