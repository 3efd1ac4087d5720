//! A lane whose chunks are encrypted: in buffers, as guest memory stays what it is.

use coracle_storage::backend::Backend;

use super::lane::{Sums, masks};
use super::{Job, PIECE_CHUNKS, Summed, WriteError};
use crate::snapshot::memory::CHUNK_BYTES;
use crate::snapshot::memory::output::Output;
use crate::snapshot::memory::seal::Part;

/// Encrypts and writes until there is no piece left, and gives the image back, in which nothing is in flight.
pub(super) fn run(job: &Job<'_>, image: Box<dyn Backend>) -> Result<(Box<dyn Backend>, Summed), WriteError> {
    let mut output = Output::new(image)?;
    let mut summed = Summed::default();
    while let Some(piece) = job.take()? {
        let mut sums = Sums::default();
        let chunks = piece.bytes.as_chunks::<CHUNK_BYTES>().0;
        let chunks = (piece.number * PIECE_CHUNKS..).zip(chunks);
        let places = sums.masks.iter_mut().zip(&mut sums.sums);
        for ((place, sum), ((chunk, bytes), candidates)) in
            places.zip(chunks.zip(job.candidates_of(piece.number)))
        {
            let (mask, _) = masks(bytes, *candidates, job.kind);
            *place = mask;
            if mask == 0 {
                continue;
            }
            let mut buffer = output.buffer()?;
            buffer.copy_from_slice(bytes);
            *sum = job.seal.close(Part { chunk, mask }, buffer.as_mut_slice());
            // Zeros too: encrypted they are none.
            output.write(chunk, mask, buffer)?;
        }
        summed.0.push((piece.number, sums));
        job.progress.add(piece.bytes.len() as u64);
    }
    Ok((output.finish()?, summed))
}
