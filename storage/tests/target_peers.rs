//! The simulated target against initiators that others have written: libiscsi's tools and QEMU.
#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

use std::net::TcpListener;
use std::process::Command;

use coracle_storage::backend::Access;
use coracle_storage::sim::dice::Dice;
use coracle_storage::sim::serve::{Served, serve};
use coracle_storage::sim::target::options::{Mishaps, Options, Place};
use coracle_storage::sim::target::{Redirect, Target, Term};
use libtest_mimic::{Arguments, Failed, Trial};

fn main() {
    let arguments = Arguments::from_args();
    let trials = [
        trial("iscsi_ls_finds_the_target_and_its_units", "iscsi-ls", iscsi_ls),
        trial("iscsi_inq_reads_every_page", "iscsi-inq", iscsi_inq),
        trial("qemu_reads_what_it_wrote", "qemu-io", || {
            qemu(Options::default(), 1, "none");
        }),
        trial("qemu_reads_what_it_wrote_with_header_digests", "qemu-io", || {
            qemu(Options::default(), 1, "crc32c");
        }),
        trial(
            "qemu_reads_what_it_wrote_whatever_the_dice_say",
            "qemu-io",
            qemu_with_dice,
        ),
        trial("qemu_follows_a_redirect", "qemu-io", qemu_redirected),
    ];
    libtest_mimic::run(&arguments, trials.into()).exit();
}

/// A test that needs a program: where it is missing, the name says so, and the test counts as ignored.
fn trial(name: &str, program: &str, run: impl FnOnce() + Send + 'static) -> Trial {
    let is_there = Command::new(program).arg("--help").output().is_ok();
    let name = if is_there {
        name.to_owned()
    } else {
        format!("{name} (needs {program}: apt-get install libiscsi-bin qemu-utils qemu-block-extra)")
    };
    let run = || {
        run();
        Ok::<(), Failed>(())
    };
    Trial::test(name, run).with_ignored_flag(!is_there)
}

const SIZE_BYTES: u64 = 16 << 20;

/// Serves a target with a disk, number 1, and a small one that is write-protected, number 2.
fn serve_seeded(options: Options, seed: u64) -> Served<Target> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("{},1", listener.local_addr().unwrap());
    let place = Place {
        address,
        ..Place::default()
    };
    let make = move || {
        let target = Target::new(Options { place, ..options }, Dice::new(seed));
        target.add(1, SIZE_BYTES, Access::ReadWrite);
        target.add(2, 1 << 20, Access::ReadOnly);
        target
    };
    serve(listener, make).unwrap()
}

fn url(served: &Served<Target>, lun: u16) -> String {
    format!("iscsi://{}/iqn.2026-01.test:t1/{lun}", served.address())
}

/// Runs a program for at most half a minute; what it says, if it ends well.
fn run(served: &Served<Target>, program: &str, arguments: &[&str]) -> String {
    let output = Command::new("timeout")
        .arg("30")
        .arg(program)
        .args(arguments)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let cried = String::from_utf8_lossy(&output.stderr);
    let complaints = served.with(Target::complaints);
    assert!(
        output.status.success() && complaints.is_empty(),
        "{program} {arguments:?}: {}\n{said}{cried}\nthe target: {complaints:?}",
        output.status
    );
    said
}

fn iscsi_ls() {
    let served = serve_seeded(Options::default(), 1);
    let said = run(
        &served,
        "iscsi-ls",
        &["-s", &format!("iscsi://{}", served.address())],
    );
    assert!(said.contains("Target:iqn.2026-01.test:t1"), "{said}");
    assert!(said.contains("Lun:1    Type:DIRECT_ACCESS (Size:15M)"), "{said}");
    assert!(
        said.contains("Lun:2    Type:DIRECT_ACCESS (Size:1023k)"),
        "{said}"
    );
}

fn iscsi_inq() {
    let served = serve_seeded(Options::default(), 1);
    let standard = run(&served, "iscsi-inq", &[&url(&served, 1)]);
    assert!(
        standard.contains("Peripheral Device Type:DIRECT_ACCESS"),
        "{standard}"
    );
    assert!(standard.contains("Vendor:CORACLE"), "{standard}");
    for (page, words) in [
        ("0", "Page:0xb2 LOGICAL_BLOCK_PROVISIONING"),
        ("128", "Unit Serial Number:[sim00001]"),
        ("131", "Designator:[CORACLE sim00001]"),
        ("176", "maximum compare and write length:128"),
        ("177", "Medium Rotation Rate:0RPM"),
        ("178", "lbprz:1"),
    ] {
        let said = run(&served, "iscsi-inq", &["-e", "1", "-c", page, &url(&served, 1)]);
        assert!(said.contains(words), "page {page}: {said}");
    }
}

/// What QEMU does, one after the other.
const QEMU: &[&str] = &[
    "write -P 0x5a 0 2M",
    "write -P 0x11 512 1k",
    "write -f -P 0x77 3M 64k",
    "write -z 1M 4k",
    "discard 1536k 64k",
    "flush",
    "read -P 0x5a 0 512",
    "read -P 0x11 512 1k",
    "read -P 0x5a 4k 1020k",
    "read -P 0 1M 4k",
    "read -P 0 1536k 64k",
    "read -P 0x77 3M 64k",
];

/// Has QEMU write, read, discard and flush, and looks at what is left.
fn qemu(options: Options, seed: u64, header_digest: &str) {
    let served = serve_seeded(options, seed);
    let (address, target) = (served.address(), Place::default().name);
    let image = format!(
        "driver=iscsi,transport=tcp,portal={address},target={target},lun=1,header-digest={header_digest}"
    );
    let mut arguments = vec!["--image-opts", "-d", "unmap", &image];
    for command in QEMU {
        arguments.extend(["-c", command]);
    }
    let said = run(&served, "qemu-io", &arguments);
    // QEMU goes on after a command that has failed.
    let done = said.lines().filter(|line| line.contains(" bytes at offset "));
    assert_eq!(done.count(), QEMU.len() - 1, "seed {seed}: {said}");
    assert!(!said.contains("failed"), "seed {seed}: {said}");
    let (content, durable) = served.with(|target| (target.content(1), target.durable(1)));
    assert!(
        content == durable,
        "seed {seed}: a flush makes everything durable"
    );
    let first = |offset_bytes: usize| content.get(offset_bytes).copied().unwrap();
    assert_eq!(
        [first(0), first(512), first(1 << 20), first(3 << 20)],
        [0x5a, 0x11, 0, 0x77]
    );
}

/// Nothing befalls it but the order and size of things: libiscsi gives up on a unit that is busy when it is opened, and
/// holds its answer to a ping back, and all behind it, while the command window is closed.
fn qemu_with_dice() {
    for seed in 0..10 {
        let drawn = Options::draw(&mut Dice::new(seed));
        let digest = if drawn.limits.header_digest {
            "crc32c"
        } else {
            "none"
        };
        let options = Options {
            mishaps: Mishaps::default(),
            ..drawn
        };
        qemu(options, seed, digest);
    }
}

fn qemu_redirected() {
    let new = serve_seeded(Options::default(), 1);
    let old = serve_seeded(Options::default(), 2);
    let address = new.address().to_string();
    old.with(move |target| {
        target.redirect(Some(Redirect {
            address,
            term: Term::Temporarily,
        }));
    });
    let said = run(
        &old,
        "qemu-io",
        &["-f", "raw", &url(&old, 1), "-c", "write -P 9 0 4k"],
    );
    assert!(said.contains("wrote 4096/4096"), "{said}");
    let content = new.with(|target| target.content(1));
    assert_eq!(content.get(..4096).unwrap(), [9; 4096]);
    assert!(old.with(|target| target.content(1)).iter().all(|byte| *byte == 0));
}
