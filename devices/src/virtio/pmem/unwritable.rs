//! What becomes of stores to persistent memory that is only read: KVM has them carried out here, where nothing is.

use crate::bus::BusDevice;
use crate::complaints::Complaints;

/// The range of a file that is only read. Its driver is not told so: virtio has no word for that (5.19).
#[derive(Debug)]
pub struct Unwritable {
    id: String,
    complaints: Complaints,
}

impl Unwritable {
    /// That of the device `id`.
    pub fn new(id: &str) -> Self {
        Self {
            id: id.to_owned(),
            complaints: Complaints::default(),
        }
    }
}

impl BusDevice for Unwritable {
    /// KVM reads the memory itself, and asks nobody.
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.complaints.complain(format_args!(
            "the guest stores {} bytes at {offset:#x} of the pmem device `{}`, which is read-only: nothing is kept of them",
            data.len(),
            self.id
        ));
    }
}
