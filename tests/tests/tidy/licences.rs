//! Holds the lists in deny.toml without cargo-deny: the licences, the sources, one version of each crate.

use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::crates::Metadata;
use crate::tree;

#[derive(Deserialize)]
struct Deny {
    licenses: Licenses,
    bans: Bans,
}

#[derive(Deserialize)]
struct Licenses {
    allow: Vec<String>,
}

#[derive(Deserialize)]
struct Bans {
    skip: Vec<Skip>,
}

#[derive(Deserialize)]
struct Skip {
    #[serde(rename = "crate")]
    name_at_version: String,
    reason: String,
}

impl Deny {
    fn read() -> Self {
        toml::from_str(&tree::read(Path::new("deny.toml"))).expect("deny.toml is TOML with our sections")
    }
}

/// Whether an SPDX expression can be met with the allowed licences: AND binds tighter than OR, an
/// old-style slash is an OR.
fn is_met(expression: &str, allowed: &[String]) -> bool {
    let expression = expression.replace('/', " OR ");
    if let Some((group, rest)) = expression.strip_prefix('(').and_then(|e| e.split_once(')')) {
        let group = is_met(group, allowed);
        let rest = rest.trim();
        return match (rest.strip_prefix("AND "), rest.strip_prefix("OR ")) {
            (Some(right), _) => group && is_met(right, allowed),
            (_, Some(right)) => group || is_met(right, allowed),
            _ => group && rest.is_empty(),
        };
    }
    let is_allowed = |licence: &str| allowed.iter().any(|a| a == licence.trim());
    expression
        .split(" OR ")
        .any(|choice| choice.split(" AND ").all(is_allowed))
}

#[test]
fn every_crate_has_a_licence_that_deny_toml_allows() {
    let (metadata, deny) = (Metadata::read(), Deny::read());
    for package in metadata.resolved() {
        let licence = package.license.as_deref().unwrap_or("none");
        assert!(
            is_met(licence, &deny.licenses.allow),
            "{} {} is under {licence}",
            package.name,
            package.version
        );
    }
}

#[test]
fn every_crate_comes_from_the_registry_or_this_tree() {
    for package in Metadata::read().resolved() {
        let source = package.source.as_deref();
        assert!(
            source.is_none_or(|s| s.starts_with("registry+")),
            "{} comes from {source:?}",
            package.name
        );
    }
}

#[test]
fn every_crate_is_there_in_one_version_unless_deny_toml_says_why() {
    let (metadata, deny) = (Metadata::read(), Deny::read());
    let mut versions: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    for package in metadata.resolved() {
        versions
            .entry(&package.name)
            .or_default()
            .insert(format!("{}@{}", package.name, package.version));
    }
    let duplicates = versions.values().filter(|all| all.len() > 1);
    for all in duplicates {
        let unexplained = all
            .iter()
            .filter(|v| deny.bans.skip.iter().all(|skip| skip.name_at_version != **v));
        assert!(unexplained.count() <= 1, "duplicate versions: {all:?}");
    }
}

#[test]
fn every_exception_in_deny_toml_is_needed_and_has_a_reason() {
    let (metadata, deny) = (Metadata::read(), Deny::read());
    for skip in deny.bans.skip {
        let is_there = metadata
            .resolved()
            .any(|p| format!("{}@{}", p.name, p.version) == skip.name_at_version);
        assert!(is_there, "{} is in no build any more", skip.name_at_version);
        assert!(!skip.reason.is_empty(), "{} has no reason", skip.name_at_version);
    }
}

#[test]
fn an_expression_is_met_by_one_side_of_or_and_both_sides_of_and() {
    let allowed = ["MIT".to_owned(), "Unicode-3.0".to_owned()];
    for met in [
        "MIT",
        "MIT OR GPL-3.0",
        "GPL-3.0/MIT",
        "(MIT OR GPL-3.0) AND Unicode-3.0",
        "MIT AND Unicode-3.0",
    ] {
        assert!(is_met(met, &allowed), "{met}");
    }
    for unmet in ["GPL-3.0", "MIT AND GPL-3.0", "(MIT OR X) AND GPL-3.0", "none", ""] {
        assert!(!is_met(unmet, &allowed), "{unmet}");
    }
}
