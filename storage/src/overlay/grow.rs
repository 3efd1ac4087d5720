//! How an overlay becomes larger: first its file, on the medium, then what its header says.

use super::Overlay;
use super::flight::Stage;
use super::format::{DATA_OFFSET_BYTES, Header};
use crate::backend::Backend;
use crate::request::{Durability, Failure, Operation, Request};
use crate::segments;

/// A change of the size, of which there is one at a time.
pub(super) struct Growth {
    place: usize,
    header: Header,
    bytes: Box<[u8]>,
}

const SECTOR_BYTES: u64 = 512;

impl Overlay {
    /// Finds the first stage of a [`Operation::Grow`]; it stays unplanned while there is another.
    pub(super) fn plan_growth(&mut self, place: usize) {
        if self.growth.is_some() {
            return;
        }
        let shape = self.contents.shape;
        let flight = self.flights.get_mut(place).expect("what is planned is there");
        let len_bytes = flight.asked.len_bytes;
        flight.stage = Stage::End;
        if len_bytes < shape.size_bytes || !len_bytes.is_multiple_of(SECTOR_BYTES) {
            flight.outcome = Err(Failure::OutOfRange);
        } else if len_bytes > shape.size_bytes_max() {
            let bytes_max = shape.size_bytes_max();
            flight.outcome = Err(Failure::TooLarge { bytes_max });
        } else if len_bytes > shape.size_bytes {
            // The file may be longer than the image: an earlier growth has failed after it was extended.
            let file_bytes = self.store.geometry().size_bytes;
            flight.stage = if file_bytes < DATA_OFFSET_BYTES + len_bytes {
                Stage::Extend
            } else {
                Stage::Secure
            };
            let header = Header {
                sequence: self.header.sequence + 1,
                size_bytes: len_bytes,
                ..self.header.clone()
            };
            let bytes = header
                .encode()
                .expect("the name of the base was short enough before");
            self.growth = Some(Growth { place, header, bytes });
        }
    }

    /// What the overlay's file has to do in `stage`.
    pub(super) fn growth_request(&mut self, stage: Stage) -> Request {
        let growth = self
            .growth
            .as_mut()
            .expect("a growth lasts as long as its flight");
        let mut request = Request {
            tag: 0,
            operation: Operation::Grow,
            offset_bytes: 0,
            len_bytes: DATA_OFFSET_BYTES + growth.header.size_bytes,
            durability: Durability::Durable,
            segments: Vec::new(),
        };
        if stage == Stage::Secure {
            // A header that reached the medium before the length would name more than the file has.
            request.operation = Operation::Flush;
            request.len_bytes = 0;
        }
        if stage == Stage::Describe {
            request.operation = Operation::Write;
            request.offset_bytes = growth.header.offset_bytes();
            request.len_bytes = growth.bytes.len() as u64;
            request.segments = vec![segments::own(&mut growth.bytes)];
        }
        request
    }

    /// Whether the growth is that of this flight.
    pub(super) fn growth_is_of(&self, place: usize) -> bool {
        self.growth.as_ref().is_some_and(|growth| growth.place == place)
    }

    /// Shows the new size. Nothing of the base comes to light: the header says how much of it there is to see.
    pub(super) fn adopt_growth(&mut self) {
        if let Some(growth) = &self.growth {
            self.header = growth.header.clone();
            self.contents.shape = self.header.shape();
        }
    }
}
