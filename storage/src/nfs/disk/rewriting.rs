//! What was acknowledged and may have been forgotten, being written again.

use std::sync::Arc;

use crate::reactor::Submit;
use crate::remote::retained::{Retained, Rewrite, split_zeros};
use crate::segments;

use super::super::command::{Action, Command, Ended, Outcome};
use super::super::v4::Stability;
use super::super::v4::status::{Verdict, verdict};
use super::{Disk, REWRITE, State};

/// Rewrites, some of which are under way. They do not overlap, so they need no order.
#[derive(Debug)]
pub(super) struct Rewriting {
    waiting: Vec<Rewrite>,
    /// Those under way, each in its place.
    under_way: Vec<Option<Rewrite>>,
    zeros: Arc<[u8]>,
    retries: u32,
}

/// Rewrites under way at a time.
const UNDER_WAY_MAX: usize = 16;
/// What is zeroed by one command, in bytes.
const ZEROS_BYTES: usize = 256 << 10;
/// How often a rewrite may be put off before the session begins anew.
const RETRIES_MAX: u32 = 1_000;

impl Rewriting {
    pub(super) fn new(retained: &Retained) -> Self {
        let mut waiting = retained.replay();
        split_zeros(&mut waiting, ZEROS_BYTES as u64);
        Self {
            waiting,
            under_way: (0..UNDER_WAY_MAX).map(|_| None).collect(),
            zeros: Arc::from(vec![0; ZEROS_BYTES]),
            retries: 0,
        }
    }

    fn is_over(&self) -> bool {
        self.waiting.is_empty() && self.under_way.iter().all(Option::is_none)
    }

    /// The next rewrite as a command, if there is one and there is room.
    fn next_command(&mut self) -> Option<Command> {
        let place = self.under_way.iter().position(Option::is_none)?;
        let rewrite = self.waiting.pop()?;
        let len = usize::try_from(rewrite.len_bytes).expect("a rewrite is short");
        let bytes = rewrite.bytes.as_ref().unwrap_or(&self.zeros);
        let memory = bytes.get(..len).expect("a rewrite is no longer than its bytes");
        let command = Command {
            action: Action::Write {
                offset_bytes: rewrite.offset_bytes,
                stability: Stability::Unstable,
            },
            // Kept until the command has ended.
            segments: vec![segments::only_sent(memory)],
            cookie: REWRITE | place as u64,
        };
        if let Some(slot) = self.under_way.get_mut(place) {
            *slot = Some(rewrite);
        }
        Some(command)
    }
}

impl Disk {
    /// Sends rewrites as long as there is room, and serves when all are done.
    pub(super) fn rewrite(&mut self, io: &mut dyn Submit) {
        let (State::Rewriting, Some(rewriting)) = (&self.state, &mut self.rewriting) else {
            return;
        };
        while let Some(command) = rewriting.next_command() {
            self.client.start(command, io.now());
        }
        if rewriting.is_over() {
            self.rewriting = None;
            self.serve(io);
        }
    }

    pub(super) fn rewritten(&mut self, ended: &Ended, io: &mut dyn Submit) {
        let (State::Rewriting, Some(rewriting)) = (&self.state, &mut self.rewriting) else {
            return;
        };
        let place = usize::try_from(ended.command.cookie & !REWRITE).expect("it is a place");
        let rewrite = rewriting.under_way.get_mut(place).and_then(Option::take);
        let is_done = match (&ended.outcome, &rewrite) {
            (Ok(Outcome::Written { bytes, verifier, .. }), Some(rewrite)) => {
                if !self.life.goes_on(*verifier) {
                    return self.doubt_life("the server has restarted again", io);
                }
                u64::from(*bytes) == rewrite.len_bytes
            }
            _ => false,
        };
        if !is_done {
            let may_wait = match &ended.outcome {
                Ok(_) => true,
                Err(status) => matches!(verdict(*status), Verdict::Later | Verdict::Grace),
            };
            rewriting.retries += 1;
            if !may_wait || rewriting.retries > RETRIES_MAX {
                // Whatever it is: nothing is served before all that was acknowledged is there.
                return self.doubt("what it had acknowledged cannot be written again", io);
            }
            rewriting.waiting.extend(rewrite);
        }
        self.rewrite(io);
    }
}
