//! The register half of a network device, and what controls it beside its driver.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use coracle_storage::limit::{RateLimiter, RateLimiterConfig};
use coracle_storage::threads;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
};

use super::NetState;
use super::config::{MacAddress, NetworkInterfaceConfig};
use super::control::Link;
use super::tap::Tap;
use super::worker::{NetCounts, Worker};
use crate::mmds::Stack;
use crate::virtio::device::{
    DeviceKind, Notice, Patience, Session, StartError, Stop, VirtioDevice, read_space,
};
use crate::virtio::limits::NewLimits;
use crate::virtio::ring::{FEATURE_EVENT_IDX, FEATURE_INDIRECT_DESC};
use crate::virtio::service::{Nudge, Service};
use crate::virtio::state::{DeviceState, DeviceStateError};

/// Receiving, sending, and commands (5.1.2).
const QUEUE_SIZES_MAX: [u16; 3] = [256, 256, 64];
/// Whoever only receives needs the others as little as this device does.
const QUEUES_NEEDED: usize = 1;
/// Bytes of the configuration space up to the MTU (5.1.4).
const CONFIG_BYTES: usize = 12;

/// Features that cost the tap nothing, as it has them all.
const OFFLOADS: [u32; 6] = [
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
];
/// Those that it has since Linux 6.2.
const UDP_OFFLOADS: [u32; 3] = [
    VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_USO,
];
/// Those that are this device's own.
const OWN: [u32; 5] = [
    VIRTIO_F_VERSION_1,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_STATUS,
    VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_GUEST_ANNOUNCE,
];

/// A network device. Its worker waits without cost while no frame comes or goes, and ends with the device.
#[derive(Debug)]
pub struct Net {
    service: Service,
    link: Arc<Link>,
    features: u64,
    mac: Option<MacAddress>,
    mtu: Option<u16>,
}

/// What may be asked of a network device while its guest runs.
#[derive(Clone, Debug)]
pub struct NetControl {
    limits: Arc<NewLimits<2>>,
    counts: Arc<NetCounts>,
    link: Arc<Link>,
    nudge: Nudge,
}

impl NetControl {
    /// Gives it new limits; buckets that are left out stay as they are.
    pub fn limit(&self, rx: Option<RateLimiterConfig>, tx: Option<RateLimiterConfig>) {
        self.limits.leave([rx, tx].map(Option::unwrap_or_default));
        self.nudge.nudge();
    }

    /// Has the guest tell its network where it is now, if its driver can (5.1.6.5.4): it has come here from elsewhere.
    pub fn announce(&self) {
        self.link.announce();
        self.nudge.nudge();
    }

    /// What the device has done so far.
    pub fn counts(&self) -> &Arc<NetCounts> {
        &self.counts
    }
}

impl Net {
    /// An idle device with its thread, for an open tap, and the metadata service if the guest may ask it by this interface.
    ///
    /// # Errors
    ///
    /// When the thread or the eventfd that wakes it cannot be made.
    pub fn new(
        config: &NetworkInterfaceConfig,
        tap: Tap,
        metadata: Option<Stack>,
    ) -> io::Result<(Self, NetControl)> {
        let mut bits = OWN.to_vec();
        bits.extend(OFFLOADS);
        if tap.has_uso() {
            bits.extend(UDP_OFFLOADS);
        }
        bits.extend(config.guest_mac.map(|_| VIRTIO_NET_F_MAC));
        bits.extend(config.mtu.map(|_| VIRTIO_NET_F_MTU));
        let features = bits.into_iter().fold(0, |all, bit| all | 1 << bit);

        let link = Arc::<Link>::default();
        let counts = Arc::<NetCounts>::default();
        let limits = Arc::<NewLimits<2>>::default();
        let now = Instant::now();
        let limiter = |limits: Option<RateLimiterConfig>| RateLimiter::new(&limits.unwrap_or_default(), now);
        let mut worker = Worker::new(tap, Arc::clone(&counts), Arc::clone(&link), Arc::clone(&limits));
        worker.limit(limiter(config.rx_rate_limiter), limiter(config.tx_rate_limiter));
        worker.speak_for(config.guest_mac);
        worker.answer_by(metadata);
        let name = format!("net {}", config.iface_id);
        let service = Service::new(threads::Kind::Net, &name, move |mailbox| {
            mailbox.serve(|session| worker.serve(mailbox, session));
        })?;
        let control = NetControl {
            limits,
            counts,
            link: Arc::clone(&link),
            nudge: service.nudge(),
        };
        let net = Self {
            service,
            link,
            features: features | FEATURE_EVENT_IDX | FEATURE_INDIRECT_DESC,
            mac: config.guest_mac,
            mtu: config.mtu,
        };
        Ok((net, control))
    }

    /// The configuration space (5.1.4); fields of features that are not offered are zero.
    fn config(&self) -> [u8; CONFIG_BYTES] {
        let mut space = [0; CONFIG_BYTES];
        let (mac, rest) = space.split_at_mut(6);
        mac.copy_from_slice(&self.mac.map(MacAddress::bytes).unwrap_or_default());
        let fields = [self.link.status(), 0, self.mtu.unwrap_or_default()];
        for (place, field) in rest.chunks_exact_mut(2).zip(fields) {
            place.copy_from_slice(&field.to_le_bytes());
        }
        space
    }
}

impl VirtioDevice for Net {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Network
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes_max(&self) -> &[u16] {
        &QUEUE_SIZES_MAX
    }

    fn read_config(&self, offset_bytes: u64, data: &mut [u8]) {
        read_space(&self.config(), offset_bytes, data);
    }

    fn write_config(&mut self, _offset_bytes: u64, _data: &[u8]) {}

    fn reset_config(&mut self) {
        self.link.set_announces(false);
    }

    fn save(&self) -> DeviceState {
        DeviceState::Network(NetState {
            announces: self.link.announces(),
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceStateError> {
        match state {
            DeviceState::Network(NetState { announces }) => {
                self.link.set_announces(*announces);
                Ok(())
            }
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
