//! What `disk create` promises of files, and what every verb says of a unit that cannot be meant.

use std::fs;
use std::os::unix::fs::MetadataExt;

use serde_json::Value;

use crate::workbench::{Workbench, stderr};

crate::tests![
    a_new_file_has_the_size_that_was_asked_for_and_takes_no_space,
    a_file_that_is_there_is_never_replaced,
    a_file_needs_a_size_and_a_unit_has_one,
    a_password_in_a_url_is_refused_and_not_repeated,
    a_unit_is_neither_an_overlay_nor_a_new_file,
];

const UNIT: &str = "iscsi://127.0.0.1:1/iqn.2026-01.test.coracle:disk/1";

fn a_new_file_has_the_size_that_was_asked_for_and_takes_no_space() {
    let (bench, place) = (Workbench::new(), tempfile::tempdir().expect("a directory"));
    let path = place.path().join("a.img");
    let image = path.to_str().expect("scratch paths are UTF-8");
    let output = bench.output(&["--json", "disk", "create", image, "--size", "64M"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let said: Value = serde_json::from_slice(&output.stdout).expect("one JSON document");
    assert_eq!(said["size_bytes"], 64 << 20);
    let metadata = fs::metadata(&path).expect("the file is there");
    assert_eq!((metadata.len(), metadata.blocks()), (64 << 20, 0));
    assert_eq!(metadata.mode() & 0o777, 0o600);
    let text = bench.output(&["disk", "create", &format!("{image},2"), "--size", "512"]);
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    assert!(
        text.contains("coraclectl run --disk '") && text.contains("a.img,,2'"),
        "{text}"
    );
}

fn a_file_that_is_there_is_never_replaced() {
    let (bench, place) = (Workbench::new(), tempfile::tempdir().expect("a directory"));
    let path = place.path().join("a.img");
    fs::write(&path, "precious").expect("room for a small file");
    let image = path.to_str().expect("scratch paths are UTF-8");
    for (more, words) in [
        (&[][..], "exists already"),
        (&["--force", "--yes"], "never replaced"),
    ] {
        let arguments = [&["disk", "create", image, "--size", "1M"], more].concat();
        let output = bench.output(&arguments);
        assert_eq!(output.status.code(), Some(1), "{more:?}");
        assert!(stderr(&output).contains(words), "{}", stderr(&output));
    }
    assert_eq!(fs::read(&path).expect("the file is there"), b"precious");
}

fn a_file_needs_a_size_and_a_unit_has_one() {
    let (bench, place) = (Workbench::new(), tempfile::tempdir().expect("a directory"));
    let path = place.path().join("a.img");
    let image = path.to_str().expect("scratch paths are UTF-8");
    let refused = |arguments: &[&str], status: i32, words: &str| {
        let output = bench.output(arguments);
        assert_eq!(output.status.code(), Some(status), "{arguments:?}");
        assert!(stderr(&output).contains(words), "{}", stderr(&output));
    };
    refused(&["disk", "create", image], 1, "give --size");
    refused(&["disk", "create", UNIT, "--size", "1M"], 1, "leave --size out");
    refused(
        &["disk", "create", image, "--size", "1000"],
        2,
        "a multiple of 512",
    );
    assert!(!path.exists());
}

fn a_password_in_a_url_is_refused_and_not_repeated() {
    let bench = Workbench::new();
    let target = "127.0.0.1:1/iqn.2026-01.test.coracle:disk/1";
    let urls = [
        format!("iscsi://us:hush-hush@{target}"),
        format!("iscsi://us%hush-hush@{target}"),
        format!("iscsi://{target}?password=hush-hush"),
    ];
    for url in &urls {
        for verb in [
            &["disk", "create"][..],
            &["disk", "info"],
            &["lease", "show"],
            &["lease", "break"],
        ] {
            let output = bench.output(&[verb, &[url.as_str()]].concat());
            assert_eq!(output.status.code(), Some(1), "{verb:?}");
            let said = stderr(&output);
            assert!(!said.contains("hush-hush") && said.contains("URL"), "{said}");
        }
    }
}

fn a_unit_is_neither_an_overlay_nor_a_new_file() {
    let bench = Workbench::new();
    for (arguments, words) in [
        (&["disk", "commit", UNIT][..], "an overlay lives in one"),
        (
            &["disk", "rebase", UNIT, "--base", "b"],
            "an overlay lives in one",
        ),
        (&["disk", "flatten", UNIT, "out"], "an overlay lives in one"),
        (
            &["disk", "flatten", "overlay", UNIT],
            "what is written here is a new file",
        ),
    ] {
        let output = bench.output(arguments);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        assert!(stderr(&output).contains(words), "{}", stderr(&output));
    }
    // Nobody listens there, which is what each verb finds out that means a unit.
    for verb in [
        &["disk", "create"][..],
        &["disk", "info"],
        &["lease", "show"],
        &["lease", "break"],
    ] {
        let output = bench.output(&[verb, &[UNIT]].concat());
        assert_eq!(output.status.code(), Some(1), "{verb:?}");
        let said = stderr(&output);
        assert!(
            said.contains("does not answer") && said.contains("because:"),
            "{said}"
        );
    }
}
