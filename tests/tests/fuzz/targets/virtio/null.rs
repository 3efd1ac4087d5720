//! A device that gives back what it is offered when it starts, and then waits to be stopped: a transport's own
//! behaviour, without threads.

use coracle_devices::virtio::device::{
    DeviceKind, Notice, Patience, Session, StartError, Stop, VirtioDevice,
};
use coracle_devices::virtio::ring::{Chain, FEATURE_EVENT_IDX, FEATURE_INDIRECT_DESC, PopError, Virtqueue};
use coracle_devices::virtio::state::{DeviceState, DeviceStateError};

const FEATURE_VERSION_1: u64 = 1 << 32;

#[derive(Default)]
pub(super) struct Null {
    session: Option<Session>,
    space: [u8; 16],
}

impl VirtioDevice for Null {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Entropy
    }

    fn features(&self) -> u64 {
        FEATURE_VERSION_1 | FEATURE_EVENT_IDX | FEATURE_INDIRECT_DESC
    }

    fn queue_sizes_max(&self) -> &[u16] {
        &[256, 8]
    }

    fn read_config(&self, offset_bytes: u64, data: &mut [u8]) {
        data.fill(0);
        let from = usize::try_from(offset_bytes).ok();
        let from = from
            .and_then(|offset| self.space.get(offset..))
            .unwrap_or_default();
        for (to, from) in data.iter_mut().zip(from) {
            *to = *from;
        }
    }

    fn write_config(&mut self, offset_bytes: u64, data: &[u8]) {
        let to = usize::try_from(offset_bytes).ok();
        let to = to.and_then(|offset| self.space.get_mut(offset..));
        for (to, from) in to.unwrap_or_default().iter_mut().zip(data) {
            *to = *from;
        }
    }

    fn save(&self) -> DeviceState {
        DeviceState::Entropy
    }

    fn restore(&mut self, _: &DeviceState) -> Result<(), DeviceStateError> {
        Ok(())
    }

    fn start(&mut self, mut session: Session) -> Result<(), StartError> {
        if self.session.is_some() {
            return Err(StartError::Started);
        }
        for queue in session.queues.iter_mut().flatten() {
            give_back(&mut queue.ring);
            if queue.ring.needs_interrupt() {
                session.interrupt.used_buffer();
            }
        }
        self.session = Some(session);
        Ok(())
    }

    fn begin_stop(&mut self, _: &Notice) {}

    fn poll_stop(&mut self, _: Patience) -> Stop {
        Stop::Stopped(self.session.take())
    }
}

fn give_back(ring: &mut Virtqueue) {
    let mut chain = Chain::default();
    for _ in 0..ring.size() {
        match ring.pop(&mut chain) {
            Ok(true) => ring.push(chain.head, 0),
            Err(PopError::Malformed { head, .. }) => ring.push(head, 0),
            Ok(false) | Err(PopError::Broken(_)) => break,
        }
    }
    ring.publish();
}
