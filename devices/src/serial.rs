//! The first serial port, a 16550A: bytes from the guest to an [`Output`], and from the host to the guest.

mod config;
mod output;
mod state;

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::bus::BusDevice;
use crate::wait::borrow;

pub use config::SerialConfig;
pub use output::{BACKLOG_BYTES_MAX, Output, OutputCounts};
pub use state::{SerialPortState, SerialPortStateError};

/// The first of [`SERIAL_PORTS`] I/O ports (COM1).
pub const SERIAL_PORT: u16 = 0x3f8;
/// How many ports a 16550A has.
pub const SERIAL_PORTS: u16 = 8;
/// The ISA interrupt of COM1.
pub const SERIAL_IRQ: u32 = 4;
/// Input that waits for the guest to read it.
pub const INPUT_BYTES_MAX: usize = 4096;

const DATA: u64 = 0;

/// What the guest did with the port's registers, for metrics.
#[derive(Debug, Default)]
pub struct SerialCounts {
    /// Register reads.
    pub reads: AtomicU64,
    /// Register writes.
    pub writes: AtomicU64,
    /// Accesses that are not a byte wide.
    pub missed: AtomicU64,
}

/// The port at [`SERIAL_PORT`].
pub struct SerialPort {
    uart: Serial<Line, NoEvents, Output>,
    input: VecDeque<u8>,
    /// Whether somebody waits for room since the input was full.
    input_was_full: bool,
    line: Arc<EventFd>,
    attention: EventFd,
    counts: Arc<SerialCounts>,
}

impl SerialPort {
    /// A port whose output goes to `output`.
    ///
    /// # Errors
    ///
    /// When its eventfds cannot be made.
    pub fn new(output: Output) -> io::Result<Self> {
        let line = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        Ok(Self {
            uart: Serial::new(Line(Arc::clone(&line)), output),
            input: VecDeque::new(),
            input_was_full: false,
            line,
            attention: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            counts: Arc::default(),
        })
    }

    /// The eventfd that raises [`SERIAL_IRQ`].
    pub fn line(&self) -> &Arc<EventFd> {
        &self.line
    }

    /// What the guest did so far.
    pub fn counts(&self) -> &Arc<SerialCounts> {
        &self.counts
    }

    /// Where output goes.
    pub fn output(&self) -> &Output {
        self.uart.writer()
    }

    /// Where output goes, for the event loop to drain and to finish.
    pub fn output_mut(&mut self) -> &mut Output {
        self.uart.writer_mut()
    }

    /// Readable when the event loop should look at the port: its output has begun to want draining, or
    /// half of the room for input is free after it had been full. [`Self::attend`] resets it.
    pub fn attention(&self) -> BorrowedFd<'_> {
        borrow(&self.attention)
    }

    /// Resets [`Self::attention`], before looking.
    pub fn attend(&self) {
        // Fails only when there was nothing to reset.
        let _ = self.attention.read();
    }

    /// How many bytes [`Self::receive`] takes now. At zero, wait for [`Self::attention`].
    pub fn input_room(&self) -> usize {
        INPUT_BYTES_MAX - self.input.len()
    }

    /// Types `bytes` at the guest, which reads them in its own time; returns how many there was room for.
    pub fn receive(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(self.input_room());
        self.input.extend(bytes.iter().take(taken));
        self.refill();
        self.input_was_full |= self.input_room() == 0;
        taken
    }

    /// Moves waiting input into the UART's FIFO, as far as it goes.
    fn refill(&mut self) {
        while self.uart.fifo_capacity() > 0 && !self.input.is_empty() {
            let moved = self
                .uart
                .enqueue_raw_bytes(self.input.as_slices().0)
                .expect("the FIFO has room and the line never fails");
            // In loopback mode the port is deaf.
            if moved == 0 {
                break;
            }
            self.input.drain(..moved);
        }
    }

    /// The guest did something that may have made room.
    fn make_room(&mut self) {
        self.refill();
        // Not for every byte: a call costs the guest a system call and the loop a turn.
        if self.input_was_full && self.input_room() >= INPUT_BYTES_MAX / 2 {
            self.input_was_full = false;
            self.call();
        }
    }

    fn call(&self) {
        // Refused only by a full counter, which calls as well.
        let _ = self.attention.write(1);
    }
}

/// The registers are a byte wide; wider accesses read as zero and change nothing.
impl BusDevice for SerialPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let (Ok(register), [byte]) = (u8::try_from(offset), data) else {
            self.counts.missed.fetch_add(1, Ordering::Relaxed);
            return;
        };
        self.counts.reads.fetch_add(1, Ordering::Relaxed);
        *byte = self.uart.read(register);
        if offset == DATA {
            self.make_room();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let (Ok(register), [byte]) = (u8::try_from(offset), data) else {
            self.counts.missed.fetch_add(1, Ordering::Relaxed);
            return;
        };
        self.counts.writes.fetch_add(1, Ordering::Relaxed);
        let wanted_drain = self.output().wants_drain();
        self.uart
            .write(register, *byte)
            .expect("neither the line nor the output ever fails");
        if !wanted_drain && self.output().wants_drain() {
            self.call();
        }
        // Whatever was written may have ended loopback mode, in which the port is deaf.
        self.make_room();
    }
}

/// The interrupt line, as the UART's model wants it.
struct Line(Arc<EventFd>);

impl Trigger for Line {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        // Refused only by a full counter, and then the line is up.
        let _ = self.0.write(1);
        Ok(())
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use super::*;
    use crate::wait::wait;
    use std::io::Read;
    use std::os::fd::AsFd;

    pub(super) const INTERRUPT_ENABLE: u64 = 1;
    const MODEM_CONTROL: u64 = 4;
    const LINE_STATUS: u64 = 5;

    pub(super) fn read(port: &mut SerialPort, offset: u64) -> u8 {
        let mut data = [0xee];
        port.read(offset, &mut data);
        let [byte] = data;
        byte
    }

    /// Reads as a guest does: while the line status says that there is data.
    pub(super) fn read_all(port: &mut SerialPort) -> Vec<u8> {
        let mut bytes = Vec::new();
        while read(port, LINE_STATUS) & 1 != 0 {
            bytes.push(read(port, DATA));
        }
        bytes
    }

    #[test]
    fn what_the_guest_writes_reaches_the_output() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let mut port = SerialPort::new(Output::to_descriptor(writer.as_fd()).unwrap()).unwrap();
        for byte in b"hello" {
            port.write(DATA, &[*byte]);
        }
        let mut text = [0; 5];
        std::fs::File::from(reader).read_exact(&mut text).unwrap();
        assert_eq!(&text, b"hello");
        assert!(port.attention.read().is_err(), "nobody needs to drain it");
    }

    #[test]
    fn input_is_paced_into_the_fifo_and_arrives_whole() {
        let mut port = SerialPort::new(Output::discard()).unwrap();
        port.write(INTERRUPT_ENABLE, &[1]);
        let bytes: Vec<u8> = (0..=255).cycle().take(1000).collect();
        assert_eq!(port.receive(&bytes), 1000);
        port.line().read().unwrap();
        assert_eq!(read_all(&mut port), bytes);
        port.line().read().unwrap();
    }

    #[test]
    fn input_that_the_guest_does_not_read_is_refused_until_it_does() {
        let mut port = SerialPort::new(Output::discard()).unwrap();
        let bytes = vec![7; 2 * INPUT_BYTES_MAX];
        let mut taken = port.receive(&bytes);
        taken += port.receive(&bytes);
        assert!(taken < INPUT_BYTES_MAX + 100 && port.input_room() == 0);
        assert_eq!(port.receive(&bytes), 0);
        assert!(port.attention.read().is_err());
        read(&mut port, DATA);
        assert!(port.attention.read().is_err(), "not for a single byte");
        assert_eq!(read_all(&mut port).len(), taken - 1);
        port.attention.read().unwrap();
        assert_eq!(port.input_room(), INPUT_BYTES_MAX);
    }

    #[test]
    fn input_waits_out_loopback_mode() {
        let mut port = SerialPort::new(Output::discard()).unwrap();
        port.write(MODEM_CONTROL, &[0x10]);
        assert_eq!(port.receive(b"later"), 5);
        assert_eq!(read_all(&mut port), b"");
        port.write(MODEM_CONTROL, &[0]);
        assert_eq!(read_all(&mut port), b"later");
    }

    #[test]
    fn the_event_loop_is_called_once_when_output_gets_stuck() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let mut port = SerialPort::new(Output::to_descriptor(writer.as_fd()).unwrap()).unwrap();
        while !port.output().wants_drain() {
            port.write(DATA, b"x");
        }
        port.write(DATA, b"x");
        wait(&[&port.attention], None);
        port.attend();
        port.output_mut().drain();
        assert!(port.output().wants_drain());
        let mut bytes = vec![0; 1 << 16];
        std::fs::File::from(reader).read_exact(&mut bytes).unwrap();
        port.output_mut().drain();
        assert!(!port.output().wants_drain());
    }

    #[test]
    fn wide_accesses_are_counted_and_nothing_else() {
        let mut port = SerialPort::new(Output::discard()).unwrap();
        let mut data = [0xee; 4];
        port.read(DATA, &mut data);
        port.write(DATA, &data);
        assert_eq!(data, [0; 4]);
        assert_eq!(port.counts().missed.load(Ordering::Relaxed), 2);
        assert_eq!(port.output().counts().written_bytes.load(Ordering::Relaxed), 0);
    }
}
