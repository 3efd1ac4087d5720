//! The source: a thread that sends, and asks the `vmm` thread for whatever only that can do.

use std::io;
use std::net::{TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, Instant};

use coracle_devices::virtio::device::Notice;
use vm_memory::GuestMemoryMmap;

use super::hello::Hello;
use super::pages::Sender as Pages;
use super::progress::Progress;
use super::tls::{ClientStream, Identity, TlsError, TlsFiles};
use super::wire::{Kind, Wire, WireError};
use crate::snapshot::memory::{PAGE_BYTES, PageSet};

/// What a migration needs.
pub struct Job {
    /// HOST:PORT of the target.
    pub to: String,
    /// The name that its certificate has to have, if it is not that of `to`.
    pub name: Option<String>,
    /// Ours.
    pub tls: TlsFiles,
    /// What is said first.
    pub hello: Hello,
    /// The guest's memory.
    pub memory: Arc<GuestMemoryMmap>,
    /// How long the guest may stand still while its last pages are sent.
    pub downtime: Duration,
    /// Until when the last round has begun.
    pub deadline: Instant,
    /// The other end of it.
    pub desk: Desk,
    /// How far it is.
    pub progress: Arc<Progress>,
}

/// Where the `vmm` thread is asked.
pub struct Desk {
    /// What is wanted.
    pub wants: Sender<Want>,
    /// What is given; closed when there is no more.
    pub given: Receiver<Given>,
    /// Rings when something is wanted.
    pub notice: Notice,
}

/// What only the `vmm` thread can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// That what is written is recorded from now on.
    Rounds,
    /// What was written since.
    Round,
    /// That the guest stands still, with everything on its media.
    Stop,
    /// That the fences come down.
    Yield,
}

/// The answer to it.
#[derive(Debug)]
pub enum Given {
    /// Pages that are to be sent.
    Pages(PageSet),
    /// The last of them, and the state.
    Last(PageSet, Vec<u8>),
    /// The fences are down.
    Yielded,
}

/// Why the guest is not known to run at the target.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// Nobody is there.
    #[error("cannot connect to the target `{to}`: is a receiver listening there?")]
    Connect {
        /// As asked.
        to: String,
        /// What the host says.
        #[source]
        source: io::Error,
    },
    /// Somebody else is.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// It is gone, or talks nonsense.
    #[error("the target was lost")]
    Wire(#[from] WireError),
    /// It has reasons.
    #[error("the target refuses: {0}")]
    Refused(String),
    /// Something at the source.
    #[error("the source cannot go on with it")]
    Source,
    /// The guest writes faster than the connection takes it.
    #[error(
        "the guest writes memory faster than it is sent: {left_mib} MiB are left after {rounds} rounds; give it a longer \
         downtime_ms, or a longer timeout_s"
    )]
    TooSlow {
        /// How much.
        left_mib: u64,
        /// After how many.
        rounds: u64,
    },
    /// Somebody wanted it no more.
    #[error("the migration was cancelled")]
    Cancelled,
}

/// How long the target may be silent before the guest stands still.
const SILENCE_MAX: Duration = Duration::from_secs(10);
/// And when it has everything.
const START_MAX: Duration = Duration::from_secs(3);
/// Most rounds before the last.
const ROUNDS_MAX: u64 = 30;
/// What it takes to save, to send and to restore the state, until it is measured.
const STATE_TIME: Duration = Duration::from_millis(15);

impl Job {
    /// Does it all. When it returns well, the guest runs at the target.
    ///
    /// # Errors
    ///
    /// [`SendError`]: once the fences are down, the leases say what has become of it.
    pub fn run(self) -> Result<(), SendError> {
        let sent = self.send();
        match sent {
            Err(SendError::Wire(_)) if self.progress.is_cancelled() => Err(SendError::Cancelled),
            sent => sent,
        }
    }

    fn send(&self) -> Result<(), SendError> {
        let mut wire = Wire::new(self.connect()?);
        let hello = postcard::to_stdvec(&self.hello).expect("plain data can be written");
        wire.send(Kind::Hello, &[&hello])?;
        expect(&mut wire, Kind::Ready)?;
        let mut pages = Pages::default();
        let mut set = self.pages(Want::Rounds)?;
        loop {
            let begun = Instant::now();
            let sent = self.send_round(&mut wire, &mut pages, &set)?;
            let seconds = begun.elapsed().as_secs_f64().max(1e-6);
            set = self.pages(Want::Round)?;
            if self.is_last(&set, sent, seconds)? {
                break;
            }
        }
        let Given::Last(last, state) = self.ask(Want::Stop)? else {
            return Err(SendError::Source);
        };
        set.insert_all(&last);
        self.send_round(&mut wire, &mut pages, &set)?;
        wire.send(Kind::State, &[&state])?;
        expect(&mut wire, Kind::Loaded)?;
        self.progress.cannot_be_cut();
        if self.progress.is_cancelled() {
            return Err(SendError::Cancelled);
        }
        self.ask(Want::Yield)?;
        wire.send(Kind::Go, &[])?;
        wire.stream()
            .sock
            .set_read_timeout(Some(START_MAX))
            .map_err(WireError::Io)?;
        expect(&mut wire, Kind::Running)
    }

    fn connect(&self) -> Result<ClientStream, SendError> {
        let failed = |source| SendError::Connect {
            to: self.to.clone(),
            source,
        };
        let identity = Identity::read(&self.tls)?;
        let mut outcome = Err(io::ErrorKind::AddrNotAvailable.into());
        for address in self.to.to_socket_addrs().map_err(failed)? {
            outcome = TcpStream::connect_timeout(&address, SILENCE_MAX);
            if outcome.is_ok() {
                break;
            }
        }
        let socket = outcome.map_err(failed)?;
        let prepared = socket
            .set_nodelay(true)
            .and_then(|()| socket.set_read_timeout(Some(SILENCE_MAX)))
            .and_then(|()| socket.set_write_timeout(Some(SILENCE_MAX)))
            .and_then(|()| self.progress.goes_by(&socket));
        prepared.map_err(failed)?;
        let host = self
            .to
            .rsplit_once(':')
            .map_or(self.to.as_str(), |(host, _)| host);
        let host = host.trim_start_matches('[').trim_end_matches(']');
        Ok(identity.call(socket, self.name.as_deref().unwrap_or(host))?)
    }

    fn send_round(
        &self,
        wire: &mut Wire<ClientStream>,
        pages: &mut Pages,
        set: &PageSet,
    ) -> Result<u64, SendError> {
        self.progress.begin_round(set.count());
        let sent = pages.send(wire, &self.memory, set, |count| {
            self.progress.add(count);
            if self.progress.is_cancelled() {
                return Err(WireError::Io(io::ErrorKind::ConnectionAborted.into()));
            }
            Ok(())
        })?;
        wire.flush()?;
        Ok(sent)
    }

    /// Whether the guest may stand still for what is left.
    fn is_last(&self, left: &PageSet, sent: u64, seconds: f64) -> Result<bool, SendError> {
        let page_bytes = PAGE_BYTES as f64;
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let (sent_bytes, left_bytes) = (sent as f64 * page_bytes, left.count() as f64 * page_bytes);
        // Rounds of a few pages say little of the connection.
        let bytes_per_s = (sent_bytes / seconds).max(1.0);
        let downtime = Duration::from_secs_f64((left_bytes / bytes_per_s).min(1e6)) + STATE_TIME;
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "an estimate"
        )]
        self.progress.predict(bytes_per_s as u64, downtime);
        if downtime <= self.downtime.max(STATE_TIME * 2) {
            return Ok(true);
        }
        if self.progress.rounds() >= ROUNDS_MAX || Instant::now() >= self.deadline {
            return Err(SendError::TooSlow {
                left_mib: (left.count() * PAGE_BYTES as u64) >> 20,
                rounds: self.progress.rounds(),
            });
        }
        Ok(false)
    }

    fn pages(&self, want: Want) -> Result<PageSet, SendError> {
        match self.ask(want)? {
            Given::Pages(pages) => Ok(pages),
            Given::Last(..) | Given::Yielded => Err(SendError::Source),
        }
    }

    fn ask(&self, want: Want) -> Result<Given, SendError> {
        if self.desk.wants.send(want).is_err() {
            return Err(SendError::Source);
        }
        self.desk.notice.ring();
        self.desk.given.recv().map_err(|_| SendError::Source)
    }
}

fn expect(wire: &mut Wire<ClientStream>, kind: Kind) -> Result<(), SendError> {
    wire.flush()?;
    match wire.receive()? {
        (found, _) if found == kind => Ok(()),
        (Kind::Refused, why) => Err(SendError::Refused(String::from_utf8_lossy(why).into_owned())),
        (found, _) => Err(WireError::Unexpected { found }.into()),
    }
}
