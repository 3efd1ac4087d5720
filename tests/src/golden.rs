//! Snapshots that versions of Coracle have made, kept so that every later one can show that it still goes on from them.
//!
//! `golden/snapshot/format-N` has the two files of one, as they were written; `record-snapshot` adds the one of today's format.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use crate::Outcome;
use crate::environment::Environment;
use crate::guest::{Machine, blank_image};
use crate::monitor::Launch;

/// The two files of a snapshot that is kept.
#[derive(Clone, Debug)]
pub struct GoldenSnapshot {
    /// Everything but the memory.
    pub state: PathBuf,
    /// The memory.
    pub memory: PathBuf,
}

/// The status with which the guest of every kept snapshot ends, some ticks after it goes on.
pub const STATUS: u8 = 7;
/// A line that it writes before.
pub const LINE: &str = "tick: n=59 ";

/// Small enough to be kept.
const MEMORY_MIB: u32 = 4;
/// The names of its files, in the directory in which its monitor runs: no snapshot names a path of the host that made it.
const KERNEL: &str = "test-kernel";
const DISK: &str = "test-disk";

impl GoldenSnapshot {
    fn of_format(format: u32) -> Self {
        let directory = root().join(format!("format-{format}"));
        Self {
            state: directory.join("state"),
            memory: directory.join("memory"),
        }
    }

    /// All that are kept.
    ///
    /// # Errors
    ///
    /// When the directory cannot be read.
    pub fn all() -> Outcome<Vec<Self>> {
        let mut kept = Vec::new();
        for entry in std::fs::read_dir(root())? {
            let directory = entry?.path();
            kept.push(Self {
                state: directory.join("state"),
                memory: directory.join("memory"),
            });
        }
        Ok(kept)
    }

    /// Makes in `directory`, in which a monitor will run, what the machine of every kept snapshot names there.
    ///
    /// # Errors
    ///
    /// When that fails.
    pub fn prepare(directory: &Path) -> Outcome {
        blank_image(&directory.join(DISK), 1)
    }

    /// A copy in `directory`: a load writes beside the memory.
    ///
    /// # Errors
    ///
    /// When it cannot be made.
    pub fn copied_to(&self, directory: &Path) -> Outcome<Self> {
        let copy = Self {
            state: directory.join("test-state"),
            memory: directory.join("test-memory"),
        };
        std::fs::copy(&self.state, &copy.state)?;
        std::fs::copy(&self.memory, &copy.memory)?;
        Ok(copy)
    }

    /// The body that asks for it to be loaded.
    pub fn load(&self) -> Value {
        json!({
            "snapshot_path": self.state,
            "mem_backend": { "backend_type": "File", "backend_path": self.memory },
            "resume_vm": true,
        })
    }

    /// Makes one of today's format.
    ///
    /// # Errors
    ///
    /// When there is one already, or the machine does not come so far.
    pub fn record(environment: &Environment) -> Outcome<Self> {
        let launch = Launch::new(environment)?;
        let directory = launch.directory().to_owned();
        std::fs::copy(&environment.unikernel, directory.join(KERNEL))?;
        Self::prepare(&directory)?;
        let words = "do=hello do=tick:ms=20,count=60 do=exit:status=7";
        let machine = Machine::new(Path::new(KERNEL), &crate::guest::unikernel_words(words))
            .memory_mib(MEMORY_MIB)
            .drive(json!({
                "drive_id": "d", "path_on_host": DISK, "is_root_device": false, "is_read_only": true
            }))
            .part("entropy", json!({}));
        let monitor = launch.start()?;
        monitor.configure(&machine.config())?;
        monitor.start_instance()?;
        monitor.console.wait_for("tick: n=3 ", Duration::from_secs(30))?;
        monitor.set_state("Paused")?;
        let (state, memory) = (directory.join("test-state"), directory.join("test-memory"));
        let create = json!({ "snapshot_path": state, "mem_file_path": memory });
        monitor.must("PUT", "/snapshot/create", Some(&create))?;
        let kept = Self::of_format(format_of(&std::fs::read(&state)?)?);
        crate::ensure!(
            !kept.state.exists(),
            "{} is kept for good: only a new format has a new one",
            kept.state.display()
        );
        std::fs::create_dir_all(kept.state.parent().ok_or("it has a directory")?)?;
        std::fs::copy(&state, &kept.state)?;
        std::fs::copy(&memory, &kept.memory)?;
        Ok(kept)
    }
}

/// The format of what follows the header of a state.
fn format_of(state: &[u8]) -> Outcome<u32> {
    let field = state.get(8..12).and_then(|field| field.try_into().ok());
    Ok(u32::from_le_bytes(field.ok_or("a state has a header")?))
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/snapshot")
}
