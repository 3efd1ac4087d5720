//! `echo`: lines in, lines out.

use instrument::cmdline::{ArgumentError, Command};

use super::Failure;
use crate::interrupts;
use crate::wait::Mode;
use crate::{cpu, say, serial};

/// Of a longer line, the rest is dropped.
const LINE_BYTES_MAX: usize = 1024;
/// Turns between two looks at an idle port: each look is an exit.
const TURNS: u32 = 10_000;

/// Prints every line that comes in, until one says `exit N`.
pub fn echo(command: &Command<'static>) -> Result<(), Failure> {
    command.allow(&["wait"])?;
    let mode = Mode::of(command)?;
    if mode == Mode::Interrupt {
        interrupts::enable(0);
        interrupts::route(serial::IRQ, 1);
        serial::enable_input_interrupt();
    }
    say!("echo: ready\n");
    let mut line = [0u8; LINE_BYTES_MAX];
    let mut length = 0;
    loop {
        match next_byte(mode) {
            b'\r' | b'\n' => {
                let text =
                    core::str::from_utf8(line.get(..length).unwrap_or_default()).unwrap_or("(not UTF-8)");
                length = 0;
                if let Some(status) = text.strip_prefix("exit ") {
                    return match status.parse() {
                        Ok(status) => Err(Failure::Exit(status)),
                        Err(_) => Err(ArgumentError::Impossible {
                            key: "exit",
                            value: "",
                            choices: "0 to 255",
                        }
                        .into()),
                    };
                }
                say!("echo: {text}\n");
            }
            byte => {
                if let Some(place) = line.get_mut(length) {
                    *place = byte;
                    length += 1;
                }
            }
        }
    }
}

fn next_byte(mode: Mode) -> u8 {
    loop {
        let seen = interrupts::count(serial::IRQ as usize);
        if let Some(byte) = serial::read() {
            return byte;
        }
        match mode {
            Mode::Poll => (0..TURNS).for_each(|_| cpu::relax()),
            Mode::Interrupt => cpu::idle_while(interrupts::counter(serial::IRQ as usize), seen),
        }
    }
}
