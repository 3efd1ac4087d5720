//! The files of a simulated server: one export under the pseudo root, and what is in it.

use std::collections::BTreeMap;

use crate::nfs::v4::{FileHandle, Verifier};
use crate::reactor::FileSlot;
use crate::sim::medium::Medium;

/// Names and files. A name lasts as soon as it was made, bytes last when they were synced.
#[derive(Debug)]
pub(super) struct Tree {
    pub(super) medium: Medium,
    nodes: BTreeMap<u64, Node>,
    next: u64,
    files: u32,
}

#[derive(Debug)]
pub(super) enum Node {
    Directory(BTreeMap<Vec<u8>, u64>),
    File(File),
}

#[derive(Clone, Copy, Debug)]
pub(super) struct File {
    pub(super) slot: FileSlot,
    /// By which exclusive create it was made.
    pub(super) made_by: Option<Verifier>,
}

/// The pseudo root.
pub(super) const ROOT: u64 = 1;
/// The directory with the images.
pub(super) const EXPORT: u64 = 2;

impl Tree {
    pub(super) fn new(export: &str) -> Self {
        let root = BTreeMap::from([(export.as_bytes().to_vec(), EXPORT)]);
        Self {
            medium: Medium::default(),
            nodes: BTreeMap::from([
                (ROOT, Node::Directory(root)),
                (EXPORT, Node::Directory(BTreeMap::new())),
            ]),
            next: EXPORT + 1,
            files: 0,
        }
    }

    pub(super) fn node(&self, number: u64) -> Option<&Node> {
        self.nodes.get(&number)
    }

    pub(super) fn file(&self, number: u64) -> Option<File> {
        match self.nodes.get(&number) {
            Some(Node::File(file)) => Some(*file),
            _ => None,
        }
    }

    pub(super) fn directory(&self, number: u64) -> Option<&BTreeMap<Vec<u8>, u64>> {
        match self.nodes.get(&number) {
            Some(Node::Directory(names)) => Some(names),
            _ => None,
        }
    }

    /// Makes a file; its name must be free.
    pub(super) fn make(&mut self, name: &[u8], content: &[u8], made_by: Option<Verifier>) -> u64 {
        self.medium.add(content);
        let file = File {
            slot: FileSlot(self.files),
            made_by,
        };
        self.files += 1;
        let number = self.next;
        self.next += 1;
        self.nodes.insert(number, Node::File(file));
        if let Some(Node::Directory(names)) = self.nodes.get_mut(&EXPORT) {
            let taken = names.insert(name.to_vec(), number);
            assert!(taken.is_none(), "a file is made over another");
        }
        number
    }

    /// Forgets by which exclusive create a file was made.
    pub(super) fn forget_maker(&mut self, number: u64) {
        if let Some(Node::File(file)) = self.nodes.get_mut(&number) {
            file.made_by = None;
        }
    }

    /// Removes a name, and its file.
    pub(super) fn remove(&mut self, directory: u64, name: &[u8]) -> bool {
        let Some(Node::Directory(names)) = self.nodes.get_mut(&directory) else {
            return false;
        };
        let Some(number) = names.remove(name) else {
            return false;
        };
        self.nodes.remove(&number).is_some()
    }

    /// Gives a file another name in its directory; who had that is gone.
    pub(super) fn rename(&mut self, directory: u64, old_name: &[u8], new_name: &[u8]) -> bool {
        let Some(Node::Directory(names)) = self.nodes.get_mut(&directory) else {
            return false;
        };
        let Some(number) = names.remove(old_name) else {
            return false;
        };
        if let Some(replaced) = names.insert(new_name.to_vec(), number) {
            self.nodes.remove(&replaced);
        }
        true
    }

    pub(super) fn len_bytes(&self, file: File) -> u64 {
        self.medium.len_bytes(file.slot)
    }

    pub(super) fn read(&self, file: File, offset_bytes: u64, len_bytes: u64) -> Vec<u8> {
        self.medium.read(file.slot, offset_bytes, len_bytes)
    }

    /// Writes, so that it lasts or not yet.
    pub(super) fn write(&self, file: File, offset_bytes: u64, bytes: &[u8], lasts: Lasts) {
        let author = self.medium.begin();
        let horizon = self.medium.horizon();
        self.medium
            .change(file.slot, |file| file.write(offset_bytes, bytes, author));
        if lasts == Lasts::AtOnce {
            let range = offset_bytes..offset_bytes + bytes.len() as u64;
            self.medium.sync_write(file.slot, &range, author, &horizon);
        }
        self.medium.end(author);
    }

    /// Makes a range read as zeros, until the next sync perhaps.
    pub(super) fn zero(&self, file: File, offset_bytes: u64, len_bytes: u64) {
        let author = self.medium.begin();
        self.medium
            .change(file.slot, |file| file.zero(offset_bytes, len_bytes, author));
        self.medium.end(author);
    }

    /// Makes a file longer, for good.
    pub(super) fn grow(&self, file: File, len_bytes: u64) {
        let author = self.medium.begin();
        let horizon = self.medium.horizon();
        self.medium
            .change(file.slot, |file| file.reach(len_bytes, author));
        self.medium.sync_write(file.slot, &(0..0), author, &horizon);
        self.medium.end(author);
    }
}

/// When what is written lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lasts {
    AtOnce,
    AfterSync,
}

/// The handle of a file.
pub(super) fn handle(number: u64) -> FileHandle {
    FileHandle::new(&number.to_be_bytes()).expect("it is short")
}

/// The file of a handle.
pub(super) fn number(handle: &FileHandle) -> Option<u64> {
    handle.bytes().try_into().ok().map(u64::from_be_bytes)
}
