//! The table of failures of a guest whose disk goes along: each message that is said then, each thing that can happen at it, with
//! another disk whose lease decides and without.

use std::path::{Path, PathBuf};
use std::thread;

use coracle_tests::case::Context;
use coracle_tests::guest::{Machine, blank_image};
use coracle_tests::harness::matrix::{Cell, Matrix};
use coracle_tests::monitor::{Launch, Monitor};
use coracle_tests::{Outcome, ensure};
use coracle_vmm::migration::wire::Kind;
use rustix::process::Signal;
use serde_json::json;

use super::super::failures::{self, Faulty, goes_on, runs};
use super::super::{Hosts, SOON};
use super::{along, merged, patterned, started};

/// Those that are said in such a migration alone.
pub(in super::super) const MESSAGES: [Kind; 2] = [Kind::Blocks, Kind::Holes];

const ALONE: &str = "none";
const LEAD: &str = "a file";

pub(in super::super) fn survives_every_failure(context: &Context) -> Outcome {
    let names = failures::names_with_the_last(&MESSAGES);
    let matrix = Matrix::new("copies")
        .axis("message", &names)
        .axis("fault", failures::FAULTS)
        .axis("other disk", &[ALONE, LEAD])
        .impossible(&[("fault", failures::RESTART)], "it has no server");
    let mut seed = context.seed.clone();
    let report = matrix.run(context.extent, 10, &mut seed, |cell| one_cell(context, cell))?;
    print!("{report}");
    report.expect_passed()
}

/// The images of one cell.
struct Images {
    from: PathBuf,
    to: PathBuf,
    shared: PathBuf,
    is_alone: bool,
}

fn one_cell(context: &Context, cell: &Cell) -> Outcome {
    let (kind, fault) = (failures::kind_of(cell)?, cell.value("fault")?);
    let directory = tempfile::tempdir()?;
    let images = Images {
        from: directory.path().join("from"),
        to: directory.path().join("to"),
        shared: directory.path().join("shared"),
        is_alone: cell.value("other disk")? == ALONE,
    };
    patterned(&images.from, 4, 1, 5)?;
    // Zeros that take space: they are told.
    let file = std::fs::File::options().write(true).open(&images.from)?;
    std::os::unix::fs::FileExt::write_all_at(&file, &vec![0; 1 << 20], 1 << 20)?;
    blank_image(&images.shared, 1)?;
    let source = Launch::new(&context.environment)?.start()?;
    let machine =
        Machine::unikernel(&context.environment, "do=hello do=tick:ms=10,count=1000000").memory_mib(32);
    let machine = machine.disk("d", &images.from);
    let machine = match images.is_alone {
        true => machine,
        false => machine.disk("e", &images.shared),
    };
    source.configure(&machine.config())?;
    source.start_instance()?;
    source.console.wait_for("tick: n=3 ", SOON)?;
    let hosts = Hosts::new(directory.path())?;
    let (receive, send) = along("d", &images.to);
    let asked = merged(send, &json!({ "streams": 2 }));
    let mut source = source;
    let mut target = thread::scope(|scope| {
        let faulty = Faulty {
            kind,
            fault,
            receive: &receive,
            send: &asked,
        };
        failures::fails_at(context, scope, &hosts, (&source, None), &faulty)
    })?;
    let runs = [runs(&mut source)?, runs(&mut target)?];
    let expected = expected(kind, fault, images.is_alone);
    ensure!(
        expected.contains(&runs),
        "source and target run: {runs:?}, and not {expected:?}"
    );
    goes_on(&source, &target, runs)?;
    is_left_in_order(context, &images, [source, target], runs)
}

/// Where the guest runs its disk is whole, what is of no use is gone or says so, and one of them boots.
fn is_left_in_order(context: &Context, images: &Images, monitors: [Monitor; 2], runs: [bool; 2]) -> Outcome {
    for mut monitor in monitors {
        if monitor.is_running()? {
            monitor.signal(Signal::KILL)?;
        }
        monitor.wait(SOON)?;
    }
    let boots = |path: &Path| -> Outcome {
        let why = started(context, path)?;
        ensure!(why.is_empty(), "{} does not boot: {why}", path.display());
        reads(context, path)
    };
    match runs {
        [true, false] => boots(&images.from),
        [false, true] => {
            let why = started(context, &images.from)?;
            ensure!(
                why.contains("what was left behind"),
                "what was left behind boots: {why}"
            );
            boots(&images.to)
        }
        _ => {
            // Nobody runs it. What there is at the target is whole if the source has let it go.
            let why = started(context, &images.from)?;
            if why.contains("what was left behind") {
                return match images.to.exists() {
                    true => boots(&images.to),
                    false => {
                        let path = super::path_of(&images.from)?;
                        let owner = coracle_storage::lease::Owner::of_this_process("test");
                        coracle_storage::lease::break_lease(path, None, &owner)?;
                        boots(&images.from)
                    }
                };
            }
            boots(&images.from)
        }
    }
}

/// A guest finds on the disk what was written to it before.
fn reads(context: &Context, path: &Path) -> Outcome {
    let words = "do=hello do=pattern-verify:mib=1,seed=5 do=read-check-zero:offset_mib=1 do=exit:status=3";
    let config = Machine::unikernel(&context.environment, words)
        .memory_mib(32)
        .disk("d", path)
        .config();
    let monitor = Launch::new(&context.environment)?.start()?;
    monitor.configure(&config)?;
    monitor.start_instance()?;
    monitor.wait(SOON)?.expect(3)
}

/// Whether the source, and whether the target, may have the guest in the end.
fn expected(kind: Kind, fault: &str, is_alone: bool) -> &'static [[bool; 2]] {
    if !is_alone {
        return failures::expected(kind, fault);
    }
    // There is no lease by which the source could have it back once it has let go, and nobody runs it twice.
    match (fault, kind) {
        ("the target is killed", Kind::Loaded) => &[[true, false], [false, false]],
        ("the source is frozen" | "the target is frozen" | "everything is slow", Kind::Loaded) => {
            &[[true, false], [false, true], [false, false]]
        }
        ("the source is killed", _) => failures::expected(kind, fault),
        (
            "the source is frozen" | "the target is frozen" | "everything is slow",
            Kind::Go | Kind::Running,
        ) => &[[false, true], [false, false]],
        (_, Kind::Go) => &[[false, false]],
        _ => failures::expected(kind, fault),
    }
}
