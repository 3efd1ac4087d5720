//! The processor's name in leaves 0x80000002 to 4: the family and, on Intel, the frequency, so that
//! a guest does not see which model of a fleet it is on.

use super::{Cpuid, Host};

/// Leaves of four registers of four bytes.
const LEAVES: [u32; 3] = [0x8000_0002, 0x8000_0003, 0x8000_0004];
/// Room for 47 characters and a zero.
const BYTES: usize = 48;

pub(super) const AMD: &str = "AMD EPYC";
const INTEL: &str = "Intel(R) Xeon(R) Processor";

/// Intel's name with the frequency that the host's name ends in, if it does.
pub(super) fn intel(host: Host<'_>) -> String {
    let name: Vec<u8> = LEAVES
        .iter()
        .map(|leaf| host(*leaf, 0))
        .flat_map(|leaf| [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx])
        .flat_map(u32::to_le_bytes)
        .collect();
    let name = String::from_utf8_lossy(&name);
    match name.trim_end_matches(['\0', ' ']).rsplit(' ').next() {
        Some(last) if is_frequency(last) && INTEL.len() + 3 + last.len() < BYTES => {
            format!("{INTEL} @ {last}")
        }
        _ => INTEL.to_owned(),
    }
}

fn is_frequency(word: &str) -> bool {
    let number = ["MHz", "GHz", "THz"]
        .iter()
        .find_map(|unit| word.strip_suffix(unit));
    number.is_some_and(|number| number.parse::<f32>().is_ok())
}

/// Writes `name`, padded with zeros, into the leaves that the guest has.
pub(super) fn set(cpuid: &mut Cpuid, name: &str) {
    let mut words = name.as_bytes().chunks(4).map(|chunk| {
        let mut word = [0; 4];
        word.iter_mut().zip(chunk).for_each(|(to, from)| *to = *from);
        u32::from_le_bytes(word)
    });
    for leaf in LEAVES {
        let mut next = || words.next().unwrap_or(0);
        let registers = (next(), next(), next(), next());
        if let Some(entry) = cpuid.find_mut(leaf, 0) {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = registers;
        }
    }
}
