//! A connection that carries iSCSI: how a PDU is put on it.

use crate::remote::connection::Connection;
use crate::request::Segment;
use crate::segments;

use super::digest::{Digest, header_digest};
use super::inbox::Inbox;
use super::pdu::{Bhs, Tag, padding_bytes};
use super::session::Digests;

/// A connection that carries iSCSI. Who lends memory to it is a task.
pub(super) type Link = Connection<Inbox, Tag>;

/// The data segment of a PDU.
#[derive(Clone, Copy, Debug)]
pub(super) enum Payload<'a> {
    /// Bytes of our own, copied now.
    Own(&'a [u8]),
    /// Memory of a request, copied now: it is short, or what is sent has a digest and must not change any more.
    Copied(&'a [Segment]),
    /// Memory of the request of this task, which stays in place until the payload was sent.
    Lent(&'a [Segment], Tag),
}

impl Payload<'_> {
    /// No data segment.
    pub(super) const NONE: Self = Self::Own(&[]);
}

impl Link {
    /// What protects the PDUs.
    pub(super) fn digests(&self) -> Digests {
        self.inbox().digests()
    }

    /// Queues a PDU, to be sent with the others of this round.
    pub(super) fn send(&mut self, header: &Bhs, payload: Payload<'_>) {
        let digests = self.digests();
        let outbox = self.outbox();
        outbox.write(&header.0);
        if digests.header {
            outbox.write(&header_digest(header, &[]));
        }
        let mut digest = Digest::default();
        let mut add = |data: &[u8]| {
            if digests.data {
                digest.add(data);
            }
            data.len()
        };
        let len = match payload {
            Payload::Own(bytes) => {
                outbox.write(bytes);
                add(bytes)
            }
            Payload::Copied(pieces) => add(outbox.gather(pieces)),
            Payload::Lent(pieces, task) => {
                assert!(!digests.data, "what has a digest is copied");
                outbox.lend(pieces, task);
                usize::try_from(segments::total(pieces)).expect("this is a 64-bit monitor")
            }
        };
        let padding = [0; 3];
        let padding = padding.get(..padding_bytes(len)).unwrap_or_default();
        add(padding);
        outbox.write(padding);
        if digests.data && len > 0 {
            outbox.write(&digest.finish());
        }
    }
}
