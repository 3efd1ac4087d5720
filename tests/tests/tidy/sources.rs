//! What every source file of ours keeps to.

use std::path::Path;

use crate::tree;

const FILE_LINES_MAX: usize = 800;
const LINE_CHARACTERS_MAX: usize = 130;

/// What may stand nowhere in our Rust; spelled in two halves so that this file passes its own test.
const FORBIDDEN: &[(&str, &str, &str)] = &[
    ("todo", "!(", "finish it or leave it out"),
    ("unimplemented", "!(", "finish it or leave it out"),
    ("dbg", "!(", "log it or leave it out"),
    (
        "#[",
        "ignore",
        "a test that cannot run here says so at run time, by name and with the reason",
    ),
    ("TO", "DO", "an open end belongs in the tracker"),
    ("FIX", "ME", "an open end belongs in the tracker"),
    ("X", "XX:", "an open end belongs in the tracker"),
];

#[test]
fn no_file_is_longer_than_one_sitting() {
    let sources = tree::rust_sources();
    assert!(sources.len() > 10, "the tree has sources");
    let lines = |text: &str| text.lines().count();
    let long = sources.iter().filter(|(_, text)| lines(text) > FILE_LINES_MAX);
    none(long.map(|(file, text)| {
        format!(
            "{}: {} lines, {FILE_LINES_MAX} are allowed",
            file.display(),
            lines(text)
        )
    }));
}

#[test]
fn no_line_is_wider_than_a_screen() {
    let width = |line: &str| line.chars().count();
    none(lines_where(|line| {
        (width(line) > LINE_CHARACTERS_MAX).then(|| format!("{} characters wide", width(line)))
    }));
}

#[test]
fn nothing_is_left_half_done() {
    none(lines_where(|line| {
        let (head, tail, remedy) = FORBIDDEN
            .iter()
            .find(|(head, tail, _)| line.contains(&format!("{head}{tail}")))?;
        Some(format!("says {head}{tail}: {remedy}"))
    }));
}

#[test]
fn every_source_says_first_what_it_is_for() {
    let first = |text: &str| text.lines().next().unwrap_or_default().to_owned();
    // A module's tests speak by their names.
    let is_tests = |file: &Path| {
        file.file_stem()
            .is_some_and(|stem| stem.to_string_lossy().ends_with("tests"))
    };
    let silent = tree::rust_sources()
        .into_iter()
        .filter(|(file, text)| !is_tests(file) && !first(text).starts_with("//! "));
    none(silent.map(|(file, _)| {
        format!(
            "{} does not begin with a sentence of documentation",
            file.display()
        )
    }));
}

#[test]
fn every_module_with_unsafe_code_opts_in_with_a_reason() {
    let is_unsafe = |text: &str| {
        let code = || {
            text.lines()
                .map(str::trim_start)
                .filter(|line| !line.starts_with("//"))
        };
        let forms = [
            ("unsafe", " {"),
            ("unsafe", " fn "),
            ("unsafe", " impl "),
            ("unsafe", " extern "),
        ];
        code().any(|line| {
            forms
                .iter()
                .any(|(head, tail)| line.contains(&format!("{head}{tail}")))
        })
    };
    let opts_in = |text: &str| {
        ["expect(unsafe_code", "expect(\n    unsafe_code"]
            .iter()
            .any(|form| text.contains(form))
    };
    let silent = tree::rust_sources()
        .into_iter()
        .filter(|(_, text)| is_unsafe(text) && !opts_in(text));
    none(silent.map(|(file, _)| format!("{} has unsafe code and does not say why", file.display())));
}

#[test]
fn the_tree_speaks_of_no_machine_that_it_was_made_on() {
    // In halves, for the same reason as above.
    let places =
        [("/wo", "rk/"), ("/tm", "p/co/"), ("/ro", "ot/.cargo")].map(|(head, tail)| format!("{head}{tail}"));
    let files = tree::files().into_iter().filter_map(|file| {
        // Binary files have no sentences.
        let text = std::fs::read_to_string(tree::root().join(&file)).ok()?;
        let place = places.iter().find(|place| text.contains(*place))?;
        Some(format!("{} names {place}", file.display()))
    });
    none(files);
}

/// What is wrong with a line, if anything, with the line's place.
fn lines_where(wrong: impl Fn(&str) -> Option<String>) -> Vec<String> {
    let mut found = Vec::new();
    for (file, text) in tree::rust_sources() {
        let lines = (1..).zip(text.lines());
        found.extend(lines.filter_map(|(n, line)| Some(format!("{}:{n} {}", file.display(), wrong(line)?))));
    }
    found
}

/// Fails with every finding at once.
fn none(findings: impl IntoIterator<Item = String>) {
    let findings: Vec<String> = findings.into_iter().collect();
    assert!(findings.is_empty(), "\n{}", findings.join("\n"));
}
