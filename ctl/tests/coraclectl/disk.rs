//! `coraclectl disk`, on overlays that were written as a machine writes them.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::Output;

use coracle_storage::blocking::Blocking;
use coracle_storage::lease::{Lock, Owner, Terms};
use coracle_storage::open::Image;
use coracle_storage::overlay::file::OverlayFile;
use coracle_storage::overlay::format::{Header, State};
use coracle_storage::overlay::{OverlayConfig, OverlayError};
use serde_json::Value;
use tempfile::TempDir;

use crate::terminal::Desk;
use crate::workbench::{Workbench, stderr};

crate::tests![
    info_tells_an_overlay_from_a_raw_image,
    a_commit_puts_the_overlay_into_its_base_and_empties_it,
    a_commit_that_was_interrupted_is_refused_to_machines_and_runs_once_more,
    a_rebased_overlay_shows_what_it_showed,
    a_flattened_overlay_is_one_image_with_holes,
    a_disk_that_is_not_as_asked_is_refused_and_left_alone,
    what_a_machine_uses_is_looked_into_and_not_changed,
    a_copy_shows_how_far_it_is_where_there_is_a_terminal,
];

const SIZE: usize = 256 << 10;

/// The overlay as a machine opens it.
fn opened(config: &OverlayConfig, lock: Lock) -> Result<Image, OverlayError> {
    config.open(&Terms::new(lock, &Owner::of_this_process("vm1")))
}

/// A base, an overlay of it, and what the overlay shows.
struct Disks {
    bench: Workbench,
    place: TempDir,
    shown: Vec<u8>,
}

impl Disks {
    fn new() -> Self {
        let place = tempfile::tempdir().expect("a scratch directory");
        let mut shown: Vec<u8> = (0..SIZE).map(|at| if at < SIZE / 2 { 0 } else { 3 }).collect();
        fs::write(place.path().join("base"), &shown).expect("room for a base");
        let mut disks = Self {
            bench: Workbench::new(),
            place,
            shown: Vec::new(),
        };
        let mut image = disks.image().expect("an overlay of a good base");
        for (at, len, byte) in [(512, 512, 1), (8192, 12288, 2), (SIZE - 4096, 4096, 0)] {
            shown[at..at + len].fill(byte);
            image
                .write_at(at as u64, &vec![byte; len])
                .expect("an overlay takes writes");
        }
        image.flush().expect("an overlay is flushed");
        disks.shown = shown;
        disks
    }

    fn path(&self, name: &str) -> String {
        let path = self.place.path().join(name);
        path.into_os_string().into_string().expect("the path is text")
    }

    fn config(&self) -> OverlayConfig {
        OverlayConfig {
            base: self.path("base"),
            path: self.path("overlay"),
            keep: true,
        }
    }

    /// The overlay as a machine has it.
    fn image(&self) -> Result<Blocking, String> {
        let image = opened(&self.config(), Lock::None).map_err(|error| error.to_string())?;
        Ok(Blocking::new(image.backend).expect("an overlay has two files"))
    }

    fn shows(&self, config: &OverlayConfig) -> Vec<u8> {
        let image = opened(config, Lock::None).expect("the overlay can be used");
        let mut image = Blocking::new(image.backend).expect("an overlay has two files");
        let mut content = vec![9; usize::try_from(image.geometry().size_bytes).expect("it is small")];
        image.read_at(0, &mut content).expect("the overlay can be read");
        content
    }

    fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).expect("the file is there")
    }

    /// Runs `disk` with files by their names here.
    fn disk(&self, verb: &str, files: &[&str], more: &[&str]) -> Output {
        let files: Vec<String> = files.iter().map(|file| self.path(file)).collect();
        let files = files.iter().map(String::as_str);
        let arguments: Vec<&str> = ["--json", "disk", verb]
            .into_iter()
            .chain(files)
            .chain(more.iter().copied())
            .collect();
        self.bench.output(&arguments)
    }

    fn does(&self, verb: &str, files: &[&str], more: &[&str]) -> Value {
        let output = self.disk(verb, files, more);
        assert!(output.status.success(), "{verb}: {}", stderr(&output));
        assert_eq!(stderr(&output), "", "there is no terminal to draw a bar on");
        serde_json::from_slice(&output.stdout).expect("one JSON document")
    }

    fn refuses(&self, verb: &str, files: &[&str], more: &[&str]) -> String {
        let output = self.disk(verb, files, more);
        assert_eq!(output.status.code(), Some(1), "{verb} {files:?}");
        stderr(&output)
    }
}

fn info_tells_an_overlay_from_a_raw_image() {
    let disks = Disks::new();
    let overlay = disks.does("info", &["overlay"], &[]);
    assert_eq!(overlay["kind"], "overlay");
    assert_eq!(
        (&overlay["size_bytes"], &overlay["clusters"]),
        (&SIZE.into(), &5.into())
    );
    assert_eq!(overlay["base"], disks.path("base"));
    assert_eq!(overlay["base_state"], "there");
    let raw = disks.does("info", &["base"], &[]);
    assert_eq!((&raw["kind"], &raw["size_bytes"]), (&"raw".into(), &SIZE.into()));
    fs::remove_file(disks.path("base")).expect("the base is there");
    let text = disks.bench.output(&["disk", "info", &disks.path("overlay")]);
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    assert!(
        text.contains("cluster bytes") && text.contains("there is no image"),
        "{text}"
    );
}

fn a_commit_puts_the_overlay_into_its_base_and_empties_it() {
    let disks = Disks::new();
    let said = disks.does("commit", &["overlay"], &[]);
    assert_eq!(said["committed_bytes"], 5 * 4096);
    assert!(disks.read("base") == disks.shown);
    assert!(disks.shows(&disks.config()) == disks.shown);
    assert_eq!(disks.does("info", &["overlay"], &[])["clusters"], 0);
}

fn a_commit_that_was_interrupted_is_refused_to_machines_and_runs_once_more() {
    let disks = Disks::new();
    let mut file = OverlayFile::open(&disks.path("overlay")).expect("an overlay");
    let committing = Header {
        state: State::Committing,
        ..file.header().clone()
    };
    file.replace_header(committing).expect("a header");
    // As if the process had died after some of it.
    let base = fs::OpenOptions::new().write(true).open(disks.path("base"));
    let base = base.expect("the base is there");
    base.write_all_at(&disks.shown[..1024], 0)
        .expect("the base is writable");
    let refusal = disks.image().err().expect("a machine may not use it");
    assert!(refusal.contains("coraclectl disk commit"), "{refusal}");
    let base = disks.path("base");
    assert!(
        disks
            .refuses("rebase", &["overlay"], &["--base", &base])
            .contains("interrupted")
    );
    disks.does("commit", &["overlay"], &[]);
    assert!(disks.read("base") == disks.shown);
    assert!(disks.shows(&disks.config()) == disks.shown);
}

fn a_rebased_overlay_shows_what_it_showed() {
    let disks = Disks::new();
    // Longer, and different in two clusters, of which the overlay has one.
    let mut new = disks.read("base");
    new[0] = 7;
    new[SIZE / 2 + 100] = 7;
    new.resize(2 * SIZE, 8);
    fs::write(disks.path("new"), &new).expect("room for a base");
    let said = disks.does("rebase", &["overlay"], &["--base", &disks.path("new")]);
    assert_eq!(said["copied_bytes"], 4096);
    let config = OverlayConfig {
        base: disks.path("new"),
        ..disks.config()
    };
    assert!(disks.shows(&config) == disks.shown);
    assert!(disks.image().is_err(), "the old base is another one now");
    assert!(disks.read("new") == new);
    // What the overlay does not show of a longer base stays hidden when it grows.
    let image = opened(&config, Lock::None).expect("the overlay can be used");
    let mut image = Blocking::new(image.backend).expect("an overlay has two files");
    image.grow(2 * SIZE as u64).expect("an overlay grows");
    image.flush().expect("an overlay is flushed");
    drop(image);
    let mut grown = disks.shown.clone();
    grown.resize(2 * SIZE, 0);
    assert!(disks.shows(&config) == grown);
    disks.does("commit", &["overlay"], &[]);
    assert!(
        disks.read("new") == grown,
        "a commit makes the base what the overlay showed"
    );
}

fn a_flattened_overlay_is_one_image_with_holes() {
    let disks = Disks::new();
    fs::rename(disks.path("base"), disks.path("moved")).expect("the base is there");
    assert!(
        disks
            .refuses("flatten", &["overlay", "flat"], &[])
            .contains("there is no image")
    );
    let moved = disks.path("moved");
    disks.does("flatten", &["overlay", "flat"], &["--base", &moved]);
    assert!(disks.read("flat") == disks.shown);
    let metadata = fs::metadata(disks.path("flat")).expect("the image is there");
    assert!(
        metadata.blocks() * 512 <= SIZE as u64 / 2 + 8 * 4096,
        "{} blocks for what is half zeros",
        metadata.blocks()
    );
    let again = disks.refuses("flatten", &["overlay", "flat"], &["--base", &moved]);
    assert!(again.contains("exists already"), "{again}");
    let mut names: Vec<String> = fs::read_dir(disks.place.path())
        .expect("the directory is there")
        .map(|entry| {
            entry
                .expect("it can be listed")
                .file_name()
                .to_string_lossy()
                .into_owned()
        })
        .filter(|name| !name.contains(".lease."))
        .collect();
    names.sort();
    assert_eq!(names, ["flat", "moved", "overlay"], "no draft is left");
}

fn a_disk_that_is_not_as_asked_is_refused_and_left_alone() {
    let disks = Disks::new();
    let base = disks.read("base");
    for verb in ["commit", "rebase"] {
        let other = disks.path("overlay");
        let more: &[&str] = if verb == "rebase" {
            &["--base", &other]
        } else {
            &[]
        };
        let said = disks.refuses(verb, &["base"], more);
        assert!(said.contains("does not begin as an overlay file does"), "{said}");
    }
    assert!(
        disks
            .refuses("info", &["absent"], &[])
            .contains("there is no image")
    );
    let mut changed = base.clone();
    changed[SIZE - 1] ^= 1;
    fs::write(disks.path("base"), &changed).expect("the base is writable");
    let said = disks.refuses("commit", &["overlay"], &[]);
    assert!(said.contains("another image or was changed since"), "{said}");
    assert!(disks.read("base") == changed);
    fs::write(disks.path("base"), &base).expect("the base is writable");
    assert!(disks.shows(&disks.config()) == disks.shown);
}

fn what_a_machine_uses_is_looked_into_and_not_changed() {
    let disks = Disks::new();
    let in_use = opened(&disks.config(), Lock::Exclusive).expect("the overlay is free");
    disks.does("info", &["overlay"], &[]);
    for (verb, files) in [
        ("commit", &["overlay"][..]),
        ("flatten", &["overlay", "flat"]),
        ("rebase", &["overlay"]),
    ] {
        let more = [String::from("--base"), disks.path("base")];
        let more: Vec<&str> = more.iter().map(String::as_str).collect();
        let more = if verb == "rebase" { &more[..] } else { &[] };
        let said = disks.refuses(verb, files, more);
        assert!(said.contains("`vm1`"), "{verb}: {said}");
    }
    drop(in_use);
    // Another overlay's base is not changed under it either.
    let other = OverlayConfig {
        path: disks.path("other"),
        ..disks.config()
    };
    let in_use = opened(&other, Lock::Exclusive).expect("a base is shared");
    let said = disks.refuses("commit", &["overlay"], &[]);
    assert!(said.contains("base"), "{said}");
    drop(in_use);
    assert!(disks.shows(&disks.config()) == disks.shown);
    disks.does("commit", &["overlay"], &[]);
}

fn a_copy_shows_how_far_it_is_where_there_is_a_terminal() {
    let disks = Disks::new();
    let (overlay, flat) = (disks.path("overlay"), disks.path("flat"));
    let desk = Desk::sit_down(&disks.bench, &["disk", "flatten", &overlay, &flat]);
    let shown = desk.shown();
    assert!(
        shown.contains("flatten") && shown.contains("of 256.00 KiB"),
        "{shown:?}"
    );
    assert!(shown.contains("holds"), "{shown:?}");
    assert!(disks.read("flat") == disks.shown);
}
