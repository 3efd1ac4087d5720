//! Who takes part in the disk benchmark: a monitor, its I/O engine, and the shape that its disk has.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::qemu;
use crate::Outcome;
use crate::environment::Environment;
use crate::guest::{Machine, unikernel_words};
use crate::monitor::{Launch, Monitor};

/// A monitor with one way to have a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contender {
    /// Its name in tables and filters; it begins with the monitor's.
    pub name: &'static str,
    program: Program,
    disk: Disk,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Program {
    Coracle(Engine),
    Firecracker(Engine),
    Qemu,
}

/// Firecracker's `io_engine`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Engine {
    Async,
    Sync,
}

/// What lies between the guest and the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Disk {
    Raw,
    TwoQueues,
    /// An overlay whose writes go to a file beside the image.
    OverlayFile,
    /// An overlay whose writes stay in memory.
    OverlayMemory,
}

/// Guest memory: enough for every load.
const MEMORY_MIB: u64 = 128;

/// This monitor as it comes.
pub const CORACLE_ASYNC: Contender = coracle("coracle-async", Engine::Async, Disk::Raw);
/// With plain system calls.
pub const CORACLE_SYNC: Contender = coracle("coracle-sync", Engine::Sync, Disk::Raw);
/// With two queues, each driven by a vCPU of its own.
pub const CORACLE_TWO_QUEUES: Contender = coracle("coracle-two-queues", Engine::Async, Disk::TwoQueues);
/// With the image as the base of an overlay in a file.
pub const CORACLE_OVERLAY_FILE: Contender = coracle("coracle-overlay-file", Engine::Async, Disk::OverlayFile);
/// With the image as the base of an overlay in memory.
pub const CORACLE_OVERLAY_MEMORY: Contender =
    coracle("coracle-overlay-memory", Engine::Async, Disk::OverlayMemory);
/// Firecracker on io_uring.
pub const FIRECRACKER_ASYNC: Contender = Contender {
    name: "firecracker-async",
    program: Program::Firecracker(Engine::Async),
    disk: Disk::Raw,
};
/// Firecracker with plain system calls.
pub const FIRECRACKER_SYNC: Contender = Contender {
    name: "firecracker-sync",
    program: Program::Firecracker(Engine::Sync),
    disk: Disk::Raw,
};
/// QEMU's microvm on io_uring.
pub const QEMU: Contender = Contender {
    name: "qemu",
    program: Program::Qemu,
    disk: Disk::Raw,
};

const fn coracle(name: &'static str, engine: Engine, disk: Disk) -> Contender {
    Contender {
        name,
        program: Program::Coracle(engine),
        disk,
    }
}

impl Contender {
    /// Whether its program is at hand.
    pub fn is_there(&self, environment: &Environment) -> bool {
        !matches!(self.program, Program::Firecracker(_)) || environment.firecracker.is_some()
    }

    /// Queues that the guest is to load.
    pub fn queues(&self) -> u32 {
        if self.disk == Disk::TwoQueues { 2 } else { 1 }
    }

    /// Starts the guest with these words and the image as its disk.
    ///
    /// # Errors
    ///
    /// When the program cannot be started.
    pub fn start(&self, environment: &Environment, words: &str, image: &Path) -> Outcome<Monitor> {
        match self.program {
            Program::Coracle(engine) => self.boot(&environment.coracle, environment, words, image, engine),
            Program::Firecracker(engine) => {
                let program = environment.firecracker.as_ref().ok_or("FIRECRACKER is not set")?;
                self.boot(program, environment, words, image, engine)
            }
            Program::Qemu => {
                let drive = format!(
                    "if=none,id=a,file={},format=raw,cache=writeback,aio=io_uring",
                    image.display()
                );
                let arguments = qemu::microvm(MEMORY_MIB, &environment.unikernel, &unikernel_words(words));
                Launch::bare(Path::new(qemu::PROGRAM))?
                    .arguments(arguments.iter().map(String::as_str))
                    // Gives the threads of the vCPUs a name of their own.
                    .arguments(["-name", "bench,debug-threads=on"])
                    .arguments(["-global", "virtio-mmio.force-legacy=false", "-drive", &drive])
                    .arguments(["-device", "virtio-blk-device,drive=a"])
                    .spawn()
            }
        }
    }

    /// Starts a program with Firecracker's command line.
    fn boot(
        &self,
        program: &Path,
        environment: &Environment,
        words: &str,
        image: &Path,
        engine: Engine,
    ) -> Outcome<Monitor> {
        // Each run begins with nothing written; one that was broken off may have left its overlay.
        let _ = std::fs::remove_file(overlay_beside(image));
        let machine = Machine::unikernel(environment, words)
            .vcpus(self.queues())
            .drive(self.drive(image, engine));
        Launch::of(program)?
            .without_api()
            .config(&machine.config())?
            .spawn()
    }

    /// The drive, with FLUSH: without it the monitors do not do the same work.
    fn drive(&self, image: &Path, engine: Engine) -> Value {
        let engine = match engine {
            Engine::Async => "Async",
            Engine::Sync => "Sync",
        };
        let mut drive = json!({
            "drive_id": "a", "is_root_device": false, "is_read_only": false, "cache_type": "Writeback",
            "io_engine": engine,
        });
        let overlay = |path: Value| ("overlay", json!({ "base": image, "path": path, "keep": false }));
        let shape = match self.disk {
            Disk::Raw => vec![("path_on_host", json!(image))],
            Disk::TwoQueues => vec![("path_on_host", json!(image)), ("num_queues", json!(2))],
            Disk::OverlayFile => vec![overlay(json!(overlay_beside(image)))],
            Disk::OverlayMemory => vec![overlay(json!("memory"))],
        };
        if let Some(fields) = drive.as_object_mut() {
            fields.extend(shape.into_iter().map(|(name, value)| (name.to_owned(), value)));
        }
        drive
    }
}

fn overlay_beside(image: &Path) -> PathBuf {
    image.with_extension("overlay")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_disk_of_the_benchmark_can_be_flushed() {
        for contender in [CORACLE_SYNC, CORACLE_TWO_QUEUES, CORACLE_OVERLAY_FILE] {
            let drive = contender.drive(Path::new("a.img"), Engine::Async);
            assert_eq!(
                drive.get("cache_type"),
                Some(&json!("Writeback")),
                "{}",
                contender.name
            );
        }
    }
}
