//! How many vCPUs ACPI's tables describe (ACPI 6.5, sections 5.2.5 to 5.2.12).

/// Reads physical memory: as many bytes from an address on, or `None` where there are none.
pub type Reader<'a, 'b> = &'b dyn Fn(u64, usize) -> Option<&'a [u8]>;

/// Where firmware leaves the root pointer when nobody says where it is.
const SEARCH_BASE: u64 = 0xe_0000;
const SEARCH_END: u64 = 0x10_0000;
const SEARCH_STEP: usize = 16;
/// The root pointer of version 2; the XSDT's address is at 24.
const ROOT_BYTES: usize = 36;
const ROOT_XSDT: usize = 24;
/// The header of every table; its length is at 4.
const HEADER_BYTES: usize = 36;
const HEADER_LENGTH: usize = 4;
/// A longer table is taken for garbage.
const TABLE_BYTES_MAX: usize = 1 << 20;
/// The MADT's first entry.
const MADT_ENTRIES: usize = 44;
/// A local APIC's entry, and that of one with a long identifier: kind, and where the flags are.
const LOCAL_APIC: (u8, usize) = (0, 4);
const LOCAL_X2APIC: (u8, usize) = (9, 8);
const ENABLED: u8 = 1;

/// The number of enabled vCPUs; `None` where there are no tables, or none that make sense.
#[must_use]
pub fn vcpus(root: u64, read: Reader<'_, '_>) -> Option<usize> {
    let root = if root == 0 { search(read)? } else { root };
    let xsdt_address = u64_at(root_at(root, read)?, ROOT_XSDT)?;
    let xsdt = table(xsdt_address, *b"XSDT", read)?;
    let madt = xsdt
        .get(HEADER_BYTES..)?
        .chunks_exact(8)
        .filter_map(|entry| u64_at(entry, 0))
        .find_map(|address| table(address, *b"APIC", read))?;
    Some(enabled(madt.get(MADT_ENTRIES..)?))
}

fn search(read: Reader<'_, '_>) -> Option<u64> {
    (SEARCH_BASE..SEARCH_END)
        .step_by(SEARCH_STEP)
        .find(|&address| root_at(address, read).is_some())
}

fn root_at<'a>(address: u64, read: Reader<'a, '_>) -> Option<&'a [u8]> {
    let root = read(address, ROOT_BYTES)?;
    (root.starts_with(b"RSD PTR ") && sum(root) == 0).then_some(root)
}

/// The table at `address`, if it is of this kind and its checksum is right.
fn table<'a>(address: u64, signature: [u8; 4], read: Reader<'a, '_>) -> Option<&'a [u8]> {
    let header = read(address, HEADER_BYTES)?;
    let length = usize::try_from(u32_at(header, HEADER_LENGTH)?).ok()?;
    if !header.starts_with(&signature) || !(HEADER_BYTES..=TABLE_BYTES_MAX).contains(&length) {
        return None;
    }
    read(address, length).filter(|table| sum(table) == 0)
}

/// Counts the enabled local APICs among a MADT's entries.
fn enabled(mut entries: &[u8]) -> usize {
    let mut count = 0;
    while let [kind, length, ..] = *entries {
        let Some((entry, rest)) = entries.split_at_checked(usize::from(length).max(2)) else {
            break;
        };
        let flags = [LOCAL_APIC, LOCAL_X2APIC]
            .into_iter()
            .find(|(wanted, _)| *wanted == kind);
        if let Some(byte) = flags.and_then(|(_, offset)| entry.get(offset)) {
            count += usize::from(byte & ENABLED != 0);
        }
        entries = rest;
    }
    count
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    bytes
        .get(offset..)?
        .first_chunk()
        .map(|chunk| u32::from_le_bytes(*chunk))
}

fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    bytes
        .get(offset..)?
        .first_chunk()
        .map(|chunk| u64::from_le_bytes(*chunk))
}

#[cfg(test)]
#[expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test's panic is its failure"
)]
mod tests {
    use super::*;

    const BASE: u64 = SEARCH_BASE;

    /// Writes a table with its length and checksum.
    fn put(image: &mut [u8], offset: usize, signature: &[u8], body: &[u8]) {
        let length = HEADER_BYTES + body.len();
        image[offset..offset + signature.len()].copy_from_slice(signature);
        image[offset + 4..offset + 8].copy_from_slice(&u32::try_from(length).unwrap().to_le_bytes());
        image[offset + HEADER_BYTES..offset + length].copy_from_slice(body);
        image[offset + 9] = 0u8.wrapping_sub(sum(&image[offset..offset + length]));
    }

    /// Root pointer at 0x40, XSDT at 0x100, a table of another kind at 0x200, MADT at 0x300.
    fn image() -> Vec<u8> {
        let mut image = vec![0; 0x1000];
        let mut madt = vec![0; MADT_ENTRIES - HEADER_BYTES];
        madt.extend([0, 8, 0, 0, 1, 0, 0, 0]);
        madt.extend([1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]);
        madt.extend([0, 8, 1, 1, 1, 0, 0, 0]);
        madt.extend([0, 8, 2, 2, 0, 0, 0, 0]);
        madt.extend([9, 16, 0, 0, 3, 0, 0, 0, 1, 0, 0, 0, 3, 0, 0, 0]);
        put(&mut image, 0x300, b"APIC", &madt);
        put(&mut image, 0x200, b"FACP", &[0; 20]);
        let tables: Vec<u8> = [BASE + 0x200, BASE + 0x300]
            .iter()
            .flat_map(|table| table.to_le_bytes())
            .collect();
        put(&mut image, 0x100, b"XSDT", &tables);
        image[0x40..0x48].copy_from_slice(b"RSD PTR ");
        image[0x58..0x60].copy_from_slice(&(BASE + 0x100).to_le_bytes());
        image[0x60] = 0u8.wrapping_sub(sum(&image[0x40..0x64]));
        image
    }

    fn count(image: &[u8], root: u64) -> Option<usize> {
        vcpus(root, &|address, bytes| {
            let start = usize::try_from(address.checked_sub(BASE)?).ok()?;
            image.get(start..start.checked_add(bytes)?)
        })
    }

    #[test]
    fn enabled_local_apics_of_both_kinds_are_counted() {
        assert_eq!(count(&image(), BASE + 0x40), Some(3));
    }

    #[test]
    fn a_root_pointer_that_nobody_named_is_found() {
        assert_eq!(count(&image(), 0), Some(3));
    }

    #[test]
    fn damaged_tables_are_none() {
        for broken in [0x44, 0x120, 0x310] {
            let mut image = image();
            image[broken] ^= 1;
            assert_eq!(count(&image, BASE + 0x40), None, "{broken:#x}");
        }
        assert_eq!(count(&[], 0), None);
    }

    #[test]
    fn garbage_in_every_byte_never_panics() {
        for position in 0x40..0x380 {
            for value in [0, 1, 0x7f, 0xff] {
                let mut image = image();
                image[position] = value;
                let _ = count(&image, BASE + 0x40);
                let entries = image.get(0x300 + MADT_ENTRIES..0x380).unwrap();
                assert!(enabled(entries) <= entries.len() / 2);
            }
        }
    }
}
