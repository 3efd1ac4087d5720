#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

use super::*;
use crate::backend::{Access, Discard};
use crate::nfs::v3::Status;
use crate::request::{Durability, Space};

const LEN_BYTES: u64 = 8192;

fn request(operation: Operation, offset_bytes: u64, memory: &mut [u8]) -> Request {
    Request {
        tag: 1,
        operation,
        offset_bytes,
        len_bytes: memory.len() as u64,
        durability: Durability::Cached,
        segments: vec![segments::own(memory)],
    }
}

fn geometry() -> Geometry {
    Geometry {
        size_bytes: 1 << 20,
        logical_block_bytes: 512,
        physical_block_bytes: 4096,
        access: Access::ReadOnly,
        discard: Discard::Ignored,
    }
}

fn begun(memory: &mut [u8]) -> Flight {
    let request = request(Operation::Read, 4096, memory);
    Flight::begin(request, &geometry(), Instant::now()).unwrap()
}

fn ended(command: Command, outcome: Result<(u32, bool), Status>) -> Ended {
    let outcome = outcome.map(|(bytes, is_end)| Outcome { bytes, is_end });
    Ended { command, outcome }
}

#[test]
fn a_read_goes_on_behind_what_the_server_gave() {
    let mut memory = vec![0; usize::try_from(LEN_BYTES).unwrap()];
    let mut flight = begun(&mut memory);
    let command = flight.command(7, 4096, Vec::new());
    assert_eq!(
        (command.offset_bytes, command.len_bytes(), command.cookie),
        (4096, 4096, 7)
    );
    assert_eq!(flight.judge(&ended(command, Ok((1000, false)))), Next::Send);
    let command = flight.command(7, 1 << 20, Vec::new());
    assert_eq!(
        (command.offset_bytes, command.len_bytes()),
        (5096, LEN_BYTES - 1000)
    );
    let rest = u32::try_from(LEN_BYTES).unwrap() - 1000;
    assert_eq!(flight.judge(&ended(command, Ok((rest, true)))), Next::End(Ok(())));
}

#[test]
fn a_file_that_has_become_shorter_ends_the_read() {
    let mut memory = vec![0; usize::try_from(LEN_BYTES).unwrap()];
    let mut flight = begun(&mut memory);
    let command = flight.command(0, 1 << 20, Vec::new());
    let next = flight.judge(&ended(command, Ok((512, true))));
    assert_eq!(next, Next::End(Err(Failure::Truncated)));
}

#[test]
fn a_server_that_puts_a_read_off_is_asked_more_and_more_rarely_and_not_for_ever() {
    let mut memory = vec![0; 512];
    let mut flight = begun(&mut memory);
    let mut waits = Vec::new();
    loop {
        let command = flight.command(0, 1 << 20, Vec::new());
        match flight.judge(&ended(command, Err(Status::JUKEBOX))) {
            Next::Later(wait) => waits.push(wait),
            next => {
                assert_eq!(next, Next::End(Err(Failure::Host(libc::EBUSY))));
                break;
            }
        }
    }
    assert!(waits.is_sorted() && waits.first() < waits.last());
    assert!(waits.iter().sum::<Duration>() > Duration::from_secs(500));
}

#[test]
fn each_refusal_has_its_end() {
    for (status, next) in [
        (Status::STALE, Next::Doubt("the file was replaced on the server")),
        (Status::ACCES, Next::End(Err(Failure::Host(libc::EACCES)))),
        // EXPIRED of NFSv4.
        (Status(10_011), Next::End(Err(Failure::Host(libc::EIO)))),
    ] {
        let mut memory = vec![0; 512];
        let mut flight = begun(&mut memory);
        let command = flight.command(0, 1 << 20, Vec::new());
        assert_eq!(flight.judge(&ended(command, Err(status))), next, "{status}");
    }
}

#[test]
fn nothing_but_a_read_within_the_image_is_sent() {
    let ends_at_once = |operation, offset_bytes, memory: &mut [u8]| {
        let request = request(operation, offset_bytes, memory);
        Flight::begin(request, &geometry(), Instant::now()).unwrap_err().1
    };
    let zeroes = Operation::WriteZeroes {
        space: Space::MayBeFreed,
    };
    for operation in [Operation::Write, Operation::Discard, zeroes] {
        assert_eq!(ends_at_once(operation, 0, &mut [0; 512]), Err(Failure::ReadOnly));
    }
    assert_eq!(ends_at_once(Operation::Flush, 0, &mut []), Ok(()));
    assert_eq!(ends_at_once(Operation::Read, 0, &mut []), Ok(()));
    for offset_bytes in [1 << 20, u64::MAX] {
        let outcome = ends_at_once(Operation::Read, offset_bytes, &mut [0; 512]);
        assert_eq!(outcome, Err(Failure::OutOfRange));
    }
}
