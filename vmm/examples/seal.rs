//! Measures what each way of protecting a snapshot's memory costs: `seal DIRECTORY [MIB]` writes files into a directory, best
//! one in memory. The times are of the processor, so that others on the host matter little.
#![expect(clippy::print_stdout, reason = "its output is for people")]

use std::error::Error;
use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use coracle_storage::backend::{Access, Backend, Discard, Geometry};
use coracle_storage::raw::Raw;
use coracle_storage::secret::SecretSource;
use coracle_vmm::keys::{EncryptionKey, Protection, SigningKey, SnapshotCipher};
use coracle_vmm::memory::{Backing, PageSize, allocate};
use coracle_vmm::snapshot::memory::{
    Content, MemoryId, Progress, Seal, Untouched, file_bytes, verify, write,
};
use rustix::time::{ClockId, clock_gettime};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const ROUNDS: u8 = 7;
const MIB: u64 = 1 << 20;

/// As openssl has made it; it signs nothing but what is measured here.
const SIGNER: &[u8] = b"-----BEGIN PRIVATE KEY-----
MC4CAQAwBQYDK2VwBCIEIFF7UUjlXdKfq1awAJ81hdFPXh5N9srvwTE7OgpXgJaz
-----END PRIVATE KEY-----
";

/// The best of some rounds.
#[derive(Clone, Copy)]
struct Cost {
    cpu: Duration,
    wall: Duration,
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut words = std::env::args().skip(1);
    let directory = words.next().ok_or("usage: seal DIRECTORY [MIB]")?;
    let mib = words.next().map_or(Ok(256), |word| word.parse())?;
    let memory = allocate(mib, Backing::Anonymous, PageSize::Base)?;
    fill(&memory, mib)?;
    println!("{mib} MiB that cannot be compressed, best of {ROUNDS}");
    println!(
        "{:<22} {:>23} {:>27}",
        "", "written: CPU ms, ms", "read, checked: CPU ms, ms"
    );
    let mut first = None;
    for protection in protections()? {
        let (written, read) = measured(&memory, mib, &protection, Path::new(&directory))?;
        let (by_written, by_read) = *first.get_or_insert((written, read));
        let name = Seal::new(MemoryId([0; 16]), &protection).kind().to_string();
        println!(
            "{name:<22} {:>8.1} ({:.2}x) {:>6.1} {:>12.1} ({:.2}x) {:>6.1}",
            ms(written.cpu),
            written.cpu.as_secs_f64() / by_written.cpu.as_secs_f64(),
            ms(written.wall),
            ms(read.cpu),
            read.cpu.as_secs_f64() / by_read.cpu.as_secs_f64(),
            ms(read.wall),
        );
    }
    Ok(())
}

fn protections() -> Result<[Protection; 4], Box<dyn Error>> {
    let nowhere = SecretSource::File("none".into());
    let signing = || SigningKey::parse(&nowhere, SIGNER).map(Some);
    let cipher = || SnapshotCipher::new(EncryptionKey::parse(&nowhere, &[7; 32])?).map(Some);
    let protection = |signing, cipher| Protection { signing, cipher };
    Ok([
        protection(None, None),
        protection(signing()?, None),
        protection(None, cipher()?),
        protection(signing()?, cipher()?),
    ])
}

fn fill(memory: &GuestMemoryMmap, mib: u64) -> Result<(), Box<dyn Error>> {
    let mut word = 1_u64;
    let mut next = || {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        word.to_le_bytes()
    };
    for number in 0..mib {
        let bytes: Vec<u8> = (0..MIB / 8).flat_map(|_| next()).collect();
        memory.write_slice(&bytes, GuestAddress(number * MIB))?;
    }
    Ok(())
}

fn measured(
    memory: &GuestMemoryMmap,
    mib: u64,
    protection: &Protection,
    directory: &Path,
) -> Result<(Cost, Cost), Box<dyn Error>> {
    let (mut written, mut read) = (Cost::MOST, Cost::MOST);
    for round in 0..ROUNDS {
        let file = tempfile::tempfile_in(directory)?;
        file.set_len(file_bytes(mib * MIB))?;
        let id = MemoryId([round; 16]);
        let seal = Seal::new(id, protection);
        let content = Content::Full(Untouched::Anything);
        let target = image(&file)?;
        let (table, cost) = Cost::of(|| write(memory, (id, seal), content, target, &Progress::new()));
        let table = table?;
        written = written.or(cost);
        let source = image(&file)?;
        let (verified, cost) = Cost::of(|| verify(&table, source, &Progress::new()));
        verified?;
        read = read.or(cost);
    }
    Ok((written, read))
}

fn image(file: &File) -> Result<Box<dyn Backend>, Box<dyn Error>> {
    let geometry = Geometry {
        size_bytes: file.metadata()?.len(),
        logical_block_bytes: 512,
        physical_block_bytes: 4096,
        access: Access::ReadWrite,
        discard: Discard::Supported,
    };
    Ok(Box::new(Raw::new(file.try_clone()?, geometry)))
}

impl Cost {
    const MOST: Self = Self {
        cpu: Duration::MAX,
        wall: Duration::MAX,
    };

    fn of<T>(work: impl FnOnce() -> T) -> (T, Self) {
        let (begin, before) = (Instant::now(), cpu_time());
        let made = work();
        let cost = Self {
            cpu: cpu_time().saturating_sub(before),
            wall: begin.elapsed(),
        };
        (made, cost)
    }

    fn or(self, other: Self) -> Self {
        Self {
            cpu: self.cpu.min(other.cpu),
            wall: self.wall.min(other.wall),
        }
    }
}

/// What all threads of this process have had of the processor.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(
        time.tv_sec.unsigned_abs(),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    )
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
