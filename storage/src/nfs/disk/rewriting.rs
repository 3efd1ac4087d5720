//! What was acknowledged and may have been forgotten, being written again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::reactor::Submit;
use crate::remote::retained::{Retained, Rewrite};
use crate::request::{Failure, Space};
use crate::segments;

use super::super::bringup::File;
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
    /// The server was too busy, and is asked again then.
    rests_until: Option<Instant>,
}

/// Rewrites under way at a time.
const UNDER_WAY_MAX: usize = 16;
/// What is zeroed by one command, in bytes.
const ZEROS_BYTES: usize = 256 << 10;
/// How often a rewrite may be put off before the session begins anew.
const RETRIES_MAX: u32 = 1_000;
/// How long a server that is too busy for one is left alone.
const RETRY_AFTER: Duration = Duration::from_millis(50);

impl Rewriting {
    /// Writes again all that is retained, so much of it at a time.
    pub(super) fn new(retained: &Retained) -> Self {
        let waiting = retained.replay();
        Self {
            waiting,
            under_way: (0..UNDER_WAY_MAX).map(|_| None).collect(),
            zeros: Arc::from(vec![0; ZEROS_BYTES]),
            retries: 0,
            rests_until: None,
        }
    }

    fn is_over(&self) -> bool {
        self.waiting.is_empty() && self.under_way.iter().all(Option::is_none)
    }

    /// When it goes on, if it waits for a time.
    pub(super) fn alarm(&self) -> Option<Instant> {
        self.rests_until
    }

    /// The next rewrite as a command, if there is one and there is room.
    fn next_command(&mut self, file: &File) -> Option<Command> {
        let place = self.under_way.iter().position(Option::is_none)?;
        let mut rewrite = self.waiting.pop()?;
        let cookie = REWRITE | place as u64;
        let is_freed = rewrite.bytes.is_none() && rewrite.space == Space::MayBeFreed;
        let command = if is_freed && file.can_deallocate {
            // Zeros that nobody has to send, and that need no room there.
            Command {
                action: Action::Deallocate {
                    offset_bytes: rewrite.offset_bytes,
                    len_bytes: rewrite.len_bytes,
                },
                segments: Vec::new(),
                cookie,
            }
        } else {
            let most = (ZEROS_BYTES as u64).min(file.write_bytes_max.into());
            self.waiting.extend(rewrite.split_off(most));
            let len = usize::try_from(rewrite.len_bytes).expect("a rewrite is short");
            let bytes = rewrite.bytes.as_ref().unwrap_or(&self.zeros);
            let memory = bytes.get(..len).expect("a rewrite is no longer than its bytes");
            Command {
                action: Action::Write {
                    offset_bytes: rewrite.offset_bytes,
                    stability: Stability::Unstable,
                },
                // Kept until the command has ended.
                segments: vec![segments::only_sent(memory)],
                cookie,
            }
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
        if rewriting.rests_until.is_some_and(|until| until > io.now()) {
            return;
        }
        rewriting.rests_until = None;
        while let Some(command) = rewriting.next_command(&self.file) {
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
        let Some(mut rewrite) = rewrite else { return };
        match ended.outcome {
            Ok(Outcome::Written { verifier, .. }) if !self.life.goes_on(verifier) => {
                return self.doubt_life("the server has restarted again", io);
            }
            Ok(Outcome::Written { bytes, .. }) if bytes > 0 => {
                rewriting.waiting.extend(rewrite.split_off(bytes.into()));
                return self.rewrite(io);
            }
            Ok(Outcome::Done) => return self.rewrite(io),
            Err(status)
                if verdict(status) == Verdict::Failed(Failure::Unsupported)
                    && ended.command.segments.is_empty() =>
            {
                // It was a DEALLOCATE, and not the first, perhaps.
                self.file.can_deallocate = false;
                rewriting.waiting.push(rewrite);
                return self.rewrite(io);
            }
            Err(status) if !matches!(verdict(status), Verdict::Later | Verdict::Grace) => {
                // Whatever it is: nothing is served before all that was acknowledged is there.
                return self.doubt("what it had acknowledged cannot be written again", io);
            }
            _ => {}
        }
        rewriting.waiting.push(rewrite);
        rewriting.retries += 1;
        if rewriting.retries > RETRIES_MAX {
            return self.doubt("it takes too long until it has what it had acknowledged", io);
        }
        rewriting.rests_until = Some(io.now() + RETRY_AFTER);
    }
}
