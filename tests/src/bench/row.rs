//! The rows of the disk benchmark: a load, who takes part, and what is to be reached.

use super::contender::{
    CORACLE_ASYNC, CORACLE_OVERLAY_FILE, CORACLE_OVERLAY_MEMORY, CORACLE_SYNC, CORACLE_TWO_QUEUES, Contender,
    FIRECRACKER_ASYNC, FIRECRACKER_SYNC, QEMU,
};
use super::image::Pieces;
use super::measurement::Figure;
use super::target::{self, Against, Target};

/// One row, in one place and with one way to wait.
#[derive(Clone, Debug)]
pub struct Row {
    /// What it is called in tables and filters.
    pub name: String,
    /// How its image was written.
    pub pieces: Pieces,
    /// The arguments of the guest's `load`.
    pub load: String,
    /// Who takes part, in the order of their turns.
    pub field: Vec<Contender>,
    /// What is to be reached.
    pub targets: Vec<Target>,
}

impl Row {
    /// Whether a contender takes part only to compare others with: alone it says nothing here.
    pub fn is_yardstick(&self, contender: &Contender) -> bool {
        self.targets
            .iter()
            .all(|target| target.against.names == [contender.name])
    }
}

/// The ways in which the guest waits for the disk.
const WAITS: [&str; 2] = ["poll", "irq"];

/// All who have the image itself as their disk.
const EVERYBODY: [Contender; 5] = [
    CORACLE_ASYNC,
    CORACLE_SYNC,
    FIRECRACKER_ASYNC,
    FIRECRACKER_SYNC,
    QEMU,
];

/// The rows for an image in `place`, reads before writes: what is written must reach the medium one day.
pub fn rows(place: &str) -> Vec<Row> {
    let read = "mode=randread,bs=4096,depth=32";
    let write = "mode=randwrite,bs=4096,depth=32";
    let single = "mode=randread,bs=4096,depth=1";
    let stream = "mode=seqread,bs=131072,depth=8";
    let overlays = [CORACLE_ASYNC, CORACLE_OVERLAY_FILE, CORACLE_OVERLAY_MEMORY];
    let queues = [CORACLE_ASYNC, CORACLE_TWO_QUEUES];
    let everywhere: [(&str, &str, &[Contender], Vec<Target>); 7] = [
        ("randread-4k-qd32", read, &EVERYBODY, batch_targets()),
        ("randread-4k-qd1", single, &EVERYBODY, single_targets()),
        ("seqread-128k-qd8", stream, &EVERYBODY, stream_targets()),
        ("two-queues-randread-4k-qd32", read, &queues, queue_targets()),
        ("overlay-randread-4k-qd32", read, &overlays, overlay_targets(0.9)),
        ("randwrite-4k-qd32", write, &EVERYBODY, batch_targets()),
        (
            "overlay-randwrite-4k-qd32",
            write,
            &overlays,
            overlay_targets(0.8),
        ),
    ];
    let in_pages = everywhere.map(|row| (Pieces::Pages, row));
    // Only a file system on a disk has folios of several sizes.
    let in_mebibytes = (place == "disk").then_some((
        Pieces::Mebibytes,
        (
            "large-folios-randwrite-4k-qd32",
            write,
            &EVERYBODY[..],
            batch_targets(),
        ),
    ));
    let all = in_pages.iter().chain(&in_mebibytes);
    let rows = all.flat_map(|(pieces, (name, load, field, targets))| {
        WAITS.map(|wait| Row {
            name: format!("{name} {place} {wait}"),
            pieces: *pieces,
            load: format!("{load},wait={wait}"),
            field: field.to_vec(),
            targets: targets.clone(),
        })
    });
    rows.collect()
}

fn batch_targets() -> Vec<Target> {
    vec![
        coracle(Figure::Iops, target::FIRECRACKER, 1.25),
        coracle(Figure::Iops, target::QEMU, 2.0),
        coracle(Figure::HostCpu, target::FIRECRACKER, 0.8),
    ]
}

fn single_targets() -> Vec<Target> {
    vec![
        coracle(Figure::LatencyMedian, target::FIRECRACKER, 1.0),
        coracle(Figure::LatencyTail, target::FIRECRACKER, 1.0),
    ]
}

fn stream_targets() -> Vec<Target> {
    vec![coracle(Figure::Bandwidth, target::PEERS, 1.0)]
}

fn queue_targets() -> Vec<Target> {
    vec![Target {
        of: CORACLE_TWO_QUEUES.name,
        ..coracle(Figure::HostCpu, target::PLAIN, 1.1)
    }]
}

fn overlay_targets(multiple: f64) -> Vec<Target> {
    let overlays = [CORACLE_OVERLAY_FILE, CORACLE_OVERLAY_MEMORY];
    let target = |overlay: Contender| Target {
        of: overlay.name,
        ..coracle(Figure::Iops, target::PLAIN, multiple)
    };
    overlays.map(target).into()
}

fn coracle(figure: Figure, against: Against, multiple: f64) -> Target {
    Target {
        of: CORACLE_ASYNC.name,
        figure,
        against,
        multiple,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_yardstick_alone_is_not_worth_a_row() {
        let yardsticks = |start: &str| -> Vec<&str> {
            let row = rows("disk").into_iter().find(|row| row.name.starts_with(start));
            let row = row.expect("there is such a row");
            let names = row.field.iter().filter(|contender| row.is_yardstick(contender));
            names.map(|contender| contender.name).collect()
        };
        assert_eq!(yardsticks("randread-4k-qd32"), [""; 0]);
        assert_eq!(yardsticks("overlay-randwrite"), ["coracle-async"]);
    }

    #[test]
    fn every_target_is_one_of_a_contender_in_its_row_and_against_another() {
        for row in rows("disk") {
            let takes_part = |start: &&str| {
                row.field
                    .iter()
                    .any(|contender| contender.name.starts_with(*start))
            };
            for target in &row.targets {
                assert!(takes_part(&target.of), "{}", row.name);
                assert!(target.against.names.iter().all(takes_part), "{}", row.name);
            }
        }
    }
}
