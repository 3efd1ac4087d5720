//! Replays every input that is kept: the corpus of each fuzz target, and what once broke a promise.

mod targets;

use std::fs;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};

use targets::TARGETS;

/// As much as the tree keeps of inputs, in bytes: seeds, not a fuzzer's whole memory.
const CORPUS_BYTES_MAX: u64 = 96 << 10;

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus")
}

fn entries(directory: &Path) -> Vec<PathBuf> {
    let read = fs::read_dir(directory).unwrap_or_else(|e| panic!("{}: {e}", directory.display()));
    let mut entries: Vec<PathBuf> = read
        .map(|entry| entry.expect("a directory that is there can be listed").path())
        .collect();
    entries.sort();
    entries
}

#[test]
fn every_kept_input_is_taken_without_a_panic() {
    let mut broken = Vec::new();
    for target in TARGETS {
        for file in entries(&corpus().join(target.name)) {
            let input = fs::read(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
            if catch_unwind(|| (target.run)(&input)).is_err() {
                broken.push(file);
            }
        }
    }
    assert!(broken.is_empty(), "these break a promise: {broken:#?}");
}

#[test]
fn every_target_has_inputs_and_every_input_a_target() {
    let directories = entries(&corpus());
    let names: Vec<_> = directories
        .iter()
        .filter_map(|d| d.file_name()?.to_str())
        .collect();
    let expected: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
    assert_eq!(names, expected);
    for directory in &directories {
        assert!(!entries(directory).is_empty(), "{} is empty", directory.display());
    }
}

#[test]
fn the_corpus_stays_small() {
    let files = entries(&corpus()).into_iter().flat_map(|d| entries(&d));
    let bytes: u64 = files.map(|f| fs::metadata(f).map_or(0, |m| m.len())).sum();
    assert!(
        bytes <= CORPUS_BYTES_MAX,
        "{bytes} bytes, {CORPUS_BYTES_MAX} are allowed"
    );
}
