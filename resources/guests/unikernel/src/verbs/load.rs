//! `load`: as many requests as a disk answers, and how long each took.

use instrument::cmdline::{ArgumentError, Command};
use instrument::histogram::Histogram;
use instrument::pattern::SECTOR_BYTES;
use instrument::random::Random;
use instrument::time::{Clock, Microseconds};
use instrument::width::{low16, size};

use super::Failure;
use crate::machine::Machine;
use crate::memory::Buffer;
use crate::virtio::blk::{self, Disk, Finished, Lane, QUEUES_MAX, Request, SLOTS_MAX, Setup, Status, kind};
use crate::virtio::{self, feature as ring_feature};
use crate::wait::Wait;
use crate::{cpu, say, smp};

/// What to do, the same for every queue.
#[derive(Clone, Copy, Debug)]
struct Plan {
    kind: u32,
    order: Order,
    block_bytes: u64,
    blocks: u64,
    depth: u16,
    /// Requests between two flushes; 0 for none.
    flush_every: u64,
    seed: u64,
    duration_ticks: u64,
    wait: Wait,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Random,
    Sequential,
}

/// The work of one queue, and of the vCPU that drives it.
struct Worker {
    plan: Plan,
    lane: Lane,
    /// One block for each slot.
    buffer: Buffer,
    random: Random,
    next_block: u64,
    started: [u64; SLOTS_MAX],
    latency: Histogram,
    /// Requests since the last flush.
    unflushed: u64,
    flushes: u64,
    errors: u64,
    last_ticks: u64,
    outcome: Result<(), virtio::Error>,
}

const SECTOR: u64 = SECTOR_BYTES as u64;
const MIB: u64 = 1 << 20;
const BLOCK_BYTES_MAX: u64 = 4 * MIB;
const KEYS: [&str; 13] = [
    "dev",
    "mode",
    "bs",
    "depth",
    "seconds",
    "ms",
    "queues",
    "wait",
    "span_mib",
    "flush_every",
    "indirect",
    "event_idx",
    "seed",
];

/// Loads a disk for a time and prints one line.
pub fn load(machine: &mut Machine, command: &Command<'static>) -> Result<(), Failure> {
    command.allow(&KEYS)?;
    let clock = machine.clock()?;
    let wait = machine.wait(command)?;
    let queues = low16(command.within("queues", 1, 1..=QUEUES_MAX as u64, "1 to 8")?);
    let mut disk = machine.disk(setup(command, queues)?)?;
    if !disk.has(blk::feature::FLUSH) {
        return Err(Failure::Unsuitable(
            "the device does not offer FLUSH: what it would show is not comparable",
        ));
    }
    wait.prepare(&disk.transport, usize::from(queues))?;
    let plan = plan(command, &mut disk, clock, wait)?;
    let mut workers = [const { None }; QUEUES_MAX];
    for (number, (worker, lane)) in (0u64..).zip(workers.iter_mut().zip(&mut disk.lanes)) {
        if let Some(lane) = lane.take() {
            let mut buffer = machine
                .memory
                .allocate(size(u64::from(plan.depth) * plan.block_bytes))?;
            fill(&mut buffer, plan.seed.wrapping_add(number));
            *worker = Some(machine.memory.hold(Worker::new(plan, lane, buffer, number))?);
        }
    }
    let interrupts_before = wait.interrupts(&disk.transport);
    let start = cpu::ticks();
    let workers = workers.get_mut(..usize::from(queues)).unwrap_or_default();
    smp::each(workers, clock, |worker| {
        if let Some(worker) = worker {
            worker.run();
        }
    })?;
    let interrupts = wait.interrupts(&disk.transport) - interrupts_before;
    let mut total = machine.memory.hold(Totals::default())?;
    for (worker, lane) in workers.iter_mut().zip(&mut disk.lanes) {
        if let Some(worker) = worker.take() {
            total.add(&worker, start)?;
            *lane = Some(worker.into_inner().lane);
        }
    }
    machine.keep(disk);
    total.print(command, &plan, clock, interrupts);
    Ok(())
}

/// How the device is to be set up.
fn setup(command: &Command<'static>, queues: u16) -> Result<Setup, Failure> {
    let indirect = if command.switch("indirect", true)? {
        ring_feature::INDIRECT
    } else {
        0
    };
    let event_idx = if command.switch("event_idx", true)? {
        ring_feature::EVENT_IDX
    } else {
        0
    };
    Ok(Setup {
        index: command.number("dev", 0)?,
        ring_features: indirect | event_idx,
        queues,
    })
}

/// What the arguments ask for, as far as the disk allows it.
fn plan(command: &Command<'static>, disk: &mut Disk, clock: Clock, wait: Wait) -> Result<Plan, Failure> {
    let (kind, order) = match command.text("mode") {
        None | Some("randread") => (kind::READ, Order::Random),
        Some("randwrite") => (kind::WRITE, Order::Random),
        Some("seqread") => (kind::READ, Order::Sequential),
        Some("seqwrite") => (kind::WRITE, Order::Sequential),
        Some(value) => {
            let choices = "randread, randwrite, seqread, seqwrite";
            return Err(ArgumentError::Impossible {
                key: "mode",
                value,
                choices,
            }
            .into());
        }
    };
    let block_bytes = command.within("bs", 4096, SECTOR..=BLOCK_BYTES_MAX, "512 to 4194304")?;
    if block_bytes % SECTOR != 0 {
        return Err(Failure::Unsuitable("bs is no multiple of 512"));
    }
    let span_sectors = match command.number("span_mib", 0)? {
        0 => disk.capacity_sectors,
        mib => disk.capacity_sectors.min(mib.saturating_mul(MIB / SECTOR)),
    };
    let blocks = span_sectors / (block_bytes / SECTOR);
    if blocks == 0 {
        return Err(Failure::Unsuitable("the disk is smaller than one block"));
    }
    let slots = u64::from(disk.lane()?.queue.slots());
    let depth = low16(command.within("depth", slots.min(32), 1..=slots, "1 to what the queue holds")?);
    let milliseconds = command.number("seconds", 5)?.saturating_mul(1000);
    let duration_ticks = clock.ticks(command.number("ms", milliseconds)?);
    Ok(Plan {
        kind,
        order,
        block_bytes,
        blocks,
        depth,
        flush_every: command.number("flush_every", 0)?,
        seed: command.number("seed", 1)?,
        duration_ticks,
        wait,
    })
}

/// Random data, so that no device can take a shortcut for zeroes.
fn fill(buffer: &mut Buffer, seed: u64) {
    let mut random = Random::new(seed);
    let words = buffer.bytes_mut().len() / 8;
    buffer
        .words_mut(0, words)
        .iter_mut()
        .for_each(|word| *word = random.next());
}

impl Worker {
    fn new(plan: Plan, lane: Lane, buffer: Buffer, number: u64) -> Self {
        Self {
            plan,
            lane,
            buffer,
            random: Random::new(plan.seed ^ number << 32),
            // Sequential workers start at different places of the span.
            next_block: plan.blocks / QUEUES_MAX as u64 * number,
            started: [0; SLOTS_MAX],
            latency: Histogram::new(),
            unflushed: 0,
            flushes: 0,
            errors: 0,
            last_ticks: 0,
            outcome: Ok(()),
        }
    }

    /// Keeps the queue full until the time is over, then empties it.
    fn run(&mut self) {
        self.outcome = self.cycle();
    }

    fn cycle(&mut self) -> Result<(), virtio::Error> {
        let mut now = cpu::ticks();
        let end = now.saturating_add(self.plan.duration_ticks);
        for slot in 0..self.plan.depth {
            self.submit(slot, now);
        }
        self.lane.queue.kick();
        let mut progress = now;
        while self.lane.in_flight() > 0 {
            let mut moved = false;
            while let Some(finished) = self.lane.poll()? {
                now = cpu::ticks();
                moved = true;
                self.account(finished, now);
                if now < end {
                    self.submit(finished.slot, now);
                }
            }
            if moved {
                self.lane.queue.kick();
                progress = now;
            } else {
                self.plan.wait.pause(&mut self.lane.queue, progress)?;
            }
        }
        self.last_ticks = now;
        Ok(())
    }

    fn submit(&mut self, slot: u16, now: u64) {
        if let Some(started) = self.started.get_mut(usize::from(slot)) {
            *started = now;
        }
        if self.plan.flush_every > 0 && self.unflushed >= self.plan.flush_every {
            self.unflushed = 0;
            self.flushes += 1;
            return self.lane.submit(
                slot,
                &Request {
                    kind: kind::FLUSH,
                    sector: 0,
                    data: None,
                },
            );
        }
        self.unflushed += 1;
        let block = match self.plan.order {
            Order::Random => self.random.below(self.plan.blocks),
            Order::Sequential => {
                let block = self.next_block;
                self.next_block = if block + 1 < self.plan.blocks {
                    block + 1
                } else {
                    0
                };
                block
            }
        };
        let address = self.buffer.address() + u64::from(slot) * self.plan.block_bytes;
        let data = blk::data(address, self.plan.block_bytes, self.plan.kind == kind::READ);
        let sector = block * (self.plan.block_bytes / SECTOR);
        self.lane.submit(
            slot,
            &Request {
                kind: self.plan.kind,
                sector,
                data: Some(data),
            },
        );
    }

    fn account(&mut self, finished: Finished, now: u64) {
        let started = self
            .started
            .get(usize::from(finished.slot))
            .copied()
            .unwrap_or(now);
        self.latency.record(now.saturating_sub(started));
        self.errors += u64::from(finished.status != Status::OK);
    }
}

/// What all queues did together.
#[derive(Default)]
struct Totals {
    latency: Histogram,
    flushes: u64,
    errors: u64,
    /// From the common start to the last answer of any queue.
    ticks: u64,
}

impl Totals {
    fn add(&mut self, worker: &Worker, start: u64) -> Result<(), virtio::Error> {
        worker.outcome?;
        self.latency.add(&worker.latency);
        self.flushes += worker.flushes;
        self.errors += worker.errors;
        self.ticks = self.ticks.max(worker.last_ticks.saturating_sub(start));
        Ok(())
    }

    fn print(&self, command: &Command<'static>, plan: &Plan, clock: Clock, interrupts: u64) {
        let requests = self.latency.count();
        let nanoseconds = u128::from(clock.nanoseconds(self.ticks)).max(1);
        let per_second = |amount: u128| amount * 1_000_000_000 / nanoseconds;
        let bytes = u128::from(requests - self.flushes) * u128::from(plan.block_bytes);
        let microseconds = |ticks: u64| Microseconds(clock.nanoseconds(ticks));
        say!(
            "load: mode={} bs={} depth={} iops={} mb_per_s={} lat_us_p50={} lat_us_p90={} lat_us_p99={} lat_us_p999={} \
             lat_us_max={} lat_us_min={} requests={requests} flushes={} errors={} irqs={interrupts} ms={} tsc_khz={}\n",
            command.text("mode").unwrap_or("randread"),
            plan.block_bytes,
            plan.depth,
            per_second(u128::from(requests)),
            per_second(bytes) / 1_000_000,
            microseconds(self.latency.percentile(500)),
            microseconds(self.latency.percentile(900)),
            microseconds(self.latency.percentile(990)),
            microseconds(self.latency.percentile(999)),
            microseconds(self.latency.max()),
            microseconds(self.latency.min()),
            self.flushes,
            self.errors,
            nanoseconds / 1_000_000,
            clock.khz()
        );
    }
}
