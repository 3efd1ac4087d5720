//! What every device promises behind its transport: saved there and restored elsewhere it goes on as if nothing had been.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::{BUFFERS, MEMORY_BYTES, STILL_MS, Subject, VERSION_1, wait_until};
use crate::bus::BusDevice;
use crate::virtio::dirty::{DirtyPages, PAGE_BYTES};
use crate::virtio::mmio::{MmioTransport, NotPaused, QUEUE_NOTIFY, TransportState};
use crate::virtio::testing::{DriverRing, memory};

const INTERRUPT_STATUS: u64 = 0x060;
const INTERRUPT_ACK: u64 = 0x064;
const STATUS: u64 = 0x070;
const QUEUE_SIZE: u16 = 16;

/// A device behind its transport, and its guest's driver.
pub(super) struct Guest<'a> {
    subject: &'a Subject,
    transport: MmioTransport,
    driver: DriverRing,
    /// The queues after the first that the driver makes ready.
    others: Vec<DriverRing>,
    features: u64,
}

impl<'a> Guest<'a> {
    pub(super) fn new(subject: &'a Subject, features: u64) -> Self {
        let memory = memory(MEMORY_BYTES);
        let driver = DriverRing::new(&memory, 0x1000, QUEUE_SIZE);
        let device = (subject.make)();
        let features = (features & device.features()) | VERSION_1 | device.features_needed();
        let transport = MmioTransport::new(device, memory).unwrap();
        Self {
            subject,
            transport,
            driver,
            others: Vec::new(),
            features,
        }
    }

    /// What a driver writes to make the device go (3.1.1, 4.2.3.2).
    fn steps(&self) -> Vec<(u64, u32)> {
        let half = |word: u64, shift: u32| u32::try_from(word >> shift & u64::from(u32::MAX)).unwrap();
        let mut steps = vec![(STATUS, 1), (STATUS, 3)];
        steps.extend([(0x024, 0), (0x020, half(self.features, 0))]);
        steps.extend([(0x024, 1), (0x020, half(self.features, 32))]);
        steps.push((STATUS, 0xb));
        for (index, driver) in (0..).zip(std::iter::once(&self.driver).chain(&self.others)) {
            let layout = driver.layout();
            steps.extend([(0x030, index), (0x038, layout.size.into())]);
            for (register, address) in [
                (0x080, layout.descriptors),
                (0x090, layout.avail),
                (0x0a0, layout.used),
            ] {
                steps.extend([(register, half(address, 0)), (register + 4, half(address, 32))]);
            }
            steps.push((0x044, 1));
        }
        steps.push((STATUS, 0xf));
        steps
    }

    pub(super) fn start(&mut self) {
        for (register, value) in self.steps() {
            self.write(register, value);
        }
        assert_eq!(self.read(STATUS), 0xf);
    }

    fn write(&mut self, register: u64, value: u32) {
        self.transport.write(register, &value.to_le_bytes());
    }

    fn read(&mut self, register: u64) -> u32 {
        let mut data = [0; 4];
        self.transport.read(register, &mut data);
        u32::from_le_bytes(data)
    }

    pub(super) fn offer(&mut self) {
        (self.subject.offer)(&mut self.driver);
    }

    pub(super) fn notify(&mut self) {
        self.write(QUEUE_NOTIFY, 0);
    }

    pub(super) fn wait_used(&self, count: u16, promise: &str) {
        wait_until(|| self.driver.used_index() == count, promise);
    }

    fn save(&self) -> TransportState {
        let text = serde_json::to_vec(&self.transport.save().unwrap()).unwrap();
        serde_json::from_slice(&text).unwrap()
    }

    /// Saves the device, which is paused, and goes on with a fresh one and the same memory.
    fn go_elsewhere(&mut self) {
        let state = self.save();
        let memory = Arc::clone(self.driver.memory());
        self.transport = MmioTransport::new((self.subject.make)(), memory).unwrap();
        self.transport.restore(&state).unwrap();
        assert_eq!(self.save(), state, "what was restored is what was saved");
    }
}

/// Runs every promise over `subject`, for a driver that wants these `features`.
pub(super) fn conforms(subject: &Subject, features: u64) {
    let guest = || Guest::new(subject, features);
    it_is_saved_only_when_paused(guest());
    it_goes_on_elsewhere_with_what_is_in_the_ring(guest());
    it_interrupts_again_for_what_was_not_acknowledged(guest());
    it_shows_elsewhere_that_it_needs_a_reset(guest());
    every_page_that_it_writes_is_marked(guest());
    let steps = guest().steps().len();
    for done in 0..=steps {
        a_driver_goes_on_with_it_elsewhere(guest(), done);
    }
}

fn it_is_saved_only_when_paused(mut guest: Guest<'_>) {
    assert_eq!(guest.transport.save(), Err(NotPaused));
    guest.start();
    assert_eq!(guest.transport.save(), Err(NotPaused));
    guest.transport.pause().unwrap();
    let state = guest.save();
    assert_eq!(guest.save(), state, "and that changes nothing");
    guest.transport.resume().unwrap();
    assert_eq!(guest.transport.save(), Err(NotPaused));
}

fn it_goes_on_elsewhere_with_what_is_in_the_ring(mut guest: Guest<'_>) {
    guest.start();
    for round in 0..4 {
        guest.offer();
        guest.notify();
        guest.wait_used(2 * round + 1, "requests are served here and elsewhere");
        guest.transport.pause().unwrap();
        // Nobody will kick for this one.
        guest.offer();
        let before = guest.driver.read(0, MEMORY_BYTES);
        guest.go_elsewhere();
        std::thread::sleep(std::time::Duration::from_millis(STILL_MS));
        assert!(
            before == guest.driver.read(0, MEMORY_BYTES),
            "a restored device does not touch memory before it is resumed"
        );
        guest.transport.resume().unwrap();
        guest.wait_used(2 * round + 2, "what was in the ring is served without a kick");
    }
}

fn it_interrupts_again_for_what_was_not_acknowledged(mut guest: Guest<'_>) {
    guest.start();
    guest.offer();
    guest.notify();
    wait_until(
        || guest.transport.line().read().is_ok(),
        "the driver is interrupted",
    );
    guest.transport.pause().unwrap();
    guest.go_elsewhere();
    assert!(guest.transport.line().read().is_err(), "not before it is resumed");
    guest.transport.resume().unwrap();
    guest.transport.line().read().unwrap();
    assert_eq!(guest.read(INTERRUPT_STATUS), 1);
    guest.write(INTERRUPT_ACK, 1);
    guest.transport.pause().unwrap();
    guest.go_elsewhere();
    guest.transport.resume().unwrap();
    assert!(
        guest.transport.line().read().is_err(),
        "an acknowledged interrupt does not come again"
    );
}

fn it_shows_elsewhere_that_it_needs_a_reset(mut guest: Guest<'_>) {
    guest.start();
    guest.driver.set_avail_index(0x7000);
    guest.notify();
    wait_until(
        || guest.transport.line().read().is_ok(),
        "the driver hears of a broken ring",
    );
    guest.write(INTERRUPT_ACK, u32::MAX);
    guest.transport.pause().unwrap();
    guest.go_elsewhere();
    guest.transport.resume().unwrap();
    assert_eq!(guest.read(STATUS), 0x4f);
    guest.write(STATUS, 0);
    guest.driver = DriverRing::new(&Arc::clone(guest.driver.memory()), 0x1000, QUEUE_SIZE);
    guest.start();
    guest.offer();
    guest.notify();
    guest.wait_used(1, "after a reset the restored device serves");
}

fn every_page_that_it_writes_is_marked(mut guest: Guest<'_>) {
    let dirty = Arc::new(DirtyPages::new(guest.driver.memory()));
    guest.transport.track(Some(Arc::clone(&dirty))).unwrap();
    guest.start();
    assert_eq!(guest.transport.track(None), Err(NotPaused));
    guest.transport.pause().unwrap();
    for round in 1..4 {
        guest.driver.write(BUFFERS + 0x1000, &[0xee; 0x2000]);
        guest.offer();
        let before = guest.driver.read(0, MEMORY_BYTES);
        guest.transport.resume().unwrap();
        guest.wait_used(round, "the device is served while it is tracked");
        guest.transport.pause().unwrap();
        guest.save();
        let marked = marked(&dirty);
        let changed = changed(&before, &guest.driver.read(0, MEMORY_BYTES));
        let changed_min = 1 + usize::from(guest.subject.writes_buffers);
        assert!(changed.len() >= changed_min, "the used ring and a buffer");
        assert!(
            changed.is_subset(&marked),
            "{changed:?} changed, {marked:?} marked"
        );
        assert!(marked.len() <= 4, "{marked:?}");
        guest.go_elsewhere();
        guest.transport.track(Some(Arc::clone(&dirty))).unwrap();
    }
    guest.transport.resume().unwrap();
    guest.offer();
    guest.notify();
    guest.wait_used(4, "it is served to the end");
    dirty.take();
    guest.write(STATUS, 0);
    let used = guest.driver.layout().used / PAGE_BYTES;
    assert!(
        marked(&dirty).contains(&used),
        "a ring that is no more was written"
    );
}

/// For a device whose queues all take the requests of the subject, and of which the driver leaves the last one alone.
pub(super) fn every_queue_goes_on_at_its_own_position(subject: &Subject) {
    let mut guest = Guest::new(subject, u64::MAX);
    let memory = Arc::clone(guest.driver.memory());
    guest.others = [0x3000, 0x5000]
        .map(|base| DriverRing::new(&memory, base, QUEUE_SIZE))
        .into();
    guest.start();
    let wait_used = |guest: &Guest<'_>, counts: [u16; 3]| {
        let used = || {
            std::iter::once(&guest.driver)
                .chain(&guest.others)
                .map(DriverRing::used_index)
                .eq(counts)
        };
        wait_until(used, "every queue is served");
    };
    for (number, queue) in (1_u32..).zip(&mut guest.others) {
        (0..=number).for_each(|_| (subject.offer)(queue));
    }
    guest.offer();
    (0..3).for_each(|queue| guest.write(QUEUE_NOTIFY, queue));
    wait_used(&guest, [1, 2, 3]);
    guest.transport.pause().unwrap();
    guest.offer();
    guest.others.iter_mut().for_each(subject.offer);
    let positions: Vec<u16> = guest.save().queues.iter().map(|queue| queue.position).collect();
    assert_eq!(positions, [1, 2, 3, 0]);
    guest.go_elsewhere();
    guest.transport.resume().unwrap();
    wait_used(&guest, [2, 3, 4]);
}

/// The numbers of the marked pages.
fn marked(dirty: &DirtyPages) -> BTreeSet<u64> {
    let words = dirty.take().concat();
    let is_marked =
        |page: &u64| words.get(usize::try_from(page / 64).unwrap()).unwrap() >> (page % 64) & 1 != 0;
    (0..MEMORY_BYTES as u64 / PAGE_BYTES).filter(is_marked).collect()
}

/// The numbers of the pages in which `before` and `after` differ.
fn changed(before: &[u8], after: &[u8]) -> BTreeSet<u64> {
    let page_bytes = usize::try_from(PAGE_BYTES).unwrap();
    let pages = before.chunks(page_bytes).zip(after.chunks(page_bytes));
    let differing = (0..).zip(pages).filter(|(_, (before, after))| before != after);
    differing.map(|(number, _)| number).collect()
}

/// A driver that is so many steps on its way finds another device in the place of the one that it began with.
fn a_driver_goes_on_with_it_elsewhere(mut guest: Guest<'_>, done: usize) {
    let steps = guest.steps();
    let (before, after) = steps.split_at(done);
    guest.transport.pause().unwrap();
    for (register, value) in before {
        guest.write(*register, *value);
    }
    guest.offer();
    guest.go_elsewhere();
    guest.transport.resume().unwrap();
    for (register, value) in after {
        guest.write(*register, *value);
    }
    assert_eq!(guest.read(STATUS), 0xf);
    guest.wait_used(1, "the device is served where it is");
    guest.transport.pause().unwrap();
}
