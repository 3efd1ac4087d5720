//! Broken input of every kind from the host's side: none of it ends the monitor in a way of its own choosing.
//!
//! What is fed is valid input with seeded damage: bytes changed, cut out, doubled, swapped. The property tests of the parsers
//! look closer; these look at the whole process.

use std::time::{Duration, Instant};

use coracle_tests::case::{Case, Context};
use coracle_tests::environment::Need;
use coracle_tests::exchange::{Files, requests};
use coracle_tests::guest::Machine;
use coracle_tests::monitor::Launch;
use coracle_tests::probe::{self, Protocol};
use coracle_tests::seed::Seed;
use coracle_tests::{Outcome, ensure};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "damaged_requests_leave_the_api_answering",
        need: Need::Nothing,
        run: damaged_requests,
    },
    Case {
        name: "damaged_kernels_start_or_are_refused",
        need: Need::Kvm,
        run: damaged_kernels,
    },
    Case {
        name: "damaged_configuration_files_are_refused",
        need: Need::Kvm,
        run: damaged_configuration_files,
    },
];

const SOON: Duration = Duration::from_secs(20);
/// A damaged kernel that starts may do anything; so long it is watched.
const WATCH_MS: u64 = 60;

fn damaged_requests(context: &Context) -> Outcome {
    let launch = Launch::new(&context.environment)?;
    let files = Files::make(launch.directory())?;
    let mut monitor = launch.start()?;
    let valid: Vec<Vec<u8>> = requests()
        .iter()
        // A start would change what the others mean.
        .filter(|request| {
            !request
                .body
                .as_ref()
                .is_some_and(|body| body.contains("InstanceStart"))
        })
        .map(|request| {
            let body = files.fill_in(request.body.as_deref().unwrap_or_default());
            let length = body.len();
            format!(
                "{} {} HTTP/1.1\r\nContent-Length: {length}\r\n\r\n{body}",
                request.method, request.path
            )
            .into_bytes()
        })
        .collect();
    let mut seed = context.seed.clone();
    for number in 0..context.count(1000, 1_000_000) {
        let bytes = damage(&mut seed, &valid);
        let mut connection = monitor.connect()?;
        // The monitor may have seen enough before all of it is sent.
        drop(connection.send_some(&bytes));
        if number % 100 == 0 {
            ensure!(
                monitor.is_running()?,
                "request {number} ended it: {:?}",
                String::from_utf8_lossy(&bytes)
            );
            let start = Instant::now();
            monitor.must("GET", "/version", None)?;
            ensure!(
                start.elapsed() < Duration::from_secs(2),
                "request {number}: {:?}",
                start.elapsed()
            );
        }
    }
    Ok(())
}

fn damaged_kernels(context: &Context) -> Outcome {
    let mut seed = context.seed.clone();
    for protocol in [Protocol::Pvh, Protocol::Linux64, Protocol::BzImage] {
        let directory = tempfile::tempdir()?;
        let image = std::fs::read(probe::write(protocol, directory.path())?)?;
        // The headers are where the loader looks; the code behind them is the guest's business.
        let (head, code) = image.split_at(image.len().min(0x300));
        for number in 0..context.count(15, 2000) {
            let damaged = [damage(&mut seed, &[head.to_vec()]), code.to_vec()].concat();
            let launch = Launch::new(&context.environment)?;
            let kernel = launch.directory().join("test-kernel");
            std::fs::write(&kernel, damaged)?;
            let machine = Machine::new(&kernel, "quiet").memory_mib(16);
            let mut monitor = launch.without_api().config(&machine.config())?.spawn()?;
            std::thread::sleep(Duration::from_millis(WATCH_MS));
            if monitor.is_running()? {
                continue;
            }
            let ended = monitor.wait(SOON)?;
            let is_orderly = ended.status.code().is_some() && !ended.errors.contains("panicked");
            ensure!(
                is_orderly,
                "{protocol:?} {number}: {:?}: {}",
                ended.status,
                ended.errors
            );
        }
    }
    Ok(())
}

fn damaged_configuration_files(context: &Context) -> Outcome {
    let mut seed = context.seed.clone();
    for number in 0..context.count(60, 10_000) {
        let launch = Launch::new(&context.environment)?;
        let files = Files::make(launch.directory())?;
        let good = files.fill_in(
            r#"{"boot-source":{"kernel_image_path":"{text}","boot_args":"quiet"},
            "machine-config":{"vcpu_count":1,"mem_size_mib":64},"entropy":{},"serial":{},"cpu-config":null,
            "drives":[{{drive},"is_read_only":true,"rate_limiter":{"ops":{"size":1,"refill_time":1}}}]}"#,
        );
        let path = launch.directory().join("test-file");
        std::fs::write(&path, damage(&mut seed, &[good.into_bytes()]))?;
        let launch = launch
            .without_api()
            .arguments(["--config-file", &path.display().to_string()]);
        let ended = launch.spawn()?.wait(SOON)?;
        // Not even the undamaged one starts: its kernel is a text.
        let is_orderly = ended.status.code() == Some(152) && !ended.errors.contains("panicked");
        ensure!(is_orderly, "{number}: {:?}: {}", ended.status, ended.errors);
    }
    Ok(())
}

/// One of the inputs, with one to four wounds.
fn damage(seed: &mut Seed, inputs: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = seed.pick(inputs).cloned().unwrap_or_default();
    for _ in 0..=seed.below(4) {
        let length = bytes.len();
        let at = |seed: &mut Seed| {
            usize::try_from(seed.below(u64::try_from(length.max(1)).unwrap_or(1))).unwrap_or_default()
        };
        let (from, to) = (at(seed), at(seed));
        let (from, to) = (from.min(to), from.max(to));
        match seed.below(6) {
            0 => bytes.truncate(from),
            1 => drop(bytes.drain(from..to)),
            2 => bytes.extend_from_within(from..to),
            3 => bytes.iter_mut().skip(from).take(8).for_each(|byte| *byte = 0xff),
            4 => bytes.iter_mut().skip(from).take(8).for_each(|byte| *byte = 0),
            _ => {
                let value = seed.draw().to_le_bytes();
                bytes
                    .iter_mut()
                    .skip(from)
                    .zip(value)
                    .take(1 + from % 8)
                    .for_each(|(byte, new)| *byte = new);
            }
        }
    }
    bytes
}
