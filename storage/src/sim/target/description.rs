//! What a logical unit says of itself: INQUIRY and its pages, MODE SENSE, capacities (SPC-4, 6 and 7; SBC-3, 5 and 6).

use super::cdb::ModeForm;
use super::lun::{BLOCK_BYTES, LogicalUnit};
use super::refusal::Illegal;
use crate::backend::Access;

/// Whom a command speaks to.
#[derive(Clone, Copy, Debug)]
pub(super) enum Addressee<'a> {
    /// A disk.
    Disk(&'a LogicalUnit),
    /// Number 0, if no disk is there: a controller, to ask for the others.
    Controller,
    /// Nobody.
    Nobody,
}

/// The pages of vital product data.
const PAGES: &[u8] = &[0x00, 0x80, 0x83, 0xb0, 0xb1, 0xb2];

/// Number of blocks that COMPARE AND WRITE may have, as page B0 says.
pub(super) const COMPARE_BLOCKS_MAX: u8 = 128;

impl Addressee<'_> {
    fn device_type(self) -> u8 {
        match self {
            Self::Disk(_) => 0x00,
            Self::Controller => 0x0c,
            Self::Nobody => 0x7f,
        }
    }

    /// The data of INQUIRY, of a page or the standard ones.
    pub(super) fn inquiry(self, page: Option<u8>) -> Result<Vec<u8>, Illegal> {
        let Some(page) = page else {
            return Ok(self.standard_inquiry());
        };
        let Self::Disk(disk) = self else {
            return Err(Illegal::FieldInCdb);
        };
        let body = match page {
            0x00 => PAGES.to_vec(),
            0x80 => disk.serial().into_bytes(),
            0x83 => disk.designators(),
            0xb0 => block_limits(),
            0xb1 => vec![0; 60],
            // Exponent 0; UNMAP, WRITE SAME(16) and (10) unmap, and what is unmapped reads as zeros; thin.
            0xb2 => vec![0, 0xe4, 2, 0],
            _ => return Err(Illegal::FieldInCdb),
        };
        let len_bytes = u16::try_from(body.len()).expect("pages are short");
        let mut data = vec![self.device_type(), page];
        data.extend(len_bytes.to_be_bytes());
        data.extend(body);
        Ok(data)
    }

    fn standard_inquiry(self) -> Vec<u8> {
        // SPC-4, responses of format 2, 31 further bytes, command queueing.
        let mut data = vec![self.device_type(), 0, 6, 2, 31, 0, 0, 2];
        data.extend(b"CORACLE ");
        data.extend(b"SIMULATED-DISK  ");
        data.extend(b"0001");
        data
    }
}

impl LogicalUnit {
    fn serial(&self) -> String {
        format!("sim{:05}", self.number)
    }

    /// One designator: a T10 vendor ID in ASCII, of the logical unit.
    fn designators(&self) -> Vec<u8> {
        let name = format!("CORACLE {}", self.serial());
        let len_bytes = u8::try_from(name.len()).expect("the name is short");
        let mut data = vec![2, 1, 0, len_bytes];
        data.extend(name.into_bytes());
        data
    }

    /// READ CAPACITY(10): the last block, and how long one is.
    pub(super) fn capacity10(&self) -> Vec<u8> {
        let last = u32::try_from(self.block_count() - 1).unwrap_or(u32::MAX);
        [last, 512].into_iter().flat_map(u32::to_be_bytes).collect()
    }

    /// READ CAPACITY(16): the same, of eight physical blocks each, thin and zeroed by UNMAP.
    pub(super) fn capacity16(&self) -> Vec<u8> {
        let mut data = (self.block_count() - 1).to_be_bytes().to_vec();
        data.extend(
            u32::try_from(BLOCK_BYTES)
                .expect("blocks are short")
                .to_be_bytes(),
        );
        data.extend([0, 3, 0xc0, 0]);
        data.resize(32, 0);
        data
    }

    /// MODE SENSE: the header, and the caching page if it is asked for.
    pub(super) fn mode(&self, form: ModeForm, page: u8) -> Result<Vec<u8>, Illegal> {
        // WCE.
        let caching = [
            0x08, 0x12, 0x04, 0, 0xff, 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0,
        ];
        let body: &[u8] = match page {
            0x08 | 0x3f => &caching,
            _ => return Err(Illegal::FieldInCdb),
        };
        let protection = match self.access {
            Access::ReadOnly => 0x80,
            Access::ReadWrite => 0,
        };
        // WP, and DPO with FUA.
        let parameter = protection | if self.takes_fua { 0x10 } else { 0 };
        let body_bytes = u8::try_from(body.len()).expect("the pages are short");
        let mut data = match form {
            ModeForm::Six => vec![body_bytes + 3, 0, parameter, 0],
            ModeForm::Ten => vec![0, body_bytes + 6, 0, parameter, 0, 0, 0, 0],
        };
        data.extend(body);
        Ok(data)
    }
}

fn block_limits() -> Vec<u8> {
    let mut data = vec![0, COMPARE_BLOCKS_MAX];
    data.resize(16, 0);
    // As many blocks and descriptors of UNMAP as there can be.
    data.extend([0xff; 8]);
    data.resize(60, 0);
    data
}

/// REPORT LUNS: the numbers, each as the wire has it.
pub(super) fn luns(numbers: impl Iterator<Item = u16>) -> Vec<u8> {
    let list: Vec<u8> = numbers
        .flat_map(|number| {
            let method = if number < 256 { 0 } else { 0x4000 };
            let [high, low] = (number | method).to_be_bytes();
            [high, low, 0, 0, 0, 0, 0, 0]
        })
        .collect();
    let len_bytes = u32::try_from(list.len()).expect("there are few logical units");
    let mut data = len_bytes.to_be_bytes().to_vec();
    data.extend([0; 4]);
    data.extend(list);
    data
}
