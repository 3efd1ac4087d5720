//! Guests and programs of the host that mean no good.
#![expect(unsafe_code, reason = "headers are read as those of a guest")]

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Instant;

use super::super::callers::Callers;
use super::super::connection::Said;
use super::super::connections::{CONNECTIONS_MAX, Connections};
use super::super::packet::HEADER_BYTES;
use super::rig::SENT;
use super::*;
use crate::virtio::device::INTERRUPT_NEEDS_RESET;

#[test]
fn what_makes_no_sense_is_answered_by_a_reset_or_not_at_all() {
    let mut rig = Rig::new();
    for op in [
        0,
        op::RESPONSE,
        op::SHUTDOWN,
        op::RW,
        op::CREDIT_UPDATE,
        op::CREDIT_REQUEST,
        8,
        0xffff,
    ] {
        rig.send(&header(op, (52, 1000)), &[]);
        rig.expect(op::RST, (52, 1000));
    }
    // Resets are not answered, and strangers are not heard.
    rig.send(&header(op::RST, (52, 1000)), &[]);
    rig.send(
        &Header {
            src_cid: 4,
            ..header(op::REQUEST, (52, 1000))
        },
        &[],
    );
    rig.expect_silence();
    // Another type, which the answer has, too; and somebody who is not there.
    rig.send(
        &Header {
            kind: 2,
            ..header(op::REQUEST, (52, 1000))
        },
        &[],
    );
    assert_eq!(rig.expect(op::RST, (52, 1000)).0.kind, 2);
    rig.send(
        &Header {
            dst_cid: 9,
            ..header(op::REQUEST, (52, 1000))
        },
        &[],
    );
    let (head, _) = used(&mut rig.rx);
    let at = BUFFERS + u64::from(head / 2) * 0x2000;
    assert_eq!(rig.rx.read(at, 9), [9, 0, 0, 0, 0, 0, 0, 0, 3]);
    assert_eq!(of(&rig.counts.tx_guest_faults), 1);
    assert_eq!(of(&rig.counts.conns_added), 0);
}

#[test]
fn a_connection_does_not_survive_what_makes_no_sense_in_it() {
    let mut rig = Rig::new();
    let data = |len_bytes| Header {
        len_bytes,
        ..header(op::RW, (52, 1000))
    };
    let end = Header {
        flags: ENDS_SENDING,
        ..header(op::SHUTDOWN, (52, 1000))
    };
    for wrong in [
        header(op::REQUEST, (52, 1000)),
        header(op::RESPONSE, (52, 1000)),
        header(9, (52, 1000)),
    ] {
        let host = rig.connected_to_host(1000);
        rig.send(&wrong, &[]);
        rig.expect(op::RST, (52, 1000));
        expect_end(&host, b"");
    }
    // More than there is room for, and more than there is.
    let host = rig.connected_to_host(1000);
    rig.send(&data(BUFFER_BYTES + 1), &pattern(BUFFER_BYTES as usize + 1));
    rig.expect(op::RST, (52, 1000));
    expect_end(&host, b"");
    // After it has said that there will be none.
    let host = rig.connected_to_host(1000);
    rig.send(&end, &[]);
    rig.send(&data(1), b"x");
    rig.expect(op::RST, (52, 1000));
    expect_end(&host, b"");
    // Before it has answered a caller.
    let host = rig.caller("CONNECT 7\n");
    rig.expect(op::REQUEST, (FIRST, 7));
    rig.send(&header(op::RW, (FIRST, 7)), &[]);
    rig.expect(op::RST, (FIRST, 7));
    expect_end(&host, b"");
    assert_eq!(of(&rig.counts.conns_added), of(&rig.counts.conns_removed));
}

#[test]
fn a_packet_that_is_shorter_than_it_says_is_none() {
    let mut rig = Rig::new();
    let host = rig.connected_to_host(1000);
    rig.send(
        &Header {
            len_bytes: 3,
            ..header(op::RW, (52, 1000))
        },
        b"ab",
    );
    rig.send(
        &Header {
            len_bytes: u32::MAX,
            ..header(op::RW, (52, 1000))
        },
        b"ab",
    );
    rig.tx.offer_chain(&[Piece::Readable(SENT, 43)]);
    rig.tx.offer_chain(&[Piece::Writable(SENT, 100)]);
    rig.tx.offer_chain(&[Piece::Readable(1 << 40, 100)]);
    rig.kick(1);
    for _ in 0..3 {
        assert_eq!(used(&mut rig.tx).1, 0);
    }
    assert_eq!(of(&rig.counts.tx_guest_faults), 5);
    // What is behind its data is nobody's.
    rig.send(
        &Header {
            len_bytes: 2,
            ..header(op::RW, (52, 1000))
        },
        b"abcd",
    );
    assert_eq!(read(&host, 2), b"ab");
    drop(rig);
    expect_end(&host, b"");
}

#[test]
fn a_guest_that_takes_no_answers_is_not_heard_for_ever() {
    let mut rig = Rig::idle();
    rig.start();
    for _ in 0..256 {
        rig.send(&header(op::RW, (52, 1000)), &[]);
    }
    rig.offer_packet(&header(op::RW, (53, 1000)), &[]);
    rig.expect_silence();
    assert_eq!(rig.tx.take_used(), None);
    rig.offer(16);
    for _ in 0..256 {
        rig.expect(op::RST, (52, 1000));
    }
    rig.expect(op::RST, (53, 1000));
}

#[test]
fn a_guest_that_sends_more_than_it_was_told_of_is_heard_while_there_is_room() {
    let mut rig = Rig::idle();
    rig.start();
    // For one word of the room that there is, and no more.
    rig.offer(1);
    let host = rig.connected_to_host(1000);
    let piece = pattern(32 << 10);
    for _ in 0..5 {
        rig.send_data((52, 1000), &piece);
        assert!(read(&host, piece.len()) == piece);
    }
}

#[test]
fn a_guest_that_opens_and_drops_connections_leaves_nothing_behind() {
    let mut rig = Rig::idle();
    rig.start();
    let _listener = UnixListener::bind(rig.path("_52")).unwrap();
    for _ in 0..100 {
        rig.send(&header(op::REQUEST, (52, 1000)), &[]);
        rig.send(&header(op::RST, (52, 1000)), &[]);
    }
    rig.offer(4);
    rig.expect_silence();
    assert_eq!(of(&rig.counts.conns_removed), 100);
}

#[test]
fn callers_that_say_nothing_useful_are_sent_away() {
    let mut rig = Rig::new();
    for line in [
        "CONNECT\n",
        "GET / HTTP/1.1\r\n",
        "CONNECT 5000000000\n",
        &"x".repeat(64),
    ] {
        let mut host = rig.caller(line);
        // Or it was cut off before it was read to its end.
        let ended = host.read(&mut [0]).map_err(|error| error.kind());
        assert!(
            matches!(ended, Ok(0) | Err(ErrorKind::ConnectionReset)),
            "{line}: {ended:?}"
        );
    }
    drop(rig.caller("CONN"));
    rig.expect_silence();
    let _one_that_is_right = rig.caller("CONNECT 7\n");
    rig.expect(op::REQUEST, (FIRST, 7));
}

/// What a worker has, without one.
fn parts(directory: &tempfile::TempDir) -> (Callers, Connections, Arc<VsockCounts>) {
    let Listener { socket, file } = Listener::bind(&config(directory).uds_path).unwrap();
    let counts = Arc::<VsockCounts>::default();
    let next_port = Arc::new(AtomicU32::new(FIRST));
    let path = file.path().into();
    // The socket is found by its file.
    std::mem::forget(file);
    let connections = Connections::new(CID, next_port, path, Arc::clone(&counts));
    (Callers::of(socket), connections, counts)
}

/// Has the callers be looked at, as if each had something to say.
fn look(callers: &mut Callers, connections: &mut Connections, now: Instant) {
    let found = vec![rustix::event::PollFlags::IN; callers.interests().count()];
    callers.found(&found, connections, now);
}

/// Takes the next packet.
fn say(connections: &mut Connections) -> Option<u16> {
    let mut bytes = [0; HEADER_BYTES + 20];
    let address = std::ptr::NonNull::new(bytes.as_mut_ptr()).unwrap();
    // SAFETY: the bytes outlive the segment.
    let segment = unsafe { coracle_storage::request::Segment::new(address, bytes.len()) };
    match connections.say(&[segment], &mut Vec::new()) {
        Said::Packet(_) => Some(Header::read(&[segment]).unwrap().op),
        _ => None,
    }
}

#[test]
fn a_caller_has_seconds_to_say_what_it_wants_and_few_wait_at_a_time() {
    let directory = tempfile::tempdir().unwrap();
    let (mut callers, mut connections, counts) = parts(&directory);
    let now = Instant::now();
    let hosts: Vec<UnixStream> = (0..70)
        .map(|_| UnixStream::connect(directory.path().join("v")).unwrap())
        .collect();
    look(&mut callers, &mut connections, now);
    assert_eq!(callers.interests().count(), 64, "the next one has to wait");
    callers.postpone(Duration::from_millis(500));
    look(&mut callers, &mut connections, now + Duration::from_millis(5400));
    assert_eq!(callers.interests().count(), 64);
    look(&mut callers, &mut connections, now + Duration::from_secs(6));
    look(&mut callers, &mut connections, now + Duration::from_secs(6));
    assert_eq!(callers.interests().count(), 6 + 1);
    expect_end(hosts.first().unwrap(), b"");
    assert_eq!(of(&counts.conns_added), 0);
}

#[test]
fn a_guest_has_seconds_to_answer_a_caller_and_to_close_what_is_closed() {
    let directory = tempfile::tempdir().unwrap();
    let (mut callers, mut connections, counts) = parts(&directory);
    let now = Instant::now();
    let call = |callers: &mut Callers, connections: &mut Connections| {
        let mut host = UnixStream::connect(directory.path().join("v")).unwrap();
        host.write_all(b"CONNECT 7\n").unwrap();
        look(callers, connections, now);
        look(callers, connections, now);
        host
    };
    let first = call(&mut callers, &mut connections);
    connections.expire(now + Duration::from_secs(11));
    assert_eq!(say(&mut connections), None, "one that the guest has not heard of");
    expect_end(&first, b"");
    let second = call(&mut callers, &mut connections);
    assert_eq!(say(&mut connections), Some(op::REQUEST));
    // A pause does not count.
    connections.postpone(Duration::from_secs(5));
    connections.expire(now + Duration::from_secs(14));
    assert_eq!(say(&mut connections), None);
    connections.expire(now + Duration::from_secs(16));
    assert_eq!(say(&mut connections), Some(op::RST));
    expect_end(&second, b"");
    assert_eq!((of(&counts.conns_killed), of(&counts.conns_removed)), (2, 2));

    let third = call(&mut callers, &mut connections);
    assert_eq!(say(&mut connections), Some(op::REQUEST));
    connections.take(&header(op::RESPONSE, (FIRST + 2, 7)), &mut Vec::new());
    assert_eq!(read(&third, 14).len(), 14);
    drop(third);
    let all = rustix::event::PollFlags::IN | rustix::event::PollFlags::HUP;
    connections.found((FIRST + 2, 7), all);
    while say(&mut connections).is_some_and(|said| said == op::SHUTDOWN) {}
    connections.expire(now + Duration::from_secs(9));
    assert_eq!(say(&mut connections), None);
    connections.expire(now + Duration::from_secs(20));
    assert_eq!(say(&mut connections), Some(op::RST));
    assert_eq!((of(&counts.conns_killed), of(&counts.conns_removed)), (3, 3));
}

#[test]
fn a_machine_has_so_many_connections_and_no_more() {
    let directory = tempfile::tempdir().unwrap();
    let (_, mut connections, counts) = parts(&directory);
    let now = Instant::now();
    let listener = UnixListener::bind(directory.path().join("v_52")).unwrap();
    let stream = || super::super::socket::Stream::connect(&directory.path().join("v_52")).unwrap();
    while !connections.is_full() {
        connections.call(stream(), 7, now);
        drop(listener.accept().unwrap());
    }
    assert_eq!(of(&counts.conns_added), CONNECTIONS_MAX as u64);
    connections.take(&header(op::REQUEST, (52, 1000)), &mut Vec::new());
    assert_eq!(say(&mut connections), Some(op::RST));
    assert_eq!(of(&counts.conns_added), CONNECTIONS_MAX as u64);
}

#[test]
fn a_broken_ring_ends_the_device_until_it_is_reset() {
    for queue in 0..2 {
        let mut rig = Rig::new();
        let ring = [&mut rig.rx, &mut rig.tx].into_iter().nth(queue).unwrap();
        ring.set_avail_index(0x7000);
        rig.kick(queue);
        let _caller = rig.caller("CONNECT 7\n");
        comes(|| {
            rig.rx.take_used();
            rig.status.load(SeqCst) & INTERRUPT_NEEDS_RESET != 0
        });
        assert!(rig.device.stop().unwrap().is_some());
    }
}
