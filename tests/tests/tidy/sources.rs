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
    for (file, text) in sources {
        let lines = text.lines().count();
        assert!(
            lines <= FILE_LINES_MAX,
            "{} has {lines} lines, {FILE_LINES_MAX} are allowed",
            file.display()
        );
    }
}

#[test]
fn no_line_is_wider_than_a_screen() {
    for (file, text) in tree::rust_sources() {
        for (number, line) in (1..).zip(text.lines()) {
            let width = line.chars().count();
            assert!(
                width <= LINE_CHARACTERS_MAX,
                "{}:{number} is {width} characters wide",
                file.display()
            );
        }
    }
}

#[test]
fn nothing_is_left_half_done() {
    for (file, text) in tree::rust_sources() {
        for (number, line) in (1..).zip(text.lines()) {
            for (head, tail, remedy) in FORBIDDEN {
                let word = format!("{head}{tail}");
                assert!(
                    !line.contains(&word),
                    "{}:{number} says {word}: {remedy}",
                    file.display()
                );
            }
        }
    }
}

#[test]
fn every_source_says_first_what_it_is_for() {
    for (file, text) in tree::rust_sources() {
        let first = text.lines().next().unwrap_or_default();
        assert!(
            first.starts_with("//! "),
            "{} does not begin with a sentence of documentation",
            file.display()
        );
    }
}

#[test]
fn every_module_with_unsafe_code_opts_in_with_a_reason() {
    for (file, text) in tree::rust_sources() {
        let code = || {
            text.lines()
                .map(str::trim_start)
                .filter(|line| !line.starts_with("//"))
        };
        let is_unsafe = code().any(|line| {
            ["unsafe {", "unsafe fn ", "unsafe impl ", "unsafe extern "]
                .iter()
                .any(|form| line.contains(form))
        });
        let opts_in = text.contains("expect(unsafe_code") || text.contains("expect(\n    unsafe_code");
        let is_this = file == Path::new("tests/tests/tidy/sources.rs");
        assert!(
            !is_unsafe || opts_in || is_this,
            "{} has unsafe code and does not say why",
            file.display()
        );
    }
}

#[test]
fn the_tree_speaks_of_no_machine_that_it_was_made_on() {
    // In halves, for the same reason as above.
    let places = [("/wo", "rk/"), ("/tm", "p/co/"), ("/ro", "ot/.cargo")];
    for file in tree::files() {
        // Binary files have no sentences.
        let Ok(text) = std::fs::read_to_string(tree::root().join(&file)) else {
            continue;
        };
        for (head, tail) in places {
            assert!(
                !text.contains(&format!("{head}{tail}")),
                "{} names {head}{tail}",
                file.display()
            );
        }
    }
}
