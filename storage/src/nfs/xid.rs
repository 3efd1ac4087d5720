//! Numbers of calls, which say of their replies what they are before they are read.

/// The number of a call: a serial number, the slot that it was made in, and whether it is a READ.
///
/// ```text
///   serial (23 bits) | slot (8) | READ (1)
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Xid(pub(super) u32);

/// So many slots can be told apart.
pub(super) const SLOTS_MAX: usize = 1 << SLOT_BITS;

const SLOT_BITS: u32 = 8;
const READ: u32 = 1;

impl Xid {
    pub(super) fn new(serial: u32, slot: usize, is_read: bool) -> Self {
        let slot = u32::try_from(slot % SLOTS_MAX).expect("it is below 2^8");
        Self(serial << (SLOT_BITS + 1) | slot << 1 | u32::from(is_read))
    }

    /// Whether its reply may carry data for a request.
    pub(super) fn is_of_read(self) -> bool {
        self.0 & READ != 0
    }

    /// The slot.
    pub(super) fn slot(self) -> usize {
        usize::try_from(self.0 >> 1).expect("this is a 64-bit monitor") % SLOTS_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_tells_its_slot_and_whether_it_is_a_read() {
        for (serial, slot, is_read) in [(0, 0, false), (7, 255, true), (u32::MAX, 64, false)] {
            let xid = Xid::new(serial, slot, is_read);
            assert_eq!((xid.slot(), xid.is_of_read()), (slot, is_read));
        }
        assert_ne!(Xid::new(1, 2, true), Xid::new(2, 2, true));
    }
}
