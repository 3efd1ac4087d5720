//! The guest's console on standard input: paced by the guest, never waited for.

use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard};

use coracle_devices::serial::SerialPort;

use crate::event_loop::{ConsoleEvent, EventLoop, Source, Watch};

/// How long the end of the process waits for a reader of the last output.
const FINISH_MS_MAX: u64 = 1_000;

/// Whether the guest's serial port takes standard input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// It does: the console is the process's own.
    Standard,
    /// It does not: output goes to a file that the configuration names.
    None,
}

/// The host's end of the guest's serial port.
pub struct Console {
    port: Arc<Mutex<SerialPort>>,
    /// Read but not yet taken by the port.
    pending: Vec<u8>,
    input: Option<Watch>,
    has_input: bool,
    writable: Option<Watch>,
}

impl Console {
    /// Connects `port` to the event loop.
    pub fn attach(port: Arc<Mutex<SerialPort>>, input: Input, event_loop: &mut EventLoop) -> Self {
        let attention = locked(&port).attention().as_raw_fd();
        event_loop.watch(Source::SerialAttention(attention));
        let has_input = input == Input::Standard;
        let input = has_input.then(|| event_loop.watch(Source::ConsoleInput));
        Self {
            port,
            pending: Vec::new(),
            input,
            has_input,
            writable: None,
        }
    }

    /// Does what an event asks for.
    pub fn serve(&mut self, event: ConsoleEvent, event_loop: &mut EventLoop) {
        match event {
            ConsoleEvent::Input(bytes) => self.pending.extend(bytes),
            ConsoleEvent::InputClosed => self.has_input = false,
            ConsoleEvent::Attention => locked(&self.port).attend(),
            ConsoleEvent::Writable => locked(&self.port).output_mut().drain(),
        }
        self.feed(event_loop);
        self.watch_output(event_loop);
    }

    /// Waits, within limits, for the last output to be read.
    pub fn finish(&self) {
        locked(&self.port).output_mut().finish(FINISH_MS_MAX);
    }

    /// Gives the port what it takes. Standard input is watched only while nothing is pending: the
    /// rest of it waits in its pipe, where the writer can see that.
    fn feed(&mut self, event_loop: &mut EventLoop) {
        let taken = locked(&self.port).receive(&self.pending);
        self.pending.drain(..taken);
        let wanted = self.has_input && self.pending.is_empty();
        match (wanted, self.input) {
            (true, None) => self.input = Some(event_loop.watch(Source::ConsoleInput)),
            (false, Some(watch)) => {
                event_loop.unwatch(watch);
                self.input = None;
            }
            (true, Some(_)) | (false, None) => {}
        }
    }

    /// Watches the output's descriptor while output waits for it.
    fn watch_output(&mut self, event_loop: &mut EventLoop) {
        let port = locked(&self.port);
        let blocked = port.output().descriptor().filter(|_| port.output().wants_drain());
        match (blocked, self.writable) {
            (Some(descriptor), None) => {
                self.writable = Some(event_loop.watch(Source::SerialWritable(descriptor.as_raw_fd())));
            }
            (None, Some(watch)) => {
                event_loop.unwatch(watch);
                self.writable = None;
            }
            (Some(_), Some(_)) | (None, None) => {}
        }
    }
}

fn locked(port: &Mutex<SerialPort>) -> MutexGuard<'_, SerialPort> {
    port.lock()
        .expect("no holder of the serial port panics: the process aborts if one does")
}
