//! Who chose the status of a run, as far as it can be known.

use std::os::unix::process::ExitStatusExt;

use serde::Serialize;

use super::session::{Asked, Outcome};

/// What ended a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Ended {
    /// The guest gave a status to its exit device.
    GuestExit,
    /// The guest powered off.
    PowerOff,
    /// The guest reset itself.
    Reset,
    /// A vCPU took a triple fault.
    TripleFault,
    /// KVM could not go on with a vCPU.
    KvmInternalError,
    /// The processor refused a vCPU's state.
    EntryFailed,
    /// KVM_RUN failed.
    RunFailed,
    /// Memory of a restored guest could not be loaded.
    MemoryLost,
    /// The guest runs on in another process.
    Migrated,
    /// The guest was handed over, and it is not known that it runs.
    HandoverLost,
    /// A signal stopped it: `coraclectl`, or the monitor.
    Stopped,
    /// The monitor failed or crashed.
    MonitorFailed,
}

impl Ended {
    /// Tells who ended the machine from the last line on its monitor's standard error: any status may
    /// be a guest's. `None` when the monitor did not say, as monitors other than Coracle do not.
    pub(super) fn of(outcome: &Outcome, last_words: Option<&str>) -> Option<Self> {
        if let Some(Asked::BySignal(_)) = outcome.asked {
            return Some(Self::Stopped);
        }
        match outcome.monitor.signal() {
            Some(libc::SIGHUP | libc::SIGINT | libc::SIGQUIT | libc::SIGKILL | libc::SIGTERM) => {
                Some(Self::Stopped)
            }
            Some(_) => Some(Self::MonitorFailed),
            None => Some(Self::said(last_words?.strip_prefix("coracle: ")?)),
        }
    }

    /// What the monitor means by `reason`; whatever is not the end of a machine is its own failure.
    fn said(reason: &str) -> Self {
        match reason {
            "the guest powered off" => return Self::PowerOff,
            "the guest reset itself" => return Self::Reset,
            _ => {}
        }
        let of_a_vcpu = |text| reason.starts_with("vCPU ") && reason.contains(text);
        if reason.starts_with("the guest exited with status ") {
            Self::GuestExit
        } else if reason.starts_with("stopped by ") {
            Self::Stopped
        } else if of_a_vcpu(" took a triple fault") {
            Self::TripleFault
        } else if of_a_vcpu(" cannot run: ") {
            Self::RunFailed
        } else if reason.starts_with("guest memory cannot be loaded: ") {
            Self::MemoryLost
        } else if reason.starts_with("the guest runs on at ") {
            Self::Migrated
        } else if reason.starts_with("the guest was handed over: ") {
            Self::HandoverLost
        } else if reason.starts_with("KVM cannot emulate ") || reason.starts_with("KVM internal error ") {
            Self::KvmInternalError
        } else if reason.starts_with("the processor refused the state of vCPU ") {
            Self::EntryFailed
        } else {
            Self::MonitorFailed
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::ExitStatus;

    use coracle_vmm::end::End;
    use coracle_vmm::signals::StopSignal;

    use super::*;

    fn ended(wait_status: i32, asked: Option<Asked>, last_words: Option<&str>) -> Option<Ended> {
        let monitor = ExitStatus::from_raw(wait_status);
        Ended::of(&Outcome { monitor, asked }, last_words)
    }

    #[test]
    fn every_end_that_the_monitor_tells_is_known() {
        let (vcpu, rip) = (3, 0x1000);
        let by = StopSignal::Terminate;
        let (instruction, cause) = (vec![0x0f], "Bad address".to_owned());
        let reason = "memory file `a` is damaged".to_owned();
        for (end, expected) in [
            (End::GuestExit { status: 160 }, Ended::GuestExit),
            (End::PowerOff, Ended::PowerOff),
            (End::Reset, Ended::Reset),
            (End::Stopped { by }, Ended::Stopped),
            (End::TripleFault { vcpu }, Ended::TripleFault),
            (
                End::EmulationFailure {
                    vcpu,
                    rip,
                    instruction,
                },
                Ended::KvmInternalError,
            ),
            (
                End::InternalError {
                    vcpu,
                    suberror: 3,
                    rip,
                },
                Ended::KvmInternalError,
            ),
            (End::EntryFailed { vcpu, reason: 7 }, Ended::EntryFailed),
            (End::RunFailed { vcpu, cause }, Ended::RunFailed),
            (
                End::MemoryLost {
                    reason: reason.clone(),
                },
                Ended::MemoryLost,
            ),
            (End::HandoverLost { reason }, Ended::HandoverLost),
            (
                End::Migrated {
                    to: "host-b:4433".to_owned(),
                },
                Ended::Migrated,
            ),
        ] {
            let (line, status) = (format!("coracle: {end}"), i32::from(end.status()) << 8);
            assert_eq!(ended(status, None, Some(&line)), Some(expected), "{line}");
        }
        let failure = Some("coracle: cannot bind the API socket");
        assert_eq!(ended(1 << 8, None, failure), Some(Ended::MonitorFailed));
    }

    #[test]
    fn a_status_alone_says_nothing_and_a_signal_does() {
        assert_eq!(ended(160 << 8, None, None), None);
        assert_eq!(ended(0, None, Some("")), None);
        assert_eq!(ended(0, Some(Asked::ByKey), Some("another line")), None);
        assert_eq!(ended(libc::SIGKILL, None, None), Some(Ended::Stopped));
        assert_eq!(ended(libc::SIGSEGV, None, None), Some(Ended::MonitorFailed));
        let asked = Some(Asked::BySignal(libc::SIGTERM));
        let line = Some("coracle: the guest reset itself");
        assert_eq!(ended(0, asked, line), Some(Ended::Stopped));
    }
}
