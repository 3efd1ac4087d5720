//! The transport from a guest's side, around a device that only remembers what it was asked.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test's panic is its failure"
)]

mod state;

use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::super::device::{DeviceKind, Notice, Patience, Stop};
use super::super::ring::{FEATURE_EVENT_IDX, QueueLayout};
use super::super::state::{DeviceState, DeviceStateError};
use super::super::testing::{DriverRing, memory};
use super::registers::FEATURE_VERSION_1;
use super::*;

/// What the device under the transport was asked to do, and how its next stop ends.
#[derive(Default)]
struct Seen {
    session: Option<Session>,
    starts: usize,
    stop_errors: Vec<StopError>,
    stops_begun: usize,
    /// Who does not wait for it learns nothing.
    is_slow: bool,
    start_errors: Vec<StartError>,
    config: [u8; 8],
}

#[derive(Clone, Default)]
struct Fake(Arc<Mutex<Seen>>);

impl Fake {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.0.lock().unwrap()
    }
}

impl VirtioDevice for Fake {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Entropy
    }

    fn features(&self) -> u64 {
        FEATURE_VERSION_1 | FEATURE_EVENT_IDX
    }

    fn queue_sizes_max(&self) -> &[u16] {
        &[16, 8]
    }

    fn read_config(&self, offset_bytes: u64, data: &mut [u8]) {
        let config = self.seen().config;
        for (at, byte) in (offset_bytes as usize..).zip(data) {
            *byte = config.get(at).copied().unwrap_or(0);
        }
    }

    fn write_config(&mut self, offset_bytes: u64, data: &[u8]) {
        let mut seen = self.seen();
        for (at, byte) in (offset_bytes as usize..).zip(data) {
            if let Some(place) = seen.config.get_mut(at) {
                *place = *byte;
            }
        }
    }

    fn save(&self) -> DeviceState {
        DeviceState::Entropy
    }

    fn restore(&mut self, _: &DeviceState) -> Result<(), DeviceStateError> {
        Ok(())
    }

    fn start(&mut self, session: Session) -> Result<(), StartError> {
        let mut seen = self.seen();
        if let Some(error) = seen.start_errors.pop() {
            return Err(error);
        }
        seen.starts += 1;
        seen.session = Some(session);
        Ok(())
    }

    fn begin_stop(&mut self, _: &Notice) {
        self.seen().stops_begun += 1;
    }

    fn poll_stop(&mut self, patience: Patience) -> Stop {
        let mut seen = self.seen();
        if seen.is_slow && patience == Patience::None {
            return Stop::Pending {
                until: Instant::now() + Duration::from_secs(1),
            };
        }
        match seen.stop_errors.pop() {
            Some(error) => Stop::Refused(error),
            None => Stop::Stopped(seen.session.take()),
        }
    }
}

struct Guest {
    transport: MmioTransport,
    fake: Fake,
    ring: DriverRing,
}

impl Guest {
    fn new() -> Self {
        let memory = memory(1 << 20);
        let fake = Fake::default();
        let ring = DriverRing::new(&memory, 0x1000, 8);
        let transport = MmioTransport::new(Box::new(fake.clone()), memory).unwrap();
        Self {
            transport,
            fake,
            ring,
        }
    }

    fn read(&mut self, offset: u64) -> u32 {
        let mut data = [0xee; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    fn status(&mut self) -> u32 {
        self.read(register::STATUS)
    }

    fn negotiate(&mut self, features: u64) {
        self.write(register::STATUS, 1);
        self.write(register::STATUS, 3);
        for (select, half) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.write(register::DRIVER_FEATURES_SEL, select);
            self.write(register::DRIVER_FEATURES, half);
        }
        self.write(register::STATUS, 0xb);
    }

    fn set_queue(&mut self, index: u32, layout: QueueLayout) {
        self.write(register::QUEUE_SEL, index);
        self.write(register::QUEUE_SIZE, layout.size.into());
        for (low, address) in [
            (register::QUEUE_DESC_LOW, layout.descriptors),
            (register::QUEUE_DRIVER_LOW, layout.avail),
            (register::QUEUE_DEVICE_LOW, layout.used),
        ] {
            self.write(low, address as u32);
            self.write(low + 4, (address >> 32) as u32);
        }
        self.write(register::QUEUE_READY, 1);
    }

    fn serving() -> Self {
        let mut guest = Self::new();
        guest.negotiate(FEATURE_VERSION_1);
        let layout = guest.ring.layout();
        guest.set_queue(0, layout);
        guest.write(register::STATUS, 0xf);
        assert_eq!(guest.status(), 0xf);
        guest
    }

    fn line_rose(&self) -> bool {
        self.transport.line().read().is_ok()
    }
}

fn drain() -> StopError {
    StopError::Drain {
        in_flight: 1,
        limit_ms: 1,
    }
}

#[test]
fn a_driver_finds_the_device_and_its_features() {
    let mut guest = Guest::new();
    assert_eq!(guest.read(register::MAGIC_VALUE), 0x7472_6976);
    assert_eq!(guest.read(register::VERSION), 2);
    assert_eq!(guest.read(register::DEVICE_ID), 4);
    for (select, half) in [(0, 1 << 29), (1, 1), (2, 0), (u32::MAX, 0)] {
        guest.write(register::DEVICE_FEATURES_SEL, select);
        assert_eq!(guest.read(register::DEVICE_FEATURES), half);
    }
    for (select, size) in [(0, 16), (1, 8), (2, 0), (u32::MAX, 0)] {
        guest.write(register::QUEUE_SEL, select);
        assert_eq!(guest.read(register::QUEUE_SIZE_MAX), size);
    }
    assert_eq!(guest.read(register::SHM_LEN_LOW), u32::MAX);
    assert_eq!(guest.read(register::SHM_BASE_HIGH), u32::MAX);
}

#[test]
fn driver_ok_starts_the_device_with_the_queues_that_are_ready() {
    let guest = Guest::serving();
    let seen = guest.fake.seen();
    let session = seen.session.as_ref().unwrap();
    assert_eq!(session.features, FEATURE_VERSION_1);
    assert_eq!(session.queues[0].as_ref().unwrap().ring.size(), 8);
    assert!(session.queues[1].is_none());
}

#[test]
fn features_that_were_not_offered_or_lack_version_1_are_refused() {
    for features in [FEATURE_VERSION_1 | 1, FEATURE_EVENT_IDX, 0, u64::MAX] {
        let mut guest = Guest::new();
        guest.negotiate(features);
        assert_eq!(guest.status(), 3, "features {features:#x}");
        guest.write(register::STATUS, 0xf);
        assert_eq!(guest.status(), 3, "DRIVER_OK does not come without FEATURES_OK");
        assert_eq!(guest.fake.seen().starts, 0);
    }
}

#[test]
fn features_are_sealed_by_features_ok() {
    let mut guest = Guest::new();
    guest.negotiate(FEATURE_VERSION_1);
    guest.write(register::DRIVER_FEATURES_SEL, 0);
    guest.write(register::DRIVER_FEATURES, u32::MAX);
    guest.write(register::STATUS, 0xf);
    assert_eq!(
        guest.fake.seen().session.as_ref().unwrap().features,
        FEATURE_VERSION_1
    );
}

#[test]
fn status_bits_come_in_order_and_never_go() {
    let mut guest = Guest::new();
    for early in [2, 8, 4, 0x40, 0x100] {
        guest.write(register::STATUS, early);
        assert_eq!(guest.status(), 0);
    }
    guest.write(register::STATUS, 3);
    guest.write(register::STATUS, 1);
    assert_eq!(guest.status(), 3);
    guest.write(register::STATUS, 0x83);
    assert_eq!(guest.status(), 0x83);
}

#[test]
fn a_queue_that_cannot_be_built_asks_for_a_reset() {
    let good = Guest::new().ring.layout();
    let bad = [
        QueueLayout { size: 0, ..good },
        QueueLayout { size: 5, ..good },
        QueueLayout { size: 32, ..good },
        QueueLayout {
            descriptors: 1 << 40,
            ..good
        },
    ];
    for layout in bad {
        let mut guest = Guest::new();
        guest.negotiate(FEATURE_VERSION_1);
        guest.set_queue(0, layout);
        guest.write(register::STATUS, 0xf);
        assert_eq!(guest.status(), 0x4f, "{layout:?}");
        assert!(guest.line_rose());
        assert_eq!(guest.read(register::INTERRUPT_STATUS), 2);
        assert_eq!(guest.fake.seen().starts, 0);
        guest.write(register::STATUS, 0);
        assert_eq!(guest.status(), 0);
    }
}

#[test]
fn a_device_that_does_not_start_asks_for_a_reset() {
    let mut guest = Guest::new();
    guest.fake.seen().start_errors.push(StartError::QueueMissing(0));
    guest.negotiate(FEATURE_VERSION_1);
    guest.write(register::STATUS, 0xf);
    assert_eq!(guest.status(), 0x4f);
}

#[test]
fn a_device_that_finds_its_ring_broken_asks_for_a_reset() {
    let mut guest = Guest::serving();
    let interrupt = guest.fake.seen().session.as_ref().unwrap().interrupt.clone();
    interrupt.device_needs_reset();
    assert!(guest.line_rose());
    assert_eq!(
        guest.read(register::INTERRUPT_STATUS),
        2,
        "the driver sees a configuration change"
    );
    guest.write(register::INTERRUPT_ACK, u32::MAX);
    assert_eq!(guest.read(register::INTERRUPT_STATUS), 0);
    assert_eq!(guest.status(), 0x4f, "which no acknowledgement takes back");
    guest.write(register::STATUS, 0);
    assert_eq!(guest.status(), 0);
}

#[test]
fn a_reset_makes_everything_new_and_the_device_can_be_used_again() {
    let mut guest = Guest::serving();
    guest
        .fake
        .seen()
        .session
        .as_ref()
        .unwrap()
        .interrupt
        .used_buffer();
    guest.write(register::STATUS, 0);
    assert_eq!(guest.status(), 0);
    assert_eq!(guest.read(register::INTERRUPT_STATUS), 0);
    assert_eq!(guest.read(register::QUEUE_READY), 0);
    assert!(guest.fake.seen().session.is_none());
    guest.negotiate(FEATURE_VERSION_1);
    guest.write(register::STATUS, 0xf);
    let seen = guest.fake.seen();
    assert_eq!(seen.starts, 2);
    assert!(
        seen.session.as_ref().unwrap().queues.iter().all(Option::is_none),
        "old queues are forgotten"
    );
}

#[test]
fn a_reset_that_runs_out_of_time_shows_as_pending_and_is_tried_again() {
    let mut guest = Guest::serving();
    guest.fake.seen().stop_errors.extend([drain(), drain(), drain()]);
    guest.write(register::STATUS, 0);
    assert_eq!(guest.status(), 0xf, "the driver waits for zero");
    guest.write(register::STATUS, 1);
    guest.write(register::QUEUE_SEL, 1);
    guest.write(CONFIG, 7);
    assert_eq!(guest.fake.seen().config[0], 0, "nothing else is taken meanwhile");
    assert_eq!(guest.status(), 0xf);
    assert_eq!(guest.status(), 0);
    assert!(guest.fake.seen().session.is_none());
}

#[test]
fn a_reset_of_a_dead_worker_completes() {
    let mut guest = Guest::serving();
    guest.fake.seen().stop_errors.push(StopError::WorkerGone);
    guest.write(register::STATUS, 0);
    assert_eq!(guest.status(), 0);
}

#[test]
fn a_pause_takes_the_session_and_a_resume_gives_the_same_back() {
    let mut guest = Guest::serving();
    guest.transport.pause().unwrap();
    assert!(guest.fake.seen().session.is_none());
    guest.transport.pause().unwrap();
    guest.transport.resume().unwrap();
    guest.transport.resume().unwrap();
    assert_eq!(guest.fake.seen().starts, 2);
    assert!(guest.fake.seen().session.as_ref().unwrap().queues[0].is_some());
    assert_eq!(guest.status(), 0xf);
}

#[test]
fn a_pause_that_was_asked_for_is_looked_after_until_it_is_there() {
    let mut guest = Guest::serving();
    guest.fake.seen().is_slow = true;
    guest.transport.begin_pause(&Notice::default());
    assert_eq!(guest.fake.seen().stops_begun, 1);
    for _ in 0..3 {
        let pause = guest.transport.poll_pause(Patience::None);
        assert!(matches!(pause, Pause::Pending { .. }), "{pause:?}");
    }
    guest.fake.seen().is_slow = false;
    for _ in 0..2 {
        let pause = guest.transport.poll_pause(Patience::None);
        assert!(matches!(pause, Pause::Paused), "{pause:?}");
    }
    guest.transport.resume().unwrap();
    assert_eq!(guest.fake.seen().starts, 2);
}

#[test]
fn a_driver_that_resets_and_starts_during_a_pause_is_served_from_the_resume_on() {
    let mut guest = Guest::serving();
    guest.fake.seen().is_slow = true;
    guest.transport.begin_pause(&Notice::default());
    guest.write(register::STATUS, 0);
    assert_eq!(guest.status(), 0, "the reset has waited for the stop");
    guest.negotiate(FEATURE_VERSION_1);
    let layout = guest.ring.layout();
    guest.set_queue(0, layout);
    guest.write(register::STATUS, 0xf);
    assert_eq!(guest.fake.seen().starts, 1, "its session waits");
    let pause = guest.transport.poll_pause(Patience::None);
    assert!(matches!(pause, Pause::Paused), "{pause:?}");
    guest.transport.resume().unwrap();
    assert_eq!(guest.fake.seen().starts, 2);
    assert_eq!(guest.status(), 0xf);
}

#[test]
fn a_reset_of_a_lost_disk_is_never_over_and_lets_go_of_no_memory() {
    let mut guest = Guest::serving();
    let lost = || StopError::Lost {
        reason: "host-b has it".to_owned(),
    };
    guest.fake.seen().stop_errors.extend([lost(), lost(), lost()]);
    guest.write(register::STATUS, 0);
    assert_eq!(guest.status(), 0xf);
    assert_eq!(guest.status(), 0xf);
    assert!(guest.fake.seen().session.is_some());
}

#[test]
fn a_pause_that_runs_out_of_time_leaves_the_device_serving() {
    let mut guest = Guest::serving();
    guest.fake.seen().stop_errors.push(drain());
    assert!(matches!(guest.transport.pause(), Err(TransportError::Stop(_))));
    assert!(guest.fake.seen().session.is_some());
    guest.transport.pause().unwrap();
    assert!(guest.fake.seen().session.is_none());
}

#[test]
fn a_pause_finishes_a_pending_reset() {
    let mut guest = Guest::serving();
    guest.fake.seen().stop_errors.push(drain());
    guest.write(register::STATUS, 0);
    guest.transport.pause().unwrap();
    guest.transport.resume().unwrap();
    assert_eq!((guest.status(), guest.fake.seen().starts), (0, 1));
}

#[test]
fn a_resume_that_fails_asks_for_a_reset() {
    let mut guest = Guest::serving();
    guest.transport.pause().unwrap();
    guest.fake.seen().start_errors.push(StartError::WorkerGone);
    assert!(matches!(guest.transport.resume(), Err(TransportError::Start(_))));
    assert_eq!(guest.status(), 0x4f);
}

#[test]
fn an_idle_device_pauses_and_resumes_without_being_touched() {
    let mut guest = Guest::new();
    guest.transport.pause().unwrap();
    guest.transport.resume().unwrap();
    assert_eq!(guest.fake.seen().starts, 0);
}

#[test]
fn a_notification_by_register_kicks_its_queue_only() {
    let mut guest = Guest::serving();
    for queue in [1, 2, u32::MAX] {
        guest.write(QUEUE_NOTIFY, queue);
    }
    assert!(guest.transport.kicks()[0].read().is_err());
    assert_eq!(guest.transport.kicks()[1].read().unwrap(), 1);
}

#[test]
fn the_generation_changes_exactly_when_the_configuration_does() {
    let mut guest = Guest::new();
    let before = guest.read(register::CONFIG_GENERATION);
    assert_eq!(guest.read(register::CONFIG_GENERATION), before);
    guest.fake.seen().config[3] = 9;
    let after = guest.read(register::CONFIG_GENERATION);
    assert_ne!(after, before);
    assert_eq!(guest.read(register::CONFIG_GENERATION), after);
}

#[test]
fn the_configuration_takes_every_width_and_control_registers_only_words() {
    let mut guest = Guest::new();
    guest.transport.write(CONFIG, &[9; 8]);
    assert_eq!(guest.fake.seen().config, [0; 8], "not before there is a driver");
    guest.write(register::STATUS, 3);
    guest.transport.write(CONFIG + 1, &[1]);
    guest.transport.write(CONFIG + 2, &[2, 3]);
    let mut data = [0xee; 8];
    guest.transport.read(CONFIG, &mut data);
    assert_eq!(data, [0, 1, 2, 3, 0, 0, 0, 0]);
    for width in [1, 2, 8] {
        let mut data = vec![0xee; width];
        guest.transport.read(register::MAGIC_VALUE, &mut data);
        assert_eq!(data, vec![0; width]);
        guest.transport.write(register::STATUS, &vec![0; width]);
        assert_eq!(guest.status(), 3);
    }
    assert_eq!(guest.read(register::MAGIC_VALUE + 2), 0);
}

#[test]
fn queue_registers_are_closed_before_features_ok_and_after_driver_ok() {
    let mut guest = Guest::new();
    let layout = guest.ring.layout();
    guest.set_queue(0, layout);
    assert_eq!(guest.read(register::QUEUE_READY), 0);
    let mut guest = Guest::serving();
    guest.set_queue(1, layout);
    assert_eq!(guest.read(register::QUEUE_READY), 0);
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]
    /// Whatever a guest writes wherever, the transport answers, goes on elsewhere, and a reset brings it back.
    #[test]
    fn garbage_in_the_registers_never_outlives_a_reset(
        accesses in proptest::collection::vec((0..0x200_u64, proptest::prelude::any::<u64>(), 0..4_usize), 0..200),
    ) {
        let mut guest = Guest::new();
        for (offset, value, width) in accesses {
            let bytes = value.to_le_bytes();
            guest.transport.write(offset, &bytes[..1 << width]);
            let mut data = [0; 8];
            guest.transport.read(offset, &mut data[..1 << width]);
        }
        guest.transport.pause().unwrap();
        let state = guest.transport.save().unwrap();
        guest = guest.elsewhere();
        guest.transport.restore(&state).unwrap();
        guest.transport.resume().unwrap();
        guest.write(register::STATUS, 0);
        guest.negotiate(FEATURE_VERSION_1);
        let layout = guest.ring.layout();
        guest.set_queue(0, layout);
        guest.write(register::STATUS, 0xf);
        proptest::prop_assert_eq!(guest.status(), 0xf);
    }
}

#[test]
fn a_window_without_a_device_is_a_placeholder_and_with_one_is_that() {
    let mut window = Window::default();
    let read = |window: &mut Window, offset: u64| {
        let mut data = [0xee; 4];
        window.read(offset, &mut data);
        u32::from_le_bytes(data)
    };
    assert_eq!(read(&mut window, register::MAGIC_VALUE), MAGIC);
    assert_eq!(read(&mut window, register::VERSION), VERSION);
    for offset in (8..MMIO_LEN).step_by(4) {
        window.write(offset, &[0xff; 4]);
        assert_eq!(read(&mut window, offset), 0, "at {offset:#x}");
    }
    let mut byte = [0xee];
    window.read(CONFIG, &mut byte);
    assert_eq!(byte, [0]);
    window.put(Guest::new().transport);
    assert_eq!(read(&mut window, register::DEVICE_ID), 4);
    window.write(register::STATUS, &1_u32.to_le_bytes());
    assert_eq!(read(&mut window, register::STATUS), 1);
    assert!(window.take().is_some());
    assert_eq!(read(&mut window, register::DEVICE_ID), 0);
}

#[test]
fn a_device_is_released_while_no_driver_has_it() {
    let mut guest = Guest::new();
    assert!(guest.transport.is_released());
    guest.write(register::STATUS, 1);
    assert!(
        guest.transport.is_released(),
        "somebody has seen it, and is not its driver"
    );
    guest.write(register::STATUS, 3);
    assert!(!guest.transport.is_released());
    let mut guest = Guest::serving();
    assert!(!guest.transport.is_released());
    guest.fake.seen().stop_errors.push(drain());
    guest.write(register::STATUS, 0);
    assert!(
        !guest.transport.is_released(),
        "it has not given everything back yet"
    );
    guest.status();
    assert!(guest.transport.is_released());
    guest.write(register::STATUS, 1);
    assert!(guest.transport.is_released());
}
