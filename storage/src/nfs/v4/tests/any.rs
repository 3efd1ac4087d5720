//! Operations, results and callbacks of every kind, with any values in them.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::subsequence;

use crate::nfs::rpc::SysCredential;
use crate::nfs::v4::attributes::{FileType, Fsid, OwnerName};
use crate::nfs::v4::callback::{Callback, CbRecall, CbRecallAny, CbSequence};
use crate::nfs::v4::*;

const DATA: &[u8] = b"any bytes that there may be";
const OPERATIONS: usize = 8;

pub(super) fn operations() -> impl Strategy<Value = Vec<Arguments<'static>>> {
    values()
        .prop_flat_map(|values| subsequence(values.arguments(), 0..=OPERATIONS))
        .prop_shuffle()
}

pub(super) fn results() -> impl Strategy<Value = Vec<Results<'static>>> {
    values()
        .prop_flat_map(|values| subsequence(values.results(), 0..=OPERATIONS))
        .prop_shuffle()
}

pub(super) fn callbacks() -> impl Strategy<Value = Vec<Callback>> {
    values()
        .prop_flat_map(|values| subsequence(values.callbacks(), 0..=4))
        .prop_shuffle()
}

fn values() -> impl Strategy<Value = Values> {
    (
        any::<(u32, u32, u64, u64, bool)>(),
        (any::<[u8; 16]>(), vec(any::<u8>(), 0..40)),
        (0..=DATA.len(), "[a-z]{1,12}"),
    )
        .prop_map(
            |((word, other_word, hyper, other_hyper, flag), (fixed, opaque), (len, name))| Values {
                words: [word, other_word],
                hypers: [hyper, other_hyper],
                flag,
                fixed,
                opaque,
                data: DATA.get(..len).expect("it is no longer"),
                name: Name::new(name).expect("it is one"),
            },
        )
}

#[derive(Clone, Debug)]
struct Values {
    words: [u32; 2],
    hypers: [u64; 2],
    flag: bool,
    fixed: [u8; 16],
    opaque: Vec<u8>,
    data: &'static [u8],
    name: Name,
}

impl Values {
    fn stateid(&self) -> Stateid {
        let (other, _) = self.fixed.split_first_chunk().expect("12 are fewer than 16");
        Stateid {
            seqid: self.words[1],
            other: *other,
        }
    }

    fn verifier(&self) -> Verifier {
        Verifier(self.hypers[1].to_be_bytes())
    }

    fn handle(&self) -> FileHandle {
        FileHandle::new(&self.opaque).expect("it is short enough")
    }

    fn owner(&self) -> StateOwner {
        StateOwner {
            client_id: ClientId(self.hypers[0]),
            owner: self.opaque.clone(),
        }
    }

    fn bitmap(&self) -> Bitmap {
        Bitmap::of(&[self.words[0] % 128, self.words[1] % 128])
    }

    fn time(&self) -> Time {
        Time {
            seconds: self.hypers[0],
            nseconds: self.words[0],
        }
    }

    fn implementation(&self) -> Option<ImplementationId> {
        self.flag.then(|| ImplementationId {
            domain: self.opaque.clone(),
            name: b"name".to_vec(),
            date: self.time(),
        })
    }

    fn protect(&self) -> StateProtect {
        if self.flag {
            StateProtect::None
        } else {
            StateProtect::MachineCredential {
                must_enforce: self.bitmap(),
                must_allow: Bitmap::EMPTY,
            }
        }
    }

    fn channel(&self) -> ChannelAttributes {
        ChannelAttributes {
            header_pad_size: 0,
            max_request_size: self.words[0],
            max_response_size: self.words[1],
            max_response_size_cached: 3,
            max_operations: 4,
            max_requests: 5,
            rdma_ird: self.flag.then_some(6),
        }
    }

    fn change_info(&self) -> ChangeInfo {
        ChangeInfo {
            atomic: self.flag,
            before: self.hypers[0],
            after: self.hypers[1],
        }
    }

    /// Every attribute, or only some.
    fn attributes(&self) -> Attributes {
        let all = Attributes {
            supported_attrs: Some(self.bitmap()),
            file_type: Some(FileType::Directory),
            fh_expire_type: Some(self.words[0]),
            change: Some(self.hypers[0]),
            size: Some(self.hypers[1]),
            fsid: Some(Fsid {
                major: self.hypers[1],
                minor: self.hypers[0],
            }),
            lease_time: Some(self.words[1]),
            rdattr_error: Some(Status(self.words[0])),
            filehandle: Some(self.handle()),
            fileid: Some(1),
            maxfilesize: Some(2),
            maxread: Some(3),
            maxwrite: Some(4),
            mode: Some(5),
            owner: Some(OwnerName(self.opaque.clone())),
            owner_group: Some(OwnerName(b"wheel".to_vec())),
            space_avail: Some(6),
            space_free: Some(7),
            space_total: Some(8),
            space_used: Some(9),
            time_metadata: Some(self.time()),
            time_modify: Some(Time::default()),
            mounted_on_fileid: Some(10),
            suppattr_exclcreat: Some(self.bitmap()),
            clone_blksize: Some(11),
        };
        if self.flag { all } else { all.only(self.bitmap()) }
    }

    fn open(&self, how: OpenHow, claim: OpenClaim) -> Arguments<'static> {
        Arguments::Open(Open {
            seqid: self.words[0],
            share_access: ShareAccess(self.words[1]),
            share_deny: ShareDeny::Both,
            owner: self.owner(),
            how,
            claim,
        })
    }

    fn opened(&self, delegation: Delegation) -> Results<'static> {
        Results::Open(OpenResult {
            stateid: self.stateid(),
            change_info: self.change_info(),
            result_flags: self.words[0],
            attributes_set: self.bitmap(),
            delegation,
        })
    }

    fn arguments(&self) -> Vec<Arguments<'static>> {
        [
            self.arguments_of_sessions(),
            self.arguments_of_files(),
            self.arguments_of_bytes(),
        ]
        .concat()
    }

    fn arguments_of_sessions(&self) -> Vec<Arguments<'static>> {
        let session_id = SessionId(self.fixed);
        vec![
            Arguments::BindConnToSession(BindConnToSession {
                session_id,
                direction: ChannelFromClient::BackOrBoth,
                use_rdma: self.flag,
            }),
            Arguments::ExchangeId(ExchangeId {
                client_owner: ClientOwner {
                    verifier: self.verifier(),
                    owner_id: self.opaque.clone(),
                },
                flags: self.words[0],
                state_protect: self.protect(),
                implementation: self.implementation(),
            }),
            Arguments::CreateSession(CreateSession {
                client_id: ClientId(self.hypers[0]),
                sequence_id: self.words[0],
                flags: self.words[1],
                fore_channel: self.channel(),
                back_channel: self.channel(),
                callback_program: 7,
                callback_security: vec![
                    CallbackSecurity::None,
                    CallbackSecurity::Sys(SysCredential {
                        uid: self.words[0],
                        ..SysCredential::default()
                    }),
                ],
            }),
            Arguments::DestroySession(session_id),
            Arguments::Sequence(Sequence {
                session_id,
                sequence_id: self.words[0],
                slot_id: self.words[1],
                highest_slot_id: 3,
                cache_this: self.flag,
            }),
            Arguments::DestroyClientid(ClientId(self.hypers[1])),
            Arguments::ReclaimComplete(self.flag),
            Arguments::SecinfoNoName(SecInfoStyle::Parent),
            Arguments::FreeStateid(self.stateid()),
            Arguments::TestStateid(Stateids(vec![self.stateid(), Stateid::CURRENT])),
        ]
    }

    fn arguments_of_files(&self) -> Vec<Arguments<'static>> {
        let name = || self.name.clone();
        let create = OpenHow::Create;
        vec![
            Arguments::Access(Access(self.words[0])),
            Arguments::Getattr(self.bitmap()),
            Arguments::Getfh,
            Arguments::Lookup(name()),
            self.open(OpenHow::NoCreate, OpenClaim::Fh),
            self.open(
                create(CreateHow::Unchecked(self.attributes())),
                OpenClaim::Null(name()),
            ),
            self.open(
                create(CreateHow::Guarded(self.attributes())),
                OpenClaim::Previous(2),
            ),
            self.open(create(CreateHow::Exclusive(self.verifier())), OpenClaim::Fh),
            self.open(
                create(CreateHow::Exclusive41(self.verifier(), self.attributes())),
                OpenClaim::Null(name()),
            ),
            Arguments::Putfh(self.handle()),
            Arguments::Putrootfh,
            Arguments::Savefh,
            Arguments::Restorefh,
            Arguments::Readdir(Readdir {
                cookie: self.hypers[0],
                cookie_verifier: self.verifier(),
                dir_count: self.words[0],
                max_count: self.words[1],
                attributes: self.bitmap(),
            }),
            Arguments::Remove(name()),
            Arguments::Rename(Rename {
                old_name: name(),
                new_name: Name::new("other").expect("it is one"),
            }),
            Arguments::Setattr(Setattr {
                stateid: self.stateid(),
                attributes: self.attributes(),
            }),
            Arguments::Verify(self.attributes()),
        ]
    }

    fn arguments_of_bytes(&self) -> Vec<Arguments<'static>> {
        let ([offset, length], stateid) = (self.hypers, self.stateid());
        let read = Read {
            stateid,
            offset,
            count: self.words[0],
        };
        let allocation = Allocation {
            stateid,
            offset,
            length,
        };
        let lock = |locker| {
            Arguments::Lock(Lock {
                lock_type: LockType::WriteWaiting,
                reclaim: self.flag,
                offset,
                length,
                locker,
            })
        };
        vec![
            Arguments::Close(Close {
                seqid: 1,
                open_stateid: stateid,
            }),
            Arguments::Commit(Commit {
                offset,
                count: self.words[1],
            }),
            Arguments::Delegreturn(stateid),
            lock(Locker::New {
                open_seqid: 1,
                open_stateid: stateid,
                lock_seqid: 2,
                lock_owner: self.owner(),
            }),
            lock(Locker::Existing {
                lock_stateid: stateid,
                lock_seqid: 3,
            }),
            Arguments::Locku(Locku {
                lock_type: LockType::Read,
                seqid: 4,
                lock_stateid: stateid,
                offset,
                length,
            }),
            Arguments::Read(read),
            Arguments::ReadPlus(read),
            Arguments::Write(Write {
                stateid,
                offset,
                stability: Stability::DataSync,
                data: self.data,
            }),
            Arguments::Allocate(allocation),
            Arguments::Deallocate(allocation),
            Arguments::Seek(Seek {
                stateid,
                offset,
                what: Content::Hole,
            }),
            Arguments::Clone(CloneRange {
                source_stateid: stateid,
                destination_stateid: Stateid::ANONYMOUS,
                source_offset: offset,
                destination_offset: length,
                count: 9,
            }),
        ]
    }

    fn results(&self) -> Vec<Results<'static>> {
        [
            self.results_of_sessions(),
            self.results_of_files(),
            self.results_of_bytes(),
        ]
        .concat()
    }

    fn results_of_sessions(&self) -> Vec<Results<'static>> {
        let session_id = SessionId(self.fixed);
        vec![
            Results::BindConnToSession(BindConnToSessionResult {
                session_id,
                direction: ChannelFromServer::Both,
                use_rdma: self.flag,
            }),
            Results::ExchangeId(ExchangeIdResult {
                client_id: ClientId(self.hypers[0]),
                sequence_id: self.words[0],
                flags: ExchangeId::CONFIRMED_R,
                state_protect: self.protect(),
                server_minor_id: self.hypers[1],
                server_major_id: self.opaque.clone(),
                server_scope: b"scope".to_vec(),
                implementation: self.implementation(),
            }),
            Results::CreateSession(CreateSessionResult {
                session_id,
                sequence_id: self.words[0],
                flags: self.words[1],
                fore_channel: self.channel(),
                back_channel: self.channel(),
            }),
            Results::DestroySession,
            Results::Sequence(SequenceResult {
                session_id,
                sequence_id: self.words[0],
                slot_id: self.words[1],
                highest_slot_id: 3,
                target_highest_slot_id: 4,
                status_flags: 5,
            }),
            Results::DestroyClientid,
            Results::ReclaimComplete,
            Results::SecinfoNoName(SecInfoFlavors(vec![SecInfo::Gss, SecInfo::Flavor(1)])),
            Results::FreeStateid,
            Results::TestStateid(Statuses(vec![Status::OK, Status(self.words[0])])),
        ]
    }

    fn results_of_files(&self) -> Vec<Results<'static>> {
        let (stateid, recall) = (self.stateid(), self.flag);
        let none = |why, server_will| Delegation::NoneExt(WhyNone { why, server_will });
        let entry = |name| DirectoryEntry {
            cookie: self.hypers[0],
            name: GuardedName(name),
            attributes: self.attributes(),
        };
        vec![
            Results::Access(AccessResult {
                supported: Access(self.words[0]),
                access: Access(self.words[1]),
            }),
            Results::Getattr(self.attributes()),
            Results::Getfh(self.handle()),
            Results::Lookup,
            self.opened(Delegation::None),
            self.opened(Delegation::Read { stateid, recall }),
            self.opened(Delegation::Write { stateid, recall }),
            self.opened(none(2, Some(self.flag))),
            self.opened(none(6, None)),
            Results::Putfh,
            Results::Putrootfh,
            Results::Savefh,
            Results::Restorefh,
            Results::Readdir(ReaddirResult {
                cookie_verifier: self.verifier(),
                entries: vec![entry(Some(self.name.clone())), entry(None)],
                eof: self.flag,
            }),
            Results::Remove(self.change_info()),
            Results::Rename(RenameResult {
                source: self.change_info(),
                target: self.change_info(),
            }),
            Results::Setattr(self.bitmap()),
            Results::Verify,
        ]
    }

    fn results_of_bytes(&self) -> Vec<Results<'static>> {
        let [offset, length] = self.hypers;
        vec![
            Results::Close(Stateid::INVALID),
            Results::Commit(self.verifier()),
            Results::Delegreturn,
            Results::Lock(self.stateid()),
            Results::Locku(self.stateid().latest()),
            Results::Read(ReadResult {
                eof: self.flag,
                data: self.data,
            }),
            Results::ReadPlus(ReadPlusResult {
                eof: self.flag,
                contents: vec![
                    ReadPlusContent::Data {
                        offset,
                        data: self.data,
                    },
                    ReadPlusContent::Hole { offset, length },
                ],
            }),
            Results::Write(WriteResult {
                count: self.words[0],
                committed: Stability::FileSync,
                verifier: self.verifier(),
            }),
            Results::Allocate,
            Results::Deallocate,
            Results::Seek(SeekResult {
                eof: self.flag,
                offset,
            }),
            Results::Clone,
        ]
    }

    fn callbacks(&self) -> Vec<Callback> {
        vec![
            Callback::Sequence(CbSequence {
                session_id: SessionId(self.fixed),
                sequence_id: self.words[0],
                slot_id: self.words[1],
                highest_slot_id: 3,
                cache_this: self.flag,
            }),
            Callback::Recall(CbRecall {
                stateid: self.stateid(),
                truncate: self.flag,
                handle: self.handle(),
            }),
            Callback::RecallAny(CbRecallAny {
                objects_to_keep: self.words[0],
                types: self.bitmap(),
            }),
            Callback::RecallSlot {
                target_highest_slot_id: self.words[1],
            },
        ]
    }
}
