//! The register half of a socket device.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use coracle_storage::threads;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

use super::VsockState;
use super::config::VsockConfig;
use super::connections::{HOST_PORTS, VsockCounts};
use super::socket::{Listener, SocketFile};
use super::worker::{Shared, Worker};
use crate::virtio::device::{
    DeviceKind, Notice, Patience, Session, StartError, Stop, VirtioDevice, read_space,
};
use crate::virtio::ring::{FEATURE_EVENT_IDX, FEATURE_INDIRECT_DESC};
use crate::virtio::service::Service;
use crate::virtio::state::{DeviceState, DeviceStateError};

/// Receiving, sending, and events (5.10.2).
const QUEUE_SIZES_MAX: [u16; 3] = [256, 256, 64];
/// Without the others this device only talks to itself, which does no harm.
const QUEUES_NEEDED: usize = 1;
/// VIRTIO_VSOCK_F_STREAM (5.10.3).
const STREAM: u64 = 1 << 0;

/// A socket device. Its worker waits without cost while nothing comes or goes, and ends with the device; so does the file of
/// its socket.
#[derive(Debug)]
pub struct Vsock {
    service: Service,
    shared: Arc<Shared>,
    guest_cid: u32,
    /// After the worker, which may open nothing, and so remove nothing.
    _file: SocketFile,
}

impl Vsock {
    /// An idle device with its thread, for a socket that programs of the host connect to.
    ///
    /// # Errors
    ///
    /// When the thread or the eventfd that wakes it cannot be made.
    pub fn new(config: &VsockConfig, listener: Listener) -> io::Result<(Self, Arc<VsockCounts>)> {
        let Listener { socket, file } = listener;
        let shared = Arc::<Shared>::default();
        shared.next_port.store(*HOST_PORTS.start(), SeqCst);
        let mut worker = Worker::new(config, socket, file.path().into(), Arc::clone(&shared));
        let service = Service::new(threads::Kind::Vsock, "vsock", move |mailbox| {
            mailbox.serve_and_forget(
                &mut worker,
                |worker, session| worker.serve(mailbox, session),
                Worker::forget,
            );
        })?;
        let counts = Arc::clone(&shared.counts);
        let vsock = Self {
            service,
            shared,
            guest_cid: config.guest_cid,
            _file: file,
        };
        Ok((vsock, counts))
    }
}

impl VirtioDevice for Vsock {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Socket
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | STREAM | FEATURE_EVENT_IDX | FEATURE_INDIRECT_DESC
    }

    fn queue_sizes_max(&self) -> &[u16] {
        &QUEUE_SIZES_MAX
    }

    /// The guest's CID (5.10.4).
    fn read_config(&self, offset_bytes: u64, data: &mut [u8]) {
        read_space(&u64::from(self.guest_cid).to_le_bytes(), offset_bytes, data);
    }

    fn write_config(&mut self, _offset_bytes: u64, _data: &[u8]) {}

    fn reset_config(&mut self) {
        self.shared.owes_reset.store(false, SeqCst);
        self.service.forget();
    }

    fn save(&self) -> DeviceState {
        DeviceState::Socket(VsockState {
            next_port: self.shared.next_port.load(SeqCst),
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceStateError> {
        match state {
            DeviceState::Socket(VsockState { next_port }) if HOST_PORTS.contains(next_port) => {
                self.shared.next_port.store(*next_port, SeqCst);
                self.shared.owes_reset.store(true, SeqCst);
                Ok(())
            }
            DeviceState::Socket(VsockState { next_port }) => Err(DeviceStateError::HostPort(*next_port)),
            other => Err(other.is_not_for(self.kind())),
        }
    }

    fn start(&mut self, session: Session) -> Result<(), StartError> {
        self.service.start(session, QUEUES_NEEDED)
    }

    fn begin_stop(&mut self, notice: &Notice) {
        self.service.begin_stop(notice);
    }

    fn poll_stop(&mut self, patience: Patience) -> Stop {
        self.service.poll_stop(patience)
    }
}
