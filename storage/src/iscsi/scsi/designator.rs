//! What names a unit for good (SPC-4, 7.8.6): by it a disk is known again, whichever way leads to it.

#[cfg(test)]
mod tests;

use std::fmt;

use super::cdb::VpdPage;
use super::parameter::{ParameterError, text};
use super::vpd;

/// A name of a unit.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Designator {
    kind: Kind,
    bytes: Vec<u8>,
}

/// The kinds, best first: who gives a name of the first ones has a number of the IEEE's to make it unique.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    /// NAA 6, 5 and 2, of 16, 8 and 8 bytes.
    Naa,
    Eui64,
    /// A kind of SPC-5.
    Uuid,
    ScsiName,
    T10Vendor,
    /// NAA 3: unique where its administrator says so.
    NaaLocal,
}

/// The longest bytes that a designator has.
pub const DESIGNATOR_BYTES_MAX: usize = 255;

impl Designator {
    /// The best name in page 83 of those that are about the unit itself, not about a port or the target; `None` if
    /// none is. Among equals it is the longest and then the lowest, in whatever order they are sent.
    ///
    /// # Errors
    ///
    /// When the bytes are another page, or none.
    pub fn best(bytes: &[u8]) -> Result<Option<Self>, ParameterError> {
        let page = vpd::page(VpdPage::DeviceIdentification, bytes)?;
        let names = Descriptors(page.rest(4)).filter_map(Descriptor::name);
        Ok(names.min_by_key(|name| (name.kind, usize::MAX - name.bytes.len(), name.bytes.clone())))
    }

    /// A number for its kind, which does not change, and the bytes as the unit sends them: what is written down of it.
    pub fn identity(&self) -> Vec<u8> {
        let kind = match self.kind {
            Kind::T10Vendor => 1,
            Kind::Eui64 => 2,
            Kind::Naa | Kind::NaaLocal => 3,
            Kind::ScsiName => 8,
            Kind::Uuid => 10,
        };
        [&[kind], &*self.bytes].concat()
    }
}

impl fmt::Display for Designator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let prefix = match self.kind {
            Kind::Naa | Kind::NaaLocal => "naa.",
            Kind::Eui64 => "eui.",
            Kind::Uuid => "uuid.",
            Kind::ScsiName => "",
            Kind::T10Vendor => "t10.",
        };
        f.write_str(prefix)?;
        match self.kind {
            Kind::ScsiName | Kind::T10Vendor => f.write_str(&text(&self.bytes)),
            Kind::Naa | Kind::NaaLocal | Kind::Eui64 | Kind::Uuid => {
                self.bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }
    }
}

/// One entry of the page.
struct Descriptor<'a> {
    type_and_association: u8,
    bytes: &'a [u8],
}

impl Descriptor<'_> {
    /// The name, if it is one of the unit.
    fn name(self) -> Option<Designator> {
        const LOGICAL_UNIT: u8 = 0;
        if (self.type_and_association >> 4) & 0b11 != LOGICAL_UNIT {
            return None;
        }
        // A unit that was never given a name says zeros or blanks.
        if self.bytes.iter().all(|byte| matches!(byte, 0 | b' ')) {
            return None;
        }
        let (kind, bytes) = match self.type_and_association & 0x0f {
            1 => (Kind::T10Vendor, self.bytes),
            2 if matches!(self.bytes.len(), 8 | 12 | 16) => (Kind::Eui64, self.bytes),
            3 => match (self.bytes.first()? >> 4, self.bytes.len()) {
                (6, 16) | (2 | 5, 8) => (Kind::Naa, self.bytes),
                (3, 8) => (Kind::NaaLocal, self.bytes),
                _ => return None,
            },
            8 => (Kind::ScsiName, self.bytes),
            // A type and a reserved byte, then the UUID.
            10 => (Kind::Uuid, self.bytes.get(2..18)?),
            _ => return None,
        };
        Some(Designator {
            kind,
            bytes: bytes.to_vec(),
        })
    }
}

/// The entries of the page; the last one may have been cut off, and is none then.
struct Descriptors<'a>(&'a [u8]);

impl<'a> Iterator for Descriptors<'a> {
    type Item = Descriptor<'a>;

    fn next(&mut self) -> Option<Self::Item> {
        let ([_, type_and_association, _, len], rest) = self.0.split_first_chunk()?;
        let (bytes, rest) = rest.split_at_checked(usize::from(*len))?;
        self.0 = rest;
        Some(Descriptor {
            type_and_association: *type_and_association,
            bytes,
        })
    }
}
