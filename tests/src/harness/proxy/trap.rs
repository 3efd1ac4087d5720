//! A fault that waits for a message of its kind.

use super::protocol::{Damage, Protocol, Step};
use super::{Direction, Fault};

/// What happens, once, when a client and its server come to a step. It needs a proxy that knows their protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trap {
    /// Which of the two sends the message.
    pub direction: Direction,
    /// What the message is about.
    pub step: Step,
    /// What happens to it.
    pub then: Then,
}

/// What happens to the message that a trap waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// The fault of its direction begins with it.
    Fault(Fault),
    /// Every connection is reset, and it is lost.
    Cut,
    /// Its connection is closed when half of it has passed.
    CloseInside,
    /// It passes with a damage; one that has no place for it passes, and the trap waits on.
    Damage(Damage),
    /// It passes twice.
    Twice,
    /// It passes after the next one of its direction.
    Swap,
}

/// What is to be done with a message.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Passage {
    /// Nothing happened: it passes.
    Free(Vec<u8>),
    /// The trap is sprung, and this passes in its place.
    Sprung(Then, Vec<u8>),
}

impl Trap {
    /// Shows the trap a message that was not noted yet.
    pub(super) fn meet(
        self,
        direction: Direction,
        message: Vec<u8>,
        step: Option<Step>,
        protocol: &dyn Protocol,
    ) -> Passage {
        if direction != self.direction || step != Some(self.step) {
            return Passage::Free(message);
        }
        match self.then {
            Then::Damage(damage) => match protocol.damaged(direction, &message, damage) {
                Some(damaged) => Passage::Sprung(self.then, damaged),
                None => Passage::Free(message),
            },
            Then::Twice => Passage::Sprung(self.then, [message.clone(), message].concat()),
            Then::Cut => Passage::Sprung(self.then, vec![]),
            Then::Fault(_) | Then::CloseInside | Then::Swap => Passage::Sprung(self.then, message),
        }
    }
}
