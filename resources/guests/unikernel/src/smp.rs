//! The other vCPUs: started when they are first needed, then idle until there is work.

#![expect(
    unsafe_code,
    reason = "copies the real-mode code that vCPUs start in, and passes work by address"
)]

use core::fmt;
use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use instrument::time::Clock;
use instrument::width::{low8, size};

use crate::tables::CPUS_MAX;
use crate::{cpu, interrupts, tables};

/// What other vCPUs fail to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// It did not come up.
    Absent {
        /// Its number.
        index: usize,
    },
    /// There can't be so many.
    TooMany {
        /// What was asked for.
        count: usize,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent { index } => write!(out, "vCPU {index} did not start within {START_MS_MAX} ms"),
            Self::TooMany { count } => write!(out, "{count} vCPUs are more than {CPUS_MAX}"),
        }
    }
}

/// What a vCPU is to do: 0 or the address of a [`Job`].
struct Mailbox {
    job: AtomicU64,
    /// Whether it is up.
    up: AtomicBool,
}

/// A piece of work for one vCPU.
struct Job {
    call: unsafe fn(usize, usize),
    work: usize,
    item: usize,
}

static MAILBOXES: [Mailbox; CPUS_MAX] = [const {
    Mailbox {
        job: AtomicU64::new(0),
        up: AtomicBool::new(false),
    }
}; CPUS_MAX];
/// The number of the vCPU that is being started.
static STARTING: AtomicUsize = AtomicUsize::new(0);

/// A page below 1 MiB that monitors leave alone once the guest runs.
const TRAMPOLINE_PAGE: u8 = 0x50;
const START_MS_MAX: u64 = 2000;
/// A startup that had no effect is sent again after this much: the vCPU's thread may not have waited for it yet.
const STARTUP_MS: u64 = 20;

unsafe extern "C" {
    static trampoline_start: u8;
    static trampoline_end: u8;
    static mut boot_task: u16;
    static mut boot_frame: [u64; 5];
}

/// Has vCPU n do `work` on item n, this one being vCPU 0, and returns when all have. Local APIC identifiers are the
/// numbers of the vCPUs.
pub fn each<T: Send>(items: &mut [T], clock: Clock, work: fn(&mut T)) -> Result<(), Error> {
    let Some((own, others)) = items.split_first_mut() else {
        return Ok(());
    };
    if others.len() >= CPUS_MAX {
        return Err(Error::TooMany {
            count: others.len() + 1,
        });
    }
    for index in 1..=others.len() {
        start(index, clock)?;
    }
    let mut jobs = [const { None }; CPUS_MAX];
    for ((index, item), job) in (1..).zip(others).zip(&mut jobs) {
        let job = job.insert(Job {
            call: call::<T>,
            work: work as *const () as usize,
            item: ptr::from_mut(item).expose_provenance(),
        });
        mailbox(index)
            .job
            .store(ptr::from_ref(job).expose_provenance() as u64, Ordering::Release);
        interrupts::wake(low8(index as u64));
    }
    work(own);
    for mailbox in MAILBOXES.iter().skip(1) {
        while mailbox.job.load(Ordering::Acquire) != 0 {
            cpu::relax();
        }
    }
    Ok(())
}

/// # Safety
///
/// `work` is a `fn(&mut T)` and `item` an exclusive `T`, both exposed by [`each`].
unsafe fn call<T>(work: usize, item: usize) {
    // SAFETY: the caller's promise.
    let work = unsafe { core::mem::transmute::<usize, fn(&mut T)>(work) };
    // SAFETY: the caller's promise: `each` does not touch the item before the mailbox is empty again.
    work(unsafe { &mut *ptr::with_exposed_provenance_mut(item) });
}

/// Starts a vCPU that is not up.
fn start(index: usize, clock: Clock) -> Result<(), Error> {
    if mailbox(index).up.load(Ordering::Acquire) {
        return Ok(());
    }
    interrupts::enable(0);
    prepare_start(index);
    let apic_id = low8(index as u64);
    interrupts::send_init(apic_id);
    let begin = cpu::ticks();
    while cpu::ticks() - begin < clock.ticks(START_MS_MAX) {
        interrupts::send_startup(apic_id, TRAMPOLINE_PAGE);
        let sent = cpu::ticks();
        while cpu::ticks() - sent < clock.ticks(STARTUP_MS) {
            if mailbox(index).up.load(Ordering::Acquire) {
                return Ok(());
            }
            cpu::relax();
        }
    }
    Err(Error::Absent { index })
}

/// Puts everything where the starting vCPU will look for it.
fn prepare_start(index: usize) {
    tables::prepare_cpu(index);
    let (selector, stack_top) = tables::describe_cpu(index);
    let begin = &raw const trampoline_start;
    let bytes = (&raw const trampoline_end).addr() - begin.addr();
    let page = (usize::from(TRAMPOLINE_PAGE) << 12) as *mut u8;
    // SAFETY: the page is RAM that nobody uses after the monitor has started the guest, and longer than the code.
    unsafe { ptr::copy_nonoverlapping(begin, page, bytes) };
    let task = &raw mut boot_task;
    // SAFETY: the entry code reads it, of the one vCPU that is being started.
    unsafe { task.write_volatile(selector) };
    let frame = (&raw mut boot_frame).cast::<u64>();
    // SAFETY: as above; the frame's first word is RIP.
    unsafe { frame.write_volatile(other_start as *const () as u64) };
    // SAFETY: as above; the fourth word is RSP, off by eight as after a call.
    unsafe { frame.wrapping_add(3).write_volatile(stack_top - 8) };
    STARTING.store(index, Ordering::Release);
}

/// Where another vCPU comes to CPL 3.
extern "C" fn other_start() -> ! {
    let index = STARTING.load(Ordering::Acquire);
    interrupts::enable(index);
    let mailbox = mailbox(index);
    mailbox.up.store(true, Ordering::Release);
    loop {
        let address = mailbox.job.load(Ordering::Acquire);
        if address == 0 {
            cpu::idle_while(&mailbox.job, 0);
            continue;
        }
        // SAFETY: `each` stored the address of a job that it keeps until the mailbox is empty.
        let job = unsafe { &*ptr::with_exposed_provenance::<Job>(size(address)) };
        // SAFETY: `each` made the job of a function and an item that belong together.
        unsafe { (job.call)(job.work, job.item) };
        mailbox.job.store(0, Ordering::Release);
    }
}

fn mailbox(index: usize) -> &'static Mailbox {
    MAILBOXES.get(index).expect("`each` bounds the number of vCPUs")
}
