//! The virtio-mmio register file around a device that serves at once, and around the real devices. An input
//! is a sequence of what the driver and the machine do, each a byte and its arguments.

mod null;

use std::cell::RefCell;
use std::io::Write as _;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::sync::Arc;

use coracle_devices::bus::BusDevice;
use coracle_devices::virtio::balloon::{Balloon, BalloonConfig, Reclaim};
use coracle_devices::virtio::blk::{Blk, DriveConfig};
use coracle_devices::virtio::device::VirtioDevice;
use coracle_devices::virtio::mem::{Blocks, Geometry, Mem, Slots};
use coracle_devices::virtio::mmio::{MMIO_LEN, MmioTransport, QUEUE_NOTIFY};
use coracle_devices::virtio::net::{Net, NetworkInterfaceConfig, Tap};
use coracle_devices::virtio::pmem::{Medium, Pmem, PmemConfig, PmemRange};
use coracle_devices::virtio::rng::{Entropy, EntropyConfig};
use coracle_devices::virtio::segments;
use coracle_devices::virtio::vsock::{Listener, Vsock, VsockConfig};
use coracle_storage::backend::Access;
use coracle_storage::engine::Engine;
use coracle_storage::lease::{Lock, Owner, Succession};
use coracle_storage::request::Segment;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::Input;

/// What is done with one input at most.
const STEPS_MAX: usize = 1024;
/// How often the device of one input is saved and restored at most.
const MOVES_MAX: usize = 4;
/// Two regions that touch.
const REGIONS: [(GuestAddress, usize); 2] = [(GuestAddress(0), 0x1_0000), (GuestAddress(0x1_0000), 0x1_0000)];
/// Where a driver that behaves puts its one queue.
const DESCRIPTORS: u32 = 0;
const AVAIL: u32 = 0x2000;
const USED: u32 = 0x3000;

const MAGIC_VALUE: u64 = 0x000;
const STATUS: u64 = 0x070;
const STATUS_BITS: u32 = 0xcf;

pub(crate) fn run_null(data: &[u8]) {
    run(&|| Box::new(null::Null::default()), data);
}

pub(crate) fn run_rng(data: &[u8]) {
    let make: &Make = &|| {
        let device = Entropy::new(&EntropyConfig::default());
        Box::new(device.expect("a thread and a descriptor: none leaks"))
    };
    run(make, data);
}

/// The host sends what it likes as well.
pub(crate) fn run_net(data: &[u8]) {
    const FRAMES: usize = 8;
    let hosts = RefCell::new(Vec::new());
    let make: &Make = &|| {
        let queue = || {
            let (ours, host) = UnixDatagram::pair().expect("a pair of sockets");
            for socket in [&ours, &host] {
                socket.set_nonblocking(true).expect("any socket can");
            }
            for frame in data.chunks(data.len() / FRAMES + 1) {
                // As many as fit.
                let _ = host.send(frame);
            }
            hosts.borrow_mut().push(host);
            ours
        };
        let tap = Tap::over([queue(), queue()]);
        let config = NetworkInterfaceConfig {
            iface_id: "fuzz".to_owned(),
            host_dev_name: "fuzz".to_owned(),
            guest_mac: "06:00:ac:10:00:02".parse().ok(),
            mtu: Some(1500),
            queue_pairs: Some(2),
            rx_rate_limiter: None,
            tx_rate_limiter: None,
        };
        let (device, control) = Net::new(&config, tap, None).expect("threads and descriptors: none leaks");
        control.announce();
        Box::new(device)
    };
    run(make, data);
}

/// Programs of the host call with what they like, and one can be called.
pub(crate) fn run_vsock(data: &[u8]) {
    let (hosts, kept) = (RefCell::new(Vec::new()), RefCell::new(Vec::new()));
    let make: &Make = &|| {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("v");
        let text = |path: &std::path::Path| path.to_str().expect("the path is text").to_owned();
        let config = VsockConfig {
            vsock_id: None,
            guest_cid: 3,
            uds_path: text(&path),
        };
        let listener = Listener::bind(&config.uds_path).expect("nobody else is there");
        let called = UnixListener::bind(directory.path().join("v_1")).expect("nobody else is there");
        for line in [b"CONNECT 1\n".as_slice(), b""] {
            let mut stream = UnixStream::connect(&path).expect("somebody listens");
            stream.set_nonblocking(true).expect("any socket can");
            // As much as fits.
            let _ = stream.write_all(&[line, data].concat());
            hosts.borrow_mut().push(stream);
        }
        let (device, _counts) = Vsock::new(&config, listener).expect("a thread and a descriptor: none leaks");
        kept.borrow_mut().push((directory, called));
        Box::new(device)
    };
    run(make, data);
}

/// A flush changes nothing, whoever asks for it.
pub(crate) fn run_pmem(data: &[u8]) {
    const FILE_BYTES: u64 = 64 << 10;
    let file = tempfile::tempfile().expect("a temporary file");
    file.set_len(FILE_BYTES).expect("room for a small file");
    let file = Arc::new(file);
    let make: &Make = &|| {
        let medium = Medium::new(Arc::clone(&file), FILE_BYTES, Access::ReadOnly);
        let range = PmemRange {
            start: 1 << 38,
            size_bytes: 2 << 20,
        };
        let made = Pmem::new(&PmemConfig::default(), Arc::new(medium), range, |_| ());
        let (device, _control) = made.expect("a thread and a descriptor: none leaks");
        Box::new(device)
    };
    run(make, data);
    assert_eq!(file.metadata().expect("the file is there").len(), FILE_BYTES);
}

/// Whatever is given back lies within the memory of the guest.
pub(crate) fn run_balloon(data: &[u8]) {
    struct Host;
    impl Reclaim for Host {
        fn reclaim(&mut self, segment: Segment) -> std::io::Result<u64> {
            segments::scatter(&[segment], 0, &vec![0; segment.len_bytes()]);
            Ok(segment.len_bytes() as u64)
        }
    }
    let make: &Make = &|| {
        let config = BalloonConfig {
            amount_mib: 1,
            deflate_on_oom: true,
            stats_polling_interval_s: 1,
            free_page_hinting: true,
            free_page_reporting: true,
        };
        let (device, control) =
            Balloon::new(&config, Box::new(Host)).expect("a thread and a descriptor: none leaks");
        control.start_hinting(true);
        Box::new(device)
    };
    run(make, data);
}

/// Whatever the host is asked for lies in the region, and is asked for in an order that makes sense.
pub(crate) fn run_mem(data: &[u8]) {
    const SLOT: u64 = 128 << 20;
    const SIZE: u64 = 2 * SLOT;
    #[derive(Default)]
    struct Host([bool; 2]);
    impl Host {
        fn set(&mut self, slot: u64, is_shown: bool) {
            let slot = usize::try_from(slot).expect("a small number");
            let before = self.0.get_mut(slot).expect("there are two slots");
            assert_ne!(
                std::mem::replace(before, is_shown),
                is_shown,
                "nothing is asked for twice"
            );
        }
    }
    impl Slots for Host {
        fn show(&mut self, slot: u64) -> std::io::Result<()> {
            self.set(slot, true);
            Ok(())
        }

        fn came(&mut self, range: Range<u64>) {
            assert!(range.start < range.end && range.end <= SIZE);
            let mut slots = self.0.iter().zip(0_u64..);
            let is_in = |slot: u64| slot * SLOT < range.end && range.start < (slot + 1) * SLOT;
            assert!(
                slots.all(|(is_shown, slot)| *is_shown || !is_in(slot)),
                "it is reached"
            );
        }

        fn goes(&mut self, range: Range<u64>) {
            assert!(range.start < range.end && range.end <= SIZE);
        }

        fn hide(&mut self, slot: u64) -> std::io::Result<()> {
            self.set(slot, false);
            Ok(())
        }

        fn discard(&mut self, range: Range<u64>) -> std::io::Result<()> {
            assert!(range.start < range.end && range.end <= SIZE);
            Ok(())
        }
    }
    let make: &Make = &|| {
        let geometry = Geometry {
            blocks: Arc::new(Blocks::new(4 << 30, SIZE, 2 << 20)),
            slot_bytes: SLOT,
        };
        let (device, control) =
            Mem::new(geometry, Box::<Host>::default()).expect("a thread and a descriptor: none leaks");
        control.request(130);
        Box::new(device)
    };
    run(make, data);
}

pub(crate) fn run_blk(data: &[u8]) {
    const IMAGE_BYTES: u64 = 64 << 10;
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.as_file()
        .set_len(IMAGE_BYTES)
        .expect("room for a small file");
    let path = std::str::from_utf8(file.path().as_os_str().as_bytes()).expect("the path is text");
    let drive = DriveConfig {
        drive_id: "fuzz".to_owned(),
        path_on_host: Some(path.to_owned()),
        io_engine: Some(Engine::Sync),
        lock: Some(Lock::None),
        ..DriveConfig::default()
    };
    let make: &Make = &|| {
        let held = drive.open(&Owner::of_this_process("fuzz"), Succession::Raises);
        let disk = held.expect("the image is one").disk;
        let (device, _control) = Blk::new(disk).expect("a thread and a descriptor: none leaks");
        Box::new(device)
    };
    run(make, data);
    let len = file.as_file().metadata().expect("the file is there").len();
    assert_eq!(len, IMAGE_BYTES, "a guest does not change the size of its disk");
    let beyond = file.as_file().read_at(&mut [0], IMAGE_BYTES);
    assert_eq!(beyond.ok(), Some(0));
}

/// Makes a device: each time the same.
type Make<'a> = dyn Fn() -> Box<dyn VirtioDevice> + 'a;

fn run(make: &Make<'_>, data: &[u8]) {
    let memory = GuestMemoryMmap::from_ranges(&REGIONS).expect("a little memory");
    let memory = Arc::new(memory);
    let transport = MmioTransport::new(make(), Arc::clone(&memory)).expect("a descriptor: none leaks");
    let mut driver = Driver {
        make,
        moves: 0,
        memory,
        transport,
        offered: 0,
    };
    let mut input = Input::new(data);
    for _ in 0..STEPS_MAX {
        if input.is_empty() {
            break;
        }
        driver.step(&mut input);
    }
    driver.finish();
}

struct Driver<'a> {
    make: &'a Make<'a>,
    /// How often it has found another device in the place of its own.
    moves: usize,
    memory: Arc<GuestMemoryMmap>,
    transport: MmioTransport,
    offered: u16,
}

impl Driver<'_> {
    fn step(&mut self, input: &mut Input<'_>) {
        match input.u8() & 15 {
            0 | 1 => {
                let register = u64::from(input.u8()) * 4;
                self.read(register);
            }
            2 | 3 => {
                let (register, value) = (u64::from(input.u8()) * 4, input.u32());
                self.write(register, value);
            }
            4 => self.odd_access(input),
            5 => self.behave(input.u8()),
            6 => {
                let queue = input.u8();
                self.write(QUEUE_NOTIFY, queue.into());
            }
            7 => {
                self.transport.pause().expect("the device drains");
                let then = input.u8();
                if then & 2 != 0 && self.moves < MOVES_MAX {
                    self.go_elsewhere();
                }
                if then & 1 == 0 {
                    // Refused when the device cannot go on, and then its driver hears of it.
                    let _ = self.transport.resume();
                }
            }
            8 => {
                let (address, len) = (input.u32(), input.u8());
                self.poke(address & 0x1_ffff, input.take(len.into()));
            }
            9..=11 => {
                let (index, descriptor) = (input.u8(), input.take(16));
                self.poke(DESCRIPTORS + 16 * u32::from(index), descriptor);
            }
            _ => {
                let head = input.u8();
                self.offer(head.into());
            }
        }
    }

    /// Saves the device, and goes on with a fresh one: whatever the driver has done, that works.
    fn go_elsewhere(&mut self) {
        self.moves += 1;
        let state = self.transport.save().expect("it is paused");
        self.transport =
            MmioTransport::new((self.make)(), Arc::clone(&self.memory)).expect("a descriptor: none leaks");
        self.transport
            .restore(&state)
            .expect("what was saved is taken up");
    }

    fn read(&mut self, register: u64) -> u32 {
        let mut data = [0xa5; 4];
        self.transport.read(register, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&mut self, register: u64, value: u32) {
        self.transport.write(register, &value.to_le_bytes());
    }

    /// An access of any width to any register.
    fn odd_access(&mut self, input: &mut Input<'_>) {
        let (kind, offset) = (input.u8(), u64::from(input.u16()) % MMIO_LEN);
        let mut data = [0xa5; 8];
        let data = data.get_mut(..1 << (kind & 3)).expect("at most 8 bytes");
        if kind & 4 == 0 {
            self.transport.read(offset, data);
        } else {
            for (to, from) in data.iter_mut().zip(input.take(8)) {
                *to = *from;
            }
            self.transport.write(offset, data);
        }
    }

    /// Sets the device up as a driver should, with a queue of 2^`power` descriptors.
    fn behave(&mut self, power: u8) {
        self.offered = 0;
        self.poke(AVAIL, &[0; 4]);
        self.write(STATUS, 0);
        self.write(STATUS, 1);
        self.write(STATUS, 3);
        for half in [0, 1] {
            self.write(0x014, half);
            let offered = self.read(0x010);
            self.write(0x024, half);
            // One bit of the size takes away the event index, another the indirect descriptors.
            let declined = u32::from(power >> 5) << 28;
            self.write(0x020, if half == 0 { offered & !declined } else { offered });
        }
        self.write(STATUS, 11);
        for (register, value) in [
            (0x030, 0),
            (0x038, 1 << (power % 9)),
            (0x080, DESCRIPTORS),
            (0x090, AVAIL),
            (0x0a0, USED),
            (0x044, 1),
        ] {
            self.write(register, value);
        }
        self.write(STATUS, 15);
        assert_eq!(self.read(STATUS) & 0xf, 15, "a driver that behaves is served");
    }

    /// Makes the chain at `head` available, in a ring of the largest size.
    fn offer(&mut self, head: u16) {
        let slot = AVAIL + 4 + 2 * u32::from(self.offered % 256);
        self.poke(slot, &head.to_le_bytes());
        self.offered = self.offered.wrapping_add(1);
        self.poke(AVAIL + 2, &self.offered.to_le_bytes());
    }

    /// Writes guest memory; what would lie beyond it is lost.
    fn poke(&mut self, address: u32, bytes: &[u8]) {
        let _ = self.memory.write(bytes, GuestAddress(address.into()));
    }

    /// Whatever was done before: the registers answer, the device drains and can be reset.
    fn finish(&mut self) {
        assert_eq!(self.read(MAGIC_VALUE).to_le_bytes(), *b"virt");
        assert_eq!(self.read(STATUS) & !STATUS_BITS, 0);
        self.transport.pause().expect("the device drains");
        self.write(STATUS, 0);
        assert_eq!(self.read(STATUS), 0, "a device that is drained is reset at once");
    }
}
