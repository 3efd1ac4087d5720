//! What the source of a migration sends: an input is its side of the conversation, as a target hears it.

use std::io::{self, BufRead, Cursor, Read, Write};

use coracle_vmm::keys::ReadingKeys;
use coracle_vmm::memory::{Backing, PageSize, allocate};
use coracle_vmm::migration::hello::Hello;
use coracle_vmm::migration::pages::Landing;
use coracle_vmm::migration::progress::Progress;
use coracle_vmm::migration::receive::take_memory;
use coracle_vmm::migration::wire::{Kind, Wire};
use coracle_vmm::state::{State, whole};

/// A source that says what it says, whatever it is told.
struct Source<'a>(Cursor<&'a [u8]>);

impl Read for Source<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl BufRead for Source<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.0.fill_buf()
    }

    fn consume(&mut self, len_bytes: usize) {
        self.0.consume(len_bytes);
    }
}

impl Write for Source<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        Ok(buffer.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

pub(crate) fn run(data: &[u8]) {
    let mut wire = Wire::new(Source(Cursor::new(data)));
    let Ok((Kind::Hello, body)) = wire.receive() else {
        return;
    };
    // What is said first decides nothing of how the rest is read.
    if let Ok(hello) = whole::<Hello>(body) {
        drop(hello.config.config());
    }
    let memory = allocate(1, Backing::Anonymous, PageSize::Base).expect("a MiB is there");
    let mut landing = Landing::new(&memory);
    if let Ok(state) = take_memory(&mut wire, &mut landing, &Progress::default())
        && let Ok(state) = State::parse(&state, &ReadingKeys::default())
    {
        drop(state.finish());
    }
}
