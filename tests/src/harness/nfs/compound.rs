//! The operations of a COMPOUND that is called (RFC 8881, 16.2 and 18; RFC 7862, 15), as far as the harness cares.

use std::ops::Range;

use super::record::{Header, NFS, Xdr};

/// A call of NFS, and what it asks for.
#[derive(Debug)]
pub(super) struct Call<'a> {
    pub(super) xid: u32,
    pub(super) asked: Asked<'a>,
}

/// What a call asks for.
#[derive(Debug)]
pub(super) enum Asked<'a> {
    /// Whether the server is there.
    Nothing,
    /// The operations of NFSv4, up to one that is not known here.
    Compound(Vec<Operation<'a>>),
    /// A procedure of NFSv3.
    Procedure(u32),
}

/// One operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Operation<'a> {
    ExchangeId,
    CreateSession,
    BindConnection,
    Sequence {
        slot: Slot,
        sequence: u32,
    },
    PutHandle(&'a [u8]),
    PutRoot,
    SaveHandle,
    RestoreHandle,
    Lookup(&'a [u8]),
    ParentLookup,
    GetHandle,
    /// With the name, where one is given.
    Open {
        name: Option<&'a [u8]>,
        is_reclaim: bool,
    },
    Lock,
    Unlock,
    Read,
    Write {
        offset: u64,
        is_unstable: bool,
        data: &'a [u8],
    },
    /// What is to be safe.
    Commit(Range<u64>),
    Allocate,
    Deallocate,
    /// One that changes neither what file is meant nor what is in it.
    Other,
}

/// A slot of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Slot {
    pub(super) session: [u8; 16],
    number: u32,
}

/// Length of a stateid, and of a session's name.
const STATE_BYTES: usize = 16;
const VERIFIER_BYTES: usize = 8;
const UNSTABLE: u32 = 0;

impl<'a> Call<'a> {
    /// The call in the content of a record; nothing when it is none, or not one of NFS.
    pub(super) fn parse(content: &'a [u8]) -> Option<Self> {
        let mut rest = Xdr::new(content);
        let (xid, header) = rest.header()?;
        let asked = match header {
            Header::Call {
                program: NFS,
                version,
                procedure,
            } => match (version, procedure) {
                (_, 0) => Asked::Nothing,
                (4, _) => Asked::Compound(operations(&mut rest)),
                (_, procedure) => Asked::Procedure(procedure),
            },
            _ => return None,
        };
        Some(Self { xid, asked })
    }

    /// Its operations; none of a call that has none.
    pub(super) fn operations(&self) -> &[Operation<'a>] {
        match &self.asked {
            Asked::Compound(operations) => operations,
            Asked::Nothing | Asked::Procedure(_) => &[],
        }
    }
}

fn operations<'a>(rest: &mut Xdr<'a>) -> Vec<Operation<'a>> {
    let mut found = Vec::new();
    let head = (rest.opaque(), rest.word(), rest.word());
    let (_, _, Some(count)) = head else {
        return found;
    };
    for _ in 0..count {
        let Some(operation) = operation(rest) else {
            break;
        };
        let is_last = matches!(
            operation,
            Operation::BindConnection | Operation::ExchangeId | Operation::CreateSession
        );
        found.push(operation);
        if is_last {
            break;
        }
    }
    found
}

fn operation<'a>(rest: &mut Xdr<'a>) -> Option<Operation<'a>> {
    Some(match rest.word()? {
        5 => {
            let (offset, count) = (rest.long()?, rest.word()?);
            // Without a count it is all from there.
            let end = match count {
                0 => u64::MAX,
                count => offset.saturating_add(u64::from(count)),
            };
            Operation::Commit(offset..end)
        }
        10 => Operation::GetHandle,
        12 => {
            rest.bytes(24)?;
            lock_owner(rest)?;
            Operation::Lock
        }
        14 => {
            rest.bytes(8 + STATE_BYTES + 16)?;
            Operation::Unlock
        }
        15 => Operation::Lookup(rest.opaque()?),
        16 => Operation::ParentLookup,
        18 => open(rest)?,
        22 => Operation::PutHandle(rest.opaque()?),
        23 | 24 => Operation::PutRoot,
        25 | 68 => {
            rest.bytes(STATE_BYTES + 12)?;
            Operation::Read
        }
        31 => Operation::RestoreHandle,
        32 => Operation::SaveHandle,
        38 => {
            rest.bytes(STATE_BYTES)?;
            Operation::Write {
                offset: rest.long()?,
                is_unstable: rest.word()? == UNSTABLE,
                data: rest.opaque()?,
            }
        }
        // Their arguments are not looked at, nor what follows them.
        41 => Operation::BindConnection,
        42 => Operation::ExchangeId,
        43 => Operation::CreateSession,
        53 => {
            let session = rest.bytes(STATE_BYTES)?.try_into().ok()?;
            let (sequence, number) = (rest.word()?, rest.word()?);
            rest.bytes(8)?;
            let slot = Slot { session, number };
            Operation::Sequence { slot, sequence }
        }
        59 | 62 if rest.bytes(STATE_BYTES + 16).is_none() => return None,
        59 => Operation::Allocate,
        62 => Operation::Deallocate,
        number => {
            skip(number, rest)?;
            Operation::Other
        }
    })
}

/// Passes over the arguments of an operation that is of no concern; nothing when it is not known.
fn skip(number: u32, rest: &mut Xdr<'_>) -> Option<()> {
    match number {
        // ACCESS, SECINFO_NO_NAME, RECLAIM_COMPLETE.
        3 | 52 | 58 => rest.word().map(drop),
        // CLOSE.
        4 => rest.bytes(4 + STATE_BYTES).map(drop),
        // DELEGRETURN, DESTROY_SESSION, FREE_STATEID.
        8 | 44 | 45 => rest.bytes(STATE_BYTES).map(drop),
        // GETATTR.
        9 => rest.words(),
        // REMOVE, SECINFO.
        28 | 33 => rest.opaque().map(drop),
        // RENAME.
        29 => rest.opaque().and(rest.opaque()).map(drop),
        // READDIR.
        26 => rest.bytes(8 + VERIFIER_BYTES + 8).and_then(|_| rest.words()),
        // NVERIFY, VERIFY.
        17 | 37 => attributes(rest),
        // SETATTR.
        34 => rest.bytes(STATE_BYTES).and_then(|_| attributes(rest)),
        // TEST_STATEID.
        55 => {
            let count = usize::try_from(rest.word()?).ok()?;
            rest.bytes(count.checked_mul(STATE_BYTES)?).map(drop)
        }
        // DESTROY_CLIENTID.
        57 => rest.long().map(drop),
        // SEEK.
        69 => rest.bytes(STATE_BYTES + 12).map(drop),
        // CLONE.
        71 => rest.bytes(2 * STATE_BYTES + 24).map(drop),
        _ => None,
    }
}

fn attributes(rest: &mut Xdr<'_>) -> Option<()> {
    rest.words()?;
    rest.opaque().map(drop)
}

fn lock_owner(rest: &mut Xdr<'_>) -> Option<()> {
    if rest.word()? == 0 {
        return rest.bytes(STATE_BYTES + 4).map(drop);
    }
    // The open's sequence and stateid, the lock's sequence, the client.
    rest.bytes(4 + STATE_BYTES + 4 + 8)?;
    rest.opaque().map(drop)
}

fn open<'a>(rest: &mut Xdr<'a>) -> Option<Operation<'a>> {
    // Sequence, access, deny, client; then the owner.
    rest.bytes(20)?;
    rest.opaque()?;
    if rest.word()? == 1 {
        match rest.word()? {
            0 | 1 => attributes(rest)?,
            2 => rest.bytes(VERIFIER_BYTES).map(drop)?,
            _ => rest.bytes(VERIFIER_BYTES).and_then(|_| attributes(rest))?,
        }
    }
    let claim = rest.word()?;
    let name = match claim {
        // By name.
        0 | 3 => Some(rest.opaque()?),
        // After a restart; with the kind of delegation.
        1 => {
            rest.word()?;
            None
        }
        2 => {
            rest.bytes(STATE_BYTES)?;
            Some(rest.opaque()?)
        }
        5 => {
            rest.bytes(STATE_BYTES)?;
            None
        }
        _ => None,
    };
    Some(Operation::Open {
        name,
        is_reclaim: claim == 1,
    })
}
