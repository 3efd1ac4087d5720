//! One sector of a disk, and the values that it may have.

use super::{Violation, word};
use crate::request::Durability;

/// A sector; the last version is the one that began last.
#[derive(Debug)]
pub(super) struct Sector {
    pub(super) versions: Vec<Version>,
}

/// One value that a sector may have.
#[derive(Clone, Debug)]
pub(super) struct Version {
    value: Value,
    /// When its write began; the name of the write.
    pub(super) by: u64,
    /// When its write ended, if it has.
    ended: Option<u64>,
    /// From when on no read that begins returns it.
    pub(super) hidden: Option<u64>,
    /// Whether no crash brings it back.
    pub(super) forgotten: bool,
}

/// The length of a sector, in bytes.
const SECTOR: usize = 512;

/// The bytes of a sector.
#[derive(Clone, Debug)]
pub(super) enum Value {
    Zeros,
    /// What the write of this name puts there.
    Pattern(u64),
    /// Found there.
    Bytes(Box<[u8]>),
}

impl Version {
    pub(super) fn begun(value: Value, by: u64) -> Self {
        Self {
            value,
            by,
            ended: None,
            hidden: None,
            forgotten: false,
        }
    }
}

impl Sector {
    /// A sector that can have no other value.
    pub(super) fn settled(value: Value) -> Self {
        let version = Version {
            ended: Some(0),
            ..Version::begun(value, 0)
        };
        Self {
            versions: vec![version],
        }
    }

    /// The write `by` ended well at `now`.
    pub(super) fn settle(&mut self, by: u64, now: u64, durability: Durability) {
        for version in &mut self.versions {
            if version.ended.is_some_and(|ended| ended < by) {
                version.hidden.get_or_insert(now);
                version.forgotten |= durability == Durability::Durable;
            }
        }
        self.end(by, now);
    }

    /// The write `by` is over at `now`, whatever it did.
    pub(super) fn end(&mut self, by: u64, now: u64) {
        for version in &mut self.versions {
            if version.by == by {
                version.ended.get_or_insert(now);
            }
        }
    }

    /// A flush that began at `began` has ended well.
    pub(super) fn flush(&mut self, began: u64) {
        for version in &mut self.versions {
            version.forgotten |= version.hidden.is_some_and(|hidden| hidden < began);
        }
    }

    /// Whether `found` is a permitted value, or put together from the bytes of several: a write may stop anywhere.
    pub(super) fn check(
        &self,
        number: usize,
        found: &[u8],
        after: &'static str,
        is_permitted: impl Fn(&&Version) -> bool,
    ) -> Result<(), Violation> {
        let permitted = || self.versions.iter().filter(&is_permitted);
        let mut contents = Vec::new();
        for version in permitted() {
            let content = version.value.content(number);
            if content == found {
                return Ok(());
            }
            contents.push(content);
        }
        let may_hold =
            |(at, byte): (usize, &u8)| contents.iter().any(|content| content.get(at) == Some(byte));
        if contents.len() > 1 && found.iter().enumerate().all(may_hold) {
            return Ok(());
        }
        let names: Vec<String> = permitted().map(|version| version.value.name()).collect();
        Err(Violation::Value {
            sector: number,
            after,
            found: described(found),
            permitted: names.join(", "),
        })
    }

    /// The sector from now on, when a crash has left `bytes` of it.
    pub(super) fn as_found(&self, number: usize, bytes: &[u8]) -> Self {
        let known = |version: &&Version| !version.forgotten && version.value.content(number) == bytes;
        let value = self
            .versions
            .iter()
            .find(known)
            .map(|version| version.value.clone());
        Self::settled(value.unwrap_or_else(|| Value::of(bytes)))
    }
}

impl Value {
    pub(super) fn of(bytes: &[u8]) -> Self {
        if bytes.iter().all(|byte| *byte == 0) {
            Self::Zeros
        } else {
            Self::Bytes(bytes.into())
        }
    }

    fn content(&self, number: usize) -> [u8; SECTOR] {
        let mut content = [0; SECTOR];
        match self {
            Self::Zeros => {}
            Self::Pattern(by) => fill(*by, number as u64, &mut content),
            Self::Bytes(bytes) => content.copy_from_slice(bytes),
        }
        content
    }

    fn name(&self) -> String {
        match self {
            Self::Zeros => "zeros".to_owned(),
            Self::Pattern(by) => format!("write {by}"),
            Self::Bytes(bytes) => described(bytes),
        }
    }
}

/// Puts what write `by` leaves in `sector` into `place`.
pub(super) fn fill(by: u64, sector: u64, place: &mut [u8]) {
    for (at, bytes) in (0..).zip(place.chunks_mut(8)) {
        for (to, from) in bytes.iter_mut().zip(word(by, sector, at)) {
            *to = from;
        }
    }
}

fn described(bytes: &[u8]) -> String {
    let zeros = bytes.iter().filter(|byte| **byte == 0).count();
    let begins: Vec<String> = bytes.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    format!(
        "bytes {} … ({zeros} of {} are zero)",
        begins.join(" "),
        bytes.len()
    )
}
