//! One image that one owner after the other goes on with, as that of a snapshot which is loaded several times.

use std::error::Error;
use std::sync::Arc;

use coracle_storage::backend::Access;
use coracle_storage::blocking::Blocking;
use coracle_storage::lease::{Lock, Owner, Succession, Terms};
use coracle_storage::metrics::SessionMetrics;
use coracle_storage::open::{Hold, Image, OpenError, open};
use coracle_tests::{Outcome, ensure};

use super::operator::SOON;

/// A machine's part of an image.
struct Held {
    disk: Blocking,
    session: Arc<SessionMetrics>,
    // Dropped last.
    _hold: Hold,
}

/// Nobody raises the generation but who is asked to, also when its server is started anew on the way, and whoever remembers an
/// older one is told who has written.
pub(crate) fn kept_until_raised(url: &str, restart: impl FnOnce() -> Outcome) -> Outcome {
    drop(take(url, "first", Succession::Raises)?);
    let second = take(url, "second", Succession::Keeps(1))?;
    ensure!(second.generation() == 1, "it is {}", second.generation());
    drop(second);
    let mut third = take(url, "third", Succession::Keeps(1))?;
    third.disk.raise()?;
    ensure!(third.generation() == 2, "it is {}", third.generation());
    restart()?;
    third.disk.raise()?;
    ensure!(third.generation() == 3, "it is {}", third.generation());
    third.disk.write_at(0, &[3; 512])?;
    drop(third);
    for generation in [1, 2] {
        let Err(refused) = opened(url, "late", Succession::Keeps(generation)) else {
            return Err(format!("an image of generation 3 is gone on with as one of {generation}").into());
        };
        let causes = std::iter::successors(Some(&refused as &dyn Error), |&cause| cause.source());
        let said: Vec<String> = causes.map(ToString::to_string).collect();
        let said = said.join(": ");
        let says = format!("it was of generation {generation} then, and is of 3 now: written by VM `third`");
        ensure!(said.contains(&says), "{said}");
    }
    let last = take(url, "last", Succession::Keeps(3))?;
    ensure!(last.generation() == 3, "it is {}", last.generation());
    Ok(())
}

fn opened(url: &str, vm: &str, succession: Succession) -> Result<Image, OpenError> {
    let owner = Owner::of_this_process(vm);
    let terms = Terms {
        succession,
        ..Terms::new(Lock::Exclusive, &owner)
    };
    open(url, Access::ReadWrite, &terms)
}

fn take(url: &str, vm: &str, succession: Succession) -> Outcome<Held> {
    let image = opened(url, vm, succession)?;
    let session = image.backend.session().ok_or("it is not of a network")?;
    Ok(Held {
        disk: Blocking::new(image.backend)?.with_limit(SOON),
        session,
        _hold: image.hold,
    })
}

impl Held {
    fn generation(&self) -> u64 {
        self.session.lease_epoch.value()
    }
}
