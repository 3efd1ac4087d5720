//! The state file of a snapshot: an input is a file, or the bodies of sections, which no search would find the checksums for.

use std::path::Path;

use coracle_vmm::snapshot::load::StateFile;
use coracle_vmm::state::{Header, SECTIONS_MAX, Sections};

use super::Input;

/// What a state has, and what it has not.
const NAMES: [&str; 12] = [
    "origin", "config", "memory", "vm", "vcpu.0", "vcpu.1", "virtio.0", "virtio.1", "serial", "keyboard",
    "drives", "other",
];

pub(crate) fn run(data: &[u8]) {
    let mut input = Input::new(data);
    match input.u8() {
        0 => check(input.rest()),
        1 => check(&made_of(input)),
        _ => drop(Header::parse(input.rest())),
    }
}

/// A state whose sections are: the place of a name in the list, a version, a length, a body.
fn made_of(mut input: Input<'_>) -> Vec<u8> {
    let mut sections = Sections::default();
    let mut count = 0;
    while !input.is_empty() && count < SECTIONS_MAX {
        let name = NAMES
            .get(usize::from(input.u8()) % NAMES.len())
            .copied()
            .unwrap_or("other");
        let version = u32::from(input.u8() % 3);
        let length = usize::from(input.u16());
        sections.add_written(name, version, input.take(length));
        count += 1;
    }
    sections.finish()
}

fn check(bytes: &[u8]) {
    let file = StateFile::of(Path::new("fuzz"), bytes.to_vec());
    if let Ok(snapshot) = file.parse() {
        let mib = snapshot.config.machine().mem_size_mib;
        assert_eq!(
            snapshot.table.size_bytes(),
            mib << 20,
            "a table is of the machine's memory"
        );
    }
}
