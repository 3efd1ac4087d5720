//! Reads the tree and holds what no compiler checks: which crate may use which, the size of files,
//! forbidden words, licences and duplicate versions, and the tests that the threat model names.

mod crates;
mod licences;
mod seccomp;
mod security;
mod sources;

use coracle_tests::tree;
