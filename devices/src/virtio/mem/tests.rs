//! Memory that comes and goes from its driver's side, with a host that notes what it is asked.
#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::virtio::conformance::{BUFFERS, Subject, conforms, wait_until};
use crate::virtio::device::{ActiveQueue, INTERRUPT_CONFIGURATION, Interrupt, Notice, Session, VirtioDevice};
use crate::virtio::ring::{Chain, PopError, QueueLayout, Virtqueue};
use crate::virtio::state::{DeviceState, DeviceStateError};
use crate::virtio::testing::{DriverRing, Piece, memory};

const MIB: u64 = 1 << 20;
const START: u64 = 4 << 30;
const BLOCK: u64 = 2 * MIB;
const SLOT: u64 = 128 * MIB;
const SLOTS: u64 = 3;
const PER_SLOT: u64 = SLOT / BLOCK;

const ANSWER: u64 = BUFFERS + 0x100;
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;
const ACK: u16 = 0;
const NACK: u16 = 1;
const BUSY: u16 = 2;
const ERROR: u16 = 3;

/// What the host was asked.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Asked {
    Show(u64),
    Came(Range<u64>),
    Hide(u64),
    Discard(Range<u64>),
}

use Asked::{Came, Discard, Hide, Show};

#[derive(Clone, Default)]
struct Host {
    asked: Arc<Mutex<Vec<Asked>>>,
    refuses: Arc<AtomicBool>,
    /// What it was told is not plugged any more.
    gone: Arc<Mutex<Vec<Range<u64>>>>,
    /// Takes its time when it has been asked so often.
    holds_at: Arc<AtomicUsize>,
}

impl Host {
    fn take(&self, asked: Asked) -> io::Result<()> {
        // What was begun with the first slot has to be undone when the second one is refused.
        if self.refuses.load(Ordering::SeqCst) && asked == Show(1) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let mut all = self.asked.lock().unwrap();
        all.push(asked);
        let number = all.len();
        drop(all);
        wait_until(
            || self.holds_at.load(Ordering::SeqCst) != number,
            "the test lets it go",
        );
        Ok(())
    }
}

impl Slots for Host {
    fn show(&mut self, slot: u64) -> io::Result<()> {
        self.take(Show(slot))
    }

    fn came(&mut self, range: Range<u64>) {
        self.asked.lock().unwrap().push(Came(range));
    }

    fn goes(&mut self, range: Range<u64>) {
        self.gone.lock().unwrap().push(range);
    }

    fn hide(&mut self, slot: u64) -> io::Result<()> {
        self.take(Hide(slot))
    }

    fn discard(&mut self, range: Range<u64>) -> io::Result<()> {
        self.take(Discard(range))
    }
}

fn geometry() -> Geometry {
    Geometry {
        blocks: Arc::new(Blocks::new(START, SLOTS * SLOT, BLOCK)),
        slot_bytes: SLOT,
    }
}

fn config() -> MemoryHotplugConfig {
    serde_json::from_str(r#"{"total_size_mib": 384}"#).unwrap()
}

/// A device that serves, its driver, and what the host was asked.
struct Rig {
    device: Mem,
    control: MemControl,
    host: Host,
    blocks: Arc<Blocks>,
    memory: Arc<GuestMemoryMmap>,
    queue: DriverRing,
    kick: Arc<EventFd>,
    status: Arc<AtomicU32>,
    answered: u16,
}

impl Rig {
    fn new() -> Self {
        let mut rig = Self::stopped(geometry());
        rig.start();
        rig
    }

    /// One that does not serve yet.
    fn stopped(geometry: Geometry) -> Self {
        let memory = memory(4 << 20);
        let host = Host::default();
        let blocks = Arc::clone(&geometry.blocks);
        let (device, control) = Mem::new(geometry, Box::new(host.clone())).unwrap();
        Self {
            device,
            control,
            host,
            blocks,
            queue: DriverRing::new(&memory, 0x1000, 16),
            memory,
            kick: Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()),
            status: Arc::default(),
            answered: 0,
        }
    }

    fn start(&mut self) {
        let features = self.device.features() & !crate::virtio::ring::FEATURE_EVENT_IDX;
        let ring = Virtqueue::new(Arc::clone(&self.memory), self.queue.layout(), features).unwrap();
        let queue = ActiveQueue {
            ring,
            kick: Arc::clone(&self.kick),
        };
        let line = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let session = Session {
            memory: Arc::clone(&self.memory),
            features,
            queues: vec![Some(queue)],
            interrupt: Interrupt::new(Arc::clone(&self.status), line),
        };
        self.device.start(session).unwrap();
    }

    /// Sends the pieces, and says how many bytes were written.
    fn send(&mut self, pieces: &[Piece]) -> u32 {
        self.queue.offer_chain(pieces);
        self.kick.write(1).unwrap();
        self.answered += 1;
        wait_until(
            || self.queue.used_index() == self.answered,
            "each request is answered",
        );
        let (_, written) = self.queue.take_used().unwrap();
        written
    }

    /// What a request is answered, and the state that goes with it.
    fn ask(&mut self, kind: u16, address: u64, blocks: u64) -> (u16, u16) {
        self.queue.write(BUFFERS, &request(kind, address, blocks));
        self.queue.write(ANSWER, &[0xee; 12]);
        let pieces = [Piece::Readable(BUFFERS, 24), Piece::Writable(ANSWER, 12)];
        assert_eq!(self.send(&pieces), 10);
        let answer = self.queue.read(ANSWER, 12);
        assert_eq!(
            answer.get(10..),
            Some(&[0xee; 2][..]),
            "no more is written than there is"
        );
        let half = |at: usize| u16::from_le_bytes(*answer.get(at..).unwrap().first_chunk().unwrap());
        (half(0), half(8))
    }

    fn plug(&mut self, block: u64, blocks: u64) -> u16 {
        self.ask(PLUG, START + block * BLOCK, blocks).0
    }

    fn unplug(&mut self, block: u64, blocks: u64) -> u16 {
        self.ask(UNPLUG, START + block * BLOCK, blocks).0
    }

    /// Plugged, unplugged, or both.
    fn state(&mut self, block: u64, blocks: u64) -> u16 {
        let (answer, state) = self.ask(STATE, START + block * BLOCK, blocks);
        assert_eq!(answer, ACK);
        state
    }

    /// What the host was asked since; what is discarded piece by piece, as a whole.
    fn asked(&self) -> Vec<Asked> {
        let mut asked: Vec<Asked> = Vec::new();
        for next in std::mem::take(&mut *self.host.asked.lock().unwrap()) {
            match (asked.last_mut(), next) {
                (Some(Discard(before)), Discard(piece)) if before.end == piece.start => {
                    before.end = piece.end
                }
                (_, next) => asked.push(next),
            }
        }
        asked
    }

    fn plugged_mib(&self) -> u64 {
        self.control.status(&config()).plugged_size_mib
    }
}

fn request(kind: u16, address: u64, blocks: u64) -> [u8; 24] {
    let mut bytes = [0x77; 24];
    bytes[..2].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&address.to_le_bytes());
    bytes[16..18].copy_from_slice(&u16::try_from(blocks).unwrap().to_le_bytes());
    bytes
}

fn bytes(blocks: Range<u64>) -> Range<u64> {
    blocks.start * BLOCK..blocks.end * BLOCK
}

#[test]
fn memory_that_comes_keeps_the_promises_of_every_device() {
    conforms(&Subject {
        make: || Box::new(Mem::new(geometry(), Box::new(Host::default())).unwrap().0),
        offer: |driver| {
            driver.write(BUFFERS, &request(UNPLUG, START, 1));
            // Into a page that the test fills before each request, as the answer is always the same.
            driver.offer_chain(&[
                Piece::Readable(BUFFERS, 24),
                Piece::Writable(BUFFERS + 0x1000, 10),
            ]);
        },
        writes_buffers: true,
    });
}

#[test]
fn the_configuration_space_tells_the_region_and_what_is_requested_of_it() {
    let rig = Rig::new();
    rig.control.request(130);
    let mut space = [0; 60];
    rig.device.read_config(0, &mut space);
    let words: Vec<u64> = space[..56]
        .as_chunks()
        .0
        .iter()
        .map(|word| u64::from_le_bytes(*word))
        .collect();
    assert_eq!(words, [BLOCK, 0, START, SLOTS * SLOT, 2 * SLOT, 0, 130 * MIB]);
    let is_told = || rig.status.load(Ordering::SeqCst) & INTERRUPT_CONFIGURATION != 0;
    wait_until(is_told, "the driver is told of another size");
    let status = rig.control.status(&config());
    assert_eq!((status.plugged_size_mib, status.requested_size_mib), (0, 130));
}

#[test]
fn the_guest_reaches_a_slot_while_a_block_of_it_is_plugged() {
    let mut rig = Rig::new();
    rig.control.request(200);
    assert_eq!(rig.plug(3, 2), ACK);
    assert_eq!(rig.asked(), [Show(0), Came(bytes(3..5))]);
    assert_eq!(rig.plug(PER_SLOT - 1, 2), ACK);
    assert_eq!(rig.asked(), [Show(1), Came(bytes(PER_SLOT - 1..PER_SLOT + 1))]);
    assert_eq!([rig.state(3, 2), rig.state(5, 2), rig.state(2, 2)], [0, 1, 2]);
    assert_eq!(rig.plugged_mib(), 8);
    assert_eq!(rig.unplug(3, 1), ACK);
    assert_eq!(rig.asked(), [Discard(bytes(3..4))]);
    // With its last block a slot goes as a whole.
    assert_eq!(rig.unplug(PER_SLOT, 1), ACK);
    assert_eq!(rig.asked(), [Hide(1), Discard(SLOT..2 * SLOT)]);
    assert_eq!(rig.ask(UNPLUG_ALL, u64::MAX, 7).0, ACK);
    assert_eq!(rig.asked(), [Hide(0), Discard(0..SLOT)]);
    assert_eq!(rig.plugged_mib(), 0);
}

#[test]
fn what_makes_no_sense_is_an_error_and_changes_nothing() {
    let mut rig = Rig::new();
    rig.control.request(200);
    assert_eq!(rig.plug(1, 1), ACK);
    rig.asked();
    let usable = 2 * PER_SLOT;
    for kind in [PLUG, UNPLUG, STATE] {
        for (address, blocks) in [
            (START, 0),
            (START + 1, 1),
            (START + BLOCK / 2, 1),
            (START - BLOCK, 1),
            (START - BLOCK, 2),
            (0, 1),
            (u64::MAX, 1),
            (u64::MAX - BLOCK + 1, u64::from(u16::MAX)),
            (START + usable * BLOCK, 1),
            (START + (usable - 1) * BLOCK, 2),
            (START, u64::from(u16::MAX)),
            (START + SLOTS * SLOT, 1),
        ] {
            assert_eq!(
                rig.ask(kind, address, blocks).0,
                ERROR,
                "{kind} {address:#x} {blocks}"
            );
        }
    }
    assert_eq!(rig.plug(0, 2), ERROR, "one of them is plugged");
    assert_eq!(rig.unplug(1, 2), ERROR, "one of them is not");
    assert_eq!(rig.unplug(0, 1), ERROR);
    for kind in [4, 0x100, u16::MAX] {
        assert_eq!(rig.ask(kind, START, 1).0, ERROR);
    }
    assert_eq!(rig.asked(), []);
    assert_eq!(rig.plugged_mib(), 2);
}

#[test]
fn a_request_without_its_parts_does_nothing() {
    let mut rig = Rig::new();
    rig.control.request(2);
    rig.queue.write(BUFFERS, &request(PLUG, START, 1));
    for (pieces, written) in [
        (vec![Piece::Readable(BUFFERS, 24)], 0),
        (vec![Piece::Readable(BUFFERS, 24), Piece::Writable(ANSWER, 9)], 0),
        (vec![Piece::Writable(ANSWER, 24)], 10),
        (
            vec![Piece::Readable(BUFFERS, 23), Piece::Writable(ANSWER, 10)],
            10,
        ),
    ] {
        rig.queue.write(ANSWER, &[0; 10]);
        assert_eq!(rig.send(&pieces), written, "{pieces:?}");
        let expected = if written == 10 { 3 } else { 0 };
        assert_eq!(rig.queue.read(ANSWER, 1), [expected], "{pieces:?}");
    }
    assert_eq!(rig.asked(), []);
    assert_eq!(rig.control.counts().guest_faults.load(Ordering::Relaxed), 4);
    // In pieces it is a request as any other.
    let pieces = [
        Piece::Readable(BUFFERS, 7),
        Piece::Readable(BUFFERS + 7, 17),
        Piece::Writable(ANSWER, 3),
        Piece::Writable(ANSWER + 3, 7),
    ];
    assert_eq!(rig.send(&pieces), 10);
    assert_eq!(rig.plugged_mib(), 2);
}

#[test]
fn no_more_is_plugged_than_is_requested() {
    let mut rig = Rig::new();
    assert_eq!(rig.plug(0, 1), ERROR, "nothing is usable yet");
    rig.control.request(6);
    assert_eq!(rig.plug(0, 4), NACK);
    assert_eq!(rig.plug(0, 2), ACK);
    assert_eq!(rig.plug(2, 2), NACK);
    assert_eq!(rig.plug(2, 1), ACK);
    // What is there stays until the driver gives it back.
    rig.control.request(2);
    assert_eq!(rig.plugged_mib(), 6);
    assert_eq!(rig.plug(3, 1), NACK);
    assert_eq!(rig.unplug(0, 3), ACK);
    assert_eq!(rig.plug(3, 1), ACK);
    assert_eq!(rig.control.counts().plug.fails.load(Ordering::Relaxed), 4);
}

#[test]
fn less_is_usable_again_once_nothing_is_plugged() {
    let mut rig = Rig::new();
    rig.control.request(384);
    rig.control.request(2);
    assert_eq!(rig.plug(2 * PER_SLOT, 1), ACK);
    assert_eq!(rig.ask(UNPLUG_ALL, 0, 0).0, ACK);
    assert_eq!(rig.plug(2 * PER_SLOT, 1), ERROR);
    assert_eq!(rig.plug(0, 1), ACK);
}

/// Has a request taken, and stops the device when the host is asked the number `asked`. Says what the host was asked by then, and
/// whether the request was answered; after that the device goes on. What is saved meanwhile has nothing plugged.
fn recalled(rig: &mut Rig, request: [u8; 24], asked: usize) -> (Vec<Asked>, bool) {
    rig.queue.write(BUFFERS, &request);
    rig.queue.write(ANSWER, &[0xee; 10]);
    rig.asked();
    rig.host.holds_at.store(asked, Ordering::SeqCst);
    rig.queue
        .offer_chain(&[Piece::Readable(BUFFERS, 24), Piece::Writable(ANSWER, 10)]);
    rig.kick.write(1).unwrap();
    wait_until(
        || rig.host.asked.lock().unwrap().len() == asked,
        "the host is asked",
    );
    rig.device.begin_stop(&Notice::default());
    rig.host.holds_at.store(0, Ordering::SeqCst);
    let session = rig.device.stop().unwrap().unwrap();
    let is_answered = rig.queue.used_index() > rig.answered;
    let found = (rig.asked(), is_answered);
    let DeviceState::Memory(saved) = rig.device.save() else {
        panic!("it has another state");
    };
    assert_eq!(saved.plugged, [0; 3]);
    rig.device.start(session).unwrap();
    rig.answered += 1;
    wait_until(|| rig.queue.used_index() == rig.answered, "it is answered");
    assert_eq!(rig.queue.read(ANSWER, 1), [0]);
    rig.queue.take_used().unwrap();
    found
}

#[test]
fn a_stop_comes_amid_what_goes_back_and_nothing_is_plugged_before_all_is_back() {
    for (kind, blocks) in [(UNPLUG, 2 * PER_SLOT), (UNPLUG_ALL, 0)] {
        let mut rig = Rig::new();
        rig.control.request(256);
        assert_eq!(rig.plug(0, 2 * PER_SLOT), ACK);
        // A slot is hidden, and one is not.
        let found = recalled(&mut rig, request(kind, START, blocks), 1);
        assert_eq!(found, (vec![Hide(0)], true), "{kind}");
        assert_eq!(rig.plugged_mib(), 0);
        assert_eq!(rig.plug(1, 1), ACK);
        let expected = [Hide(1), Discard(0..2 * SLOT), Show(0), Came(bytes(1..2))];
        assert_eq!(rig.asked(), expected, "{kind}");
        // The slot is hidden, and of its memory one piece is back.
        let found = recalled(&mut rig, request(kind, START + BLOCK, 1), 2);
        assert_eq!(found, (vec![Hide(0), Discard(0..16 * MIB)], true), "{kind}");
        assert_eq!(rig.plug(1, 1), ACK);
        let expected = [Discard(16 * MIB..SLOT), Show(0), Came(bytes(1..2))];
        assert_eq!(rig.asked(), expected, "{kind}");
    }
}

#[test]
fn what_was_unplugged_goes_back_after_a_reset_though_no_driver_comes() {
    let mut rig = Rig::new();
    rig.control.request(256);
    assert_eq!(rig.plug(0, 2 * PER_SLOT), ACK);
    rig.asked();
    rig.queue.write(BUFFERS, &request(UNPLUG_ALL, 0, 0));
    rig.host.holds_at.store(1, Ordering::SeqCst);
    rig.queue
        .offer_chain(&[Piece::Readable(BUFFERS, 24), Piece::Writable(ANSWER, 10)]);
    rig.kick.write(1).unwrap();
    wait_until(|| rig.host.asked.lock().unwrap().len() == 1, "the host is asked");
    // Whoever saves the guest now has to know of both.
    assert_eq!(*rig.host.gone.lock().unwrap(), [0..SLOT, SLOT..2 * SLOT]);
    rig.device.begin_stop(&Notice::default());
    rig.host.holds_at.store(0, Ordering::SeqCst);
    rig.device.stop().unwrap().unwrap();
    assert_eq!(rig.asked(), [Hide(0)]);
    rig.device.reset_config();
    wait_until(
        || rig.host.asked.lock().unwrap().last() == Some(&Discard(2 * SLOT - 16 * MIB..2 * SLOT)),
        "all of it is back",
    );
    assert_eq!(rig.asked(), [Hide(1), Discard(0..2 * SLOT)]);
}

#[test]
fn a_request_to_plug_that_is_recalled_is_undone_and_done_again() {
    let mut rig = Rig::new();
    rig.control.request(384);
    let plug = request(PLUG, START, 3 * PER_SLOT);
    let found = recalled(&mut rig, plug, 2);
    assert_eq!(found, (vec![Show(0), Show(1)], false));
    let all = [Show(0), Show(1), Show(2), Came(0..3 * SLOT)];
    let undone = [Hide(0), Hide(1), Discard(0..2 * SLOT)];
    assert_eq!(rig.asked(), [&undone[..], &all].concat());
    assert_eq!(rig.plugged_mib(), 384);
    assert_eq!(rig.control.counts().plug.count.load(Ordering::Relaxed), 1);
}

#[test]
fn a_slot_of_very_many_blocks_is_not_looked_through_for_each_of_them() {
    const SIZE: u64 = 256 << 30;
    let mut rig = Rig::stopped(Geometry {
        blocks: Arc::new(Blocks::new(START, SIZE, BLOCK)),
        slot_bytes: SIZE,
    });
    let words = usize::try_from(SIZE / BLOCK / 64).unwrap();
    let state = MemState {
        requested_bytes: SIZE,
        usable_bytes: SIZE,
        // As many ranges as there can be.
        plugged: vec![0x5555_5555_5555_5555; words],
    };
    rig.device.restore(&DeviceState::Memory(state)).unwrap();
    rig.start();
    assert_eq!(rig.plugged_mib(), SIZE / MIB / 2);
    // Answered in time: with each range all blocks again, it would take minutes.
    assert_eq!(rig.ask(UNPLUG_ALL, 0, 0).0, ACK);
    assert_eq!(rig.plugged_mib(), 0);
    let asked = rig.asked();
    assert_eq!(asked.iter().filter(|asked| **asked == Hide(0)).count(), 1);
}

#[test]
fn what_the_host_cannot_show_is_not_plugged() {
    let mut rig = Rig::new();
    rig.control.request(384);
    rig.host.refuses.store(true, Ordering::SeqCst);
    assert_eq!(rig.plug(PER_SLOT - 1, 2), BUSY);
    assert_eq!(rig.asked(), [Show(0), Hide(0), Discard(0..SLOT)]);
    assert_eq!(rig.plugged_mib(), 0);
    rig.host.refuses.store(false, Ordering::SeqCst);
    assert_eq!(rig.plug(PER_SLOT - 1, 2), ACK);
    let came = Came(bytes(PER_SLOT - 1..PER_SLOT + 1));
    assert_eq!(rig.asked(), [Show(0), Show(1), came]);
}

#[test]
fn what_is_plugged_goes_along() {
    let mut rig = Rig::new();
    rig.control.request(200);
    assert_eq!(rig.plug(3, 2), ACK);
    rig.device.stop().unwrap();
    let saved = rig.device.save();
    let mut second = Rig::new();
    second.device.stop().unwrap();
    second.device.restore(&saved).unwrap();
    assert_eq!(second.asked(), [Show(0)]);
    assert_eq!(second.device.save(), saved);
    second.start();
    assert_eq!(second.plugged_mib(), 4);
    assert_eq!([second.state(3, 2), second.state(2, 1)], [0, 1]);
    assert_eq!(second.plug(PER_SLOT, 1), ACK);
}

#[test]
fn a_state_that_no_region_has_is_refused_and_shows_nothing() {
    let mut rig = Rig::new();
    rig.device.stop().unwrap();
    let good = MemState {
        requested_bytes: 4 * MIB,
        usable_bytes: SLOT,
        plugged: vec![1, 0, 0],
    };
    for bad in [
        MemState {
            requested_bytes: 4 * SLOT,
            ..good.clone()
        },
        MemState {
            requested_bytes: MIB,
            ..good.clone()
        },
        MemState {
            requested_bytes: u64::MAX,
            ..good.clone()
        },
        MemState {
            usable_bytes: 4 * SLOT,
            ..good.clone()
        },
        MemState {
            usable_bytes: SLOT + BLOCK,
            ..good.clone()
        },
        MemState {
            usable_bytes: 0,
            ..good.clone()
        },
        MemState {
            plugged: vec![0, 1, 0],
            ..good.clone()
        },
        MemState {
            plugged: vec![1, 0],
            ..good.clone()
        },
        MemState {
            plugged: vec![1, 0, 0, 0],
            ..good.clone()
        },
        MemState {
            plugged: vec![],
            ..good.clone()
        },
    ] {
        let refused = rig.device.restore(&DeviceState::Memory(bad.clone())).unwrap_err();
        assert!(matches!(refused, DeviceStateError::Memory(_)), "{bad:?}");
        assert_eq!(rig.blocks.plugged().count(), 0, "{bad:?}");
    }
    assert!(rig.device.restore(&DeviceState::Entropy).is_err());
    assert_eq!(rig.asked(), []);
    rig.device.restore(&DeviceState::Memory(good)).unwrap();
}

/// A memory with a region behind it, and a queue of another device.
fn restricted() -> (Arc<GuestMemoryMmap>, Arc<Blocks>, DriverRing) {
    let ranges = [(GuestAddress(0), 4 << 20), (GuestAddress(START), 8 << 20)];
    let memory = Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
    let blocks = Arc::new(Blocks::new(START, 8 * MIB, BLOCK));
    let driver = DriverRing::new(&memory, 0x1000, 16);
    (memory, blocks, driver)
}

#[test]
fn what_is_not_plugged_is_no_memory_for_other_devices() {
    let (memory, blocks, mut driver) = restricted();
    let mut ring = Virtqueue::new(memory, driver.layout(), 1 << 32).unwrap();
    ring.restrict(Arc::clone(&blocks)).unwrap();
    let mut is_taken = |address: u64, len: u32| {
        driver.offer_chain(&[Piece::Writable(address, len)]);
        let mut chain = Chain::default();
        let popped = ring.pop(&mut chain);
        let head = match popped {
            Ok(true) => chain.head,
            Err(PopError::Malformed { head, .. }) => head,
            other => panic!("{other:?}"),
        };
        ring.push(head, 0);
        ring.publish();
        driver.take_used();
        popped.is_ok()
    };
    assert!(!is_taken(START, 1));
    blocks.set(1..3, blocks::BlockState::Plugged);
    let last = 3 * BLOCK - 1;
    for (offset, len, expected) in [
        (BLOCK, 1, true),
        (BLOCK, 4 << 20, true),
        (BLOCK, (4 << 20) + 1, false),
        (BLOCK - 1, 1, false),
        (BLOCK - 1, 2, false),
        (last, 1, true),
        (last, 2, false),
        (0, 8 << 20, false),
    ] {
        assert_eq!(is_taken(START + offset, len), expected, "{offset:#x} {len:#x}");
    }
    assert!(is_taken(0x2_0000, 4096), "the rest is memory as ever");
    blocks.set(1..3, blocks::BlockState::Unplugged);
    assert!(!is_taken(START + BLOCK, 1));
}

#[test]
fn rings_lie_in_what_is_plugged() {
    let (memory, blocks, driver) = restricted();
    let good = driver.layout();
    let there = START + BLOCK;
    for layout in [
        QueueLayout {
            descriptors: there,
            ..good
        },
        QueueLayout { avail: there, ..good },
        QueueLayout { used: there, ..good },
    ] {
        let mut ring = Virtqueue::new(Arc::clone(&memory), layout, 1 << 32).unwrap();
        blocks.set(1..2, blocks::BlockState::Unplugged);
        assert!(ring.restrict(Arc::clone(&blocks)).is_err(), "{layout:?}");
        blocks.set(1..2, blocks::BlockState::Plugged);
        assert!(ring.restrict(Arc::clone(&blocks)).is_ok(), "{layout:?}");
    }
}
