//! `vsock`: a stream to a program of the host: data to it, data from it, or questions and answers, and how long each took.

use instrument::cmdline::Command;
use instrument::histogram::Histogram;
use instrument::stream::Stream;
use instrument::width::low32;

use super::Failure;
use super::talk::{self, Role};
use crate::cpu;
use crate::machine::Machine;
use crate::virtio::vsock::Vsock;
use crate::wait::Wait;

struct Talk {
    vsock: Vsock,
    wait: Wait,
    stream: Stream,
    packets: u64,
}

/// Makes one stream and prints one line.
pub fn vsock(machine: &mut Machine, command: &Command<'static>) -> Result<(), Failure> {
    command.allow(&["role", "port", "mib", "count", "bytes", "wait"])?;
    let role = talk::role(command)?;
    let port = low32(command.within("port", 0, 1..=0xffff_fffe, "1 to 4294967294")?);
    let wait = machine.wait(command)?;
    let vsock = Vsock::open(machine)?;
    wait.prepare(&vsock.transport, 1)?;
    let mut talk = Talk {
        // Another one each time.
        stream: Stream::new(vsock.cid(), low32(cpu::ticks()) | 1 << 31, port),
        vsock,
        wait,
        packets: 0,
    };
    let interrupts_before = wait.interrupts(&talk.vsock.transport);
    let mut latency = machine.memory.hold(Histogram::new())?;
    let ticks = talk.run(role, &mut latency)?;
    let interrupts = wait.interrupts(&talk.vsock.transport) - interrupts_before;
    talk.vsock.transport.reset()?;
    let told = talk::Told {
        verb: "vsock",
        role,
        received: talk.stream.received(),
        ticks,
        packets: talk.packets,
        repeats: 0,
        interrupts,
        features: 0,
    };
    told.print(&latency, machine.clock()?);
    Ok(())
}

impl Talk {
    /// Does all of it; returns how long the data took, in ticks.
    fn run(&mut self, role: Role, latency: &mut Histogram) -> Result<u64, Failure> {
        self.until(Stream::is_open)?;
        let begun = cpu::ticks();
        match role {
            Role::Send(bytes) => {
                // Nobody has to say that all was taken, but that both ends are over.
                self.stream.send(bytes);
                self.stream.end();
                self.until(Stream::is_over)?;
            }
            Role::Receive => self.until(Stream::has_ended)?,
            Role::Ask(count, bytes) => {
                for turn in 1..=count {
                    let asked = cpu::ticks();
                    self.stream.send(bytes);
                    self.until(|stream| stream.received() >= turn * bytes)?;
                    latency.record(cpu::ticks().saturating_sub(asked));
                }
            }
        }
        let ticks = cpu::ticks().saturating_sub(begun);
        self.stream.end();
        self.until(Stream::is_over)?;
        Ok(ticks)
    }

    fn until(&mut self, is_so: impl Fn(&Stream) -> bool) -> Result<(), Failure> {
        let mut progress = cpu::ticks();
        loop {
            let has_moved = self.turn()?;
            if self.stream.is_refused() {
                return Err(Failure::Check("nobody listens at that port of the host"));
            }
            if is_so(&self.stream) {
                return Ok(());
            }
            if has_moved {
                progress = cpu::ticks();
            } else {
                self.wait.pause(&mut self.vsock.receives, progress)?;
            }
        }
    }

    /// Takes in what has come, and says what there is to say; returns whether there was anything.
    fn turn(&mut self) -> Result<bool, Failure> {
        let mut has_moved = false;
        while let Some(packet) = self.vsock.receive()? {
            has_moved = true;
            self.stream.heard(&packet);
        }
        // A place first: what the stream says, it takes for said.
        while self.vsock.has_place()? {
            let Some(packet) = self.stream.due() else { break };
            has_moved = true;
            self.packets += 1;
            self.vsock.send(&packet);
        }
        self.vsock.kick();
        Ok(has_moved)
    }
}
