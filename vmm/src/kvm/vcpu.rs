//! One thread per vCPU: it owns the vCPU's descriptor and is the only one that runs ioctls on it.
//!
//! ```text
//!           Run(turn)              kick
//!   parked ───────────► running ─────────────────► parked, which tells the turn
//!   │ │                    └── the guest ends: announced, then parked for good
//!   │ └── Save: its state, still parked
//!   └── Finish: the thread ends
//! ```
//!
//! A kick says up to which turn the vCPU shall leave, and then sends a real-time signal whose handler
//! sets `immediate_exit` in the shared `kvm_run` page. A signal that comes between two KVM_RUN calls is
//! therefore never lost, one that nobody kicked with only has the vCPU look at its [`Share`] of the time,
//! and a vCPU that leaves KVM_RUN by a kick has completed the port or MMIO access that it was in. Turns
//! are counted so that the late answer to a pause that was given up is not taken for the answer to the next.
#![expect(
    unsafe_code,
    reason = "the kick handler writes the kvm_run page; an exit's details are a C union"
)]

use std::cell::Cell;
use std::io;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, compiler_fence};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use coracle_devices::bus::Bus;
use coracle_devices::power::EndSignal;
use coracle_storage::threads::{self, Thread};
use kvm_bindings::{
    KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES, kvm_run,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use rustix::event::{Timespec, poll};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::share::Share;
use super::state::{CpuidEntryState, StateError, StateShape, VcpuState};
use crate::arch::x86_64::cpuid::{Cpuid, CpuidError};
use crate::end::{End, Ending};
use crate::memory::mapped::Mapping;
use crate::signals;

/// A parked vCPU answers within this, or something is badly wrong on the host.
pub const ACKNOWLEDGE_MS_MAX: u64 = 5_000;
/// Offset of the kick signal from SIGRTMIN.
const KICK_SIGNAL_OFFSET: i32 = 0;
/// How long a vCPU rests at once: a guest that is slow is still better than one that stands still for long.
const REST_MAX: Duration = Duration::from_millis(50);
/// How much rest it may owe: a host that was very busy is not made up for.
const OWED_MAX: Duration = Duration::from_secs(1);
/// How long a vCPU that rests does not look whether it is wanted.
const REST_PIECE: Duration = Duration::from_millis(1);
/// The stack of a vCPU thread: its deepest path is a register access that resets a device.
const STACK_BYTES: usize = 128 << 10;

thread_local! {
    /// `immediate_exit` of the vCPU that this thread runs; null on every other thread.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

/// What a vCPU has done since it was made.
#[derive(Debug, Default)]
pub struct VcpuCounters {
    /// Port reads.
    pub exit_io_in: AtomicU64,
    /// Port writes.
    pub exit_io_out: AtomicU64,
    /// MMIO reads.
    pub exit_mmio_read: AtomicU64,
    /// MMIO writes.
    pub exit_mmio_write: AtomicU64,
    /// Exits that ended the guest abnormally.
    pub failures: AtomicU64,
}

/// What a vCPU reaches outside guest memory.
#[derive(Clone, Debug)]
pub struct Outside {
    /// I/O ports.
    pub ports: Arc<Bus>,
    /// Guest-physical addresses without memory.
    pub mmio: Arc<Bus>,
    /// What the memory slots of the vCPU's machine point into: it outlives the vCPU's descriptor,
    /// through which KVM reaches it even when the machine's own descriptor is closed.
    pub memory: Arc<GuestMemoryMmap>,
    /// The files that it points into as well: the leases of those that a vCPU may write last as long as it does.
    pub files: Vec<Arc<Mapping>>,
    /// Where an end is announced.
    pub ending: Ending,
    /// Where devices say that the guest has ended itself.
    pub guest_end: Arc<EndSignal>,
    /// Shared by all vCPUs of the machine.
    pub counters: Arc<VcpuCounters>,
    /// How much of the time they may run; likewise.
    pub share: Arc<Share>,
}

/// Counts how often a vCPU was told to run; 0 is the time before the first.
type Turn = u64;

enum Order {
    Run(Turn),
    Save(Arc<StateShape>, Sender<Result<VcpuState, StateError>>),
    Finish,
}

/// The control end of one vCPU thread. Dropped, it ends the thread and waits for that, within a limit.
#[derive(Debug)]
pub struct Vcpu {
    index: u8,
    /// What it answers to CPUID, which never changes once it has run.
    cpuid: Vec<CpuidEntryState>,
    orders: Sender<Order>,
    parked: Receiver<Turn>,
    /// The last turn that the thread shall leave.
    leave: Arc<AtomicU64>,
    turn: Cell<Turn>,
    motion: Cell<Motion>,
    /// It leaves its side, whose mapping goes with it: that is for another thread to ask.
    thread: Option<Thread<Option<Loop>>>,
}

/// What the thread is known to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Motion {
    Parked,
    Running,
    /// Kicked, and not seen to be parked yet.
    Leaving,
}

/// Why a vCPU cannot be controlled.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// KVM does not say what it has the vCPU answer.
    #[error("cannot tell what vCPU {index} answers to CPUID")]
    Cpuid {
        /// Which vCPU.
        index: u8,
        /// Why.
        #[source]
        source: CpuidError,
    },
    /// The thread could not be started.
    #[error("cannot start the thread of vCPU {index}")]
    Spawn {
        /// Which vCPU.
        index: u8,
        /// What the host answered.
        #[source]
        source: io::Error,
    },
    /// The kick signal could not be set up or sent.
    #[error("cannot kick vCPU {index} out of KVM_RUN")]
    Kick {
        /// Which vCPU.
        index: u8,
        /// What the host answered.
        #[source]
        source: io::Error,
    },
    /// It did not leave KVM_RUN in time.
    #[error("vCPU {index} did not leave KVM_RUN within {ACKNOWLEDGE_MS_MAX} ms")]
    Unresponsive {
        /// Which vCPU.
        index: u8,
    },
    /// It did not save its state in time.
    #[error("vCPU {index} did not say its state within {ACKNOWLEDGE_MS_MAX} ms")]
    Silent {
        /// Which vCPU.
        index: u8,
    },
    /// Its state cannot be saved.
    #[error("the state of vCPU {index} cannot be saved")]
    Save {
        /// Which vCPU.
        index: u8,
        /// Why.
        #[source]
        source: StateError,
    },
    /// Its thread has ended.
    #[error("the thread of vCPU {index} has ended")]
    Gone {
        /// Which vCPU.
        index: u8,
    },
}

/// Installs the handler of the kick signal and lets it through; once, before the first vCPU thread is started.
///
/// # Errors
///
/// When the host refuses the handler.
pub fn install_kick_handler() -> io::Result<()> {
    extern "C" fn leave_kvm_run(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        IMMEDIATE_EXIT.with(|flag| {
            let flag = flag.get();
            if !flag.is_null() {
                // SAFETY: the pointer is set by the thread that owns the vCPU while its kvm_run page is
                // mapped, and cleared before the page goes; the handler runs on that same thread.
                unsafe { flag.write_volatile(1) };
            }
        });
    }
    let signal = SIGRTMIN() + KICK_SIGNAL_OFFSET;
    register_signal_handler(signal, leave_kvm_run)
        .map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
    signals::let_through(signal)
}

impl Vcpu {
    /// Starts the thread of vCPU `index`, parked; from then on no kick is lost.
    ///
    /// # Errors
    ///
    /// [`VcpuError::Spawn`] when the host has no thread to give, and [`VcpuError::Cpuid`] when KVM does not say what the vCPU is.
    pub fn spawn(index: u8, fd: VcpuFd, outside: Outside) -> Result<Self, VcpuError> {
        let cpuid = Cpuid::of_vcpu(&fd).map_err(|source| VcpuError::Cpuid { index, source })?;
        let (orders, order_inbox) = channel();
        let (parked_outbox, parked) = channel();
        let leave = Arc::<AtomicU64>::default();
        let thread_side = Loop {
            index,
            fd,
            leave: Arc::clone(&leave),
            outside,
        };
        let serve = move || Some(thread_side.serve(&order_inbox, &parked_outbox));
        let thread = threads::spawn_with_stack(
            threads::Kind::Vcpu,
            format!("vcpu {index}"),
            Some(STACK_BYTES),
            serve,
        )
        .map_err(|source| VcpuError::Spawn { index, source })?;
        let vcpu = Self {
            index,
            cpuid: cpuid.entries().iter().map(CpuidEntryState::from).collect(),
            orders,
            parked,
            leave,
            turn: Cell::new(0),
            motion: Cell::new(Motion::Leaving),
            thread: Some(thread),
        };
        // A kick that came before the thread knows its kvm_run page would be lost.
        vcpu.wait_parked()?;
        Ok(vcpu)
    }

    /// What it answers to CPUID.
    pub fn cpuid(&self) -> &[CpuidEntryState] {
        &self.cpuid
    }

    /// Lets the guest run, also where a kick was not obeyed yet; returns at once.
    ///
    /// # Errors
    ///
    /// [`VcpuError::Gone`] when the thread has ended.
    pub fn run(&self) -> Result<(), VcpuError> {
        if self.motion.get() == Motion::Running {
            return Ok(());
        }
        let turn = self.turn.get() + 1;
        self.orders
            .send(Order::Run(turn))
            .map_err(|_| VcpuError::Gone { index: self.index })?;
        self.turn.set(turn);
        self.motion.set(Motion::Running);
        Ok(())
    }

    /// Has a vCPU that runs look at its share of the time, and rest if it has had that.
    ///
    /// # Errors
    ///
    /// [`VcpuError::Kick`] when the signal cannot be sent.
    pub fn nudge(&self) -> Result<(), VcpuError> {
        if self.motion.get() != Motion::Running {
            return Ok(());
        }
        self.interrupt()
    }

    /// Asks a vCPU to leave KVM_RUN, if it runs; [`Self::wait_parked`] says when it has.
    ///
    /// # Errors
    ///
    /// [`VcpuError::Kick`] when the signal cannot be sent.
    pub fn kick(&self) -> Result<(), VcpuError> {
        if self.motion.get() == Motion::Parked {
            return Ok(());
        }
        // Before the signal: the thread that it interrupts looks here.
        self.leave.store(self.turn.get(), Ordering::SeqCst);
        self.motion.set(Motion::Leaving);
        self.interrupt()
    }

    fn interrupt(&self) -> Result<(), VcpuError> {
        let Some(thread) = &self.thread else {
            return Err(VcpuError::Gone { index: self.index });
        };
        thread
            .handle()
            .kill(SIGRTMIN() + KICK_SIGNAL_OFFSET)
            .map_err(|error| VcpuError::Kick {
                index: self.index,
                source: io::Error::from_raw_os_error(error.errno()),
            })
    }

    /// Waits until a kicked vCPU is parked: then no guest code of it runs and no access is half done.
    ///
    /// # Errors
    ///
    /// [`VcpuError::Unresponsive`] when it takes longer than any host should.
    pub fn wait_parked(&self) -> Result<(), VcpuError> {
        if self.parks_within(Duration::from_millis(ACKNOWLEDGE_MS_MAX))? {
            Ok(())
        } else {
            Err(self.unresponsive())
        }
    }

    /// The same for whoever has something else to do: whether it is parked after `limit` at the most.
    ///
    /// # Errors
    ///
    /// [`VcpuError::Gone`] when the thread has ended.
    pub fn parks_within(&self, limit: Duration) -> Result<bool, VcpuError> {
        let deadline = Instant::now() + limit;
        while self.motion.get() != Motion::Parked {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.parked.recv_timeout(left) {
                Ok(turn) if turn == self.turn.get() => self.motion.set(Motion::Parked),
                Ok(_late_answer) => {}
                Err(RecvTimeoutError::Timeout) => return Ok(false),
                Err(RecvTimeoutError::Disconnected) => return Err(VcpuError::Gone { index: self.index }),
            }
        }
        Ok(true)
    }

    /// Reads the state of a parked vCPU, whose guest is between two instructions: KVM_RUN leaves by a kick only after it
    /// has completed the access that the last exit was for.
    ///
    /// # Errors
    ///
    /// [`VcpuError::Save`] when KVM refuses, [`VcpuError::Silent`] when it takes longer than any host should.
    pub fn save(&self, shape: &Arc<StateShape>) -> Result<VcpuState, VcpuError> {
        let index = self.index;
        assert_eq!(
            self.motion.get(),
            Motion::Parked,
            "only a paused machine is saved"
        );
        let (answer, answered) = channel();
        self.orders
            .send(Order::Save(Arc::clone(shape), answer))
            .map_err(|_| VcpuError::Gone { index })?;
        match answered.recv_timeout(Duration::from_millis(ACKNOWLEDGE_MS_MAX)) {
            Ok(state) => state.map_err(|source| VcpuError::Save { index, source }),
            Err(RecvTimeoutError::Timeout) => Err(VcpuError::Silent { index }),
            Err(RecvTimeoutError::Disconnected) => Err(VcpuError::Gone { index }),
        }
    }

    /// What is to be said of a vCPU that was given [`ACKNOWLEDGE_MS_MAX`].
    pub fn unresponsive(&self) -> VcpuError {
        VcpuError::Unresponsive { index: self.index }
    }

    /// Tells the thread to end; true when it has.
    fn finish(&self) -> bool {
        let kicked = self.kick();
        // A thread that is gone already needs no order.
        let _ = self.orders.send(Order::Finish);
        let deadline = Instant::now() + Duration::from_millis(ACKNOWLEDGE_MS_MAX);
        while kicked.is_ok() {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.parked.recv_timeout(left) {
                Ok(_) => {}
                // The thread's end of the channel goes with the thread.
                Err(RecvTimeoutError::Disconnected) => return true,
                Err(RecvTimeoutError::Timeout) => break,
            }
        }
        false
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        if !self.finish() {
            // It keeps what it uses, so it does no harm; the process is about to end anyway.
            log::error!(
                "the thread of vCPU {} does not end; it is left behind",
                self.index
            );
            return;
        }
        if let Some(thread) = self.thread.take() {
            thread
                .join()
                .expect("a vCPU thread does not panic: the process aborts if it does");
        }
    }
}

/// The thread's side. The descriptor goes before what it reaches.
#[derive(Debug)]
struct Loop {
    index: u8,
    fd: VcpuFd,
    leave: Arc<AtomicU64>,
    outside: Outside,
}

/// Why the thread left KVM_RUN.
enum Leave {
    Kicked,
    Ended(End),
}

impl Loop {
    fn serve(mut self, orders: &Receiver<Order>, parked: &Sender<Turn>) -> Self {
        IMMEDIATE_EXIT.set(&raw mut self.fd.get_kvm_run().immediate_exit);
        // As below, the controller may have given up on us.
        let _ = parked.send(0);
        loop {
            match orders.recv() {
                Ok(Order::Run(turn)) => {
                    self.tell_of_the_pause();
                    match self.run_guest(turn) {
                        Leave::Kicked => {}
                        Leave::Ended(end) => {
                            // A guest that has ended itself and goes on did so before, however late that is heard.
                            let end = self.outside.guest_end.end().map_or(end, End::from);
                            self.outside.ending.announce(end);
                        }
                    }
                    // The controller may have given up on us; the next order says so.
                    let _ = parked.send(turn);
                }
                Ok(Order::Save(shape, answer)) => {
                    // As above.
                    let _ = answer.send(VcpuState::save(&self.fd, &shape));
                }
                Ok(Order::Finish) | Err(_) => break,
            }
        }
        // The page goes with the descriptor: a late signal must find no address.
        IMMEDIATE_EXIT.set(ptr::null_mut());
        self
    }

    /// Has KVM tell a guest with a paravirtual clock that time has stood still, so that its watchdogs do not bark.
    fn tell_of_the_pause(&self) {
        if let Err(error) = self.fd.kvmclock_ctrl() {
            // A guest without such a clock: one that has just begun, for instance.
            log::debug!("vCPU {}: KVM_KVMCLOCK_CTRL: {error}", self.index);
        }
    }

    fn run_guest(&mut self, turn: Turn) -> Leave {
        let (mut begun, mut owed) = (Instant::now(), Duration::ZERO);
        loop {
            match self.fd.run() {
                Ok(exit) => {
                    if let Some(ended) = Self::serve_exit(self.index, exit, &self.outside) {
                        return Leave::Ended(self.explain(ended));
                    }
                }
                // EINTR: a signal. EAGAIN: a waiting application processor that was woken without being started.
                Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => {
                    if self.is_kicked_out_of(turn) {
                        return Leave::Kicked;
                    }
                    owed += self.outside.share.rest_after(begun.elapsed());
                    if !owed.is_zero() {
                        owed = self.rest(turn, owed);
                        // Nudges that came meanwhile are over with it.
                        if self.is_kicked_out_of(turn) {
                            return Leave::Kicked;
                        }
                    }
                    begun = Instant::now();
                }
                Err(error) => {
                    let cause = format!("KVM_RUN: {error}");
                    return Leave::Ended(End::RunFailed {
                        vcpu: self.index,
                        cause,
                    });
                }
            }
        }
    }

    fn is_kicked_out_of(&mut self, turn: Turn) -> bool {
        self.fd.set_kvm_immediate_exit(0);
        // In this order: a kick that comes between the two is seen below, one that comes later sets
        // the flag again. Its handler runs on this thread, so only the compiler could reorder them.
        compiler_fence(Ordering::SeqCst);
        self.leave.load(Ordering::SeqCst) >= turn
    }

    /// Does nothing for so long as is `owed`, as far as that is bearable at once, or until somebody wants the vCPU to leave its
    /// turn. Returns what is owed still: who nudges may be late.
    fn rest(&self, turn: Turn, owed: Duration) -> Duration {
        let rest = owed.min(REST_MAX);
        let until = Instant::now() + rest;
        while self.leave.load(Ordering::SeqCst) < turn {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            // Not a sleep: one that a stop of the process interrupts goes on by another system call, `restart_syscall`.
            let piece = Timespec::try_from(left.min(REST_PIECE)).unwrap_or_default();
            let _ends_early_if_kicked = poll(&mut [], Some(&piece));
        }
        (owed - rest).min(OWED_MAX)
    }

    /// Serves one exit; `Some` if the guest cannot go on.
    fn serve_exit(vcpu: u8, exit: VcpuExit<'_>, outside: &Outside) -> Option<Abnormal> {
        let counters = &outside.counters;
        match exit {
            VcpuExit::MmioWrite(address, data) => {
                counters.exit_mmio_write.fetch_add(1, Ordering::Relaxed);
                outside.mmio.write(address, data);
            }
            VcpuExit::MmioRead(address, data) => {
                counters.exit_mmio_read.fetch_add(1, Ordering::Relaxed);
                outside.mmio.read(address, data);
            }
            VcpuExit::IoOut(port, data) => {
                counters.exit_io_out.fetch_add(1, Ordering::Relaxed);
                outside.ports.write(u64::from(port), data);
            }
            VcpuExit::IoIn(port, data) => {
                counters.exit_io_in.fetch_add(1, Ordering::Relaxed);
                outside.ports.read(u64::from(port), data);
            }
            VcpuExit::Intr | VcpuExit::Hlt | VcpuExit::IoapicEoi(_) => {}
            VcpuExit::Shutdown => return Some(Abnormal::Known(End::TripleFault { vcpu })),
            VcpuExit::FailEntry(reason, _) => {
                return Some(Abnormal::Known(End::EntryFailed { vcpu, reason }));
            }
            VcpuExit::InternalError => return Some(Abnormal::InternalError),
            other => {
                let cause = format!("KVM_RUN returned for a reason the monitor does not serve: {other:?}");
                return Some(Abnormal::Known(End::RunFailed { vcpu, cause }));
            }
        }
        None
    }

    fn explain(&mut self, abnormal: Abnormal) -> End {
        self.outside.counters.failures.fetch_add(1, Ordering::Relaxed);
        match abnormal {
            Abnormal::Known(end) => end,
            Abnormal::InternalError => {
                let rip = self.fd.get_regs().map_or(0, |registers| registers.rip);
                internal_error(self.index, rip, self.fd.get_kvm_run())
            }
        }
    }
}

enum Abnormal {
    Known(End),
    InternalError,
}

/// Reads the details of a KVM_EXIT_INTERNAL_ERROR (KVM API, section 5: `internal`, `emulation_failure`).
fn internal_error(vcpu: u8, rip: u64, run: &kvm_run) -> End {
    // SAFETY: the exit reason is KVM_EXIT_INTERNAL_ERROR, for which KVM fills this member of the
    // union; its fields are plain integers.
    let failure = unsafe { run.__bindgen_anon_1.emulation_failure };
    if failure.suberror != KVM_INTERNAL_ERROR_EMULATION {
        return End::InternalError {
            vcpu,
            suberror: failure.suberror,
            rip,
        };
    }
    let mut instruction = Vec::new();
    if failure.ndata >= 1
        && failure.flags & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0
    {
        // SAFETY: the flag says that KVM filled this variant; its fields are plain bytes.
        let fetched = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
        let len = usize::from(fetched.insn_size).min(fetched.insn_bytes.len());
        instruction.extend_from_slice(fetched.insn_bytes.get(..len).unwrap_or_default());
    }
    End::EmulationFailure {
        vcpu,
        rip,
        instruction,
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use super::*;

    /// A control end whose thread obeys nothing but the order to finish, and the end that answers for it.
    fn deaf() -> (Vcpu, Sender<Turn>) {
        install_kick_handler().unwrap();
        let (orders, inbox) = channel();
        let (answers, parked) = channel();
        let vcpu = Vcpu {
            cpuid: Vec::new(),
            index: 0,
            orders,
            parked,
            leave: Arc::default(),
            turn: Cell::new(0),
            motion: Cell::new(Motion::Parked),
            thread: Some(
                threads::spawn(threads::Kind::Vcpu, "deaf", move || {
                    while let Ok(Order::Run(_)) = inbox.recv() {}
                    None
                })
                .unwrap(),
            ),
        };
        (vcpu, answers)
    }

    #[test]
    fn the_late_answer_to_a_pause_that_was_given_up_is_not_one_to_the_next() {
        let (vcpu, answers) = deaf();
        vcpu.run().unwrap();
        vcpu.kick().unwrap();
        // Given up: the guest shall run on.
        vcpu.run().unwrap();
        vcpu.kick().unwrap();
        assert_eq!(vcpu.leave.load(Ordering::SeqCst), 2);
        answers.send(1).unwrap();
        answers.send(2).unwrap();
        vcpu.wait_parked().unwrap();
        assert!(
            vcpu.parked.try_recv().is_err(),
            "the first answer was taken for the second"
        );
        drop(answers);
    }

    #[test]
    fn a_parked_vcpu_is_parked_without_being_asked_again() {
        let (vcpu, answers) = deaf();
        vcpu.kick().unwrap();
        vcpu.wait_parked().unwrap();
        assert_eq!(vcpu.leave.load(Ordering::SeqCst), 0, "the kick was for nobody");
        drop(answers);
    }
}
