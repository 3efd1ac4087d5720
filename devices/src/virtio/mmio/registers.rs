//! What the driver of a virtio-mmio device writes, and the numbers by which it does (virtio 1.2, 4.2.2).

use crate::virtio::ring::QueueLayout;

pub(super) const FEATURE_VERSION_1: u64 = 1 << virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

/// A queue as the driver sets it up.
#[derive(Clone, Copy)]
pub(super) struct QueueSetup {
    pub(super) layout: QueueLayout,
    pub(super) ready: bool,
    pub(super) size_max: u16,
}

/// What the driver has written; a reset makes it new.
pub(super) struct Registers {
    pub(super) status: u32,
    pub(super) device_features_sel: u32,
    pub(super) driver_features_sel: u32,
    pub(super) driver_features: u64,
    pub(super) queue_sel: u32,
    pub(super) queues: Vec<QueueSetup>,
}

impl Registers {
    /// As after a reset, for queues of these largest sizes.
    pub(super) fn new(queue_sizes_max: &[u16]) -> Self {
        // 0 is no size: a driver that forgets to write one has a queue that cannot be built.
        let layout = QueueLayout::default();
        let setup = |&size_max: &u16| QueueSetup {
            layout,
            ready: false,
            size_max,
        };
        Self {
            status: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            queues: queue_sizes_max.iter().map(setup).collect(),
        }
    }

    /// The queue that the driver has selected, if there is one of that number.
    pub(super) fn selected(&self) -> Option<&QueueSetup> {
        self.queues.get(usize::try_from(self.queue_sel).ok()?)
    }

    /// The 32 bits of `features` that the driver has selected.
    pub(super) fn window(&self, features: u64) -> u32 {
        #[expect(clippy::cast_possible_truncation, reason = "a window of 32 bits is wanted")]
        match self.device_features_sel {
            0 => features as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        }
    }

    /// Whether the driver asks for nothing that was not offered, and knows virtio 1 and what is `needed`.
    pub(super) fn features_are_within(&self, offered: u64, needed: u64) -> bool {
        let needed = needed | FEATURE_VERSION_1;
        self.driver_features & !offered == 0 && self.driver_features & needed == needed
    }

    pub(super) fn write_driver_features(&mut self, value: u32) {
        // What FEATURES_OK has sealed stays (3.1.1); what comes before DRIVER is nobody's.
        if self.status & (status::DRIVER | status::FEATURES_OK) != status::DRIVER {
            return;
        }
        match self.driver_features_sel {
            0 => set_low(&mut self.driver_features, value),
            1 => set_high(&mut self.driver_features, value),
            // No device offers more than 64 features, so none of these was offered.
            _ => {}
        }
    }

    /// A write to one of the registers of the selected queue.
    pub(super) fn write_queue(&mut self, offset: u64, value: u32) {
        if self.status & (status::FEATURES_OK | status::DRIVER_OK) != status::FEATURES_OK {
            return;
        }
        let index = usize::try_from(self.queue_sel).ok();
        let Some(queue) = index.and_then(|index| self.queues.get_mut(index)) else {
            return;
        };
        if offset == register::QUEUE_READY {
            queue.ready = value == 1;
            return;
        }
        if queue.ready {
            return;
        }
        let QueueSetup { layout, size_max, .. } = queue;
        match offset {
            // A size beyond the largest becomes 0, which no queue can be built with.
            register::QUEUE_SIZE => {
                layout.size = u16::try_from(value)
                    .ok()
                    .filter(|size| size <= size_max)
                    .unwrap_or(0);
            }
            register::QUEUE_DESC_LOW => set_low(&mut layout.descriptors, value),
            register::QUEUE_DESC_HIGH => set_high(&mut layout.descriptors, value),
            register::QUEUE_DRIVER_LOW => set_low(&mut layout.avail, value),
            register::QUEUE_DRIVER_HIGH => set_high(&mut layout.avail, value),
            register::QUEUE_DEVICE_LOW => set_low(&mut layout.used, value),
            register::QUEUE_DEVICE_HIGH => set_high(&mut layout.used, value),
            _ => {}
        }
    }
}

fn set_low(word: &mut u64, value: u32) {
    *word = *word & !u64::from(u32::MAX) | u64::from(value);
}

fn set_high(word: &mut u64, value: u32) {
    *word = *word & u64::from(u32::MAX) | u64::from(value) << 32;
}

/// Register offsets.
pub(super) mod register {
    pub(in super::super) const MAGIC_VALUE: u64 = 0x000;
    pub(in super::super) const VERSION: u64 = 0x004;
    pub(in super::super) const DEVICE_ID: u64 = 0x008;
    pub(in super::super) const VENDOR_ID: u64 = 0x00c;
    pub(in super::super) const DEVICE_FEATURES: u64 = 0x010;
    pub(in super::super) const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub(in super::super) const DRIVER_FEATURES: u64 = 0x020;
    pub(in super::super) const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub(in super::super) const QUEUE_SEL: u64 = 0x030;
    pub(in super::super) const QUEUE_SIZE_MAX: u64 = 0x034;
    pub(in super::super) const QUEUE_SIZE: u64 = 0x038;
    pub(in super::super) const QUEUE_READY: u64 = 0x044;
    pub(in super::super) const INTERRUPT_STATUS: u64 = 0x060;
    pub(in super::super) const INTERRUPT_ACK: u64 = 0x064;
    pub(in super::super) const STATUS: u64 = 0x070;
    pub(in super::super) const QUEUE_DESC_LOW: u64 = 0x080;
    pub(in super::super) const QUEUE_DESC_HIGH: u64 = 0x084;
    pub(in super::super) const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub(in super::super) const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub(in super::super) const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub(in super::super) const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    pub(in super::super) const SHM_LEN_LOW: u64 = 0x0b0;
    pub(in super::super) const SHM_BASE_HIGH: u64 = 0x0bc;
    pub(in super::super) const CONFIG_GENERATION: u64 = 0x0fc;
}

/// Device status bits (2.1).
pub(super) mod status {
    pub(in super::super) const ACKNOWLEDGE: u32 = 1;
    pub(in super::super) const DRIVER: u32 = 2;
    pub(in super::super) const DRIVER_OK: u32 = 4;
    pub(in super::super) const FEATURES_OK: u32 = 8;
    pub(in super::super) const DEVICE_NEEDS_RESET: u32 = 0x40;
    pub(in super::super) const FAILED: u32 = 0x80;

    /// Each bit that a driver sets, and the one that must be there before (3.1.1).
    pub(in super::super) const ORDER: [(u32, u32); 5] = [
        (ACKNOWLEDGE, 0),
        (DRIVER, ACKNOWLEDGE),
        (FEATURES_OK, DRIVER),
        (DRIVER_OK, FEATURES_OK),
        (FAILED, 0),
    ];

    /// Whether a driver can have brought a device to this status.
    pub(in super::super) fn is_in_order(status: u32) -> bool {
        let known = ORDER.iter().fold(0, |bits, (bit, _)| bits | bit);
        let has = |bits| status & bits == bits;
        status & !known == 0 && ORDER.iter().all(|&(bit, needs)| !has(bit) || has(needs))
    }
}
