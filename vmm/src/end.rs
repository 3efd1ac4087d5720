//! How a machine ends, and the exit status of the process that ran it.
//!
//! A CI job reads two things: the status and one line on standard error that says why. Statuses
//! below 128 are for the guest (its exit device can give any). A machine that a signal has stopped
//! ends as if the process had died of it, so that nobody takes it for a success. 148 to 153 mean
//! what they mean in Firecracker, and from 160 they are ours.

use std::fmt;
use std::sync::{Arc, OnceLock};

use coracle_devices::power::GuestEnd;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::signals::StopSignal;

/// The guest shut down or reset; as in Firecracker, whose guests end by `reboot`.
pub const EXIT_OK: u8 = 0;
/// The monitor failed in a way that has no status of its own.
pub const EXIT_FAILURE: u8 = 1;
/// The configuration file is wrong, or the machine that it describes cannot be built.
pub const EXIT_BAD_CONFIGURATION: u8 = 152;
/// The command line is wrong.
pub const EXIT_BAD_ARGUMENT: u8 = 153;
/// A vCPU took a triple fault.
pub const EXIT_TRIPLE_FAULT: u8 = 160;
/// KVM could not go on with a vCPU: an internal error, an emulation failure among them.
pub const EXIT_KVM_INTERNAL_ERROR: u8 = 161;
/// The processor refused the vCPU's state.
pub const EXIT_KVM_ENTRY_FAILED: u8 = 162;
/// KVM_RUN itself failed, or returned for a reason that the monitor does not know.
pub const EXIT_KVM_RUN_FAILED: u8 = 163;
/// Memory of a restored or migrated guest cannot be loaded.
pub const EXIT_MEMORY_LOST: u8 = 164;
/// The guest was handed over by a migration whose end is not known; see the leases of its images.
pub const EXIT_HANDOVER_LOST: u8 = 165;

/// A fault of the monitor itself: it has noticed that it does not understand its own state.
pub const EXIT_PANIC: u8 = 166;

/// Why a machine has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest wrote its exit status to the exit device.
    GuestExit {
        /// The status.
        status: u8,
    },
    /// The guest entered ACPI S5.
    PowerOff,
    /// The guest reset itself, by the keyboard controller or the ACPI reset register.
    Reset,
    /// A signal asked the monitor to stop.
    Stopped {
        /// Which.
        by: StopSignal,
    },
    /// A vCPU took a triple fault.
    TripleFault {
        /// Which vCPU.
        vcpu: u8,
    },
    /// KVM met an instruction that it cannot emulate.
    EmulationFailure {
        /// Which vCPU.
        vcpu: u8,
        /// The instruction pointer.
        rip: u64,
        /// The bytes at it, as far as KVM fetched them.
        instruction: Vec<u8>,
    },
    /// KVM_EXIT_INTERNAL_ERROR for another reason.
    InternalError {
        /// Which vCPU.
        vcpu: u8,
        /// KVM_INTERNAL_ERROR_*.
        suberror: u32,
        /// The instruction pointer.
        rip: u64,
    },
    /// KVM_EXIT_FAIL_ENTRY.
    EntryFailed {
        /// Which vCPU.
        vcpu: u8,
        /// The processor's reason.
        reason: u64,
    },
    /// The machine of the configuration file could not be started.
    NotStarted {
        /// Why.
        reason: String,
    },
    /// KVM_RUN failed or returned for an unknown reason.
    RunFailed {
        /// Which vCPU.
        vcpu: u8,
        /// What it was.
        cause: String,
    },
    /// The guest runs on in another process.
    Migrated {
        /// Where.
        to: String,
    },
    /// The guest was handed over, and nobody can tell that it runs, or fetches its memory from here; here it may not run.
    HandoverLost {
        /// What is known.
        reason: String,
    },
    /// Memory of a restored guest is damaged in its file, or cannot be read from it, or that of a migrated one is at
    /// a source that is
    /// gone: the guest never sees it.
    MemoryLost {
        /// Which, and why.
        reason: String,
    },
}

impl End {
    /// The exit status of the process.
    pub fn status(&self) -> u8 {
        match self {
            Self::GuestExit { status } => *status,
            Self::PowerOff | Self::Reset | Self::Migrated { .. } => EXIT_OK,
            Self::Stopped { by } => by.exit_status(),
            Self::TripleFault { .. } => EXIT_TRIPLE_FAULT,
            Self::EmulationFailure { .. } | Self::InternalError { .. } => EXIT_KVM_INTERNAL_ERROR,
            Self::EntryFailed { .. } => EXIT_KVM_ENTRY_FAILED,
            Self::NotStarted { .. } => EXIT_BAD_CONFIGURATION,
            Self::RunFailed { .. } => EXIT_KVM_RUN_FAILED,
            Self::MemoryLost { .. } => EXIT_MEMORY_LOST,
            Self::HandoverLost { .. } => EXIT_HANDOVER_LOST,
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::GuestExit { status } => write!(f, "the guest exited with status {status}"),
            Self::PowerOff => write!(f, "the guest powered off"),
            Self::Reset => write!(f, "the guest reset itself"),
            Self::Stopped { by } => write!(f, "stopped by {by}"),
            Self::TripleFault { vcpu } => write!(f, "vCPU {vcpu} took a triple fault"),
            Self::EmulationFailure {
                vcpu,
                rip,
                instruction,
            } => {
                write!(
                    f,
                    "KVM cannot emulate an instruction of vCPU {vcpu} at RIP {rip:#x}: bytes"
                )?;
                if instruction.is_empty() {
                    f.write_str(" not reported")?;
                }
                for byte in instruction {
                    write!(f, " {byte:02x}")?;
                }
                f.write_str("; a CPU template keeps a guest from what its host cannot emulate (`cpu-config`)")
            }
            Self::InternalError { vcpu, suberror, rip } => {
                write!(f, "KVM internal error {suberror} on vCPU {vcpu} at RIP {rip:#x}")
            }
            Self::EntryFailed { vcpu, reason } => {
                write!(
                    f,
                    "the processor refused the state of vCPU {vcpu}: reason {reason:#x}"
                )
            }
            Self::NotStarted { reason } => f.write_str(reason),
            Self::Migrated { to } => write!(f, "the guest runs on at {to}"),
            Self::HandoverLost { reason } => write!(f, "the guest was handed over: {reason}"),
            Self::RunFailed { vcpu, cause } => write!(f, "vCPU {vcpu} cannot run: {cause}"),
            Self::MemoryLost { reason } => write!(f, "guest memory cannot be loaded: {reason}"),
        }
    }
}

impl From<GuestEnd> for End {
    fn from(end: GuestEnd) -> Self {
        match end {
            GuestEnd::Exit(status) => Self::GuestExit { status },
            GuestEnd::PowerOff => Self::PowerOff,
            GuestEnd::Reset => Self::Reset,
        }
    }
}

/// Where whoever notices the end says so; the first to speak decides, the event loop listens.
#[derive(Clone, Debug)]
pub struct Ending {
    end: Arc<OnceLock<End>>,
    bell: Arc<EventFd>,
}

impl Ending {
    /// An ending that nobody has announced yet.
    ///
    /// # Errors
    ///
    /// When the process has no descriptor left.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self {
            end: Arc::new(OnceLock::new()),
            bell: Arc::new(EventFd::new(EFD_NONBLOCK)?),
        })
    }

    /// Announces the end; ignored if one was announced before.
    pub fn announce(&self, end: End) {
        if self.end.set(end).is_ok() {
            self.bell.write(1).expect("a fresh eventfd takes one write");
        }
    }

    /// What was announced, if anything.
    pub fn announced(&self) -> Option<&End> {
        self.end.get()
    }

    /// Readable once an end was announced, for ever.
    pub fn bell(&self) -> &EventFd {
        &self.bell
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_end_announced_is_the_one_that_counts() {
        let ending = Ending::new().expect("descriptors are left");
        assert_eq!(ending.announced(), None);
        ending.announce(End::GuestExit { status: 7 });
        ending.announce(End::TripleFault { vcpu: 0 });
        assert_eq!(ending.announced(), Some(&End::GuestExit { status: 7 }));
        assert_eq!(ending.bell().read().expect("the bell rang"), 1);
    }

    #[test]
    fn a_machine_that_was_stopped_is_no_success() {
        for (by, status, text) in [
            (StopSignal::HangUp, 129, "stopped by SIGHUP"),
            (StopSignal::Interrupt, 130, "stopped by SIGINT"),
            (StopSignal::Terminate, 143, "stopped by SIGTERM"),
        ] {
            let end = End::Stopped { by };
            assert_eq!((end.status(), end.to_string().as_str()), (status, text));
        }
    }

    #[test]
    fn an_emulation_failure_names_rip_and_bytes() {
        let end = End::EmulationFailure {
            vcpu: 1,
            rip: 0x10_0000,
            instruction: vec![0x0f, 0x01, 0xd0],
        };
        assert_eq!(end.status(), EXIT_KVM_INTERNAL_ERROR);
        let told = end.to_string();
        assert!(
            told.contains("at RIP 0x100000: bytes 0f 01 d0; a CPU template"),
            "{told}"
        );
    }
}
