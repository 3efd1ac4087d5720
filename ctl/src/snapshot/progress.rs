//! How far a snapshot is, for who sits at a terminal.

use std::thread;
use std::time::Duration;

use coracle_vmm::snapshot::memory;
use rustix::event::{PollFd, PollFlags};
use serde_json::Value;

use super::SnapshotError;
use crate::client::{Client, Request};
use crate::deadline::{Deadline, wait_ready};
use crate::disk::Progress;
use crate::signals::Signals;

/// How long a snapshot may take: memory of a TiB on a slow disk.
pub(crate) const SNAPSHOT_WAIT: Duration = Duration::from_hours(24);
/// How often it is asked how far it is.
const PERIOD: Duration = Duration::from_millis(50);

/// How a wait has ended.
pub(super) enum Watched {
    /// What was waited for is over.
    Over,
    /// The user wants no more of it.
    Interrupted,
}

/// A bar that comes when there is something to show.
struct Bar {
    what: &'static str,
    shown: Option<(Progress, u64)>,
}

impl Bar {
    fn show(&mut self, done_bytes: u64, total_bytes: u64) {
        if total_bytes == 0 {
            return;
        }
        let what = self.what;
        let (bar, shown_bytes) = self
            .shown
            .get_or_insert_with(|| (Progress::new(what, total_bytes), 0));
        bar.add(done_bytes.saturating_sub(*shown_bytes));
        *shown_bytes = done_bytes.max(*shown_bytes);
    }
}

/// Shows how far the monitor behind `client` is, until `is_over` or a signal.
///
/// # Errors
///
/// When signals cannot be waited for.
pub(super) fn watch(
    client: &Client<'_>,
    signals: &Signals,
    is_over: impl Fn() -> bool,
) -> Result<Watched, SnapshotError> {
    let mut bar = Bar {
        what: "snapshot",
        shown: None,
    };
    while !is_over() {
        let mut signal = [PollFd::new(signals, PollFlags::IN)];
        if wait_ready(&mut signal, Some(Deadline::after(PERIOD)))? {
            return Ok(Watched::Interrupted);
        }
        // A monitor that does not answer just now is asked again; what becomes of the snapshot is told elsewhere.
        if let Ok(progress) = client.read(Request::get("/snapshot")) {
            let bytes = |name| progress.get(name).and_then(Value::as_u64).unwrap_or(0);
            bar.show(bytes("done_bytes"), bytes("total_bytes"));
        }
    }
    Ok(Watched::Over)
}

/// Does `work`, and shows how far it is.
pub(crate) fn shown<T: Send>(
    what: &'static str,
    progress: &memory::Progress,
    work: impl FnOnce() -> T + Send,
) -> T {
    thread::scope(|scope| {
        let working = scope.spawn(work);
        let mut bar = Bar { what, shown: None };
        while !working.is_finished() {
            thread::sleep(PERIOD);
            bar.show(progress.done_bytes(), progress.total_bytes());
        }
        working.join().expect("what is shown does not panic")
    })
}
