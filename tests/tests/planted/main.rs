//! Plants the bugs in `tests/planted`, one at a time, and holds the simulators to finding each of them.
//!
//! A patch begins with a sentence about the bug, the arguments of the `cargo test` that has to find
//! it, and the words with which it may say so.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use coracle_tests::tree;

/// Seeds in which a bug has to be found; a sound tree passes them all.
const SEEDS: &str = "1000";

/// The crates of the workspace that a bug is planted in.
const CRATES: &[&str] = &["storage", "devices"];

#[test]
fn every_planted_bug_is_found() {
    let plot = Plot::new();
    let bugs = bugs();
    assert!(bugs.len() >= 30, "the bugs are kept in tests/planted");
    let mut searches: Vec<&str> = bugs.iter().map(|bug| bug.found_by.as_str()).collect();
    searches.sort_unstable();
    searches.dedup();
    plot.lay_out();
    for search in searches {
        let sound = plot.search(search);
        assert!(
            sound.status.success(),
            "cargo test {search} fails without any bug:\n{}",
            text_of(&sound)
        );
    }
    let missed: Vec<String> = bugs.iter().filter_map(|bug| plot.missed(bug).err()).collect();
    assert!(missed.is_empty(), "\n{}", missed.join("\n"));
}

/// A patch that plants a bug.
struct Bug {
    patch: PathBuf,
    /// The arguments of the `cargo test` that finds it.
    found_by: String,
    /// What that says; any of these.
    says: Vec<String>,
}

fn bugs() -> Vec<Bug> {
    let patches = tree::files().into_iter().filter(|file| {
        file.starts_with("tests/planted") && file.extension().is_some_and(|extension| extension == "patch")
    });
    patches
        .map(|patch| {
            let text = tree::read(&patch);
            let head = text.split("\n--- ").next().unwrap_or_default();
            let values = |key: &str| -> Vec<String> {
                let lines = head.lines().filter_map(|line| line.strip_prefix(key));
                lines.map(|value| value.trim().to_owned()).collect()
            };
            let [found_by] = values("Found by:")
                .try_into()
                .unwrap_or_else(|_| panic!("{}: one line begins with `Found by:`", patch.display()));
            let says = values("Says:");
            assert!(
                !says.is_empty(),
                "{}: no line begins with `Says:`",
                patch.display()
            );
            Bug {
                patch,
                found_by,
                says,
            }
        })
        .collect()
}

/// A copy of the tree in which bugs are planted. It stays, so that the next time little is compiled.
struct Plot {
    tree: PathBuf,
    build: PathBuf,
}

impl Plot {
    fn new() -> Self {
        let plot = Path::new(env!("CARGO_TARGET_TMPDIR")).join("planted");
        Self {
            tree: plot.join("tree"),
            build: plot.join("build"),
        }
    }

    /// Makes the copy equal to the tree. What is equal already keeps its time, and is not compiled again.
    fn lay_out(&self) {
        let is_wanted = |file: &PathBuf| {
            CRATES.iter().any(|name| file.starts_with(name)) || file == Path::new("Cargo.lock")
        };
        for file in tree::files().into_iter().filter(is_wanted) {
            let bytes = fs::read(tree::root().join(&file)).expect("tracked files can be read");
            self.put(&file, &bytes);
        }
        let manifest = tree::read(Path::new("Cargo.toml"));
        let members = |line: &str| match line.starts_with("members = ") {
            true => format!("members = {CRATES:?}\n"),
            false => format!("{line}\n"),
        };
        let manifest: String = manifest.lines().map(members).collect();
        self.put(Path::new("Cargo.toml"), manifest.as_bytes());
    }

    fn put(&self, file: &Path, bytes: &[u8]) {
        let place = self.tree.join(file);
        if fs::read(&place).is_ok_and(|there| there == bytes) {
            return;
        }
        fs::create_dir_all(place.parent().expect("a file lies in a directory")).expect("target/ is ours");
        fs::write(&place, bytes).expect("target/ is ours");
    }

    /// Plants `bug` and says whether it was missed, and how.
    fn missed(&self, bug: &Bug) -> Result<(), String> {
        self.lay_out();
        let name = bug.patch.display();
        let planted = Command::new("git")
            .arg("apply")
            .arg(tree::root().join(&bug.patch))
            // Otherwise git would find our own repository around the copy, and pass the patch over.
            .env(
                "GIT_CEILING_DIRECTORIES",
                self.tree.parent().expect("the copy lies in the plot"),
            )
            .current_dir(&self.tree)
            .output()
            .expect("git is installed");
        if !planted.status.success() {
            return Err(format!("{name} does not apply any more: {}", text_of(&planted)));
        }
        let found = self.search(&bug.found_by);
        let text = text_of(&found);
        if found.status.success() {
            return Err(format!(
                "{name} was not found by cargo test {} in {SEEDS} seeds",
                bug.found_by
            ));
        }
        if !bug.says.iter().any(|words| text.contains(words)) {
            return Err(format!(
                "{name} was found in other words than {:?}:\n{text}",
                bug.says
            ));
        }
        let seed = text
            .lines()
            .find(|line| line.starts_with("seed "))
            .unwrap_or("no seed is named");
        println!("{name}: {seed}");
        Ok(())
    }

    /// Runs the simulator that has to find something.
    fn search(&self, found_by: &str) -> Output {
        Command::new(env!("CARGO"))
            .args(["test", "--offline", "--quiet"])
            .args(found_by.split_whitespace())
            .env("CARGO_TARGET_DIR", &self.build)
            .env("CARGO_PROFILE_DEV_DEBUG", "0")
            // Thirty builds of one crate: CI does without otherwise.
            .env("CARGO_INCREMENTAL", "1")
            .env("SEEDS", SEEDS)
            .env_remove("SEED")
            .env("RUST_BACKTRACE", "0")
            .current_dir(&self.tree)
            .output()
            .expect("cargo runs this test")
    }
}

fn text_of(output: &Output) -> String {
    let texts = [&output.stdout, &output.stderr];
    texts.map(|bytes| String::from_utf8_lossy(bytes)).concat()
}
