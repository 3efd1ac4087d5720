//! Ethernet, ARP, IPv4 and TCP headers, as many of their fields as a measurement needs (RFC 826, 791, 9293).

/// The hardware address of a network interface.
pub type Mac = [u8; 6];
/// An IPv4 address.
pub type Ip = [u8; 4];

/// The longest header that is made or read: Ethernet, IPv4 and TCP, without options of IPv4.
pub const HEAD_BYTES_MAX: usize = TCP_AT + TCP_BYTES_MAX;
/// Where the header of TCP begins, and its checksum in that.
pub const TCP_AT: usize = IP_AT + IP_BYTES;
/// See [`TCP_AT`].
pub const CHECKSUM_AT: usize = 16;
/// What a header of TCP has after its connection is made: none of its options is used then.
pub const TCP_BYTES: usize = 20;
/// Bytes of an ARP packet for IPv4 over Ethernet, with the header of Ethernet.
pub const ARP_BYTES: usize = IP_AT + 28;

const IP_AT: usize = 14;
const IP_BYTES: usize = 20;
const TCP_BYTES_MAX: usize = 60;
const BROADCAST: Mac = [0xff; 6];
const ETHERTYPE_IP: u16 = 0x0800;
const ETHERTYPE_ARP: u16 = 0x0806;
const ARP_REQUEST: u16 = 1;
const ARP_REPLY: u16 = 2;
const PROTOCOL_TCP: u8 = 6;
const OPTION_END: u8 = 0;
const OPTION_NOTHING: u8 = 1;
const OPTION_MSS: u8 = 2;
const OPTION_WINDOW_SCALE: u8 = 3;

/// Flags of a segment.
pub mod flag {
    /// The sender has no more data.
    pub const FIN: u8 = 1;
    /// A connection begins.
    pub const SYN: u8 = 2;
    /// There is none.
    pub const RST: u8 = 4;
    /// Whoever reads it should have it now.
    pub const PSH: u8 = 8;
    /// `acknowledged` counts.
    pub const ACK: u8 = 16;
}

/// One end of a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct End {
    /// Its interface.
    pub mac: Mac,
    /// Its address.
    pub ip: Ip,
    /// Its port.
    pub port: u16,
}

/// What a header of TCP says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// The number of its first byte.
    pub sequence: u32,
    /// The number that is expected next.
    pub acknowledged: u32,
    /// See [`flag`].
    pub flags: u8,
    /// How much the other may send, in units of its scale.
    pub window: u16,
    /// What the window is to be shifted by, where a connection begins.
    pub scale: Option<u8>,
    /// How much data there is.
    pub data_bytes: u32,
}

/// What has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// Somebody asks who has an address.
    WhoHas {
        /// The address.
        ip: Ip,
        /// Who asks.
        asker: End,
    },
    /// Somebody has this address.
    Has(End),
    /// A segment, from and to these ports.
    Segment {
        /// From.
        from: u16,
        /// To.
        to: u16,
        /// What it says.
        segment: Segment,
    },
    /// Something else.
    Other,
}

/// The address that `text` is, as four decimal numbers with points between them.
#[must_use]
pub fn ip(text: &str) -> Option<Ip> {
    let mut parts = text.split('.').map(str::parse::<u8>);
    let mut next = || parts.next().and_then(Result::ok);
    let ip = [next()?, next()?, next()?, next()?];
    parts.next().is_none().then_some(ip)
}

/// What the beginning of a frame says.
#[must_use]
pub fn read(frame: &[u8]) -> Heard {
    match short(frame, 12) {
        Some(ETHERTYPE_ARP) => arp(frame).unwrap_or(Heard::Other),
        Some(ETHERTYPE_IP) => tcp(frame).unwrap_or(Heard::Other),
        _ => Heard::Other,
    }
}

fn arp(frame: &[u8]) -> Option<Heard> {
    let sender = End {
        mac: array(frame, IP_AT + 8)?,
        ip: array(frame, IP_AT + 14)?,
        port: 0,
    };
    match short(frame, IP_AT + 6)? {
        ARP_REQUEST => Some(Heard::WhoHas {
            ip: array(frame, IP_AT + 24)?,
            asker: sender,
        }),
        ARP_REPLY => Some(Heard::Has(sender)),
        _ => None,
    }
}

fn tcp(frame: &[u8]) -> Option<Heard> {
    let is_plain = frame.get(IP_AT) == Some(&0x45) && frame.get(IP_AT + 9) == Some(&PROTOCOL_TCP);
    if !is_plain {
        return None;
    }
    let head = frame.get(TCP_AT..)?;
    let [offset, flags] = array(head, 12)?;
    let head_bytes = usize::from(offset >> 4) * 4;
    let whole = usize::from(short(frame, IP_AT + 2)?);
    let data = whole.checked_sub(IP_BYTES + head_bytes)?;
    let options = head.get(TCP_BYTES..head_bytes)?;
    Some(Heard::Segment {
        from: short(head, 0)?,
        to: short(head, 2)?,
        segment: Segment {
            sequence: u32::from_be_bytes(array(head, 4)?),
            acknowledged: u32::from_be_bytes(array(head, 8)?),
            flags,
            window: short(head, 14)?,
            scale: scale(options),
            data_bytes: u32::try_from(data).ok()?,
        },
    })
}

fn scale(mut options: &[u8]) -> Option<u8> {
    loop {
        options = match *options {
            [OPTION_WINDOW_SCALE, 3, scale, ..] => return Some(scale.min(14)),
            [OPTION_NOTHING, ref rest @ ..] => rest,
            [] | [OPTION_END, ..] | [_] => return None,
            [_, bytes, ..] => options.get(usize::from(bytes.max(2))..)?,
        }
    }
}

/// Writes a question who has `ip` to the beginning of `frame`.
pub fn ask(frame: &mut [u8], asker: &End, ip: Ip) {
    let nobody = End { ip, ..End::default() };
    resolve(frame, ARP_REQUEST, asker, BROADCAST, &nobody);
}

/// Writes the answer to one.
pub fn answer(frame: &mut [u8], ours: &End, asker: &End) {
    resolve(frame, ARP_REPLY, ours, asker.mac, asker);
}

fn resolve(frame: &mut [u8], operation: u16, from: &End, to: Mac, about: &End) {
    let mut writer = Writer { frame, at: 0 };
    writer.ethernet(to, from.mac, ETHERTYPE_ARP);
    // Ethernet, IPv4, and the lengths of their addresses.
    writer.put(&[0, 1, 8, 0, 6, 4]);
    writer.put(&operation.to_be_bytes());
    for end in [from, about] {
        writer.put(&end.mac);
        writer.put(&end.ip);
    }
}

/// Writes the headers of `segment` to the beginning of `frame`, whose TCP checksum the device is to complete; returns how
/// many bytes they are. Where a connection begins, they say that segments of `mss` bytes of data may come.
pub fn write(frame: &mut [u8], from: &End, to: &End, segment: &Segment, mss: u16) -> usize {
    let head_bytes = match segment.scale {
        Some(_) => TCP_BYTES + 8,
        None => TCP_BYTES,
    };
    let tcp_bytes = head_bytes + usize::try_from(segment.data_bytes).unwrap_or(0);
    let ip_bytes = u16::try_from(IP_BYTES + tcp_bytes).unwrap_or(u16::MAX);
    let mut writer = Writer { frame, at: 0 };
    writer.ethernet(to.mac, from.mac, ETHERTYPE_IP);
    let mut head = [0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, PROTOCOL_TCP];
    head[2..4].copy_from_slice(&ip_bytes.to_be_bytes());
    let sum = !folded(summed(&head) + summed(&from.ip) + summed(&to.ip));
    writer.put(&head);
    writer.put(&sum.to_be_bytes());
    writer.put(&from.ip);
    writer.put(&to.ip);

    writer.put(&from.port.to_be_bytes());
    writer.put(&to.port.to_be_bytes());
    writer.put(&segment.sequence.to_be_bytes());
    writer.put(&segment.acknowledged.to_be_bytes());
    writer.put(&[low(head_bytes / 4) << 4, segment.flags]);
    writer.put(&segment.window.to_be_bytes());
    // The pseudo header's part of the checksum (9.1.1 of RFC 9293), which offloads go on from.
    let pseudo = summed(&from.ip) + summed(&to.ip) + u32::from(PROTOCOL_TCP) + u32::from(ip_bytes) - 20;
    writer.put(&folded(pseudo).to_be_bytes());
    writer.put(&[0, 0]);
    if let Some(scale) = segment.scale {
        let [high, low] = mss.to_be_bytes();
        writer.put(&[
            OPTION_MSS,
            4,
            high,
            low,
            OPTION_NOTHING,
            OPTION_WINDOW_SCALE,
            3,
            scale,
        ]);
    }
    writer.at
}

struct Writer<'a> {
    frame: &'a mut [u8],
    at: usize,
}

impl Writer<'_> {
    fn ethernet(&mut self, to: Mac, from: Mac, kind: u16) {
        self.put(&to);
        self.put(&from);
        self.put(&kind.to_be_bytes());
    }

    fn put(&mut self, bytes: &[u8]) {
        let place = self.frame.get_mut(self.at..).unwrap_or_default();
        for (to, from) in place.iter_mut().zip(bytes) {
            *to = *from;
        }
        self.at += bytes.len();
    }
}

fn summed(bytes: &[u8]) -> u32 {
    let words = bytes.chunks(2).map(|word| match *word {
        [high, low] => u32::from(u16::from_be_bytes([high, low])),
        [high] => u32::from(high) << 8,
        _ => 0,
    });
    words.sum()
}

fn folded(sum: u32) -> u16 {
    let once = (sum >> 16) + (sum & 0xffff);
    let twice = (once >> 16) + (once & 0xffff);
    u16::try_from(twice).unwrap_or(u16::MAX)
}

fn low(value: usize) -> u8 {
    u8::try_from(value).unwrap_or(u8::MAX)
}

fn short(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(array(bytes, at)?))
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use super::*;

    fn ends() -> (End, End) {
        let end = |last, port| End {
            mac: [6, 0, 172, 16, 0, last],
            ip: [172, 16, 0, last],
            port,
        };
        (end(2, 40_000), end(1, 80))
    }

    #[test]
    fn a_segment_is_read_as_it_was_written() {
        let (from, to) = ends();
        for (scale, data_bytes, head_bytes) in [(None, 0, 54), (Some(7), 0, 62), (None, 64_240, 54)] {
            let segment = Segment {
                sequence: 0xffff_fff0,
                acknowledged: 7,
                flags: flag::ACK | flag::PSH,
                window: 8192,
                scale,
                data_bytes,
            };
            let mut frame = [0; 128];
            assert_eq!(write(&mut frame, &from, &to, &segment, 1460), head_bytes);
            let heard = Heard::Segment {
                from: 40_000,
                to: 80,
                segment,
            };
            assert_eq!(read(&frame), heard);
            // The header of IPv4 sums up to nothing.
            assert_eq!(folded(summed(&frame[14..34])), 0xffff);
        }
    }

    #[test]
    fn an_address_is_asked_for_and_answered() {
        let (ours, theirs) = ends();
        let mut frame = [0; ARP_BYTES];
        ask(&mut frame, &ours, theirs.ip);
        let asker = End { port: 0, ..ours };
        let ip = theirs.ip;
        assert_eq!(read(&frame), Heard::WhoHas { ip, asker });
        answer(&mut frame, &theirs, &asker);
        assert_eq!(read(&frame), Heard::Has(End { port: 0, ..theirs }));
        assert_eq!(frame[..6], ours.mac);
    }

    #[test]
    fn what_is_cut_off_is_something_else() {
        let (from, to) = ends();
        let mut frame = [0; 128];
        let segment = Segment {
            scale: Some(3),
            ..Segment::default()
        };
        let bytes = write(&mut frame, &from, &to, &segment, 1460);
        for cut in 0..bytes {
            assert_eq!(read(frame.get(..cut).unwrap()), Heard::Other, "{cut}");
        }
        for cut in 0..ARP_BYTES {
            ask(&mut frame, &from, to.ip);
            assert_eq!(read(frame.get(..cut).unwrap()), Heard::Other, "{cut}");
        }
    }

    #[test]
    fn an_address_is_four_numbers() {
        assert_eq!(ip("172.16.0.2"), Some([172, 16, 0, 2]));
        for wrong in ["", "1.2.3", "1.2.3.4.5", "1.2.3.256", "1.2.3.x"] {
            assert_eq!(ip(wrong), None, "{wrong}");
        }
        assert_eq!(scale(&[2, 4, 5, 180, 1, 3, 3, 9]).unwrap(), 9);
        assert_eq!(scale(&[2, 0, 3]), None);
    }
}
