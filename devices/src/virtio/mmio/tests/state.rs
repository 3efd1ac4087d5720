//! A transport that is saved and restored, and one that is given what no transport has ever saved.

use std::cell::Cell;

use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use super::super::super::blk::BlkState;
use super::super::super::ring::{Chain, RingError};
use super::super::super::testing::Piece;
use super::*;

impl Guest {
    /// A driver that finds a fresh device, in the same memory.
    pub(super) fn elsewhere(&self) -> Self {
        let memory = Arc::clone(self.ring.memory());
        let fake = Fake::default();
        Self {
            transport: MmioTransport::new(Box::new(fake.clone()), memory).unwrap(),
            fake,
            ring: self.ring.same(),
        }
    }

    fn saved(mut self) -> (Self, TransportState) {
        self.transport.pause().unwrap();
        let state = self.transport.save().unwrap();
        (self, state)
    }
}

/// A driver that is served, and what is saved of its device.
fn serving() -> (Guest, TransportState) {
    Guest::serving().saved()
}

#[test]
fn the_session_goes_on_at_its_position_with_the_same_registers() {
    let mut guest = Guest::serving();
    for _ in 0..3 {
        guest.ring.offer_chain(&[Piece::Writable(0x8000, 16)]);
        let mut seen = guest.fake.seen();
        let ring = &mut seen.session.as_mut().unwrap().queues[0].as_mut().unwrap().ring;
        let mut chain = Chain::default();
        assert!(ring.pop(&mut chain).unwrap());
        ring.push(chain.head, 16);
        ring.publish();
        assert!(ring.needs_interrupt());
    }
    guest.write(register::QUEUE_SEL, 1);
    let (guest, state) = guest.saved();
    assert_eq!(state.queues[0].position, 3);
    let mut after = guest.elsewhere();
    after.transport.restore(&state).unwrap();
    assert_eq!(after.fake.seen().starts, 0);
    assert_eq!(
        after.read(register::QUEUE_SIZE_MAX),
        8,
        "the selected queue stays so"
    );
    after.transport.resume().unwrap();
    let seen = after.fake.seen();
    let session = seen.session.as_ref().unwrap();
    let queue = session.queues[0].as_ref().unwrap();
    assert_eq!(
        (queue.ring.state().next_avail, queue.ring.state().next_used),
        (3, 3)
    );
    assert_eq!(session.features, FEATURE_VERSION_1);
    assert!(session.queues[1].is_none());
}

#[test]
fn an_interrupt_that_the_device_still_owed_is_raised_elsewhere() {
    let mut guest = Guest::serving();
    guest.ring.offer_chain(&[Piece::Writable(0x8000, 16)]);
    {
        let mut seen = guest.fake.seen();
        let ring = &mut seen.session.as_mut().unwrap().queues[0].as_mut().unwrap().ring;
        let mut chain = Chain::default();
        assert!(ring.pop(&mut chain).unwrap());
        ring.push(chain.head, 16);
        ring.publish();
    }
    let (guest, state) = guest.saved();
    assert!(!guest.line_rose());
    let mut after = guest.elsewhere();
    after.transport.restore(&state).unwrap();
    after.transport.resume().unwrap();
    assert!(after.line_rose());
    assert_eq!(after.read(register::INTERRUPT_STATUS), 1);
}

#[test]
fn a_configuration_that_changed_on_the_way_is_told_and_counted() {
    let mut guest = Guest::serving();
    guest.fake.seen().config[0] = 1;
    let generation = guest.read(register::CONFIG_GENERATION);
    let (guest, state) = guest.saved();
    for (config, status) in [(1, 0), (2, 2)] {
        let mut after = guest.elsewhere();
        after.fake.seen().config[0] = config;
        after.transport.restore(&state).unwrap();
        after.transport.resume().unwrap();
        assert_eq!(after.read(register::INTERRUPT_STATUS), status);
        assert_eq!(after.line_rose(), status != 0);
        assert_eq!(after.read(register::CONFIG_GENERATION) != generation, status != 0);
    }
}

#[test]
fn a_reset_that_is_pending_is_over_before_anything_is_saved() {
    let mut guest = Guest::serving();
    guest.fake.seen().stop_errors.push(drain());
    guest.write(register::STATUS, 0);
    assert_eq!(guest.transport.save(), Err(NotPaused));
    let (_, state) = guest.saved();
    assert_eq!((state.status, state.is_started), (0, false));
}

#[test]
fn a_device_that_gave_up_needs_its_reset_elsewhere_too() {
    let mut guest = Guest::new();
    guest.fake.seen().start_errors.push(StartError::QueueMissing(0));
    guest.negotiate(FEATURE_VERSION_1);
    guest.write(register::STATUS, 0xf);
    let (guest, state) = guest.saved();
    let mut after = guest.elsewhere();
    after.transport.restore(&state).unwrap();
    after.transport.resume().unwrap();
    assert!(after.line_rose());
    assert_eq!((after.status(), after.fake.seen().starts), (0x4f, 0));
    after.write(register::STATUS, 0);
    assert_eq!(after.status(), 0);
}

#[test]
fn what_this_device_cannot_be_is_refused_and_leaves_it_fresh() {
    let (guest, good) = serving();
    let ring = |index, error| RestoreError::Queue(QueueError { index, error });
    let beyond = RingError::Area {
        area: "used ring",
        address: 1 << 40,
    };
    let kind = DeviceStateError::Kind {
        saved: DeviceKind::Block,
        here: DeviceKind::Entropy,
    };
    type Damage = fn(&mut TransportState);
    let refusals: [(Damage, RestoreError); 8] = [
        (
            |state| state.device = DeviceState::Block(BlkState { writeback: true }),
            kind.into(),
        ),
        (
            |state| state.driver_features |= 1 << 9 | 1 << 63,
            RestoreError::Features {
                missing: 1 << 9 | 1 << 63,
            },
        ),
        (
            |state| state.queues.truncate(1),
            RestoreError::QueueCount { saved: 1, here: 2 },
        ),
        (
            |state| state.queues[1].size_max = 16,
            RestoreError::QueueSize {
                index: 1,
                saved: 16,
                here: 8,
            },
        ),
        (|state| state.queues[0].used = 1 << 40, ring(0, beyond)),
        (|state| state.queues[0].size = 6, ring(0, RingError::Size(6))),
        (
            |state| state.queues[1].is_ready = true,
            ring(1, RingError::Size(0)),
        ),
        (
            |state| state.queues[0].descriptors = u64::MAX - 15,
            ring(
                0,
                RingError::Area {
                    area: "descriptor table",
                    address: u64::MAX - 15,
                },
            ),
        ),
    ];
    for (damage, refusal) in refusals {
        refused(&guest, &good, damage, |error| error == refusal);
    }
}

#[test]
fn a_state_in_which_no_device_can_be_is_refused() {
    let (guest, good) = serving();
    type Damage = fn(&mut TransportState);
    let damages: [Damage; 11] = [
        |state| state.status = 0xb,
        |state| state.status = 0xd,
        |state| state.status = 0x4f,
        |state| state.status = 0x10f,
        |state| state.is_started = false,
        |state| state.interrupt_status = 4,
        |state| state.interrupt_status = INTERRUPT_NEEDS_RESET,
        |state| state.queues[1].position = 1,
        |state| state.queues[0].size = 17,
        |state| state.config_seen.push(0),
        |state| state.driver_features = FEATURE_EVENT_IDX,
    ];
    for damage in damages {
        refused(&guest, &good, damage, |error| {
            matches!(error, RestoreError::Impossible(_))
        });
    }
}

/// Restores what `damage` leaves of `good`: that fails as `expected`, and the device serves from its beginning.
fn refused(
    guest: &Guest,
    good: &TransportState,
    damage: fn(&mut TransportState),
    expected: impl Fn(RestoreError) -> bool,
) {
    let mut state = good.clone();
    damage(&mut state);
    let mut after = guest.elsewhere();
    let error = after.transport.restore(&state).unwrap_err();
    assert!(expected(error), "{error:?}");
    assert!(!error.to_string().is_empty());
    assert_eq!(after.status(), 0);
    after.transport.restore(good).unwrap();
}

/// A number as it may stand in a damaged file: near one that is allowed, or anywhere.
fn any_number() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..40_u64,
        (0..64_u32).prop_map(|bit| 1 << bit),
        (0..0x20_u64).prop_map(|cell| 0x1000 + cell * 16),
        (0..0x20_u64).prop_map(|cell| (1 << 20) - 0x100 + cell * 16),
        any::<u64>(),
    ]
}

/// Puts `number` into the field of this index.
fn damage(state: &mut TransportState, field: usize, number: u64) {
    let queue = &mut state.queues[field % 2];
    match field / 2 {
        0 => state.status = number as u32,
        1 => state.needs_reset = !state.needs_reset,
        2 => state.device_features_sel = number as u32,
        3 => state.driver_features_sel = number as u32,
        4 => state.driver_features ^= number,
        5 => state.queue_sel = number as u32,
        6 => state.interrupt_status = number as u32,
        7 => state.config_generation = number as u32,
        8 => state.config_seen.fill(number as u8),
        9 => state.config_seen.truncate(number as usize),
        10 => state.is_started = !state.is_started,
        11 => queue.size_max = number as u16,
        12 => queue.size = number as u16,
        13 => queue.is_ready = !queue.is_ready,
        14 => queue.descriptors = number,
        15 => queue.avail = number,
        16 => queue.used = number,
        17 => queue.position = number as u16,
        _ => unreachable!("there are {FIELDS} fields"),
    }
}

const FIELDS: usize = 2 * 18;

/// Whatever a file says, a transport refuses it or goes on; its device pops without leaving the guest's memory, and a
/// reset brings it back.
#[test]
fn a_damaged_state_is_refused_or_outlived_by_a_reset() {
    let (_, serving) = serving();
    let (_, fresh) = Guest::new().saved();
    let (accepted, refused) = (Cell::new(0), Cell::new(0));
    let damages = prop::collection::vec((0..FIELDS, any_number()), 0..4);
    let config = ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(8192)
    };
    let outcome = TestRunner::new(config).run(&(any::<bool>(), damages), |(is_serving, damages)| {
        let mut state = if is_serving {
            serving.clone()
        } else {
            fresh.clone()
        };
        for (field, number) in damages {
            damage(&mut state, field, number);
        }
        let mut guest = Guest::new();
        let tally = match guest.transport.restore(&state) {
            Ok(()) => &accepted,
            Err(_) => &refused,
        };
        tally.set(tally.get() + 1);
        go_on(&mut guest);
        Ok(())
    });
    outcome.unwrap();
    assert!(accepted.get() > 1000 && refused.get() > 1000);
}

/// The device does what it does with the rings that it is given, and after a reset it serves its driver.
fn go_on(guest: &mut Guest) {
    if let Ok(state) = guest.transport.save() {
        guest.elsewhere().transport.restore(&state).unwrap();
    }
    guest.transport.resume().unwrap();
    if let Some(session) = &mut guest.fake.seen().session {
        for queue in session.queues.iter_mut().flatten() {
            let mut chain = Chain::default();
            if let Ok(true) = queue.ring.pop(&mut chain) {
                queue.ring.push(chain.head, 0);
            }
            queue.ring.publish();
            queue.ring.needs_interrupt();
            queue.ring.enable_kicks();
        }
    }
    guest.write(register::STATUS, 0);
    guest.negotiate(FEATURE_VERSION_1);
    let layout = guest.ring.layout();
    guest.set_queue(0, layout);
    guest.write(register::STATUS, 0xf);
    assert_eq!(guest.status(), 0xf);
}
