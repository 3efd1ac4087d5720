//! What a guest writes is what another client reads, by every version that there is and in every shape of a drive.

use std::time::Duration;

use coracle_tests::case::{Context, text};
use coracle_tests::guest::{Machine, run};
use coracle_tests::harness::nfs::second_client;
use coracle_tests::harness::nfs::server::{Plan, Server};
use coracle_tests::monitor::Launch;
use coracle_tests::{Outcome, ensure};
use instrument::pattern::{SECTOR_BYTES, SECTOR_WORDS, fill};
use serde_json::json;

use super::IMAGE;
use crate::network::{drive, says, with};

pub(super) const MIB: u64 = 1 << 20;
const DISK_MIB: u64 = 32;
const END_WITHIN: Duration = Duration::from_secs(60);

/// libnfs shares nothing with the client under test.
pub(super) fn reads_back(context: &Context) -> Outcome {
    let mut seed = context.seed.clone();
    let (large, small) = (seed.below(1 << 20), seed.below(1 << 20));
    let server = Server::start(Plan::image(16 * MIB))?;
    let words = format!(
        "do=pattern-write:mib=8,bs=262144,depth=4,seed={large} do=pattern-write:mib=1,offset_mib=9,bs=4096,depth=16,seed={small} \
         do=flush"
    );
    let machine = Machine::unikernel(&context.environment, &words).drive(drive(&server.url(IMAGE)));
    run(Launch::new(&context.environment)?, &machine, END_WITHIN)?.expect(0)?;

    let found = second_client::read(&server.url(IMAGE))?;
    let mut expected = pattern(large, 0, 8)?;
    expected.resize(usize::try_from(9 * MIB)?, 0);
    expected.extend(pattern(small, 9, 1)?);
    expected.resize(usize::try_from(16 * MIB)?, 0);
    let differs = found
        .iter()
        .zip(&expected)
        .position(|(found, expected)| found != expected);
    ensure!(
        found.len() == expected.len() && differs.is_none(),
        "libnfs reads {} bytes, and byte {differs:?} is not what the guest wrote",
        found.len()
    );
    // What nobody wrote takes no space.
    let blocks = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(server.path(IMAGE))?);
    ensure!(blocks * 512 < 12 * MIB, "the image takes {blocks} blocks");
    Ok(())
}

/// So many MiB of the guest's pattern.
pub(super) fn pattern(seed: u64, offset_mib: u64, mib: u64) -> Outcome<Vec<u8>> {
    let sectors = usize::try_from(mib * MIB)? / SECTOR_BYTES;
    let mut words = vec![0; sectors * SECTOR_WORDS];
    fill(&mut words, seed, offset_mib * MIB / u64::try_from(SECTOR_BYTES)?);
    Ok(words.into_iter().flat_map(u64::to_le_bytes).collect())
}

/// A kind of server, and what an URL must say to use it.
struct Kind {
    name: &'static str,
    minor_versions: &'static [u32],
    options: &'static str,
    queues: u32,
}

const KINDS: &[Kind] = &[
    kind("as it comes", &[0, 1, 2], ""),
    kind("4.1 because there is no other", &[0, 1], ""),
    kind("4.1 because it was asked for", &[1, 2], "?version=4.1"),
    kind("4.2 alone", &[2], "?version=4.2"),
    kind("little to be kept", &[1, 2], "?uncommitted_bytes_max=65536"),
    Kind {
        queues: 2,
        ..kind("two queues in one session", &[1, 2], "")
    },
];

const fn kind(name: &'static str, minor_versions: &'static [u32], options: &'static str) -> Kind {
    Kind {
        name,
        minor_versions,
        options,
        queues: 1,
    }
}

pub(super) fn shapes(context: &Context) -> Outcome {
    let mut seed = context.seed.clone();
    for kind in KINDS {
        let kept = keep(context, kind, seed.below(1 << 20));
        kept.map_err(|e| format!("{}: {}", kind.name, text(&e)))?;
    }
    Ok(())
}

fn keep(context: &Context, kind: &Kind, seed: u64) -> Outcome {
    let server = Server::start(Plan::image(DISK_MIB * MIB).minor_versions(kind.minor_versions))?;
    let url = format!("{}{}", server.url(IMAGE), kind.options);
    let queues = kind.queues;
    let drive = with(drive(&url), "num_queues", json!(queues));
    let words = format!(
        "do=pattern-write:mib=8,bs=262144,depth=4,seed={seed} do=pattern-write:mib=1,offset_mib=9,bs=4096,depth=16,seed={seed} \
         do=flush do=pattern-verify:mib=8,bs=65536,depth=8,seed={seed} \
         do=pattern-verify:mib=1,offset_mib=9,bs=1048576,depth=1,seed={seed} do=read-check-zero:mib=1,offset_mib=8 \
         do=load:mode=randread,bs=4096,depth=32,queues={queues},ms=200 do=pattern-verify:mib=8,seed={seed}"
    );
    let machine = Machine::unikernel(&context.environment, &words).vcpus(queues);
    let ended = run(
        Launch::new(&context.environment)?,
        &machine.drive(drive.clone()),
        END_WITHIN,
    )?;
    ended.expect(0)?;
    says(&ended.console, "errors=0")?;
    let mut reader = with(drive, "is_read_only", json!(true));
    if let Some(reader) = reader.as_object_mut() {
        reader.remove("lock");
    }
    let words = format!("do=pattern-verify:mib=8,seed={seed} do=capacity");
    let machine = Machine::unikernel(&context.environment, &words).vcpus(queues);
    let ended = run(
        Launch::new(&context.environment)?,
        &machine.drive(reader),
        END_WITHIN,
    )?;
    ended.expect(0)?;
    says(&ended.console, "read_only=1")
}
