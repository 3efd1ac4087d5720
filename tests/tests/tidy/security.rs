//! What the threat model says is shown by a test is shown by one that there is.

use std::path::Path;

use crate::tree;

/// Where the integration tests are, and where their groups are listed.
const TESTS: &str = "tests/tests/integration";

/// What stands between backticks and has the form of a test's name, `group::test`; `*` stands for any end.
fn named(text: &str) -> Vec<(&str, &str)> {
    let is_name = |part: &str| {
        !part.is_empty()
            && part
                .chars()
                .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "_*".contains(c))
    };
    let quoted = text.split('`').skip(1).step_by(2);
    let pairs = quoted.filter_map(|word| word.split_once("::"));
    pairs
        .filter(|(group, test)| is_name(group) && is_name(test))
        .collect()
}

#[test]
fn each_test_that_the_threat_model_names_is_there() {
    let text = tree::read(Path::new("SECURITY.md"));
    let named = named(&text);
    assert!(named.len() > 15, "the threat model names tests");
    let groups = tree::read(&Path::new(TESTS).join("main.rs"));
    let sources = tree::rust_sources();
    let lacking: Vec<String> = named
        .into_iter()
        .filter(|(group, test)| !is_there(group, test, &groups, &sources))
        .map(|(group, test)| format!("{group}::{test}"))
        .collect();
    assert!(
        lacking.is_empty(),
        "SECURITY.md names tests that there are not:\n{}",
        lacking.join("\n")
    );
}

fn is_there(group: &str, test: &str, groups: &str, sources: &[(std::path::PathBuf, String)]) -> bool {
    let literal = match test.split_once('*') {
        Some((start, _)) => format!("\"{start}"),
        None => format!("\"{test}\""),
    };
    // The groups of storage servers share their tests.
    let of = [
        group,
        if ["iscsi", "nfs"].contains(&group) {
            "network"
        } else {
            group
        },
    ];
    let is_of_the_group = |file: &Path| {
        of.iter().any(|group| {
            let place = Path::new(TESTS).join(group);
            file.starts_with(&place) || file == place.with_extension("rs")
        })
    };
    groups.contains(&format!("(\"{group}\", "))
        && sources
            .iter()
            .any(|(file, text)| is_of_the_group(file) && text.contains(&literal))
}

#[test]
fn names_of_tests_are_told_from_other_words() {
    let text = "see `a::b_c`, `a::*`, `Kind::Io`, `make test` and a::d";
    assert_eq!(named(text), [("a", "b_c"), ("a", "*")]);
    let sources = [(Path::new(TESTS).join("a.rs"), "name: \"b_c\",".to_owned())];
    let there = |group, test| is_there(group, test, "(\"a\", a::CASES)", &sources);
    assert!(there("a", "b_c") && there("a", "b*") && there("a", "*"));
    assert!(!there("a", "b") && !there("a", "c*") && !there("e", "b_c"));
}
