//! What it brings to send memory by several connections, and packed, and what that costs of processors.

use serde_json::{Map, Value, json};

use super::pair::Move;
use super::rows::Subject;
use crate::Outcome;
use crate::bench::count;
use crate::bench::series::Series;

const MIB: f64 = 1_048_576.0;
const GIB: f64 = 1_073_741_824.0;
const MEMORY_MIB: u64 = 1024;
/// What a guest has that goes by a slow link, before it has done its work.
const SMALLER_MIB: u64 = 512;
/// A link of 1 Gb/s.
const LINK_BYTES_PER_S: u64 = 125_000_000;
const WORK: &str = "do=dirty:mib=1,rate_mib_s=1,ms=8000";

impl Subject<'_> {
    /// How fast 1 GiB that is no zeros goes by one stream, two, and so on to twice the cores of this host.
    ///
    /// # Errors
    ///
    /// When a migration fails.
    pub fn streams(self) -> Outcome<Value> {
        let runs = count("RUNS", 5)?;
        let cores = std::thread::available_parallelism()?.get();
        println!("a guest of 1 GiB that is no zeros by several streams, on {cores} cores, {runs} times each");
        let mut report = Map::new();
        for streams in [1, 2, 4, 8, 16] {
            if streams > 2 * cores {
                break;
            }
            let seen = self.by(runs, MEMORY_MIB, &json!({ "streams": streams }), None)?;
            seen.print(&format!("{streams} streams"));
            report.insert(streams.to_string(), seen.report());
        }
        Ok(Value::Object(report))
    }

    /// The same by a slow link and by a fast one, with each kind of compression. Nearly all of each page is zeros, so that is the
    /// most that it can bring.
    ///
    /// # Errors
    ///
    /// When a migration fails.
    pub fn compression(self) -> Outcome<Value> {
        let runs = count("RUNS", 3)?;
        println!("a guest of 512 MiB of which each page has a word, {runs} times each");
        let mut report = Map::new();
        for (link, name) in [(Some(LINK_BYTES_PER_S), "1 Gb/s"), (None, "loopback")] {
            for compression in ["None", "Lz4", "Auto"] {
                let seen = self.by(runs, SMALLER_MIB, &json!({ "compression": compression }), link)?;
                seen.print(&format!("{name}, {compression}"));
                report.insert(format!("{name}, {compression}"), seen.report());
            }
        }
        Ok(Value::Object(report))
    }

    fn by(self, runs: u64, memory_mib: u64, asked: &Value, link_bytes_per_s: Option<u64>) -> Outcome<Ways> {
        let moved = Move {
            program: self.program,
            guest: self.guest,
            memory_mib,
            filled_mib: memory_mib - 32,
            work: WORK.to_owned(),
            link_bytes_per_s,
            asked: asked.clone(),
        };
        let gib = memory_mib as f64 * MIB / GIB;
        let mut ways = Ways::default();
        for _ in 0..runs {
            let seen = moved.run()?;
            ways.total_ms.push(seen.total_ms);
            ways.wire_mib.push(seen.sent_bytes / MIB);
            ways.sender_ms.push(seen.sender_cpu_ms / gib);
            ways.receiver_ms.push(seen.receiver_cpu_ms / gib);
        }
        Ok(ways)
    }
}

/// What was seen of one way; processor time is for each GiB of the guest's memory.
#[derive(Default)]
struct Ways {
    total_ms: Series,
    wire_mib: Series,
    sender_ms: Series,
    receiver_ms: Series,
}

impl Ways {
    fn print(&self, name: &str) {
        println!(
            "  {name:<18}{:>8.0} ms in all, {:>6.0} MiB by the wire; processor time for 1 GiB: {:>5.0} ms at the source, \
             {:>5.0} ms at the target",
            self.total_ms.median(),
            self.wire_mib.median(),
            self.sender_ms.median(),
            self.receiver_ms.median()
        );
    }

    fn report(&self) -> Value {
        json!({
            "total_ms": self.total_ms.report(), "wire_mib": self.wire_mib.report(),
            "source_cpu_ms_per_gib": self.sender_ms.report(), "target_cpu_ms_per_gib": self.receiver_ms.report(),
        })
    }
}
