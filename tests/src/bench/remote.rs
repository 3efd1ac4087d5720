//! The rows of the benchmarks of networks: what is done to a disk on a server, by whom, and what is to be reached.

use std::path::Path;

use super::contender::{CORACLE_ASYNC, Contender, QEMU as QEMU_GUEST};
use super::measurement::{Figure, Load, Results, measure};
use super::program::{Program, Shape, Way};
use super::target::{self, Target};
use crate::Outcome;
use crate::environment::Environment;

/// One row.
#[derive(Clone, Debug)]
pub struct Row {
    /// What it is called in tables and filters.
    pub name: String,
    /// Which of the target's units.
    pub unit: Unit,
    /// What is done.
    pub shape: Shape,
    /// Where a guest does it. A program without one always goes from one block to the next.
    pub order: Order,
    /// Who takes part, in the order of their turns.
    pub field: Vec<Client>,
    /// What is to be reached.
    pub targets: Vec<Target>,
}

/// Which block follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Any.
    Random,
    /// The next. QEMU makes one command of requests that lie side by side, up to 1 MiB: another load than was asked for.
    Sequential,
}

/// By which protocol disks are used, and what the issue of that asks.
#[derive(Clone, Copy, Debug)]
pub struct Protocol {
    /// Its name in the results.
    pub name: &'static str,
    /// What a request may cost as a multiple of what it costs QEMU; nothing where nothing is asked.
    cost: fn(Shape) -> Option<f64>,
    /// A server can say of a disk that it has no cache.
    has_through: bool,
}

/// iSCSI.
pub const ISCSI: Protocol = Protocol {
    name: "iscsi",
    cost: |shape| match (shape.is_large(), shape.direction, shape.depth) {
        (false, _, 1) => None,
        (false, ..) => Some(0.5),
        (true, Way::Read, _) => Some(0.8),
        (true, Way::Write, _) => Some(0.6),
    },
    has_through: true,
};

/// NFS.
pub const NFS: Protocol = Protocol {
    name: "nfs",
    cost: |shape| match (shape.is_large(), shape.depth) {
        (false, 1) => None,
        (false, _) => Some(0.6),
        (true, _) => Some(0.5),
    },
    has_through: false,
};

/// A disk of the benchmark's server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// It says that it has a write cache: what is written is kept until it is flushed.
    Cached,
    /// It says that it has none.
    Through,
    /// Like the first, for somebody who is there beside it.
    Spare,
}

/// Who uses the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Client {
    /// A monitor with the unikernel guest.
    Guest(Contender),
    /// A program without a guest.
    Program(Program),
}

impl Unit {
    /// The number of the logical unit.
    pub fn lun(self) -> usize {
        match self {
            Self::Cached => 1,
            Self::Through => 2,
            Self::Spare => 3,
        }
    }
}

impl Order {
    /// How the guest's `mode` begins.
    fn word(self) -> &'static str {
        match self {
            Self::Random => "rand",
            Self::Sequential => "seq",
        }
    }
}

impl Client {
    /// Its name in tables and filters.
    pub fn name(self) -> &'static str {
        match self {
            Self::Guest(contender) => contender.name,
            Self::Program(program) => program.name(),
        }
    }

    /// One run of a row on the disk with this URL, added to the results.
    ///
    /// # Errors
    ///
    /// When it fails, or a request does.
    pub fn measure(
        self,
        environment: &Environment,
        url: &str,
        row: &Row,
        milliseconds: u64,
        results: &mut Results,
    ) -> Outcome {
        let shape = row.shape;
        let contender = match self {
            Self::Program(program) => return program.measure(url, shape, milliseconds, results),
            Self::Guest(contender) => contender,
        };
        let arguments = format!(
            "mode={}{},bs={},depth={},wait=poll",
            row.order.word(),
            shape.direction.word(),
            shape.block_bytes,
            shape.depth
        );
        let load = Load {
            arguments: &arguments,
            milliseconds,
        };
        measure(&contender, environment, Path::new(url), load, results)
    }
}

const GUESTS: [Client; 2] = [Client::Guest(CORACLE_ASYNC), Client::Guest(QEMU_GUEST)];
const PROGRAMS: [Client; 2] = [
    Client::Program(Program::Storage),
    Client::Program(Program::QemuImg),
];

/// Every row; what is written comes last, as the target's file must reach its medium one day.
pub fn rows(protocol: Protocol) -> Vec<Row> {
    let mut rows = Vec::new();
    for direction in [Way::Read, Way::Write] {
        for (block_bytes, depth) in [(4096, 1), (4096, 32), (131_072, 8)] {
            let shape = Shape {
                direction,
                block_bytes,
                depth,
            };
            for (kind, order, field) in [
                ("alone", Order::Sequential, PROGRAMS),
                ("guest", Order::Random, GUESTS),
            ] {
                rows.push(Row {
                    name: name(shape, kind),
                    unit: Unit::Cached,
                    shape,
                    order,
                    targets: field
                        .first()
                        .map(|own| targets(protocol, *own, shape))
                        .unwrap_or_default(),
                    field: field.into(),
                });
            }
            if shape.is_large() {
                rows.push(Row {
                    name: name(shape, "guest seq"),
                    unit: Unit::Cached,
                    shape,
                    order: Order::Sequential,
                    targets: vec![],
                    field: GUESTS.into(),
                });
            }
            // What the bytes cost that are kept for a target with a write cache: the same without one.
            if protocol.has_through && direction == Way::Write && depth > 1 {
                rows.push(Row {
                    name: format!("{} no-write-cache", name(shape, "alone")),
                    unit: Unit::Through,
                    shape,
                    order: Order::Sequential,
                    targets: vec![],
                    field: PROGRAMS.into(),
                });
            }
        }
    }
    rows
}

fn name(shape: Shape, kind: &str) -> String {
    let (way, kib) = (shape.direction.word(), shape.block_bytes / 1024);
    format!("{way}-{kib}k-qd{} {kind}", shape.depth)
}

/// What the issue asks of the first of a field, beside QEMU's in the same row.
fn targets(protocol: Protocol, own: Client, shape: Shape) -> Vec<Target> {
    let target = |figure, multiple| Target {
        of: own.name(),
        figure,
        against: target::QEMU,
        multiple,
    };
    let is_large = shape.is_large();
    let speed = if is_large { Figure::Bandwidth } else { Figure::Iops };
    let cost = (protocol.cost)(shape).map(|multiple| target(Figure::HostCpu, multiple));
    std::iter::once(target(speed, 1.0)).chain(cost).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_of_the_issue_has_its_targets_for_the_guest_and_for_storage_alone() {
        let rows = rows(ISCSI);
        for (start, count) in [
            ("read-4k-qd1 ", 1),
            ("read-4k-qd32 ", 2),
            ("read-128k-qd8 ", 2),
            ("write-4k-qd1 ", 1),
            ("write-4k-qd32 ", 2),
            ("write-128k-qd8 ", 2),
        ] {
            for kind in ["alone", "guest"] {
                let row = rows.iter().find(|row| row.name == format!("{start}{kind}"));
                let row = row.expect("there is such a row");
                assert_eq!(row.targets.len(), count, "{}", row.name);
                let takes_part = |name: &str| row.field.iter().any(|client| client.name().starts_with(name));
                assert!(row.targets.iter().all(|target| takes_part(target.of)));
                assert!(takes_part("qemu"));
                // What a guest asks for one by one is judged only where QEMU cannot make less of it.
                assert!(kind == "alone" || row.order == Order::Random);
            }
        }
        assert_eq!(rows.iter().filter(|row| row.unit == Unit::Through).count(), 2);
    }
}
