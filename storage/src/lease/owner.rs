//! Who asks for a lease: a virtual machine, in one life of its process.

use std::fmt;
use std::sync::OnceLock;

/// One life of a process, and nothing longer: a second start of the same machine is a stranger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Incarnation(u128);

static REAPED: OnceLock<Vec<Incarnation>> = OnceLock::new();

impl Incarnation {
    /// The value of this process, which is drawn the first time that somebody asks.
    pub fn of_this_process() -> Self {
        static OURS: OnceLock<Incarnation> = OnceLock::new();
        *OURS.get_or_init(Self::random)
    }

    /// The lives before this one whose end was seen by whoever has started this process.
    pub fn reaped() -> &'static [Self] {
        REAPED.get().map_or(&[], Vec::as_slice)
    }

    /// This process is the heir of others that have ended for certain: whoever has started it has reaped them. To be called once,
    /// before any lease is asked for.
    ///
    /// # Panics
    ///
    /// When it is the heir of others already.
    pub fn succeed(reaped: Vec<Self>) {
        assert!(
            REAPED.set(reaped).is_ok(),
            "a process is told of its predecessors once"
        );
    }

    /// That of a process of a simulation.
    pub(crate) fn simulated(high: u64, low: u64) -> Self {
        Self(u128::from(high) << 64 | u128::from(low))
    }

    fn random() -> Self {
        let mut bytes = [0; 16];
        fill_random(&mut bytes);
        Self(u128::from_be_bytes(bytes))
    }

    /// The value that has these bytes.
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(u128::from_be_bytes(bytes))
    }

    /// The value, in the order in which it is written.
    pub fn bytes(self) -> [u8; 16] {
        self.0.to_be_bytes()
    }

    /// Reads what [`fmt::Display`] writes, and nothing else.
    pub fn parse(text: &str) -> Option<Self> {
        let value = Self(u128::from_str_radix(text, 16).ok()?);
        (value.to_string() == text).then_some(value)
    }
}

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// Fills `empty` with random bytes of the kernel's.
pub(crate) fn fill_random(mut empty: &mut [u8]) {
    while !empty.is_empty() {
        let filled = rustix::rand::getrandom(&mut *empty, rustix::rand::GetRandomFlags::empty());
        match filled {
            Ok(count) => empty = empty.split_at_mut(count).1,
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => panic!("the kernel has no random bytes: {errno}"),
        }
    }
}

/// Whoever holds a lease, or wants one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Its identity. All else is for people.
    pub incarnation: Incarnation,
    /// The virtual machine.
    pub vm: String,
    /// The host's name.
    pub host: String,
    /// The process on that host.
    pub pid: u32,
}

/// Longest name of a machine or a host in a record.
pub(super) const NAME_BYTES_MAX: usize = 256;

impl Owner {
    /// This process, on behalf of the machine `vm`.
    pub fn of_this_process(vm: &str) -> Self {
        let host = rustix::system::uname();
        Self {
            incarnation: Incarnation::of_this_process(),
            vm: printable(vm),
            host: printable(&host.nodename().to_string_lossy()),
            pid: std::process::id(),
        }
    }

    /// Whether this is a process of this host that has ended. A process of another host, or one that
    /// cannot be told from a later one with its number, counts as alive, unless this one is its heir.
    pub(crate) fn has_ended_here(&self) -> bool {
        if Incarnation::reaped().contains(&self.incarnation) {
            return true;
        }
        let here = rustix::system::uname();
        if printable(&here.nodename().to_string_lossy()) != self.host {
            return false;
        }
        let pid = i32::try_from(self.pid)
            .ok()
            .and_then(rustix::process::Pid::from_raw);
        pid.is_none_or(|pid| rustix::process::test_kill_process(pid) == Err(rustix::io::Errno::SRCH))
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VM `{}` (pid {} on {})", self.vm, self.pid, self.host)
    }
}

/// A name that fits into one line of a record, whatever it was.
fn printable(name: &str) -> String {
    let mut kept = String::new();
    for character in name.chars() {
        let character = if is_printable(character) { character } else { '?' };
        if kept.len() + character.len_utf8() > NAME_BYTES_MAX {
            break;
        }
        kept.push(character);
    }
    if kept.is_empty() { "?".to_owned() } else { kept }
}

/// Whether a character may stand in a name.
pub(super) fn is_printable(character: char) -> bool {
    !character.is_control() && !character.is_whitespace()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_keeps_its_incarnation_and_each_draw_is_another() {
        assert_eq!(Incarnation::of_this_process(), Incarnation::of_this_process());
        assert_ne!(Incarnation::random(), Incarnation::random());
    }

    #[test]
    fn an_incarnation_is_read_in_the_one_form_in_which_it_is_written() {
        let ours = Incarnation::of_this_process();
        assert_eq!(Incarnation::parse(&ours.to_string()), Some(ours));
        for other in ["", "1", "+0000000000000000000000000000001", &"F".repeat(32)] {
            assert_eq!(Incarnation::parse(other), None, "{other}");
        }
    }

    #[test]
    fn whatever_a_machine_is_called_its_name_stays_in_one_line() {
        assert_eq!(Owner::of_this_process("a\nphase released").vm, "a?phase?released");
        assert_eq!(Owner::of_this_process("").vm, "?");
        assert!(Owner::of_this_process(&"ä".repeat(1000)).vm.len() <= NAME_BYTES_MAX);
    }

    #[test]
    fn this_process_has_not_ended() {
        let ours = Owner::of_this_process("vm");
        assert!(!ours.has_ended_here());
        let nobody = Owner {
            pid: 0x7fff_fffe,
            ..ours.clone()
        };
        assert!(nobody.has_ended_here());
        let elsewhere = Owner {
            host: "elsewhere.invalid".to_owned(),
            ..nobody
        };
        assert!(!elsewhere.has_ended_here());
    }
}
