//! Where the guest's serial output goes: to any kind of descriptor, and without ever waiting for it.
//!
//! ```text
//!   vCPU: write ──limit──► nothing queued? ──► the descriptor, as much as it takes now
//!                  │             │ no, or it takes no more
//!                  ▼             ▼
//!               dropped      backlog, bounded ──► (event loop, when writable) drain
//! ```

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use coracle_storage::limit::{RateLimiter, RateLimiterConfig, TokenBucketConfig};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::SendFlags;

/// Output that waits for a descriptor which takes no more; beyond it output is dropped.
pub const BACKLOG_BYTES_MAX: usize = 64 << 10;
/// As much as a pipe that polls as writable takes without blocking (POSIX's PIPE_BUF, as Linux has it).
const PIPE_BYTES: usize = 4096;
/// As much as a terminal that polls as writable surely takes: it says so from 256 bytes of room on.
const TERMINAL_BYTES: usize = 128;

/// What became of the guest's output, for metrics.
#[derive(Debug, Default)]
pub struct OutputCounts {
    /// Bytes that left.
    pub written_bytes: AtomicU64,
    /// Bytes dropped because the backlog was full, or the descriptor failed.
    pub lost_bytes: AtomicU64,
    /// Bytes dropped by the rate limiter.
    pub limited_bytes: AtomicU64,
}

/// How a descriptor is written without waiting.
#[derive(Debug)]
enum Sink {
    /// A description of our own, in non-blocking mode.
    Nonblocking(OwnedFd),
    /// A socket, which can be told so at each call.
    Socket(OwnedFd),
    /// A pipe or terminal that we share: asked first, and given no more than it surely takes.
    Polled(OwnedFd, usize),
    /// A file or a device like it, which does not wait for anybody.
    Direct(OwnedFd),
    /// Nothing.
    Discard,
}

/// The output of the serial port.
#[derive(Debug)]
pub struct Output {
    sink: Sink,
    backlog: VecDeque<u8>,
    limiter: RateLimiter,
    counts: Arc<OutputCounts>,
    has_failed: bool,
}

impl Output {
    /// Output to what `descriptor` leads to. The caller's descriptor stays as it is: its description,
    /// which other processes may share, is not switched to non-blocking mode.
    ///
    /// # Errors
    ///
    /// When the descriptor cannot be looked at or duplicated.
    pub fn to_descriptor(descriptor: BorrowedFd<'_>) -> io::Result<Self> {
        let own = || rustix::io::fcntl_dupfd_cloexec(descriptor, 0);
        let kind = FileType::from_raw_mode(rustix::fs::fstat(descriptor)?.st_mode);
        let is_terminal = kind == FileType::CharacterDevice && rustix::termios::isatty(descriptor);
        let sink = match kind {
            FileType::Socket => Sink::Socket(own()?),
            FileType::Fifo => {
                reopened(descriptor).map_or_else(|_| Ok(Sink::Polled(own()?, PIPE_BYTES)), Ok::<_, Errno>)?
            }
            _ if is_terminal => reopened(descriptor)
                .map_or_else(|_| Ok(Sink::Polled(own()?, TERMINAL_BYTES)), Ok::<_, Errno>)?,
            _ => Sink::Direct(own()?),
        };
        Ok(Self::new(sink))
    }

    /// Output to the file or named pipe at `path`; a file is made if there is none, and written from its start.
    ///
    /// # Errors
    ///
    /// When it cannot be opened.
    pub fn to_path(path: &Path) -> io::Result<Self> {
        // Reading and writing: a named pipe then opens without a reader at its other end.
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)?;
        Ok(Self::new(Sink::Nonblocking(file)))
    }

    /// Output to nowhere.
    pub fn discard() -> Self {
        Self::new(Sink::Discard)
    }

    fn new(sink: Sink) -> Self {
        Self {
            sink,
            backlog: VecDeque::new(),
            limiter: RateLimiter::default(),
            counts: Arc::default(),
            has_failed: false,
        }
    }

    /// The same output, with everything beyond `bucket` (in bytes) dropped.
    #[must_use]
    pub fn limited(mut self, bucket: TokenBucketConfig) -> Self {
        let config = RateLimiterConfig {
            bandwidth: Some(bucket),
            ops: None,
        };
        self.limiter = RateLimiter::new(&config, Instant::now());
        self
    }

    /// What became of the output so far.
    pub fn counts(&self) -> &Arc<OutputCounts> {
        &self.counts
    }

    /// Whether output waits for the descriptor to become writable; then poll [`Self::descriptor`] and [`Self::drain`].
    pub fn wants_drain(&self) -> bool {
        !self.backlog.is_empty()
    }

    /// The descriptor to poll for writing while [`Self::wants_drain`].
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        match &self.sink {
            Sink::Nonblocking(fd) | Sink::Socket(fd) | Sink::Polled(fd, _) | Sink::Direct(fd) => {
                Some(fd.as_fd())
            }
            Sink::Discard => None,
        }
    }

    /// Takes the guest's bytes; never waits.
    pub fn write(&mut self, bytes: &[u8]) {
        let allowed = self.allowed(bytes);
        let mut rest = allowed;
        if self.backlog.is_empty() {
            let taken = self.offer(rest);
            rest = rest.get(taken..).unwrap_or_default();
        }
        let room = BACKLOG_BYTES_MAX - self.backlog.len();
        let (kept, lost) = rest.split_at(rest.len().min(room));
        self.backlog.extend(kept);
        add(&self.counts.lost_bytes, lost.len());
    }

    /// The bytes that the rate limiter lets through.
    fn allowed<'a>(&mut self, bytes: &'a [u8]) -> &'a [u8] {
        if !self.limiter.is_limiting() {
            return bytes;
        }
        let now = Instant::now();
        let denied = bytes.iter().position(|_| self.limiter.admit(1, now).is_err());
        let (allowed, limited) = bytes.split_at(denied.unwrap_or(bytes.len()));
        add(&self.counts.limited_bytes, limited.len());
        allowed
    }

    /// Writes as much of the backlog as the descriptor takes now.
    pub fn drain(&mut self) {
        while !self.backlog.is_empty() {
            let piece = std::mem::take(&mut self.backlog);
            let taken = self.offer(piece.as_slices().0);
            self.backlog = piece;
            self.backlog.drain(..taken);
            if taken == 0 {
                return;
            }
        }
    }

    /// Writes out the backlog at the end of the process, for at most `limit_ms`; what is left then is lost.
    pub fn finish(&mut self, limit_ms: u64) {
        let deadline = Instant::now() + Duration::from_millis(limit_ms);
        self.drain();
        while self.wants_drain() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            if let Some(descriptor) = self.descriptor() {
                is_writable(descriptor, left);
            }
            self.drain();
        }
        add(&self.counts.lost_bytes, self.backlog.len());
        self.backlog.clear();
    }

    /// Gives `bytes` to the descriptor; returns how many are dealt with, 0 if it takes none now.
    fn offer(&mut self, bytes: &[u8]) -> usize {
        let result = match &self.sink {
            Sink::Discard => Ok(bytes.len()),
            Sink::Nonblocking(fd) | Sink::Direct(fd) => retry(|| rustix::io::write(fd, bytes)),
            Sink::Socket(fd) => {
                retry(|| rustix::net::send(fd, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL))
            }
            Sink::Polled(fd, _) if !is_writable(fd.as_fd(), Duration::ZERO) => Err(Errno::AGAIN),
            Sink::Polled(fd, limit_bytes) => {
                let piece = bytes.get(..*limit_bytes).unwrap_or(bytes);
                retry(|| rustix::io::write(fd, piece))
            }
        };
        match result {
            Ok(taken) => {
                add(&self.counts.written_bytes, taken);
                taken
            }
            Err(Errno::AGAIN) => 0,
            Err(error) => {
                // A reader may come back to a pipe, so the next bytes are tried again; these are gone.
                if !std::mem::replace(&mut self.has_failed, true) {
                    log::warn!("serial output is lost: {error}");
                }
                add(&self.counts.lost_bytes, bytes.len());
                bytes.len()
            }
        }
    }
}

/// For the UART: takes everything, always.
impl io::Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Self::write(self, bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A description of our own, for what `descriptor` leads to, in non-blocking mode.
fn reopened(descriptor: BorrowedFd<'_>) -> Result<Sink, Errno> {
    let path = format!("/proc/self/fd/{}", descriptor.as_raw_fd());
    let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).map(Sink::Nonblocking)
}

/// Whether `descriptor` becomes writable, or fails, within `limit`.
fn is_writable(descriptor: BorrowedFd<'_>, limit: Duration) -> bool {
    let mut descriptors = [PollFd::from_borrowed_fd(descriptor, PollFlags::OUT)];
    let limit = Timespec::try_from(limit).ok();
    poll(&mut descriptors, limit.as_ref()).is_ok_and(|ready| ready > 0)
}

fn retry(call: impl Fn() -> Result<usize, Errno>) -> Result<usize, Errno> {
    rustix::io::retry_on_intr(call)
}

fn add(count: &AtomicU64, bytes: usize) {
    count.fetch_add(bytes as u64, Ordering::Relaxed);
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Seek};
    use std::os::unix::net::UnixStream;

    fn count(counter: &AtomicU64) -> usize {
        usize::try_from(counter.load(Ordering::Relaxed)).unwrap()
    }

    /// Fills an output whose other end nobody reads, then reads: everything that was not counted as lost arrives in order.
    fn never_waits_and_loses_nothing_uncounted(mut output: Output, reader: OwnedFd) {
        const LEN: usize = 2 << 20;
        let bytes: Vec<u8> = (0..LEN).map(|at| u8::try_from(at % 251).unwrap()).collect();
        let started = Instant::now();
        for piece in bytes.chunks(1000) {
            output.write(piece);
        }
        assert!(
            started.elapsed() < Duration::from_secs(10),
            "the writer was kept waiting"
        );
        assert!(output.wants_drain());
        let counts = Arc::clone(output.counts());
        let kept = LEN - count(&counts.lost_bytes);
        assert!((BACKLOG_BYTES_MAX..LEN).contains(&kept));
        let reading = std::thread::spawn(move || {
            let mut arrived = vec![0; kept];
            File::from(reader).read_exact(&mut arrived).unwrap();
            arrived
        });
        output.finish(10_000);
        assert!(!output.wants_drain());
        // What came before the first loss is whole; it is at least the backlog.
        let arrived = reading.join().unwrap();
        assert_eq!(
            arrived.iter().zip(&bytes).take_while(|(a, b)| a == b).count(),
            kept
        );
        assert_eq!(count(&counts.written_bytes), kept);
    }

    #[test]
    fn a_pipe_that_nobody_reads_never_stalls_the_guest() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let output = Output::to_descriptor(writer.as_fd()).unwrap();
        assert!(matches!(output.sink, Sink::Nonblocking(_)));
        never_waits_and_loses_nothing_uncounted(output, reader);
        let flags = rustix::fs::fcntl_getfl(&writer).unwrap();
        assert!(
            !flags.contains(OFlags::NONBLOCK),
            "the caller's description is left alone"
        );
    }

    #[test]
    fn a_pipe_that_cannot_be_reopened_never_stalls_the_guest_either() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        never_waits_and_loses_nothing_uncounted(Output::new(Sink::Polled(writer, PIPE_BYTES)), reader);
    }

    #[test]
    fn a_socket_that_nobody_reads_never_stalls_the_guest() {
        let (writer, reader) = UnixStream::pair().unwrap();
        let output = Output::to_descriptor(writer.as_fd()).unwrap();
        assert!(matches!(output.sink, Sink::Socket(_)));
        never_waits_and_loses_nothing_uncounted(output, reader.into());
    }

    #[test]
    fn a_named_pipe_opens_without_a_reader_and_never_stalls_the_guest() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console");
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, Mode::RUSR | Mode::WUSR).unwrap();
        let output = Output::to_path(&path).unwrap();
        let reader = File::options().read(true).open(&path).unwrap();
        never_waits_and_loses_nothing_uncounted(output, reader.into());
    }

    #[test]
    fn a_file_takes_everything_at_once() {
        let mut file = tempfile::tempfile().unwrap();
        let mut output = Output::to_descriptor(file.as_fd()).unwrap();
        output.write(b"hello ");
        output.write(b"world");
        assert!(!output.wants_drain());
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello world");
    }

    #[test]
    fn a_reader_that_goes_away_costs_output_and_nothing_else() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let mut output = Output::to_descriptor(writer.as_fd()).unwrap();
        drop(reader);
        output.write(b"gone");
        output.write(b"too");
        output.finish(10_000);
        assert_eq!(count(&output.counts().lost_bytes), 7);
    }

    #[test]
    fn the_end_does_not_wait_longer_than_its_limit() {
        let (_reader, writer) = rustix::pipe::pipe().unwrap();
        let mut output = Output::to_descriptor(writer.as_fd()).unwrap();
        output.write(&[0; 1 << 17]);
        let started = Instant::now();
        output.finish(20);
        assert!(started.elapsed() < Duration::from_secs(10));
        assert!(!output.wants_drain());
        let counts = output.counts();
        assert_eq!(count(&counts.lost_bytes) + count(&counts.written_bytes), 1 << 17);
    }

    #[test]
    fn beyond_its_limit_output_is_dropped_and_counted() {
        let bucket = TokenBucketConfig {
            size: 10,
            one_time_burst: Some(5),
            refill_time: 1_000_000,
        };
        let mut output = Output::discard().limited(bucket);
        output.write(&[0; 12]);
        output.write(&[0; 12]);
        assert_eq!(count(&output.counts().written_bytes), 15);
        assert_eq!(count(&output.counts().limited_bytes), 9);
    }
}
