//! What compounds do (RFC 8881, 18; RFC 7862, 15).

use super::rights::Wanted;
use super::state::State;
use super::task::{Task, failed};
use super::tree::{EXPORT, Node, ROOT, handle, number};
use super::{Ending, io::Bytes};
use crate::nfs::v4::attributes::{Attributes, Bitmap, FileType};
use crate::nfs::v4::{
    Arguments, BindConnToSession, BindConnToSessionResult, CallCompound, ChangeInfo, ChannelFromServer,
    ClientId, CreateHow, CreateSession, CreateSessionResult, Delegation, DirectoryEntry, ExchangeId,
    ExchangeIdResult, GuardedName, Lock, LockDenied, Locker, Name, Open, OpenClaim, OpenHow, OpenResult,
    Operation, ReadResult, Readdir, ReaddirResult, ReplyWriter, Results, SessionId, StateProtect, Stateid,
    Status, Statuses, Verifier, WhyNone,
};
use crate::nfs::xdr::Writer;

/// Where a compound has come.
#[derive(Debug, Default)]
struct Scene {
    client: u64,
    file: Option<u64>,
    stateid: Option<Stateid>,
    minor_version: u32,
}

/// What an operation has come to.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "there is one at a time")]
enum Done {
    Plain(Results<'static>),
    Read(Bytes),
}

/// Why it has not been done.
#[derive(Debug)]
enum Refusal {
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

    /// What is done outside of any session.
    fn alone(&mut self, connection: u64, only: &Arguments<'_>) -> Result<Results<'static>, Status> {
        self.expire_silent();
        match only {
            Arguments::ExchangeId(exchange) => Ok(Results::ExchangeId(self.exchange_id(exchange))),
            Arguments::CreateSession(create) => {
                let created = self.create_session(connection, create)?;
                Ok(Results::CreateSession(created))
            }
            Arguments::BindConnToSession(bind) => self.bind(connection, bind),
            Arguments::DestroySession(id) => self.destroy_session(*id),
            Arguments::DestroyClientid(id) => self.destroy_client(*id),
            other => {
                self.complaints
                    .push(format!("{} without a session", other.operation()));
                Err(Status::OP_NOT_IN_SESSION)
            }
        }
    }

    fn exchange_id(&mut self, exchange: &ExchangeId) -> ExchangeIdResult {
        let exchanged = self
            .clients
            .exchange(&exchange.client_owner, self.life, self.now());
        let confirmed = if exchanged.is_confirmed {
            ExchangeId::CONFIRMED_R
        } else {
            0
        };
        ExchangeIdResult {
            client_id: ClientId(exchanged.client),
            sequence_id: exchanged.sequence_id,
            flags: ExchangeId::USE_NON_PNFS | confirmed,
            state_protect: StateProtect::None,
            server_minor_id: 0,
            server_major_id: b"simulated".to_vec(),
            server_scope: b"simulated".to_vec(),
            implementation: None,
        }
    }

    fn create_session(
        &mut self,
        connection: u64,
        create: &CreateSession,
    ) -> Result<CreateSessionResult, Status> {
        let id = create.client_id.0;
        let client = self.clients.get(id).ok_or(Status::STALE_CLIENTID)?;
        if create.sequence_id.wrapping_add(1) == client.sequence_id
            && let Some(last) = &client.last
        {
            return Ok(last.clone());
        }
        if create.sequence_id != client.sequence_id {
            self.complaints.push(format!(
                "CREATE_SESSION {} where {} is next",
                create.sequence_id, client.sequence_id
            ));
            return Err(Status::SEQ_MISORDERED);
        }
        if !client.is_confirmed
            && let Some(before) = self.clients.confirm(id)
        {
            self.rights.forget(before);
            self.drop_sessions(before);
        }
        let slots = create.fore_channel.max_requests.min(self.options.limits.slots);
        let session_id = self.begin_session(id, slots.max(1), create.callback_program, connection);
        let mut fore_channel = create.fore_channel;
        fore_channel.max_requests = slots.max(1);
        let created = CreateSessionResult {
            session_id,
            sequence_id: create.sequence_id,
            flags: create.flags & CreateSession::CONN_BACK_CHAN,
            fore_channel,
            back_channel: create.back_channel,
        };
        self.clients.renew(id, self.now());
        if let Some(client) = self.clients.get_mut(id) {
            client.sequence_id = client.sequence_id.wrapping_add(1);
            client.last = Some(created.clone());
        }
        Ok(created)
    }

    fn bind(&mut self, connection: u64, bind: &BindConnToSession) -> Result<Results<'static>, Status> {
        let number = self.session(bind.session_id).ok_or(Status::BADSESSION)?;
        let session = self.sessions.get_mut(&number).ok_or(Status::BADSESSION)?;
        session.bound.insert(connection);
        Ok(Results::BindConnToSession(BindConnToSessionResult {
            session_id: bind.session_id,
            direction: ChannelFromServer::Both,
            use_rdma: false,
        }))
    }

    /// Ends a session, unless something is being carried out there.
    fn destroy_session(&mut self, id: SessionId) -> Result<Results<'static>, Status> {
        let number = self.session(id).ok_or(Status::BADSESSION)?;
        if self.tasks.iter().any(|task| task.session == number) {
            return Err(Status::DELAY);
        }
        self.sessions.remove(&number);
        Ok(Results::DestroySession)
    }

    fn destroy_client(&mut self, ClientId(id): ClientId) -> Result<Results<'static>, Status> {
        self.clients.get(id).ok_or(Status::STALE_CLIENTID)?;
        if self.sessions.values().any(|session| session.client == id) || self.rights.has_any(id) {
            return Err(Status::CLIENTID_BUSY);
        }
        self.clients.remove(id);
        Ok(Results::DestroyClientid)
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
                    Ok(Done::Plain(Results::Sequence(said)))
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
        Ok(Done::Plain(Results::Commit(self.verifier())))
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
        Ok(Done::Plain(done))
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

    fn open(&mut self, scene: &mut Scene, open: &Open) -> Result<OpenResult, Status> {
        let is_in_grace = self.is_in_grace();
        let is_complete = self
            .clients
            .get(scene.client)
            .is_some_and(|client| client.is_complete);
        let file = match (&open.claim, &open.how) {
            (OpenClaim::Previous(_), OpenHow::NoCreate) => {
                if !is_in_grace {
                    return Err(Status::NO_GRACE);
                }
                self.clients.may_claim(scene.client)?;
                current(scene)?
            }
            _ if is_in_grace => return Err(Status::GRACE),
            _ if !is_complete => {
                self.complaints.push("OPEN before RECLAIM_COMPLETE".to_owned());
                return Err(Status::GRACE);
            }
            (OpenClaim::Null(name), how) => self.found(current(scene)?, name, how)?,
            _ => return Err(Status::NOTSUPP),
        };
        let wanted = Wanted {
            client: scene.client,
            owner: open.owner.owner.clone(),
            file,
            share: open.share_access.alone().0,
            deny: open.share_deny as u32,
        };
        self.tree.file(file).ok_or(Status::ISDIR)?;
        while let Some(conflict) = self.rights.conflict(&wanted) {
            if !self.gives_way(conflict.client) {
                return Err(Status::SHARE_DENIED);
            }
        }
        if self.options.quirks.denies_reopen
            && wanted.deny & wanted.share != 0
            && self.rights.is_open(&wanted)
        {
            return Err(Status::SHARE_DENIED);
        }
        self.clients.remember(scene.client);
        let stateid = self.rights.open(wanted, self.life);
        (scene.file, scene.stateid) = (Some(file), Some(stateid));
        Ok(OpenResult {
            stateid,
            change_info: NO_CHANGE,
            result_flags: 0,
            attributes_set: Bitmap::EMPTY,
            delegation: match self.dice.one_in(2) {
                true => Delegation::None,
                false => Delegation::NoneExt(WhyNone {
                    why: 0,
                    server_will: None,
                }),
            },
        })
    }

    /// The file that an OPEN means; it may be made for that.
    fn found(&mut self, directory: u64, name: &Name, how: &OpenHow) -> Result<u64, Status> {
        let names = self.tree.directory(directory).ok_or(Status::NOTDIR)?;
        let there = names.get(name.bytes()).copied();
        match (how, there) {
            (OpenHow::NoCreate, there) => there.ok_or(Status::NOENT),
            (OpenHow::Create(CreateHow::Exclusive41(verifier, _)), Some(there)) => {
                let made_by = self.tree.file(there).and_then(|file| file.made_by);
                (made_by == Some(*verifier)).then_some(there).ok_or(Status::EXIST)
            }
            (OpenHow::Create(CreateHow::Exclusive41(verifier, _)), None) if directory == EXPORT => {
                Ok(self.tree.make(name.bytes(), b"", Some(*verifier)))
            }
            _ => Err(Status::NOTSUPP),
        }
    }

    fn lock(&mut self, scene: &Scene, lock: &Lock) -> Result<Stateid, Refusal> {
        let Locker::New {
            open_stateid,
            lock_owner,
            ..
        } = &lock.locker
        else {
            return Err(Status::NOTSUPP.into());
        };
        match (lock.reclaim, self.is_in_grace()) {
            (true, true) => self.clients.may_claim(scene.client)?,
            (true, false) => return Err(Status::NO_GRACE.into()),
            (false, true) => return Err(Status::GRACE.into()),
            (false, false) => {}
        }
        let file = current(scene)?;
        while let Some(other) = self.rights.lock_holder(file, scene.client) {
            if !self.gives_way(other) {
                break;
            }
        }
        let range = (lock.offset, lock.length);
        let locked = self
            .rights
            .lock(open_stateid, lock_owner, scene.client, range, self.life);
        locked.map_err(|refused| match refused {
            Ok(status) => Refusal::Status(status),
            Err(denied) => Refusal::Denied(denied),
        })
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

const NO_CHANGE: ChangeInfo = ChangeInfo {
    atomic: true,
    before: 0,
    after: 1,
};

fn current(scene: &Scene) -> Result<u64, Status> {
    scene.file.ok_or(Status::NOFILEHANDLE)
}

/// What a server has to look for or wait for.
fn may_be_delayed(arguments: &Arguments<'_>) -> bool {
    !matches!(
        arguments,
        Arguments::Sequence(_) | Arguments::Putfh(_) | Arguments::Putrootfh | Arguments::Getfh
    )
}
