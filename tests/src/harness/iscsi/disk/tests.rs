//! Each writer has his own way to one image, as QEMU's initiator finds.

use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use super::*;

const MIB: u64 = 1 << 20;
const SOON: Duration = Duration::from_secs(10);

/// The way to the image of the next start.
fn next_way(disk: &Disk) -> String {
    let drive = disk.drive().expect("a free port");
    let path = drive.get("path_on_host").and_then(Value::as_str);
    path.expect("an URL").to_owned()
}

/// Writes a pattern to the first sector by this way.
fn write(way: &str, pattern: u8) -> Child {
    Command::new("qemu-io")
        .args(["-f", "raw", way, "-c", &format!("write -P {pattern} 0 512")])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("QEMU is there")
}

/// Whether it ends well within this time; it is killed if it doesn't end.
fn is_done(writer: &mut Child, limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    while Instant::now() < deadline {
        if let Some(status) = writer.try_wait().expect("a child") {
            return status.success();
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    false
}

fn first_byte(disk: &Disk) -> u8 {
    let sector = disk.read(512).expect("it has one");
    sector.first().copied().expect("512 bytes")
}

#[test]
fn a_writer_who_is_cut_off_writes_nothing_until_he_is_healed_and_another_does() {
    let disk = Disk::with_record_in_a_file(MIB).expect("tgtd is there");
    let (first, second) = (next_way(&disk), next_way(&disk));
    disk.cut_off(1).expect("there was a start");
    let mut late = write(&first, 1);
    assert!(is_done(&mut write(&second, 2), SOON));
    assert!(!is_done(&mut late, Duration::from_millis(300)));
    assert_eq!(first_byte(&disk), 2);
    disk.heal(1).expect("there was a start");
    assert!(is_done(&mut late, SOON));
    assert_eq!(first_byte(&disk), 1);
    assert!(disk.cut_off(3).is_err(), "there were two starts");
}

#[test]
fn every_way_leads_to_the_image_again_after_a_restart() {
    let disk = Disk::with_record_in_a_file(MIB).expect("tgtd is there");
    let ways = [next_way(&disk), next_way(&disk)];
    assert!(is_done(&mut write(&ways[0], 1), SOON));
    disk.restart().expect("its port is its own");
    assert_eq!(first_byte(&disk), 1);
    for (way, pattern) in ways.iter().zip(2..) {
        assert!(is_done(&mut write(way, pattern), SOON));
        assert_eq!(first_byte(&disk), pattern);
    }
}

#[test]
fn only_a_lease_that_was_given_back_or_broken_is_free() {
    let disk = Disk::with_record_in_a_file(MIB).expect("tgtd is there");
    for (state, expected) in [
        (State::Running, Expected::Refused),
        (State::Resumed, Expected::Refused),
        (State::Stopped, Expected::Refused),
        (State::Killed, Expected::Refused),
        (State::Ended, Expected::Granted),
        (State::Broken, Expected::Granted),
    ] {
        assert_eq!(disk.expected(state), expected, "{state:?}");
    }
    let arguments = disk.arguments();
    assert!(arguments.iter().any(|word| word == "--lease-at"), "{arguments:?}");
    assert_eq!(disk.unleased().arguments().len(), 1);
}
