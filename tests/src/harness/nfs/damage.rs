//! What is wrong with one message, and all else right.

use super::record::{Header, LAST, MARK_BYTES, Xdr, content, sealed};
use super::results::{self, Done};
use crate::harness::proxy::Damage;

/// Where the transaction of a message is.
const XID_AT: usize = 0;

/// The message with the damage, if it has a place for it. NFS has no sums.
pub(super) fn damaged(message: &[u8], damage: Damage) -> Option<Vec<u8>> {
    let mut content = content(message);
    Xdr::new(&content).header()?;
    match damage {
        Damage::Data | Damage::HeaderSum | Damage::DataSum => return None,
        Damage::Truncated => {
            // Half of it, in whole words.
            content.truncate(content.len() / 8 * 4);
        }
        Damage::Oversized => {
            let mut damaged = sealed(&content);
            let promised = LAST | (LAST - 1);
            damaged
                .get_mut(..MARK_BYTES)?
                .copy_from_slice(&promised.to_be_bytes());
            return Some(damaged);
        }
        Damage::Tag => change(&mut content, XID_AT, |xid| xid ^ 0x5a5a_5a5a)?,
        Damage::Number => {
            let done = results::parse(&content)?;
            let Some(Done::Sequence(at)) = done.first() else {
                return None;
            };
            let at = *at;
            change(&mut content, at, |sequence| sequence.wrapping_add(17))?;
        }
        Damage::Verdict => {
            let mut rest = Xdr::new(&content);
            let (_, Header::Done) = rest.header()? else {
                return None;
            };
            let at = rest.at() - 4;
            // Not SUCCESS but SYSTEM_ERR and more.
            change(&mut content, at, |status| status ^ 0x10)?;
        }
    }
    Some(sealed(&content))
}

/// Changes the word at a place of the content.
fn change(content: &mut [u8], at: usize, to: impl FnOnce(u32) -> u32) -> Option<()> {
    let word = Xdr::new(content.get(at..)?).word()?;
    content
        .get_mut(at..at + 4)?
        .copy_from_slice(&to(word).to_be_bytes());
    Some(())
}
