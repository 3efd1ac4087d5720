//! A row of a benchmark as people and programs read it: medians with their noise, and what was reached.

use serde_json::{Map, Value};

use super::measurement::{FIGURES, Figure, Results};
use super::target::Target;

/// Who took part, and what came of it.
pub type Field<'a> = [(&'a str, &'a Results)];

/// Prints the figures that anybody has.
pub fn print(field: &Field<'_>) {
    let is_there = |figure: &Figure| field.iter().any(|(_, results)| results.contains_key(figure));
    let figures: Vec<_> = FIGURES.into_iter().filter(is_there).collect();
    let head: String = figures
        .iter()
        .map(|figure| format!("{:>16}", figure.title()))
        .collect();
    println!("  {:<24}{head}", "");
    for (name, results) in field {
        let cells: String = figures
            .iter()
            .map(|figure| match results.get(figure) {
                None => format!("{:>16}", "-"),
                Some(series) => {
                    let median = format!("{:.*}", figure.decimals(), series.median());
                    format!("{:>16}", format!("{median} ±{:.0}%", series.spread_percent()))
                }
            })
            .collect();
        println!("  {name:<24}{cells}");
    }
}

/// The figures for the results.
pub fn report(field: &Field<'_>) -> Value {
    let contenders: Map<String, Value> = field
        .iter()
        .map(|(name, results)| {
            let figures = results
                .iter()
                .map(|(figure, series)| (figure.key().to_owned(), series.report()));
            ((*name).to_owned(), Value::Object(figures.collect()))
        })
        .collect();
    Value::Object(contenders)
}

/// The targets and what became of them, for the results.
pub fn judged(targets: &[Target], field: &Field<'_>) -> Value {
    let report = |target: &Target| target.report(target.judge(field.iter().copied()));
    targets.iter().map(report).collect()
}
