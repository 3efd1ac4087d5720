#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

use std::fs;
use std::sync::Barrier;

use super::*;
use crate::lease::owner::Owner;
use crate::lease::record::Phase;

struct Rig {
    directory: tempfile::TempDir,
    owner: Owner,
}

impl Rig {
    fn new() -> Self {
        Self {
            directory: tempfile::tempdir().unwrap(),
            owner: Owner::of_this_process("vm"),
        }
    }

    fn image(&self) -> PathBuf {
        self.directory.path().join("a.img")
    }

    fn chain(&self) -> Chain {
        Chain::of(&self.image()).unwrap()
    }

    /// Makes the next step, whatever it is.
    fn step(&self) -> Record {
        let chain = self.chain();
        let record = Record::after(chain.newest().unwrap().as_ref(), Phase::Held, &self.owner).unwrap();
        chain.append(&record).unwrap();
        record
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.directory.path()).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn put(&self, name: &str, content: &str) {
        fs::write(self.directory.path().join(name), content).unwrap();
    }
}

#[test]
fn a_step_is_found_again_and_the_last_but_one_is_cleared_away() {
    let rig = Rig::new();
    assert_eq!(rig.chain().newest().unwrap(), None);
    for number in 1..=11 {
        let record = rig.step();
        assert_eq!(record.epoch, number);
        assert_eq!(rig.chain().newest().unwrap(), Some(record));
    }
    assert_eq!(rig.names(), ["a.img.lease.10", "a.img.lease.11"]);
}

#[test]
fn of_eight_that_race_for_one_step_one_wins() {
    let rig = Rig::new();
    for _ in 0..20 {
        let last = rig.chain().newest().unwrap();
        let record = Record::after(last.as_ref(), Phase::Held, &rig.owner).unwrap();
        let barrier = Barrier::new(8);
        let won = std::thread::scope(|scope| {
            let racers: Vec<_> = (0..8)
                .map(|racer| {
                    let mut record = record.clone();
                    record.owner.pid = racer;
                    let (rig, barrier) = (&rig, &barrier);
                    scope.spawn(move || {
                        let chain = rig.chain();
                        barrier.wait();
                        match chain.append(&record) {
                            Ok(()) => Some(record),
                            Err(ChainError::Lost { .. }) => None,
                            Err(error) => panic!("{error}"),
                        }
                    })
                })
                .collect();
            let ended = racers.into_iter().filter_map(|racer| racer.join().unwrap());
            ended.collect::<Vec<_>>()
        });
        assert_eq!(won.len(), 1);
        assert_eq!(rig.chain().newest().unwrap().as_ref(), won.first());
    }
    assert_eq!(rig.names().len(), 2, "{:?}", rig.names());
}

#[test]
fn a_step_that_comes_after_its_number_was_cleared_away_is_lost() {
    let rig = Rig::new();
    let late = Record::after(None, Phase::Held, &rig.owner).unwrap();
    for _ in 0..3 {
        rig.step();
    }
    assert_eq!(rig.names(), ["a.img.lease.2", "a.img.lease.3"]);
    assert!(matches!(
        rig.chain().append(&late),
        Err(ChainError::Lost { number: 1 })
    ));
    assert_eq!(rig.names(), ["a.img.lease.2", "a.img.lease.3"]);
}

#[test]
fn what_a_crash_leaves_is_passed_over_and_swept() {
    let rig = Rig::new();
    rig.step();
    rig.put("a.img.lease.new-0b6f-0", "coracle lease 1\nepo");
    // As a writer leaves it that dies before it clears away.
    for name in ["a.img.lease.2", "a.img.lease.4"] {
        fs::copy(
            rig.directory.path().join("a.img.lease.1"),
            rig.directory.path().join(name),
        )
        .unwrap();
    }
    let text = Record {
        epoch: 9,
        ..rig.chain().read(1).unwrap()
    }
    .text();
    rig.put("a.img.lease.9", &text);
    rig.chain().sweep().unwrap();
    assert_eq!(rig.step().epoch, 10);
    assert_eq!(rig.names(), ["a.img.lease.10", "a.img.lease.9"]);
}

#[test]
fn names_that_are_none_of_ours_are_left_alone() {
    let rig = Rig::new();
    let others = [
        "a.img.lease.",
        "a.img.lease.007",
        "a.img.lease.18446744073709551616",
        "a.img.lease.7.bak",
        "a.img.lease.x",
        "b.img.lease.3",
    ];
    others.iter().for_each(|name| rig.put(name, "garbage"));
    rig.step();
    rig.chain().sweep().unwrap();
    let mut expected = [others.as_slice(), &["a.img.lease.1"]].concat();
    expected.sort_unstable();
    assert_eq!(rig.names(), expected);
}

#[test]
fn a_newest_record_that_is_none_is_an_error_that_names_it() {
    let garbage: [fn(&Path); 5] = [
        |path| fs::write(path, "").unwrap(),
        |path| fs::write(path, [b'x'; 5000]).unwrap(),
        |path| fs::create_dir(path).unwrap(),
        |path| std::os::unix::fs::symlink("a.img.lease.1", path).unwrap(),
        |path| {
            let (kind, mode) = (rustix::fs::FileType::Fifo, Mode::RUSR | Mode::WUSR);
            rustix::fs::mknodat(rustix::fs::CWD, path, kind, mode, 0).unwrap();
        },
    ];
    for put in garbage {
        let rig = Rig::new();
        rig.step();
        put(&rig.directory.path().join("a.img.lease.7"));
        let refused = rig.chain().newest();
        assert!(
            matches!(refused, Err(ChainError::Unreadable { number: 7, .. })),
            "{refused:?}"
        );
    }
}

#[test]
fn a_record_under_another_number_is_not_believed() {
    let rig = Rig::new();
    rig.step();
    let from = rig.directory.path().join("a.img.lease.1");
    fs::copy(from, rig.directory.path().join("a.img.lease.5")).unwrap();
    assert!(matches!(
        rig.chain().newest(),
        Err(ChainError::Unreadable {
            number: 5,
            source: UnreadableError::Number(1),
            ..
        })
    ));
}

#[test]
fn a_directory_that_is_not_there_has_no_place_for_records() {
    let rig = Rig::new();
    let absent = rig.directory.path().join("absent/a.img");
    assert!(matches!(Chain::of(&absent), Err(ChainError::NoPlace { .. })));
    assert!(matches!(
        Chain::of(Path::new("/")),
        Err(ChainError::NoPlace { .. })
    ));
    let long = rig.directory.path().join("x".repeat(255));
    let record = Record::after(None, Phase::Held, &rig.owner).unwrap();
    let refused = Chain::of(&long).unwrap().append(&record);
    assert!(matches!(refused, Err(ChainError::NoPlace { .. })), "{refused:?}");
}
