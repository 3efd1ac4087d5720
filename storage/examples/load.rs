//! Loads an image without a guest, and says how fast it was and what it cost: the benchmarks compare that with what other
//! programs make of the same image.
//!
//! `load IMAGE read|write|idle BLOCK_BYTES DEPTH MILLISECONDS`: keeps so many requests in flight, one block after the other
//! from the start of the image and from its start again at its end, as `qemu-img bench` does; `idle` keeps none. One line says
//! requests, errors, time, and the CPU time of this process (user + system) between the first request and the last answer.
#![expect(
    unsafe_code,
    reason = "requests carry the address of their memory, and getrusage is C's"
)]
#![expect(clippy::print_stdout, reason = "the line is what the program is for")]

use std::error::Error;
use std::process::ExitCode;
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use coracle_storage::backend::{Access, Backend, Parting, Step};
use coracle_storage::engine::{Engine, PreparedReactor};
use coracle_storage::lease::{Lock, Owner, Terms};
use coracle_storage::open::open;
use coracle_storage::reactor::{Patience, Reactor, Wake};
use coracle_storage::request::{Completion, Durability, Operation, Request, Segment};

/// What to do.
struct Plan {
    path: String,
    /// Nothing to be idle.
    operation: Option<Operation>,
    block_bytes: u64,
    depth: u64,
    duration: Duration,
}

/// An image under load.
struct Load {
    image: Box<dyn Backend>,
    io: Box<dyn Reactor>,
    plan: Plan,
    blocks: u64,
    /// One block for each request in flight; a request's tag is its index.
    memory: Vec<Vec<u8>>,
    next_block: u64,
    requests: u64,
    errors: u64,
    /// Requests that may be started now.
    idle: Vec<Request>,
}

/// Room for the operations of a deep queue.
const OPS_MAX: u32 = 512;
/// How long an image may take to leave in good order.
const PARTING_MAX: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    let Some(plan) = Plan::read() else {
        eprintln!("usage: load IMAGE read|write|idle BLOCK_BYTES DEPTH MILLISECONDS");
        return ExitCode::from(2);
    };
    match run(plan) {
        Ok(line) => {
            println!("{line}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            let causes = std::iter::successors(error.source(), |&cause| cause.source());
            let causes: String = causes.map(|cause| format!(": {cause}")).collect();
            eprintln!("load: {error}{causes}");
            ExitCode::FAILURE
        }
    }
}

impl Plan {
    fn read() -> Option<Self> {
        let mut words = std::env::args().skip(1);
        let path = words.next()?;
        let operation = match words.next()?.as_str() {
            "read" => Some(Operation::Read),
            "write" => Some(Operation::Write),
            "idle" => None,
            _ => return None,
        };
        let mut number = || words.next()?.parse::<u64>().ok().filter(|number| *number > 0);
        Some(Self {
            path,
            operation,
            block_bytes: number()?,
            depth: number()?,
            duration: Duration::from_millis(number()?),
        })
    }
}

fn run(plan: Plan) -> Result<String, Box<dyn Error>> {
    let owner = Owner::of_this_process("load");
    let (access, lock) = match plan.operation {
        Some(Operation::Write) => (Access::ReadWrite, Lock::Exclusive),
        _ => (Access::ReadOnly, Lock::None),
    };
    let opened = open(&plan.path, access, &Terms::new(lock, &owner))?;
    let reach = opened.backend.reach();
    let mut io = PreparedReactor::new(Engine::Async, OPS_MAX, reach).enable()?;
    io.register(&opened.backend.files())?;
    let mut load = Load::new(opened.backend, io, plan)?;
    load.image.attach(load.io.as_mut());
    let (start, cpu_start) = (Instant::now(), cpu_time());
    load.run(start)?;
    let (took, cpu) = (start.elapsed(), cpu_time().saturating_sub(cpu_start));
    load.leave()?;
    Ok(load.line(took, cpu))
}

impl Load {
    fn new(image: Box<dyn Backend>, io: Box<dyn Reactor>, plan: Plan) -> Result<Self, Box<dyn Error>> {
        let blocks = image.geometry().size_bytes / plan.block_bytes;
        if blocks == 0 {
            return Err("the image is smaller than one block".into());
        }
        let block = usize::try_from(plan.block_bytes)?;
        let depth = plan.operation.map_or(0, |_| plan.depth);
        // Not zeroes, for which some storage has a short cut.
        let memory: Vec<Vec<u8>> = (0..depth).map(|_| vec![0xa5; block]).collect();
        let request = |tag| Request {
            tag,
            operation: plan.operation.unwrap_or(Operation::Read),
            offset_bytes: 0,
            len_bytes: plan.block_bytes,
            durability: Durability::Cached,
            segments: vec![],
        };
        Ok(Self {
            idle: (0..depth).map(request).collect(),
            image,
            io,
            blocks,
            memory,
            next_block: 0,
            requests: 0,
            errors: 0,
            plan,
        })
    }

    /// Keeps the depth for the time, and then waits for the last answer.
    fn run(&mut self, start: Instant) -> Result<(), Box<dyn Error>> {
        let end = start + self.plan.duration;
        let mut wakes = Vec::new();
        loop {
            let now = Instant::now();
            self.image.wake(self.io.as_mut());
            self.collect();
            if now < end {
                self.start()?;
            } else if self.image.in_flight() == 0 {
                return Ok(());
            }
            self.wait(Some(end).filter(|end| now < *end), &mut wakes)?;
        }
    }

    /// Starts every request that may be.
    fn start(&mut self) -> Result<(), Box<dyn Error>> {
        while let Some(mut request) = self.idle.pop() {
            let memory = self.memory.get_mut(usize::try_from(request.tag)?);
            let memory = memory.ok_or("a tag came back that was never given")?;
            let place = NonNull::new(memory.as_mut_ptr()).ok_or("a block is somewhere")?;
            request.segments.clear();
            // SAFETY: the memory is the load's, which outlives the request and leaves it in place.
            let segment = unsafe { Segment::new(place, memory.len()) };
            request.segments.push(segment);
            request.offset_bytes = self.next_block * self.plan.block_bytes;
            match self.image.start(request, self.io.as_mut()) {
                Step::Pending => {}
                Step::Done(completion) => self.take(completion),
                Step::Busy(request) => {
                    self.idle.push(request);
                    return Ok(());
                }
            }
            self.next_block = (self.next_block + 1) % self.blocks;
            self.collect();
        }
        Ok(())
    }

    fn wait(&mut self, end: Option<Instant>, wakes: &mut Vec<Wake>) -> Result<(), Box<dyn Error>> {
        self.image.before_wait(self.io.as_mut());
        let alarm = self.image.alarm();
        self.io.set_timer(alarm.into_iter().chain(end).min());
        self.io.wait(Patience::UntilEvent, wakes)?;
        for wake in wakes.drain(..) {
            if let Wake::Done(event) = wake
                && let Step::Done(completion) = self.image.resume(event, self.io.as_mut())
            {
                self.take(completion);
            }
            self.collect();
        }
        Ok(())
    }

    fn collect(&mut self) {
        while let Some(completion) = self.image.next_completion() {
            self.take(completion);
        }
    }

    fn take(&mut self, completion: Completion) {
        self.requests += 1;
        self.errors += u64::from(completion.outcome.is_err());
        self.idle.push(completion.request);
    }

    /// Leaves the image in good order, so that the next one finds it free.
    fn leave(&mut self) -> Result<(), Box<dyn Error>> {
        self.image.detach(Parting::Ends, self.io.as_mut());
        let (deadline, mut wakes) = (Instant::now() + PARTING_MAX, Vec::new());
        while self.image.is_attached() {
            if Instant::now() > deadline {
                return Err("the image does not leave".into());
            }
            self.wait(Some(deadline), &mut wakes)?;
            self.image.wake(self.io.as_mut());
        }
        Ok(())
    }

    fn line(&self, took: Duration, cpu: Duration) -> String {
        format!(
            "load: requests={} errors={} us={} cpu_us={}",
            self.requests,
            self.errors,
            took.as_micros(),
            cpu.as_micros()
        )
    }
}

/// What this process has used of the processors so far, with the workers that the kernel lends its ring.
fn cpu_time() -> Duration {
    // SAFETY: zeros are a `rusage`.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: it writes one `rusage`, which is there.
    unsafe { libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) };
    let time = |time: libc::timeval| {
        let whole = Duration::from_secs(u64::try_from(time.tv_sec).unwrap_or(0));
        whole + Duration::from_micros(u64::try_from(time.tv_usec).unwrap_or(0))
    };
    time(usage.ru_utime) + time(usage.ru_stime)
}
