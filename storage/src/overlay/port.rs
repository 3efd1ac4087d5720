//! The reactor as one of the two images under an overlay sees it.

use std::time::Instant;

use crate::reactor::{FileSlot, Full, KernelOp, SocketOp, Submit, Token};

/// One of the two images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// The shared image, which is only read.
    Base,
    /// The overlay's own file.
    Store,
}

/// Tokens of an image under an overlay: one bit of the 63 that an overlay has tells the sides apart.
const TOKEN_BITS: u32 = 62;

impl Side {
    fn token(self, token: Token) -> Token {
        assert!(
            token.0 >> TOKEN_BITS == 0,
            "a token of an image under an overlay has {TOKEN_BITS} bits"
        );
        Token(token.0 << 1 | u64::from(self == Self::Store))
    }

    /// Whose operation `token` names, and by which token that side knows it.
    pub(super) fn of(token: Token) -> (Self, Token) {
        let side = if token.0 & 1 == 1 { Self::Store } else { Self::Base };
        (side, Token(token.0 >> 1))
    }
}

/// The reactor, while one call of the overlay's owner lasts: it counts what is submitted.
pub(super) struct Turn<'io> {
    io: &'io mut dyn Submit,
    submitted: u32,
    submitted_max: u32,
}

/// What [`crate::backend::Backend::start`] may put in flight by itself: pieces of one read.
const PIECES_MAX: u32 = 16;

impl<'io> Turn<'io> {
    /// A turn in which the owner starts a request.
    pub(super) fn of_start(io: &'io mut dyn Submit) -> Self {
        Self {
            io,
            submitted: 0,
            submitted_max: PIECES_MAX,
        }
    }

    /// A turn that answers an event, whose room is free: one operation, so that the room of the other
    /// events of its batch stays for their own successors (see [`crate::reactor::Reactor`]).
    pub(super) fn of_event(io: &'io mut dyn Submit) -> Self {
        Self {
            io,
            submitted: 0,
            submitted_max: 1,
        }
    }

    /// Whether the turn may go on to submit.
    pub(super) fn has_room(&self) -> bool {
        self.submitted < self.submitted_max
    }

    /// Lets the turn submit as much as it might at its beginning.
    pub(super) fn renew(&mut self) {
        self.submitted = 0;
    }

    /// The reactor for `side`, whose files come after `files_before` others.
    pub(super) fn port(&mut self, side: Side, files_before: u32) -> Port<'_, 'io> {
        Port {
            turn: self,
            side,
            files_before,
        }
    }
}

/// Moves the slots and tags the tokens of one side.
pub(super) struct Port<'turn, 'io> {
    turn: &'turn mut Turn<'io>,
    side: Side,
    files_before: u32,
}

impl Submit for Port<'_, '_> {
    fn submit(&mut self, op: KernelOp, token: Token) -> Result<(), Full> {
        let op = moved(op, self.side, self.files_before);
        self.turn.io.submit(op, self.side.token(token))?;
        self.turn.submitted += 1;
        Ok(())
    }

    fn now(&self) -> Instant {
        self.turn.io.now()
    }
}

/// The operation of one side as the reactor knows it: its file, and the other operation that it names.
fn moved(mut op: KernelOp, side: Side, files_before: u32) -> KernelOp {
    if let KernelOp::Socket {
        operation: SocketOp::Cancel { target },
        ..
    } = &mut op
    {
        *target = side.token(*target);
    }
    let (KernelOp::Read { file, .. }
    | KernelOp::Write { file, .. }
    | KernelOp::SyncData { file }
    | KernelOp::Allocate { file, .. }
    | KernelOp::Socket { file, .. }) = &mut op;
    *file = FileSlot(file.0 + files_before);
    op
}
