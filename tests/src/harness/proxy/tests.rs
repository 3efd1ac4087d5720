//! Each fault is shown by what a client and a server see of it, and by a block store that must survive it.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::*;
use crate::case::Extent;
use crate::harness::matrix::{Cell, Matrix};
use crate::harness::oracle::{Oracle, stamp};

mod store;

use store::{BLOCK_BYTES, Bugs, Client, Server, Wire};

const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const SOON: Duration = Duration::from_secs(5);
const BLOCKS: u64 = 8;

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

/// A store behind a proxy, a client that stamps its blocks, and the oracle that is told what was flushed.
struct Scene {
    server: Server,
    proxy: Arc<Proxy>,
    client: Client,
    oracle: Oracle,
    sequence: u64,
}

impl Scene {
    fn new(mode: &str, bugs: Bugs) -> Self {
        let server = Server::start(8).expect("a free port");
        let seed = Seed::from(1);
        let proxy = match mode {
            "volatile" => Proxy::volatile(HERE, server.address, seed, Wire),
            _ => Proxy::start(HERE, server.address, seed),
        };
        let proxy = Arc::new(proxy.expect("a free port"));
        let client = Client::new(proxy.address(), bugs);
        let mut oracle = Oracle::new(BLOCKS);
        oracle.granted(1).expect("nobody else is there");
        Self {
            server,
            proxy,
            client,
            oracle,
            sequence: 0,
        }
    }

    /// The next block in its writer's order.
    fn next(&mut self) -> (u32, Vec<u8>) {
        self.sequence += 1;
        let block = instrument::stamp::block_of(1, self.sequence, BLOCKS);
        let mut image = vec![0; self.server.store().image.len()];
        stamp(&mut image, 1, self.sequence, BLOCKS);
        let start = usize::try_from(block).expect("8 blocks") * BLOCK_BYTES;
        let content = image.get(start..start + BLOCK_BYTES).expect("8 blocks").to_vec();
        (u32::try_from(block).expect("8 blocks"), content)
    }

    fn write(&mut self, count: u32) -> Outcome {
        for _ in 0..count {
            let (block, content) = self.next();
            self.client.write(block, &content)?;
            crate::ensure!(
                self.client.read(block)? == content,
                "block {block} was read back as something else"
            );
        }
        Ok(())
    }

    fn flush(&mut self) -> Outcome {
        self.client.flush()?;
        self.oracle.acknowledged(1, self.sequence);
        Ok(())
    }

    fn look(&mut self) -> Outcome {
        let image = self.server.store().image.clone();
        Ok(self.oracle.look(&image)?)
    }
}

/// Runs one cell: some work, the fault in the middle of a step, the end of the fault, more work, and a crash.
fn survive(cell: &Cell) -> Outcome {
    let mut scene = Scene::new(cell.value("mode")?, Bugs::default());
    scene.write(10)?;
    scene.flush()?;
    scene.look()?;
    let fault = |direction, fault| scene.proxy.set(direction, fault);
    let (to_server, to_client) = (Direction::ToServer, Direction::ToClient);
    match cell.value("fault")? {
        "reset" => scene.proxy.cut()?,
        "black hole" => fault(to_server, Fault::BlackHole)?,
        "answers lost" => fault(to_client, Fault::BlackHole)?,
        "slow" => fault(
            to_server,
            Fault::Rate {
                bytes_per_second: 200_000,
            },
        )?,
        "late" => {
            let least = Duration::from_millis(1);
            let most = Duration::from_millis(20);
            fault(to_server, Fault::Delay { least, most })?;
            fault(to_client, Fault::Delay { least, most })?;
        }
        "cut in a request" => fault(to_server, Fault::CloseAfter { bytes: 9 })?,
        "cut in an answer" => fault(to_client, Fault::CloseAfter { bytes: 9 })?,
        "wrong request" => fault(to_server, Fault::Corrupt { bytes: 13 })?,
        "wrong answer" => fault(to_client, Fault::Corrupt { bytes: 13 })?,
        "power" => drop(scene.proxy.crash()?),
        other => return Err(format!("nobody knows the fault {other}").into()),
    }
    let proxy = Arc::clone(&scene.proxy);
    let healer = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        let healed = [to_server, to_client].map(|direction| proxy.set(direction, Fault::None));
        healed.iter().all(Result::is_ok)
    });
    match cell.value("step")? {
        "idle" => std::thread::sleep(Duration::from_millis(120)),
        "write" => scene.write(1)?,
        "read" => drop(scene.client.read(3)?),
        "flush" => scene.flush()?,
        other => return Err(format!("nobody knows the step {other}").into()),
    }
    let is_healed = healer.join().map_err(|_| "the healer panicked")?;
    crate::ensure!(is_healed, "the fault could not be ended");
    scene.look()?;
    scene.write(10)?;
    scene.flush()?;
    scene.write(3)?;
    scene.proxy.crash()?;
    scene.look()
}

#[test]
fn a_careful_client_survives_every_fault_in_every_step() {
    let matrix = Matrix::new("block store")
        .axis("mode", &["plain", "volatile"])
        .axis(
            "fault",
            &[
                "reset",
                "black hole",
                "answers lost",
                "slow",
                "late",
                "cut in a request",
                "cut in an answer",
                "wrong request",
                "wrong answer",
                "power",
            ],
        )
        .axis("step", &["idle", "write", "read", "flush"])
        .impossible(
            &[("mode", "plain"), ("fault", "power")],
            "without a volatile cache nothing is forgotten",
        );
    let report = matrix
        .run(Extent::Full, 0, &mut Seed::from(1), survive)
        .expect("the matrix agrees with itself");
    assert!(report.expect_passed().is_ok(), "\n{report}");
}

#[test]
fn a_flush_that_is_not_sent_is_noticed_in_volatile_mode_only() {
    let careless = Bugs {
        drops_flushes: true,
        ..Bugs::default()
    };
    for (mode, bugs, is_noticed) in [
        ("plain", careless, false),
        ("volatile", careless, true),
        ("volatile", Bugs::default(), false),
    ] {
        let mut scene = Scene::new(mode, bugs);
        for _ in 0..10 {
            let (block, content) = scene.next();
            scene.client.write(block, &content).expect("the server answers");
        }
        scene.flush().expect("the server answers");
        scene.proxy.crash().expect("it runs");
        let found = scene.look();
        assert_eq!(found.is_err(), is_noticed, "{mode}, {bugs:?}: {found:?}");
    }
}

#[test]
fn an_old_connection_that_delivers_late_is_noticed_unless_the_client_has_a_fence() {
    let unfenced = Bugs {
        has_no_fence: true,
        ..Bugs::default()
    };
    for (bugs, is_noticed) in [(unfenced, true), (Bugs::default(), false)] {
        let mut scene = Scene::new("plain", bugs);
        scene.write(1).expect("the server answers");
        scene
            .proxy
            .set(Direction::ToServer, Fault::BlackHole)
            .expect("it runs");
        let (block, content) = scene.next();
        scene.client.send_write(block, &content).expect("it is connected");
        wait_for_held(&scene.proxy, BLOCK_BYTES);
        scene.proxy.strand().expect("it runs");
        scene
            .proxy
            .set(Direction::ToServer, Fault::None)
            .expect("it runs");
        // The write is sent again, and then overwritten.
        scene.client.write(block, &content).expect("the server answers");
        scene.write(40).expect("the server answers");
        scene.flush().expect("the server answers");
        scene.look().expect("nothing came late yet");
        assert!(scene.proxy.deliver_late().expect("it runs") > BLOCK_BYTES);
        // The server has read it when the old connection is gone.
        std::thread::sleep(Duration::from_millis(100));
        let found = scene.look();
        assert_eq!(found.is_err(), is_noticed, "{bugs:?}: {found:?}");
    }
}

#[test]
fn a_crash_says_how_many_writes_it_forgot() {
    let mut scene = Scene::new("volatile", Bugs::default());
    for _ in 0..5 {
        let (block, content) = scene.next();
        scene.client.write(block, &content).expect("the server answers");
    }
    assert_eq!(scene.server.store().image, vec![0; 8 * BLOCK_BYTES]);
    assert_eq!(scene.proxy.crash().expect("it runs"), 5);
    scene.flush().expect("the client writes it again");
    scene.look().expect("nothing is lost");
}
