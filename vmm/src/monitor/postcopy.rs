//! A guest that runs before all of its memory is there, as the `vmm` threads of both sides see it.

use std::net::TcpListener;

use coracle_devices::virtio::device::{Notice, Patience};
use coracle_storage::threads;

use super::migration::Sending;
use super::operation::{Course, Work};
use super::{Guest, Monitor};
use crate::api::Fault;
use crate::config::MigrationRecover;
use crate::end::End;
use crate::machine::{Machine, Paused};
use crate::migration::postcopy::source::{Keeper, Line};
use crate::migration::postcopy::target::Fetcher;
use crate::signals::StopSignal;

impl Monitor {
    /// Looks after what keeps the memory of a guest that runs elsewhere.
    pub(super) fn go_on_keeping(&mut self, mut sending: Box<Sending>, keeper: Keeper) -> Course {
        let to = keeper.line().to;
        match keeper.poll() {
            None => {
                sending.keeps(keeper);
                Course::Pending(Work::Send(sending), None)
            }
            Some(Ok(())) => {
                log::info!(
                    "migration: the guest runs at {to} with all of its memory, and has left this process"
                );
                self.ending.announce(End::Migrated { to });
                Course::Over(Ok(()))
            }
            Some(Err(error)) => {
                let reason = crate::api::chain(&error);
                log::error!("migration: {reason}");
                self.ending.announce(End::HandoverLost { reason });
                Course::Over(Err(fault(&error)))
            }
        }
    }

    /// What fetches the memory of the guest that runs here, where that goes on.
    pub(super) fn fetcher(&self) -> Option<&Fetcher> {
        match &self.guest {
            Guest::Running(machine) => machine.fetcher(),
            Guest::Pausing(machine) => machine.fetcher(),
            Guest::Paused(machine) => machine.fetcher(),
            Guest::Stranded(machine) => machine.fetcher(),
            Guest::NotStarted | Guest::Yielded(_) => None,
        }
    }

    /// What keeps the memory of a guest that runs elsewhere.
    fn keeper(&self) -> Option<&Keeper> {
        match self.operation.as_ref().map(|operation| &operation.work) {
            Some(Work::Send(sending)) => sending.keeper(),
            _ => None,
        }
    }

    /// Refuses what needs all of the guest's memory while that is being fetched.
    ///
    /// # Errors
    ///
    /// What a client is told.
    pub(super) fn check_complete(&self, what: &str) -> Result<(), Fault> {
        match self.fetcher() {
            None => Ok(()),
            Some(fetcher) => Err(Fault::bad_request(format!(
                "{what} error: {} MiB of the guest's memory are still being fetched from where it came from: ask again when \
                 GET /migration says `Idle`",
                (fetcher.status().left_bytes() >> 20).max(1)
            ))),
        }
    }

    /// Gives the migration up, if there is one, and if it can be.
    ///
    /// # Errors
    ///
    /// When the guest would be lost, and need not be.
    pub(super) fn cancel_migration(&self) -> Result<(), Fault> {
        if let Some(keeper) = self.keeper() {
            return Err(Fault::bad_request(format!(
                "Migration error: the guest runs at {}, and {} MiB of its memory are here: it would be lost without",
                keeper.line().to,
                (keeper.left_bytes() >> 20).max(1)
            )));
        }
        match self.operation.as_ref().map(|operation| &operation.work) {
            Some(Work::Send(sending)) => sending.cancel(),
            Some(Work::Receive(receiving)) => receiving.cancel(),
            _ => {
                if let Some(fetcher) = self.fetcher() {
                    fetcher.give_up().map_err(|error| fault(&error))?;
                }
            }
        }
        Ok(())
    }

    /// Has the two sides find each other by another way.
    ///
    /// # Errors
    ///
    /// When they have not lost each other, or there is no such way.
    pub(super) fn recover_migration(&self, asked: MigrationRecover) -> Result<(), Fault> {
        if let Some(keeper) = self.keeper() {
            let Some(to) = asked.to else {
                return Err(bad("this is the sender: say where the receiver listens (`to`)"));
            };
            let before = keeper.line();
            let line = Line {
                to,
                name: asked.to_name,
                tls: asked.tls.unwrap_or(before.tls),
            };
            return keeper.call_at(line).map_err(|error| fault(&error));
        }
        let Some(fetcher) = self.fetcher() else {
            return Err(bad(
                "no memory is being fetched, here or from here: nothing has to be recovered",
            ));
        };
        let Some(listen) = asked.listen else {
            return Err(bad("this is the receiver: say where it is to listen (`listen`)"));
        };
        // Not by this thread, whose filter has no sockets.
        let address = listen.clone();
        let listener = threads::spawn(threads::Kind::Mover, "mover", move || TcpListener::bind(address))
            .and_then(|bound| bound.join().expect("a thread that panics ends the process"));
        let listener = listener.map_err(|error| bad(&format!("cannot listen at `{listen}`: {error}")))?;
        fetcher.listen_at(listener).map_err(|error| fault(&error))
    }

    /// Whether a signal that asks the process to stop has to wait: a guest elsewhere would be lost. The second one does not.
    pub(super) fn puts_off(&mut self, signal: StopSignal) -> bool {
        let Some((to, left_mib)) = self
            .keeper()
            .map(|keeper| (keeper.line().to, (keeper.left_bytes() >> 20).max(1)))
        else {
            return false;
        };
        if std::mem::replace(&mut self.is_put_off, true) {
            log::error!(
                "migration: the guest at {to} is lost: {left_mib} MiB of its memory were here until {signal}"
            );
            return false;
        }
        log::warn!(
            "{signal}: the guest runs at {to}, and {left_mib} MiB of its memory are here; the process ends when they are there, \
             and at once at the next signal, which loses the guest"
        );
        true
    }
}

/// Ends a guest whose memory is not all there: what it has written to its disks is on their media.
pub(super) fn end_flushed(mut machine: Machine<Paused>) {
    let flushed = machine.begin_flush(&Notice::default());
    let flushed = flushed.map(|mut round| machine.poll_round(&mut round, Patience::WithinLimit));
    match flushed {
        Ok(crate::machine::Progress::Done(Ok(()))) => {}
        Ok(crate::machine::Progress::Done(Err(error))) | Err(error) => {
            log::error!(
                "what the guest has written last may be lost: {}",
                crate::api::chain(&error)
            );
        }
        Ok(crate::machine::Progress::Pending { .. }) => {
            log::error!("what the guest has written last may be lost: a disk does not answer");
        }
    }
    machine.retire();
}

fn bad(what: &str) -> Fault {
    Fault::bad_request(format!("Migration error: {what}"))
}

fn fault(error: &dyn std::error::Error) -> Fault {
    bad(&crate::api::chain(error))
}
