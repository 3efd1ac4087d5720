//! What is measured of migrations. Each figure stands beside what was asked of it.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::link;
use super::pair::{Move, Seen};
use super::peer::{self, Cover};
use crate::Outcome;
use crate::bench::api::Program;
use crate::bench::count;
use crate::bench::series::Series;

/// What is measured, and with which guest.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// The monitor.
    pub program: &'a Program,
    /// The unikernel.
    pub guest: &'a Path,
}

const MIB: f64 = 1_048_576.0;
const GIB: f64 = 1_073_741_824.0;

impl<'a> Subject<'a> {
    /// A guest that has written nearly all of its memory, and then does `work`.
    fn full(self, memory_mib: u64, work: &str) -> Move<'a> {
        Move {
            program: self.program,
            guest: self.guest,
            memory_mib,
            filled_mib: memory_mib - 32,
            work: work.to_owned(),
            link_bytes_per_s: None,
            asked: json!({}),
        }
    }

    /// The longest time in which an idle guest of 512 MiB does not run, and what was predicted of it.
    ///
    /// # Errors
    ///
    /// When a migration fails.
    pub fn idle(self) -> Outcome<Value> {
        let runs = count("RUNS", 20)?;
        println!("an idle guest of 512 MiB, {runs} times");
        let moved = self.full(512, "do=dirty:mib=1,rate_mib_s=1,ms=2500");
        let (mut gap, mut off) = (Series::default(), Series::default());
        for _ in 0..runs {
            let seen = moved.run()?;
            gap.push(seen.gap_ms);
            off.push((seen.predicted_ms - seen.gap_ms).abs());
        }
        let longest = at_most("its longest gap, 99 %", gap.percentile(99.0), 25.0, "ms");
        println!("  median {:.2} ms", gap.median());
        let predicted = at_most("predicted and seen, apart, median", off.median(), 5.0, "ms");
        Ok(json!({ "gap_p99_ms": longest, "predicted_off_ms": predicted, "gap_ms": gap.report() }))
    }

    /// The same of a guest that writes half as fast as the link is, and of one that writes four times as fast.
    ///
    /// # Errors
    ///
    /// When a migration fails.
    pub fn busy(self) -> Outcome<Value> {
        let runs = count("RUNS", 5)?;
        println!("a link of 100 MB/s, {runs} times");
        let half = Move {
            link_bytes_per_s: Some(100_000_000),
            ..self.full(128, "do=dirty:mib=32,rate_mib_s=48,ms=6000")
        };
        let (mut gap, mut off) = (Series::default(), Series::default());
        for _ in 0..runs {
            let seen = half.run()?;
            gap.push(seen.gap_ms);
            off.push((seen.predicted_ms - seen.gap_ms).abs());
        }
        let longest = at_most(
            "gap of a guest that writes 48 MiB/s, the longest",
            gap.highest(),
            60.0,
            "ms",
        );
        let predicted = at_most("predicted and seen, apart, median", off.median(), 12.0, "ms");
        let fast = Move {
            link_bytes_per_s: Some(100_000_000),
            ..self.full(256, "do=dirty:mib=32,rate_mib_s=400,ms=15000")
        };
        let seen = fast.run()?;
        let of_link = seen.total_ms / (256.0 * MIB / 100e6 * 1e3);
        let total = at_most(
            "256 MiB, of which 32 are written at 400 MiB/s, of the link's time",
            of_link,
            2.0,
            "x",
        );
        println!("  its gap {:.2} ms", seen.gap_ms);
        Ok(json!({
            "half_gap_ms": longest, "half_predicted_off_ms": predicted, "half_gap_ms_runs": gap.report(),
            "four_times_of_link": total, "four_times_gap_ms": seen.gap_ms,
        }))
    }

    /// How long a guest takes, of the time that the link takes for its memory, that writes four times as fast as the link is, and
    /// half of its memory: it goes on at the target before that is there.
    ///
    /// # Errors
    ///
    /// When a migration fails.
    pub fn postcopy(self) -> Outcome<Value> {
        let runs = count("RUNS", 3)?;
        println!("a link of 100 MB/s, a guest that may go on before its memory is there, {runs} times");
        let moved = Move {
            link_bytes_per_s: Some(100_000_000),
            asked: json!({ "allow_postcopy": true }),
            ..self.full(256, "do=dirty:mib=128,rate_mib_s=400,ms=20000")
        };
        let (mut total, mut gap) = (Series::default(), Series::default());
        for _ in 0..runs {
            let seen = moved.run()?;
            total.push(seen.total_ms / (256.0 * MIB / 100e6 * 1e3));
            gap.push(seen.gap_ms);
        }
        let of_link = at_most(
            "dirty rate 4x the link: auto with post-copy finishes in, of the link's time",
            total.highest(),
            2.0,
            "x",
        );
        println!("  its gap, median {:.2} ms", gap.median());
        Ok(json!({ "of_link": of_link, "of_link_runs": total.report(), "gap_ms": gap.report() }))
    }

    /// How long a guest of 256 MiB takes that writes 8 MiB again and again, beside QEMU.
    ///
    /// # Errors
    ///
    /// When a migration fails.
    pub fn total(self) -> Outcome<Value> {
        let runs = count("RUNS", 7)?;
        println!("a guest of 256 MiB that writes 8 MiB again and again, {runs} times in turn");
        let words = "do=dirty:mib=8,ms=3000";
        let ours = Move {
            filled_mib: 0,
            ..self.full(256, words)
        };
        let [mut total, mut gap, mut bare, mut bare_gap, mut tls] = [(); 5].map(|()| Series::default());
        for _ in 0..runs {
            let seen = ours.run()?;
            total.push(seen.total_ms);
            gap.push(seen.gap_ms);
            let (theirs, theirs_gap) = peer::moved(self.guest, 256, words, Cover::None)?;
            bare.push(theirs);
            bare_gap.push(theirs_gap);
            tls.push(peer::moved(self.guest, 256, words, Cover::Tls)?.0);
        }
        let figure = at_most(
            "in all, by TLS; asked is QEMU's without",
            total.median(),
            bare.median(),
            "ms",
        );
        println!(
            "  gap {:.2} ms; QEMU's downtime {:.2} ms, its time with TLS {:.2} ms",
            gap.median(),
            bare_gap.median(),
            tls.median()
        );
        Ok(json!({
            "total_ms": figure, "gap_ms": gap.report(), "qemu_ms": bare.report(), "qemu_tls_ms": tls.report(),
        }))
    }

    /// How fast one connection carries 1 GiB that is no zeros, beside what it could at best, and beside QEMU's.
    ///
    /// # Errors
    ///
    /// When a migration fails.
    pub fn throughput(self) -> Outcome<Value> {
        let runs = count("RUNS", 5)?;
        println!("a guest of 1 GiB that is no zeros, {runs} times in turn");
        let words = "do=dirty:mib=1,rate_mib_s=1,ms=8000";
        let ours = self.full(1024, words);
        let [
            mut speed,
            mut cipher,
            mut loopback,
            mut theirs,
            mut sender,
            mut receiver,
        ] = [(); 6].map(|()| Series::default());
        for _ in 0..runs {
            cipher.push(link::cipher_bytes_per_s(Duration::from_secs(1))? / MIB);
            loopback.push(link::loopback_bytes_per_s()? / MIB);
            let seen: Seen = ours.run()?;
            speed.push(seen.bytes_per_s / MIB);
            sender.push(seen.sender_cpu_ms * GIB / seen.sent_bytes);
            receiver.push(seen.receiver_cpu_ms * GIB / seen.sent_bytes);
            let filling = format!("do=dirty:mib=992,seconds=3600,rate_mib_s=1 {words}");
            let (ms, _) = peer::moved(self.guest, 1024, &filling, Cover::Tls)?;
            theirs.push(992.0 / ms * 1e3);
        }
        let best = 1.0 / (1.0 / cipher.median() + 1.0 / loopback.median());
        println!(
            "  AES-128-GCM {:.0} MiB/s, TCP on loopback {:.0} MiB/s, one after the other {best:.0} MiB/s",
            cipher.median(),
            loopback.median()
        );
        let of_best = at_least("one connection, of that", speed.median() / best, 0.75, "x");
        let of_qemu = at_least(
            "the same, of QEMU's with TLS",
            speed.median() / theirs.median(),
            2.0,
            "x",
        );
        println!(
            "  {:.0} MiB/s; processor time for 1 GiB: {:.0} ms at the source, {:.0} ms at the target",
            speed.median(),
            sender.median(),
            receiver.median()
        );
        Ok(json!({
            "of_best": of_best, "of_qemu": of_qemu, "mib_per_s": speed.report(), "cipher_mib_per_s": cipher.report(),
            "loopback_mib_per_s": loopback.report(), "qemu_tls_mib_per_s": theirs.report(),
            "source_cpu_ms_per_gib": sender.report(), "target_cpu_ms_per_gib": receiver.report(),
        }))
    }
}

fn at_most(name: &str, figure: f64, asked: f64, unit: &str) -> Value {
    row(name, figure, ("at most", asked), unit, figure <= asked)
}

fn at_least(name: &str, figure: f64, asked: f64, unit: &str) -> Value {
    row(name, figure, ("at least", asked), unit, figure >= asked)
}

/// A figure, and whether it is what was asked: printed, and for the report.
fn row(name: &str, figure: f64, (bound, asked): (&str, f64), unit: &str, is_met: bool) -> Value {
    let verdict = if is_met { "" } else { "  MISSED" };
    println!("  {name:<66}{figure:>10.2} {unit:<3} asked: {bound} {asked:.2}{verdict}");
    json!({ "figure": figure, "asked": asked, "unit": unit, "is_met": is_met })
}
