//! A place on the MMIO bus that has a device, or none.

use super::registers::register;
use super::{MAGIC, MmioTransport, VERSION};
use crate::bus::BusDevice;

/// One window. Without a device it reads as a placeholder, which drivers leave alone: device ID 0 (4.2.2.2, 4.2.3.1.1).
#[derive(Default)]
pub struct Window(Option<MmioTransport>);

impl Window {
    /// The device, if there is one.
    pub fn device(&mut self) -> Option<&mut MmioTransport> {
        self.0.as_mut()
    }

    /// The same, for whoever only looks.
    pub fn seen(&self) -> Option<&MmioTransport> {
        self.0.as_ref()
    }

    /// Puts a device in, in the place of the one that was there.
    pub fn put(&mut self, transport: MmioTransport) {
        self.0 = Some(transport);
    }

    /// Takes the device out.
    pub fn take(&mut self) -> Option<MmioTransport> {
        self.0.take()
    }
}

impl BusDevice for Window {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(transport) = &mut self.0 {
            return transport.read(offset, data);
        }
        data.fill(0);
        let value = match offset {
            register::MAGIC_VALUE => MAGIC,
            register::VERSION => VERSION,
            _ => 0,
        };
        if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
            *data = value.to_le_bytes();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(transport) = &mut self.0 {
            transport.write(offset, data);
        }
    }
}
