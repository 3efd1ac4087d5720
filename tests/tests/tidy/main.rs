//! Reads the tree and holds what no compiler checks: which crate may use which, the size of files,
//! forbidden words, licences and duplicate versions.

mod crates;
mod licences;
mod seccomp;
mod sources;

use coracle_tests::tree;
