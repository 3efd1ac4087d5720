//! The balloon from its driver's side, with a host that notes what it is given.
#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::virtio::conformance::{BUFFERS, Subject, conforms, wait_until};
use crate::virtio::device::{ActiveQueue, INTERRUPT_CONFIGURATION, Interrupt, Session, VirtioDevice};
use crate::virtio::ring::Virtqueue;
use crate::virtio::testing::{DriverRing, Piece, memory};

const PAGE: u32 = 4096;

/// What the host was given: offsets into guest memory, and lengths.
type Given = Arc<Mutex<Vec<(u64, u64)>>>;

struct Host {
    given: Given,
    base: usize,
    /// How long it takes.
    takes: Duration,
    refuses: bool,
}

impl Reclaim for Host {
    fn reclaim(&mut self, segment: Segment) -> io::Result<u64> {
        std::thread::sleep(self.takes);
        if self.refuses {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let (offset, len) = (
            (segment.address().addr() - self.base) as u64,
            segment.len_bytes() as u64,
        );
        self.given.lock().unwrap().push((offset, len));
        Ok(len)
    }
}

fn config(more: &str) -> BalloonConfig {
    serde_json::from_str(&format!(r#"{{"amount_mib": 0, "deflate_on_oom": false{more}}}"#)).unwrap()
}

const ALL: &str =
    r#", "stats_polling_interval_s": 60, "free_page_hinting": true, "free_page_reporting": true"#;

/// A device that serves, its driver, and what went to the host.
struct Rig {
    device: Balloon,
    control: BalloonControl,
    given: Given,
    memory: Arc<GuestMemoryMmap>,
    queues: Vec<DriverRing>,
    status: Arc<AtomicU32>,
}

impl Rig {
    fn new(more: &str) -> Self {
        Self::with_host(more, Duration::ZERO, false)
    }

    fn with_host(more: &str, takes: Duration, refuses: bool) -> Self {
        let memory = memory(4 << 20);
        let given = Given::default();
        let host = Host {
            given: Arc::clone(&given),
            base: memory.iter().next().unwrap().as_ptr().addr(),
            takes,
            refuses,
        };
        let (device, control) = Balloon::new(&config(more), Box::new(host)).unwrap();
        let queues = device.queue_sizes_max().iter().zip(1..);
        let queues = queues
            .map(|(_, at)| DriverRing::new(&memory, at << 12, 16))
            .collect();
        let mut rig = Self {
            device,
            control,
            given,
            memory,
            queues,
            status: Arc::default(),
        };
        let session = rig.session();
        rig.device.start(session).unwrap();
        rig
    }

    fn session(&self) -> Session {
        let features = self.device.features() & !crate::virtio::ring::FEATURE_EVENT_IDX;
        let eventfd = || Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let queue = |driver: &DriverRing| {
            let ring = Virtqueue::new(Arc::clone(&self.memory), driver.layout(), features).unwrap();
            Some(ActiveQueue {
                ring,
                kick: eventfd(),
            })
        };
        Session {
            memory: Arc::clone(&self.memory),
            features,
            queues: self.queues.iter().map(queue).collect(),
            interrupt: Interrupt::new(Arc::clone(&self.status), eventfd()),
        }
    }

    /// Stops and starts the device, which then looks at its queues.
    fn look(&mut self) {
        let session = self.device.stop().unwrap().unwrap();
        assert!(
            session
                .queues
                .iter()
                .flatten()
                .all(|queue| queue.ring.in_flight() == 0)
        );
        self.device.start(session).unwrap();
    }

    fn offer(&mut self, queue: usize, pieces: &[Piece]) {
        self.queues.get_mut(queue).unwrap().offer_chain(pieces);
        self.look();
    }

    fn wait_used(&self, queue: usize, count: u16) {
        let queue = self.queues.get(queue).unwrap();
        wait_until(|| queue.used_index() == count, "a buffer is given back");
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        self.queues.first().unwrap().write(address, bytes);
    }

    fn config(&self) -> Vec<u32> {
        let mut space = [0; 20];
        self.device.read_config(0, &mut space);
        space
            .as_chunks()
            .0
            .iter()
            .map(|field| u32::from_le_bytes(*field))
            .collect()
    }

    fn take_news(&self) {
        wait_until(
            || self.status.swap(0, Ordering::SeqCst) & INTERRUPT_CONFIGURATION != 0,
            "the driver hears of it",
        );
    }

    fn given(&self) -> Vec<(u64, u64)> {
        std::mem::take(&mut self.given.lock().unwrap())
    }
}

fn numbers(pages: &[u32]) -> Vec<u8> {
    pages.iter().flat_map(|page| page.to_le_bytes()).collect()
}

#[test]
fn the_balloon_keeps_the_promises_of_every_device() {
    struct Nowhere;
    impl Reclaim for Nowhere {
        fn reclaim(&mut self, segment: Segment) -> io::Result<u64> {
            Ok(segment.len_bytes() as u64)
        }
    }
    conforms(&Subject {
        make: || Box::new(Balloon::new(&config(ALL), Box::new(Nowhere)).unwrap().0),
        offer: |driver| {
            driver.write(BUFFERS, &numbers(&[0xf0]));
            driver.offer_chain(&[Piece::Readable(BUFFERS, 4)]);
        },
        writes_buffers: false,
    });
}

#[test]
fn pages_of_a_balloon_that_grows_go_to_the_host_and_those_that_are_none_do_not() {
    let mut rig = Rig::new("");
    rig.write(
        BUFFERS,
        &numbers(&[0x200, 0x102, 0x100, 0x101, 0xffff_ffff, 0x400, 0x3ff]),
    );
    rig.offer(0, &[Piece::Readable(BUFFERS, 28)]);
    rig.wait_used(0, 1);
    let expected = [(0x10_0000, 0x3000), (0x20_0000, 0x1000), (0x3f_f000, 0x1000)];
    assert_eq!(rig.given(), expected);
    let counts = rig.control.counts();
    assert_eq!(counts.inflated_bytes.load(Ordering::Relaxed), 0x5000);
    assert_eq!(counts.guest_faults.load(Ordering::Relaxed), 0);
    // What it has back is touched when it is used.
    rig.offer(1, &[Piece::Readable(BUFFERS, 28)]);
    rig.wait_used(1, 1);
    assert_eq!(rig.given(), []);
    rig.offer(0, &[Piece::Readable(BUFFERS, 6)]);
    rig.wait_used(0, 2);
    assert_eq!(rig.given(), [(0x20_0000, 0x1000)]);
    assert_eq!(rig.control.counts().guest_faults.load(Ordering::Relaxed), 1);
}

#[test]
fn the_guest_is_told_how_large_its_balloon_is_to_be_and_says_how_large_it_is() {
    let mut rig = Rig::new("");
    assert_eq!(rig.config(), [0, 0, 0, 0, 0]);
    rig.control.set_amount(3);
    rig.take_news();
    rig.device.write_config(4, &700_u32.to_le_bytes());
    rig.device.write_config(5, &[3]);
    rig.device.write_config(0, &[9; 4]);
    rig.device.write_config(8, &[9; 8]);
    rig.device.write_config(u64::MAX, &[9; 8]);
    let actual = 700 & 0xff | 3 << 8;
    assert_eq!(rig.config(), [768, actual, 0, 0, 0]);
    let statistics = rig.control.statistics();
    assert_eq!((statistics.target_mib, statistics.actual_mib), (3, 3));
    assert_eq!((statistics.target_pages, statistics.actual_pages), (768, actual));
    // It is larger than any field.
    rig.control.set_amount(u32::MAX);
    assert_eq!(rig.config().first(), Some(&u32::MAX));
}

#[test]
fn statistics_are_read_when_they_come_and_asked_for_by_giving_their_buffer_back() {
    let mut rig = Rig::new(r#", "stats_polling_interval_s": 60"#);
    let mut entry = vec![4, 0];
    entry.extend(77_u64.to_le_bytes());
    rig.write(BUFFERS, &entry);
    rig.offer(2, &[Piece::Readable(BUFFERS, 10)]);
    let told = |rig: &Rig, value| {
        wait_until(
            || rig.control.statistics().free_memory == Some(value),
            "they are read",
        );
    };
    told(&rig, 77);
    assert_eq!(rig.queues.get(2).unwrap().used_index(), 0, "not asked for");
    rig.look();
    rig.control.set_interval(30);
    rig.wait_used(2, 1);
    rig.write(BUFFERS + 2, &78_u64.to_le_bytes());
    rig.offer(2, &[Piece::Readable(BUFFERS, 10)]);
    told(&rig, 78);
    assert_eq!(rig.queues.get(2).unwrap().used_index(), 1);
    rig.control.set_interval(1);
    rig.wait_used(2, 2);
    // From now on by itself.
    for count in 3..5 {
        rig.offer(2, &[Piece::Readable(BUFFERS, 10)]);
        rig.wait_used(2, count);
    }
}

#[test]
fn what_is_reported_goes_to_the_host_in_pieces_that_a_stop_can_come_between() {
    let mut rig = Rig::with_host(ALL, Duration::from_millis(20), false);
    let range = |at: u64| Piece::Writable(0x10_0000 + at * 0x1_0000, 0x2000);
    let chain: Vec<Piece> = (0..8).map(range).collect();
    rig.queues.get_mut(4).unwrap().offer_chain(&chain);
    rig.look();
    std::thread::sleep(Duration::from_millis(50));
    // It begins again with the buffer that it has not finished.
    rig.look();
    rig.wait_used(4, 1);
    let given = rig.given();
    assert!(given.len() > 8 && given.len() < 16, "{given:?}");
    let whole: Vec<_> = (0..8).map(|at| (0x10_0000 + at * 0x1_0000, 0x2000)).collect();
    assert_eq!(given.get(given.len() - 8..), Some(&whole[..]));
    assert_eq!(rig.control.counts().reports.load(Ordering::Relaxed), 8);
}

#[test]
fn a_host_that_does_not_take_memory_is_counted_and_the_guest_goes_on() {
    let mut rig = Rig::with_host(ALL, Duration::ZERO, true);
    rig.offer(4, &[Piece::Writable(0x10_0000, PAGE)]);
    rig.wait_used(4, 1);
    let counts = rig.control.counts();
    assert_eq!(counts.report_fails.load(Ordering::Relaxed), 1);
    assert_eq!(counts.reported_bytes.load(Ordering::Relaxed), 0);
}

/// Offers the number of a run, and pages of it.
fn hint(rig: &mut Rig, run: u32, pages: &[Piece]) {
    rig.write(BUFFERS, &run.to_le_bytes());
    let queue = rig.queues.get_mut(3).unwrap();
    let before = queue.used_index();
    queue.offer_chain(&[Piece::Readable(BUFFERS, 4)]);
    for page in pages {
        queue.offer_chain(&[*page]);
    }
    rig.look();
    let count = u16::try_from(pages.len()).unwrap() + 1;
    rig.wait_used(3, before + count);
}

#[test]
fn hints_are_taken_while_a_run_is_on_and_the_guest_has_its_pages_back_at_its_end() {
    let mut rig = Rig::new(ALL);
    let pages = [
        Piece::Writable(0x10_0000, PAGE),
        Piece::Writable(0x18_0000, 2 * PAGE),
    ];
    hint(&mut rig, 2, &pages);
    assert_eq!(rig.given(), [], "nobody has asked");
    rig.control.start_hinting(true);
    rig.take_news();
    assert_eq!(rig.config().get(2), Some(&2), "the first run");
    hint(&mut rig, 2, &pages);
    assert_eq!(rig.given(), [(0x10_0000, 0x1000), (0x18_0000, 0x2000)]);
    hint(&mut rig, 9, &pages);
    assert_eq!(rig.given(), [], "those are of another run");
    hint(&mut rig, 0, &[]);
    rig.take_news();
    assert_eq!(rig.config().get(2), Some(&1));
    let status = rig.control.hinting_status();
    assert_eq!((status.host_cmd, status.guest_cmd), (1, Some(0)));

    rig.control.start_hinting(false);
    rig.take_news();
    hint(&mut rig, 3, &pages);
    assert_eq!(rig.given().len(), 2);
    hint(&mut rig, 0, &[]);
    assert_eq!(
        rig.control.hinting_status().host_cmd,
        3,
        "it ends when the host says so"
    );
    rig.control.stop_hinting();
    rig.take_news();
    hint(&mut rig, 3, &pages);
    assert_eq!(rig.given(), [], "the guest may have them back already");
}

#[test]
fn a_run_of_hints_ends_where_the_guest_goes_on_elsewhere() {
    let mut rig = Rig::new(ALL);
    rig.control.start_hinting(false);
    rig.device.write_config(4, &9_u32.to_le_bytes());
    rig.device.stop().unwrap();
    let state = rig.device.save();
    let mut other = Rig::new(ALL);
    let session = other.device.stop().unwrap().unwrap();
    other.device.restore(&state).unwrap();
    assert_eq!(other.config(), [0, 9, 1, 0, 0]);
    other.device.start(session).unwrap();
    other.take_news();
    other.control.start_hinting(true);
    assert_eq!(other.config().get(2), Some(&3), "no number twice");
    other.device.stop().unwrap();
    other.device.reset_config();
    assert_eq!(other.config(), [0, 0, 0, 0, 0]);
}
