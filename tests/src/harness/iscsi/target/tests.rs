//! A target is shown by what QEMU's own initiator sees of it.

use std::os::unix::fs::FileExt;

use super::*;

const MIB: u64 = 1 << 20;

/// Runs `qemu-io` on an URL and returns what it says; an error when the URL does not open.
fn qemu_io(url: &str, commands: &[&str]) -> Outcome<String> {
    let mut qemu = Command::new("timeout");
    qemu.args(["20", "qemu-io", "-f", "raw", url]);
    commands.iter().for_each(|command| {
        qemu.args(["-c", command]);
    });
    let done = qemu.output()?;
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (output, errors) = (said(&done.stdout), said(&done.stderr));
    crate::ensure!(done.status.success(), "{}: {output}{errors}", done.status);
    Ok(output)
}

fn start(plan: Plan) -> Target {
    Target::start(plan).expect("tgtd is there: tests/tools/need tgtd")
}

#[test]
fn what_an_initiator_writes_is_in_the_image_and_survives_a_kill() {
    let mut target = start(Plan::disk(4 * MIB).digests());
    qemu_io(&target.url(1), &["write -P 7 1M 64k", "flush"]).expect("it serves");
    let image = std::fs::File::open(target.image(1).expect("it has one")).expect("a file");
    let mut found = vec![0; 64 << 10];
    image.read_exact_at(&mut found, MIB).expect("it is that long");
    assert!(found.iter().all(|byte| *byte == 7));
    let address = target.address();
    target.kill().expect("it lives");
    assert!(
        qemu_io(&target.url(1), &["read 0 512"]).is_err(),
        "a dead target serves"
    );
    target.restart().expect("its port is still its own");
    assert_eq!(target.address(), address);
    let again = qemu_io(&target.url(1), &["read -P 7 1M 64k"]).expect("it serves again");
    assert!(!again.contains("Pattern verification failed"), "{again}");
}

#[test]
fn a_stopped_target_says_nothing_until_it_goes_on() {
    let target = start(Plan::disk(MIB));
    target.stop().expect("it lives");
    std::thread::scope(|scope| {
        let read = scope.spawn(|| qemu_io(&target.url(1), &["read 0 512"]));
        std::thread::sleep(Duration::from_millis(500));
        assert!(!read.is_finished(), "a stopped target answers");
        target.go_on().expect("it lives");
        read.join().expect("no panic").expect("it goes on");
    });
}

#[test]
fn many_targets_at_a_time_do_not_meet() {
    let targets: Vec<Target> = std::thread::scope(|scope| {
        let starts: Vec<_> = (0..6)
            .map(|number| scope.spawn(move || start(Plan::disk((number + 1) * MIB))))
            .collect();
        starts
            .into_iter()
            .map(|start| start.join().expect("no panic"))
            .collect()
    });
    for (number, target) in (1..).zip(&targets) {
        let length = qemu_io(&target.url(1), &["length"]).expect("it serves");
        assert_eq!(length.trim(), format!("{number} MiB"));
    }
}

#[test]
fn nothing_is_left_of_a_target_whose_owner_panics() {
    let seen = std::sync::Mutex::new(None);
    let ended = std::panic::catch_unwind(|| {
        let target = start(Plan::disk(MIB));
        let process = target.process().expect("it lives");
        *seen.lock().expect("nobody else has it") = Some((process, target.directory.path().to_owned()));
        panic!("in the middle of a test");
    });
    assert!(ended.is_err());
    let (process, directory) = seen.into_inner().expect("a value").expect("it was set");
    assert!(!process.is_there() && !directory.exists());
}

#[test]
fn a_write_protected_unit_refuses_writes_and_a_writable_one_beside_it_does_not() {
    let plan = Plan::disk(MIB).lun(Lun::new(MIB).read_only());
    let target = start(plan);
    qemu_io(&target.url(1), &["write 0 512"]).expect("LUN 1 is writable");
    let refused = qemu_io(&target.url(2), &["write 0 512"]).expect_err("LUN 2 is not");
    let text = crate::case::text(&refused);
    assert!(text.contains("write protected"), "{text}");
    assert!(
        qemu_io(&target.url(3), &["read 0 512"]).is_err(),
        "there is no LUN 3"
    );
}

#[test]
fn blocks_are_as_large_as_asked() {
    let target = start(Plan::default().lun(Lun::new(MIB).block_bytes(4096)));
    let said = Command::new("iscsi-readcapacity16").arg(target.url(1)).output();
    let said = String::from_utf8(said.expect("libiscsi-bin is there").stdout).expect("text");
    assert!(said.contains("LOGICAL BLOCK LENGTH IN BYTES:4096"), "{said}");
    assert!(said.contains("LBPME:1"), "it takes no UNMAP: {said}");
}

#[test]
fn who_does_not_know_the_secret_is_not_served() {
    let target = start(Plan::disk(MIB).chap("user", "twelve-letters"));
    let with = |user: &str| target.url(1).replace("iscsi://", &format!("iscsi://{user}@"));
    qemu_io(&with("user%twelve-letters"), &["read 0 512"]).expect("it knows the secret");
    for wrong in ["user%eleven-letter", "nobody%twelve-letters"] {
        assert!(
            qemu_io(&with(wrong), &["read 0 512"]).is_err(),
            "{wrong} is served"
        );
    }
    assert!(
        qemu_io(&target.url(1), &["read 0 512"]).is_err(),
        "without a name"
    );
}
