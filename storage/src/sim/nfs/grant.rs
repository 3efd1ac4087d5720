//! Who is given an open or a lock (RFC 8881, 18.10 and 18.16).

use super::execute::{NO_CHANGE, Refusal, Scene, current};
use super::rights::Wanted;
use super::state::State;
use super::tree::EXPORT;
use crate::nfs::v4::attributes::Bitmap;
use crate::nfs::v4::{
    CreateHow, Delegation, Lock, Locker, Name, Open, OpenClaim, OpenHow, OpenResult, Stateid, Status, WhyNone,
};

impl State {
    pub(super) fn open(&mut self, scene: &mut Scene, open: &Open) -> Result<OpenResult, Status> {
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
            (OpenHow::Create(CreateHow::Guarded(_)), Some(_)) => Err(Status::EXIST),
            (OpenHow::Create(CreateHow::Guarded(attributes)), None) if directory == EXPORT => {
                let file = self.tree.make(name.bytes(), b"", None);
                if let (Some(size), Some(made)) = (attributes.size, self.tree.file(file)) {
                    self.tree.grow(made, size);
                }
                Ok(file)
            }
            _ => Err(Status::NOTSUPP),
        }
    }

    pub(super) fn lock(&mut self, scene: &Scene, lock: &Lock) -> Result<Stateid, Refusal> {
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
}
