//! The command line: words for the guest among words for others, which are ignored.

use core::fmt;

/// The kernel command line.
#[derive(Clone, Copy, Debug)]
pub struct CommandLine<'a>(&'a str);

/// One `do=verb:key=value,key=value`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Command<'a> {
    /// What to do.
    pub verb: &'a str,
    arguments: &'a str,
}

/// One `virtio_mmio.device=SIZE@ADDRESS:IRQ`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceWindow {
    /// Guest-physical address of the registers.
    pub base: u64,
    /// How many bytes of registers there are.
    pub bytes: u64,
    /// Input of the IOAPIC.
    pub irq: u32,
}

/// What the guest does after its last command.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ending {
    /// Writes its status to the exit device; without one, resets, then faults.
    #[default]
    Exit,
    /// ACPI's S5.
    PowerOff,
    /// A reset by the keyboard controller.
    Reset,
    /// A triple fault.
    TripleFault,
    /// Halts for ever.
    Hang,
}

/// What is wrong with what was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ArgumentError<'a> {
    /// The verb has no such argument.
    Unknown {
        /// The argument.
        key: &'a str,
    },
    /// A number is neither decimal nor hexadecimal, or too large.
    NotANumber {
        /// The argument.
        key: &'a str,
        /// Its text.
        value: &'a str,
    },
    /// A value is none of those that the argument can have.
    Impossible {
        /// The argument.
        key: &'a str,
        /// Its text.
        value: &'a str,
        /// What it can be.
        choices: &'static str,
    },
}

impl fmt::Display for ArgumentError<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Unknown { key } => write!(out, "unknown argument `{key}`"),
            Self::NotANumber { key, value } => write!(out, "`{key}={value}` is not a number"),
            Self::Impossible { key, value, choices } => write!(out, "`{key}={value}`: only {choices}"),
        }
    }
}

impl<'a> CommandLine<'a> {
    /// The command line as the monitor passed it.
    #[must_use]
    pub const fn new(text: &'a str) -> Self {
        Self(text)
    }

    /// The commands, in order.
    pub fn commands(self) -> impl Iterator<Item = Command<'a>> {
        self.values("do").map(Command::parse)
    }

    /// The virtio-mmio devices, in order; a malformed one is left out, as kernels do.
    pub fn devices(self) -> impl Iterator<Item = DeviceWindow> {
        self.values("virtio_mmio.device").filter_map(DeviceWindow::parse)
    }

    /// The number `key=N`, if it is there.
    ///
    /// # Errors
    ///
    /// If it is there and no number.
    pub fn number(self, key: &'static str) -> Result<Option<u64>, ArgumentError<'a>> {
        match self.values(key).last() {
            None => Ok(None),
            Some(value) => number(value)
                .map(Some)
                .ok_or(ArgumentError::NotANumber { key, value }),
        }
    }

    /// How to end.
    ///
    /// # Errors
    ///
    /// If `end=` names no ending.
    pub fn ending(self) -> Result<Ending, ArgumentError<'a>> {
        match self.values("end").last() {
            None | Some("exit") => Ok(Ending::Exit),
            Some("poweroff") => Ok(Ending::PowerOff),
            Some("reset") => Ok(Ending::Reset),
            Some("triple") => Ok(Ending::TripleFault),
            Some("hang") => Ok(Ending::Hang),
            Some(value) => Err(ArgumentError::Impossible {
                key: "end",
                value,
                choices: "exit, poweroff, reset, triple, hang",
            }),
        }
    }

    /// The values of every `key=value`.
    fn values(self, key: &'static str) -> impl Iterator<Item = &'a str> {
        self.0
            .split_ascii_whitespace()
            .filter_map(move |word| word.strip_prefix(key).and_then(|rest| rest.strip_prefix('=')))
    }
}

impl<'a> Command<'a> {
    fn parse(text: &'a str) -> Self {
        let (verb, arguments) = text.split_once(':').unwrap_or((text, ""));
        Self { verb, arguments }
    }

    /// Refuses arguments that are not in `known`: a misspelt one must not pass for its default.
    ///
    /// # Errors
    ///
    /// The first argument that is not known.
    pub fn allow(&self, known: &[&str]) -> Result<(), ArgumentError<'a>> {
        match self.pairs().find(|(key, _)| !known.contains(key)) {
            Some((key, _)) => Err(ArgumentError::Unknown { key }),
            None => Ok(()),
        }
    }

    /// The text of an argument, if it was given.
    #[must_use]
    pub fn text(&self, key: &str) -> Option<&'a str> {
        self.pairs()
            .filter(|(found, _)| *found == key)
            .map(|(_, value)| value)
            .last()
    }

    /// The number of an argument, or `default`.
    ///
    /// # Errors
    ///
    /// If it was given and is no number.
    pub fn number(&self, key: &'static str, default: u64) -> Result<u64, ArgumentError<'a>> {
        match self.text(key) {
            None => Ok(default),
            Some(value) => number(value).ok_or(ArgumentError::NotANumber { key, value }),
        }
    }

    /// An argument that is 0 or 1.
    ///
    /// # Errors
    ///
    /// If it is anything else.
    pub fn switch(&self, key: &'static str, default: bool) -> Result<bool, ArgumentError<'a>> {
        match self.text(key) {
            None => Ok(default),
            Some("0") => Ok(false),
            Some("1") => Ok(true),
            Some(value) => Err(ArgumentError::Impossible {
                key,
                value,
                choices: "0, 1",
            }),
        }
    }

    /// A number in `range`, or `default`, which need not be.
    ///
    /// # Errors
    ///
    /// If it is no number, or outside; `choices` says what would be inside.
    pub fn within(
        &self,
        key: &'static str,
        default: u64,
        range: core::ops::RangeInclusive<u64>,
        choices: &'static str,
    ) -> Result<u64, ArgumentError<'a>> {
        match self.text(key) {
            None => Ok(default),
            Some(value) => match number(value) {
                None => Err(ArgumentError::NotANumber { key, value }),
                Some(found) if range.contains(&found) => Ok(found),
                Some(_) => Err(ArgumentError::Impossible { key, value, choices }),
            },
        }
    }

    fn pairs(&self) -> impl Iterator<Item = (&'a str, &'a str)> {
        self.arguments
            .split(',')
            .filter(|argument| !argument.is_empty())
            .map(|argument| argument.split_once('=').unwrap_or((argument, "1")))
    }
}

impl DeviceWindow {
    fn parse(text: &str) -> Option<Self> {
        let (size, place) = text.split_once('@')?;
        let bytes = match size.strip_suffix('K') {
            Some(kib) => number(kib)?.checked_mul(1024)?,
            None => number(size)?,
        };
        let mut fields = place.split(':');
        let base = number(fields.next()?)?;
        let irq = u32::try_from(number(fields.next()?)?).ok()?;
        Some(Self { base, bytes, irq })
    }
}

/// A decimal number, or a hexadecimal one after `0x`.
fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) if digits.bytes().all(|digit| digit.is_ascii_hexdigit()) => {
            u64::from_str_radix(digits, 16).ok()
        }
        Some(_) => None,
        None if text.bytes().all(|digit| digit.is_ascii_digit()) => text.parse().ok(),
        None => None,
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use super::*;

    const LINE: &str = "console=ttyS0 reboot=k do=hello pci=off do=load:mode=randread,bs=0x1000,indirect=0 \
        virtio_mmio.device=4K@0xc0001000:5 virtio_mmio.device=512@0xfeb00e00:12:3 tsc_khz=2596138";

    #[test]
    fn commands_come_in_order_and_foreign_words_are_ignored() {
        let mut commands = CommandLine::new(LINE).commands();
        assert_eq!(
            commands.next(),
            Some(Command {
                verb: "hello",
                arguments: ""
            })
        );
        let load = commands.next().unwrap();
        assert_eq!(load.verb, "load");
        assert_eq!(load.text("mode"), Some("randread"));
        assert_eq!(load.number("bs", 512), Ok(4096));
        assert_eq!(load.number("depth", 32), Ok(32));
        assert_eq!(load.switch("indirect", true), Ok(false));
        assert_eq!(commands.next(), None);
    }

    #[test]
    fn devices_come_with_address_and_interrupt_and_malformed_ones_are_left_out() {
        let mut devices = CommandLine::new(LINE).devices();
        assert_eq!(
            devices.next(),
            Some(DeviceWindow {
                base: 0xc000_1000,
                bytes: 4096,
                irq: 5
            })
        );
        assert_eq!(
            devices.next(),
            Some(DeviceWindow {
                base: 0xfeb0_0e00,
                bytes: 512,
                irq: 12
            })
        );
        assert_eq!(devices.next(), None);
        for malformed in [
            "4K",
            "4K@",
            "4K@0xc0001000",
            "4K@0xc0001000:",
            "4K@zero:5",
            "4K@1:99999999999",
        ] {
            assert_eq!(DeviceWindow::parse(malformed), None, "{malformed}");
        }
    }

    #[test]
    fn a_misspelt_argument_is_refused() {
        let command = Command::parse("load:dpeth=1");
        assert_eq!(
            command.allow(&["depth"]),
            Err(ArgumentError::Unknown { key: "dpeth" })
        );
        assert_eq!(Command::parse("load:depth=1,").allow(&["depth"]), Ok(()));
    }

    #[test]
    fn numbers_that_are_none_are_refused() {
        for value in ["", "x", "-1", "+1", "0x", "0x+1", "1k", "18446744073709551616"] {
            let text = format!("load:bs={value}");
            let command = Command::parse(&text);
            let refused = matches!(command.number("bs", 1), Err(ArgumentError::NotANumber { .. }));
            assert!(refused, "{value}");
        }
    }

    #[test]
    fn a_number_outside_its_range_is_refused_and_a_default_is_not() {
        let command = Command::parse("load:depth=300");
        assert!(command.within("depth", 1, 1..=256, "1 to 256").is_err());
        assert_eq!(command.within("span", 0, 1..=256, "1 to 256"), Ok(0));
    }

    #[test]
    fn the_ending_is_exit_unless_another_is_named() {
        assert_eq!(CommandLine::new("quiet").ending(), Ok(Ending::Exit));
        assert_eq!(
            CommandLine::new("end=hang end=triple").ending(),
            Ok(Ending::TripleFault)
        );
        assert!(CommandLine::new("end=badly").ending().is_err());
    }

    #[test]
    fn a_frequency_is_read_and_a_wrong_one_is_an_error() {
        assert_eq!(CommandLine::new(LINE).number("tsc_khz"), Ok(Some(2_596_138)));
        assert_eq!(CommandLine::new("").number("tsc_khz"), Ok(None));
        assert!(CommandLine::new("tsc_khz=fast").number("tsc_khz").is_err());
    }
}
