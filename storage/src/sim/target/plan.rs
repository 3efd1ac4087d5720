//! What a command does to a logical unit, part by part.

use super::cdb::{Blocks, Command, Durability};
use super::lun::{BLOCK_BYTES, Extent, LogicalUnit};
use super::refusal::{Illegal, Refusal};
use crate::sim::dice::Dice;
use crate::sim::medium::{Horizon, Medium};

/// The work of one command that was let in.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// What is left to do.
    pub(super) effects: Vec<Effect>,
    /// What the initiator gets.
    pub(super) data: Vec<u8>,
}

/// What happens to a logical unit at one moment.
#[derive(Debug)]
pub(super) enum Effect {
    /// Bytes go to a place in the data.
    Read {
        extent: Extent,
        place: usize,
    },
    Write {
        offset_bytes: u64,
        bytes: Vec<u8>,
        durability: Durability,
    },
    Zero(Extent),
    Sync(Horizon),
    CompareAndWrite {
        offset_bytes: u64,
        expected: Vec<u8>,
        bytes: Vec<u8>,
    },
}

impl Plan {
    /// The plan of a command on blocks, which came with `data`. Commands that only talk have none.
    pub(super) fn of(
        command: Command,
        unit: &LogicalUnit,
        data: &[u8],
        arrived: Horizon,
    ) -> Result<Self, Illegal> {
        match command {
            Command::Read(blocks) => {
                let extent = unit.extent(blocks)?;
                Ok(Self {
                    effects: vec![Effect::Read { extent, place: 0 }],
                    data: vec![0; index(extent.len_bytes)],
                })
            }
            Command::Write { blocks, durability } => {
                if durability == Durability::OnMedium && !unit.takes_fua {
                    return Err(Illegal::FieldInCdb);
                }
                let extent = unit.extent(blocks)?;
                let bytes = data.get(..index(extent.len_bytes)).ok_or(Illegal::FieldInCdb)?;
                Ok(Self::doing(vec![Effect::Write {
                    offset_bytes: extent.offset_bytes,
                    bytes: bytes.to_vec(),
                    durability,
                }]))
            }
            Command::SynchronizeCache => Ok(Self::doing(vec![Effect::Sync(arrived)])),
            Command::Unmap { list_bytes } => {
                let list = data
                    .get(..index(list_bytes.into()))
                    .ok_or(Illegal::ParameterListLength)?;
                Ok(Self::doing(unmap(unit, list)?))
            }
            Command::WriteSame { blocks, unmap } => Ok(Self::doing(write_same(unit, blocks, unmap, data)?)),
            Command::CompareAndWrite { blocks } => {
                let extent = unit.extent(blocks)?;
                let (expected, bytes) = data.split_at_checked(index(extent.len_bytes)).unwrap_or_default();
                if expected.len() != bytes.len() {
                    return Err(Illegal::FieldInCdb);
                }
                Ok(Self::doing(vec![Effect::CompareAndWrite {
                    offset_bytes: extent.offset_bytes,
                    expected: expected.to_vec(),
                    bytes: bytes.to_vec(),
                }]))
            }
            _ => Ok(Self::default()),
        }
    }

    /// The same, in more steps.
    pub(super) fn cut(&mut self, dice: &mut Dice) {
        for _ in 0..dice.below(4) {
            let Some(effect) = self.effects.pop() else { return };
            self.effects.extend(effect.cut(dice));
            dice.shuffle(&mut self.effects);
        }
    }

    fn doing(effects: Vec<Effect>) -> Self {
        Self {
            effects,
            data: Vec::new(),
        }
    }
}

impl Effect {
    /// What it changes, and whether it makes zeros of it.
    pub(super) fn change(&self) -> Option<(Extent, super::Written)> {
        let written = |offset_bytes: u64, bytes: &[u8]| Extent {
            offset_bytes,
            len_bytes: bytes.len() as u64,
        };
        match self {
            Self::Read { .. } | Self::Sync(_) => None,
            Self::Zero(extent) => Some((*extent, super::Written::Zeros)),
            Self::Write {
                offset_bytes, bytes, ..
            }
            | Self::CompareAndWrite {
                offset_bytes, bytes, ..
            } => Some((written(*offset_bytes, bytes), super::Written::Bytes)),
        }
    }

    /// Happens now. `data` is what the initiator gets.
    pub(super) fn happen(self, medium: &Medium, unit: &LogicalUnit, data: &mut [u8]) -> Result<(), Refusal> {
        let file = unit.file;
        match self {
            Self::Read { extent, place } => {
                let bytes = medium.read(file, extent.offset_bytes, extent.len_bytes);
                let place = data.get_mut(place..place + bytes.len());
                place
                    .expect("the data has room for all that is read")
                    .copy_from_slice(&bytes);
            }
            Self::Write {
                offset_bytes,
                bytes,
                durability,
            } => write(medium, unit, offset_bytes, &bytes, durability),
            Self::Zero(extent) => {
                let author = medium.begin();
                medium.change(file, |file| {
                    file.zero(extent.offset_bytes, extent.len_bytes, author)
                });
                medium.end(author);
            }
            Self::Sync(arrived) => medium.sync(file, &arrived),
            Self::CompareAndWrite {
                offset_bytes,
                expected,
                bytes,
            } => {
                let present = medium.read(file, offset_bytes, expected.len() as u64);
                if let Some(at) = present
                    .iter()
                    .zip(&expected)
                    .position(|(one, other)| one != other)
                {
                    let offset_bytes = u32::try_from(at).expect("it has few blocks");
                    return Err(Refusal::Miscompare { offset_bytes });
                }
                write(medium, unit, offset_bytes, &bytes, Durability::Cached);
            }
        }
        Ok(())
    }

    /// Two effects that come to the same, if it is more than one block.
    fn cut(self, dice: &mut Dice) -> Vec<Self> {
        let mut middle = |len_bytes: u64| match len_bytes / BLOCK_BYTES {
            0 | 1 => None,
            blocks => Some((1 + dice.below(blocks - 1)) * BLOCK_BYTES),
        };
        match self {
            Self::Read { extent, place } => match middle(extent.len_bytes) {
                None => vec![self],
                Some(middle) => {
                    let (extent, rest) = extent.cut(middle);
                    let later = place + index(middle);
                    vec![
                        Self::Read { extent, place },
                        Self::Read {
                            extent: rest,
                            place: later,
                        },
                    ]
                }
            },
            Self::Write {
                offset_bytes,
                mut bytes,
                durability,
            } => {
                let rest = middle(bytes.len() as u64).map(|middle| (middle, bytes.split_off(index(middle))));
                let write = |offset_bytes, bytes| Self::Write {
                    offset_bytes,
                    bytes,
                    durability,
                };
                let rest = rest.map(|(middle, rest)| write(offset_bytes + middle, rest));
                [write(offset_bytes, bytes)].into_iter().chain(rest).collect()
            }
            Self::Zero(extent) => match middle(extent.len_bytes) {
                None => vec![self],
                Some(middle) => {
                    let (first, rest) = extent.cut(middle);
                    vec![Self::Zero(first), Self::Zero(rest)]
                }
            },
            Self::Sync(_) | Self::CompareAndWrite { .. } => vec![self],
        }
    }
}

impl Extent {
    fn cut(self, len_bytes: u64) -> (Self, Self) {
        let first = Self { len_bytes, ..self };
        let rest = Self {
            offset_bytes: self.offset_bytes + len_bytes,
            len_bytes: self.len_bytes - len_bytes,
        };
        (first, rest)
    }
}

fn write(medium: &Medium, unit: &LogicalUnit, offset_bytes: u64, bytes: &[u8], durability: Durability) {
    let author = medium.begin();
    let horizon = medium.horizon();
    medium.change(unit.file, |file| file.write(offset_bytes, bytes, author));
    if durability == Durability::OnMedium {
        let range = offset_bytes..offset_bytes + bytes.len() as u64;
        medium.sync_write(unit.file, &range, author, &horizon);
    }
    medium.end(author);
}

/// The parameter list of UNMAP (SBC-3, 5.28).
fn unmap(unit: &LogicalUnit, list: &[u8]) -> Result<Vec<Effect>, Illegal> {
    let Some((header, descriptors)) = list.split_first_chunk::<8>() else {
        return Ok(Vec::new());
    };
    let [_, _, high, low, ..] = *header;
    let len_bytes = usize::from(u16::from_be_bytes([high, low]));
    let descriptors = descriptors.get(..len_bytes).ok_or(Illegal::ParameterListLength)?;
    let (descriptors, _) = descriptors.as_chunks::<16>();
    let extent = |descriptor: &[u8; 16]| {
        let [a, b, c, d, e, f, g, h, count @ .., _, _, _, _] = *descriptor;
        let blocks = Blocks {
            first: u64::from_be_bytes([a, b, c, d, e, f, g, h]),
            count: u32::from_be_bytes(count),
        };
        unit.extent(blocks).map(Effect::Zero)
    };
    descriptors.iter().map(extent).collect()
}

fn write_same(unit: &LogicalUnit, blocks: Blocks, unmap: bool, data: &[u8]) -> Result<Vec<Effect>, Illegal> {
    let count = match blocks.count {
        // To the end.
        0 => {
            u32::try_from(unit.block_count().saturating_sub(blocks.first)).map_err(|_| Illegal::FieldInCdb)?
        }
        count => count,
    };
    let extent = unit.extent(Blocks { count, ..blocks })?;
    let block = data.get(..index(BLOCK_BYTES)).ok_or(Illegal::FieldInCdb)?;
    if unmap || block.iter().all(|byte| *byte == 0) {
        return Ok(vec![Effect::Zero(extent)]);
    }
    let count = usize::try_from(count).expect("this is a 64-bit monitor");
    Ok(vec![Effect::Write {
        offset_bytes: extent.offset_bytes,
        bytes: block.repeat(count),
        durability: Durability::Cached,
    }])
}

fn index(bytes: u64) -> usize {
    usize::try_from(bytes).expect("this is a 64-bit monitor")
}
