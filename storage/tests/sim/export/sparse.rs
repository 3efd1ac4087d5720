//! An image that is mostly holes, and a reader who wants to go around them.

use std::ops::Range;

use coracle_storage::backend::{Backend, Step};
use coracle_storage::lease::Lock;
use coracle_storage::reactor::{Patience, Reactor, Wake};
use coracle_storage::request::{Completion, Durability, Failure, Operation, Request};
use coracle_storage::sim::dice::Dice;
use coracle_storage::sim::initiator;
use coracle_storage::sim::nfs::options::{Hostility, Options};
use coracle_storage::sim::oracle::SECTOR_BYTES;
use coracle_storage::sim::reactor::{Faults, SimReactor};

use super::site::{MEANS, Site, expected};
use crate::passing::Surroundings;

/// Runs what `seed` says, and panics when a reader goes around data, or without need around nothing.
pub(crate) fn simulate(seed: u64) {
    let mut dice = Dice::new(seed);
    let content = sparse(&mut dice);
    let mut site = Site::new(&content, &mut dice);
    let owner = initiator::owner("vm", &mut dice);
    let mut io = site.host(Faults::default(), &mut dice);
    let mut disk = expected(site.open(io.clone(), Lock::Exclusive, &owner, MEANS));
    io.register(&disk.files()).unwrap();
    disk.attach(&mut io);
    if dice.one_in(2) {
        site.rage();
    }
    let found = survey(disk.as_mut(), &mut io, &mut site, &content).expect("nobody tells lies");
    let (limits, quirks) = (site.options.limits, site.options.quirks);
    let tells_holes = quirks.seeks && limits.minor_version_max > 1 && !site.is_of_version("4.1");
    let block_bytes = usize::try_from(limits.block_bytes).unwrap();
    let blocks = content.chunks(block_bytes);
    let full_bytes: usize = blocks.filter(|block| !is_zeros(block)).map(<[u8]>::len).sum();
    let found_bytes: u64 = found.iter().map(|part| part.end - part.start).sum();
    if tells_holes {
        assert_eq!(found_bytes, full_bytes as u64, "of blocks of {block_bytes} bytes");
    } else {
        let all = 0..content.len() as u64;
        assert_eq!(found, std::slice::from_ref(&all));
    }
    site.calm();
    site.check();
}

/// The same on a server that says anything. Whatever it is, a reader comes to the end, or to an error.
pub(crate) fn simulate_lies(seed: u64) {
    let mut dice = Dice::new(seed);
    let content = sparse(&mut dice);
    let options = Options {
        hostility: Hostility {
            astray_one_in: dice.pick(&[1, 2, 5]),
            ..Hostility::default()
        },
        ..Options::default()
    };
    let mut site = Site::with(options, &content, &mut dice);
    let owner = initiator::owner("vm", &mut dice);
    let mut io = site.host(Faults::default(), &mut dice);
    let mut disk = expected(site.open(io.clone(), Lock::Exclusive, &owner, MEANS));
    io.register(&disk.files()).unwrap();
    disk.attach(&mut io);
    // Nothing of what is passed is looked at: whoever lies about that may as well lie about data.
    if let Err(failure) = survey(disk.as_mut(), &mut io, &mut site, &[]) {
        assert_eq!(failure, Failure::Host(libc::EIO));
    }
    site.check();
}

/// An image with data here and there.
fn sparse(dice: &mut Dice) -> Vec<u8> {
    let sectors = 1 + dice.below(1024);
    let mut content = vec![0; usize::try_from(sectors * SECTOR_BYTES).unwrap()];
    for _ in 0..dice.below(6) {
        let at = dice.index(content.len());
        let len_max = dice.pick(&[1, 600, 40_000]);
        let len = 1 + dice.index(len_max);
        content.iter_mut().skip(at).take(len).for_each(|byte| *byte = 7);
    }
    content
}

fn is_zeros(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}

/// All parts of the image that may hold something, each nonempty and behind the last. What lies between is zeros in `content`.
fn survey(
    disk: &mut dyn Backend,
    io: &mut SimReactor,
    site: &mut Site,
    content: &[u8],
) -> Result<Vec<Range<u64>>, Failure> {
    let end = disk.geometry().size_bytes;
    let (mut at, mut found) = (0, Vec::new());
    while at < end {
        let part = find(disk, io, site, at..end)?;
        assert!(at <= part.start && part.end <= end, "{part:?} of {at}..{end}");
        let passed = usize::try_from(at).unwrap()..usize::try_from(part.start).unwrap();
        let passed = content.get(passed).unwrap_or_default();
        assert!(is_zeros(passed), "there is something between {at} and {part:?}");
        if part.is_empty() {
            assert_eq!(part.start, end);
            break;
        }
        at = part.end;
        found.push(part);
    }
    Ok(found)
}

fn find(
    disk: &mut dyn Backend,
    io: &mut SimReactor,
    site: &mut Site,
    range: Range<u64>,
) -> Result<Range<u64>, Failure> {
    let request = Request {
        tag: 0,
        operation: Operation::FindData,
        offset_bytes: range.start,
        len_bytes: range.end - range.start,
        durability: Durability::Cached,
        segments: Vec::new(),
    };
    let Completion { request, outcome } = match disk.start(request, io) {
        Step::Done(completion) => completion,
        Step::Pending => ended(disk, io, site),
        Step::Busy(_) => panic!("it is the only request"),
    };
    outcome.map(|()| request.offset_bytes..request.offset_bytes + request.len_bytes)
}

/// The end of the one request.
fn ended(disk: &mut dyn Backend, io: &mut SimReactor, site: &mut Site) -> Completion {
    loop {
        disk.before_wait(io);
        io.set_timer(disk.alarm().into_iter().chain(site.due()).min());
        let mut wakes = Vec::new();
        io.wait(Patience::UntilEvent, &mut wakes).unwrap();
        let mut done = None;
        for wake in wakes {
            let Wake::Done(event) = wake else { continue };
            if let Step::Done(completion) = disk.resume(event, io) {
                done = Some(completion);
            }
        }
        disk.wake(io);
        site.look();
        if let Some(completion) = done.or_else(|| disk.next_completion()) {
            return completion;
        }
    }
}
