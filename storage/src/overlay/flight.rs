//! One request on its way through an overlay: which part of it goes to which image, in which order.

mod plan;

use std::ops::Range;

pub(super) use self::plan::Contents;
use super::format::{DATA_OFFSET_BYTES, Shape};
use super::port::Side;
use crate::request::{Durability, Failure, Operation, Request, Segment};
use crate::segments;

/// What the owner asked, without the segments.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked {
    pub(super) tag: u64,
    pub(super) operation: Operation,
    pub(super) offset_bytes: u64,
    pub(super) len_bytes: u64,
    pub(super) durability: Durability,
}

/// A request in flight.
#[derive(Debug)]
pub(super) struct Flight {
    pub(super) asked: Asked,
    /// The owner's memory; with the image below while the request is passed on whole.
    pub(super) segments: Vec<Segment>,
    pub(super) stage: Stage,
    /// What is really done: a discard is a smaller WRITE ZEROES.
    operation: Operation,
    bytes: Range<u64>,
    /// The clusters that are present once the change is through, and which nobody else fills meanwhile.
    pub(super) claim: Option<Range<u64>>,
    edges: [Option<Edge>; 2],
    pub(super) outcome: Result<(), Failure>,
}

/// Where a request is.
///
/// ```text
///   Unplanned ──all of it lies in one image──► Pass ──────────────────────────────────────► Settle
///       │  ▲   ──a read over both────────────► Gather ────────────────────────────────────► End
///       │  │   ──a change of part of a cluster that is not present──► Fill, Fill ► Apply ─► Settle
///       └──┘ another change fills one of its clusters                 (zeros) ► Patch, Patch ──┘
///                    Settle: the bits are set, the claim is given back ──► End, or Persist ──► End
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Has not found its way yet.
    Unplanned,
    /// One of the images has the whole request, with the owner's segments.
    Pass(Side),
    /// Pieces of a read are with both images; `at_bytes` is where the next one starts.
    Gather { at_bytes: u64, outstanding: u32 },
    /// Reads an edge from the base.
    Fill(usize),
    /// Writes the range, and around it what was read of the edges; zeros only what lies between the edges.
    Apply,
    /// Writes an edge that is zeroed in part.
    Patch(usize),
    /// The data is written.
    Settle,
    /// Waits for its bits, or for a sync.
    Persist,
    /// Makes the file longer.
    Extend,
    /// Syncs the length of the file.
    Secure,
    /// Writes the header of a longer image.
    Describe,
    /// Is over.
    End,
}

/// A cluster that is not present and that a change covers in part.
#[derive(Debug)]
struct Edge {
    /// Its bytes in the image.
    bytes: Range<u64>,
    /// What they will be.
    buffer: Box<[u8]>,
}

/// What a flight needs next.
pub(super) enum Next {
    /// An image has to carry this out.
    Start(Side, Request),
    /// Something in flight, or somebody else's claim.
    Wait,
    /// Its owner has to go on.
    Stage(Stage),
}

impl Flight {
    pub(super) fn new(request: Request) -> Self {
        let asked = Asked {
            tag: request.tag,
            operation: request.operation,
            offset_bytes: request.offset_bytes,
            len_bytes: request.len_bytes,
            durability: request.durability,
        };
        Self {
            asked,
            segments: request.segments,
            stage: Stage::Unplanned,
            operation: asked.operation,
            bytes: asked.offset_bytes..asked.offset_bytes + asked.len_bytes,
            claim: None,
            edges: [None, None],
            outcome: Ok(()),
        }
    }

    /// The request as it came.
    pub(super) fn into_request(self) -> Request {
        Request {
            tag: self.asked.tag,
            operation: self.asked.operation,
            offset_bytes: self.asked.offset_bytes,
            len_bytes: self.asked.len_bytes,
            durability: self.asked.durability,
            segments: self.segments,
        }
    }

    /// Whether the image is another one afterwards.
    pub(super) fn is_change(&self) -> bool {
        matches!(self.operation, Operation::Write | Operation::WriteZeroes { .. })
    }

    /// Whether pieces of it are in flight.
    pub(super) fn is_in_flight(&self) -> bool {
        matches!(self.stage, Stage::Gather { outstanding: 1.., .. })
    }

    /// The clusters of the request, which has a range that is not empty.
    pub(super) fn touched(&self, shape: &Shape) -> Range<u64> {
        shape.touched(&self.bytes)
    }

    /// What to do now, by the name of `place`. Passes over stages that have nothing to do.
    pub(super) fn next(&mut self, place: usize, contents: &Contents, spare: &mut Vec<Vec<Segment>>) -> Next {
        loop {
            let child = match self.stage {
                Stage::Unplanned | Stage::Persist => return Next::Wait,
                Stage::Settle | Stage::Extend | Stage::Secure | Stage::Describe | Stage::End => {
                    return Next::Stage(self.stage);
                }
                Stage::Pass(side) => {
                    let segments = std::mem::take(&mut self.segments);
                    Some(self.child(side, self.operation, self.bytes.clone(), segments))
                }
                Stage::Gather { .. } => match self.next_piece(contents, spare) {
                    Piece::Read(side, request) => Some((side, request)),
                    Piece::Zeroed => continue,
                    Piece::Wait => return Next::Wait,
                    Piece::End => {
                        self.stage = Stage::End;
                        continue;
                    }
                },
                Stage::Fill(edge) => self.fill(edge, contents, spare),
                Stage::Apply => self.apply(spare),
                Stage::Patch(edge) => self.patch(edge, spare),
            };
            match child {
                Some((side, request)) => {
                    let tag = place as u64;
                    return Next::Start(side, Request { tag, ..request });
                }
                None => self.stage = self.following(),
            }
        }
    }

    /// Takes the end of what [`Self::next`] started.
    pub(super) fn absorb(
        &mut self,
        mut request: Request,
        outcome: Result<(), Failure>,
        spare: &mut Vec<Vec<Segment>>,
    ) {
        if matches!(self.stage, Stage::Pass(_)) {
            self.segments = request.segments;
        } else {
            request.segments.clear();
            spare.push(request.segments);
        }
        if outcome.is_err() {
            self.outcome = outcome;
        }
        if let Stage::Gather { outstanding, .. } = &mut self.stage {
            *outstanding -= 1;
        } else if outcome.is_err() {
            self.stage = Stage::End;
        } else {
            self.stage = self.following();
        }
    }

    /// Takes back what [`Self::next`] wanted to start, for another time.
    pub(super) fn take_back(&mut self, request: Request, spare: &mut Vec<Vec<Segment>>) {
        match &mut self.stage {
            Stage::Pass(_) => {
                self.segments = request.segments;
                return;
            }
            Stage::Gather {
                at_bytes,
                outstanding,
            } => {
                *outstanding -= 1;
                // Pieces start in order, so this is the last.
                *at_bytes -= request.len_bytes;
            }
            _ => {}
        }
        let mut segments = request.segments;
        segments.clear();
        spare.push(segments);
    }

    fn following(&self) -> Stage {
        match self.stage {
            Stage::Pass(_) if self.is_change() => Stage::Settle,
            Stage::Fill(0) => Stage::Fill(1),
            Stage::Fill(_) => Stage::Apply,
            Stage::Apply if self.operation != Operation::Write => Stage::Patch(0),
            Stage::Patch(0) => Stage::Patch(1),
            Stage::Apply | Stage::Patch(_) | Stage::Describe => Stage::Settle,
            Stage::Extend => Stage::Secure,
            Stage::Secure => Stage::Describe,
            stage => {
                debug_assert!(matches!(stage, Stage::Pass(_)), "{stage:?} is not followed");
                Stage::End
            }
        }
    }

    fn next_piece(&mut self, contents: &Contents, spare: &mut Vec<Vec<Segment>>) -> Piece {
        let Stage::Gather {
            at_bytes,
            outstanding,
        } = &mut self.stage
        else {
            unreachable!("only a gathered read has pieces");
        };
        let (shape, at) = (&contents.shape, *at_bytes);
        if at == self.bytes.end || self.outcome.is_err() {
            return if *outstanding == 0 {
                Piece::End
            } else {
                Piece::Wait
            };
        }
        let (present, run_end) = contents.bitmap.run(&shape.touched(&(at..self.bytes.end)));
        let mut end = self.bytes.end.min(shape.start_of(run_end));
        let in_base = !present && at < shape.shown_bytes;
        if in_base {
            end = end.min(shape.shown_bytes);
        }
        *at_bytes = end;
        let mut memory = spare.pop().unwrap_or_default();
        let start = self.bytes.start;
        segments::slice(&self.segments, at - start..end - start, &mut memory);
        if !present && !in_base {
            segments::zero(&memory);
            memory.clear();
            spare.push(memory);
            return Piece::Zeroed;
        }
        *outstanding += 1;
        let side = if present { Side::Store } else { Side::Base };
        let (side, request) = self.child(side, Operation::Read, at..end, memory);
        Piece::Read(side, request)
    }

    fn fill(
        &mut self,
        edge: usize,
        contents: &Contents,
        spare: &mut Vec<Vec<Segment>>,
    ) -> Option<(Side, Request)> {
        let edge = self.edges.get_mut(edge)?.as_mut()?;
        // What the base does not have stays zero.
        let end = edge.bytes.end.min(contents.shape.shown_bytes);
        let bytes = edge.bytes.start..end;
        if bytes.is_empty() {
            return None;
        }
        let mut memory = spare.pop().unwrap_or_default();
        memory.push(segments::own(edge.buffer.get_mut(..index(end - bytes.start))?));
        Some(self.child(Side::Base, Operation::Read, bytes, memory))
    }

    fn apply(&mut self, spare: &mut Vec<Vec<Segment>>) -> Option<(Side, Request)> {
        let [first, last] = &mut self.edges;
        if self.operation != Operation::Write {
            // The edges are patched instead.
            let start = first.as_ref().map_or(self.bytes.start, |edge| edge.bytes.end);
            let end = last.as_ref().map_or(self.bytes.end, |edge| edge.bytes.start);
            return (start < end).then(|| self.child(Side::Store, self.operation, start..end, Vec::new()));
        }
        let mut memory = spare.pop().unwrap_or_default();
        let mut bytes = self.bytes.clone();
        // Of the last edge nothing lies before the range, and of the first one nothing behind it unless it
        // is the only cluster.
        if let Some(edge) = first
            && edge.bytes.start < bytes.start
        {
            let before = index(bytes.start - edge.bytes.start);
            memory.push(segments::own(edge.buffer.get_mut(..before)?));
            bytes.start = edge.bytes.start;
        }
        memory.extend_from_slice(&self.segments);
        for edge in [first, last].into_iter().flatten() {
            if self.bytes.end < edge.bytes.end {
                let behind = index(self.bytes.end - edge.bytes.start);
                memory.push(segments::own(edge.buffer.get_mut(behind..)?));
                bytes.end = edge.bytes.end;
            }
        }
        Some(self.child(Side::Store, Operation::Write, bytes, memory))
    }

    fn patch(&mut self, edge: usize, spare: &mut Vec<Vec<Segment>>) -> Option<(Side, Request)> {
        let edge = self.edges.get_mut(edge)?.as_mut()?;
        let zeroed = self.bytes.start.max(edge.bytes.start)..self.bytes.end.min(edge.bytes.end);
        let in_buffer = index(zeroed.start - edge.bytes.start)..index(zeroed.end - edge.bytes.start);
        edge.buffer.get_mut(in_buffer)?.fill(0);
        let mut memory = spare.pop().unwrap_or_default();
        memory.push(segments::own(&mut edge.buffer));
        let bytes = edge.bytes.clone();
        Some(self.child(Side::Store, Operation::Write, bytes, memory))
    }

    fn child(
        &self,
        side: Side,
        operation: Operation,
        bytes: Range<u64>,
        segments: Vec<Segment>,
    ) -> (Side, Request) {
        let offset_bytes = match side {
            Side::Base => bytes.start,
            Side::Store => DATA_OFFSET_BYTES + bytes.start,
        };
        let request = Request {
            tag: 0,
            operation,
            offset_bytes,
            len_bytes: bytes.end - bytes.start,
            durability: self.asked.durability,
            segments,
        };
        (side, request)
    }
}

enum Piece {
    Read(Side, Request),
    /// Nobody has it: it was zeroed here.
    Zeroed,
    Wait,
    End,
}

fn index(bytes: u64) -> usize {
    usize::try_from(bytes).expect("this is a 64-bit monitor")
}
