#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

use super::super::bytes_of;
use super::*;

const NAA_6: &str = "01030010 6001405aabbccdd01122334455667788";
const NAA_5: &str = "01030008 5000c500a1b2c3d4";
const NAA_3: &str = "01030008 3000000100000001";
const EUI_64: &str = "01020008 0002c90300a1b2c3";
const UUID: &str = "010a0012 1000 00112233445566778899aabbccddeeff";
const T10: &str = "02010010 4945542020202020 3030303130303031";
const SCSI_NAME: &str = "03080014 69716e2e323032362d30312e746573743a640000";
const OF_A_PORT: &str = "01130008 5000c500a1b2c3d5";

fn page(descriptors: &[&str]) -> Vec<u8> {
    let body = bytes_of(&descriptors.concat());
    let len = u16::try_from(body.len()).unwrap();
    [&[0, 0x83], &len.to_be_bytes()[..], &body].concat()
}

fn best(descriptors: &[&str]) -> Option<String> {
    let best = Designator::best(&page(descriptors)).unwrap();
    best.map(|designator| designator.to_string())
}

#[test]
fn the_page_of_tgtd_is_read() {
    let page = bytes_of(&format!(
        "00830048020100244945542020202020{}{}01030008300000010000000101030010 60000000000000000e00000000010001",
        "3030303130303031",
        "00".repeat(20)
    ));
    let best = Designator::best(&page).unwrap().unwrap();
    assert_eq!(best.to_string(), "naa.60000000000000000e00000000010001");
}

#[test]
fn the_best_name_is_taken_in_whatever_order_they_come() {
    let ranked = [
        (NAA_6, "naa.6001405aabbccdd01122334455667788"),
        (NAA_5, "naa.5000c500a1b2c3d4"),
        (EUI_64, "eui.0002c90300a1b2c3"),
        (UUID, "uuid.00112233445566778899aabbccddeeff"),
        (SCSI_NAME, "iqn.2026-01.test:d"),
        (T10, "t10.IET     00010001"),
        (NAA_3, "naa.3000000100000001"),
    ];
    for from in 0..ranked.len() {
        let (_, rest) = ranked.split_at(from);
        let mut descriptors: Vec<&str> = rest.iter().map(|(bytes, _)| *bytes).collect();
        let expected = rest.first().map(|(_, name)| (*name).to_owned());
        assert_eq!(best(&descriptors), expected);
        descriptors.reverse();
        assert_eq!(best(&descriptors), expected);
    }
}

#[test]
fn names_of_ports_and_names_that_were_never_given_are_none() {
    assert_eq!(best(&[OF_A_PORT]), None);
    assert_eq!(best(&["01030010", &"00".repeat(16)]), None);
    assert_eq!(best(&["02010008", &"20".repeat(8)]), None);
    assert_eq!(best(&["0103000460014050"]), None);
    assert_eq!(best(&[]), None);
}

#[test]
fn a_name_that_was_cut_off_is_none() {
    let whole = page(&[T10, NAA_6]);
    let cut = whole.split_at(whole.len() - 1).0;
    let best = Designator::best(cut).unwrap().unwrap();
    assert_eq!(best.to_string(), "t10.IET     00010001");
}

#[test]
fn the_same_bytes_of_another_kind_are_another_identity() {
    let identity = |descriptor: &str| {
        Designator::best(&page(&[descriptor]))
            .unwrap()
            .unwrap()
            .identity()
    };
    assert_ne!(identity("01020008 5000c500a1b2c3d4"), identity(NAA_5));
    assert_eq!(identity(NAA_5), bytes_of("03 5000c500a1b2c3d4"));
}
