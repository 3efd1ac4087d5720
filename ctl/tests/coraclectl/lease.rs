//! What `lease show` and `lease break` promise.

use std::fs;
use std::path::{Path, PathBuf};

use coracle_storage::backend::Access;
use coracle_storage::lease::{Lock, Owner, Phase, Record, Terms};
use coracle_storage::open::{Image, open};
use coracle_storage::utc::UtcSecond;
use serde_json::{Value, json};

use crate::tests;
use crate::workbench::{Workbench, stderr};

tests![
    an_image_that_nobody_had_is_shown_as_free,
    a_lease_is_shown_with_its_holder,
    a_lease_of_the_living_is_not_broken,
    a_lease_of_the_dead_is_broken_only_after_a_yes,
    records_that_cannot_be_read_are_shown_and_broken,
    there_is_nothing_to_break_where_nothing_is_held,
];

fn image(place: &Path) -> PathBuf {
    let image = place.join("a.img");
    fs::write(&image, [0; 512]).expect("a small file");
    image
}

fn lease(image: &Path) -> Image {
    let owner = Owner::of_this_process("web");
    let terms = Terms::new(Lock::Exclusive, &owner);
    open(text(image), Access::ReadWrite, &terms).expect("nobody has it")
}

/// What a killed machine leaves behind.
fn crashed(image: &Path) {
    let owner = Owner {
        pid: 0x7fff_fffe,
        ..Owner::of_this_process("crashed")
    };
    let record = Record {
        epoch: 3,
        generation: 2,
        phase: Phase::Held,
        owner,
        since: UtcSecond(1_795_442_025),
    };
    let name = format!("{}.lease.3", image.display());
    fs::write(name, record.text()).expect("a small file");
}

fn text(path: &Path) -> &str {
    path.to_str().expect("scratch paths are UTF-8")
}

fn shown(bench: &Workbench, image: &Path) -> (Value, String) {
    let as_json = bench.output(&["--json", "lease", "show", text(image)]);
    let as_text = bench.output(&["lease", "show", text(image)]);
    assert!(
        as_json.status.success() && as_text.status.success(),
        "{}",
        stderr(&as_json)
    );
    (
        serde_json::from_slice(&as_json.stdout).expect("it is JSON"),
        String::from_utf8(as_text.stdout).expect("it is text"),
    )
}

fn an_image_that_nobody_had_is_shown_as_free() {
    let (bench, place) = (Workbench::new(), tempfile::tempdir().expect("a directory"));
    let image = image(place.path());
    let (json, text) = shown(&bench, &image);
    assert_eq!((&json["fence"], &json["record"]), (&json!("free"), &Value::Null));
    assert!(text.contains("\nlock          free\n"), "{text}");
    let absent = bench.output(&["lease", "show", "/no/such.img"]);
    assert_eq!(absent.status.code(), Some(1));
    assert!(stderr(&absent).contains("there is no image `/no/such.img`"));
}

fn a_lease_is_shown_with_its_holder() {
    let (bench, place) = (Workbench::new(), tempfile::tempdir().expect("a directory"));
    let image = image(place.path());
    let _held = lease(&image);
    let (json, text) = shown(&bench, &image);
    let record = &json["record"];
    assert_eq!(
        (
            &json["fence"],
            &record["vm"],
            &record["pid"],
            &record["generation"]
        ),
        (
            &json!("writer"),
            &json!("web"),
            &json!(std::process::id()),
            &json!(1)
        )
    );
    for part in [
        "phase         held\n",
        "VM `web` (pid ",
        "generation    1\n",
        "epoch         1\n",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

fn a_lease_of_the_living_is_not_broken() {
    let (bench, place) = (Workbench::new(), tempfile::tempdir().expect("a directory"));
    let image = image(place.path());
    let _held = lease(&image);
    let output = bench.output(&["lease", "break", "--yes", text(&image)]);
    assert_eq!(output.status.code(), Some(1));
    let pid = format!("`kill {}`", std::process::id());
    assert!(stderr(&output).contains(&pid), "{}", stderr(&output));
    assert_eq!(shown(&bench, &image).0["record"]["phase"], "held");
}

fn a_lease_of_the_dead_is_broken_only_after_a_yes() {
    let (bench, place) = (Workbench::new(), tempfile::tempdir().expect("a directory"));
    let image = image(place.path());
    crashed(&image);
    let output = bench.output(&["lease", "break", text(&image)]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("give --yes"), "{}", stderr(&output));
    assert_eq!(shown(&bench, &image).0["record"]["phase"], "held");
    let output = bench.output(&["lease", "break", "--yes", text(&image)]);
    assert!(output.status.success(), "{}", stderr(&output));
    let record = &shown(&bench, &image).0["record"];
    assert_eq!(
        (&record["phase"], &record["epoch"], &record["vm"]),
        (&json!("broken"), &json!(4), &json!("coraclectl"))
    );
}

fn records_that_cannot_be_read_are_shown_and_broken() {
    let (bench, place) = (Workbench::new(), tempfile::tempdir().expect("a directory"));
    let image = image(place.path());
    fs::write(place.path().join("a.img.lease.5"), "half a rec").expect("a small file");
    let (json, _) = shown(&bench, &image);
    let error = json["record_error"].as_str().expect("it says why");
    assert!(error.contains("a.img.lease.5"), "{error}");
    let output = bench.output(&["lease", "break", "--yes", text(&image)]);
    assert!(output.status.success(), "{}", stderr(&output));
    drop(lease(&image));
}

fn there_is_nothing_to_break_where_nothing_is_held() {
    let (bench, place) = (Workbench::new(), tempfile::tempdir().expect("a directory"));
    let image = image(place.path());
    for _ in 0..2 {
        let output = bench.output(&["lease", "break", text(&image)]);
        assert_eq!(output.status.code(), Some(1));
        assert!(stderr(&output).contains("is free"), "{}", stderr(&output));
        drop(lease(&image));
    }
}
