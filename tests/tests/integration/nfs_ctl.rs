//! What an operator does with images on a server: makes them, looks at their leases, takes those of the dead away.
#![expect(
    clippy::indexing_slicing,
    reason = "JSON that lacks a field is a failure of the test"
)]

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::{Duration, Instant};

use coracle_storage::nfs::v4::Operation;
use coracle_storage::sim::clock::Clock;
use coracle_storage::sim::dice::Dice;
use coracle_storage::sim::nfs::Server as Simulated;
use coracle_storage::sim::nfs::options::Options;
use coracle_storage::sim::serve::serve;
use coracle_tests::case::{Case, Context};
use coracle_tests::environment::Need;
use coracle_tests::guest::run;
use coracle_tests::harness::nfs::server::{Export, Plan, Server};
use coracle_tests::{Outcome, ensure};
use rustix::process::Signal;

use crate::network::generations::kept_until_raised;
use crate::network::operator::{SOON, committed, does, holding, machine, named, overlaid, refuses, said};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "an_image_is_made_once_and_is_free",
        need: Need::Nothing,
        run: an_image_is_made,
    },
    Case {
        name: "a_running_machine_is_shown_and_keeps_its_image",
        need: Need::Kvm,
        run: a_running_machine,
    },
    Case {
        name: "the_lease_of_a_killed_machine_is_broken_when_the_server_has_ended_it",
        need: Need::Kvm,
        run: a_killed_machine,
    },
    Case {
        name: "an_overlay_of_an_image_on_a_server_is_shown_flattened_rebased_and_committed",
        need: Need::Nothing,
        run: an_overlay,
    },
    Case {
        name: "an_image_on_a_server_is_gone_on_with_until_its_generation_is_raised",
        need: Need::Nothing,
        run: a_generation,
    },
    Case {
        name: "an_image_is_copied_to_a_server_and_back_and_zeros_take_no_space_there",
        need: Need::Nothing,
        run: a_copy,
    },
    Case {
        name: "a_copy_on_a_server_that_clones_is_made_by_the_server",
        need: Need::Nothing,
        run: a_clone,
    },
    Case {
        name: "an_image_of_a_tebibyte_of_holes_is_copied_in_the_time_of_its_data",
        need: Need::Nothing,
        run: a_sparse_copy,
    },
];

const IMAGE: &str = "export/image.raw";
const BYTES: u64 = 4 << 20;

fn an_image_is_made(context: &Context) -> Outcome {
    let environment = &context.environment;
    let server = Server::start(Plan::default().export(Export::new("export")))?;
    let url = server.url(IMAGE);
    for verb in [["lease", "show"], ["lease", "break"], ["disk", "info"]] {
        refuses(environment, &[verb[0], verb[1], &url], &["no image `image.raw`"])?;
    }
    refuses(environment, &["disk", "create", &url], &["--size"])?;
    ensure!(!server.path(IMAGE).exists(), "something was made");
    let made = does(environment, &["disk", "create", &url, "--size", "4M"])?;
    ensure!(made["size_bytes"] == BYTES, "{made}");
    ensure!(
        server.path(IMAGE).metadata()?.len() == BYTES,
        "it has another size"
    );
    refuses(
        environment,
        &["disk", "create", &url, "--size", "8M"],
        &["exists", "nothing was changed"],
    )?;
    let info = does(environment, &["disk", "info", &url])?;
    ensure!(
        info["size_bytes"] == BYTES && info["lease"].to_string().contains("never leased"),
        "{info}"
    );
    let shown = does(environment, &["lease", "show", &url])?;
    ensure!(
        shown["fence"] == "free"
            && shown["record"].is_null()
            && shown["records"].to_string().contains("image.raw.lease.<n>"),
        "{shown}"
    );
    refuses(environment, &["lease", "break", &url, "--yes"], &["is free"])?;
    let elsewhere = server.url("none/image.raw");
    refuses(
        environment,
        &["disk", "create", &elsewhere, "--size", "4M"],
        &["no `none` in /"],
    )
}

fn a_generation(_: &Context) -> Outcome {
    let mut server = Server::start(Plan::image(BYTES))?;
    let url = server.url(IMAGE);
    kept_until_raised(&url, || {
        server.kill()?;
        server.restart()
    })
}

fn a_running_machine(context: &Context) -> Outcome {
    let environment = &context.environment;
    let server = Server::start(Plan::image(BYTES))?;
    let url = server.url(IMAGE);
    let first = holding(context, "vm1", &url)?;
    let pid = first.process().0;
    let shown = does(environment, &["lease", "show", &url])?;
    ensure!(
        shown["fence"] == "writer"
            && shown["record"]["vm"] == "vm1"
            && shown["record"]["pid"] == pid
            && shown["record"]["generation"] == 1,
        "{shown}"
    );
    let text = said(environment, &["lease", "show", &url])?;
    ensure!(text.contains("keeps the file for its owner"), "{text}");
    let info = does(environment, &["disk", "info", &url])?;
    ensure!(info["lease"].to_string().contains("vm1"), "{info}");
    let owner = format!("generation 1 is held by VM `vm1` (pid {pid} on ");
    refuses(
        environment,
        &["lease", "break", &url, "--yes"],
        &[&owner, "stop that machine first"],
    )?;
    let shown = does(environment, &["lease", "show", &url])?;
    ensure!(shown["record"]["phase"] == "held", "it was broken: {shown}");
    first.signal(Signal::TERM)?;
    first.wait(SOON)?;
    let shown = does(environment, &["lease", "show", &url])?;
    ensure!(
        shown["fence"] == "free" && shown["record"]["phase"] == "released",
        "{shown}"
    );
    refuses(environment, &["lease", "break", &url, "--yes"], &["is free"])
}

fn a_killed_machine(context: &Context) -> Outcome {
    let environment = &context.environment;
    let server = Server::start(Plan::image(BYTES))?;
    let url = server.url(IMAGE);
    let first = holding(context, "vm1", &url)?;
    first.signal(Signal::KILL)?;
    first.wait(SOON)?;
    let shown = does(environment, &["lease", "show", &url])?;
    ensure!(
        shown["fence"] == "writer" && shown["record"]["phase"] == "held",
        "{shown}"
    );
    // It waits until the server has ended the lease.
    let broken = does(environment, &["lease", "break", &url, "--yes"])?;
    ensure!(
        broken["record"]["phase"] == "broken" && broken["record"]["vm"] == "coraclectl",
        "{broken}"
    );
    run(named(context, "vm2")?, &machine(context, &url), SOON)?.expect(0)?;
    let shown = does(environment, &["lease", "show", &url])?;
    ensure!(
        shown["fence"] == "free" && shown["record"]["vm"] == "vm2" && shown["record"]["phase"] == "released",
        "{shown}"
    );
    Ok(())
}

fn an_overlay(context: &Context) -> Outcome {
    let environment = &context.environment;
    let place = tempfile::tempdir()?;
    let mut server = Server::start(Plan::image(BYTES))?;
    let url = server.url(IMAGE);
    let overlay = overlaid(context, place.path(), &url, &server.path(IMAGE))?;
    committed(environment, &overlay, &server.path(IMAGE))?;
    let shown = does(environment, &["lease", "show", &url])?;
    ensure!(shown["fence"] == "free", "{shown}");
    server.kill()?;
    let info = does(environment, &["disk", "info", &overlay])?;
    ensure!(
        info["base_state"].to_string().contains("does not answer"),
        "{info}"
    );
    Ok(())
}

/// To read all of it would take minutes, by any network.
fn a_sparse_copy(context: &Context) -> Outcome {
    const SPARSE_BYTES: u64 = 1 << 40;
    const DATA: [(u64, u8); 4] = [
        (0, 1),
        (123_456_789 << 10, 2),
        ((1 << 39) + 512, 3),
        (SPARSE_BYTES - 512, 4),
    ];
    let environment = &context.environment;
    let server = Server::start(Plan::default().export(Export::new("export")))?;
    let place = tempfile::tempdir()?;
    let source = fs::File::create_new(server.path(IMAGE))?;
    source.set_len(SPARSE_BYTES)?;
    for (at, byte) in DATA {
        source.write_all_at(&[byte; 512], at)?;
    }
    let back = place.path().join("back");
    let second = "export/second.raw";
    let begun = Instant::now();
    for target in [back.display().to_string(), server.url(second)] {
        does(environment, &["disk", "copy", &server.url(IMAGE), &target])?;
    }
    let time = begun.elapsed();
    ensure!(time < Duration::from_secs(20), "two copies took {time:?}");
    for copy in [back, server.path(second)] {
        let copy = fs::File::open(&copy)?;
        let metadata = copy.metadata()?;
        ensure!(metadata.len() == SPARSE_BYTES, "it has another size");
        let allocated_bytes = metadata.blocks() * 512;
        ensure!(
            allocated_bytes < 1 << 20,
            "{allocated_bytes} bytes for four sectors"
        );
        for (at, byte) in DATA {
            let mut sector = [0; 512];
            copy.read_exact_at(&mut sector, at)?;
            ensure!(sector == [byte; 512], "it is something else at {at}");
        }
    }
    Ok(())
}

/// nfs-ganesha clones nothing, so this is a simulated server.
fn a_clone(context: &Context) -> Outcome {
    let environment = &context.environment;
    let content: Vec<u8> = (0..1 << 20)
        .map(|at: u32| at.to_le_bytes()[at as usize % 4])
        .collect();
    for clones in [true, false] {
        let image = content.clone();
        let make = move || {
            let mut options = Options::default();
            options.quirks.clones = clones;
            let server = Simulated::new("export", options, Clock::default(), Dice::new(1));
            server.add("image.raw", &image);
            server
        };
        let served = serve(TcpListener::bind("127.0.0.1:0")?, make)?;
        let url = |name: &str, options: &str| format!("nfs://{}/export/{name}{options}", served.address());
        let source = url("image.raw", "");
        let copied = does(environment, &["disk", "copy", &source, &url("second.raw", "")])?;
        ensure!(copied["size_bytes"] == content.len(), "{copied}");
        let [reads, writes, names] = served.with(|server| {
            [Operation::READ, Operation::WRITE, Operation::RENAME].map(|operation| server.asked(operation))
        });
        ensure!(
            (reads == 0, writes == 0, names) == (clones, clones, 1),
            "clones: {clones}: {reads} reads, {writes} writes, {names} names given"
        );
        // As another user, or by a version that has no such thing, it is copied byte by byte.
        does(
            environment,
            &["disk", "copy", &source, &url("third.raw", "?uid=7")],
        )?;
        let old = url("image.raw", "?version=4.1");
        does(
            environment,
            &["disk", "copy", &old, &url("fourth.raw", "?version=4.1")],
        )?;
        let (later, clones_asked) =
            served.with(|server| (server.asked(Operation::READ), server.asked(Operation::CLONE)));
        ensure!(
            later >= reads + 2 && clones_asked == 1,
            "{later} reads, {clones_asked} clones"
        );
        let (names, complaints) = served.with(|server| (server.names(), server.complaints()));
        ensure!(
            names == ["fourth.raw", "image.raw", "second.raw", "third.raw"] && complaints.is_empty(),
            "{names:?}, {complaints:?}"
        );
        for copy in names {
            let found = served.with(move |server| server.durable(&copy));
            ensure!(found == content, "a copy is something else");
        }
    }
    Ok(())
}

fn a_copy(context: &Context) -> Outcome {
    let environment = &context.environment;
    let server = Server::start(Plan::default().export(Export::new("export")))?;
    let place = tempfile::tempdir()?;
    let path = |name: &str| place.path().join(name).display().to_string();
    let (source, back, url) = (path("source"), path("back"), server.url(IMAGE));
    // Data, a long hole, and data at the very end.
    let mut content = vec![0; usize::try_from(BYTES)?];
    for (at, byte) in [(0, 1), (70_000, 2), (content.len() - 512, 3)] {
        content[at..at + 512].fill(byte);
    }
    fs::write(&source, &content)?;
    let copied = does(environment, &["disk", "copy", &source, &url])?;
    ensure!(copied["size_bytes"] == BYTES, "{copied}");
    ensure!(
        fs::read(server.path(IMAGE))? == content,
        "it is something else there"
    );
    let allocated_bytes = server.path(IMAGE).metadata()?.blocks() * 512;
    ensure!(
        allocated_bytes < 256 << 10,
        "{allocated_bytes} bytes for its zeros"
    );
    does(environment, &["disk", "copy", &url, &back])?;
    ensure!(fs::read(&back)? == content, "it is something else here");
    // Nothing is replaced, and nothing is left behind.
    refuses(
        environment,
        &["disk", "copy", &source, &url],
        &["exists", "nothing was changed"],
    )?;
    refuses(environment, &["disk", "copy", &url, &back], &["exists already"])?;
    refuses(
        environment,
        &["disk", "copy", &path("none"), &server.url("export/other.raw")],
        &["none"],
    )?;
    let names: Vec<_> = fs::read_dir(server.path("export"))?.collect::<Result<_, _>>()?;
    let strange: Vec<_> = names.iter().map(fs::DirEntry::file_name).collect();
    ensure!(strange.len() == 1, "{strange:?}");
    let shown = does(environment, &["lease", "show", &url])?;
    ensure!(shown["fence"] == "free" && shown["record"].is_null(), "{shown}");
    // On the server, from one image to the other.
    let second = server.url("export/second.raw");
    does(environment, &["disk", "copy", &url, &second])?;
    ensure!(
        fs::read(server.path("export/second.raw"))? == content,
        "the second differs"
    );
    Ok(())
}
