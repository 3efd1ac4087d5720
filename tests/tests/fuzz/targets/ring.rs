//! One virtqueue over memory that the guest has filled as it liked. An input is the queue, what the device
//! does, and the memory:
//!
//! | bytes | |
//! |---|---|
//! | 1 | size: 2^n up to 2^10; with bit 7, two more bytes are the size |
//! | 1 | bit 0: EVENT_IDX, 1: indirect, 2: three addresses follow, 3: two positions follow |
//! | 1 | length of the steps |
//! | … | the steps, a byte each, some with arguments |
//! | … | guest memory from address 0 |

use std::sync::Arc;

use coracle_devices::virtio::ring::{
    CHAIN_SEGMENTS_MAX, Chain, FEATURE_EVENT_IDX, FEATURE_INDIRECT_DESC, PopError, QueueLayout, QueueState,
    Virtqueue,
};
use coracle_devices::virtio::segments;
use coracle_storage::request::Segment;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::Input;

/// Two regions that touch, so that buffers can cross from one to the other, and one behind a gap.
const REGIONS: [(GuestAddress, usize); 3] = [
    (GuestAddress(0), 0x8000),
    (GuestAddress(0x8000), 0x8000),
    (GuestAddress(0x2_0000), 0x1000),
];

pub(crate) fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let memory = GuestMemoryMmap::from_ranges(&REGIONS).expect("a little memory");
    let memory = Arc::new(memory);
    let (state, features) = queue(&mut input);
    let steps_len = input.u8();
    let mut steps = Input::new(input.take(steps_len.into()));
    // What is longer than the first two regions is cut off.
    let _ = memory.write(input.rest(), GuestAddress(0));
    let Ok(ring) = Virtqueue::restore(Arc::clone(&memory), state, features) else {
        return;
    };
    let mut device = Device::new(memory, ring, features);
    while !steps.is_empty() {
        device.step(&mut steps);
        device.check();
    }
    device.pop_all();
    device.push_all();
    device.check();
}

fn queue(input: &mut Input<'_>) -> (QueueState, u64) {
    let size = match input.u8() {
        power if power & 0x80 == 0 => 1 << (power % 11),
        _ => input.u16(),
    };
    let flags = input.u8();
    let mut features = 0;
    if flags & 1 != 0 {
        features |= FEATURE_EVENT_IDX;
    }
    if flags & 2 != 0 {
        features |= FEATURE_INDIRECT_DESC;
    }
    let layout = if flags & 4 != 0 {
        QueueLayout {
            size,
            descriptors: input.u32().into(),
            avail: input.u32().into(),
            used: input.u64(),
        }
    } else {
        let avail = 16 * u64::from(size);
        QueueLayout {
            size,
            descriptors: 0,
            avail,
            used: (avail + 6 + 2 * u64::from(size)).next_multiple_of(4),
        }
    };
    let (next_avail, next_used) = if flags & 8 != 0 {
        (input.u16(), input.u16())
    } else {
        (0, 0)
    };
    let state = QueueState {
        layout,
        next_avail,
        next_used,
    };
    (state, features)
}

/// A device that knows by itself what it holds.
struct Device {
    memory: Arc<GuestMemoryMmap>,
    ring: Virtqueue,
    features: u64,
    chain: Chain,
    held: Vec<u16>,
    /// Whether the last step took a chain, which may then go back.
    just_taken: bool,
}

impl Device {
    fn new(memory: Arc<GuestMemoryMmap>, ring: Virtqueue, features: u64) -> Self {
        Self {
            memory,
            // Chains that somebody took before the queue came here.
            held: vec![0; ring.in_flight().into()],
            ring,
            features,
            chain: Chain::default(),
            just_taken: false,
        }
    }

    fn step(&mut self, steps: &mut Input<'_>) {
        let may_go_back = std::mem::take(&mut self.just_taken);
        match steps.u8() & 15 {
            0..=3 => self.just_taken = self.pop(),
            4 | 5 => self.push(steps.u8()),
            6 => {
                self.ring.publish();
                self.ring.needs_interrupt();
                assert!(
                    !self.ring.needs_interrupt(),
                    "the same buffers are not reported again"
                );
            }
            7 => self.ring.disable_kicks(),
            8 => {
                self.ring.enable_kicks();
            }
            9 if may_go_back => {
                self.ring.unpop();
                self.held.pop();
            }
            10 => self.pop_all(),
            11 => self.push_all(),
            12 => self.go_on_elsewhere(),
            // The guest writes while the device works.
            _ => {
                let (address, value) = (steps.u16(), steps.u16());
                let _ = self.memory.write_obj(value, GuestAddress(address.into()));
            }
        }
    }

    /// Takes one chain, well-formed or not; false when there is none to take.
    fn pop(&mut self) -> bool {
        match self.ring.pop(&mut self.chain) {
            Ok(true) => {
                self.check_chain();
                self.held.push(self.chain.head);
                true
            }
            Ok(false) => false,
            Err(PopError::Malformed { head, .. }) => {
                self.held.push(head);
                true
            }
            Err(PopError::Broken(_)) => {
                let again = self.ring.pop(&mut self.chain);
                assert!(matches!(again, Err(PopError::Broken(_))), "{again:?}");
                false
            }
        }
    }

    fn pop_all(&mut self) {
        while self.pop() {
            assert!(self.held.len() <= self.ring.size().into(), "pop has an end");
        }
    }

    fn push(&mut self, which: u8) {
        if !self.held.is_empty() {
            let head = self.held.swap_remove(usize::from(which) % self.held.len());
            self.ring.push(head, which.into());
        }
    }

    fn push_all(&mut self) {
        for head in self.held.drain(..) {
            self.ring.push(head, 0);
        }
        self.ring.publish();
        self.ring.needs_interrupt();
    }

    fn go_on_elsewhere(&mut self) {
        self.ring.publish();
        let state = self.ring.state();
        self.ring = Virtqueue::restore(Arc::clone(&self.memory), state, self.features)
            .expect("a queue's own state is one that it can go on from");
        assert_eq!(self.ring.state(), state);
    }

    /// Everything in a chain is guest memory, and there is not too much of it.
    fn check_chain(&self) {
        let Chain {
            head,
            readable,
            writable,
        } = &self.chain;
        assert!(*head < self.ring.size());
        assert!(readable.len() + writable.len() <= CHAIN_SEGMENTS_MAX);
        assert!(segments::len_bytes(readable) + segments::len_bytes(writable) <= 1 << 32);
        for segment in readable.iter().chain(writable) {
            assert!(self.is_memory(segment), "{segment:?}");
        }
        // Touched as devices do: the first and the last byte of what the guest is given.
        let len = usize::try_from(segments::len_bytes(writable)).expect("a 64-bit host");
        segments::scatter(writable, 0, &[0xd1]);
        segments::scatter(writable, len.saturating_sub(1), &[0xd2]);
        segments::gather(readable, 0, &mut [0; 16]);
    }

    fn is_memory(&self, segment: &Segment) -> bool {
        let start = segment.address().addr();
        let end = start + segment.len_bytes();
        self.memory.iter().any(|region| {
            let host = region.as_ptr().addr();
            let len = usize::try_from(region.len()).expect("a 64-bit host");
            host <= start && end <= host + len
        })
    }

    fn check(&self) {
        assert_eq!(usize::from(self.ring.in_flight()), self.held.len());
        assert!(self.ring.in_flight() <= self.ring.size());
    }
}
