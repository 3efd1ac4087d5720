//! `tcp`: a connection to a host: data to it, data from it, or questions and answers, and how long each took.

use instrument::cmdline::{ArgumentError, Command};
use instrument::histogram::Histogram;
use instrument::packet::{self, End, Heard, Ip, Segment};
use instrument::tcp::{Connection, DATA_BYTES_MAX, MSS};
use instrument::width::{low16, low32, size};

use super::Failure;
use super::talk::{self, Role, Talk};
use crate::cpu;
use crate::machine::Machine;
use crate::virtio::net::{Net, Sent, feature};
use crate::wait::Wait;

struct Call {
    net: Net,
    wait: Wait,
    ours: End,
    theirs: End,
    knows_theirs: bool,
    connection: Connection,
    /// When the last question was asked whose interface has the host's address.
    asked: u64,
    patience: u64,
    segments: u64,
}

const KEYS: [&str; 9] = [
    "dev", "role", "ip", "host", "port", "mib", "count", "bytes", "wait",
];
/// How long something may be unanswered until it is said again.
const PATIENCE_MS: u64 = 200;

/// Makes one connection and prints one line.
pub fn tcp(machine: &mut Machine, command: &Command<'static>) -> Result<(), Failure> {
    command.allow(&KEYS)?;
    let clock = machine.clock()?;
    let role = talk::role(command)?;
    let (ip, host) = (address(command, "ip")?, address(command, "host")?);
    let port = low16(command.within("port", 0, 1..=65535, "1 to 65535")?);
    let wait = machine.wait(command)?;
    let net = Net::open(machine, command.number("dev", 0)?)?;
    if !net.has(feature::CHECKSUM | feature::GUEST_CHECKSUM) {
        return Err(Failure::Unsuitable("the device does not compute checksums"));
    }
    wait.prepare(&net.transport, 1)?;
    let patience = clock.ticks(PATIENCE_MS);
    let begun = cpu::ticks();
    let ours = End {
        mac: net.mac(),
        ip,
        // Another one each time, or the host would take it for the last.
        port: low16(begun) | 0x8000,
    };
    let mut call = Call {
        ours,
        theirs: End {
            ip: host,
            port,
            ..End::default()
        },
        knows_theirs: false,
        connection: Connection::new(low32(begun), patience),
        asked: begun.wrapping_sub(patience + 1),
        patience,
        segments: 0,
        net,
        wait,
    };
    let interrupts_before = wait.interrupts(&call.net.transport);
    let mut latency = machine.memory.hold(Histogram::new())?;
    let ticks = call.run(role, &mut latency)?;
    let interrupts = wait.interrupts(&call.net.transport) - interrupts_before;
    call.net.transport.reset()?;
    let told = talk::Told {
        verb: "tcp",
        role,
        received: call.connection.received(),
        ticks,
        packets: call.segments,
        repeats: call.connection.repeats,
        interrupts,
        features: call.net.features,
    };
    told.print(&latency, clock);
    Ok(())
}

fn address(command: &Command<'static>, key: &'static str) -> Result<Ip, Failure> {
    let value = command.text(key).unwrap_or("");
    packet::ip(value).ok_or_else(|| {
        ArgumentError::Impossible {
            key,
            value,
            choices: "an address, as 172.16.0.2",
        }
        .into()
    })
}

impl Call {
    /// Does all of it; returns how long the data took, in ticks.
    fn run(&mut self, role: Role, latency: &mut Histogram) -> Result<u64, Failure> {
        self.until(|call| call.connection.is_open())?;
        let begun = cpu::ticks();
        match role {
            Role::Send(bytes) => {
                self.connection.send(bytes);
                self.connection.end();
                self.until(|call| call.connection.is_done())?;
            }
            Role::Receive => {
                self.until(|call| call.connection.has_ended())?;
            }
            Role::Ask(count, bytes) => self.ask(count, bytes, latency)?,
        }
        let ticks = cpu::ticks().saturating_sub(begun);
        self.connection.end();
        self.until(|call| call.connection.is_done() && call.connection.has_ended())?;
        // The acknowledgement of the host's end.
        self.turn()?;
        Ok(ticks)
    }

    fn take(&mut self, heard: &Heard) -> Result<(), Failure> {
        match *heard {
            Heard::Has(end) if end.ip == self.theirs.ip => {
                self.theirs.mac = end.mac;
                self.knows_theirs = true;
            }
            Heard::WhoHas { ip, asker } if ip == self.ours.ip => {
                let ours = self.ours;
                self.say(Sent::Whole, |frame| {
                    packet::answer(frame, &ours, &asker);
                    packet::ARP_BYTES
                })?;
            }
            Heard::Segment { from, to, segment } if (from, to) == (self.theirs.port, self.ours.port) => {
                self.connection.heard(&segment, cpu::ticks());
            }
            Heard::Has(_) | Heard::WhoHas { .. } | Heard::Segment { .. } | Heard::Other => {}
        }
        Ok(())
    }

    fn say_segment(&mut self, segment: &Segment) -> Result<(), Failure> {
        debug_assert!(segment.data_bytes <= DATA_BYTES_MAX);
        let (ours, theirs, data) = (self.ours, self.theirs, size(u64::from(segment.data_bytes)));
        let is_cut = data > usize::from(MSS);
        if is_cut && !self.net.has(feature::HOST_TSO4) {
            return Err(Failure::Unsuitable("the device does not cut segments"));
        }
        self.segments += 1;
        let head = packet::TCP_AT + packet::TCP_BYTES;
        let how = Sent::Tcp {
            head_bytes: low16(head as u64),
            mss: if is_cut { MSS } else { 0 },
        };
        // Of data there is whatever lies behind the headers.
        self.say(how, |frame| {
            packet::write(frame, &ours, &theirs, segment, MSS) + data
        })
    }

    /// Sends a frame if there is a slot for it: one that is lost is said again.
    fn say(&mut self, how: Sent, write: impl FnOnce(&mut [u8]) -> usize) -> Result<(), Failure> {
        if let Some(slot) = self.net.slot_to_send()? {
            let bytes = write(self.net.frame_to_send(slot));
            self.net.send(slot, bytes, how);
        }
        Ok(())
    }
}

impl Talk for Call {
    fn pause(&mut self, start: u64) -> Result<(), Failure> {
        Ok(self.wait.pause(&mut self.net.receives, start)?)
    }

    fn refusal(&self) -> Option<&'static str> {
        let is_refused = self.connection.is_refused();
        is_refused.then_some("the host refuses the connection")
    }

    fn send(&mut self, bytes: u64) {
        self.connection.send(bytes);
    }

    fn received(&self) -> u64 {
        self.connection.received()
    }

    fn turn(&mut self) -> Result<bool, Failure> {
        let mut has_moved = false;
        while let Some(packet) = self.net.receive()? {
            has_moved = true;
            let heard = packet::read(self.net.frame(packet));
            self.net.give_back(packet);
            self.take(&heard)?;
        }
        let now = cpu::ticks();
        if !self.knows_theirs {
            if now.wrapping_sub(self.asked) > self.patience {
                self.asked = now;
                let (ours, ip) = (self.ours, self.theirs.ip);
                self.say(Sent::Whole, |frame| {
                    packet::ask(frame, &ours, ip);
                    packet::ARP_BYTES
                })?;
            }
            self.net.kick();
            return Ok(has_moved);
        }
        // A slot first: what the connection says, it takes for said.
        while self.net.slot_to_send()?.is_some() {
            let Some(segment) = self.connection.next(now) else {
                break;
            };
            has_moved = true;
            self.say_segment(&segment)?;
        }
        self.net.kick();
        Ok(has_moved)
    }
}
