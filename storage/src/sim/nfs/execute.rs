//! What compounds do (RFC 8881, 18; RFC 7862, 15).

use super::state::State;
use super::task::{Task, failed};
use super::tree::{Node, ROOT, handle, number};
use super::{Ending, io::Bytes};
use crate::nfs::v4::attributes::{Attributes, Bitmap, FileType};
use crate::nfs::v4::{
    Arguments, CallCompound, ChangeInfo, DirectoryEntry, GuardedName, LockDenied, Name, Operation,
    ReadResult, Readdir, ReaddirResult, ReplyWriter, Results, Stateid, Status, Statuses, Verifier,
};
use crate::nfs::xdr::Writer;

/// Where a compound has come.
#[derive(Debug, Default)]
pub(super) struct Scene {
    pub(super) client: u64,
    pub(super) file: Option<u64>,
    pub(super) stateid: Option<Stateid>,
    minor_version: u32,
}

/// What an operation has come to.
#[derive(Debug)]
enum Done {
    Plain(Box<Results<'static>>),
    Read(Bytes),
}

/// Why it has not been done.
#[derive(Debug)]
pub(super) enum Refusal {
    Status(Status),
    Denied(LockDenied),
}

impl From<Status> for Refusal {
    fn from(status: Status) -> Self {
        Self::Status(status)
    }
}

impl State {
    /// A compound comes.
    pub(super) fn compound(
        &mut self,
        connection: u64,
        xid: u32,
        arguments: &[u8],
        compound: &CallCompound<'_>,
    ) {
        if !(1..=self.options.limits.minor_version_max).contains(&compound.minor_version) {
            let mut writer = Writer::default();
            ReplyWriter::new(&mut writer, compound.tag).refused(Status::MINOR_VERS_MISMATCH);
            return self.reply(connection, xid, writer.bytes());
        }
        if let Some(Arguments::Sequence(sequence)) = compound.operations.first() {
            return self.sequenced((connection, xid), arguments, compound, sequence);
        }
        let [only] = compound.operations.as_slice() else {
            self.complaints.push("a compound without a session".to_owned());
            let status = Status::OP_NOT_IN_SESSION;
            return self.reply(connection, xid, &failed(compound, Operation::ILLEGAL, status));
        };
        if self.dice.one_in(self.options.mishaps.delay_one_in) {
            return self.reply(
                connection,
                xid,
                &failed(compound, only.operation(), Status::DELAY),
            );
        }
        let answer = match self.alone(connection, only) {
            Ok(result) => {
                let mut writer = Writer::default();
                let mut reply = ReplyWriter::new(&mut writer, compound.tag);
                reply.put(&result);
                reply.finish();
                writer.into_bytes()
            }
            Err(status) => failed(compound, only.operation(), status),
        };
        self.reply(connection, xid, &answer);
    }

    /// Carries out a compound of a session.
    pub(super) fn execute(&mut self, task: &Task, compound: &CallCompound<'_>) -> Vec<u8> {
        let mut scene = Scene {
            client: task.client,
            minor_version: compound.minor_version,
            ..Scene::default()
        };
        let mut writer = Writer::default();
        let mut reply = ReplyWriter::new(&mut writer, compound.tag);
        let mishaps = self.options.mishaps;
        for arguments in &compound.operations {
            if self.dice.one_in(mishaps.dies_one_in) {
                self.end(Ending::Crash);
                return Vec::new();
            }
            let is_delayed = may_be_delayed(arguments) && self.dice.one_in(mishaps.delay_one_in);
            let done = match arguments {
                _ if self.dice.one_in(self.options.hostility.status_one_in) => {
                    let any = [
                        Status::IO,
                        Status::SERVERFAULT,
                        Status::EXPIRED,
                        Status::BAD_STATEID,
                        Status(99),
                    ];
                    Err(self.dice.pick(&any).into())
                }
                _ if is_delayed => Err(Status::DELAY.into()),
                Arguments::Sequence(sequence) => {
                    let said = self.said(task.session, task.client, sequence);
                    Ok(Done::Plain(Box::new(Results::Sequence(said))))
                }
                Arguments::Commit(_) => self.commit(&scene, task),
                arguments => self.operate(&mut scene, arguments),
            };
            match done {
                Ok(Done::Plain(result)) => reply.put(&result),
                Ok(Done::Read(Bytes { bytes, is_end })) => reply.put(&Results::Read(ReadResult {
                    eof: is_end,
                    data: &bytes,
                })),
                Err(Refusal::Status(status)) => {
                    reply.failed(arguments.operation(), status);
                    return writer.into_bytes();
                }
                Err(Refusal::Denied(denied)) => {
                    reply.denied(&denied);
                    return writer.into_bytes();
                }
            }
        }
        reply.finish();
        writer.into_bytes()
    }

    /// What had been written when the call came is on the medium now.
    fn commit(&mut self, scene: &Scene, task: &Task) -> Result<Done, Refusal> {
        let file = self.tree.file(current(scene)?).ok_or(Status::ISDIR)?;
        self.tree.medium.sync(file.slot, &task.horizon);
        Ok(Done::Plain(Box::new(Results::Commit(self.verifier()))))
    }

    fn operate(&mut self, scene: &mut Scene, arguments: &Arguments<'_>) -> Result<Done, Refusal> {
        let life = self.life;
        let done = match arguments {
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
            Arguments::Getfh => Results::Getfh(handle(current(scene)?)),
            Arguments::Lookup(name) => {
                let names = self.tree.directory(current(scene)?).ok_or(Status::NOTDIR)?;
                scene.file = Some(*names.get(name.bytes()).ok_or(Status::NOENT)?);
                Results::Lookup
            }
            Arguments::Getattr(wanted) => Results::Getattr(self.attributes(current(scene)?, *wanted)?),
            Arguments::Open(open) => Results::Open(self.open(scene, open)?),
            Arguments::Close(close) => {
                let stateid = scene.named(&close.open_stateid)?;
                self.rights.close(&stateid, scene.client, life)?;
                Results::Close(Stateid::INVALID)
            }
            Arguments::Lock(lock) => Results::Lock(self.lock(scene, lock)?),
            Arguments::Locku(unlock) => {
                Results::Locku(self.rights.unlock(&unlock.lock_stateid, scene.client, life)?)
            }
            Arguments::FreeStateid(stateid) => {
                self.rights.free(stateid, scene.client, life)?;
                Results::FreeStateid
            }
            Arguments::TestStateid(stateids) => {
                let test = |stateid| self.rights.test(stateid, scene.client, life);
                Results::TestStateid(Statuses(stateids.0.iter().map(test).collect()))
            }
            Arguments::Read(read) => {
                return Ok(Done::Read(self.read(scene.client, current(scene)?, read)?));
            }
            Arguments::Write(write) => {
                let stateid = scene.named(&write.stateid)?;
                let write = crate::nfs::v4::Write { stateid, ..*write };
                Results::Write(self.write(scene.client, current(scene)?, &write)?)
            }
            Arguments::Deallocate(range) if scene.minor_version > 1 => {
                self.deallocate(scene.client, current(scene)?, range)?;
                Results::Deallocate
            }
            Arguments::Setattr(setattr) => {
                self.resize(scene.client, current(scene)?, setattr)?;
                Results::Setattr(setattr.attributes.set())
            }
            Arguments::Readdir(readdir) => Results::Readdir(self.readdir(current(scene)?, readdir)?),
            Arguments::Remove(name) => self.remove(current(scene)?, name)?,
            Arguments::ReclaimComplete(_) => {
                self.clients.complete(scene.client)?;
                Results::ReclaimComplete
            }
            Arguments::DestroySession(id) => self.destroy_session(*id)?,
            other => {
                self.complaints
                    .push(format!("{} is not done here", other.operation()));
                return Err(Status::NOTSUPP.into());
            }
        };
        Ok(Done::Plain(Box::new(done)))
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
}

impl Scene {
    /// The state that is meant.
    fn named(&self, stateid: &Stateid) -> Result<Stateid, Status> {
        match *stateid {
            Stateid::CURRENT => self.stateid.ok_or(Status::BAD_STATEID),
            other => Ok(other),
        }
    }
}

pub(super) const NO_CHANGE: ChangeInfo = ChangeInfo {
    atomic: true,
    before: 0,
    after: 1,
};

pub(super) fn current(scene: &Scene) -> Result<u64, Status> {
    scene.file.ok_or(Status::NOFILEHANDLE)
}

/// What a server has to look for or wait for.
fn may_be_delayed(arguments: &Arguments<'_>) -> bool {
    !matches!(
        arguments,
        Arguments::Sequence(_) | Arguments::Putfh(_) | Arguments::Putrootfh | Arguments::Getfh
    )
}
