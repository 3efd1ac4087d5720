//! The numbers of virtio-mmio: register offsets (virtio 1.2, 4.2.2) and device status bits (2.1).

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
}
