//! The target's side: a thread takes a machine in, and the `vmm` thread builds it and makes the steps of its leases.

use std::net::TcpListener;
use std::sync::Arc;

use super::fault;
use crate::api::Fault;
use crate::config::MigrationReceive;
use crate::end::Ending;
use crate::event_loop::Source;
use crate::machine::Round;
use crate::migration::disks::{Abandoned, Copies};
use crate::migration::door::Door;
use crate::migration::progress::Progress;
use crate::migration::receive::{self, ReceiveError, Received};
use crate::migration::stream::Stream;
use crate::migration::tls::Identity;
use crate::migration::wire::Wire;
use crate::monitor::opening::Opening;
use crate::monitor::operation::{Course, Reaction, Work};
use crate::monitor::{Guest, Monitor};
use coracle_storage::threads::{self, Kind as ThreadKind};

/// A machine that is being taken in.
pub(in crate::monitor) struct Receiving {
    thread: Opening<Result<Box<Received>, ReceiveError>>,
    listen: String,
    progress: Arc<Progress>,
    /// Removed with this, as when the process is stopped; the thread is not waited for.
    copies: Abandoned,
}

impl Monitor {
    /// Begins to wait for a machine.
    pub(in crate::monitor) fn receive_migration(
        &mut self,
        asked: MigrationReceive,
    ) -> Result<Reaction, Fault> {
        if !self.config.is_untouched() {
            return Err(Fault::bad_request(
                "Migration error: this process has been configured for a machine of its own; receive in a fresh one",
            ));
        }
        let identity = Identity::read(&asked.tls).map_err(|error| fault(&error))?;
        let listener = TcpListener::bind(&asked.listen).map_err(|error| {
            Fault::bad_request(format!(
                "Migration error: cannot listen at `{}`: {error}",
                asked.listen
            ))
        })?;
        let listen = listener.local_addr().map_err(|error| fault(&error))?.to_string();
        let postcopy_wait = asked.postcopy_wait();
        let progress = Arc::<Progress>::default();
        let copies = Arc::<Copies>::default();
        let job = receive::Job {
            door: Arc::new(Door {
                listener,
                identity: Arc::new(identity),
                from: asked.from_name,
            }),
            vm: asked.vm,
            overrides: asked.overrides,
            process: self.config.clone(),
            owner: self.owner.clone(),
            progress: Arc::clone(&progress),
            postcopy_wait,
            ending: Ending::new().map_err(|error| fault(&error))?,
            copies: Arc::clone(&copies),
        };
        let thread = Opening::begin("mover", &self.wakeup.notice(), move || job.run().map(Box::new));
        Ok(Reaction::Begun(Work::Receive(Receiving {
            thread: thread.map_err(|error| fault(&error))?,
            listen,
            progress,
            copies: Abandoned::unless_done(&copies),
        })))
    }

    pub(in crate::monitor) fn go_on_receiving(&mut self, mut receiving: Receiving) -> Course {
        let received = match receiving.thread.poll() {
            None => return Course::Pending(Work::Receive(receiving), None),
            Some(received) => received,
        };
        receiving.copies.never_mind();
        let Received {
            plan,
            config,
            wire,
            ending,
            copies,
        } = match received {
            Err(error) => return Course::Over(Err(fault(&error))),
            Ok(received) => *received,
        };
        log::info!("migration: the source lets go of the guest, and the leases of its disks are taken over");
        // If it cannot be built, the source hears that the connection ends, and has its disks back.
        let machine = match self.build(plan, &config) {
            Ok(machine) => machine,
            Err(error) => {
                copies.give_up();
                return Course::Over(Err(error));
            }
        };
        // From the next step on the guest may be here and nowhere else.
        copies.keep();
        self.config = config;
        self.event_loop.watch(Source::Ending(ending.clone()));
        self.memory_ending = Some(ending);
        self.attend(&machine);
        self.guest = Guest::Paused(machine);
        match self.begin_to_resume() {
            Ok(Reaction::Begun(Work::Resume(round))) => {
                self.wire = Some(wire);
                self.go_on(Work::Arrive(round))
            }
            Ok(_) => {
                if let Some(fetcher) = self.fetcher() {
                    fetcher.guest_runs();
                }
                tell(wire);
                Course::Over(Ok(()))
            }
            Err(error) => Course::Over(Err(error)),
        }
    }

    /// The leases are being started; then the guest runs.
    pub(in crate::monitor) fn go_on_arriving(&mut self, round: Round) -> Course {
        match self.go_on_resuming(round) {
            Course::Pending(Work::Resume(round), until) => Course::Pending(Work::Arrive(round), until),
            Course::Over(Ok(())) => {
                log::info!("migration: the guest runs here");
                if let Some(fetcher) = self.fetcher() {
                    fetcher.guest_runs();
                }
                if let Some(wire) = self.wire.take() {
                    tell(wire);
                }
                Course::Over(Ok(()))
            }
            other => {
                log::warn!(
                    "migration: the leases were not won, and the guest does not run here; disks that have come along, if \
                     any, are left, to be removed if it runs at the source"
                );
                self.wire = None;
                // The source has it back, or whoever was first has it: nothing of it is to stay here.
                if let Guest::Paused(machine) = std::mem::take(&mut self.guest) {
                    machine.retire();
                }
                other
            }
        }
    }
}

impl Receiving {
    pub(super) fn listen(&self) -> &String {
        &self.listen
    }

    pub(super) fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Gives it up.
    pub(in crate::monitor) fn cancel(&self) {
        self.progress.cancel();
    }
}

/// Tells the source, on a thread that nobody waits for.
fn tell(wire: Wire<Stream>) {
    let told = threads::spawn(ThreadKind::Mover, "mover", move || receive::tell_running(wire));
    if let Err(error) = told {
        log::warn!("the source is not told that the guest runs here: {error}");
    }
}
