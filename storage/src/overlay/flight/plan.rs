//! How a request finds its way: by what the overlay has, and by what others fill just now.

use super::{Edge, Flight, Stage, index};
use crate::overlay::bitmap::Bitmap;
use crate::overlay::claims::Claims;
use crate::overlay::format::Shape;
use crate::overlay::port::Side;
use crate::request::{Operation, Space};

/// What a request finds: the clusters, and who fills them.
pub(in crate::overlay) struct Contents {
    pub(in crate::overlay) shape: Shape,
    pub(in crate::overlay) bitmap: Bitmap,
    pub(in crate::overlay) claims: Claims,
}

impl Flight {
    /// Finds the first stage of a request that has a range. It stays [`Stage::Unplanned`] if another
    /// change fills one of its clusters just now.
    pub(in crate::overlay) fn plan(&mut self, contents: &mut Contents) {
        match self.operation {
            Operation::Read => self.stage = self.plan_read(contents),
            Operation::Write | Operation::WriteZeroes { .. } => self.plan_change(contents),
            Operation::Discard => {
                // Whole clusters only, which then read as zeros: the rest has nothing to give back.
                let shape = &contents.shape;
                let first = shape.cluster_of(self.bytes.start + shape.cluster_bytes - 1);
                let end = match self.bytes.end {
                    end if end == shape.size_bytes => shape.cluster_count(),
                    end => shape.cluster_of(end),
                };
                if first >= end {
                    self.stage = Stage::End;
                    return;
                }
                self.bytes = shape.start_of(first)..shape.bytes_of(end - 1).end;
                self.operation = Operation::WriteZeroes {
                    space: Space::MayBeFreed,
                };
                self.plan_change(contents);
            }
            Operation::Flush
            | Operation::Raise
            | Operation::Yield
            | Operation::TakeBack
            | Operation::Grow
            | Operation::FindData => {
                unreachable!("they do not ask for what is in a range")
            }
        }
    }

    fn plan_read(&self, contents: &Contents) -> Stage {
        let clusters = self.touched(&contents.shape);
        let is_whole = |end| end == clusters.end;
        match contents.bitmap.run(&clusters) {
            (true, end) if is_whole(end) => Stage::Pass(Side::Store),
            (false, end) if is_whole(end) && self.bytes.end <= contents.shape.shown_bytes => {
                Stage::Pass(Side::Base)
            }
            _ => Stage::Gather {
                at_bytes: self.bytes.start,
                outstanding: 0,
            },
        }
    }

    fn plan_change(&mut self, contents: &mut Contents) {
        let touched = self.touched(&contents.shape);
        if contents.bitmap.has_all(&touched) {
            self.stage = Stage::Pass(Side::Store);
            return;
        }
        if !contents.claims.are_free(&touched) {
            return;
        }
        contents.claims.take(touched.clone());
        let last = touched.end - 1;
        self.edges = [
            self.edge(touched.start, contents),
            (last != touched.start)
                .then(|| self.edge(last, contents))
                .flatten(),
        ];
        self.claim = Some(touched);
        self.stage = if self.edges.iter().any(Option::is_some) {
            Stage::Fill(0)
        } else {
            Stage::Pass(Side::Store)
        };
    }

    fn edge(&self, cluster: u64, contents: &Contents) -> Option<Edge> {
        let bytes = contents.shape.bytes_of(cluster);
        let is_whole = self.bytes.start <= bytes.start && bytes.end <= self.bytes.end;
        (!is_whole && !contents.bitmap.has(cluster)).then(|| Edge {
            buffer: vec![0; index(bytes.end - bytes.start)].into_boxed_slice(),
            bytes,
        })
    }
}
