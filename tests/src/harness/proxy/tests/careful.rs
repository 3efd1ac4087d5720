//! A client that does all that a careful one must keeps its data through every fault, and one that doesn't is found out.

use std::sync::Arc;
use std::time::Duration;

use super::store::{BLOCK_BYTES, Bugs, Client, Server, Wire};
use super::{HERE, wait_for_held};
use crate::Outcome;
use crate::case::Extent;
use crate::harness::matrix::{Cell, Matrix};
use crate::harness::oracle::{Oracle, stamp};
use crate::harness::proxy::{Direction, Fault, Proxy};
use crate::seed::Seed;

const BLOCKS: u64 = 8;

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
        }
        Ok(())
    }

    /// Reads the last block that was written, which must be there whether it is safe or not.
    fn read_back(&mut self) -> Outcome {
        let block = instrument::stamp::block_of(1, self.sequence, BLOCKS);
        let found = self.client.read(u32::try_from(block)?)?;
        let mut image = vec![0; self.server.store().image.len()];
        stamp(&mut image, 1, self.sequence, BLOCKS);
        let start = usize::try_from(block)? * BLOCK_BYTES;
        crate::ensure!(
            image.get(start..start + BLOCK_BYTES) == Some(&found),
            "block {block} was read back as something else than write {}",
            self.sequence
        );
        Ok(())
    }

    /// Sends one more write, and has the network keep it when the connection is gone; the client sends it again.
    fn strand(&mut self) -> Outcome {
        self.proxy.set(Direction::ToServer, Fault::BlackHole)?;
        let (block, content) = self.next();
        self.client.send_write(block, &content)?;
        wait_for_held(&self.proxy, BLOCK_BYTES);
        let stranded = self.proxy.strand()?;
        crate::ensure!(stranded > BLOCK_BYTES, "only {stranded} bytes are stranded");
        self.proxy.set(Direction::ToServer, Fault::None)?;
        Ok(self.client.write(block, &content)?)
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
    scene.read_back()?;
    scene.flush()?;
    scene.look()?;
    scene.write(3)?;
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
        "old connection late" => scene.strand()?,
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
        "read" => scene.read_back()?,
        "flush" => scene.flush()?,
        other => return Err(format!("nobody knows the step {other}").into()),
    }
    let is_healed = healer.join().map_err(|_| "the healer panicked")?;
    crate::ensure!(is_healed, "the fault could not be ended");
    scene.look()?;
    scene.write(10)?;
    scene.proxy.deliver_late()?;
    scene.read_back()?;
    scene.flush()?;
    scene.look()?;
    scene.write(3)?;
    let (mode, forgotten) = (cell.value("mode")?, scene.proxy.crash()?);
    let volatile = if mode == "volatile" { 3 } else { 0 };
    crate::ensure!(forgotten == volatile, "{forgotten} writes were forgotten");
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
                "old connection late",
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
    for (mode, bugs, is_noticed) in [
        ("plain", unfenced, true),
        ("plain", Bugs::default(), false),
        ("volatile", unfenced, true),
        ("volatile", Bugs::default(), false),
    ] {
        let mut scene = Scene::new(mode, bugs);
        scene.write(1).expect("the server answers");
        scene.strand().expect("the server answers");
        // It is overwritten, and safe.
        scene.write(40).expect("the server answers");
        scene.flush().expect("the server answers");
        scene.look().expect("nothing came late yet");
        assert!(scene.proxy.deliver_late().expect("it runs") > BLOCK_BYTES);
        // The server has read it when the old connection is gone.
        std::thread::sleep(Duration::from_millis(100));
        let flushed = scene.client.flush();
        assert!(flushed.is_ok(), "{mode}, {bugs:?}: {flushed:?}");
        let found = scene.look();
        assert_eq!(found.is_err(), is_noticed, "{mode}, {bugs:?}: {found:?}");
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
