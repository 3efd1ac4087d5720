//! A device with two pairs of queues, from the side of a driver that uses one of them or both.

use super::*;
use crate::mmds::{Mmds, Stack};

const PAIRS: usize = 2;
/// Where the queue of commands is: of a driver that knows of pairs, and of one that does not.
const COMMANDS: usize = 4;
const COMMANDS_OF_OLD: usize = 2;
const KNOWS: u64 = 1 << virtio_bindings::virtio_net::VIRTIO_NET_F_MQ;
/// Where commands are.
const COMMAND: u64 = BUFFERS + 0x5_0000;
const OK: u8 = 0;
const ERR: u8 = 1;

struct TwoPairs {
    device: Net,
    control: NetControl,
    hosts: Vec<UnixDatagram>,
    memory: Arc<vm_memory::GuestMemoryMmap>,
    queues: Vec<DriverRing>,
    kicks: Vec<Arc<EventFd>>,
    status: Arc<AtomicU32>,
}

impl TwoPairs {
    fn idle(config: &NetworkInterfaceConfig) -> Self {
        Self::with(config, None)
    }

    fn with(config: &NetworkInterfaceConfig, metadata: Option<Stack>) -> Self {
        let ends = (0..PAIRS).map(|_| {
            let (ours, host) = UnixDatagram::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            host.set_read_timeout(Some(SOON)).unwrap();
            (ours, host)
        });
        let (ours, hosts): (Vec<_>, Vec<_>) = ends.unzip();
        let (device, control) = Net::new(config, Tap::over(ours), metadata).unwrap();
        let memory = memory(2 << 20);
        let mut two = Self {
            device,
            control,
            hosts,
            queues: Vec::new(),
            kicks: Vec::new(),
            memory,
            status: Arc::default(),
        };
        two.forget();
        two
    }

    /// What a driver does that begins anew.
    fn forget(&mut self) {
        let ring = |queue: u64| DriverRing::new(&self.memory, 0x1000 * (1 + queue), 16);
        self.queues = (0..5).map(ring).collect();
        self.kicks = (0..5)
            .map(|_| Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()))
            .collect();
    }

    fn new(features: u64) -> Self {
        let mut two = Self::idle(&config());
        two.start(features);
        two
    }

    fn start(&mut self, features: u64) {
        let queues = self.queues.iter().zip(&self.kicks).map(|(driver, kick)| {
            Some(ActiveQueue {
                ring: Virtqueue::new(Arc::clone(&self.memory), driver.layout(), features).unwrap(),
                kick: Arc::clone(kick),
            })
        });
        let session = Session {
            queues: queues.collect(),
            memory: Arc::clone(&self.memory),
            features,
            interrupt: Interrupt::new(
                Arc::clone(&self.status),
                Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()),
            ),
        };
        self.device.start(session).unwrap();
    }

    fn queue(&mut self, number: usize) -> &mut DriverRing {
        self.queues.get_mut(number).unwrap()
    }

    fn kick(&self, queue: usize) {
        self.kicks.get(queue).unwrap().write(1).unwrap();
    }

    /// What a command of one of the queues is answered.
    fn command_by(&mut self, queue: usize, command: &[u8]) -> u8 {
        let ring = self.queue(queue);
        ring.write(COMMAND, command);
        ring.write(COMMAND + 16, &[0xee]);
        let length = u32::try_from(command.len()).unwrap();
        ring.offer_chain(&[Piece::Readable(COMMAND, length), Piece::Writable(COMMAND + 16, 1)]);
        self.kick(queue);
        assert_eq!(used(self.queue(queue), 1).len(), 1);
        self.queue(queue).read(COMMAND + 16, 1).first().copied().unwrap()
    }

    /// VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET
    fn use_pairs(&mut self, pairs: u16) -> u8 {
        let [low, high] = pairs.to_le_bytes();
        self.command_by(COMMANDS, &[4, 0, low, high])
    }

    /// Offers a buffer for a frame of this pair.
    fn offer(&mut self, pair: usize) {
        let at = BUFFERS + 0x1000 * pair as u64;
        self.queue(2 * pair).offer_chain(&[Piece::Writable(at, 2000)]);
        self.kick(2 * pair);
    }

    fn host_sends(&self, pair: usize) {
        self.hosts.get(pair).unwrap().send(&frame(100)).unwrap();
    }

    fn sends(&mut self, pair: usize, length: usize) {
        self.sends_as_it_is(pair, &frame(length));
    }

    /// Sends a header and a frame.
    fn sends_as_it_is(&mut self, pair: usize, frame: &[u8]) {
        let at = SENT + 0x2_0000 * pair as u64;
        let queue = self.queue(2 * pair + 1);
        queue.write(at, frame);
        queue.offer_chain(&[Piece::Readable(at, u32::try_from(frame.len()).unwrap())]);
        self.kick(2 * pair + 1);
    }

    fn host_hears(&self, pair: usize) -> usize {
        self.hosts.get(pair).unwrap().recv(&mut [0; 1 << 17]).unwrap()
    }

    /// Nothing comes of it, for longer than anything takes.
    fn is_left_alone(&mut self, queue: usize) {
        std::thread::sleep(Duration::from_millis(30));
        assert_eq!(self.queue(queue).take_used(), None, "queue {queue}");
    }

    fn pairs_saved(&self) -> u16 {
        match self.device.save() {
            DeviceState::MultiqueueNetwork(MultiqueueState { pairs, .. }) => pairs,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_device_with_pairs_keeps_the_promises_of_every_device() {
    conforms(&Subject {
        make: || {
            let (ours, host) = UnixDatagram::pair().unwrap();
            let (other, _) = UnixDatagram::pair().unwrap();
            for socket in [&ours, &other] {
                socket.set_nonblocking(true).unwrap();
            }
            sends_for_ever(host);
            let tap = Tap::over([ours, other]);
            Box::new(Net::new(&config(), tap, None).unwrap().0)
        },
        offer: |driver| {
            driver.offer_chain(&[Piece::Writable(BUFFERS, 64)]);
        },
        writes_buffers: true,
    });
}

#[test]
fn a_driver_is_told_of_pairs_where_there_are_several() {
    let two = TwoPairs::idle(&config());
    assert_eq!(two.device.features() & KNOWS, KNOWS);
    let mut field = [0; 2];
    two.device.read_config(8, &mut field);
    assert_eq!(u16::from_le_bytes(field), 2);
    assert_eq!(two.device.queue_sizes_max().len(), 5);
    let (tap, _host) = pair();
    let one = Net::new(&config(), tap, None).unwrap().0;
    assert_eq!(one.features() & KNOWS, 0);
    assert_eq!(one.queue_sizes_max().len(), 3);
    one.read_config(8, &mut field);
    assert_eq!(u16::from_le_bytes(field), 0);
}

#[test]
fn the_second_pair_is_used_when_the_driver_says_so_and_until_it_says_otherwise() {
    let mut two = TwoPairs::new(KNOWS);
    two.offer(0);
    two.offer(1);
    two.host_sends(1);
    two.is_left_alone(2);
    assert_eq!(two.use_pairs(2), OK);
    assert_eq!(used(two.queue(2), 1), [(0, 112)]);
    two.sends(1, 100);
    assert_eq!(two.host_hears(1), 112);
    two.host_sends(0);
    assert_eq!(used(two.queue(0), 1), [(0, 112)]);
    two.sends(0, 200);
    assert_eq!(two.host_hears(0), 212);

    two.offer(0);
    two.offer(1);
    assert_eq!(two.use_pairs(1), OK);
    two.host_sends(1);
    two.is_left_alone(2);
    two.host_sends(0);
    assert_eq!(used(two.queue(0), 1), [(1, 112)]);
    assert_eq!(two.use_pairs(2), OK);
    assert_eq!(used(two.queue(2), 1), [(1, 112)]);
}

/// Whoever gives a pair up waits for what it has sent by it.
#[test]
fn what_was_sent_by_a_pair_that_is_not_used_any_more_is_sent() {
    let mut two = TwoPairs::new(KNOWS);
    assert_eq!(two.use_pairs(2), OK);
    // The host takes no more of these than fit a socket.
    for _ in 0..8 {
        two.sends(1, 60_000);
    }
    assert_eq!(two.use_pairs(1), OK);
    for _ in 0..8 {
        assert_eq!(two.host_hears(1), 60_012);
    }
    assert_eq!(used(two.queue(3), 8).len(), 8);
}

#[test]
fn there_are_no_other_pairs() {
    let mut two = TwoPairs::new(KNOWS);
    for pairs in [0, 3, 0x8000, 0xffff] {
        assert_eq!(two.use_pairs(pairs), ERR, "{pairs}");
    }
    for command in [&[4, 0, 2][..], &[4, 0], &[4, 1, 2, 0], &[4], &[]] {
        assert_eq!(two.command_by(COMMANDS, command), ERR, "{command:?}");
    }
    assert_eq!(two.pairs_saved(), 1);
}

#[test]
fn a_driver_that_does_not_know_of_pairs_has_one_and_commands_behind_it() {
    let mut two = TwoPairs::new(0);
    assert_eq!(two.command_by(COMMANDS_OF_OLD, &[4, 0, 2, 0]), ERR);
    assert_eq!(two.command_by(COMMANDS_OF_OLD, &[3, 0]), OK);
    two.sends(0, 100);
    assert_eq!(two.host_hears(0), 112);
    two.offer(0);
    two.host_sends(0);
    assert_eq!(used(two.queue(0), 1), [(0, 112)]);
    // With the first worker, which leaves it alone.
    two.sends(1, 100);
    two.is_left_alone(3);
    let session = two.device.stop().unwrap().unwrap();
    assert!(session.queues.iter().all(Option::is_some), "all are given back");
}

#[test]
fn pairs_are_used_still_after_a_stop_and_elsewhere_and_not_after_a_reset() {
    let mut two = TwoPairs::new(KNOWS);
    assert_eq!(two.use_pairs(2), OK);
    let session = two.device.stop().unwrap().unwrap();
    assert!(session.queues.iter().all(Option::is_some));
    let saved = two.device.save();
    two.device.start(session).unwrap();
    two.sends(1, 100);
    assert_eq!(two.host_hears(1), 112);
    assert!(two.device.stop().unwrap().is_some());
    two.device.reset_config();
    two.forget();
    two.start(KNOWS);
    two.offer(1);
    two.host_sends(1);
    two.is_left_alone(2);

    let mut elsewhere = TwoPairs::idle(&config());
    elsewhere.device.restore(&saved).unwrap();
    elsewhere.start(KNOWS);
    elsewhere.offer(1);
    elsewhere.host_sends(1);
    assert_eq!(used(elsewhere.queue(2), 1), [(0, 112)]);
    assert_eq!(elsewhere.pairs_saved(), 2);
}

#[test]
fn no_more_pairs_are_restored_than_there_are() {
    let state = |pairs| {
        DeviceState::MultiqueueNetwork(MultiqueueState {
            announces: true,
            pairs,
        })
    };
    let mut two = TwoPairs::idle(&config());
    for pairs in [0, 3, u16::MAX] {
        let refused = two.device.restore(&state(pairs));
        assert!(refused.unwrap_err().to_string().contains("pairs of queues"));
    }
    let untouched = MultiqueueState {
        announces: false,
        pairs: 1,
    };
    assert_eq!(two.device.save(), DeviceState::MultiqueueNetwork(untouched));
    let (tap, _host) = pair();
    let mut one = Net::new(&config(), tap, None).unwrap().0;
    assert!(one.restore(&state(2)).is_err());
    assert!(one.restore(&state(1)).is_ok());
    // A driver that has not accepted pairs has one, whatever a file says.
    two.device.restore(&state(2)).unwrap();
    two.start(0);
    comes(|| two.pairs_saved() == 1);
}

#[test]
fn both_pairs_have_the_limits_together() {
    let mut limited = config();
    limited.tx_rate_limiter = Some(limits(1000, 3_600_000));
    let mut two = TwoPairs::idle(&limited);
    two.start(KNOWS);
    assert_eq!(two.use_pairs(2), OK);
    two.sends(0, 1000);
    assert_eq!(two.host_hears(0), 1012);
    // The first may have left a debt; without one, a frame does not wait for all of its tokens, which others could take away.
    two.sends(1, 1000);
    assert_eq!(used(two.queue(1), 1).len(), 1);
    two.is_left_alone(3);
    let counts = Arc::clone(two.control.counts());
    comes(|| counts.tx_throttled.load(Ordering::Relaxed) > 0);
    two.control.limit(None, Some(limits(0, 0)));
    assert_eq!(two.host_hears(1), 1012);
}

#[test]
fn metadata_is_told_by_the_pair_by_which_it_is_asked_for() {
    let service = [169, 254, 169, 254];
    let guest = [6, 0, 0xac, 0x10, 0, 2];
    let stack = Stack::new(Arc::new(Mmds::new()), service.into());
    let mut two = TwoPairs::with(&config(), Some(stack));
    two.start(KNOWS);
    assert_eq!(two.use_pairs(2), OK);
    // Who has the service's address (RFC 826).
    let parts: [&[u8]; 8] = [
        &[0; HEADER],
        &[0xff; 6],
        &guest,
        &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1],
        &guest,
        &[172, 16, 0, 2],
        &[0; 6],
        &service,
    ];
    let request = parts.concat();
    for pair in [1, 0, 1] {
        two.offer(pair);
        two.sends_as_it_is(pair, &request);
        let told = used(two.queue(2 * pair), 1);
        let length = u32::try_from(request.len()).unwrap();
        assert_eq!(told.first().map(|(_, written)| *written), Some(length));
        let answer = two
            .queue(2 * pair)
            .read(BUFFERS + 0x1000 * pair as u64, request.len());
        assert_eq!(answer.get(HEADER..HEADER + 6), Some(&guest[..]));
        assert_eq!(answer.get(HEADER + 20..HEADER + 22), Some(&[0, 2][..]));
    }
    assert_eq!(two.control.counts().tx_frames.load(Ordering::Relaxed), 0);
}

#[test]
fn a_broken_ring_of_one_pair_ends_that_one() {
    let mut two = TwoPairs::new(KNOWS);
    assert_eq!(two.use_pairs(2), OK);
    two.queue(3).offer(99);
    two.kick(3);
    comes(|| two.status.load(Ordering::SeqCst) & INTERRUPT_NEEDS_RESET != 0);
    let session = two.device.stop().unwrap().unwrap();
    assert!(session.queues.iter().all(Option::is_some));
}
