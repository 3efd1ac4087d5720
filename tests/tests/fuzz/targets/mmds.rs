//! The metadata service: what comes as the bytes of requests, and what comes as frames.
//!
//! An input of frames is how the guest sends them, one after the other:
//!
//! | bytes | |
//! |---|---|
//! | 1 | bit 0: a whole frame follows, behind its addresses; bit 1: it takes what is there; bits 2 to 7: half seconds that pass |
//! | 1 | length of what follows |
//! | … | or else a segment: flags, the low byte of the port, how far its number is from the next one, and what it carries |

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use coracle_devices::mmds::{Answer, Mmds, MmdsVersion, Stack, answer};
use serde_json::json;

use super::Input;

const SERVICE: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
const GUEST: [u8; 4] = [172, 16, 0, 2];
const SYN: u8 = 2;
/// More would be of a guest that takes nothing.
const FRAMES_KEPT_MAX: usize = 64;
const REQUESTS_MAX: usize = 64;

fn service() -> Mmds {
    let mmds = Mmds::new();
    mmds.put(json!({ "latest": { "id": "i", "tags": { "a": "b" }, "many": "x".repeat(20_000) } }))
        .expect("it is short");
    mmds
}

/// The bytes of a connection: the first is the version, and all others are requests.
pub(crate) fn run_request(data: &[u8]) {
    let mut input = Input::new(data);
    let mmds = service();
    let version = if input.u8() & 1 == 0 {
        MmdsVersion::V1
    } else {
        MmdsVersion::V2
    };
    mmds.configure(version, false);
    let mut bytes = input.rest();
    for _ in 0..REQUESTS_MAX {
        let Answer::Response {
            consumed,
            bytes: response,
            is_last,
        } = answer(&mmds, bytes)
        else {
            return;
        };
        assert!(consumed > 0 || bytes.is_empty() || is_last, "it would never end");
        assert!(response.starts_with(b"HTTP/1.1 "));
        match bytes.get(consumed..) {
            Some(rest) if !rest.is_empty() && !is_last => bytes = rest,
            _ => return,
        }
    }
}

pub(crate) fn run_frames(data: &[u8]) {
    let mut input = Input::new(data);
    let mut stack = Stack::new(Arc::new(service()), SERVICE);
    let mut now = Instant::now();
    // By port: the numbers of the next segments, ours and the service's.
    let mut next = BTreeMap::<u8, (u32, u32)>::new();
    while !input.is_empty() {
        let how = input.u8();
        let length = usize::from(input.u8());
        let bytes = input.take(length);
        now += Duration::from_millis(500) * u32::from(how >> 2);
        let frame = if how & 1 == 1 {
            [&[0xff; 6][..], &[2, 0, 0, 0, 0, 1], bytes].concat()
        } else {
            segment(bytes, &mut next)
        };
        if stack.wants(&frame) {
            stack.take(frame, now);
        }
        if how & 2 == 2 {
            take(&mut stack, now, &mut next);
        }
        let alarm = stack.alarm(now);
        assert!(alarm.is_none_or(|alarm| alarm + Duration::from_secs(1) > now));
    }
    assert!(take(&mut stack, now, &mut next) <= FRAMES_KEPT_MAX * 4);
}

/// Takes what there is, learns of its numbers, and tells how much it was.
fn take(stack: &mut Stack, now: Instant, next: &mut BTreeMap<u8, (u32, u32)>) -> usize {
    let mut count = 0;
    while count < FRAMES_KEPT_MAX * 4 && stack.is_ready(now) {
        let Some(frame) = stack.give(now) else {
            break;
        };
        count += 1;
        assert!(frame.len() <= 1514);
        let number = |at: usize| frame.get(at..at + 4).and_then(|four| four.try_into().ok());
        if let (Some(&[0x08, 0x00]), Some(port), Some(seq)) = (
            frame.get(12..14).and_then(|kind| <&[u8; 2]>::try_from(kind).ok()),
            frame.get(37),
            number(38).map(u32::from_be_bytes),
        ) {
            let carried = u32::try_from(frame.len() - 54).unwrap_or_default().max(1);
            next.entry(*port).or_default().1 = seq.wrapping_add(carried);
        }
    }
    count
}

/// A segment of TCP in a frame for the service.
fn segment(bytes: &[u8], next: &mut BTreeMap<u8, (u32, u32)>) -> Vec<u8> {
    let mut input = Input::new(bytes);
    let (flags, port, apart) = (input.u8(), input.u8(), input.u8());
    let carried = input.rest();
    let (ours, theirs) = next.entry(port).or_default();
    let seq = ours.wrapping_add_signed(i32::from(apart.cast_signed()));
    let length = u32::try_from(carried.len()).unwrap_or_default();
    *ours = ours.wrapping_add(length + u32::from(flags & SYN != 0));
    let total = u16::try_from(40 + carried.len())
        .unwrap_or_default()
        .to_be_bytes();
    let [high, low] = total;
    [
        &[6, 1, 0x23, 0x45, 0x67, 1, 2, 0, 0, 0, 0, 1, 8, 0][..],
        &[0x45, 0, high, low, 0, 0, 0, 0, 64, 6, 0, 0],
        &GUEST,
        &SERVICE.octets(),
        &[0xc0, port, 0, 80],
        &seq.to_be_bytes(),
        &theirs.to_be_bytes(),
        &[0x50, flags, 0x10, 0, 0, 0, 0, 0],
        carried,
    ]
    .concat()
}
