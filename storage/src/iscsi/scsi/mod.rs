//! What is said to a logical unit and what it answers: the parts of SPC-4 and SBC-3 that a disk needs, without I/O.
//!
//! Sections are those of SPC-4 revision 36 and SBC-3 revision 35. What a unit sends is read whatever it is: a field
//! that is not there counts as its standard says, and what cannot do without it is a [`parameter::ParameterError`].

pub mod capacity;
pub mod cdb;
pub mod designator;
pub mod inquiry;
pub mod luns;
pub mod mode;
pub mod parameter;
pub mod reservation;
pub mod sense;
pub mod vpd;

/// The bytes that pairs of hexadecimal digits stand for.
#[cfg(test)]
fn bytes_of(hex: &str) -> Vec<u8> {
    let digits: String = hex.split_whitespace().collect();
    let pairs = digits.as_bytes().chunks(2).map(String::from_utf8_lossy);
    pairs
        .map(|pair| u8::from_str_radix(&pair, 16).expect("the test's own digits"))
        .collect()
}
