//! The service from a guest's side: what is asked and answered, and the same over TCP by a stack like its own.
#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::time;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpAddress, IpCidr, Ipv4Address};

use super::*;

const SERVICE: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

fn content() -> Value {
    json!({
        "latest": {
            "meta-data": { "id": "i-1", "tags": { "a/b": "c" }, "cpus": 2, "disks": ["x", "y"] },
            "user-data": "#!/bin/sh\necho hello\n"
        }
    })
}

fn service(version: MmdsVersion) -> Mmds {
    let mmds = Mmds::new();
    mmds.configure(version, false);
    mmds.put(content()).unwrap();
    mmds
}

/// Status and body of the answer to one request.
fn asked(mmds: &Mmds, request: &str) -> (String, String) {
    let Answer::Response { consumed, bytes, .. } = answer(mmds, request.as_bytes()) else {
        return ("incomplete".to_owned(), String::new());
    };
    assert_eq!(consumed, request.len());
    parted(&bytes)
}

fn parted(response: &[u8]) -> (String, String) {
    let text = String::from_utf8(response.to_vec()).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let status = head.lines().next().unwrap().strip_prefix("HTTP/1.1 ").unwrap();
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("Content-Length: "));
    assert_eq!(length.unwrap().parse(), Ok(body.len()));
    (status.to_owned(), body.to_owned())
}

fn get(mmds: &Mmds, path: &str, headers: &str) -> (String, String) {
    asked(
        mmds,
        &format!("GET {path} HTTP/1.1\r\nHost: 169.254.169.254\r\n{headers}\r\n"),
    )
}

fn put(mmds: &Mmds, path: &str, headers: &str) -> (String, String) {
    asked(mmds, &format!("PUT {path} HTTP/1.1\r\n{headers}\r\n"))
}

fn is(answer: &(String, String), status: &str, body: &str) {
    assert_eq!((answer.0.as_str(), answer.1.as_str()), (status, body));
}

#[test]
fn a_path_names_a_part_and_an_object_is_told_as_its_keys() {
    let mmds = service(MmdsVersion::V1);
    is(&get(&mmds, "/", ""), "200 OK", "latest/");
    is(&get(&mmds, "/latest", ""), "200 OK", "meta-data/\nuser-data");
    is(
        &get(&mmds, "//latest//meta-data/", ""),
        "200 OK",
        "cpus\ndisks\nid\ntags/",
    );
    is(&get(&mmds, "/latest/meta-data/id", ""), "200 OK", "i-1");
    is(
        &get(&mmds, "http://169.254.169.254/latest/meta-data/id", ""),
        "200 OK",
        "i-1",
    );
    is(&get(&mmds, "/latest/meta-data/id?x=y", ""), "200 OK", "i-1");
    is(&get(&mmds, "/latest/meta-data/disks/1", ""), "200 OK", "y");
    is(&get(&mmds, "/latest/meta-data/tags/a~1b", ""), "200 OK", "c");
    assert_eq!(get(&mmds, "/latest/meta-data/cpus", "").0, "501 Not Implemented");
    assert_eq!(get(&mmds, "/latest/nothing", "").0, "404 Not Found");
}

#[test]
fn json_is_told_where_it_is_accepted_and_ec2_is_not_the_model() {
    let mmds = service(MmdsVersion::V1);
    let accepts = "Accept: text/html, application/json;q=0.9\r\n";
    is(&get(&mmds, "/latest/meta-data/cpus", accepts), "200 OK", "2");
    is(&get(&mmds, "/latest/meta-data/id", accepts), "200 OK", r#""i-1""#);
    let (_, whole) = get(&mmds, "/", accepts);
    assert_eq!(serde_json::from_str::<Value>(&whole).unwrap(), content());
    mmds.configure(MmdsVersion::V1, true);
    is(&get(&mmds, "/latest/meta-data/id", accepts), "200 OK", "i-1");
}

#[test]
fn a_token_is_needed_by_version_2_and_counted_by_version_1() {
    let mmds = service(MmdsVersion::V2);
    assert_eq!(get(&mmds, "/latest", "").0, "401 Unauthorized");
    assert_eq!(
        get(&mmds, "/latest", "X-metadata-token: 00\r\n").0,
        "401 Unauthorized"
    );
    let ttl = "X-metadata-token-ttl-seconds: 60\r\n";
    for path in ["/latest/api/token", "//latest/api//token/"] {
        let (status, token) = put(&mmds, path, ttl);
        assert_eq!(status, "200 OK");
        for name in ["X-metadata-token", "x-aws-ec2-metadata-TOKEN"] {
            let answer = get(&mmds, "/latest/meta-data/id", &format!("{name}: {token}\r\n"));
            is(&answer, "200 OK", "i-1");
        }
    }
    mmds.configure(MmdsVersion::V1, false);
    assert_eq!(get(&mmds, "/latest", "").0, "200 OK");
    assert_eq!(get(&mmds, "/latest", "X-metadata-token: 00\r\n").0, "200 OK");
    let counts = mmds.counts();
    assert_eq!(
        (
            counts.no_tokens.load(Relaxed),
            counts.invalid_tokens.load(Relaxed)
        ),
        (2, 2)
    );
}

#[test]
fn a_token_is_given_to_who_asks_for_itself_and_for_a_time_that_there_is() {
    let mmds = service(MmdsVersion::V2);
    for (path, headers, status) in [
        ("/latest/api/token", "", "400 Bad Request"),
        (
            "/latest/api/token",
            "X-metadata-token-ttl-seconds: 0\r\n",
            "400 Bad Request",
        ),
        (
            "/latest/api/token",
            "X-metadata-token-ttl-seconds: 21601\r\n",
            "400 Bad Request",
        ),
        (
            "/latest/api/token",
            "X-metadata-token-ttl-seconds: -1\r\n",
            "400 Bad Request",
        ),
        (
            "/latest/api/token",
            "X-metadata-token-ttl-seconds: 60\r\nX-Forwarded-For: 10.0.0.1\r\n",
            "400 Bad Request",
        ),
        (
            "/latest/api",
            "X-metadata-token-ttl-seconds: 60\r\n",
            "404 Not Found",
        ),
        (
            "/latest/api/token",
            "X-aws-ec2-metadata-token-ttl-seconds: 21600\r\n",
            "200 OK",
        ),
    ] {
        assert_eq!(put(&mmds, path, headers).0, status, "{path} {headers}");
    }
}

#[test]
fn what_is_no_request_is_refused_and_one_that_has_begun_is_waited_for() {
    let mmds = service(MmdsVersion::V1);
    let answered = |request: &str| asked(&mmds, request).0;
    assert_eq!(answered("POST / HTTP/1.1\r\n\r\n"), "405 Method Not Allowed");
    assert_eq!(answered("GET * HTTP/1.1\r\n\r\n"), "400 Bad Request");
    assert_eq!(answered("\0\x01\x02\r\n\r\n"), "400 Bad Request");
    assert_eq!(
        answered("PUT / HTTP/1.1\r\nContent-Length: x\r\n\r\n"),
        "400 Bad Request"
    );
    assert_eq!(
        answered("PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"),
        "501 Not Implemented"
    );
    assert_eq!(answered("GET / HTTP/1.1\r\n"), "incomplete");
    assert_eq!(
        answered("PUT / HTTP/1.1\r\nContent-Length: 3\r\n\r\nab"),
        "incomplete"
    );
    assert_eq!(
        answered("PUT / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc"),
        "404 Not Found"
    );
    let two = "GET /latest/meta-data/id HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\n\r\n";
    let Answer::Response {
        consumed, is_last, ..
    } = answer(&mmds, two.as_bytes())
    else {
        panic!("the first is complete");
    };
    assert_eq!(
        (two.get(consumed..).unwrap(), is_last),
        ("GET / HTTP/1.1\r\n\r\n", false)
    );
}

#[test]
fn content_is_changed_by_a_merge_patch_and_has_a_limit() {
    let mmds = Mmds::new();
    assert_eq!(mmds.content(), json!({}));
    assert_eq!(mmds.patch(json!({ "a": 1 })), Err(MmdsError::Uninitialized));
    assert_eq!(get(&mmds, "/", "").0, "404 Not Found");
    mmds.put(json!({ "a": { "b": 1, "c": 2 }, "d": [1] })).unwrap();
    mmds.patch(json!({ "a": { "b": null, "e": { "f": null, "g": 3 } }, "d": 4 }))
        .unwrap();
    let patched = json!({ "a": { "c": 2, "e": { "g": 3 } }, "d": 4 });
    assert_eq!(mmds.content(), patched);
    mmds.limit(patched.to_string().len());
    assert!(matches!(
        mmds.patch(json!({ "h": 5 })),
        Err(MmdsError::TooLong(_))
    ));
    assert!(matches!(
        mmds.put(json!("x".repeat(100))),
        Err(MmdsError::TooLong(_))
    ));
    assert_eq!(mmds.content(), patched);
    mmds.patch(json!("all else")).unwrap();
    assert_eq!(mmds.content(), json!("all else"));
}

/// A guest's end of the wire.
struct Guest {
    stack: Stack,
    mmds: Arc<Mmds>,
    interface: Interface,
    sockets: SocketSet<'static>,
    now: Instant,
    began: Instant,
    /// What the guest sends to others.
    stray: usize,
}

/// The stack as the guest's network device.
struct Cable<'a> {
    stack: &'a mut Stack,
    now: Instant,
    stray: &'a mut usize,
}

struct Got(Vec<u8>);
struct Put<'a, 'b>(&'b mut Cable<'a>);

impl RxToken for Got {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Put<'_, '_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        if self.0.stack.wants(&frame) {
            self.0.stack.take(frame, self.0.now);
        } else {
            *self.0.stray += 1;
        }
        result
    }
}

impl<'a> Device for Cable<'a> {
    type RxToken<'t>
        = Got
    where
        Self: 't;
    type TxToken<'t>
        = Put<'a, 't>
    where
        Self: 't;

    fn receive(&mut self, _: time::Instant) -> Option<(Got, Put<'a, '_>)> {
        if !self.stack.is_ready(self.now) {
            return None;
        }
        let frame = self.stack.give(self.now)?;
        Some((Got(frame), Put(self)))
    }

    fn transmit(&mut self, _: time::Instant) -> Option<Put<'a, '_>> {
        Some(Put(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        capabilities
    }
}

impl Guest {
    fn new(mmds: Mmds) -> Self {
        let mmds = Arc::new(mmds);
        let now = Instant::now();
        let (mut stack, mut stray) = (Stack::new(Arc::clone(&mmds), SERVICE), 0);
        let address = HardwareAddress::Ethernet(EthernetAddress([2, 0, 0, 0, 0, 1]));
        let mut cable = Cable {
            stack: &mut stack,
            now,
            stray: &mut stray,
        };
        let mut interface = Interface::new(Config::new(address), &mut cable, time::Instant::ZERO);
        interface.update_ip_addrs(|addresses| {
            addresses
                .push(IpCidr::new(IpAddress::v4(172, 16, 0, 2), 24))
                .unwrap();
        });
        // By a gateway that is none: whatever has the address answers.
        interface
            .routes_mut()
            .add_default_ipv4_route(Ipv4Address::new(172, 16, 0, 1))
            .unwrap();
        interface.update_ip_addrs(|addresses| {
            addresses
                .push(IpCidr::new(IpAddress::v4(169, 254, 1, 1), 16))
                .unwrap();
        });
        Self {
            stack,
            mmds,
            interface,
            sockets: SocketSet::new(Vec::new()),
            now,
            began: now,
            stray,
        }
    }

    fn connect(&mut self, port: u16) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; 4096]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        let to = (IpAddress::Ipv4(SERVICE), 80);
        socket.connect(self.interface.context(), to, port).unwrap();
        self.sockets.add(socket)
    }

    /// Lets time pass and both sides do what they can.
    fn step(&mut self) {
        self.now += Duration::from_millis(5);
        let stamp = time::Instant::from_micros(
            i64::try_from(self.now.duration_since(self.began).as_micros()).unwrap(),
        );
        let mut cable = Cable {
            stack: &mut self.stack,
            now: self.now,
            stray: &mut self.stray,
        };
        self.interface.poll(stamp, &mut cable, &mut self.sockets);
    }

    fn socket(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// All that comes on a connection until its end, or until `enough`.
    fn heard(&mut self, handle: SocketHandle, enough: impl Fn(&[u8]) -> bool) -> Vec<u8> {
        let mut heard = Vec::new();
        for _ in 0..2000 {
            self.step();
            let socket = self.socket(handle);
            while socket.can_recv() {
                socket
                    .recv(|bytes| {
                        heard.extend_from_slice(bytes);
                        (bytes.len(), ())
                    })
                    .unwrap();
            }
            if enough(&heard)
                || !self.socket(handle).may_recv() && self.socket(handle).state() != tcp::State::SynSent
            {
                break;
            }
        }
        heard
    }

    fn fetch(&mut self, port: u16, path: &str) -> (String, String) {
        let handle = self.connect(port);
        for _ in 0..200 {
            self.step();
            if self.socket(handle).may_send() {
                break;
            }
        }
        let request = format!("GET {path} HTTP/1.1\r\nConnection: close\r\nAccept: application/json\r\n\r\n");
        self.socket(handle).send_slice(request.as_bytes()).unwrap();
        let heard = self.heard(handle, |_| false);
        self.socket(handle).close();
        self.step();
        parted(&heard)
    }
}

#[test]
fn a_guest_fetches_by_tcp_what_is_longer_than_a_window() {
    let mmds = Mmds::new();
    let long = "0123456789".repeat(5000);
    mmds.put(json!({ "long": long })).unwrap();
    let mut guest = Guest::new(mmds);
    let (status, body) = guest.fetch(49_152, "/long");
    assert_eq!(status, "200 OK");
    assert!(body == format!("\"{long}\""), "{} bytes", body.len());
    assert_eq!(guest.stray, 0);
    let counts = guest.mmds.counts();
    assert_eq!(
        (counts.requests.load(Relaxed), counts.opened.load(Relaxed)),
        (1, 1)
    );
    assert!(counts.tx_bytes.load(Relaxed) > 50_000);
}

#[test]
fn one_connection_after_the_other_is_served_and_so_is_one_more_than_there_is_room_for() {
    let mut guest = Guest::new(service(MmdsVersion::V1));
    for port in 0..40 {
        is(
            &guest.fetch(49_152 + port, "/latest/meta-data/id"),
            "200 OK",
            r#""i-1""#,
        );
    }
    // These say nothing, and keep nobody away.
    let quiet: Vec<_> = (0..12).map(|port| guest.connect(50_000 + port)).collect();
    for _ in 0..50 {
        guest.step();
    }
    is(&guest.fetch(51_000, "/latest/meta-data/id"), "200 OK", r#""i-1""#);
    assert!(quiet.len() > 8);
    let counts = guest.mmds.counts();
    assert!(counts.closed.load(Relaxed) <= counts.opened.load(Relaxed));
}

#[test]
fn a_connection_that_does_nothing_ends_by_itself() {
    let mut guest = Guest::new(service(MmdsVersion::V1));
    let handle = guest.connect(49_152);
    for _ in 0..50 {
        guest.step();
    }
    assert_eq!(guest.socket(handle).state(), tcp::State::Established);
    let alarm = guest.stack.alarm(guest.now).unwrap();
    assert!(
        alarm <= guest.now + Duration::from_secs(30),
        "{:?}",
        alarm - guest.now
    );
    guest.now += Duration::from_secs(31);
    for _ in 0..50 {
        guest.step();
    }
    assert_eq!(guest.socket(handle).state(), tcp::State::Closed);
    let counts = guest.mmds.counts();
    assert_eq!((counts.opened.load(Relaxed), counts.closed.load(Relaxed)), (1, 1));
}

#[test]
fn a_head_without_an_end_is_refused_and_requests_come_one_after_the_other() {
    let mut guest = Guest::new(service(MmdsVersion::V1));
    let handle = guest.connect(49_152);
    for _ in 0..50 {
        guest.step();
    }
    let two = b"GET /latest/meta-data/id HTTP/1.1\r\n\r\nGET /latest/meta-data/tags HTTP/1.1\r\n\r\n";
    guest.socket(handle).send_slice(two).unwrap();
    let heard = guest.heard(handle, |heard| heard.ends_with(b"\r\n\r\na/b"));
    let text = String::from_utf8(heard).unwrap();
    assert_eq!(text.matches("HTTP/1.1 200 OK").count(), 2, "{text}");
    let mut head = b"GET / HTTP/1.1\r\nX-Long: ".to_vec();
    head.resize(4096, b'x');
    guest.socket(handle).send_slice(&head).unwrap();
    let heard = guest.heard(handle, |_| false);
    assert!(
        heard.starts_with(b"HTTP/1.1 431 "),
        "{}",
        String::from_utf8_lossy(&heard)
    );
}

#[test]
fn frames_for_others_are_not_wanted_and_too_many_are_lost() {
    let mut stack = Stack::new(Arc::new(Mmds::new()), SERVICE);
    let mut frame = vec![0; HEAD_BYTES];
    assert!(!stack.wants(&frame));
    frame.splice(12..14, [8, 0]);
    frame.splice(30..34, SERVICE.octets());
    assert!(stack.wants(&frame));
    assert!(!stack.wants(frame.get(..33).unwrap()));
    frame.splice(12..14, [8, 6]);
    assert!(!stack.wants(&frame));
    frame.splice(38..42, SERVICE.octets());
    assert!(stack.wants(&frame));
    // No more is kept than what is bounded, whoever asks what and takes nothing.
    let request = [
        0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 1, 172, 16, 0, 2, 0, 0, 0, 0, 0, 0,
    ];
    frame.splice(0..6, [0xff; 6]);
    frame.splice(6..12, [2, 0, 0, 0, 0, 1]);
    frame.splice(14..38, request);
    let now = Instant::now();
    for _ in 0..200 {
        stack.take(frame.clone(), now);
    }
    stack.take(vec![0; 100_000], now);
    assert!(stack.is_ready(now) && stack.alarm(now).is_none());
    let given = std::iter::from_fn(|| stack.is_ready(now).then(|| stack.give(now))).count();
    assert!((32..=64).contains(&given), "{given}");
}
