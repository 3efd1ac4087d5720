//! Each writer has his own way to one image.

use super::*;
use crate::harness::nfs::second_client;

const MIB: u64 = 1 << 20;

/// The way to the image of the next start.
fn next_way(disk: &Disk) -> String {
    let drive = disk.drive().expect("a free port");
    let path = drive.get("path_on_host").and_then(Value::as_str);
    path.expect("an URL").to_owned()
}

fn fill(disk: &Disk, byte: u8) {
    let image = disk.server.borrow().path(IMAGE);
    let image = std::fs::File::options().write(true).open(image);
    image
        .and_then(|image| image.write_all_at(&[byte; 512], 0))
        .expect("it is there");
}

/// The first byte as soon as this way leads anywhere.
fn first_byte(way: &str) -> u8 {
    loop {
        if let Ok(content) = second_client::read(way) {
            return content.first().copied().expect("1 MiB");
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
}

#[test]
fn who_is_cut_off_hears_nothing_until_he_is_healed_and_another_does() {
    let disk = Disk::new(MIB).expect("ganesha is there");
    fill(&disk, 3);
    let (first, second) = (next_way(&disk), next_way(&disk));
    disk.cut_off(1).expect("there was a start");
    std::thread::scope(|scope| {
        let late = scope.spawn(|| first_byte(&first));
        assert_eq!(first_byte(&second), 3);
        std::thread::sleep(std::time::Duration::from_millis(300));
        assert!(!late.is_finished());
        disk.heal(1).expect("there was a start");
        assert_eq!(late.join().expect("no panic"), 3);
    });
    assert!(disk.cut_off(3).is_err(), "there were two starts");
}

#[test]
fn every_way_leads_to_the_image_again_after_a_restart() {
    let disk = Disk::new(MIB).expect("ganesha is there");
    let ways = [next_way(&disk), next_way(&disk)];
    for (way, byte) in ways.iter().zip(1..) {
        fill(&disk, byte);
        assert_eq!(first_byte(way), byte);
        assert_eq!(disk.read(1).expect("it is longer"), [byte]);
        Network::restart(&disk).expect("its port is its own");
        assert_eq!(first_byte(way), byte);
    }
}

#[test]
fn a_lease_is_free_when_its_holder_is_gone_and_may_be_when_he_is_silent() {
    let disk = Disk::new(MIB).expect("ganesha is there");
    let expect = |expected: [Expected; 6]| {
        let states = [
            State::Running,
            State::Resumed,
            State::Stopped,
            State::Killed,
            State::Ended,
            State::Broken,
        ];
        assert_eq!(states.map(|state| disk.expected(state)), expected);
    };
    use Expected::{Either, Granted, Refused};
    expect([Refused, Either, Either, Granted, Granted, Granted]);
    next_way(&disk);
    disk.cut_off(1).expect("there was a start");
    expect([Either, Either, Either, Granted, Granted, Granted]);
}
