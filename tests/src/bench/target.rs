//! What a contender is to reach, beside others in the same run.

use serde_json::{Value, json};

use super::measurement::{Figure, Results};

/// A figure of one contender as a multiple of the best among others.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Whose figure.
    pub of: &'static str,
    /// Which.
    pub figure: Figure,
    /// With whose it is compared.
    pub against: Against,
    /// The multiple to reach: a rate at least, anything else at most.
    pub multiple: f64,
}

/// Others, by what their names begin with.
#[derive(Clone, Copy, Debug)]
pub struct Against {
    /// What they are called together.
    pub title: &'static str,
    /// Beginnings of names.
    pub names: &'static [&'static str],
}

/// The better of Firecracker's engines.
pub const FIRECRACKER: Against = Against {
    title: "the better Firecracker engine",
    names: &["firecracker"],
};
/// QEMU.
pub const QEMU: Against = Against {
    title: "QEMU",
    names: &["qemu"],
};
/// Everybody else.
pub const PEERS: Against = Against {
    title: "the best peer",
    names: &["firecracker", "qemu"],
};
/// The same monitor with one queue and the image itself.
pub const PLAIN: Against = Against {
    title: "one queue on the raw file",
    names: &["coracle-async"],
};

/// What became of a target.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Verdict {
    /// The multiple that was reached.
    pub reached: f64,
    /// Whether that is enough.
    pub is_met: bool,
}

impl Target {
    /// Compares; nothing when one side was not measured.
    pub fn judge<'a>(
        &self,
        results: impl Iterator<Item = (&'a str, &'a Results)> + Clone,
    ) -> Option<Verdict> {
        let of = |name: &str| name == self.of;
        let (_, own) = results.clone().find(|(name, _)| of(name))?;
        let own = own.get(&self.figure)?.median();
        let others = results
            .filter(|(name, _)| self.against.names.iter().any(|start| name.starts_with(start)))
            .filter_map(|(_, results)| Some(results.get(&self.figure)?.median()));
        let best = others.reduce(if self.figure.is_a_rate() {
            f64::max
        } else {
            f64::min
        })?;
        let reached = own / best;
        let is_met = if self.figure.is_a_rate() {
            reached >= self.multiple
        } else {
            reached <= self.multiple
        };
        Some(Verdict { reached, is_met })
    }

    /// The target in words.
    pub fn text(&self) -> String {
        let Self {
            of,
            figure,
            against,
            multiple,
        } = self;
        let sense = if figure.is_a_rate() { ">=" } else { "<=" };
        format!("{of} {}: {sense} {multiple}x {}", figure.title(), against.title)
    }

    /// The target and what became of it, for the results.
    pub fn report(&self, verdict: Option<Verdict>) -> Value {
        json!({
            "target": self.text(),
            "reached": verdict.map(|verdict| (verdict.reached * 1e3).round() / 1e3),
            "met": verdict.map(|verdict| verdict.is_met),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::series::Series;
    use super::*;

    fn results(figure: Figure, value: f64) -> Results {
        let mut series = Series::default();
        series.push(value);
        Results::from([(figure, series)])
    }

    fn target(figure: Figure, multiple: f64) -> Target {
        Target {
            of: "coracle-async",
            figure,
            against: FIRECRACKER,
            multiple,
        }
    }

    #[test]
    fn a_rate_is_compared_with_the_highest_and_a_cost_with_the_lowest() {
        for (figure, multiple, reached) in [(Figure::Iops, 1.25, 1.2), (Figure::HostCpu, 1.5, 2.4)] {
            let all = [
                ("coracle-async", results(figure, 240.0)),
                ("firecracker-async", results(figure, 200.0)),
                ("firecracker-sync", results(figure, 100.0)),
                ("qemu", results(figure, 1000.0)),
            ];
            let verdict = target(figure, multiple).judge(all.iter().map(|(name, all)| (*name, all)));
            assert_eq!(
                verdict,
                Some(Verdict {
                    reached,
                    is_met: false
                }),
                "{figure:?}"
            );
        }
    }

    #[test]
    fn nothing_is_met_that_was_not_measured() {
        let alone = [("coracle-async", results(Figure::Iops, 1.0))];
        let verdict = target(Figure::Iops, 1.0).judge(alone.iter().map(|(name, all)| (*name, all)));
        assert_eq!(verdict, None);
    }
}
