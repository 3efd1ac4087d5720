//! What a user is told who has made a mistake: what is wrong, where, and no secret.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

use coracle_tests::case::Context;
use coracle_tests::harness::iscsi::target::{Lun, NAME, Plan, Target};
use coracle_tests::{Outcome, ensure};

use super::drive;
use crate::network::messages::{self, Words};

const MIB: u64 = 1 << 20;
const SECRET: &str = "a-secret-of-ours";
const MUTUAL: &str = "a-secret-of-theirs";
const WRONG: &str = "not-the-secret-at-all";

/// A mistake: the target it is made with, the URL, and words of which the message must have one of each group, beside
/// the URL itself.
struct Row {
    name: &'static str,
    plan: Plan,
    url: fn(SocketAddr, &Path) -> String,
    words: Words,
}

/// Mistakes about who is who.
fn of_secrets() -> Vec<Row> {
    let disk = || Plan::disk(MIB);
    let locked = || disk().chap("us", SECRET);
    vec![
        Row {
            name: "a wrong secret",
            plan: locked(),
            url: |at, files| with_user(at, &format!("chap_secret_file={}", files.join("wrong").display())),
            words: &[&["CHAP", "chap_secret_file"], &["secret"], &["`us`"]],
        },
        Row {
            name: "no user and no secret",
            plan: locked(),
            url: |at, _| format!("iscsi://{at}/{NAME}/1"),
            words: &[&["user"], &["chap_secret_file"]],
        },
        Row {
            name: "a secret file that is not there",
            plan: locked(),
            url: |at, files| with_user(at, &format!("chap_secret_file={}", files.join("none").display())),
            words: &[&["none"], &["No such file", "does not exist", "there is no"]],
        },
        Row {
            name: "a target that cannot prove who it is",
            plan: locked(),
            url: mutual,
            words: &[&["mutual"], &["prove", "proof", "response", "answer"]],
        },
        Row {
            name: "a target that proves to be another",
            plan: locked().mutual("them", WRONG),
            url: mutual,
            words: &[&["mutual"], &["secret"]],
        },
    ]
}

/// Mistakes about where an image is, and what.
fn of_places() -> Vec<Row> {
    let disk = || Plan::disk(MIB);
    vec![
        Row {
            name: "no such LUN",
            plan: disk(),
            url: |at, _| format!("iscsi://{at}/{NAME}/7"),
            words: &[&["LUN 7", "logical unit 7"]],
        },
        Row {
            name: "no such target",
            plan: disk(),
            url: |at, _| format!("iscsi://{at}/iqn.2026-01.test:elsewhere/1"),
            words: &[
                &["target"],
                &[
                    "no such",
                    "not known",
                    "unknown",
                    "not found",
                    "no target",
                    "does not",
                ],
            ],
        },
        Row {
            name: "nobody listens",
            plan: disk(),
            // Nothing listens at port 1.
            url: |_, _| format!("iscsi://127.0.0.1:1/{NAME}/1"),
            words: &[
                &["127.0.0.1:1"],
                &["refused", "nobody listens", "nothing listens"],
            ],
        },
        Row {
            name: "a name that is no host's",
            plan: disk(),
            url: |_, _| format!("iscsi://no-such-host.invalid/{NAME}/1"),
            words: &[&["resolve", "no address", "not known"]],
        },
        Row {
            name: "a write-protected unit",
            plan: Plan::default().lun(Lun::new(MIB).read_only()),
            url: |at, _| format!("iscsi://{at}/{NAME}/1"),
            words: &[
                &["write-protected", "write protected", "write protection"],
                &["is_read_only", "read-only"],
            ],
        },
    ]
}

fn with_user(at: SocketAddr, options: &str) -> String {
    format!("iscsi://us@{at}/{NAME}/1?{options}")
}

fn mutual(at: SocketAddr, files: &Path) -> String {
    let files = files.display();
    let own = format!("chap_secret_file={files}/secret");
    with_user(
        at,
        &format!("{own}&mutual_user=them&mutual_secret_file={files}/mutual"),
    )
}

pub(super) fn run(context: &Context) -> Outcome {
    let rows = of_secrets().into_iter().chain(of_places()).collect();
    messages::all(rows, |row: &Row| row.name, |row| refuse(context, row))?;
    no_room_for_a_tail(context)
}

/// One block is a disk, but none that can be formatted.
fn no_room_for_a_tail(context: &Context) -> Outcome {
    let target = Target::start(Plan::disk(512))?;
    let created = Command::new(&context.environment.coraclectl)
        .args(["disk", "create", &target.url(1)])
        .output()?;
    let said = String::from_utf8_lossy(&created.stderr).into_owned();
    ensure!(!created.status.success(), "it was formatted: {said}");
    ensure!(
        ["too small", "no room"].iter().any(|word| said.contains(word)),
        "a disk of 512 bytes was refused for another reason: {said}"
    );
    Ok(())
}

fn refuse(context: &Context, row: &Row) -> Outcome {
    let files = tempfile::tempdir()?;
    for (name, secret) in [("secret", SECRET), ("mutual", MUTUAL), ("wrong", WRONG)] {
        std::fs::write(files.path().join(name), secret)?;
    }
    let target = Target::start(row.plan.clone())?;
    let url = (row.url)(target.address(), files.path());
    let drive = drive(&url, files.path());
    let target_name = url.split('/').nth(3).unwrap_or_default();
    let said = messages::refuse(context, drive, target_name, row.words)?;
    for secret in [SECRET, MUTUAL, WRONG] {
        ensure!(!said.contains(secret), "a secret is told: {said}");
    }
    Ok(())
}
