//! A file or FIFO that takes whole lines and never makes the writer wait.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

/// Where lines go. A line for which there is no room is lost; one that has begun is finished first.
#[derive(Debug)]
pub(crate) struct LineSink {
    file: File,
    /// The end of the line of which the reader has the beginning.
    rest: Vec<u8>,
}

impl LineSink {
    /// Opens `path` to append to it, and creates a file if there is nothing. A FIFO needs no reader yet.
    ///
    /// # Errors
    ///
    /// The kernel's reason.
    pub(crate) fn open(path: &Path) -> Result<Self, LineSinkError> {
        let flags = OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
        let mut options = OpenOptions::new();
        // Reading as well lets a FIFO be opened, and stay open, without a reader.
        options
            .read(true)
            .append(true)
            .create(true)
            .mode(0o644)
            .custom_flags(flags.bits().cast_signed());
        let file = options.open(path).map_err(|source| LineSinkError {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            file,
            rest: Vec::new(),
        })
    }

    /// Takes `line`, which ends with a line feed.
    ///
    /// # Errors
    ///
    /// The line is lost as a whole, because the reader is slow or the disk is full.
    pub(crate) fn append(&mut self, line: &[u8]) -> io::Result<()> {
        let rest = std::mem::take(&mut self.rest);
        let unwritten = self.write(&rest)?;
        if unwritten < rest.len() {
            self.rest = rest.get(unwritten..).unwrap_or_default().to_vec();
            return Err(ErrorKind::WouldBlock.into());
        }
        let written = self.write(line)?;
        if written == 0 {
            return Err(ErrorKind::WouldBlock.into());
        }
        self.rest = line.get(written..).unwrap_or_default().to_vec();
        Ok(())
    }

    /// Writes as much as there is room for; gives how much that was.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut written = 0;
        while let Some(rest @ [_, ..]) = bytes.get(written..) {
            match self.file.write(rest) {
                Ok(0) => break,
                Ok(length) => written += length,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if written == 0 => return Err(error),
                Err(_) => break,
            }
        }
        Ok(written)
    }
}

/// Why lines cannot go to a path.
#[derive(Debug, thiserror::Error)]
#[error("cannot open `{}` for writing; name a file or a FIFO in a directory that exists", path.display())]
pub struct LineSinkError {
    path: PathBuf,
    source: io::Error,
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

    use std::io::Read as _;

    use rustix::fs::{CWD, FileType, Mode, mknodat};

    use super::*;

    #[test]
    fn a_file_is_appended_to() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lines");
        for line in ["one\n", "two\n"] {
            LineSink::open(&path).unwrap().append(line.as_bytes()).unwrap();
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "one\ntwo\n");
        assert!(LineSink::open(directory.path()).is_err());
    }

    #[test]
    fn a_full_fifo_loses_whole_lines_and_never_waits() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("fifo");
        mknodat(CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        let mut sink = LineSink::open(&path).unwrap();
        // Longer than what a pipe takes atomically, and no divisor of its size.
        let line = [vec![b'x'; 5000], vec![b'\n']].concat();
        let taken = (0..100).filter(|_| sink.append(&line).is_ok()).count();
        assert!((1..100).contains(&taken), "{taken} lines were taken");

        let mut reader = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)
            .unwrap();
        let mut text = Vec::new();
        let _would_block_at_the_end = reader.read_to_end(&mut text);
        sink.append(b"end\n").unwrap();
        let _would_block_at_the_end = reader.read_to_end(&mut text);
        let expected = [line.repeat(taken), b"end\n".to_vec()].concat();
        assert!(
            text == expected,
            "{} bytes for {} expected",
            text.len(),
            expected.len()
        );
    }
}
