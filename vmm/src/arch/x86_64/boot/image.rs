//! A boot file: read by offset, bounded by its length, recognised by its first bytes.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::BootError;

/// Formats that boot.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Format {
    Elf,
    BzImage,
}

/// A file and its length, as it was when it was opened.
pub(super) struct Image<'a> {
    file: &'a File,
    what: &'static str,
    pub(super) len_bytes: u64,
}

impl<'a> Image<'a> {
    /// Measures `file`, which errors call `what`. A block device has a length as well.
    pub(super) fn new(file: &'a File, what: &'static str) -> Result<Image<'a>, BootError> {
        let mut seekable = file;
        let len_bytes = seekable
            .seek(SeekFrom::End(0))
            .map_err(|source| BootError::Read { what, source })?;
        Ok(Image {
            file,
            what,
            len_bytes,
        })
    }

    /// Reads exactly `N` bytes at `offset`.
    pub(super) fn read<const N: usize>(&self, offset: u64) -> Result<[u8; N], BootError> {
        let mut bytes = [0; N];
        self.read_into(&mut bytes, offset)?;
        Ok(bytes)
    }

    /// Fills `bytes` from `offset` on.
    pub(super) fn read_into(&self, bytes: &mut [u8], offset: u64) -> Result<(), BootError> {
        self.file
            .read_exact_at(bytes, offset)
            .map_err(|source| self.error(source))
    }

    /// Copies `size_bytes` at `offset` straight from the file into guest memory at `to`.
    pub(super) fn copy(
        &self,
        memory: &GuestMemoryMmap,
        to: GuestAddress,
        offset: u64,
        size_bytes: usize,
    ) -> Result<(), BootError> {
        let mut file = self.file;
        file.seek(SeekFrom::Start(offset))
            .map_err(|source| self.error(source))?;
        memory
            .read_exact_volatile_from(to, &mut file, size_bytes)
            .map_err(|source| BootError::Write {
                what: self.what,
                source,
            })
    }

    /// Recognises the format, or says what the file is instead.
    pub(super) fn format(&self) -> Result<Format, BootError> {
        let mut head = [0; HEAD_BYTES];
        let readable = self.len_bytes.min(HEAD_BYTES as u64);
        let head_len = usize::try_from(readable).expect("at most HEAD_BYTES");
        let head = head.get_mut(..head_len).expect("at most HEAD_BYTES");
        self.read_into(head, 0)?;
        recognise(head).map_err(|found| BootError::Format { found })
    }

    fn error(&self, source: io::Error) -> BootError {
        BootError::Read {
            what: self.what,
            source,
        }
    }
}

/// Enough to see a bzImage's magic number at 0x202.
const HEAD_BYTES: usize = 0x210;

const ELF_MACHINE_X86_64: u16 = 62;

fn recognise(head: &[u8]) -> Result<Format, String> {
    if head.is_empty() {
        return Err("an empty file".into());
    }
    if head.starts_with(b"\x7fELF") {
        return recognise_elf(head);
    }
    if head.get(0x202..0x206) == Some(b"HdrS") {
        return Ok(Format::BzImage);
    }
    if head.get(0x38..0x3c) == Some(b"ARM\x64") {
        return Err("an arm64 Image".into());
    }
    if head.get(0x38..0x3c) == Some(b"RSC\x05") {
        return Err("a RISC-V Image".into());
    }
    let compressed: [(&[u8], &str); 6] = [
        (b"\x1f\x8b", "gzip"),
        (b"\xfd7zXZ", "xz"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"BZh", "bzip2"),
        (b"\x04\x22\x4d\x18", "LZ4"),
        (b"\x02\x21\x4c\x18", "LZ4"),
    ];
    if let Some((_, name)) = compressed.iter().find(|(magic, _)| head.starts_with(magic)) {
        return Err(format!("compressed with {name} (decompress it first)"));
    }
    if head.starts_with(b"MZ") {
        return Err("a PE executable without a Linux header".into());
    }
    let first: Vec<String> = head.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    Err(format!(
        "of an unknown format (it starts with {})",
        first.join(" ")
    ))
}

fn recognise_elf(head: &[u8]) -> Result<Format, String> {
    match (head.get(4), head.get(5)) {
        (Some(1), _) => return Err("a 32-bit ELF file".into()),
        (Some(2), Some(2)) => return Err("a big-endian ELF file".into()),
        (Some(2), Some(1)) => {}
        _ => return Err("an ELF file of an unknown class".into()),
    }
    let half = |at: usize| {
        head.get(at..)?
            .first_chunk()
            .map(|bytes| u16::from_le_bytes(*bytes))
    };
    match half(18) {
        Some(ELF_MACHINE_X86_64) => {}
        Some(183) => return Err("an ELF file for arm64".into()),
        Some(243) => return Err("an ELF file for RISC-V".into()),
        Some(machine) => return Err(format!("an ELF file for machine {machine}")),
        None => return Err("a truncated ELF file".into()),
    }
    match half(16) {
        Some(1) => Err("an ELF object file that was never linked (perhaps a kernel module)".into()),
        _ => Ok(Format::Elf),
    }
}

#[cfg(test)]
#[expect(clippy::indexing_slicing, reason = "a test's panic is its failure")]
mod tests {
    use super::*;

    fn elf_head(class: u8, order: u8, kind: u8, machine: u8) -> Vec<u8> {
        let mut head = vec![0; 64];
        head[..4].copy_from_slice(b"\x7fELF");
        head[4] = class;
        head[5] = order;
        head[16] = kind;
        head[18] = machine;
        head
    }

    #[test]
    fn both_formats_are_recognised() {
        assert_eq!(recognise(&elf_head(2, 1, 2, 62)), Ok(Format::Elf));
        let mut bzimage = vec![0; HEAD_BYTES];
        bzimage[..2].copy_from_slice(b"MZ");
        bzimage[0x202..0x206].copy_from_slice(b"HdrS");
        assert_eq!(recognise(&bzimage), Ok(Format::BzImage));
    }

    #[test]
    fn anything_else_is_named() {
        let mut arm = vec![0; 64];
        arm[0x38..0x3c].copy_from_slice(b"ARM\x64");
        let cases = [
            (vec![], "an empty file"),
            (vec![0x1f, 0x8b, 8], "compressed with gzip"),
            (b"\x28\xb5\x2f\xfd....".to_vec(), "compressed with zstd"),
            (arm, "an arm64 Image"),
            (elf_head(1, 1, 2, 3), "a 32-bit ELF file"),
            (elf_head(2, 2, 2, 62), "a big-endian ELF file"),
            (elf_head(2, 1, 2, 183), "an ELF file for arm64"),
            (elf_head(2, 1, 1, 62), "an ELF object file"),
            (elf_head(2, 1, 2, 62)[..10].to_vec(), "a truncated ELF file"),
            (b"MZ".to_vec(), "a PE executable"),
            (
                b"#!/bin/sh\n".to_vec(),
                "(it starts with 23 21 2f 62 69 6e 2f 73)",
            ),
        ];
        for (head, expected) in cases {
            let found = recognise(&head).expect_err(expected);
            assert!(found.contains(expected), "{found} should say {expected}");
        }
    }
}
