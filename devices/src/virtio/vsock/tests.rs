//! The socket device from its driver's side, and from that of the host's programs: neither is trusted.
#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

mod hostile;
mod rig;

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::time::Duration;

use super::connection::BUFFER_BYTES;
use super::packet::{ENDS_RECEIVING, ENDS_SENDING, Header, op};
use super::*;
use crate::virtio::conformance::{BUFFERS, Subject, conforms};
use crate::virtio::device::{DeviceKind, VirtioDevice as _};
use crate::virtio::state::{DeviceState, DeviceStateError};
use crate::virtio::testing::Piece;
use rig::{CID, ROOM_BYTES, Rig, comes, config, device, expect_end, header, read, used};

/// The first port that a caller gets.
const FIRST: u32 = 1 << 30;

fn of(count: &AtomicU64) -> u64 {
    count.load(Relaxed)
}

/// Bytes that say where they are.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| u8::try_from(at % 251).unwrap()).collect()
}

/// The port that is called next.
static NEXT: AtomicU32 = AtomicU32::new(1);

#[test]
fn the_socket_device_keeps_the_promises_of_every_device() {
    conforms(&Subject {
        // Whose host calls as often as it is listened to.
        make: || {
            let directory = tempfile::tempdir().unwrap();
            let device = device(&directory).0;
            std::thread::spawn(move || {
                while let Ok(mut stream) = UnixStream::connect(directory.path().join("v")) {
                    // No packet is like the one before, whoever got that.
                    let line = format!("CONNECT {}\n", NEXT.fetch_add(1, Relaxed));
                    // It may be gone by now.
                    let _ = stream.write_all(line.as_bytes());
                    std::thread::sleep(Duration::from_micros(200));
                }
            });
            Box::new(device)
        },
        offer: |driver| {
            driver.offer_chain(&[Piece::Writable(BUFFERS, 64)]);
        },
        writes_buffers: true,
    });
}

#[test]
fn a_guest_reaches_a_program_of_its_host_and_bytes_go_both_ways() {
    let mut rig = Rig::new();
    let mut host = rig.connected_to_host(1000);
    rig.send_data((52, 1000), b"from the guest");
    assert_eq!(read(&host, 14), b"from the guest");
    host.write_all(&pattern(10_000)).unwrap();
    let mut heard = Vec::new();
    while heard.len() < 10_000 {
        let (header, data) = rig.expect(op::RW, (52, 1000));
        assert_eq!((header.buf_alloc, header.fwd_cnt), (BUFFER_BYTES, 14));
        heard.extend(data);
    }
    assert_eq!(heard, pattern(10_000));
    assert_eq!((of(&rig.counts.tx_bytes), of(&rig.counts.rx_bytes)), (14, 10_000));
    assert_eq!((of(&rig.counts.tx_packets), of(&rig.counts.conns_added)), (2, 1));
    assert!(of(&rig.counts.rx_packets) >= 4);
}

#[test]
fn a_guest_that_reaches_nobody_is_told() {
    let mut rig = Rig::new();
    rig.send(&header(op::REQUEST, (53, 1000)), &[]);
    rig.expect(op::RST, (53, 1000));
    assert_eq!(of(&rig.counts.conns_added), 0);
}

#[test]
fn a_program_of_the_host_reaches_the_guest() {
    let mut rig = Rig::new();
    // What comes behind the line is the guest's.
    let mut host = rig.caller("CONNECT 7\nhello");
    rig.expect(op::REQUEST, (FIRST, 7));
    rig.send(&header(op::RESPONSE, (FIRST, 7)), &[]);
    assert_eq!(read(&host, 14), b"OK 1073741824\n");
    assert_eq!(rig.expect(op::RW, (FIRST, 7)).1, b"hello");
    rig.send_data((FIRST, 7), b"welcome");
    assert_eq!(read(&host, 7), b"welcome");
    host.write_all(b"more").unwrap();
    assert_eq!(rig.expect(op::RW, (FIRST, 7)).1, b"more");
    let _second = rig.caller("CONNECT 7\n");
    rig.expect(op::REQUEST, (FIRST + 1, 7));
}

#[test]
fn a_line_may_come_in_pieces_and_a_guest_may_refuse() {
    let mut rig = Rig::new();
    let mut host = rig.caller("CONN");
    rig.expect_silence();
    host.write_all(b"ECT 9\n").unwrap();
    rig.expect(op::REQUEST, (FIRST, 9));
    rig.send(&header(op::RST, (FIRST, 9)), &[]);
    expect_end(&host, b"");
    assert_eq!(of(&rig.counts.conns_removed), 1);
}

#[test]
fn a_caller_that_is_gone_is_not_missed() {
    let mut rig = Rig::new();
    let host = rig.caller("CONNECT 7\n");
    rig.expect(op::REQUEST, (FIRST, 7));
    drop(host);
    rig.expect(op::RST, (FIRST, 7));
}

#[test]
fn a_guest_gets_no_more_than_it_has_room_for() {
    let mut rig = Rig::new();
    let mut host = rig.caller("CONNECT 7\n");
    rig.expect(op::REQUEST, (FIRST, 7));
    let narrow = |op, fwd_cnt| Header {
        buf_alloc: 10,
        fwd_cnt,
        ..header(op, (FIRST, 7))
    };
    rig.send(&narrow(op::RESPONSE, 0), &[]);
    assert_eq!(read(&host, 14).len(), 14);
    host.write_all(&pattern(25)).unwrap();
    let mut heard = rig.expect(op::RW, (FIRST, 7)).1;
    assert_eq!(heard.len(), 10);
    rig.expect(op::CREDIT_REQUEST, (FIRST, 7));
    rig.expect_silence();
    // It has taken three of them, and then all.
    rig.send(&narrow(op::CREDIT_UPDATE, 3), &[]);
    heard.extend(rig.expect(op::RW, (FIRST, 7)).1);
    assert_eq!(heard.len(), 13);
    rig.expect(op::CREDIT_REQUEST, (FIRST, 7));
    rig.send(&narrow(op::CREDIT_UPDATE, 13), &[]);
    heard.extend(rig.expect(op::RW, (FIRST, 7)).1);
    rig.expect(op::CREDIT_REQUEST, (FIRST, 7));
    // More than it was given: that is no room.
    rig.send(&narrow(op::CREDIT_UPDATE, 1000), &[]);
    rig.expect(op::CREDIT_REQUEST, (FIRST, 7));
    rig.send(&narrow(op::CREDIT_UPDATE, 23), &[]);
    heard.extend(rig.expect(op::RW, (FIRST, 7)).1);
    assert_eq!(heard, pattern(25));
}

#[test]
fn a_host_gets_all_that_it_reads_late_and_the_guest_hears_of_the_room() {
    let mut rig = Rig::new();
    let host = rig.connected_to_host(1000);
    let other = rig.connected_to_host(1001);
    let piece = pattern(32 << 10);
    let mut sent: Vec<u8> = Vec::new();
    let mut told: u32 = 0;
    // As much as the sockets of the host take and the device keeps.
    loop {
        while let Some((head, _)) = rig.rx.take_used() {
            let at = BUFFERS + u64::from(head / 2) * 0x2000;
            told = u32::from_le_bytes(rig.rx.read(at + 40, 4).try_into().unwrap());
            rig.offer(1);
        }
        let in_flight = u32::try_from(sent.len()).unwrap() - told;
        if in_flight + 32_768 > BUFFER_BYTES {
            // Nothing more comes while it does not read.
            rig.expect_silence();
            break;
        }
        rig.send_data((52, 1000), &piece);
        sent.extend(&piece);
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(sent.len() > 64 << 10, "{}", sent.len());
    rig.send_data((52, 1001), b"others");
    assert_eq!(read(&other, 6), b"others");
    assert_eq!(read(&host, sent.len()), sent);
    // By one packet or more.
    let all = u32::try_from(sent.len()).unwrap();
    while rig.expect(op::CREDIT_UPDATE, (52, 1000)).0.fwd_cnt + BUFFER_BYTES / 2 < all {}
    rig.send(&header(op::CREDIT_REQUEST, (52, 1000)), &[]);
    assert_eq!(rig.expect(op::CREDIT_UPDATE, (52, 1000)).0.fwd_cnt, all);
}

#[test]
fn a_guest_may_end_one_half_and_then_the_other() {
    let mut rig = Rig::new();
    let mut host = rig.connected_to_host(1000);
    let end = |flags| Header {
        flags,
        ..header(op::SHUTDOWN, (52, 1000))
    };
    rig.send_data((52, 1000), b"the last of it");
    rig.send(&end(ENDS_SENDING), &[]);
    expect_end(&host, b"the last of it");
    host.write_all(b"still").unwrap();
    assert_eq!(rig.expect(op::RW, (52, 1000)).1, b"still");
    rig.send(&end(ENDS_RECEIVING), &[]);
    rig.expect(op::RST, (52, 1000));
    comes(|| {
        host.write(b"x")
            .is_err_and(|error| error.kind() == ErrorKind::BrokenPipe)
    });
    assert_eq!(
        (of(&rig.counts.conns_added), of(&rig.counts.conns_removed)),
        (1, 1)
    );
}

#[test]
fn a_guest_that_only_ends_receiving_may_send() {
    let mut rig = Rig::new();
    let mut host = rig.connected_to_host(1000);
    let end = Header {
        flags: ENDS_RECEIVING,
        ..header(op::SHUTDOWN, (52, 1000))
    };
    rig.send(&end, &[]);
    comes(|| {
        host.write(b"x")
            .is_err_and(|error| error.kind() == ErrorKind::BrokenPipe)
    });
    rig.send_data((52, 1000), b"it sends");
    assert_eq!(read(&host, 8), b"it sends");
    drop(host);
    let (header, _) = rig.expect(op::SHUTDOWN, (52, 1000));
    assert_eq!(header.flags, ENDS_RECEIVING);
}

#[test]
fn a_host_may_end_one_half_and_then_the_other() {
    let mut rig = Rig::new();
    let mut host = rig.connected_to_host(1000);
    host.write_all(b"the last of it").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    assert_eq!(rig.expect(op::RW, (52, 1000)).1, b"the last of it");
    assert_eq!(rig.expect(op::SHUTDOWN, (52, 1000)).0.flags, ENDS_SENDING);
    rig.send_data((52, 1000), b"still");
    assert_eq!(read(&host, 5), b"still");
    drop(host);
    let (ended, _) = rig.expect(op::SHUTDOWN, (52, 1000));
    assert_eq!(ended.flags, ENDS_SENDING | ENDS_RECEIVING);
    // What is on its way then is lost, and no fault.
    rig.send_data((52, 1000), b"too late");
    rig.expect_silence();
    rig.send(&header(op::RST, (52, 1000)), &[]);
    rig.expect_silence();
    assert_eq!(of(&rig.counts.conns_removed), 1);
}

#[test]
fn what_a_host_has_sent_before_it_was_gone_comes_before_the_end() {
    let mut rig = Rig::new();
    let mut host = rig.connected_to_host(1000);
    host.write_all(&pattern(9000)).unwrap();
    drop(host);
    let (mut heard, mut ended) = (Vec::new(), 0);
    while ended & ENDS_SENDING == 0 {
        let (header, data) = rig.packet();
        assert!(ended & ENDS_SENDING == 0 && [op::RW, op::SHUTDOWN].contains(&header.op));
        heard.extend(data);
        ended |= header.flags;
    }
    assert_eq!(heard, pattern(9000));
    assert_eq!(ended, ENDS_SENDING | ENDS_RECEIVING);
}

#[test]
fn what_a_guest_has_sent_before_it_closes_reaches_a_host_that_is_slow() {
    let mut rig = Rig::new();
    let mut host = rig.connected_to_host(1000);
    let piece = pattern(60_000);
    let mut sent = 0;
    // Until some of it is kept.
    while sent < 8 * piece.len() && of(&rig.counts.tx_bytes) == sent as u64 {
        let known = match rig.rx.take_used() {
            Some(_) => continue,
            None => sent,
        };
        rig.send_data((52, 1000), &piece);
        sent = known + piece.len();
        rig.send(&header(op::CREDIT_REQUEST, (52, 1000)), &[]);
        let (update, _) = rig.packet();
        if u64::from(update.fwd_cnt) < sent as u64 {
            break;
        }
    }
    let close = Header {
        flags: ENDS_SENDING | ENDS_RECEIVING,
        ..header(op::SHUTDOWN, (52, 1000))
    };
    rig.send(&close, &[]);
    // It does not wait any more.
    rig.send(&header(op::RST, (52, 1000)), &[]);
    let mut heard = Vec::new();
    host.read_to_end(&mut heard).unwrap();
    assert_eq!(heard, piece.repeat(sent / piece.len()));
    // Whatever it was told of its credit meanwhile, it is not told of the end.
    std::thread::sleep(rig::STILL);
    while let Some((head, _)) = rig.rx.take_used() {
        let op = rig.rx.read(BUFFERS + u64::from(head / 2) * 0x2000 + 30, 2);
        assert_ne!(op, op::RST.to_le_bytes());
    }
    assert_eq!(of(&rig.counts.conns_removed), 1);
}

#[test]
fn a_driver_that_begins_anew_finds_no_connection_and_no_program_of_the_host_does() {
    let mut rig = Rig::new();
    let host = rig.connected_to_host(1000);
    let waiting = rig.caller("CONN");
    rig.expect_silence();
    rig.device.stop().unwrap();
    rig.device.reset_config();
    expect_end(&host, b"");
    expect_end(&waiting, b"");
    assert_eq!(of(&rig.counts.conns_removed), 1);
}

#[test]
fn nothing_moves_while_it_is_stopped_and_everything_after() {
    let mut rig = Rig::new();
    let mut host = rig.connected_to_host(1000);
    let session = rig.device.stop().unwrap().unwrap();
    host.write_all(b"meanwhile").unwrap();
    let _caller = rig.caller("CONNECT 8\n");
    rig.offer_packet(
        &Header {
            len_bytes: 2,
            ..header(op::RW, (52, 1000))
        },
        b"hi",
    );
    rig.expect_silence();
    host.set_nonblocking(true).unwrap();
    let nothing = host.read(&mut [0]).unwrap_err();
    assert_eq!(nothing.kind(), ErrorKind::WouldBlock);
    host.set_nonblocking(false).unwrap();
    rig.device.start(session).unwrap();
    assert_eq!(read(&host, 2), b"hi");
    let mut said = vec![rig.packet().0.op, rig.packet().0.op];
    said.sort_unstable();
    assert_eq!(said, [op::REQUEST, op::RW]);
}

#[test]
fn a_guest_that_goes_on_elsewhere_is_told_that_its_connections_are_gone() {
    let mut rig = Rig::new();
    let _caller = rig.caller("CONNECT 7\n");
    rig.expect(op::REQUEST, (FIRST, 7));
    rig.device.stop().unwrap();
    let state = rig.device.save();
    assert_eq!(state, DeviceState::Socket(VsockState { next_port: FIRST + 1 }));

    let mut elsewhere = Rig::idle();
    elsewhere.device.restore(&state).unwrap();
    assert_eq!(elsewhere.device.save(), state);
    elsewhere.offer(8);
    // One that is too small, and one that it fits.
    elsewhere.events.offer_chain(&[Piece::Writable(BUFFERS, 2)]);
    elsewhere.events.offer_chain(&[Piece::Writable(BUFFERS + 8, 4)]);
    elsewhere.events.offer_chain(&[Piece::Writable(BUFFERS + 16, 4)]);
    elsewhere.events.write(BUFFERS + 8, &[0xff; 4]);
    elsewhere.start();
    assert_eq!(used(&mut elsewhere.events), (0, 0));
    assert_eq!(used(&mut elsewhere.events), (1, 4));
    assert_eq!(elsewhere.events.read(BUFFERS + 8, 4), [0; 4]);
    // What it still sends to an old one is refused, and a new caller has another port.
    elsewhere.send_data((FIRST, 7), b"hello?");
    elsewhere.expect(op::RST, (FIRST, 7));
    let _caller = elsewhere.caller("CONNECT 7\n");
    // Not before the driver has heard of the reset: it would end this one too.
    elsewhere.expect_silence();
    elsewhere.events.offer_chain(&[Piece::Writable(BUFFERS + 8, 4)]);
    elsewhere.expect(op::REQUEST, (FIRST + 1, 7));
    assert_eq!(elsewhere.events.take_used(), None, "it is told once");
}

#[test]
fn what_no_socket_device_has_saved_is_not_taken_up() {
    let mut rig = Rig::idle();
    for next_port in [0, FIRST - 1, 2 * FIRST, u32::MAX] {
        let state = DeviceState::Socket(VsockState { next_port });
        let error = rig.device.restore(&state).unwrap_err();
        assert_eq!(error, DeviceStateError::HostPort(next_port));
    }
    let error = rig.device.restore(&DeviceState::Entropy).unwrap_err();
    let (saved, here) = (DeviceKind::Entropy, DeviceKind::Socket);
    assert_eq!(error, DeviceStateError::Kind { saved, here });
}

#[test]
fn the_ports_of_callers_begin_again_and_none_is_given_twice() {
    let mut rig = Rig::idle();
    let last = 2 * FIRST - 1;
    let state = DeviceState::Socket(VsockState { next_port: last });
    rig.device.restore(&state).unwrap();
    rig.offer(8);
    rig.start();
    let _first = rig.caller("CONNECT 7\n");
    rig.expect(op::REQUEST, (last, 7));
    let _second = rig.caller("CONNECT 7\n");
    rig.expect(op::REQUEST, (FIRST, 7));
}

#[test]
fn the_configuration_is_the_address_of_the_guest() {
    let rig = Rig::idle();
    let mut space = [0xff; 12];
    rig.device.read_config(0, &mut space);
    assert_eq!(
        space,
        [u8::try_from(CID).unwrap(), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    );
    let mut part = [0xff; 2];
    rig.device.read_config(7, &mut part);
    assert_eq!(part, [0; 2]);
    assert_eq!(rig.device.kind(), DeviceKind::Socket);
}

#[test]
fn the_file_of_the_socket_is_there_as_long_as_its_device() {
    let directory = tempfile::tempdir().unwrap();
    let path = config(&directory).uds_path;
    let first = device(&directory).0;
    let served = Listener::bind(&path).unwrap_err();
    assert!(matches!(served, ListenError::Served { .. }), "{served}");
    drop(first);
    assert!(!std::fs::exists(&path).unwrap());

    // What is somebody else's stays.
    let second = device(&directory).0;
    std::fs::remove_file(&path).unwrap();
    drop(UnixListener::bind(&path).unwrap());
    drop(second);
    assert!(std::fs::exists(&path).unwrap());
    let left_over = Listener::check(&path).unwrap_err();
    assert!(matches!(left_over, ListenError::Exists { .. }), "{left_over}");
    assert!(std::fs::exists(&path).unwrap());

    let long = directory.path().join("v".repeat(108));
    for path in [long.to_str().unwrap(), "/nowhere/v", "v\0"] {
        let error = Listener::check(path).unwrap_err();
        assert!(matches!(error, ListenError::Create { .. }), "{error}");
    }
    let free = directory.path().join("free");
    Listener::check(free.to_str().unwrap()).unwrap();
    assert!(!std::fs::exists(free).unwrap());
}

#[test]
fn a_buffer_without_room_is_given_back_and_the_next_is_used() {
    let mut rig = Rig::idle();
    rig.rx
        .offer_chain(&[Piece::Writable(BUFFERS, 43), Piece::Writable(BUFFERS, 0)]);
    rig.rx
        .offer_chain(&[Piece::Writable(BUFFERS, 22), Piece::Writable(BUFFERS + 22, 22)]);
    rig.rx
        .offer_chain(&[Piece::Readable(BUFFERS, 44), Piece::Readable(BUFFERS, 44)]);
    rig.rx
        .offer_chain(&[Piece::Writable(BUFFERS, 44), Piece::Writable(BUFFERS + 44, 0)]);
    rig.start();
    let mut host = rig.caller("CONNECT 7\nhello");
    assert_eq!(used(&mut rig.rx), (0, 0));
    assert_eq!(
        used(&mut rig.rx),
        (2, 44),
        "a request needs no more than a header"
    );
    rig.send(&header(op::RESPONSE, (FIRST, 7)), &[]);
    assert_eq!(used(&mut rig.rx), (4, 0));
    assert_eq!(used(&mut rig.rx), (6, 0));
    rig.offer(1);
    assert_eq!(rig.last_packet().1, b"hello");
    assert_eq!(of(&rig.counts.rx_guest_faults), 3);
    host.write_all(&vec![1; 2 * usize::try_from(ROOM_BYTES).unwrap()])
        .unwrap();
    rig.offer(2);
    assert_eq!(rig.last_packet().0.len_bytes, ROOM_BYTES);
    assert_eq!(rig.last_packet().0.len_bytes, ROOM_BYTES);
}
