//! What the machine boots.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::arch::x86_64::boot::cmdline;

/// Longest command line, in bytes without the final zero: what x86 kernels take.
pub const BOOT_ARGS_BYTES_MAX: usize = cmdline::BYTES_MAX - 1;

/// Command line of a boot source that sets none.
pub const BOOT_ARGS_DEFAULT: &str = cmdline::DEFAULT;

/// The body of `PUT /boot-source`: kernel, initrd and command line.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    /// The kernel: an ELF `vmlinux` or a bzImage.
    pub kernel_image_path: String,
    /// An initial file system for the kernel; none by default.
    pub initrd_path: Option<String>,
    /// The kernel's command line.
    pub boot_args: Option<String>,
    /// How the kernel is entered. (Not in Firecracker.)
    #[serde(default, skip_serializing_if = "BootProtocol::is_default")]
    pub boot_protocol: BootProtocol,
}

/// How the kernel is entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum BootProtocol {
    /// Through PVH if the kernel has its note, else through the 64-bit Linux protocol.
    #[default]
    Auto,
    /// Through the entry that the kernel's PVH note names.
    Pvh,
    /// Through the 64-bit Linux boot protocol.
    Linux64,
}

impl BootProtocol {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl BootSource {
    /// The command line: what was asked for, or the default.
    pub fn boot_args(&self) -> &str {
        self.boot_args.as_deref().unwrap_or(BOOT_ARGS_DEFAULT)
    }

    /// Checks what can be known without opening a file.
    ///
    /// # Errors
    ///
    /// The first rule that is broken.
    pub fn checked(self) -> Result<Self, BootSourceError> {
        if self.kernel_image_path.is_empty() {
            return Err(BootSourceError::NoKernel);
        }
        let args = self.boot_args();
        if args.len() > BOOT_ARGS_BYTES_MAX {
            return Err(BootSourceError::ArgsLength { bytes: args.len() });
        }
        match args.chars().find(|c| !matches!(c, ' '..='~')) {
            Some(character) => Err(BootSourceError::ArgsCharacter { character }),
            None => Ok(self),
        }
    }

    /// Opens kernel and initrd.
    ///
    /// # Errors
    ///
    /// The one that cannot be opened, and what to do about it.
    pub fn open(&self) -> Result<(File, Option<File>), BootSourceError> {
        let kernel = open(&self.kernel_image_path).map_err(|source| BootSourceError::Kernel {
            path: self.kernel_image_path.clone(),
            source,
        })?;
        let initrd = self.initrd_path.as_ref().map(|path| {
            open(path).map_err(|source| BootSourceError::Initrd {
                path: path.clone(),
                source,
            })
        });
        Ok((kernel, initrd.transpose()?))
    }
}

fn open(path: &str) -> io::Result<File> {
    // Opening a FIFO would wait for its writer.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    // Other kinds have no size to go by, or none that means anything: a directory's is 2^63 - 1.
    let kind = file.metadata()?.file_type();
    if kind.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    if !kind.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    Ok(file)
}

/// Why a boot source is refused.
#[derive(Debug, thiserror::Error)]
pub enum BootSourceError {
    /// An empty path.
    #[error("Boot source error: kernel_image_path is empty; name a vmlinux or a bzImage")]
    NoKernel,
    /// Kernel missing or not readable.
    #[error("Boot source error: cannot open the kernel `{path}`; check the path and its permissions")]
    Kernel {
        /// As asked.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// Initrd missing or not readable.
    #[error("Boot source error: cannot open the initrd `{path}`; check the path and its permissions")]
    Initrd {
        /// As asked.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// Command line too long.
    #[error("Boot source error: boot_args has {bytes} bytes; shorten it to at most {BOOT_ARGS_BYTES_MAX}")]
    ArgsLength {
        /// Its length.
        bytes: usize,
    },
    /// A character that a command line cannot have.
    #[error("Boot source error: boot_args has the character {character:?}; use printable ASCII only")]
    ArgsCharacter {
        /// The first such character.
        character: char,
    },
}
