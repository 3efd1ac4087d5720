//! A PS/2 controller as plain data, and a fresh one made to go on from it.

use serde::{Deserialize, Serialize};

use super::{Expected, I8042, PENDING_BYTES_MAX};

/// The registers of the controller, and what its guest has not read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct I8042State {
    /// The control register.
    pub control: u8,
    /// The output port.
    pub output_port: u8,
    /// What the next byte at the data port is.
    pub expected: ExpectedState,
    /// Bytes for the guest to read, oldest first.
    pub pending: Vec<u8>,
}

/// What the next byte at the data port is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExpectedState {
    /// A command for the keyboard.
    KeyboardCommand,
    /// The control register.
    Control,
    /// The output port.
    OutputPort,
}

/// No controller can be in such a state; this one is as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "no keyboard controller can be in the saved state: {0} bytes wait in it, and there is room for {PENDING_BYTES_MAX}"
)]
pub struct I8042StateError(usize);

impl I8042 {
    /// Everything that it takes to go on elsewhere. The guest does not run meanwhile.
    pub fn save(&self) -> I8042State {
        I8042State {
            control: self.control,
            output_port: self.output_port,
            expected: match self.expected {
                Expected::KeyboardCommand => ExpectedState::KeyboardCommand,
                Expected::Control => ExpectedState::Control,
                Expected::OutputPort => ExpectedState::OutputPort,
            },
            pending: self.pending.iter().copied().collect(),
        }
    }

    /// Takes up what was saved elsewhere. If there is something to read the line rises again: call it when the interrupt
    /// controllers have their state.
    ///
    /// # Errors
    ///
    /// When no controller can be in such a state.
    pub fn restore(&mut self, state: &I8042State) -> Result<(), I8042StateError> {
        if state.pending.len() > PENDING_BYTES_MAX {
            return Err(I8042StateError(state.pending.len()));
        }
        self.control = state.control;
        self.output_port = state.output_port;
        self.expected = match state.expected {
            ExpectedState::KeyboardCommand => Expected::KeyboardCommand,
            ExpectedState::Control => Expected::Control,
            ExpectedState::OutputPort => Expected::OutputPort,
        };
        self.pending.clear();
        self.pending.extend(&state.pending);
        if !self.pending.is_empty() {
            self.raise();
        }
        Ok(())
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use super::super::tests::{controller, read};
    use super::super::{COMMAND, CTRL_ALT_DEL, DATA};
    use super::*;
    use crate::bus::BusDevice;

    #[test]
    fn keys_that_were_pressed_arrive_elsewhere() {
        let (mut before, _) = controller();
        before.press_ctrl_alt_del().unwrap();
        let text = serde_json::to_vec(&before.save()).unwrap();
        let (mut after, _) = controller();
        after.restore(&serde_json::from_slice(&text).unwrap()).unwrap();
        for key in CTRL_ALT_DEL {
            after.line().read().unwrap();
            assert_eq!(read(&mut after, DATA), key);
        }
    }

    #[test]
    fn a_command_that_waits_for_its_parameter_gets_it_elsewhere() {
        for (write, ask) in [(0x60, 0x20), (0xd1, 0xd0)] {
            let (mut before, _) = controller();
            before.write(COMMAND, &[write]);
            let (mut after, _) = controller();
            after.restore(&before.save()).unwrap();
            assert!(after.line().read().is_err());
            after.write(DATA, &[0x5a]);
            let (mut last, _) = controller();
            last.restore(&after.save()).unwrap();
            last.write(COMMAND, &[ask]);
            assert_eq!(read(&mut last, DATA), 0x5a);
        }
    }

    #[test]
    fn more_than_there_is_room_for_is_refused() {
        let (mut after, _) = controller();
        let mut state = after.save();
        state.pending = vec![0; 17];
        assert_eq!(after.restore(&state), Err(I8042StateError(17)));
        assert_eq!(read(&mut after, COMMAND), 0x10);
    }
}
