//! Whoever starts a writer a second time, in whatever order: the image has one writer at a time.

use std::cell::Cell;
use std::fs::File;
use std::io::Read;
use std::path::PathBuf;

use coracle_tests::case::{Case, Context, text};
use coracle_tests::environment::Need;
use coracle_tests::harness::double_start::{Backend, Expected, IMAGE_BYTES, State, run};
use coracle_tests::seed::Seed;
use coracle_tests::{Outcome, ensure};
use serde_json::{Value, json};

/// The schedules of a soak are rows of a hundred, each of which is kept when it has passed.
pub(crate) const CASES: &[Case] = &[
    Case {
        name: "a_file_has_one_writer_at_a_time_1",
        need: Need::Kvm,
        run: a_file_has_one_writer_at_a_time,
    },
    Case {
        name: "a_file_has_one_writer_at_a_time_2",
        need: Need::Kvm,
        run: a_file_has_one_writer_at_a_time,
    },
    Case {
        name: "a_file_has_one_writer_at_a_time_3",
        need: Need::Kvm,
        run: a_file_has_one_writer_at_a_time,
    },
    Case {
        name: "a_file_has_one_writer_at_a_time_4",
        need: Need::Kvm,
        run: a_file_has_one_writer_at_a_time,
    },
    Case {
        name: "a_file_has_one_writer_at_a_time_5",
        need: Need::Kvm,
        run: a_file_has_one_writer_at_a_time,
    },
    Case {
        name: "a_second_writer_that_takes_no_lease_is_found_out",
        need: Need::Kvm,
        run: a_second_writer_that_takes_no_lease_is_found_out,
    },
];

/// An image in a file. Its lease is the host's: it lives exactly as long as the process.
struct ImageFile {
    /// Gone with the schedule, and with it the image and what lies beside it.
    directory: tempfile::TempDir,
    starts: Cell<u32>,
    /// What each start after the first says of the lease.
    later_lock: &'static str,
}

impl ImageFile {
    fn new(later_lock: &'static str) -> Outcome<Self> {
        let image = Self {
            directory: tempfile::tempdir()?,
            starts: Cell::new(0),
            later_lock,
        };
        File::create(image.path())?.set_len(IMAGE_BYTES)?;
        Ok(image)
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("image")
    }
}

impl Backend for ImageFile {
    fn drive(&self) -> Outcome<Value> {
        let earlier = self.starts.replace(self.starts.get() + 1);
        let lock = if earlier == 0 {
            "exclusive"
        } else {
            self.later_lock
        };
        Ok(json!({ "path_on_host": self.path(), "lock": lock }))
    }

    fn read(&self, bytes: u64) -> Outcome<Vec<u8>> {
        let mut content = Vec::new();
        File::open(self.path())?.take(bytes).read_to_end(&mut content)?;
        Ok(content)
    }

    fn expected(&self, holder: State) -> Expected {
        match holder {
            State::Running | State::Resumed | State::Stopped => Expected::Refused,
            State::Killed | State::Ended | State::Broken => Expected::Granted,
        }
    }

    fn is_refusal(&self, errors: &str, vm: &str) -> bool {
        errors.contains(vm)
    }
}

fn a_file_has_one_writer_at_a_time(context: &Context) -> Outcome {
    let mut seed = context.seed.clone();
    for _ in 0..context.count(2, 100) {
        let schedule = Seed::from(seed.draw());
        run(&context.environment, &ImageFile::new("exclusive")?, &schedule)?;
    }
    Ok(())
}

/// Among some schedules there is one that starts a writer beside another; then the oracle sees a foreign block.
fn a_second_writer_that_takes_no_lease_is_found_out(context: &Context) -> Outcome {
    let mut seed = context.seed.clone();
    for _ in 0..20 {
        let schedule = Seed::from(seed.draw());
        let Err(failed) = run(&context.environment, &ImageFile::new("none")?, &schedule) else {
            continue;
        };
        ensure!(
            text(&failed).contains("who did not hold the lease then"),
            "it was found out, but not by what it wrote: {}",
            text(&failed)
        );
        return Ok(());
    }
    Err("20 schedules with a writer that takes no lease went unnoticed".into())
}
