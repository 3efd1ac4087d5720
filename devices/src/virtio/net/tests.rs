//! The network device from its driver's side, with a socket for the tap: both have frames, and neither has half of one.
#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

use std::io::ErrorKind;
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use coracle_storage::limit::{RateLimiterConfig, TokenBucketConfig};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

mod pairs;

use super::*;
use crate::virtio::conformance::{BUFFERS, Subject, conforms};
use crate::virtio::device::{
    ActiveQueue, INTERRUPT_CONFIGURATION, INTERRUPT_NEEDS_RESET, Interrupt, Session, VirtioDevice,
};
use crate::virtio::ring::Virtqueue;
use crate::virtio::state::DeviceState;
use crate::virtio::testing::{DriverRing, Piece, memory};

const HEADER: usize = 12;
const SOON: Duration = Duration::from_secs(10);
/// Where the driver has what it sends.
const SENT: u64 = BUFFERS + 0x4_0000;

fn config() -> NetworkInterfaceConfig {
    serde_json::from_str(r#"{"iface_id": "eth0", "host_dev_name": "none"}"#).unwrap()
}

fn pair() -> (Tap, UnixDatagram) {
    let (ours, hosts) = UnixDatagram::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    (Tap::over([ours]), hosts)
}

/// A frame as a tap gives it: a header of zeros, and bytes that say where they are.
fn frame(len: usize) -> Vec<u8> {
    frame_in(0, len)
}

/// The same as a guest finds it, in so many buffers.
fn frame_in(buffers: u8, len: usize) -> Vec<u8> {
    let mut frame = vec![0; HEADER - 2];
    frame.extend([buffers, 0]);
    frame.extend((0..len).map(|at| u8::try_from(at % 251).unwrap()));
    frame
}

/// A device that serves, its driver, and the host beyond the tap.
struct Rig {
    device: Net,
    control: NetControl,
    host: UnixDatagram,
    rx: DriverRing,
    tx: DriverRing,
    commands: DriverRing,
    kicks: [Arc<EventFd>; 3],
    status: Arc<AtomicU32>,
}

impl Rig {
    fn new(config: &NetworkInterfaceConfig, features: u64) -> Self {
        let mut rig = Self::idle(config);
        rig.start(features);
        rig
    }

    fn idle(config: &NetworkInterfaceConfig) -> Self {
        let (tap, host) = pair();
        host.set_read_timeout(Some(SOON)).unwrap();
        let (device, control) = Net::new(config, tap, None).unwrap();
        let memory = memory(2 << 20);
        let ring = |base| DriverRing::new(&memory, base, 16);
        Self {
            device,
            control,
            host,
            rx: ring(0x1000),
            tx: ring(0x2000),
            commands: ring(0x3000),
            kicks: std::array::from_fn(|_| Arc::new(EventFd::new(EFD_NONBLOCK).unwrap())),
            status: Arc::default(),
        }
    }

    fn start(&mut self, features: u64) {
        let memory = Arc::clone(self.rx.memory());
        let rings = [&self.rx, &self.tx, &self.commands];
        let queues = rings.iter().zip(&self.kicks).map(|(driver, kick)| {
            Some(ActiveQueue {
                ring: Virtqueue::new(Arc::clone(&memory), driver.layout(), features).unwrap(),
                kick: Arc::clone(kick),
            })
        });
        let session = Session {
            queues: queues.collect(),
            memory,
            features,
            interrupt: Interrupt::new(
                Arc::clone(&self.status),
                Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()),
            ),
        };
        self.device.start(session).unwrap();
    }

    fn kick(&self, queue: usize) {
        self.kicks.get(queue).unwrap().write(1).unwrap();
    }

    /// Offers buffers of these lengths for frames, one after the other in memory, each a chain of its own.
    fn offer(&mut self, lengths: &[u32]) {
        let mut at = BUFFERS;
        for length in lengths {
            self.rx.offer_chain(&[Piece::Writable(at, *length)]);
            at += u64::from(*length);
        }
        self.kick(0);
    }

    fn received(&mut self, count: usize) -> Vec<(u32, u32)> {
        used(&mut self.rx, count)
    }

    fn send(&mut self, frame: &[u8]) {
        self.tx.write(SENT, frame);
        let len = u32::try_from(frame.len()).unwrap();
        // In two pieces, which the tap gets as one frame.
        self.tx
            .offer_chain(&[Piece::Readable(SENT, 5), Piece::Readable(SENT + 5, len - 5)]);
        self.kick(1);
    }

    fn heard(&self) -> Vec<u8> {
        let mut frame = vec![0; 1 << 17];
        let len = self.host.recv(&mut frame).unwrap();
        frame.truncate(len);
        frame
    }
}

/// What a driver is given back, when it is so much.
fn used(driver: &mut DriverRing, count: usize) -> Vec<(u32, u32)> {
    let deadline = Instant::now() + SOON;
    let mut used = Vec::new();
    while used.len() < count {
        assert!(Instant::now() < deadline, "only {used:?} came back");
        used.extend(driver.take_used());
        std::thread::sleep(Duration::from_micros(100));
    }
    used
}

fn comes(what: impl Fn() -> bool) {
    let deadline = Instant::now() + SOON;
    while !what() {
        assert!(Instant::now() < deadline, "it never comes");
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// What the next frame is full of.
static NEXT: AtomicU64 = AtomicU64::new(1);
const MERGES: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;

/// As much as is taken, until nobody is there to take it.
fn sends_for_ever(host: UnixDatagram) {
    host.set_nonblocking(true).unwrap();
    std::thread::spawn(move || {
        loop {
            // No frame is like the one before, whoever got that.
            match host.send(&NEXT.fetch_add(1, Ordering::Relaxed).to_le_bytes().repeat(4)) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    std::thread::sleep(Duration::from_micros(200));
                }
                Err(_) => return,
                Ok(_) => {}
            }
        }
    });
}

#[test]
fn the_network_device_keeps_the_promises_of_every_device() {
    conforms(&Subject {
        make: || {
            let (tap, host) = pair();
            sends_for_ever(host);
            Box::new(Net::new(&config(), tap, None).unwrap().0)
        },
        offer: |driver| {
            driver.offer_chain(&[Piece::Writable(BUFFERS, 64)]);
        },
        writes_buffers: true,
    });
}

#[test]
fn a_frame_goes_each_way_as_it_is() {
    let mut rig = Rig::new(&config(), 0);
    rig.send(&frame(1514));
    assert_eq!(rig.heard(), frame(1514));
    assert_eq!(used(&mut rig.tx, 1), [(0, 0)]);
    rig.offer(&[2000]);
    rig.host.send(&frame(1514)).unwrap();
    assert_eq!(rig.received(1), [(0, 1526)]);
    assert_eq!(rig.rx.read(BUFFERS, 1526), frame_in(1, 1514));
    let counts = rig.control.counts();
    let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
    assert_eq!((of(&counts.rx_frames), of(&counts.rx_bytes)), (1, 1514));
    assert_eq!((of(&counts.tx_frames), of(&counts.tx_bytes)), (1, 1514));
}

#[test]
fn a_frame_fills_as_many_buffers_as_it_needs_and_the_next_has_the_rest() {
    let mut rig = Rig::new(&config(), MERGES);
    rig.offer(&[1024, 1024, 1024, 512, 2048]);
    rig.host.send(&frame(3000)).unwrap();
    assert_eq!(rig.received(3), [(0, 1024), (1, 1024), (2, 964)]);
    assert_eq!(rig.rx.read(BUFFERS, 3012), frame_in(3, 3000));
    rig.host.send(&frame(100)).unwrap();
    assert_eq!(rig.received(1), [(3, 112)]);
    rig.host.send(&frame(1000)).unwrap();
    assert_eq!(rig.received(1), [(4, 1012)]);
    assert_eq!(rig.rx.read(BUFFERS + 3584, 1012), frame_in(1, 1000));
}

#[test]
fn the_longest_frame_waits_for_a_driver_that_has_had_room_for_it() {
    let mut rig = Rig::new(&config(), MERGES);
    rig.offer(&[0x4000; 5]);
    rig.host.send(&frame(65_000)).unwrap();
    let used = rig.received(4);
    assert_eq!(used.iter().map(|(_, len)| *len).sum::<u32>(), 65_012);
    // Now there is one buffer left, which it would not fit.
    rig.host.send(&frame(65_000)).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(rig.rx.take_used(), None);
    rig.offer(&[0x4000; 5]);
    assert_eq!(rig.received(4).iter().map(|(_, len)| *len).sum::<u32>(), 65_012);
    assert_eq!(rig.control.counts().rx_dropped.load(Ordering::Relaxed), 0);
}

#[test]
fn a_frame_that_does_not_fit_is_lost_and_its_buffers_are_not() {
    for features in [0, MERGES] {
        let mut rig = Rig::new(&config(), features);
        rig.offer(&[256, 256]);
        rig.host.send(&frame(1000)).unwrap();
        rig.host.send(&frame(100)).unwrap();
        assert_eq!(rig.received(1), [(0, 112)], "{features:#x}");
        assert_eq!(rig.control.counts().rx_dropped.load(Ordering::Relaxed), 1);
    }
}

#[test]
fn buffers_that_make_no_sense_are_given_back_and_none_that_do_is_lost() {
    for features in [0, MERGES] {
        let mut rig = Rig::new(&config(), features);
        rig.offer(&[512, 8]);
        // Readable only, and nowhere.
        rig.rx.offer_chain(&[Piece::Readable(BUFFERS, 512)]);
        rig.rx.offer_chain(&[Piece::Writable(1 << 40, 512)]);
        rig.rx.offer_chain(&[Piece::Writable(BUFFERS + 0x1000, 512)]);
        rig.kick(0);
        rig.host.send(&frame(100)).unwrap();
        let mut used = rig.received(1);
        rig.host.send(&frame(100)).unwrap();
        used.extend(rig.received(4));
        assert_eq!(
            used,
            [(0, 112), (1, 0), (2, 0), (3, 0), (4, 112)],
            "{features:#x}"
        );
        let session = rig.device.stop().unwrap().unwrap();
        let ring = &session.queues.first().unwrap().as_ref().unwrap().ring;
        assert_eq!(ring.in_flight(), 0);
        assert!(!ring.has_available());
    }
}

#[test]
fn buffers_that_wait_for_frames_are_in_the_ring_after_a_stop() {
    let mut rig = Rig::new(&config(), MERGES);
    rig.offer(&[1024, 1024, 1024]);
    rig.host.send(&frame(100)).unwrap();
    assert_eq!(rig.received(1), [(0, 112)]);
    let session = rig.device.stop().unwrap().unwrap();
    let state = session.queues.first().unwrap().as_ref().unwrap().ring.state();
    assert_eq!((state.next_avail, state.next_used), (1, 1));
    rig.device.start(session).unwrap();
    rig.host.send(&frame(1500)).unwrap();
    assert_eq!(rig.received(2), [(1, 1024), (2, 488)]);
}

#[test]
fn what_is_no_frame_is_not_sent() {
    let mut rig = Rig::new(&config(), 0);
    rig.send(&frame(0));
    rig.send(&frame(70_000));
    rig.send(&frame(60));
    assert_eq!(rig.heard(), frame(60));
    assert_eq!(used(&mut rig.tx, 3).len(), 3);
    assert_eq!(rig.control.counts().tx_guest_faults.load(Ordering::Relaxed), 2);
}

#[test]
fn a_host_that_takes_nothing_loses_nothing() {
    let mut rig = Rig::new(&config(), 0);
    let mut sent = 0;
    // As many as fit a socket, and some more.
    for _ in 0..64 {
        rig.send(&frame(60_000));
        sent += 1;
        if used(&mut rig.tx, 0).is_empty() && sent >= 8 {
            break;
        }
    }
    for _ in 0..sent {
        assert_eq!(rig.heard().len(), 60_012);
    }
    comes(|| rig.control.counts().tx_frames.load(Ordering::Relaxed) == sent);
    assert_eq!(rig.control.counts().tx_dropped.load(Ordering::Relaxed), 0);
}

fn limits(size: u64, refill_time: u64) -> RateLimiterConfig {
    RateLimiterConfig {
        bandwidth: Some(TokenBucketConfig {
            size,
            one_time_burst: None,
            refill_time,
        }),
        ops: None,
    }
}

#[test]
fn each_direction_has_its_limits_which_can_be_changed() {
    let mut limited = config();
    limited.tx_rate_limiter = Some(limits(1000, 3_600_000));
    limited.rx_rate_limiter = Some(limits(1000, 3_600_000));
    let mut rig = Rig::new(&limited, 0);
    rig.offer(&[2000, 2000]);
    for _ in 0..2 {
        rig.send(&frame(1000));
        rig.host.send(&frame(1000)).unwrap();
    }
    assert_eq!(rig.heard().len(), 1012);
    assert_eq!(rig.received(1), [(0, 1012)]);
    let counts = Arc::clone(rig.control.counts());
    comes(|| {
        counts.rx_throttled.load(Ordering::Relaxed) > 0 && counts.tx_throttled.load(Ordering::Relaxed) > 0
    });
    // None at all.
    rig.control.limit(Some(limits(0, 0)), None);
    assert_eq!(rig.received(1), [(1, 1012)]);
    assert_eq!(counts.tx_frames.load(Ordering::Relaxed), 1);
    rig.control.limit(None, Some(limits(0, 0)));
    assert_eq!(rig.heard().len(), 1012);
}

#[test]
fn a_guest_that_goes_on_elsewhere_is_asked_to_announce_itself_until_it_has() {
    let features = 1 << VIRTIO_NET_F_GUEST_ANNOUNCE;
    let mut rig = Rig::idle(&config());
    let status = |rig: &Rig| {
        let mut field = [0; 2];
        rig.device.read_config(6, &mut field);
        u16::from_le_bytes(field)
    };
    assert_eq!(status(&rig), 1);
    let state = DeviceState::Network(NetState { announces: false });
    rig.device.restore(&state).unwrap();
    rig.control.announce();
    rig.start(features);
    comes(|| rig.status.load(Ordering::SeqCst) & INTERRUPT_CONFIGURATION != 0);
    assert_eq!(status(&rig), 3);
    // Something that there is not, and VIRTIO_NET_CTRL_ANNOUNCE_ACK.
    for (command, answer) in [([0, 0], 1), ([3, 0], 0)] {
        rig.commands.write(SENT, &command);
        rig.commands
            .offer_chain(&[Piece::Readable(SENT, 2), Piece::Writable(SENT + 2, 1)]);
        rig.kick(2);
        let used = used(&mut rig.commands, 1);
        assert_eq!(used.first().map(|(_, written)| *written), Some(1));
        assert_eq!(rig.commands.read(SENT + 2, 1), [answer]);
    }
    assert_eq!(status(&rig), 1);
    assert_eq!(
        rig.device.save(),
        DeviceState::Network(NetState { announces: false })
    );
}

#[test]
fn for_a_driver_that_cannot_announce_itself_the_device_does() {
    let mut config = config();
    config.guest_mac = Some("06:00:ac:10:00:02".parse().unwrap());
    let rig = Rig::new(&config, 0);
    rig.control.announce();
    let heard = rig.heard();
    assert_eq!(heard.len(), HEADER + 60);
    let (header, frame) = heard.split_at(HEADER);
    assert_eq!(header, [0; HEADER]);
    let mac = [6, 0, 0xac, 0x10, 0, 2];
    let expected = [
        [0xff; 6].as_slice(),
        &mac,
        &[0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3],
        &mac,
        &[0; 4],
        &mac,
        &[0; 22],
    ];
    assert_eq!(frame, expected.concat());
    assert_eq!(rig.status.load(Ordering::SeqCst) & INTERRUPT_CONFIGURATION, 0);
}

#[test]
fn a_broken_ring_ends_the_device_until_it_is_reset() {
    let mut rig = Rig::new(&config(), 0);
    rig.tx.offer(99);
    rig.kick(1);
    comes(|| rig.status.load(Ordering::SeqCst) & INTERRUPT_NEEDS_RESET != 0);
    assert!(rig.device.stop().unwrap().is_some());
}

#[test]
fn the_configuration_has_what_was_asked_for() {
    let (tap, _host) = pair();
    let plain = Net::new(&config(), tap, None).unwrap().0;
    assert_eq!(
        plain.features() & (1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_MTU),
        0
    );
    let (tap, _host) = pair();
    let mut config = config();
    config.guest_mac = Some("06:00:AC:10:00:02".parse().unwrap());
    config.mtu = Some(9000);
    let device = Net::new(&config, tap, None).unwrap().0;
    assert_eq!(device.features() & (1 << VIRTIO_NET_F_MAC), 1 << VIRTIO_NET_F_MAC);
    assert_eq!(device.features() & (1 << VIRTIO_NET_F_MTU), 1 << VIRTIO_NET_F_MTU);
    let mut space = [0xff; 16];
    device.read_config(0, &mut space);
    assert_eq!(
        space,
        [6, 0, 0xac, 0x10, 0, 2, 1, 0, 0, 0, 0x28, 0x23, 0, 0, 0, 0]
    );
}

#[test]
fn an_address_is_six_pairs_of_digits() {
    let address: MacAddress = "06:00:ac:10:00:0F".parse().unwrap();
    assert_eq!(address.to_string(), "06:00:ac:10:00:0f");
    for wrong in [
        "",
        "06:00:ac:10:00",
        "06:00:ac:10:00:02:03",
        "06:00:ac:10:00:+2",
        "6:0:ac:10:0:2",
        "06-00-ac-10-00-02",
    ] {
        assert!(wrong.parse::<MacAddress>().is_err(), "{wrong}");
    }
}

#[test]
fn no_interface_has_such_a_name() {
    for name in ["", "sixteen-is-long-", "a b", "a/b", "tap%d"] {
        assert!(matches!(Tap::open(name, 1), Err(TapError::Name { .. })), "{name}");
    }
}

#[test]
fn what_is_no_descriptor_of_a_tap_is_refused_and_left_as_it_was() {
    let file = tempfile::tempfile().unwrap();
    let number = file.as_raw_fd().to_string();
    for number in ["", "-1", "+1", "01", "x", "1000000", "99999999999", &number] {
        let opened = Tap::open(&format!("/dev/fd/{number}"), 1);
        assert!(matches!(opened, Err(TapError::HandedIn { .. })), "{number}");
    }
    assert!(file.metadata().is_ok());
}
