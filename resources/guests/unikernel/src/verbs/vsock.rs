//! `vsock`: a stream to a program of the host: data to it, data from it, or questions and answers, and how long each took.

use instrument::cmdline::Command;
use instrument::histogram::Histogram;
use instrument::stream::Stream;
use instrument::width::low32;

use super::Failure;
use super::talk::{self, Role, Talk};
use crate::cpu;
use crate::machine::Machine;
use crate::virtio::vsock::Vsock;
use crate::wait::Wait;

struct Call {
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
    let mut call = Call {
        // Another one each time.
        stream: Stream::new(vsock.cid(), low32(cpu::ticks()) | 1 << 31, port),
        vsock,
        wait,
        packets: 0,
    };
    let interrupts_before = wait.interrupts(&call.vsock.transport);
    let mut latency = machine.memory.hold(Histogram::new())?;
    let ticks = call.run(role, &mut latency)?;
    let interrupts = wait.interrupts(&call.vsock.transport) - interrupts_before;
    call.vsock.transport.reset()?;
    let told = talk::Told {
        verb: "vsock",
        role,
        received: call.stream.received(),
        ticks,
        packets: call.packets,
        repeats: 0,
        interrupts,
        features: 0,
    };
    told.print(&latency, machine.clock()?);
    Ok(())
}

impl Call {
    /// Does all of it; returns how long the data took, in ticks.
    fn run(&mut self, role: Role, latency: &mut Histogram) -> Result<u64, Failure> {
        self.until(|call| call.stream.is_open())?;
        let begun = cpu::ticks();
        match role {
            Role::Send(bytes) => {
                // Nobody has to say that all was taken, but that both ends are over.
                self.stream.send(bytes);
                self.stream.end();
                self.until(|call| call.stream.is_over())?;
            }
            Role::Receive => self.until(|call| call.stream.has_ended())?,
            Role::Ask(count, bytes) => self.ask(count, bytes, latency)?,
        }
        let ticks = cpu::ticks().saturating_sub(begun);
        self.stream.end();
        self.until(|call| call.stream.is_over())?;
        Ok(ticks)
    }
}

impl Talk for Call {
    fn pause(&mut self, start: u64) -> Result<(), Failure> {
        Ok(self.wait.pause(&mut self.vsock.receives, start)?)
    }

    fn refusal(&self) -> Option<&'static str> {
        let is_refused = self.stream.is_refused();
        is_refused.then_some("nobody listens at that port of the host")
    }

    fn send(&mut self, bytes: u64) {
        self.stream.send(bytes);
    }

    fn received(&self) -> u64 {
        self.stream.received()
    }

    fn turn(&mut self) -> Result<bool, Failure> {
        let mut has_moved = false;
        while let Some(packet) = self.vsock.receive()? {
            has_moved = true;
            self.stream.heard(&packet);
        }
        // A place first: what the stream says, it takes for said.
        while let Some(place) = self.vsock.place_to_send()? {
            let Some(packet) = self.stream.due() else { break };
            has_moved = true;
            self.packets += 1;
            self.vsock.send(place, &packet);
        }
        self.vsock.kick();
        Ok(has_moved)
    }
}
