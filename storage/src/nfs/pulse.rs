//! Whether a server is alive, and whether it certainly still has what the client has there (RFC 8881, 8.3).

use std::time::{Duration, Instant};

use crate::remote::quota::Quota;

use super::session::SessionError;

/// The signs of life of a server, and what they are worth.
#[derive(Debug)]
pub(super) struct Pulse {
    lease: Duration,
    patience: Duration,
    heard: Instant,
    /// When the last call was sent that has renewed the lease.
    renewed: Instant,
    /// When a sign of life was asked for that has not come.
    pinged: Option<Instant>,
    /// Of its calls.
    quota: Quota,
}

/// A session with calls under way, of which nothing is heard, is asked for a sign of life so soon.
const PING_BUSY_PERIOD: Duration = Duration::from_secs(1);
/// Nothing is written in so small a part of the lease before its end: clocks differ, and what is sent takes its time.
const MARGIN: u32 = 6;

impl Pulse {
    /// That of a session that was just made. The client is forgotten after the time of the `lease` without a sign of life of
    /// its own; one of the server may take as long as `patience`.
    pub(super) fn new(lease: Duration, patience: Duration, now: Instant) -> Self {
        Self {
            lease,
            patience,
            heard: now,
            renewed: now,
            pinged: None,
            quota: Quota::default(),
        }
    }

    /// Takes in what the server says of the lease.
    pub(super) fn set_lease(&mut self, lease: Duration) {
        self.lease = lease;
    }

    /// There is another connection.
    pub(super) fn rejoined(&mut self, now: Instant) {
        (self.heard, self.pinged) = (now, None);
    }

    /// Something has come of the server.
    pub(super) fn hear(&mut self, now: Instant) {
        self.heard = now;
    }

    /// When something came last.
    pub(super) fn heard(&self) -> Instant {
        self.heard
    }

    /// A SEQUENCE that was sent then was carried out: that has renewed the lease.
    pub(super) fn renew(&mut self, sent: Instant) {
        self.renewed = self.renewed.max(sent);
        self.pinged = None;
    }

    /// When the last one was sent that has done so.
    pub(super) fn renewed(&self) -> Instant {
        self.renewed
    }

    /// From when on the client may have lost what it has.
    pub(super) fn expires(&self) -> Instant {
        self.renewed + self.lease - self.lease / MARGIN
    }

    /// When something is to be done about a sign of life: to ask for it, or to give the server up that was asked.
    pub(super) fn due(&self, is_busy: bool) -> Instant {
        let renewal = self.renewed + self.lease / 3;
        match self.pinged {
            Some(pinged) => pinged.max(self.heard) + self.patience,
            None if is_busy => renewal.min(self.heard + PING_BUSY_PERIOD),
            None => renewal,
        }
    }

    /// A sign of life is asked for.
    ///
    /// # Errors
    ///
    /// When one was, and has not come.
    pub(super) fn ask(&mut self, now: Instant) -> Result<(), SessionError> {
        if let Some(pinged) = self.pinged {
            return Err(SessionError::Silent(now - pinged));
        }
        self.pinged = Some(now);
        Ok(())
    }

    /// Counts an answer to a call of the server; `departures` is how many batches the connection has begun to send.
    pub(super) fn answered(&mut self, departures: u64) -> Result<(), SessionError> {
        if !self.quota.takes_one(departures) {
            return Err(SessionError::Protocol("it calls and calls, and takes no answer"));
        }
        Ok(())
    }
}
