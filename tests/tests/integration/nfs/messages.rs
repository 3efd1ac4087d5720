//! What a user is told who has made a mistake: what is wrong, where, and what to do.

use std::os::unix::fs::chown;
use std::path::Path;
use std::time::Duration;

use coracle_tests::case::Context;
use coracle_tests::guest::{Machine, run as run_machine};
use coracle_tests::harness::nfs::server::{Export, Plan, Server, Squash};
use coracle_tests::monitor::{Launch, Monitor};
use coracle_tests::{Outcome, ensure};
use serde_json::{Value, json};

use super::IMAGE;
use crate::network::boot::open_to_all;
use crate::network::messages::{self, Words};
use crate::network::{drive, with};

const SOON: Duration = Duration::from_secs(20);
const MIB: u64 = 1 << 20;
/// A user whom nothing belongs to.
const STRANGER: u32 = 1234;

/// A mistake: the server it is made with, what was done to its files, the rest of the URL behind the server, and words of which
/// the message must have one of each group.
struct Row {
    name: &'static str,
    plan: fn() -> Plan,
    before: fn(&Server) -> Outcome,
    url: &'static str,
    words: Words,
}

const NOTHING: fn(&Server) -> Outcome = |_| Ok(());

/// Mistakes about where an image is, and what.
fn of_places() -> Vec<Row> {
    let row = |name, url, words| Row {
        name,
        plan: || Plan::image(MIB),
        before: NOTHING,
        url,
        words,
    };
    vec![
        row(
            "no such export",
            "AT/elsewhere/image.raw",
            &[&["no `elsewhere` in /"], &["exported"]],
        ),
        row(
            "no such directory in an export",
            "AT/export/below/image.raw",
            &[&["no `below` in /export"]],
        ),
        row(
            "no such file",
            "AT/export/none.raw",
            &[&["no image `none.raw` in /export"], &["create it"]],
        ),
        row(
            "a file on the way",
            "AT/export/image.raw/image.raw",
            &[&["/export/image.raw"], &["is a directory"]],
        ),
        row("a directory", "AT/export", &[&["directory"], &["regular file"]]),
        Row {
            before: |server| {
                let link = server.path("export/link.raw");
                Ok(std::os::unix::fs::symlink("image.raw", link)?)
            },
            ..row(
                "a symbolic link",
                "AT/export/link.raw",
                &[&["symbolic link"], &["path that it leads to"]],
            )
        },
        Row {
            before: |server| Ok(std::fs::write(server.path(IMAGE), [0; 700])?),
            ..row(
                "a part of a sector",
                "AT/export/image.raw",
                &[&["700"], &["multiple of 512"], &["truncate"]],
            )
        },
        row(
            "nobody listens",
            "127.0.0.1:1/export/image.raw",
            &[
                &["127.0.0.1:1"],
                &["refused", "nobody listens", "nothing listens"],
                &["does it run"],
            ],
        ),
        row(
            "a name that is no host's",
            "no-such-host.invalid/export/image.raw",
            &[&["resolve", "no address", "not known"], &["IP address"]],
        ),
    ]
}

/// Mistakes about versions.
fn of_versions() -> Vec<Row> {
    let row = |name, plan, url, words| Row {
        name,
        plan,
        before: NOTHING,
        url,
        words,
    };
    vec![
        row(
            "a server without 4.1",
            || Plan::image(MIB).minor_versions(&[0]),
            "AT/export/image.raw",
            &[&["has no NFSv4.1"], &["4.1 or 4.2"]],
        ),
        row(
            "a server without the version that is asked for",
            || Plan::image(MIB).minor_versions(&[0, 1]),
            "AT/export/image.raw?version=4.2",
            &[&["has no NFSv4.2"]],
        ),
        row(
            "version 3, to write",
            || Plan::image(MIB),
            "AT/export/image.raw?version=3",
            &[&["NFSv3"], &["second writer"], &["read-only"]],
        ),
        row(
            "no such version",
            || Plan::image(MIB),
            "AT/export/image.raw?version=5",
            &[&["version"], &["3, 4.1 or 4.2"]],
        ),
    ]
}

/// Mistakes about who may do what.
fn of_users() -> Vec<Row> {
    let row = |name, plan, before, url, words| Row {
        name,
        plan,
        before,
        url,
        words,
    };
    vec![
        row(
            "a user who may not write",
            || Plan::image(MIB),
            |server| open_to_all(&server.path(IMAGE), 0o644),
            "AT/export/image.raw?uid=1234&gid=1234",
            &[&["no permission"], &["uid 1234, gid 1234"], &["`uid=`"]],
        ),
        row(
            "a user who may not look",
            || Plan::image(MIB),
            |server| open_to_all(&server.path("export"), 0o700),
            "AT/export/image.raw?uid=1234&gid=1234",
            &[&["no permission"], &["uid 1234, gid 1234"], &["`uid=`"]],
        ),
        row(
            "root that is taken for nobody",
            || Plan::default().export(Export::new("export").image("image.raw", MIB).squash(Squash::Root)),
            |server| open_to_all(&server.path(IMAGE), 0o600),
            "AT/export/image.raw?uid=0&gid=0",
            &[&["no permission"], &["root for nobody"]],
        ),
        row(
            "an export to be read only",
            || Plan::default().export(Export::new("export").image("image.raw", MIB).read_only()),
            NOTHING,
            "AT/export/image.raw",
            &[&["read-only"], &["make the drive read-only"]],
        ),
        row(
            "a directory where no record can be made",
            || Plan::image(MIB),
            |server| Ok(chown(server.path(IMAGE), Some(STRANGER), Some(STRANGER))?),
            "AT/export/image.raw?uid=1234&gid=1234",
            &[&["no lease record"], &["uid 1234, gid 1234"], &["`lease_at`"]],
        ),
    ]
}

pub(super) fn run(context: &Context) -> Outcome {
    let rows = [of_places(), of_versions(), of_users()]
        .into_iter()
        .flatten()
        .collect();
    messages::all(rows, |row: &Row| row.name, |row| refuse(context, row))
}

fn refuse(context: &Context, row: &Row) -> Outcome {
    let server = Server::start((row.plan)())?;
    (row.before)(&server)?;
    let url = format!("nfs://{}", row.url.replace("AT", &server.address().to_string()));
    let place = url.split('?').next().unwrap_or_default();
    messages::refuse(context, drive(&url), place, row.words).map(drop)
}

/// Whoever has the image, by its record; and if that is where others do not look, that somebody has it.
pub(super) fn holder(context: &Context) -> Outcome {
    let server = Server::start(Plan::image(MIB))?;
    let url = server.url(IMAGE);
    let first = holding(context, drive(&url))?;
    let owner = format!("VM `the-first` (pid {} on ", first.process().0);
    for drive in [drive(&url), reader(&url)] {
        let said = messages::refuse(context, drive, &url, &[&["generation 1"], &["stop"]])?;
        ensure!(said.contains(&owner), "no {owner:?} in: {said}");
    }
    first.signal(rustix::process::Signal::TERM)?;
    first.wait(SOON)?;
    run_machine(
        Launch::new(&context.environment)?,
        &Machine::unikernel(&context.environment, "do=hello").drive(drive(&url)),
        SOON,
    )?
    .expect(0)?;
    let place = tempfile::tempdir()?;
    let elsewhere = with(drive(&url), "lease_at", json!(place.path().join("record")));
    let _first = holding(context, elsewhere)?;
    let words: Words = &[&["another client has it open"], &["stop"]];
    messages::refuse(context, drive(&url), &url, words).map(drop)
}

/// With the place for the record that the message asks for, the image is used.
pub(super) fn record_elsewhere(context: &Context) -> Outcome {
    let server = Server::start(Plan::image(MIB))?;
    chown(server.path(IMAGE), Some(STRANGER), Some(STRANGER))?;
    let place = tempfile::tempdir()?;
    let url = format!("{}?uid={STRANGER}&gid={STRANGER}", server.url(IMAGE));
    let drive = with(drive(&url), "lease_at", json!(place.path().join("record")));
    let words = "do=pattern-write:seed=5 do=flush do=pattern-verify:seed=5";
    let machine = Machine::unikernel(&context.environment, words).drive(drive);
    run_machine(Launch::new(&context.environment)?, &machine, SOON)?.expect(0)?;
    let names = |directory: &Path| -> Outcome<Vec<String>> {
        let entries = std::fs::read_dir(directory)?;
        let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
        names.collect()
    };
    ensure!(
        names(&server.path("export"))? == ["image.raw"],
        "something was left beside the image"
    );
    ensure!(!names(place.path())?.is_empty(), "there is no record");
    Ok(())
}

/// A machine that has the image and goes on.
fn holding(context: &Context, drive: Value) -> Outcome<Monitor> {
    let words = "do=hello do=spin:seconds=forever";
    let machine = Machine::unikernel(&context.environment, words).drive(drive);
    let monitor = Launch::new(&context.environment)?
        .arguments(["--id", "the-first"])
        .config(&machine.config())?
        .start()?;
    monitor.console.wait_for("hello from", SOON)?;
    Ok(monitor)
}

fn reader(url: &str) -> Value {
    json!({ "drive_id": "d", "path_on_host": url, "is_root_device": false, "is_read_only": true })
}
