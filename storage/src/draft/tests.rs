//! Drafts on this host; those on a server need one.
#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::*;
use crate::blocking::Blocking;

fn path(directory: &Path) -> String {
    directory.join("memory").to_str().unwrap().to_owned()
}

fn names(directory: &Path) -> Vec<String> {
    let name = |entry: io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
    fs::read_dir(directory).unwrap().map(name).collect()
}

#[test]
fn a_draft_that_is_published_replaces_what_was_there() {
    let directory = tempfile::tempdir().unwrap();
    let path = path(directory.path());
    for content in [b'a', b'b'] {
        let before = fs::read(&path).ok();
        let draft = Draft::create(&path, 8192).unwrap();
        let mut image = Blocking::new(draft.image().unwrap()).unwrap();
        image.write_at(4096, &[content; 4096]).unwrap();
        image.flush().unwrap();
        drop(image);
        assert_eq!(fs::read(&path).ok(), before, "it has its name too soon");
        draft.publish().unwrap();
        assert_eq!(names(directory.path()), ["memory"]);
        let read = fs::read(&path).unwrap();
        assert!(read == [[0; 4096], [content; 4096]].concat());
    }
    let metadata = fs::metadata(&path).unwrap();
    assert_eq!(metadata.mode() & 0o777, 0o600, "it holds a guest's secrets");
}

#[test]
fn nothing_is_left_of_a_draft_that_is_dropped() {
    let directory = tempfile::tempdir().unwrap();
    let path = path(directory.path());
    fs::write(&path, "old").unwrap();
    let draft = Draft::create(&path, 4096).unwrap();
    drop(draft.image().unwrap());
    assert_eq!(names(directory.path()).len(), 2);
    drop(draft);
    assert_eq!(names(directory.path()), ["memory"]);
    assert_eq!(fs::read(&path).unwrap(), b"old");
}

#[test]
fn nothing_is_left_where_the_name_cannot_be_given() {
    let directory = tempfile::tempdir().unwrap();
    let path = path(directory.path());
    let draft = Draft::create(&path, 4096).unwrap();
    fs::create_dir(&path).unwrap();
    assert!(matches!(draft.publish(), Err(DraftError::Host { .. })));
    assert_eq!(names(directory.path()), ["memory"]);
    let refused = Draft::create(&path, 4096).unwrap_err();
    assert!(matches!(refused, DraftError::NotAFile { .. }), "{refused}");
}

#[test]
fn a_place_where_there_are_no_files_is_refused_with_those_where_there_are() {
    for path in ["iscsi://h/iqn.2026-01.org.example:a/0", "ftp://h/a"] {
        let text = Draft::create(path, 4096).unwrap_err().to_string();
        assert!(text.contains("nfs://HOST/EXPORT/FILE"), "{text}");
    }
    let missing = Draft::create("/nonexistent/memory", 4096).unwrap_err();
    assert!(matches!(missing, DraftError::Host { .. }), "{missing}");
}

#[test]
fn a_draft_is_beside_its_file_and_reached_in_the_same_way() {
    let drafts = [(); 2].map(|()| draft_of("nfs://h/e/a.raw?uid=1&gid=2"));
    for draft in &drafts {
        assert!(draft.starts_with("nfs://h/e/a.raw."), "{draft}");
        assert!(draft.ends_with(".draft?uid=1&gid=2"), "{draft}");
    }
    let [first, second] = drafts;
    assert!(first != second);
}

#[test]
fn two_names_of_one_file_are_one_place_however_they_are_written() {
    let folder = tempfile::tempdir().unwrap();
    let inner = folder.path().join("inner");
    fs::create_dir(&inner).unwrap();
    std::os::unix::fs::symlink(&inner, folder.path().join("link")).unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    for (one, other) in [
        (path("a"), path("a")),
        (path("a"), path("./a")),
        (path("a"), path("inner/../a")),
        (path("inner/a"), path("link/a")),
        ("a".to_owned(), "./a".to_owned()),
        ("nfs://host/e/a".to_owned(), "nfs://host/e/a?uid=7".to_owned()),
    ] {
        assert!(is_one_place(&one, &other), "{one} {other}");
    }
    for (one, other) in [
        (path("a"), path("b")),
        (path("a"), path("inner/a")),
        ("nfs://host/e/a".to_owned(), "nfs://host/e/b".to_owned()),
        ("nfs://host/e/a".to_owned(), "/e/a".to_owned()),
    ] {
        assert!(!is_one_place(&one, &other), "{one} {other}");
    }
}
