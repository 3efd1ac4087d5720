//! Frames to and from a tap, one by one by `writev` and `readv` as the network device does it, and many at a time by io_uring:
//! what says which of the two it should do.
#![expect(
    unsafe_code,
    reason = "a tap is made by an ioctl, and io_uring reads and writes buffers of ours"
)]

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, IoSliceMut, Read as _, Write as _};
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, types};

use crate::harness::hosts::Host;
use crate::{Outcome, ensure};

/// The tap of this benchmark, which is on no bridge.
const TAP: &str = "frames";
const HERE: &str = "172.16.9.1/24";
const THERE: Ipv4Addr = Ipv4Addr::new(172, 16, 9, 2);
/// Whose address that is: nobody's.
const NOBODY: &str = "06:00:ac:10:09:02";
/// As much as a tap holds with room to spare.
const FRAMES: usize = 256;
/// How many calls of io_uring are begun and waited for together.
const BATCH: u32 = 32;
const HEADER_BYTES: usize = 12;
const FRAME_BYTES_MAX: usize = 2048;

const A_BUFFER_EACH: &str = "there is a buffer for each frame";

/// Which way frames go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the guest.
    Send,
    /// To the guest.
    Receive,
}

/// What a frame costs, in nanoseconds, with each way to move it.
#[derive(Clone, Copy, Debug)]
pub struct Cost {
    /// By one call for each.
    pub one_by_one_ns: f64,
    /// By io_uring.
    pub batched_ns: f64,
}

/// A tap, and buffers for its frames.
struct Bench {
    tap: File,
    ring: IoUring,
    buffers: Vec<[u8; FRAME_BYTES_MAX]>,
    bytes: usize,
}

/// The medians of so many rounds, with frames of `bytes` bytes, on a host that has no tap of that kind yet.
///
/// # Errors
///
/// When there are no taps or no io_uring here, or a frame is lost.
pub fn measure(host: &Host, direction: Direction, bytes: usize, rounds: u64) -> Outcome<Cost> {
    ensure!(bytes <= FRAME_BYTES_MAX - 64, "{bytes} bytes are too many");
    host.lone_tap(TAP, HERE, (THERE, NOBODY))?;
    let measured = host.inside(|| Bench::new(bytes)?.rounds(direction, rounds));
    host.remove(TAP)?;
    measured?
}

impl Bench {
    fn new(bytes: usize) -> Outcome<Self> {
        let tap = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")?;
        // SAFETY: all of its fields are numbers, for which zero is a value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(TAP.bytes()) {
            *to = from.cast_signed();
        }
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags)?;
        let header = libc::c_int::try_from(HEADER_BYTES)?;
        // SAFETY: the kernel reads and writes a `struct ifreq`.
        let done = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
        ensure!(done == 0, "the tap: {}", io::Error::last_os_error());
        // SAFETY: the kernel reads an int.
        let done = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const header) };
        ensure!(done == 0, "its header: {}", io::Error::last_os_error());
        let mut frame = [0; FRAME_BYTES_MAX];
        // To nobody, from somebody, of the kind that is for experiments: the kernel takes it and drops it.
        let head = [6, 0, 0xac, 0x10, 9, 9, 6, 0, 0xac, 0x10, 9, 2, 0x88, 0xb5];
        for (to, from) in frame.iter_mut().skip(HEADER_BYTES).zip(head) {
            *to = from;
        }
        Ok(Self {
            tap,
            ring: IoUring::new(BATCH)?,
            buffers: vec![frame; FRAMES],
            bytes,
        })
    }

    fn rounds(&mut self, direction: Direction, rounds: u64) -> Outcome<Cost> {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.connect((THERE, 9))?;
        // What there is before anybody looks: the kernel's own, of IPv6.
        std::thread::sleep(Duration::from_millis(200));
        while self.one(Direction::Receive, 0).is_ok() {}
        let mut costs = [Vec::new(), Vec::new()];
        for round in 0..2 * rounds {
            if direction == Direction::Receive {
                let datagram = vec![0; self.bytes - 42];
                for _ in 0..FRAMES {
                    socket.send(&datagram)?;
                }
            }
            let is_batched = round % 2 == 1;
            let begun = Instant::now();
            if is_batched {
                self.by_ring(direction)?;
            } else {
                (0..FRAMES).try_for_each(|frame| self.one(direction, frame))?;
            }
            let nanoseconds = begun.elapsed().as_secs_f64() * 1e9 / FRAMES as f64;
            if let Some(costs) = costs.get_mut(usize::from(is_batched)) {
                costs.push(nanoseconds);
            }
        }
        let [one_by_one_ns, batched_ns] = costs.map(|mut costs| {
            costs.sort_by(f64::total_cmp);
            costs.get(costs.len() / 2).copied().unwrap_or(0.0)
        });
        Ok(Cost {
            one_by_one_ns,
            batched_ns,
        })
    }

    /// What one call moves.
    fn vector(&mut self, frame: usize, direction: Direction) -> libc::iovec {
        let bytes = match direction {
            Direction::Send => HEADER_BYTES + self.bytes,
            Direction::Receive => FRAME_BYTES_MAX,
        };
        let buffer = self.buffers.get_mut(frame).expect(A_BUFFER_EACH);
        libc::iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: bytes,
        }
    }

    fn one(&mut self, direction: Direction, frame: usize) -> io::Result<()> {
        let sent = HEADER_BYTES + self.bytes;
        let buffer = self.buffers.get_mut(frame).expect(A_BUFFER_EACH);
        let mut tap = &self.tap;
        match direction {
            Direction::Send => tap.write_vectored(&[IoSlice::new(buffer.get(..sent).unwrap_or_default())]),
            Direction::Receive => tap.read_vectored(&mut [IoSliceMut::new(buffer)]),
        }
        .map(drop)
    }

    fn by_ring(&mut self, direction: Direction) -> Outcome {
        let tap = types::Fd(self.tap.as_raw_fd());
        let vectors: Vec<_> = (0..FRAMES).map(|frame| self.vector(frame, direction)).collect();
        for batch in vectors.chunks(BATCH as usize) {
            for vector in batch {
                let entry = match direction {
                    Direction::Send => opcode::Writev::new(tap, vector, 1).build(),
                    Direction::Receive => opcode::Readv::new(tap, vector, 1).build(),
                };
                // SAFETY: the vectors, and the buffers that they tell of, stay until each call is over: that is waited for.
                unsafe { self.ring.submission().push(&entry) }?;
            }
            self.ring.submit_and_wait(batch.len())?;
            for completion in self.ring.completion() {
                let moved = completion.result();
                ensure!(moved > 0, "{}", io::Error::from_raw_os_error(-moved));
            }
        }
        Ok(())
    }
}
