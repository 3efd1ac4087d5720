//! A virtio entropy source (virtio 1.2, section 5.4).

use super::mmio::{Kind, Transport};
use super::queue::{Part, Queue, QueueMemory};
use super::{Error, feature};
use crate::cpu;
use crate::machine::Machine;
use crate::wait::Wait;

/// An entropy source that is set up.
#[derive(Debug)]
pub struct Entropy {
    /// Its registers.
    pub transport: Transport,
    queue: Queue,
}

/// Entropy sources that can be used.
pub const SOURCES_MAX: usize = 2;

impl Entropy {
    /// Sets source `index` up.
    pub fn open(machine: &mut Machine, index: u64) -> Result<Self, Error> {
        let transport = Transport::find(machine.line, Kind::Entropy, index)?;
        let features = transport.negotiate(feature::INDIRECT | feature::EVENT_IDX)?;
        let place = usize::try_from(index)
            .ok()
            .and_then(|index| machine.entropy_memory.get_mut(index));
        let Some(place) = place else {
            return Err(Error::NoDevice {
                kind: "usable entropy",
                index,
            });
        };
        if place.is_none() {
            *place = Some(QueueMemory::new(&mut machine.memory)?);
        }
        let memory = place.as_mut().expect("it was made above where it was missing");
        let queue = Queue::new(transport, 0, features, memory)?;
        transport.start();
        Ok(Self { transport, queue })
    }

    /// Has the source fill memory; returns how many bytes it says it wrote.
    pub fn fill(&mut self, address: u64, bytes: u32, wait: &Wait) -> Result<u32, Error> {
        self.queue.submit(
            0,
            &[Part {
                address,
                bytes,
                device_writes: true,
            }],
        );
        self.queue.kick();
        let start = cpu::ticks();
        loop {
            if let Some(used) = self.queue.poll()? {
                return Ok(used.written_bytes);
            }
            wait.pause(&mut self.queue, start)?;
        }
    }
}
