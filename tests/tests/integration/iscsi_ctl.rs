//! What an operator does with units of a target: makes them ready, looks at their leases, takes those of the dead away.
#![expect(
    clippy::indexing_slicing,
    reason = "JSON that lacks a field is a failure of the test"
)]

use std::error::Error;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;

use coracle_storage::backend::Access;
use coracle_storage::lease::{Lock, Owner, Terms};
use coracle_storage::open::open;
use coracle_tests::case::{Case, Context};
use coracle_tests::environment::{Environment, Need};
use coracle_tests::guest::run;
use coracle_tests::harness::iscsi::target::{NAME, Plan, Target};
use coracle_tests::{Outcome, ensure};
use rustix::process::Signal;
use serde_json::json;

use crate::network::generations::kept_until_raised;
use crate::network::operator::{
    SOON, committed, ctl, does, holding, machine, named, overlaid, refuses, said, text, with_input,
};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "a_killed_machine_keeps_its_unit_until_its_lease_is_broken",
        need: Need::Kvm,
        run: a_killed_machine_keeps_its_unit,
    },
    Case {
        name: "a_unit_without_a_place_for_records_is_reserved_and_broken",
        need: Need::Kvm,
        run: a_unit_without_a_place_for_records,
    },
    Case {
        name: "a_free_unit_is_shown_as_free_and_not_broken",
        need: Need::Nothing,
        run: a_free_unit,
    },
    Case {
        name: "what_is_at_the_end_of_a_unit_is_taken_by_force_only",
        need: Need::Nothing,
        run: the_end_of_a_unit,
    },
    Case {
        name: "records_of_a_unit_that_cannot_be_read_are_shown_and_broken",
        need: Need::Nothing,
        run: records_that_cannot_be_read,
    },
    Case {
        name: "a_secret_comes_from_a_file_or_through_a_pipe_and_is_not_told",
        need: Need::Nothing,
        run: a_secret,
    },
    Case {
        name: "an_overlay_of_a_unit_is_shown_flattened_rebased_and_committed",
        need: Need::Nothing,
        run: an_overlay_of_a_unit,
    },
    Case {
        name: "a_unit_is_gone_on_with_until_its_generation_is_raised",
        need: Need::Nothing,
        run: a_generation,
    },
    Case {
        name: "an_image_is_copied_to_a_unit_and_back_whatever_was_there",
        need: Need::Nothing,
        run: a_copy,
    },
];

const UNIT_BYTES: u64 = 4 << 20;
const TAIL_BYTES: u64 = 1 << 20;
const SECRET: &str = "a-secret-of-ours";

fn a_killed_machine_keeps_its_unit(context: &Context) -> Outcome {
    let environment = &context.environment;
    let target = Target::start(Plan::disk(UNIT_BYTES))?;
    let url = target.url(1);
    does(environment, &["disk", "create", &url])?;
    let first = holding(context, "vm1", &url)?;
    let pid = first.process().0;
    let shown = does(environment, &["lease", "show", &url])?;
    let holder = &shown["unit"]["holder"];
    ensure!(
        shown["fence"] == "writer"
            && shown["record"]["vm"] == "vm1"
            && shown["record"]["pid"] == pid
            && shown["record"]["generation"] == 1
            && holder.is_string()
            && shown["unit"]["registrants"] == json!([{ "key": holder, "is_of_owner": true }]),
        "{shown}"
    );
    let text = said(environment, &["lease", "show", &url])?;
    ensure!(text.contains("(of the owner by the record)"), "{text}");
    let info = does(environment, &["disk", "info", &url])?;
    ensure!(info["lease"].to_string().contains("vm1"), "{info}");
    refuses(
        environment,
        &["disk", "create", &url, "--force", "--yes"],
        &["generation 1 is held by"],
    )?;
    // Its session goes to where it was told at first.
    for (path, status) in [(url.clone(), 204), (url.replace("127.0.0.1", "127.0.0.2"), 400)] {
        let patch = json!({ "drive_id": "d", "path_on_host": path });
        let answer = first.request("PATCH", "/drives/d", Some(&patch))?;
        ensure!(answer.status == status, "{path}: {answer:?}");
    }
    first.signal(Signal::KILL)?;
    first.wait(SOON)?;

    // Nothing on a target falls with a process.
    let refused = run(named(context, "vm2")?, &machine(context, &url), SOON)?;
    let owner = format!("generation 1 is held by VM `vm1` (pid {pid} on ");
    ensure!(
        !refused.status.success()
            && refused.errors.contains(&owner)
            && refused.errors.contains("`coraclectl lease break`"),
        "{refused:?}"
    );
    refuses(environment, &["lease", "break", &url], &["give --yes"])?;
    ensure!(
        does(environment, &["lease", "show", &url])?["record"]["phase"] == "held",
        "it was broken unasked"
    );
    let broken = does(environment, &["lease", "break", &url, "--yes"])?;
    ensure!(
        broken["record"]["phase"] == "broken" && broken["record"]["vm"] == "coraclectl",
        "{broken}"
    );
    refuses(environment, &["lease", "break", &url, "--yes"], &["is free"])?;
    run(named(context, "vm2")?, &machine(context, &url), SOON)?.expect(0)?;
    let shown = does(environment, &["lease", "show", &url])?;
    ensure!(
        shown["fence"] == "free" && shown["record"]["vm"] == "vm2" && shown["record"]["phase"] == "released",
        "{shown}"
    );
    Ok(())
}

fn a_generation(context: &Context) -> Outcome {
    let mut target = Target::start(Plan::disk(UNIT_BYTES))?;
    let url = target.url(1);
    does(&context.environment, &["disk", "create", &url])?;
    kept_until_raised(&url, || {
        target.kill()?;
        target.restart()
    })
}

fn a_unit_without_a_place_for_records(context: &Context) -> Outcome {
    let environment = &context.environment;
    let target = Target::start(Plan::disk(UNIT_BYTES))?;
    let url = target.url(1);
    let holder = holding(context, "vm1", &url)?;
    holder.signal(Signal::KILL)?;
    holder.wait(SOON)?;
    let shown = does(environment, &["lease", "show", &url])?;
    let key = shown["unit"]["holder"].as_str().unwrap_or_default().to_owned();
    ensure!(
        shown["fence"] == "writer"
            && shown["records"].is_null()
            && shown["record"].is_null()
            && !key.is_empty(),
        "{shown}"
    );
    let text = said(environment, &["lease", "show", &url])?;
    ensure!(
        text.contains(&format!("{key} (of somebody who left no record)"))
            && text.contains("nowhere: `coraclectl disk create`"),
        "{text}"
    );
    let refused = run(named(context, "vm2")?, &machine(context, &url), SOON)?;
    ensure!(
        !refused.status.success()
            && refused.errors.contains(&key)
            && refused.errors.contains("`coraclectl lease break`"),
        "{refused:?}"
    );
    refuses(environment, &["disk", "create", &url], &["it is reserved", &key])?;
    let broken = does(environment, &["lease", "break", &url, "--yes"])?;
    ensure!(broken["record"].is_null(), "{broken}");
    run(named(context, "vm2")?, &machine(context, &url), SOON)?.expect(0)
}

fn a_free_unit(context: &Context) -> Outcome {
    let environment = &context.environment;
    let target = Target::start(Plan::disk(UNIT_BYTES))?;
    let url = target.url(1);
    let plain = does(environment, &["disk", "info", &url])?;
    ensure!(
        plain["size_bytes"] == UNIT_BYTES && plain["lease_records"].to_string().contains("disk create"),
        "{plain}"
    );
    let made = does(environment, &["disk", "create", &url])?;
    ensure!(made["size_bytes"] == UNIT_BYTES - TAIL_BYTES, "{made}");
    let info = does(environment, &["disk", "info", &url])?;
    ensure!(
        info["size_bytes"] == UNIT_BYTES - TAIL_BYTES
            && info["capacity_bytes"] == UNIT_BYTES
            && info["identity"].is_string()
            && info["is_write_protected"] == false,
        "{info}"
    );
    let shown = does(environment, &["lease", "show", &url])?;
    ensure!(
        shown["fence"] == "free"
            && shown["records"] == "the reserved tail of the unit"
            && shown["record"].is_null()
            && shown["unit"]["holder"].is_null()
            && shown["unit"]["registrants"] == json!([]),
        "{shown}"
    );
    let text = said(environment, &["lease", "show", &url])?;
    ensure!(text.contains("reservation   none: the unit is free\n"), "{text}");
    refuses(environment, &["lease", "break", &url], &["is free"])?;
    let absent = format!("iscsi://{}/{NAME}/7", target.address());
    for verb in [
        ["lease", "show"],
        ["lease", "break"],
        ["disk", "info"],
        ["disk", "create"],
    ] {
        refuses(environment, &[verb[0], verb[1], &absent], &["LUN 7"])?;
    }
    Ok(())
}

fn the_end_of_a_unit(context: &Context) -> Outcome {
    let environment = &context.environment;
    let target = Target::start(Plan::disk(UNIT_BYTES))?;
    let (url, file) = (target.url(1), target.image(1)?);
    // As a partition table has its copy, and what lies before the tail.
    let disk = OpenOptions::new().read(true).write(true).open(&file)?;
    disk.write_all_at(b"EFI PART", UNIT_BYTES - 512)?;
    let guests = vec![7; 4096];
    disk.write_all_at(&guests, UNIT_BYTES - TAIL_BYTES - 4096)?;
    let plain = ["disk", "create", &url];
    let forced = ["disk", "create", &url, "--force"];
    let certain = ["disk", "create", &url, "--force", "--yes"];
    let before = fs::read(&file)?;
    refuses(environment, &plain, &["not blank", "--force"])?;
    refuses(environment, &forced, &["give --yes"])?;
    ensure!(fs::read(&file)? == before, "something was written unasked");
    does(environment, &certain)?;
    // Its own tail is not taken unasked either, whether it can be read or not.
    refuses(environment, &plain, &["has a reserved tail already", "--force"])?;
    let header_at = UNIT_BYTES - TAIL_BYTES;
    disk.write_all_at(&[0xff; 8], header_at + 64)?;
    refuses(environment, &["disk", "info", &url], &["disk create --force"])?;
    refuses(environment, &plain, &["disk create --force"])?;
    refuses(environment, &forced, &["give --yes"])?;
    does(environment, &certain)?;
    let info = does(environment, &["disk", "info", &url])?;
    ensure!(info["size_bytes"] == header_at, "{info}");
    let mut kept = vec![0; 4096];
    disk.read_exact_at(&mut kept, UNIT_BYTES - TAIL_BYTES - 4096)?;
    ensure!(kept == guests, "a guest has lost what lies before the tail");
    Ok(())
}

fn records_that_cannot_be_read(context: &Context) -> Outcome {
    const PIECE_BYTES: u64 = 4096;
    let environment = &context.environment;
    let target = Target::start(Plan::disk(UNIT_BYTES))?;
    let url = target.url(1);
    does(environment, &["disk", "create", &url])?;
    let owner = Owner::of_this_process("vm1");
    let leased = || open(&url, Access::ReadWrite, &Terms::new(Lock::Exclusive, &owner));
    // Each leaves two records, in the slots 1 to 4 behind the header and the slot 0. One that is damaged is a write that was
    // torn; two are more than a crash explains.
    drop(leased()?);
    drop(leased()?);
    let disk = OpenOptions::new().write(true).open(target.image(1)?)?;
    for slot in [3, 4] {
        let slot_at = UNIT_BYTES - TAIL_BYTES + (1 + slot) * PIECE_BYTES;
        disk.write_all_at(b"not what was written", slot_at)?;
    }
    let shown = does(environment, &["lease", "show", &url])?;
    ensure!(
        shown["record"].is_null() && shown["record_error"].to_string().contains("slot 4"),
        "{shown}"
    );
    let refused = leased().err().ok_or("it was leased in spite of that")?;
    let causes = std::iter::successors(Some(&refused as &dyn Error), |&error| error.source());
    let said: Vec<String> = causes.map(ToString::to_string).collect();
    ensure!(said.join(": ").contains("`coraclectl lease break`"), "{said:?}");
    refuses(environment, &["lease", "break", &url], &["give --yes"])?;
    let broken = does(environment, &["lease", "break", &url, "--yes"])?;
    ensure!(broken["record"]["phase"] == "broken", "{broken}");
    leased()?;
    let shown = does(environment, &["lease", "show", &url])?;
    ensure!(shown["record"]["phase"] == "released", "{shown}");
    // With none of them left the way out is another verb, which is named.
    for slot in 0..8 {
        let slot_at = UNIT_BYTES - TAIL_BYTES + (1 + slot) * PIECE_BYTES;
        disk.write_all_at(b"not what was written", slot_at)?;
    }
    refuses(
        environment,
        &["lease", "break", &url, "--yes"],
        &["is fenced", "disk create --force"],
    )?;
    does(environment, &["disk", "create", &url, "--force", "--yes"])?;
    leased().map(drop).map_err(Into::into)
}

fn a_secret(context: &Context) -> Outcome {
    let environment = &context.environment;
    let place = tempfile::tempdir()?;
    let file = place.path().join("secret");
    fs::write(&file, format!("{SECRET}\n"))?;
    let target = Target::start(Plan::disk(UNIT_BYTES).chap("us", SECRET))?;
    let by_file = format!(
        "iscsi://us@{}/{NAME}/1?chap_secret_file={}",
        target.address(),
        file.display()
    );
    let by_pipe = format!("iscsi://us@{}/{NAME}/1?chap_secret_fd=0", target.address());
    let mut all = Vec::new();
    for words in [
        ["disk", "create"],
        ["disk", "info"],
        ["lease", "show"],
        ["lease", "break"],
    ] {
        let [one, other] = words;
        let done = ctl(environment, &["--json", one, other, &by_file]).output()?;
        ensure!(done.status.success() == (other != "break"), "{words:?}: {done:?}");
        all.push(done);
    }
    for (words, expected) in [
        (&["lease", "show", &by_pipe][..], "the unit is free"),
        // Two sessions, and one secret: it would be empty the second time.
        (&["lease", "break", "--yes", &by_pipe], "is free"),
        (&["disk", "create", &by_pipe], "has a reserved tail"),
    ] {
        let done = with_input(environment, words, SECRET)?;
        let said = format!("{}{}", text(&done.stdout), text(&done.stderr));
        ensure!(said.contains(expected), "{words:?}: {said}");
        all.push(done);
    }
    let wrong = with_input(
        environment,
        &["lease", "show", &by_pipe],
        "another-secret-than-theirs",
    )?;
    ensure!(
        !wrong.status.success() && text(&wrong.stderr).contains("CHAP"),
        "{wrong:?}"
    );
    all.push(wrong);
    for done in all {
        let said = format!("{}{}", text(&done.stdout), text(&done.stderr));
        for secret in [SECRET, "another-secret"] {
            ensure!(!said.contains(secret), "it is told: {said}");
        }
    }
    Ok(())
}

fn an_overlay_of_a_unit(context: &Context) -> Outcome {
    let environment = &context.environment;
    let place = tempfile::tempdir()?;
    let target = Target::start(Plan::disk(UNIT_BYTES))?;
    let url = format!("{}?base_immutable=true", target.url(1));
    let overlay = overlaid(context, place.path(), &url, &target.image(1)?)?;
    let without_word = target.url(1);
    refuses(
        environment,
        &["disk", "rebase", &overlay, "--base", &without_word],
        &["not write-protected", "because:"],
    )?;
    committed(environment, &overlay, &target.image(1)?)?;
    let shown = does(environment, &["lease", "show", &without_word])?;
    ensure!(
        shown["fence"] == "free" && shown["unit"]["registrants"] == json!([]),
        "{shown}"
    );
    target_that_is_gone(environment, target, &overlay)
}

/// An overlay outlives what its base is on, and says what is missing.
fn target_that_is_gone(environment: &Environment, mut target: Target, overlay: &str) -> Outcome {
    target.kill()?;
    let info = does(environment, &["disk", "info", overlay])?;
    ensure!(
        info["base_state"].to_string().contains("does not answer"),
        "{info}"
    );
    Ok(())
}

fn a_copy(context: &Context) -> Outcome {
    let environment = &context.environment;
    let target = Target::start(Plan::disk(UNIT_BYTES))?;
    let url = target.url(1);
    let place = tempfile::tempdir()?;
    let path = |name: &str| place.path().join(name).display().to_string();
    let (source, back) = (path("source"), path("back"));
    fs::write(target.image(1)?, vec![9; usize::try_from(UNIT_BYTES)?])?;
    does(environment, &["disk", "create", &url, "--force", "--yes"])?;
    let mut content = vec![0; 2 << 20];
    content[100_000..200_000].fill(7);
    fs::write(&source, &content)?;
    refuses(environment, &["disk", "copy", &source, &url], &["--yes"])?;
    does(environment, &["disk", "copy", &source, &url, "--yes"])?;
    refuses(environment, &["disk", "copy", &url, &back], &["base_immutable"])?;
    let unchanging = format!("{url}?base_immutable=true");
    does(environment, &["disk", "copy", &unchanging, &back])?;
    content.resize(usize::try_from(UNIT_BYTES - TAIL_BYTES)?, 0);
    ensure!(fs::read(&back)? == content, "the unit has something else");
    fs::write(&source, vec![1; usize::try_from(UNIT_BYTES)?])?;
    refuses(
        environment,
        &["disk", "copy", &source, &url, "--yes"],
        &["enlarge it"],
    )?;
    let shown = does(environment, &["lease", "show", &url])?;
    ensure!(shown["record"]["phase"] == "released", "{shown}");
    Ok(())
}
