//! The register half of a network device, and what controls it beside its driver.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use coracle_storage::limit::{RateLimiterConfig, SharedLimiter};
use coracle_storage::threads;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
};

use super::config::{MacAddress, NetworkInterfaceConfig};
use super::control::Link;
use super::pairs::Pairs;
use super::tap::Tap;
use super::worker::{Layout, Limiters, NetCounts, Shared, Worker};
use super::{MultiqueueState, NetState};
use crate::mmds::Stack;
use crate::virtio::device::{
    DeviceKind, Notice, Patience, Session, StartError, Stop, VirtioDevice, read_space,
};
use crate::virtio::ring::{FEATURE_EVENT_IDX, FEATURE_INDIRECT_DESC};
use crate::virtio::service::{Nudge, Service};
use crate::virtio::state::{DeviceState, DeviceStateError};
use crate::virtio::team::Team;

/// The size of a queue for frames. That of commands needs less, but where it is, the driver decides (5.1.2).
const QUEUE_SIZE_MAX: u16 = 256;
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

/// A network device. Its workers wait without cost while no frame comes or goes, and end with the device.
#[derive(Debug)]
pub struct Net {
    team: Team,
    link: Arc<Link>,
    features: u64,
    queue_sizes: Vec<u16>,
    pairs_max: u16,
    mac: Option<MacAddress>,
    mtu: Option<u16>,
}

/// What may be asked of a network device while its guest runs.
#[derive(Clone, Debug)]
pub struct NetControl {
    limiters: Arc<Limiters>,
    counts: Arc<NetCounts>,
    link: Arc<Link>,
    nudges: Vec<Nudge>,
}

impl NetControl {
    /// Gives it new limits; buckets that are left out stay as they are.
    pub fn limit(&self, rx: Option<RateLimiterConfig>, tx: Option<RateLimiterConfig>) {
        let now = Instant::now();
        self.limiters.rx.update(&rx.unwrap_or_default(), now);
        self.limiters.tx.update(&tx.unwrap_or_default(), now);
        self.nudge();
    }

    /// Has the guest tell its network where it is now, if its driver can (5.1.6.5.4): it has come here from elsewhere.
    pub fn announce(&self) {
        self.link.announce();
        self.nudge();
    }

    /// What the device has done so far.
    pub fn counts(&self) -> &Arc<NetCounts> {
        &self.counts
    }

    fn nudge(&self) {
        self.nudges.iter().for_each(Nudge::nudge);
    }
}

impl Net {
    /// An idle device with its threads, one for each queue of an open tap, and the metadata service if the guest may ask it by
    /// this interface.
    ///
    /// # Errors
    ///
    /// When a thread or an eventfd that wakes it cannot be made.
    pub fn new(
        config: &NetworkInterfaceConfig,
        tap: Tap,
        metadata: Option<Stack>,
    ) -> io::Result<(Self, NetControl)> {
        let has_uso = tap.has_uso();
        let queues = tap.into_queues();
        let pairs_max = u16::try_from(queues.len()).unwrap_or(u16::MAX);
        let now = Instant::now();
        let limiter =
            |limits: Option<RateLimiterConfig>| SharedLimiter::new(&limits.unwrap_or_default(), now);
        let link = Arc::<Link>::default();
        let shared = Shared {
            counts: Arc::default(),
            limiters: Arc::new(Limiters {
                rx: limiter(config.rx_rate_limiter),
                tx: limiter(config.tx_rate_limiter),
            }),
            pairs: Arc::new(Pairs::new(queues, Arc::clone(&link))),
            metadata: metadata.map(|stack| Arc::new(Mutex::new(stack))),
            mac: config.guest_mac,
            link,
        };
        let workers = (0..usize::from(pairs_max)).map(|number| service(&config.iface_id, number, &shared));
        let team = Team::new(workers.collect::<io::Result<_>>()?);
        let nudges = team.nudges();
        shared.pairs.wake_by(nudges.clone());
        let control = NetControl {
            limiters: shared.limiters,
            counts: shared.counts,
            link: Arc::clone(&shared.link),
            nudges,
        };
        let net = Self {
            team,
            link: shared.link,
            features: features(config, has_uso, pairs_max),
            queue_sizes: vec![QUEUE_SIZE_MAX; 2 * usize::from(pairs_max) + 1],
            pairs_max,
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
        let pairs = if self.pairs_max > 1 { self.pairs_max } else { 0 };
        let fields = [self.link.status(), pairs, self.mtu.unwrap_or_default()];
        for (place, field) in rest.chunks_exact_mut(2).zip(fields) {
            place.copy_from_slice(&field.to_le_bytes());
        }
        space
    }
}

/// The thread that serves pair `number` of the interface of this name.
fn service(iface_id: &str, number: usize, shared: &Shared) -> io::Result<Service> {
    let mut worker = Worker::new(number, shared.clone());
    let suffix = match number {
        0 => String::new(),
        _ => format!(".{number}"),
    };
    let name = format!("net {iface_id}{suffix}");
    Service::new(threads::Kind::Net, &name, move |mailbox| {
        mailbox.serve(|session| worker.serve(mailbox, session));
    })
}

/// What is offered to the driver of a device with this tap.
fn features(config: &NetworkInterfaceConfig, has_uso: bool, pairs_max: u16) -> u64 {
    let mut bits = OWN.to_vec();
    bits.extend(OFFLOADS);
    if has_uso {
        bits.extend(UDP_OFFLOADS);
    }
    if pairs_max > 1 {
        bits.push(VIRTIO_NET_F_MQ);
    }
    bits.extend(config.guest_mac.map(|_| VIRTIO_NET_F_MAC));
    bits.extend(config.mtu.map(|_| VIRTIO_NET_F_MTU));
    let features = bits.into_iter().fold(0, |all, bit| all | 1 << bit);
    features | FEATURE_EVENT_IDX | FEATURE_INDIRECT_DESC
}

impl VirtioDevice for Net {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Network
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes_max(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset_bytes: u64, data: &mut [u8]) {
        read_space(&self.config(), offset_bytes, data);
    }

    fn write_config(&mut self, _offset_bytes: u64, _data: &[u8]) {}

    fn reset_config(&mut self) {
        self.link.set_announces(false);
        self.link.set_pairs(1);
    }

    fn save(&self) -> DeviceState {
        let announces = self.link.announces();
        if self.pairs_max == 1 {
            return DeviceState::Network(NetState { announces });
        }
        let pairs = u16::try_from(self.link.pairs()).unwrap_or(u16::MAX);
        DeviceState::MultiqueueNetwork(MultiqueueState { announces, pairs })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceStateError> {
        let (announces, pairs) = match state {
            DeviceState::Network(NetState { announces }) => (*announces, 1),
            DeviceState::MultiqueueNetwork(MultiqueueState { announces, pairs }) => (*announces, *pairs),
            other => return Err(other.is_not_for(self.kind())),
        };
        if !(1..=self.pairs_max).contains(&pairs) {
            let here = self.pairs_max;
            return Err(DeviceStateError::QueuePairs { saved: pairs, here });
        }
        self.link.set_announces(announces);
        self.link.set_pairs(pairs.into());
        Ok(())
    }

    fn start(&mut self, session: Session) -> Result<(), StartError> {
        let layout = Layout::new(session.queues.len(), session.features);
        self.team
            .start(session, QUEUES_NEEDED, |queue| layout.worker_of(queue))
    }

    fn begin_stop(&mut self, notice: &Notice) {
        self.team.begin_stop(notice);
    }

    fn poll_stop(&mut self, patience: Patience) -> Stop {
        self.team.poll_stop(patience)
    }
}
