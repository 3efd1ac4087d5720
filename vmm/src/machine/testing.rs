//! A small machine for tests: a processor that halts, and a disk that the test makes, with a driver that has started it.

use std::io::Write;

use coracle_devices::bus::BusDevice;
use coracle_devices::virtio::blk::{Disk, DriveConfig};
use coracle_storage::lease::{Lock, Owner};

use super::plan::{DiskPlan, Plan};
use super::{Machine, Running};
use crate::config::{BootSource, Config};

/// An image whose first address is entered by the Linux protocol: `hlt`, for ever.
fn kernel() -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().expect("a scratch file");
    let segment = [0x78, 0x10_0000, 0x10_0000, 3, 3, 1]
        .map(u64::to_le_bytes)
        .concat();
    let parts = [
        &b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0"[..],
        &[0x10_0000_u64, 64, 0].map(u64::to_le_bytes).concat(),
        &[0u16, 0, 64, 56, 1, 0, 0, 0].map(u16::to_le_bytes).concat(),
        &[1u32, 5].map(u32::to_le_bytes).concat(),
        &segment,
        // hlt; jmp -3
        &[0xf4, 0xeb, 0xfd],
    ];
    for part in parts {
        file.write_all(part).expect("a scratch file can be written");
    }
    file
}

/// The configuration of a machine with drive `d` on a file of its own, which lasts as long as the second.
pub(crate) fn config() -> (Config, [tempfile::NamedTempFile; 2]) {
    let (kernel, image) = (kernel(), tempfile::NamedTempFile::new().expect("a scratch file"));
    image.as_file().set_len(1 << 20).expect("a file can be sparse");
    let path = |file: &tempfile::NamedTempFile| file.path().display().to_string();
    let mut config = Config::default();
    let source = BootSource {
        kernel_image_path: path(&kernel),
        ..BootSource::default()
    };
    config.set_boot_source(source).expect("a kernel");
    let drive = DriveConfig {
        drive_id: "d".to_owned(),
        path_on_host: Some(path(&image)),
        lock: Some(Lock::None),
        ..DriveConfig::default()
    };
    config.insert_drive(drive).expect("a drive");
    (config, [kernel, image])
}

/// The plan of [`config`], with another disk in place of the file.
pub(crate) fn plan(config: &Config, disk: Disk) -> Plan {
    let mut plan = Plan::new(config, &Owner::of_this_process("test")).expect("files that were made just now");
    let DiskPlan { held, .. } = plan.disks.first_mut().expect("drive d");
    held.disk = disk;
    plan
}

impl Machine<Running> {
    /// Does what a guest's driver does to start its first disk, with an empty queue.
    pub(crate) fn start_driver(&self) {
        let slot = self.parts.devices.first().expect("drive d");
        let mut transport = slot.lock();
        // ACKNOWLEDGE, DRIVER; VERSION_1; FEATURES_OK; queue 0 of 8 in memory that nobody uses; DRIVER_OK (4.2.2).
        let writes = [
            (0x70, 1),
            (0x70, 3),
            (0x24, 1),
            (0x20, 1),
            (0x70, 0xb),
            (0x30, 0),
            (0x38, 8),
            (0x80, 0x20_0000),
            (0x90, 0x20_1000),
            (0xa0, 0x20_2000),
            (0x44, 1),
            (0x70, 0xf),
        ];
        for (offset, value) in writes {
            transport.write(offset, &u32::to_le_bytes(value));
        }
        let mut status = [0; 4];
        transport.read(0x70, &mut status);
        assert_eq!(status, [0xf, 0, 0, 0], "the device serves");
    }
}
