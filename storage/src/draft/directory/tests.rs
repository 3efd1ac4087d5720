#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

use std::collections::BTreeMap;

use super::*;

fn is_part(name: &OsStr) -> bool {
    name == "a" || name == "b" || Path::new(name).extension() == Some(OsStr::new("draft"))
}

struct Rig {
    directory: tempfile::TempDir,
}

impl Rig {
    fn new() -> Self {
        Self {
            directory: tempfile::tempdir().unwrap(),
        }
    }

    fn target(&self) -> PathBuf {
        self.directory.path().join("s")
    }

    fn begun(&self) -> DirectoryDraft {
        DirectoryDraft::create(self.target().to_str().unwrap(), is_part).unwrap()
    }

    /// What is in the directory, by names.
    fn content(&self) -> BTreeMap<String, String> {
        let files = fs::read_dir(self.target()).unwrap().map(|entry| {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            (name, fs::read_to_string(path).unwrap())
        });
        files.collect()
    }

    /// The names beside it.
    fn beside(&self) -> Vec<String> {
        let names = fs::read_dir(self.directory.path()).unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name != "s").collect()
    }

    fn publish(&self, content: &str) {
        let draft = self.begun();
        write(&draft, "a", content);
        write(&draft, "b", content);
        draft.publish().unwrap();
    }
}

fn write(draft: &DirectoryDraft, name: &str, content: &str) {
    fs::write(draft.path().join(name), content).unwrap();
}

fn whole(content: &str) -> BTreeMap<String, String> {
    ["a", "b"]
        .map(|name| (name.to_owned(), content.to_owned()))
        .into()
}

/// As SIGKILL ends it: its descriptors are closed, and nothing else is done.
fn kill(mut draft: DirectoryDraft) {
    draft.handle = File::open("/").unwrap();
    std::mem::forget(draft);
}

/// The steps of a publication, one after the other.
const STEPS: [fn(&mut DirectoryDraft); 6] = [
    |draft| write(draft, "a", "new"),
    |draft| write(draft, "b", "new"),
    |draft| draft.sync().unwrap(),
    |draft| draft.name().unwrap(),
    |draft| draft.secure().unwrap(),
    |draft| draft.clear(),
];
/// So many of them are done before the name is that of the new directory.
const NAMED: usize = 4;

#[test]
fn killed_after_any_step_it_leaves_the_old_directory_or_the_new_one_and_what_the_next_one_removes() {
    for is_there in [false, true] {
        for done in 0..=STEPS.len() {
            let rig = Rig::new();
            if is_there {
                rig.publish("old");
            }
            let mut draft = rig.begun();
            for step in STEPS.iter().take(done) {
                step(&mut draft);
            }
            kill(draft);
            match (done >= NAMED, is_there) {
                (true, _) => assert_eq!(rig.content(), whole("new"), "{done} steps"),
                (false, true) => assert_eq!(rig.content(), whole("old"), "{done} steps"),
                (false, false) => assert!(!rig.target().exists(), "{done} steps"),
            }
            let left = rig.beside();
            assert!(
                left.iter()
                    .all(|name| is_draft_of(OsStr::new(name), &rig.target())),
                "{left:?}"
            );
            let has_draft = done < NAMED || (is_there && done < STEPS.len());
            assert_eq!(left.len(), usize::from(has_draft), "{done} steps: {left:?}");
            rig.publish("next");
            assert_eq!(rig.content(), whole("next"));
            assert!(rig.beside().is_empty(), "{:?}", rig.beside());
        }
    }
}

#[test]
fn a_removal_that_was_broken_off_is_gone_on_with() {
    let rig = Rig::new();
    rig.publish("old");
    let mut draft = rig.begun();
    write(&draft, "a", "new");
    draft.name().unwrap();
    fs::remove_file(draft.path().join("a")).unwrap();
    kill(draft);
    rig.publish("next");
    assert!(rig.beside().is_empty(), "{:?}", rig.beside());
}

#[test]
fn a_draft_that_somebody_works_on_is_left_alone() {
    let rig = Rig::new();
    let first = rig.begun();
    write(&first, "a", "first");
    write(&first, "b", "first");
    rig.publish("second");
    assert_eq!(rig.content(), whole("second"));
    first.publish().unwrap();
    assert_eq!(rig.content(), whole("first"));
    assert!(rig.beside().is_empty(), "{:?}", rig.beside());
}

#[test]
fn one_that_is_given_up_leaves_nothing() {
    let rig = Rig::new();
    rig.publish("old");
    let draft = rig.begun();
    write(&draft, "a", "new");
    drop(draft);
    assert_eq!(rig.content(), whole("old"));
    assert!(rig.beside().is_empty(), "{:?}", rig.beside());
}

#[test]
fn nothing_is_replaced_or_removed_but_a_directory_of_such_files() {
    let rig = Rig::new();
    let create = || DirectoryDraft::create(rig.target().to_str().unwrap(), is_part);
    fs::write(rig.target(), "a file").unwrap();
    assert!(matches!(create(), Err(DraftError::NotADirectory { .. })));
    fs::remove_file(rig.target()).unwrap();
    std::os::unix::fs::symlink(rig.directory.path(), rig.target()).unwrap();
    assert!(matches!(create(), Err(DraftError::NotADirectory { .. })));
    fs::remove_file(rig.target()).unwrap();
    fs::create_dir(rig.target()).unwrap();
    fs::write(rig.target().join("thesis"), "dear").unwrap();
    let refusal = create().err().unwrap();
    assert!(
        matches!(&refusal, DraftError::Stranger { name, .. } if name == "thesis"),
        "{refusal}"
    );
    fs::remove_file(rig.target().join("thesis")).unwrap();
    // Put there in the meantime, and where a process was killed.
    let draft = create().unwrap();
    fs::write(rig.target().join("thesis"), "dear").unwrap();
    assert!(matches!(draft.publish(), Err(DraftError::Stranger { .. })));
    fs::remove_file(rig.target().join("thesis")).unwrap();
    let left = rig.begun();
    fs::write(left.path().join("thesis"), "dear").unwrap();
    kill(left);
    rig.publish("next");
    assert_eq!(rig.beside().len(), 1);
    let empty = Rig::new();
    fs::create_dir(empty.target()).unwrap();
    empty.publish("new");
    assert_eq!(empty.content(), whole("new"));
}
