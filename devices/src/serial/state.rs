//! A serial port as plain data, and a fresh one made to go on from it.

use serde::{Deserialize, Serialize};
use vm_superio::Serial;
use vm_superio::serial::{NoEvents, SerialState};

use super::{INPUT_BYTES_MAX, Line, Output, SerialPort};

/// The registers of a 16550A, and the input that its guest has not read.
///
/// Output is not part of it: what the guest wrote has left, or waits in the process that it was written in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialPortState {
    /// DLL: the low byte of the divisor latch.
    pub divisor_low: u8,
    /// DLM: the high byte of the divisor latch.
    pub divisor_high: u8,
    /// IER.
    pub interrupt_enable: u8,
    /// IIR, without the bits that say that there is a FIFO.
    pub interrupt_identification: u8,
    /// LCR.
    pub line_control: u8,
    /// LSR.
    pub line_status: u8,
    /// MCR.
    pub modem_control: u8,
    /// MSR.
    pub modem_status: u8,
    /// SCR.
    pub scratch: u8,
    /// The receiver's FIFO, oldest first.
    pub fifo: Vec<u8>,
    /// Input that waits for room in the FIFO, oldest first.
    pub input: Vec<u8>,
}

/// No serial port can be in such a state; the port is as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no serial port can be in the saved state: {0}")]
pub struct SerialPortStateError(&'static str);

impl SerialPort {
    /// Everything that it takes to go on elsewhere. The guest does not run meanwhile.
    pub fn save(&self) -> SerialPortState {
        let SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        } = self.uart.state();
        SerialPortState {
            divisor_low: baud_divisor_low,
            divisor_high: baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            fifo: in_buffer,
            input: self.input.iter().copied().collect(),
        }
    }

    /// Takes up what was saved elsewhere; the output stays the port's own. If the guest was to be interrupted the line
    /// rises again: call it when the interrupt controllers have their state.
    ///
    /// # Errors
    ///
    /// When no port can be in such a state.
    pub fn restore(&mut self, state: &SerialPortState) -> Result<(), SerialPortStateError> {
        check(state)?;
        let uart = SerialState {
            baud_divisor_low: state.divisor_low,
            baud_divisor_high: state.divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.fifo.clone(),
        };
        let output = std::mem::replace(self.uart.writer_mut(), Output::discard());
        let line = Line(self.line.clone());
        self.uart = Serial::from_state(&uart, line, NoEvents, output)
            .expect("the FIFO is not too long, and the line never fails");
        self.input = state.input.iter().copied().collect();
        self.refill();
        self.input_was_full = self.input_room() == 0;
        Ok(())
    }
}

/// As many bytes the model's FIFO holds.
const FIFO_BYTES_MAX: usize = 64;
/// The interrupts that a 16550A can enable.
const INTERRUPTS: u8 = 0x0f;
/// What the model says of a line: data is there, and both transmitter bits, always.
const LINE_DATA: u8 = 0x01;
const LINE_IDLE: u8 = 0x60;
/// What the model may have to identify: nothing, room to transmit, data received.
const IDENTIFIED: u8 = 0x07;

fn check(state: &SerialPortState) -> Result<(), SerialPortStateError> {
    let has_data = if state.fifo.is_empty() { 0 } else { LINE_DATA };
    for (is_possible, otherwise) in [
        (
            state.fifo.len() <= FIFO_BYTES_MAX,
            "its FIFO has more bytes than there is room for",
        ),
        (
            state.input.len() <= INPUT_BYTES_MAX,
            "more input waits than there is room for",
        ),
        (
            state.interrupt_enable & !INTERRUPTS == 0,
            "it has enabled interrupts that do not exist",
        ),
        (
            state.interrupt_identification & !IDENTIFIED == 0,
            "it identifies interrupts that do not exist",
        ),
        (
            state.line_status == LINE_IDLE | has_data,
            "its line status contradicts its FIFO",
        ),
    ] {
        if !is_possible {
            return Err(SerialPortStateError(otherwise));
        }
    }
    Ok(())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use std::io::Read;
    use std::os::fd::AsFd;

    use super::super::tests::{INTERRUPT_ENABLE, read, read_all};
    use super::super::{DATA, Output};
    use super::*;
    use crate::bus::BusDevice;

    fn port() -> SerialPort {
        SerialPort::new(Output::discard()).unwrap()
    }

    /// A port with an interrupt that nobody has seen, and with input in its FIFO and behind it.
    fn busy() -> (SerialPort, Vec<u8>) {
        let mut port = port();
        for (offset, value) in [(3, 0x80), (0, 0x34), (1, 0x12), (3, 0x13), (7, 0x5a)] {
            port.write(offset, &[value]);
        }
        port.write(INTERRUPT_ENABLE, &[1]);
        let input: Vec<u8> = (0..200).collect();
        assert_eq!(port.receive(&input), 200);
        (port, input)
    }

    #[test]
    fn a_port_goes_on_elsewhere_with_its_registers_and_with_the_input_that_waits() {
        let (before, input) = busy();
        let text = serde_json::to_vec(&before.save()).unwrap();
        let state = serde_json::from_slice(&text).unwrap();
        let mut after = port();
        after.restore(&state).unwrap();
        assert_eq!(after.save(), state);
        after.line().read().unwrap();
        let registers = [(2, 0xc4), (3, 0x13), (7, 0x5a)];
        for (offset, value) in registers {
            assert_eq!(read(&mut after, offset), value, "register {offset}");
        }
        assert_eq!(read_all(&mut after), input);
    }

    #[test]
    fn input_that_waits_before_an_empty_fifo_is_not_left_waiting() {
        let mut state = port().save();
        state.interrupt_enable = 1;
        state.input = b"typed".to_vec();
        let mut after = port();
        after.restore(&state).unwrap();
        after.line().read().unwrap();
        assert_eq!(read_all(&mut after), b"typed");
    }

    #[test]
    fn a_restored_port_writes_to_its_own_output() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let mut after = SerialPort::new(Output::to_descriptor(writer.as_fd()).unwrap()).unwrap();
        after.restore(&busy().0.save()).unwrap();
        after.write(DATA, b"x");
        let mut text = [0; 1];
        std::fs::File::from(reader).read_exact(&mut text).unwrap();
        assert_eq!(&text, b"x");
    }

    #[test]
    fn whoever_types_into_a_full_port_is_called_after_a_restore_too() {
        let (mut before, _) = busy();
        before.receive(&[7; 2 * INPUT_BYTES_MAX]);
        let mut after = port();
        after.restore(&before.save()).unwrap();
        assert_eq!(after.input_room(), 0);
        read_all(&mut after);
        after.attention.read().unwrap();
    }

    #[test]
    fn a_state_in_which_no_port_can_be_is_refused_and_changes_nothing() {
        let good = busy().0.save();
        let damages: [fn(&mut SerialPortState); 6] = [
            |state| state.fifo.resize(65, 0),
            |state| state.input.resize(INPUT_BYTES_MAX + 1, 0),
            |state| state.interrupt_enable = 0x10,
            |state| state.interrupt_identification = 0x08,
            |state| state.fifo.clear(),
            |state| state.line_status = 0,
        ];
        let mut after = port();
        let fresh = after.save();
        for damage in damages {
            let mut state = good.clone();
            damage(&mut state);
            after.restore(&state).unwrap_err();
            assert_eq!(after.save(), fresh);
        }
    }
}
