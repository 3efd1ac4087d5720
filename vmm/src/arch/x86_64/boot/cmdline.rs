//! The kernel's command line: what the user gave, what the machine adds, in the right order.

use std::ffi::{CStr, CString};
use std::fmt::Write;

use crate::arch::x86_64::layout::{VIRTIO_MMIO_BYTES, VirtioWindow};

/// Firecracker's arguments for a user who gives none.
pub const DEFAULT: &str = "reboot=k panic=1 nomodule 8250.nr_uarts=0 i8042.noaux i8042.nomux \
                           i8042.dumbkbd swiotlb=noforce";

/// With the final zero byte; Linux's COMMAND_LINE_SIZE on x86 is 2048.
pub const BYTES_MAX: usize = 2048;

/// Everything after this word belongs to init, not to the kernel.
const INIT_ARGUMENTS: &str = " -- ";

/// Why a command line cannot be handed over.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the text of an error is its documentation")]
pub enum CmdlineError {
    #[error(
        "the kernel command line has {bytes} bytes with what the machine adds, and this kernel takes \
         {bytes_max}: shorten `boot_args`"
    )]
    TooLong { bytes: usize, bytes_max: usize },
    #[error("the kernel command line holds a zero byte at {at}")]
    ZeroByte { at: usize },
}

/// A file system root that the machine names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Root<'a> {
    /// Which device it is on.
    pub device: RootDevice<'a>,
    /// How it is mounted.
    pub access: RootAccess,
}

/// The device of a root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RootDevice<'a> {
    /// The first disk.
    Disk,
    /// A partition of the root disk.
    Partition(&'a str),
    /// Persistent memory, by its number.
    Pmem(usize),
}

/// How the kernel mounts its root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RootAccess {
    /// `ro`
    ReadOnly,
    /// `rw`
    ReadWrite,
}

/// A complete, bounded command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cmdline(CString);

impl Cmdline {
    /// Composes `arguments` (or [`DEFAULT`]), the root and the devices; what followed ` -- `
    /// stays at the end.
    pub fn compose(
        arguments: Option<&str>,
        root: Option<Root<'_>>,
        devices: &[VirtioWindow],
    ) -> Result<Cmdline, CmdlineError> {
        let given = arguments.unwrap_or(DEFAULT).trim();
        let (kernel, init) = split_init(given);
        let mut text = String::from(kernel);
        if let Some(root) = root {
            push_root(&mut text, root);
        }
        for device in devices {
            let kib = VIRTIO_MMIO_BYTES >> 10;
            write!(
                text,
                " virtio_mmio.device={kib}K@{:#x}:{}",
                device.address, device.irq
            )
            .expect("a String takes everything");
        }
        text.push(' ');
        text.push_str(init.trim_start());
        let text = text.trim();
        let line = CString::new(text).map_err(|error| CmdlineError::ZeroByte {
            at: error.nul_position(),
        })?;
        let line = Cmdline(line);
        line.check_length(BYTES_MAX)?;
        Ok(line)
    }

    /// The text.
    pub fn as_c_str(&self) -> &CStr {
        &self.0
    }

    /// The text with its final zero.
    pub(super) fn as_c_bytes(&self) -> &[u8] {
        self.0.as_bytes_with_nul()
    }

    /// Refuses a line longer than `bytes_max`, the final zero counted.
    pub(super) fn check_length(&self, bytes_max: usize) -> Result<(), CmdlineError> {
        match self.as_c_bytes().len() {
            bytes if bytes > bytes_max => Err(CmdlineError::TooLong { bytes, bytes_max }),
            _ => Ok(()),
        }
    }
}

/// Splits before the `--` that ends the kernel's own arguments, also where it stands at an end.
fn split_init(given: &str) -> (&str, &str) {
    let at = if given == "--" || given.starts_with("-- ") {
        Some(0)
    } else {
        given
            .find(INIT_ARGUMENTS)
            .or_else(|| given.strip_suffix(" --").map(str::len))
    };
    given.split_at(at.unwrap_or(given.len()))
}

fn push_root(text: &mut String, root: Root<'_>) {
    match root.device {
        RootDevice::Partition(partuuid) => write!(text, " root=PARTUUID={partuuid}"),
        RootDevice::Disk => write!(text, " root=/dev/vda"),
        RootDevice::Pmem(number) => write!(text, " root=/dev/pmem{number}"),
    }
    .expect("a String takes everything");
    text.push_str(match root.access {
        RootAccess::ReadOnly => " ro",
        RootAccess::ReadWrite => " rw",
    });
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use super::*;

    fn compose(given: Option<&str>, root: Option<Root<'_>>, devices: u32) -> String {
        let devices: Vec<_> = (0..devices).filter_map(VirtioWindow::of_device).collect();
        let line = Cmdline::compose(given, root, &devices).unwrap();
        line.as_c_str().to_str().unwrap().to_owned()
    }

    const ROOT: Root<'_> = Root {
        device: RootDevice::Disk,
        access: RootAccess::ReadWrite,
    };

    #[test]
    fn without_arguments_a_guest_gets_firecrackers() {
        assert_eq!(compose(None, None, 0), DEFAULT);
    }

    #[test]
    fn the_machine_adds_the_root_and_the_devices() {
        assert_eq!(
            compose(Some("quiet"), Some(ROOT), 2),
            "quiet root=/dev/vda rw virtio_mmio.device=4K@0xc0001000:5 virtio_mmio.device=4K@0xc0002000:6"
        );
        let partition = Root {
            device: RootDevice::Partition("0eaa91a0-01"),
            access: RootAccess::ReadOnly,
        };
        assert_eq!(
            compose(Some(""), Some(partition), 0),
            "root=PARTUUID=0eaa91a0-01 ro"
        );
        for (number, access, expected) in [
            (0, RootAccess::ReadOnly, "root=/dev/pmem0 ro"),
            (12, RootAccess::ReadWrite, "root=/dev/pmem12 rw"),
        ] {
            let device = RootDevice::Pmem(number);
            assert_eq!(compose(Some(""), Some(Root { device, access }), 0), expected);
        }
    }

    #[test]
    fn inits_arguments_stay_at_the_end() {
        let cases = [
            ("quiet -- a b", "quiet root=/dev/vda rw -- a b"),
            ("-- a -- b", "root=/dev/vda rw -- a -- b"),
            ("quiet --", "quiet root=/dev/vda rw --"),
            ("--", "root=/dev/vda rw --"),
            ("x--y --z=1", "x--y --z=1 root=/dev/vda rw"),
        ];
        for (given, expected) in cases {
            assert_eq!(compose(Some(given), Some(ROOT), 0), expected);
        }
    }

    #[test]
    fn a_line_of_exactly_the_limit_is_taken() {
        let longest = "x".repeat(BYTES_MAX - 1);
        assert!(Cmdline::compose(Some(&longest), None, &[]).is_ok());
        let longer = "x".repeat(BYTES_MAX);
        let refused = Cmdline::compose(Some(&longer), None, &[]);
        assert_eq!(
            refused,
            Err(CmdlineError::TooLong {
                bytes: BYTES_MAX + 1,
                bytes_max: BYTES_MAX
            })
        );
    }

    #[test]
    fn a_zero_byte_is_refused() {
        let refused = Cmdline::compose(Some("quiet\0rw"), None, &[]);
        assert_eq!(refused, Err(CmdlineError::ZeroByte { at: 5 }));
    }
}
