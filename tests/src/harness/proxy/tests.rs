//! Each fault is shown by what a client and a server see of it.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use super::*;

mod careful;
mod store;

const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const SOON: Duration = Duration::from_secs(5);

/// A client and a server that are connected through a proxy.
fn connected() -> (Proxy, TcpStream, TcpStream) {
    let listener = TcpListener::bind((HERE, 0)).expect("a free port");
    let server = listener.local_addr().expect("it listens");
    let proxy = Proxy::start(HERE, server, Seed::from(1)).expect("a free port");
    let client = connect(proxy.address());
    let (server, _) = listener.accept().expect("the proxy connects");
    server.set_read_timeout(Some(SOON)).expect("a timeout");
    (proxy, client, server)
}

fn connect(address: SocketAddr) -> TcpStream {
    let client = TcpStream::connect(address).expect("the proxy listens");
    client.set_read_timeout(Some(SOON)).expect("a timeout");
    client
}

fn read_exactly(stream: &mut TcpStream, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    stream.read_exact(&mut bytes).expect("the bytes come");
    bytes
}

#[test]
fn without_a_fault_bytes_and_ends_pass_both_ways() {
    let (_proxy, mut client, mut server) = connected();
    client.write_all(b"question").expect("it is connected");
    assert_eq!(read_exactly(&mut server, 8), b"question");
    let large = vec![7; 3 << 20];
    std::thread::scope(|scope| {
        scope.spawn(|| server.write_all(&large).expect("it is connected"));
        assert_eq!(read_exactly(&mut client, large.len()), large);
    });
    client
        .shutdown(std::net::Shutdown::Write)
        .expect("it is connected");
    assert_eq!(server.read(&mut [0]).expect("an end, and no error"), 0);
    drop(server);
    assert_eq!(client.read(&mut [0]).expect("an end, and no error"), 0);
}

#[test]
fn a_cut_resets_both_sides() {
    let (proxy, mut client, mut server) = connected();
    proxy.cut().expect("it runs");
    for side in [&mut client, &mut server] {
        let error = side.read(&mut [0]).expect_err("a reset is no end");
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }
}

#[test]
fn a_black_hole_holds_everything_until_it_is_gone() {
    let (proxy, mut client, mut server) = connected();
    for direction in [Direction::ToServer, Direction::ToClient] {
        let (from, to) = match direction {
            Direction::ToServer => (&mut client, &mut server),
            Direction::ToClient => (&mut server, &mut client),
        };
        proxy.set(direction, Fault::BlackHole).expect("it runs");
        from.write_all(b"lost?").expect("it is connected");
        to.set_read_timeout(Some(Duration::from_millis(50)))
            .expect("a timeout");
        let error = to.read(&mut [0]).expect_err("nothing comes");
        assert_eq!(error.kind(), ErrorKind::WouldBlock);
        assert_eq!(proxy.held_bytes(direction).expect("it runs"), 5);
        proxy.set(direction, Fault::None).expect("it runs");
        to.set_read_timeout(Some(SOON)).expect("a timeout");
        assert_eq!(read_exactly(to, 5), b"lost?");
    }
}

#[test]
fn a_delay_keeps_the_order_and_its_bounds() {
    let (proxy, mut client, mut server) = connected();
    let least = Duration::from_millis(30);
    let most = Duration::from_millis(60);
    proxy
        .set(Direction::ToServer, Fault::Delay { least, most })
        .expect("it runs");
    let start = Instant::now();
    for byte in 0..20 {
        client.write_all(&[byte]).expect("it is connected");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(read_exactly(&mut server, 1), [0]);
    assert!(start.elapsed() >= least, "{:?}", start.elapsed());
    assert_eq!(read_exactly(&mut server, 19), (1..20).collect::<Vec<u8>>());
}

#[test]
fn a_rate_is_kept() {
    let (proxy, mut client, mut server) = connected();
    proxy
        .set(
            Direction::ToServer,
            Fault::Rate {
                bytes_per_second: 100_000,
            },
        )
        .expect("it runs");
    let start = Instant::now();
    client.write_all(&[1; 20_000]).expect("it is connected");
    read_exactly(&mut server, 20_000);
    let took = start.elapsed();
    // The last period's bytes pass at its start.
    assert!(took >= Duration::from_millis(180) && took < SOON, "{took:?}");
}

#[test]
fn a_connection_is_closed_after_exactly_so_many_bytes() {
    let (proxy, mut client, mut server) = connected();
    proxy
        .set(Direction::ToServer, Fault::CloseAfter { bytes: 100 })
        .expect("it runs");
    client.write_all(&[1; 60]).expect("it is connected");
    client.write_all(&[2; 60]).expect("it is connected");
    let mut found = Vec::new();
    // Whether the end is a reset is up to what was still unread.
    let _ = server.read_to_end(&mut found);
    assert_eq!(found.len(), 100);
    let ended = client.read(&mut [0]);
    assert!(matches!(ended, Ok(0) | Err(_)), "{ended:?}");
    assert_eq!(proxy.held_bytes(Direction::ToServer).expect("it runs"), 0);
}

#[test]
fn one_byte_is_corrupted_where_it_was_asked_for() {
    let (proxy, mut client, mut server) = connected();
    proxy
        .set(Direction::ToServer, Fault::Corrupt { bytes: 5 })
        .expect("it runs");
    for _ in 0..4 {
        client.write_all(&[0; 3]).expect("it is connected");
    }
    let mut expected = [0; 12];
    *expected.get_mut(5).expect("it has 12") = 0xff;
    assert_eq!(read_exactly(&mut server, 12), expected);
}

#[test]
fn what_was_stranded_comes_late_on_its_old_connection() {
    let (proxy, mut client, mut server) = connected();
    client.write_all(b"first ").expect("it is connected");
    assert_eq!(read_exactly(&mut server, 6), b"first ");
    proxy.set(Direction::ToServer, Fault::BlackHole).expect("it runs");
    client.write_all(b"second").expect("it is connected");
    wait_for_held(&proxy, 6);
    assert_eq!(proxy.strand().expect("it runs"), 6);
    let error = client.read(&mut [0]).expect_err("the client sees a reset");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    proxy.set(Direction::ToServer, Fault::None).expect("it runs");
    server
        .set_read_timeout(Some(Duration::from_millis(30)))
        .expect("a timeout");
    assert_eq!(
        server.read(&mut [0]).expect_err("nothing comes").kind(),
        ErrorKind::WouldBlock
    );
    assert_eq!(proxy.deliver_late().expect("it runs"), 6);
    server.set_read_timeout(Some(SOON)).expect("a timeout");
    assert_eq!(read_exactly(&mut server, 6), b"second");
    assert_eq!(server.read(&mut [0]).expect("an end follows"), 0);
}

fn wait_for_held(proxy: &Proxy, bytes: usize) {
    let deadline = Instant::now() + SOON;
    while proxy.held_bytes(Direction::ToServer).expect("it runs") < bytes {
        assert!(Instant::now() < deadline, "{bytes} bytes never came");
        std::thread::sleep(Duration::from_millis(1));
    }
}
