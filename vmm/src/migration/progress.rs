//! How far a migration is, for whoever asks while others work on it, and how it is given up.

use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::kvm::share::FULL;
use crate::snapshot::memory::PAGE_BYTES;

/// Counters of one migration.
#[derive(Debug)]
pub struct Progress {
    rounds: AtomicU64,
    sent_pages: AtomicU64,
    wire_bytes: AtomicU64,
    left_pages: AtomicU64,
    disk_sent_bytes: AtomicU64,
    disk_left_bytes: AtomicU64,
    bytes_per_s: AtomicU64,
    downtime_us: AtomicU64,
    run_permille: AtomicU32,
    is_cancelled: AtomicBool,
    /// What is cut when it is given up.
    sockets: Mutex<Vec<TcpStream>>,
}

impl Default for Progress {
    fn default() -> Self {
        Self {
            rounds: AtomicU64::default(),
            sent_pages: AtomicU64::default(),
            wire_bytes: AtomicU64::default(),
            left_pages: AtomicU64::default(),
            disk_sent_bytes: AtomicU64::default(),
            disk_left_bytes: AtomicU64::default(),
            bytes_per_s: AtomicU64::default(),
            downtime_us: AtomicU64::default(),
            run_permille: AtomicU32::new(FULL),
            is_cancelled: AtomicBool::default(),
            sockets: Mutex::default(),
        }
    }
}

impl Progress {
    /// How many times the memory was gone through.
    pub fn rounds(&self) -> u64 {
        self.rounds.load(Ordering::Relaxed)
    }

    /// How much memory was sent or taken, in bytes; zeros count as what they are.
    pub fn sent_bytes(&self) -> u64 {
        self.sent_pages.load(Ordering::Relaxed) * PAGE_BYTES as u64
    }

    /// What went over the connections for that, in bytes.
    pub fn wire_bytes(&self) -> u64 {
        self.wire_bytes.load(Ordering::Relaxed)
    }

    /// How much is left of the round, in bytes.
    pub fn left_bytes(&self) -> u64 {
        self.left_pages.load(Ordering::Relaxed) * PAGE_BYTES as u64
    }

    /// How much of disks that go along was sent or taken, in bytes.
    pub fn disk_sent_bytes(&self) -> u64 {
        self.disk_sent_bytes.load(Ordering::Relaxed)
    }

    /// How much of them is left of the round, in bytes.
    pub fn disk_left_bytes(&self) -> u64 {
        self.disk_left_bytes.load(Ordering::Relaxed)
    }

    /// How fast memory was sent in the last round.
    pub fn bytes_per_s(&self) -> u64 {
        self.bytes_per_s.load(Ordering::Relaxed)
    }

    /// How long the guest will stand still, by what is known now.
    pub fn downtime(&self) -> Duration {
        Duration::from_micros(self.downtime_us.load(Ordering::Relaxed))
    }

    /// How much of the time the guest's vCPUs may run, in thousandths.
    pub fn run_permille(&self) -> u32 {
        self.run_permille.load(Ordering::Relaxed)
    }

    pub(super) fn slow_down(&self, run_permille: u32) {
        self.run_permille.store(run_permille, Ordering::Relaxed);
    }

    pub(super) fn begin_round(&self, pages: u64) {
        self.rounds.fetch_add(1, Ordering::Relaxed);
        self.left_pages.store(pages, Ordering::Relaxed);
    }

    /// So many pages went, by so many bytes of connections.
    pub(super) fn add(&self, pages: u64, wire_bytes: u64) {
        self.sent_pages.fetch_add(pages, Ordering::Relaxed);
        self.wire_bytes.fetch_add(wire_bytes, Ordering::Relaxed);
        let less = |left: u64| Some(left.saturating_sub(pages));
        let (set, fetch) = (Ordering::Relaxed, Ordering::Relaxed);
        // It never refuses.
        let _ = self.left_pages.fetch_update(set, fetch, less);
    }

    /// So much of disks is to be sent.
    pub(super) fn begin_disk_round(&self, bytes: u64) {
        self.disk_left_bytes.store(bytes, Ordering::Relaxed);
    }

    /// So much of a disk went.
    pub(super) fn add_disk(&self, bytes: u64) {
        self.disk_sent_bytes.fetch_add(bytes, Ordering::Relaxed);
        let less = |left: u64| Some(left.saturating_sub(bytes));
        let (set, fetch) = (Ordering::Relaxed, Ordering::Relaxed);
        // It never refuses.
        let _ = self.disk_left_bytes.fetch_update(set, fetch, less);
    }

    pub(super) fn predict(&self, bytes_per_s: u64, downtime: Duration) {
        self.bytes_per_s.store(bytes_per_s, Ordering::Relaxed);
        let us = u64::try_from(downtime.as_micros()).unwrap_or(u64::MAX);
        self.downtime_us.store(us, Ordering::Relaxed);
    }

    /// Gives it up: whoever waits for the other side waits no more.
    pub fn cancel(&self) {
        self.is_cancelled.store(true, Ordering::Relaxed);
        self.cut();
    }

    /// Whether somebody has given it up.
    pub fn is_cancelled(&self) -> bool {
        self.is_cancelled.load(Ordering::Relaxed)
    }

    /// Ends every connection that it goes by, as when one of them is lost.
    pub(super) fn cut(&self) {
        for socket in self.sockets.lock().expect("no holder panics").drain(..) {
            // Nobody is there to be told that it is cut already.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    /// A connection that is cut when it is given up.
    pub(super) fn goes_by(&self, socket: &TcpStream) -> std::io::Result<()> {
        let copy = socket.try_clone()?;
        self.sockets.lock().expect("no holder panics").push(copy);
        if self.is_cancelled() {
            self.cut();
        }
        Ok(())
    }

    /// Whether the other side has ended one of the connections: whoever has nothing to send for a while would not notice.
    pub(super) fn is_left(&self) -> bool {
        let sockets = self.sockets.lock().expect("no holder panics");
        let ended = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        let mut fds: Vec<_> = sockets
            .iter()
            .map(|socket| PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::RDHUP))
            .collect();
        // What cannot be asked now is asked again soon.
        let _ = poll(&mut fds, Some(&Timespec::default()));
        fds.iter().any(|fd| fd.revents().intersects(ended))
    }

    /// From here on nothing cuts it.
    pub(super) fn cannot_be_cut(&self) {
        self.sockets.lock().expect("no holder panics").clear();
    }
}
