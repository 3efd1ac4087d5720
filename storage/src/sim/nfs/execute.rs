//! What compounds do (RFC 8881, 18; RFC 7862, 15).

use super::state::State;
use super::task::{Task, failed};
use super::{Ending, io::Bytes};
use crate::nfs::v4::{
    Arguments, CallCompound, ChangeInfo, LockDenied, Operation, ReadResult, ReplyWriter, Results, Stateid,
    Status, Statuses,
};
use crate::nfs::xdr::Writer;

/// Where a compound has come.
#[derive(Debug, Default)]
pub(super) struct Scene {
    pub(super) client: u64,
    pub(super) file: Option<u64>,
    pub(super) stateid: Option<Stateid>,
    pub(super) saved: Option<u64>,
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
            *self.asked.entry(arguments.operation().0).or_default() += 1;
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
            Arguments::Seek(seek) if scene.minor_version > 1 => {
                Results::Seek(self.seek(scene.client, current(scene)?, seek)?)
            }
            Arguments::Setattr(setattr) => {
                self.resize(scene.client, current(scene)?, setattr)?;
                Results::Setattr(setattr.attributes.set())
            }
            Arguments::Clone(range) if scene.minor_version > 1 => {
                let from = scene.saved.ok_or(Status::NOFILEHANDLE)?;
                self.clone_range(scene.client, (from, current(scene)?), range)?;
                Results::Clone
            }
            Arguments::ReclaimComplete(_) => {
                self.clients.complete(scene.client)?;
                Results::ReclaimComplete
            }
            Arguments::DestroySession(id) => self.destroy_session(*id)?,
            other => self.look_or_name(scene, other)?,
        };
        Ok(Done::Plain(Box::new(done)))
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
