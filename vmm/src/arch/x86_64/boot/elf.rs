//! An ELF kernel: its segments into memory, its entry by PVH note or by header.

use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::image::Image;
use super::{BootError, BootProtocol, Entry, EntryMode, Kernel, cmdline, layout};
use crate::memory::low_memory_end;

/// Kernels have five; this only bounds the work on a damaged file.
const PROGRAM_HEADERS_MAX: u16 = 128;
/// Kernels have a few hundred bytes of notes.
const NOTES_BYTES_MAX: u64 = 64 << 10;

const HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;

/// Type of the note that holds the 32-bit physical entry, under the name `Xen`
/// (Xen's `elfnote.h`, `XEN_ELFNOTE_PHYS32_ENTRY`).
const NOTE_PHYS32_ENTRY: u32 = 18;

/// Copies the segments to their physical addresses and picks the entry that `protocol` asks for.
pub(super) fn load(
    memory: &GuestMemoryMmap,
    image: &Image<'_>,
    protocol: BootProtocol,
) -> Result<Kernel, BootError> {
    let header: [u8; HEADER_BYTES] = image.read(0).map_err(|_| BootError::Damaged {
        what: format!("ELF header is cut off at {} bytes", image.len_bytes),
    })?;
    let segments = program_headers(image, &header)?;
    let loaded: Vec<&Segment> = segments
        .iter()
        .filter(|s| s.kind == PT_LOAD && s.memory_bytes > 0)
        .collect();
    let memory_end = low_memory_end(memory).0;
    for segment in &loaded {
        segment.check(image, memory_end)?;
    }
    let entry = choose_entry(image, &segments, field(&header, 24), protocol)?;
    if !loaded.iter().any(|segment| segment.contains(entry.address.0)) {
        return Err(BootError::Damaged {
            what: format!("entry point {:#x} lies outside of every segment", entry.address.0),
        });
    }
    for segment in &loaded {
        let size = usize::try_from(segment.file_bytes).expect("checked against the file's length");
        // The rest up to memory_bytes is zero: guest memory is fresh.
        image.copy(memory, GuestAddress(segment.address), segment.offset, size)?;
    }
    Ok(Kernel {
        entry,
        end: loaded.iter().map(|segment| segment.end()).max().unwrap_or(0),
        initrd_last: u64::from(u32::MAX),
        cmdline_bytes_max: cmdline::BYTES_MAX,
        header: None,
    })
}

#[derive(Debug)]
struct Segment {
    kind: u32,
    offset: u64,
    address: u64,
    file_bytes: u64,
    memory_bytes: u64,
}

impl Segment {
    fn parse(bytes: &[u8; PROGRAM_HEADER_BYTES]) -> Segment {
        Segment {
            kind: word(bytes, 0),
            offset: field(bytes, 8),
            address: field(bytes, 24),
            file_bytes: field(bytes, 32),
            memory_bytes: field(bytes, 40),
        }
    }

    fn end(&self) -> u64 {
        self.address.saturating_add(self.memory_bytes)
    }

    fn contains(&self, address: u64) -> bool {
        (self.address..self.end()).contains(&address)
    }

    fn check(&self, image: &Image<'_>, memory_end: u64) -> Result<(), BootError> {
        let Segment {
            offset,
            address,
            file_bytes,
            memory_bytes,
            ..
        } = *self;
        if file_bytes > memory_bytes {
            let what = format!("segment at {address:#x} has {file_bytes} bytes for {memory_bytes} of memory");
            return Err(BootError::Damaged { what });
        }
        if offset
            .checked_add(file_bytes)
            .is_none_or(|end| end > image.len_bytes)
        {
            let what = format!(
                "segment at {address:#x} takes {file_bytes} bytes at offset {offset}, but the file has {}",
                image.len_bytes
            );
            return Err(BootError::Damaged { what });
        }
        if address < layout::HIGH_LOAD_START.0 {
            return Err(BootError::TooLow { start: address });
        }
        if self.end() > memory_end {
            return Err(BootError::KernelTooLarge {
                start: address,
                end: self.end(),
                memory_end,
            });
        }
        Ok(())
    }
}

fn program_headers(image: &Image<'_>, header: &[u8; HEADER_BYTES]) -> Result<Vec<Segment>, BootError> {
    let offset = field(header, 32);
    let size = half(header, 54);
    let count = half(header, 56);
    if usize::from(size) != PROGRAM_HEADER_BYTES || count == 0 || count > PROGRAM_HEADERS_MAX {
        let what = format!("ELF header announces {count} program headers of {size} bytes");
        return Err(BootError::Damaged { what });
    }
    let mut segments = Vec::with_capacity(usize::from(count));
    for index in 0..u64::from(count) {
        let at = offset.checked_add(index * PROGRAM_HEADER_BYTES as u64);
        let bytes = at.and_then(|at| image.read(at).ok());
        let bytes = bytes.ok_or_else(|| BootError::Damaged {
            what: format!("program header {index} is cut off"),
        })?;
        segments.push(Segment::parse(&bytes));
    }
    Ok(segments)
}

fn choose_entry(
    image: &Image<'_>,
    segments: &[Segment],
    linux_entry: u64,
    protocol: BootProtocol,
) -> Result<Entry, BootError> {
    let linux64 = Entry {
        address: GuestAddress(linux_entry),
        mode: EntryMode::Linux64,
    };
    match protocol {
        BootProtocol::Auto => Ok(pvh_entry(image, segments)?.unwrap_or(linux64)),
        BootProtocol::Pvh => pvh_entry(image, segments)?.ok_or(BootError::NoPvhEntry),
        BootProtocol::Linux64 => Ok(linux64),
    }
}

/// The first PVH entry among the notes of the file.
fn pvh_entry(image: &Image<'_>, segments: &[Segment]) -> Result<Option<Entry>, BootError> {
    for segment in segments.iter().filter(|segment| segment.kind == PT_NOTE) {
        if let Some(address) = find_phys32_entry(&read_notes(image, segment)?) {
            return Ok(Some(Entry {
                address: GuestAddress(address.into()),
                mode: EntryMode::Pvh,
            }));
        }
    }
    Ok(None)
}

fn read_notes(image: &Image<'_>, segment: &Segment) -> Result<Vec<u8>, BootError> {
    let size_bytes = segment.file_bytes;
    if size_bytes > NOTES_BYTES_MAX {
        let what = format!("notes take {size_bytes} bytes, more than {NOTES_BYTES_MAX}");
        return Err(BootError::Damaged { what });
    }
    let mut notes = vec![0; usize::try_from(size_bytes).expect("at most NOTES_BYTES_MAX")];
    image
        .read_into(&mut notes, segment.offset)
        .map_err(|_| BootError::Damaged {
            what: "notes are cut off".into(),
        })?;
    Ok(notes)
}

/// Walks notes: name length, descriptor length, type, then name and descriptor, each padded to
/// four bytes. Whatever does not parse ends the walk.
fn find_phys32_entry(mut notes: &[u8]) -> Option<u32> {
    loop {
        let (head, rest) = notes.split_first_chunk::<12>()?;
        let name_bytes = usize::try_from(word(head, 0)).ok()?;
        let descriptor_bytes = usize::try_from(word(head, 4)).ok()?;
        let (name, rest) = rest.split_at_checked(name_bytes.next_multiple_of(4))?;
        if word(head, 8) == NOTE_PHYS32_ENTRY && name_bytes == 4 && name == b"Xen\0" {
            return rest.first_chunk().map(|address| u32::from_le_bytes(*address));
        }
        notes = rest.get(descriptor_bytes.next_multiple_of(4)..)?;
    }
}

fn half<const N: usize>(bytes: &[u8; N], at: usize) -> u16 {
    u16::from_le_bytes(array(bytes, at))
}

fn word<const N: usize>(bytes: &[u8; N], at: usize) -> u32 {
    u32::from_le_bytes(array(bytes, at))
}

fn field<const N: usize>(bytes: &[u8; N], at: usize) -> u64 {
    u64::from_le_bytes(array(bytes, at))
}

fn array<const M: usize>(bytes: &[u8], at: usize) -> [u8; M] {
    let found = bytes.get(at..).and_then(|rest| rest.first_chunk());
    *found.expect("a constant offset within the structure")
}
