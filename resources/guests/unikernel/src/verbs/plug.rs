//! `mem-…`: memory that comes and goes.

#![expect(unsafe_code, reason = "writes and reads plugged memory by address")]

use instrument::cmdline::Command;
use instrument::random::mix;

use super::Failure;
use crate::machine::Machine;
use crate::memory::Region;
use crate::virtio::mem::{Answer, Mem, Request, Space};
use crate::wait::Wait;
use crate::{cpu, say};

const MIB: u64 = 1 << 20;
/// Between two looks at what is requested.
const LOOK_MS: u64 = 2;

/// A device, and what is written to what it plugs.
struct Plugger {
    mem: Mem,
    wait: Wait,
    seed: u64,
}

/// Plugs and unplugs, block by block, what is requested, until `mib` MiB are requested and plugged. What comes is filled, and
/// what goes is found as it was filled.
pub fn follow(machine: &mut Machine, command: &Command<'static>) -> Result<(), Failure> {
    command.allow(&["mib", "seed", "wait", "all"])?;
    let wanted = command.number("mib", 0)?.saturating_mul(MIB);
    let goes_at_once = command.number("all", 0)? != 0;
    let clock = machine.clock()?;
    let mut plugger = Plugger::new(machine, command)?;
    say!("mem-follow: ready\n");
    loop {
        let space = plugger.mem.space();
        if space.plugged < space.requested {
            plugger.plug(&space)?;
        } else if space.plugged > space.requested {
            if goes_at_once {
                plugger.unplug_all()?;
            } else {
                plugger.unplug(&space)?;
            }
        } else if space.plugged == wanted {
            say!("mem-follow: ok plugged_mib={}\n", space.plugged / MIB);
            return Ok(());
        } else {
            let start = cpu::ticks();
            while cpu::ticks() - start < clock.ticks(LOOK_MS) {
                cpu::relax();
            }
        }
    }
}

/// Finds what was written to everything that is plugged.
pub fn verify(machine: &mut Machine, command: &Command<'static>) -> Result<(), Failure> {
    command.allow(&["seed", "wait"])?;
    let mut plugger = Plugger::new(machine, command)?;
    let space = plugger.mem.space();
    let mut found = 0;
    for block in 0..space.usable / space.block {
        let address = space.start + block * space.block;
        if plugger.is_plugged(address)? {
            plugger.check(address, space.block)?;
            found += space.block;
        }
    }
    if found != space.plugged {
        return Err(Failure::Check("plugged_size is not what blocks are plugged"));
    }
    say!("mem-verify: ok plugged_mib={}\n", found / MIB);
    Ok(())
}

/// Asks for what cannot be, and finds that nothing has changed.
pub fn hostile(machine: &mut Machine, command: &Command<'static>) -> Result<(), Failure> {
    command.allow(&["seed", "wait"])?;
    let mut plugger = Plugger::new(machine, command)?;
    let before = plugger.mem.space();
    let Space {
        block,
        start,
        region,
        usable,
        ..
    } = before;
    let top = u64::MAX - block + 1;
    for request in [Request::Plug, Request::Unplug, Request::State] {
        for (address, blocks) in [
            (start, 0),
            (start + 1, 1),
            (start + block / 2, 1),
            (start - block, 1),
            (start - block, 2),
            (0, 1),
            (0, u16::MAX),
            (u64::MAX, 1),
            (top, 1),
            (top, u16::MAX),
            (start + usable, 1),
            (start + usable - block, 2),
            (start + region, 1),
            (start, u16::MAX),
        ] {
            plugger.expect(request, address, blocks, Answer::ERROR)?;
        }
    }
    // What is plugged is not plugged again, and what is not is not unplugged.
    for number in 0..usable / block {
        let address = start + number * block;
        let wrong = if plugger.is_plugged(address)? {
            Request::Plug
        } else {
            Request::Unplug
        };
        plugger.expect(wrong, address, 1, Answer::ERROR)?;
        if wrong == Request::Unplug && before.plugged == before.requested {
            plugger.expect(Request::Plug, address, 1, Answer::NACK)?;
        }
    }
    let after = plugger.mem.space();
    if (after.plugged, after.usable, after.requested) != (before.plugged, usable, before.requested) {
        return Err(Failure::Check(
            "requests that were refused have changed something",
        ));
    }
    say!("mem-hostile: ok\n");
    Ok(())
}

/// Writes and reads memory `offset_mib` MiB from the beginning of the region, and says what it reads.
pub fn touch(machine: &mut Machine, command: &Command<'static>) -> Result<(), Failure> {
    command.allow(&["offset_mib", "seed", "wait"])?;
    let offset = command.number("offset_mib", 0)?.saturating_mul(MIB);
    let plugger = Plugger::new(machine, command)?;
    let space = plugger.mem.space();
    if offset >= space.region {
        return Err(Failure::Unsuitable("offset_mib lies behind the region"));
    }
    let place = (space.start + offset) as *mut u64;
    // SAFETY: the region is mapped, and holds nothing that the guest uses otherwise.
    unsafe { place.write_volatile(plugger.seed) };
    // SAFETY: as above.
    let found = unsafe { place.read_volatile() };
    say!("mem-touch: offset_mib={} found={found:#x}\n", offset / MIB);
    Ok(())
}

impl Plugger {
    fn new(machine: &mut Machine, command: &Command<'static>) -> Result<Self, Failure> {
        let wait = machine.wait(command)?;
        let mem = Mem::open(machine)?;
        let space = mem.space();
        machine.memory.map(Region {
            base: space.start,
            end: space.start + space.region,
        })?;
        Ok(Self {
            mem,
            wait,
            seed: command.number("seed", 1)?,
        })
    }

    fn expect(&mut self, request: Request, address: u64, blocks: u16, kind: u16) -> Result<u16, Failure> {
        let answer = self.mem.ask(request, address, blocks, &self.wait)?;
        if answer.kind != kind {
            say!("mem: {request:?} {address:#x} {blocks}: {answer:?}\n");
            return Err(Failure::Check("the device answers otherwise than it should"));
        }
        Ok(answer.state)
    }

    fn is_plugged(&mut self, address: u64) -> Result<bool, Failure> {
        let state = self.expect(Request::State, address, 1, Answer::ACK)?;
        match state {
            Answer::PLUGGED => Ok(true),
            Answer::UNPLUGGED => Ok(false),
            _ => Err(Failure::Check("one block is plugged or not")),
        }
    }

    /// Plugs the lowest block that is not, and fills it.
    fn plug(&mut self, space: &Space) -> Result<(), Failure> {
        for block in 0..space.usable / space.block {
            let address = space.start + block * space.block;
            if !self.is_plugged(address)? {
                self.expect(Request::Plug, address, 1, Answer::ACK)?;
                self.words(address, space.block).for_each(|word| {
                    // SAFETY: the block is plugged and mapped, and nobody else uses it.
                    unsafe { (word as *mut u64).write_volatile(mix(self.seed ^ word)) };
                });
                return Ok(());
            }
        }
        Err(Failure::Check("less is usable than is requested"))
    }

    /// Unplugs the highest block that is, as it was filled.
    fn unplug(&mut self, space: &Space) -> Result<(), Failure> {
        for block in (0..space.usable / space.block).rev() {
            let address = space.start + block * space.block;
            if self.is_plugged(address)? {
                self.check(address, space.block)?;
                self.expect(Request::Unplug, address, 1, Answer::ACK)?;
                return Ok(());
            }
        }
        Err(Failure::Check("more is plugged than is usable"))
    }

    fn unplug_all(&mut self) -> Result<(), Failure> {
        self.expect(Request::UnplugAll, 0, 0, Answer::ACK)?;
        match self.mem.space().plugged {
            0 => Ok(()),
            _ => Err(Failure::Check("not everything is unplugged")),
        }
    }

    /// Whether a plugged block holds what it was filled with.
    fn check(&self, address: u64, bytes: u64) -> Result<(), Failure> {
        for word in self.words(address, bytes) {
            let expected = mix(self.seed ^ word);
            // SAFETY: the block is plugged and mapped.
            let found = unsafe { (word as *const u64).read_volatile() };
            if found != expected {
                return Err(Failure::Damaged {
                    address: word,
                    expected,
                    found,
                });
            }
        }
        Ok(())
    }

    /// Every eighth word of a range: all pages of it, and several lines of each.
    #[expect(clippy::unused_self, reason = "it is how a plugger fills blocks")]
    fn words(&self, address: u64, bytes: u64) -> impl Iterator<Item = u64> + use<> {
        (address..address + bytes).step_by(64)
    }
}
