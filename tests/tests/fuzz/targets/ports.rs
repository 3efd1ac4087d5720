//! The devices behind I/O ports: serial port, keyboard controller, power, places of devices. An input is a sequence of what
//! the guest and the host do, each a byte and its arguments.

use std::sync::{Arc, Mutex, PoisonError};

use coracle_devices::bus::{Bus, BusDevice, BusRange};
use coracle_devices::hotplug::{HOTPLUG_PORT, HOTPLUG_PORTS, Hotplug, HotplugRegisters};
use coracle_devices::i8042::{I8042, I8042_PORT, I8042_PORTS};
use coracle_devices::power::{EndSignal, GuestEnd, POWER_PORT, POWER_PORTS, Power};
use coracle_devices::serial::{INPUT_BYTES_MAX, Output, SERIAL_PORT, SERIAL_PORTS, SerialPort};
use coracle_storage::limit::TokenBucketConfig;

use super::Input;

/// What is done with one input at most.
const STEPS_MAX: usize = 4096;
/// The widths that a guest's IN and OUT have, and one of an MMIO access.
const WIDTHS: [usize; 4] = [1, 2, 4, 8];

pub(crate) fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let mut rig = Rig::new(&mut input);
    for _ in 0..STEPS_MAX {
        if input.is_empty() {
            break;
        }
        rig.step(&mut input);
        rig.check();
    }
    rig.with_serial(|serial| serial.output_mut().finish(0));
}

struct Rig {
    bus: Bus,
    serial: Arc<Mutex<SerialPort>>,
    keyboard: Arc<Mutex<I8042>>,
    hotplug: Arc<Hotplug>,
    end: Arc<EndSignal>,
    first_end: Option<GuestEnd>,
}

impl Rig {
    fn new(input: &mut Input<'_>) -> Self {
        let output = match input.u8() {
            0 => Output::discard(),
            size => Output::discard().limited(TokenBucketConfig {
                size: size.into(),
                one_time_burst: None,
                refill_time: 1 << 40,
            }),
        };
        let end = EndSignal::new().expect("a descriptor is free: none leaks");
        let serial = SerialPort::new(output).expect("a descriptor is free");
        let keyboard = I8042::new(Arc::clone(&end)).expect("a descriptor is free");
        let (serial, keyboard) = (Arc::new(Mutex::new(serial)), Arc::new(Mutex::new(keyboard)));
        let power = Arc::new(Mutex::new(Power::new(Arc::clone(&end))));
        let hotplug = Hotplug::new().expect("a descriptor is free");
        let places = Arc::new(Mutex::new(HotplugRegisters(Arc::clone(&hotplug))));
        let mut bus = Bus::new();
        put(&mut bus, HOTPLUG_PORT, HOTPLUG_PORTS, places);
        put(&mut bus, SERIAL_PORT, SERIAL_PORTS, serial.clone());
        put(&mut bus, I8042_PORT, I8042_PORTS, keyboard.clone());
        put(&mut bus, POWER_PORT, POWER_PORTS, power);
        Self {
            bus,
            serial,
            keyboard,
            hotplug,
            end,
            first_end: None,
        }
    }

    fn step(&mut self, input: &mut Input<'_>) {
        let step = input.u8();
        match step {
            0xf0..=0xf7 => {
                let bytes = input.take(usize::from(step & 7) * 17);
                self.with_serial(|serial| {
                    let room = serial.input_room();
                    assert_eq!(serial.receive(bytes), bytes.len().min(room));
                });
            }
            0xf8 => {
                // Refused when the guest does not read its keyboard, which is its own affair.
                let _ = locked(&self.keyboard).press_ctrl_alt_del();
            }
            0xf9 => self.with_serial(|serial| serial.attend()),
            0xfa => self.with_serial(|serial| serial.output_mut().drain()),
            0xfc => self.hotplug.came(u32::from(input.u8() & 31)),
            0xfd => self.hotplug.went(u32::from(input.u8() & 31)),
            0xfb => {
                let address = input.u64();
                self.access(address, step, input);
            }
            _ => {
                // Mostly byte-wide accesses to ports that are there.
                let base = [SERIAL_PORT, HOTPLUG_PORT, I8042_PORT, POWER_PORT];
                let base = base.get(usize::from(step & 3)).copied().unwrap_or(SERIAL_PORT);
                let port = u64::from(base) + u64::from(step >> 2 & 7);
                self.access(port, step >> 5, input);
            }
        }
    }

    /// A read or a write at `address`; the bits of `kind` say which, and how wide.
    fn access(&mut self, address: u64, kind: u8, input: &mut Input<'_>) {
        let width = if kind & 6 == 6 { input.u8() & 3 } else { 0 };
        let width = WIDTHS.get(usize::from(width)).copied().unwrap_or(1);
        let mut data = [0xa5; 8];
        let data = data.get_mut(..width).expect("no access is wider than 8 bytes");
        if kind & 1 == 0 {
            self.bus.read(address, data);
        } else {
            for (to, from) in data.iter_mut().zip(input.take(width)) {
                *to = *from;
            }
            self.bus.write(address, data);
        }
    }

    fn check(&mut self) {
        self.first_end = self.first_end.or(self.end.end());
        assert_eq!(
            self.end.end(),
            self.first_end,
            "the first end is the one that counts"
        );
        self.with_serial(|serial| assert!(serial.input_room() <= INPUT_BYTES_MAX));
        let [occupied, changed] = [0, 4].map(|offset| {
            let mut data = [0; 4];
            self.bus.read(u64::from(HOTPLUG_PORT) + offset, &mut data);
            u32::from_le_bytes(data)
        });
        assert_eq!(changed & !occupied, 0, "what has come is there");
    }

    fn with_serial(&self, look: impl FnOnce(&mut SerialPort)) {
        look(&mut locked(&self.serial));
    }
}

fn put(bus: &mut Bus, start: u16, len: u16, device: Arc<Mutex<dyn BusDevice>>) {
    let range = BusRange {
        start: start.into(),
        len: len.into(),
    };
    bus.insert(range, "device", device)
        .expect("the ports do not overlap");
}

fn locked<T>(device: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}
