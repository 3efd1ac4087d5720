//! Where the tree is and what git tracks in it.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The root of the workspace.
///
/// # Panics
///
/// When the crate was moved out of it.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the tests crate lies in the workspace")
}

/// The files that are tracked, or new and not ignored, as paths from the root.
///
/// # Panics
///
/// When git does not say.
pub fn files() -> Vec<PathBuf> {
    let listed = Command::new("git")
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .current_dir(root())
        .output()
        .expect("git is installed");
    assert!(
        listed.status.success(),
        "git ls-files: {}",
        String::from_utf8_lossy(&listed.stderr)
    );
    let names = String::from_utf8(listed.stdout).expect("the names of our files are UTF-8");
    let files: Vec<PathBuf> = names.split_terminator('\0').map(PathBuf::from).collect();
    files
        .into_iter()
        .filter(|file| root().join(file).is_file())
        .collect()
}

/// The Rust sources among them, each with its text.
///
/// # Panics
///
/// When one cannot be read.
pub fn rust_sources() -> Vec<(PathBuf, String)> {
    let sources = files()
        .into_iter()
        .filter(|file| file.extension().is_some_and(|e| e == "rs"));
    sources.map(|file| (file.clone(), read(&file))).collect()
}

/// The text of a file, by its path from the root.
///
/// # Panics
///
/// When there is none.
pub fn read(file: &Path) -> String {
    std::fs::read_to_string(root().join(file))
        .unwrap_or_else(|e| panic!("cannot read {}: {e}", file.display()))
}
