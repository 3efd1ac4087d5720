//! As much of a PS/2 controller as it takes to reset the machine and to press Ctrl-Alt-Del.

mod state;

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::bus::BusDevice;
use crate::power::{EndSignal, GuestEnd};

pub use state::{ExpectedState, I8042State, I8042StateError};

/// The first of [`I8042_PORTS`] I/O ports.
pub const I8042_PORT: u16 = 0x60;
/// How many ports the controller has; only the first and the last are used.
pub const I8042_PORTS: u16 = 5;
/// The ISA interrupt of the keyboard.
pub const I8042_IRQ: u32 = 1;

const DATA: u64 = 0;
const COMMAND: u64 = 4;

const COMMAND_READ_CONTROL: u8 = 0x20;
const COMMAND_WRITE_CONTROL: u8 = 0x60;
const COMMAND_READ_OUTPUT_PORT: u8 = 0xd0;
const COMMAND_WRITE_OUTPUT_PORT: u8 = 0xd1;
const COMMAND_PULSE_RESET: u8 = 0xfe;

const STATUS_OUTPUT_FULL: u8 = 1 << 0;
const STATUS_PARAMETER_EXPECTED: u8 = 1 << 3;
const STATUS_UNLOCKED: u8 = 1 << 4;

const CONTROL_KEYBOARD_INTERRUPT: u8 = 1 << 0;
const CONTROL_SELF_TEST_PASSED: u8 = 1 << 2;

const KEYBOARD_ACK: u8 = 0xfa;
/// Scan code set 2: left Ctrl, left Alt, Delete (an extended key).
const CTRL_ALT_DEL: [u8; 4] = [0x14, 0x11, 0xe0, 0x71];
/// Bytes that wait for the guest to read them.
const PENDING_BYTES_MAX: usize = 16;

/// The keys could not be pressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyboardError {
    /// The guest has not read the keys that were pressed before.
    #[error("the guest does not read its keyboard: {0} bytes wait already")]
    Full(usize),
}

/// What the next byte at the data port is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expected {
    KeyboardCommand,
    Control,
    OutputPort,
}

/// What the controller has done since it was made; read by the metrics.
#[derive(Debug, Default)]
pub struct I8042Counts {
    /// Bytes read from a port that has some to give.
    pub reads: AtomicU64,
    /// Bytes written to a port that takes some.
    pub writes: AtomicU64,
    /// Reads of another port or width, or of a data port that is empty.
    pub missed_reads: AtomicU64,
    /// Writes to another port or of another width.
    pub missed_writes: AtomicU64,
    /// Resets of the machine.
    pub resets: AtomicU64,
}

/// The controller at [`I8042_PORT`].
#[derive(Debug)]
pub struct I8042 {
    end: Arc<EndSignal>,
    line: Arc<EventFd>,
    control: u8,
    output_port: u8,
    expected: Expected,
    pending: VecDeque<u8>,
    counts: Arc<I8042Counts>,
}

impl I8042 {
    /// A controller that tells `end` of a reset.
    ///
    /// # Errors
    ///
    /// When the eventfd of its interrupt cannot be made.
    pub fn new(end: Arc<EndSignal>) -> io::Result<Self> {
        Ok(Self {
            end,
            line: Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?),
            control: CONTROL_SELF_TEST_PASSED | CONTROL_KEYBOARD_INTERRUPT,
            output_port: 0,
            expected: Expected::KeyboardCommand,
            pending: VecDeque::with_capacity(PENDING_BYTES_MAX),
            counts: Arc::default(),
        })
    }

    /// The eventfd that raises [`I8042_IRQ`].
    pub fn line(&self) -> &Arc<EventFd> {
        &self.line
    }

    /// What it has done so far.
    pub fn counts(&self) -> &Arc<I8042Counts> {
        &self.counts
    }

    /// Presses Ctrl, Alt and Delete; what the guest makes of it is its own affair.
    ///
    /// # Errors
    ///
    /// When the guest leaves earlier keys unread.
    pub fn press_ctrl_alt_del(&mut self) -> Result<(), KeyboardError> {
        if self.pending.len() + CTRL_ALT_DEL.len() > PENDING_BYTES_MAX {
            return Err(KeyboardError::Full(self.pending.len()));
        }
        self.pending.extend(CTRL_ALT_DEL);
        self.raise();
        Ok(())
    }

    fn raise(&self) {
        if self.control & CONTROL_KEYBOARD_INTERRUPT != 0 {
            // Refused only by a full counter, and then the line is up.
            let _ = self.line.write(1);
        }
    }

    fn status(&self) -> u8 {
        let full = if self.pending.is_empty() {
            0
        } else {
            STATUS_OUTPUT_FULL
        };
        let parameter = match self.expected {
            Expected::KeyboardCommand => 0,
            Expected::Control | Expected::OutputPort => STATUS_PARAMETER_EXPECTED,
        };
        STATUS_UNLOCKED | full | parameter
    }

    /// Takes the byte that waits longest; the next one raises the line again.
    fn next_byte(&mut self) -> Option<u8> {
        let byte = self.pending.pop_front();
        if !self.pending.is_empty() {
            self.raise();
        }
        byte
    }

    /// The controller answers a command: what waited before is gone.
    fn answer(&mut self, byte: u8) {
        self.pending.clear();
        self.pending.push_back(byte);
    }

    fn command(&mut self, command: u8) {
        match command {
            COMMAND_PULSE_RESET => {
                count(&self.counts.resets);
                self.end.signal(GuestEnd::Reset);
            }
            COMMAND_READ_CONTROL => self.answer(self.control),
            COMMAND_READ_OUTPUT_PORT => self.answer(self.output_port),
            COMMAND_WRITE_CONTROL => {
                self.pending.clear();
                self.expected = Expected::Control;
            }
            COMMAND_WRITE_OUTPUT_PORT => self.expected = Expected::OutputPort,
            _ => {}
        }
    }

    fn data(&mut self, value: u8) {
        match std::mem::replace(&mut self.expected, Expected::KeyboardCommand) {
            Expected::Control => self.control = value,
            Expected::OutputPort => self.output_port = value,
            Expected::KeyboardCommand => {
                // A keyboard without lights or rates agrees to everything.
                self.answer(KEYBOARD_ACK);
                self.raise();
            }
        }
    }
}

/// The ports are a byte wide; wider accesses read as zero and change nothing.
impl BusDevice for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let answer = match (offset, data.len()) {
            (COMMAND, 1) => Some(self.status()),
            (DATA, 1) => self.next_byte(),
            _ => None,
        };
        match (answer, data) {
            (Some(answer), [byte]) => {
                *byte = answer;
                count(&self.counts.reads);
            }
            _ => count(&self.counts.missed_reads),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (COMMAND, [command]) => self.command(*command),
            (DATA, [value]) => self.data(*value),
            _ => return count(&self.counts.missed_writes),
        }
        count(&self.counts.writes);
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use super::*;

    pub(super) fn controller() -> (I8042, Arc<EndSignal>) {
        let end = EndSignal::new().unwrap();
        (I8042::new(Arc::clone(&end)).unwrap(), end)
    }

    pub(super) fn read(controller: &mut I8042, offset: u64) -> u8 {
        let mut data = [0xee];
        controller.read(offset, &mut data);
        let [byte] = data;
        byte
    }

    #[test]
    fn the_pulse_command_resets_the_machine() {
        let (mut controller, end) = controller();
        controller.write(COMMAND, &[0xfe, 0]);
        controller.write(DATA, &[0xfe]);
        assert_eq!(end.end(), None);
        controller.write(COMMAND, &[0xfe]);
        assert_eq!(end.end(), Some(GuestEnd::Reset));
    }

    #[test]
    fn ctrl_alt_del_arrives_key_by_key_each_with_an_interrupt() {
        let (mut controller, _) = controller();
        controller.press_ctrl_alt_del().unwrap();
        for key in CTRL_ALT_DEL {
            controller.line().read().unwrap();
            assert_eq!(read(&mut controller, COMMAND), 0x11);
            assert_eq!(read(&mut controller, DATA), key);
        }
        assert!(controller.line().read().is_err());
        assert_eq!(read(&mut controller, COMMAND), 0x10);
        assert_eq!(read(&mut controller, DATA), 0);
    }

    #[test]
    fn keys_that_nobody_reads_do_not_pile_up() {
        let (mut controller, _) = controller();
        for _ in 0..4 {
            controller.press_ctrl_alt_del().unwrap();
        }
        assert_eq!(controller.press_ctrl_alt_del(), Err(KeyboardError::Full(16)));
    }

    #[test]
    fn the_control_register_is_written_and_read_back_and_masks_the_interrupt() {
        let (mut controller, _) = controller();
        controller.write(COMMAND, &[0x60]);
        assert_eq!(read(&mut controller, COMMAND), 0x18, "a parameter is expected");
        controller.write(DATA, &[0x04]);
        controller.write(COMMAND, &[0x20]);
        assert_eq!(read(&mut controller, DATA), 0x04);
        controller.press_ctrl_alt_del().unwrap();
        assert!(controller.line().read().is_err());
    }

    #[test]
    fn the_output_port_is_written_and_read_back() {
        let (mut controller, _) = controller();
        controller.write(COMMAND, &[0xd1]);
        controller.write(DATA, &[0x5a]);
        controller.write(COMMAND, &[0xd0]);
        assert_eq!(read(&mut controller, DATA), 0x5a);
    }

    #[test]
    fn the_keyboard_acknowledges_whatever_it_is_told() {
        let (mut controller, _) = controller();
        controller.write(DATA, &[0xed]);
        controller.line().read().unwrap();
        assert_eq!(read(&mut controller, DATA), 0xfa);
    }

    #[test]
    fn wide_accesses_and_other_ports_do_nothing() {
        let (mut controller, _) = controller();
        for offset in 0..5 {
            let mut data = [0xee; 2];
            controller.read(offset, &mut data);
            assert_eq!(data, [0, 0]);
        }
        controller.write(2, &[0xfe]);
        assert_eq!(read(&mut controller, 1), 0);
    }

    #[test]
    fn what_is_done_is_counted_and_so_is_what_does_nothing() {
        let (mut controller, _) = controller();
        controller.write(COMMAND, &[0x20]);
        controller.write(COMMAND, &[0xfe]);
        controller.write(DATA, &[0, 0]);
        let _control = read(&mut controller, DATA);
        let _empty = read(&mut controller, DATA);
        let _nothing_there = read(&mut controller, 3);
        let counts = controller.counts();
        let loaded = [
            &counts.writes,
            &counts.missed_writes,
            &counts.reads,
            &counts.missed_reads,
            &counts.resets,
        ];
        assert_eq!(
            loaded.map(|counter| counter.load(Ordering::Relaxed)),
            [2, 1, 1, 2, 1]
        );
    }
}
