//! The guest's RAM: pieces that live as long as the guest, pieces that live as long as a command, and the rest.

#![expect(
    unsafe_code,
    reason = "turns free addresses into memory, and maps what lies above 4 GiB"
)]

use core::fmt;
use core::ops::{Deref, DerefMut};
use core::slice;

use instrument::width::size;

/// A range of guest-physical addresses, which are also its virtual ones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Region {
    /// The first byte.
    pub base: u64,
    /// One beyond the last byte.
    pub end: u64,
}

/// All RAM, and what of it is taken.
#[derive(Debug)]
pub struct Memory {
    regions: [Region; REGIONS_MAX],
    /// Free memory for what lives as long as the guest: rings, requests.
    lasting: Region,
    /// Free memory for one command, and all of it.
    passing: Region,
    passing_whole: Region,
    high_is_mapped: bool,
}

/// A piece of RAM of its own, zeroed when it was made, aligned to a page.
#[derive(Debug)]
pub struct Buffer {
    base: u64,
    bytes: usize,
}

/// A value of its own in RAM: a box.
#[derive(Debug)]
pub struct Held<T>(*mut T);

/// Pages that nobody uses, numbered across the pieces of RAM that they lie in.
#[derive(Debug)]
pub struct FreePages {
    regions: [Region; REGIONS_MAX + 1],
}

/// There is not enough RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfMemory {
    wanted_bytes: u64,
    free_bytes: u64,
}

const REGIONS_MAX: usize = 16;
/// Of the RAM behind the image, for what lives as long as the guest.
const LASTING_BYTES: u64 = 4 << 20;
const PAGE_BYTES: u64 = 4096;
const LARGE_PAGE_BYTES: u64 = 2 << 20;
const GIB: u64 = 1 << 30;
const LOW_END: u64 = 4 << 30;
/// What one level-3 table maps.
const MAPPABLE_END: u64 = 512 << 30;
/// Present, writable, CPL 3, accessed, dirty; large page.
const TABLE_BITS: u64 = 0x67;
const LARGE_PAGE_BITS: u64 = 0xe7;

unsafe extern "C" {
    static image_end: u8;
    static mut page_directory_pointers: [u64; 512];
}

impl fmt::Display for OutOfMemory {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            out,
            "{} bytes of guest memory wanted, {} free",
            self.wanted_bytes, self.free_bytes
        )
    }
}

impl Memory {
    /// The RAM of `ram`, of which the first 16 pieces count. The image lies in one of them.
    pub fn new(ram: impl Iterator<Item = Region>) -> Self {
        let mut regions = [Region::default(); REGIONS_MAX];
        for (slot, region) in regions.iter_mut().zip(ram) {
            *slot = Region {
                base: region.base.next_multiple_of(PAGE_BYTES),
                end: region.end.min(MAPPABLE_END) & !(PAGE_BYTES - 1),
            };
        }
        let image = (&raw const image_end).addr() as u64;
        let end = regions
            .iter()
            .find(|region| region.contains(image))
            .map_or(image, |region| region.end);
        let split = end.min(image + LASTING_BYTES);
        Self {
            regions,
            lasting: Region {
                base: image,
                end: split,
            },
            passing: Region { base: split, end },
            passing_whole: Region { base: split, end },
            high_is_mapped: false,
        }
    }

    /// All RAM in bytes.
    pub fn total_bytes(&self) -> u64 {
        self.regions.iter().map(|region| region.bytes()).sum()
    }

    /// Takes the last `bytes` of the piece of RAM that the image lies in, until the next [`Self::release`]; returns
    /// their end, which is that of RAM below 4 GiB.
    pub fn take_end(&mut self, bytes: u64) -> Result<u64, OutOfMemory> {
        if bytes > self.passing.bytes() {
            return Err(OutOfMemory {
                wanted_bytes: bytes,
                free_bytes: self.passing.bytes(),
            });
        }
        let end = self.passing.end;
        self.passing.end -= bytes;
        Ok(end)
    }

    /// Memory for as long as the guest lives.
    pub fn allocate_lasting(&mut self, bytes: usize) -> Result<Buffer, OutOfMemory> {
        self.lasting.take(bytes)
    }

    /// Memory until the next [`Self::release`].
    pub fn allocate(&mut self, bytes: usize) -> Result<Buffer, OutOfMemory> {
        self.passing.take(bytes)
    }

    /// Moves a value that is too large for a stack into memory until the next [`Self::release`].
    pub fn hold<T>(&mut self, value: T) -> Result<Held<T>, OutOfMemory> {
        let place = self.allocate(size_of::<T>())?.address() as *mut T;
        // SAFETY: the memory is large enough, and aligned to a page.
        unsafe { place.write(value) };
        Ok(Held(place))
    }

    /// Forgets what [`Self::allocate`] gave: the commands before have ended.
    pub fn release(&mut self) {
        self.passing = self.passing_whole;
    }

    /// The free RAM, that above 4 GiB mapped: the same pages at the start of every command.
    pub fn free(&mut self) -> Result<FreePages, OutOfMemory> {
        if !self.high_is_mapped {
            self.map_high()?;
            self.high_is_mapped = true;
        }
        let high = self.regions.into_iter().filter(|region| region.base >= LOW_END);
        let mut regions = [Region::default(); REGIONS_MAX + 1];
        for (slot, region) in regions.iter_mut().zip(core::iter::once(self.passing).chain(high)) {
            *slot = region;
        }
        Ok(FreePages { regions })
    }

    /// Maps the RAM above 4 GiB in large pages.
    fn map_high(&mut self) -> Result<(), OutOfMemory> {
        for region in self.regions {
            self.map(region)?;
        }
        Ok(())
    }

    /// Maps what of a region lies above 4 GiB, and below 512 GiB, in large pages; whether it is RAM is the caller's to know.
    pub fn map(&mut self, region: Region) -> Result<(), OutOfMemory> {
        let region = Region {
            base: region.base,
            end: region.end.min(MAPPABLE_END),
        };
        let mut gib = region.base.max(LOW_END) & !(GIB - 1);
        while gib < region.end {
            let table = self.directory(gib)?;
            let start = region.base.max(gib) & !(LARGE_PAGE_BYTES - 1);
            let end = region.end.min(gib + GIB);
            for page in (start..end).step_by(size(LARGE_PAGE_BYTES)) {
                let slot = table.wrapping_add(size((page - gib) / LARGE_PAGE_BYTES));
                // SAFETY: the page lies in this GiB, so the slot lies in its table.
                unsafe { slot.write_volatile(page | LARGE_PAGE_BITS) };
            }
            gib += GIB;
        }
        Ok(())
    }

    /// The level-2 table of a GiB, made if there is none.
    fn directory(&mut self, gib: u64) -> Result<*mut u64, OutOfMemory> {
        let slot = (&raw mut page_directory_pointers)
            .cast::<u64>()
            .wrapping_add(size(gib / GIB));
        // SAFETY: regions end below 512 GiB, so the slot lies in the table.
        let found = unsafe { slot.read_volatile() };
        if found != 0 {
            return Ok((found & !(PAGE_BYTES - 1)) as *mut u64);
        }
        let table = self.allocate_lasting(size(PAGE_BYTES))?.address();
        // SAFETY: as above; the entry was not present, so no translation of it is cached.
        unsafe { slot.write_volatile(table | TABLE_BITS) };
        Ok(table as *mut u64)
    }
}

impl Region {
    /// Its size.
    pub const fn bytes(&self) -> u64 {
        self.end.saturating_sub(self.base)
    }

    const fn contains(&self, address: u64) -> bool {
        self.base <= address && address < self.end
    }

    fn take(&mut self, bytes: usize) -> Result<Buffer, OutOfMemory> {
        let rounded = (bytes as u64).next_multiple_of(PAGE_BYTES);
        if rounded > self.bytes() {
            return Err(OutOfMemory {
                wanted_bytes: rounded,
                free_bytes: self.bytes(),
            });
        }
        let mut buffer = Buffer {
            base: self.base,
            bytes,
        };
        self.base += rounded;
        buffer.bytes_mut().fill(0);
        Ok(buffer)
    }
}

impl FreePages {
    /// How many there are.
    pub fn count(&self) -> u64 {
        self.regions
            .iter()
            .map(|region| region.bytes() / PAGE_BYTES)
            .sum()
    }

    /// The address of one of them.
    pub fn page(&self, index: u64) -> u64 {
        let mut offset = index * PAGE_BYTES;
        for region in &self.regions {
            if offset < region.bytes() {
                return region.base + offset;
            }
            offset -= region.bytes();
        }
        panic!("page {index} is not free memory")
    }
}

impl Buffer {
    /// Its address, for the CPU and for devices.
    pub const fn address(&self) -> u64 {
        self.base
    }

    /// Its bytes. Not while a device may write them.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the range was taken out of free RAM for this buffer alone.
        unsafe { slice::from_raw_parts_mut(self.base as *mut u8, self.bytes) }
    }

    /// `count` of its bytes from byte `first` on. Not while a device may write these.
    pub fn slice_mut(&mut self, first: usize, count: usize) -> &mut [u8] {
        assert!(
            first + count <= self.bytes,
            "every caller sizes its buffer for its slices"
        );
        let start = (self.base as *mut u8).wrapping_add(first);
        // SAFETY: the bytes lie in the range that was taken for this buffer alone.
        unsafe { slice::from_raw_parts_mut(start, count) }
    }

    /// `count` of its 64-bit words from word `first` on. Not while a device may write these.
    pub fn words_mut(&mut self, first: usize, count: usize) -> &mut [u64] {
        assert!(
            first + count <= self.bytes / 8,
            "every caller sizes its buffer for its words"
        );
        let start = (self.base as *mut u64).wrapping_add(first);
        // SAFETY: the words lie in the range that was taken for this buffer alone, which begins at a page.
        unsafe { slice::from_raw_parts_mut(start, count) }
    }
}

// SAFETY: the value belongs to whoever holds it, as in a box.
unsafe impl<T: Send> Send for Held<T> {}

impl<T> Held<T> {
    /// Takes the value out.
    pub fn into_inner(self) -> T {
        // SAFETY: it was written when it was held, and is not read again.
        unsafe { self.0.read() }
    }
}

impl<T> Deref for Held<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: the value was written when it was held, and only its holder refers to it.
        unsafe { &*self.0 }
    }
}

impl<T> DerefMut for Held<T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: the value was written when it was held, and only its holder refers to it.
        unsafe { &mut *self.0 }
    }
}
