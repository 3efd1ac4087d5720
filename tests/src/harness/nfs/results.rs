//! The results of a COMPOUND that was done: which operations were, and where in the content some of them have what the
//! harness changes or learns.

use super::record::{Header, Xdr};

/// The result of one operation that succeeded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Done<'a> {
    /// With the place of the sequence number.
    Sequence(usize),
    /// The name of a session that is new.
    CreateSession(&'a [u8]),
    /// The handle of the file that is meant.
    GetHandle(&'a [u8]),
    /// With the place of the verifier.
    Write(usize),
    /// With the place of the verifier.
    Commit(usize),
    /// Anything else.
    Other,
}

const STATE_BYTES: usize = 16;
const VERIFIER_BYTES: usize = 8;
/// Length of what a change of a directory is told by.
const CHANGE_BYTES: usize = 20;

/// Of each operation that was done, up to one that is not known here or that failed; nothing when the content of a record
/// is no answer, or the call was refused.
pub(super) fn parse(content: &[u8]) -> Option<Vec<Done<'_>>> {
    let mut rest = Xdr::new(content);
    let (_, Header::Done) = rest.header()? else {
        return None;
    };
    // The status of the last one, and a tag.
    rest.word()?;
    rest.opaque()?;
    let count = rest.word()?;
    Some((0..count).map_while(|_| result(&mut rest)).collect())
}

fn result<'a>(rest: &mut Xdr<'a>) -> Option<Done<'a>> {
    let number = rest.word()?;
    if rest.word()? != 0 {
        return None;
    }
    Some(match number {
        5 => {
            let at = rest.at();
            rest.bytes(VERIFIER_BYTES)?;
            Done::Commit(at)
        }
        10 => Done::GetHandle(rest.opaque()?),
        38 => {
            // How much, and how safe it is.
            rest.bytes(8)?;
            let at = rest.at();
            rest.bytes(VERIFIER_BYTES)?;
            Done::Write(at)
        }
        // What follows is not looked at.
        43 => Done::CreateSession(rest.bytes(STATE_BYTES)?),
        53 => {
            rest.bytes(STATE_BYTES)?;
            let at = rest.at();
            rest.bytes(20)?;
            Done::Sequence(at)
        }
        number => {
            skip(number, rest)?;
            Done::Other
        }
    })
}

/// Passes over the result of an operation that is of no concern; nothing when it is not known.
fn skip(number: u32, rest: &mut Xdr<'_>) -> Option<()> {
    match number {
        // ACCESS.
        3 => rest.bytes(8).map(drop),
        // CLOSE, LOCK, LOCKU.
        4 | 12 | 14 => rest.bytes(STATE_BYTES).map(drop),
        // GETATTR.
        9 => rest.words().and_then(|()| rest.opaque()).map(drop),
        // DELEGRETURN, LOOKUP, LOOKUPP, NVERIFY, PUTFH, PUTPUBFH, PUTROOTFH, RESTOREFH, SAVEFH, VERIFY, DESTROY_SESSION,
        // FREE_STATEID, DESTROY_CLIENTID, RECLAIM_COMPLETE, ALLOCATE, DEALLOCATE, CLONE.
        8 | 15 | 16 | 17 | 22 | 23 | 24 | 31 | 32 | 37 | 44 | 45 | 57 | 58 | 59 | 62 | 71 => Some(()),
        18 => open(rest),
        // READ.
        25 => rest.word().and_then(|_| rest.opaque()).map(drop),
        // REMOVE, RENAME.
        28 => rest.bytes(CHANGE_BYTES).map(drop),
        29 => rest.bytes(2 * CHANGE_BYTES).map(drop),
        // SETATTR.
        34 => rest.words(),
        // SEEK.
        69 => rest.bytes(12).map(drop),
        _ => None,
    }
}

fn open(rest: &mut Xdr<'_>) -> Option<()> {
    // The stateid, the change of the directory, flags; then what attributes were set.
    rest.bytes(STATE_BYTES + CHANGE_BYTES + 4)?;
    rest.words()?;
    match rest.word()? {
        0 => Some(()),
        // No delegation, and why; only two reasons say more.
        3 => match rest.word()? {
            1 | 2 => rest.word().map(drop),
            _ => Some(()),
        },
        // A delegation is nothing that a test asks for.
        _ => None,
    }
}
