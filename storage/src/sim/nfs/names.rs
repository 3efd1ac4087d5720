//! Names: where a compound goes by them, what they stand for, and who is given one (RFC 8881, 18).

use super::execute::{NO_CHANGE, Scene, current};
use super::state::State;
use super::tree::{Node, ROOT, handle, number};
use crate::nfs::v4::attributes::{Attributes, Bitmap, FileType};
use crate::nfs::v4::{
    Arguments, DirectoryEntry, GuardedName, Name, Readdir, ReaddirResult, Rename, RenameResult, Results,
    Status, Verifier,
};

impl State {
    /// Does what needs no state.
    pub(super) fn look_or_name(
        &mut self,
        scene: &mut Scene,
        arguments: &Arguments<'_>,
    ) -> Result<Results<'static>, Status> {
        Ok(match arguments {
            Arguments::Putrootfh => {
                scene.file = Some(ROOT);
                Results::Putrootfh
            }
            Arguments::Putfh(handle) => {
                let file = number(handle).ok_or(Status::BADHANDLE)?;
                self.tree.node(file).ok_or(Status::STALE)?;
                scene.file = Some(file);
                Results::Putfh
            }
            Arguments::Savefh => {
                scene.saved = Some(current(scene)?);
                Results::Savefh
            }
            Arguments::Getfh => Results::Getfh(handle(current(scene)?)),
            Arguments::Lookup(name) => {
                let names = self.tree.directory(current(scene)?).ok_or(Status::NOTDIR)?;
                scene.file = Some(*names.get(name.bytes()).ok_or(Status::NOENT)?);
                Results::Lookup
            }
            Arguments::Getattr(wanted) => Results::Getattr(self.attributes(current(scene)?, *wanted)?),
            Arguments::Verify(expected) => {
                let found = self.attributes(current(scene)?, expected.set())?;
                (found == *expected)
                    .then_some(Results::Verify)
                    .ok_or(Status::NOT_SAME)?
            }
            Arguments::Readdir(readdir) => Results::Readdir(self.readdir(current(scene)?, readdir)?),
            Arguments::Remove(name) => self.remove(current(scene)?, name)?,
            Arguments::Rename(rename) => {
                let from = scene.saved.ok_or(Status::NOFILEHANDLE)?;
                self.rename((from, current(scene)?), rename)?
            }
            other => {
                self.complaints
                    .push(format!("{} is not done here", other.operation()));
                return Err(Status::NOTSUPP);
            }
        })
    }

    fn attributes(&self, file: u64, wanted: Bitmap) -> Result<Attributes, Status> {
        let node = self.tree.node(file).ok_or(Status::STALE)?;
        let limits = self.options.limits;
        let seconds = u32::try_from(limits.lease.as_secs()).expect("a lease is short");
        let all = Attributes {
            file_type: Some(match node {
                Node::Directory(_) => FileType::Directory,
                Node::File(_) => FileType::Regular,
            }),
            size: Some(self.tree.file(file).map_or(0, |file| self.tree.len_bytes(file))),
            lease_time: Some(seconds),
            maxread: Some(limits.read_bytes_max.into()),
            maxwrite: Some(limits.write_bytes_max.into()),
            ..Attributes::default()
        };
        Ok(all.only(wanted))
    }

    fn readdir(&mut self, directory: u64, readdir: &Readdir) -> Result<ReaddirResult, Status> {
        /// The first ones are not given out.
        const RESERVED: u64 = 2;
        let verifier = Verifier(*b"cookies!");
        if readdir.cookie != 0 && readdir.cookie_verifier != verifier {
            self.complaints.push("a cookie without its verifier".to_owned());
            return Err(Status::NOT_SAME);
        }
        let names = self.tree.directory(directory).ok_or(Status::NOTDIR)?;
        let mut entries: Vec<(u64, Vec<u8>)> = names
            .iter()
            .map(|(name, number)| (number + RESERVED, name.clone()))
            .filter(|(cookie, _)| *cookie > readdir.cookie)
            .collect();
        entries.sort_unstable();
        let is_endless = self.dice.one_in(self.options.hostility.endless_one_in);
        if is_endless {
            entries.push((readdir.cookie.wrapping_add(1), b"image.raw.lease.3".to_vec()));
        }
        let eof = entries.len() <= self.options.limits.page_entries && !is_endless;
        entries.truncate(self.options.limits.page_entries);
        let entry = |(cookie, name)| DirectoryEntry {
            cookie,
            name: GuardedName(Name::new(name)),
            attributes: Attributes::default(),
        };
        Ok(ReaddirResult {
            cookie_verifier: verifier,
            entries: entries.into_iter().map(entry).collect(),
            eof,
        })
    }

    fn remove(&mut self, directory: u64, name: &Name) -> Result<Results<'static>, Status> {
        if self.is_in_grace() {
            return Err(Status::GRACE);
        }
        if !name.bytes().windows(7).any(|part| part == b".lease.") {
            self.complaints.push(format!("{name} is removed"));
            return Err(Status::ACCESS);
        }
        self.tree.directory(directory).ok_or(Status::NOTDIR)?;
        match self.tree.remove(directory, name.bytes()) {
            true => Ok(Results::Remove(NO_CHANGE)),
            false => Err(Status::NOENT),
        }
    }

    fn rename(&mut self, (from, to): (u64, u64), rename: &Rename) -> Result<Results<'static>, Status> {
        if self.is_in_grace() {
            return Err(Status::GRACE);
        }
        if from != to {
            return Err(Status::XDEV);
        }
        let names = self.tree.directory(to).ok_or(Status::NOTDIR)?;
        let replaced = names.get(rename.new_name.bytes()).copied();
        let is_empty = |file| {
            self.tree
                .file(file)
                .is_some_and(|file| self.tree.len_bytes(file) == 0)
        };
        if !replaced.is_none_or(is_empty) {
            self.complaints.push(format!("{} is replaced", rename.new_name));
            return Err(Status::ACCESS);
        }
        match self
            .tree
            .rename(to, rename.old_name.bytes(), rename.new_name.bytes())
        {
            true => Ok(Results::Rename(RenameResult {
                source: NO_CHANGE,
                target: NO_CHANGE,
            })),
            false => Err(Status::NOENT),
        }
    }
}
