//! What a simulated NFS server is like.

use std::time::Duration;

use crate::sim::dice::Dice;

/// A server's peculiarities. The default is a server that is quick and like nfs-ganesha.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// How much it takes.
    pub limits: Limits,
    /// What it may do and others do not.
    pub quirks: Quirks,
    /// What goes wrong in it.
    pub mishaps: Mishaps,
    /// What no server may do.
    pub hostility: Hostility,
}

/// How much a server takes.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// 1 or 2.
    pub minor_version_max: u32,
    /// Slots of a session.
    pub slots: u32,
    /// A call, and an answer, in bytes.
    pub message_bytes_max: u32,
    /// How long a client keeps what it has without a sign of life: whole seconds.
    pub lease: Duration,
    /// How long only what was held before a restart is given out after it.
    pub grace: Duration,
    /// Data of a READ.
    pub read_bytes_max: u32,
    /// Data of a WRITE.
    pub write_bytes_max: u32,
    /// Entries of one answer to a READDIR.
    pub page_entries: usize,
    /// What is a hole, or is none, as a whole.
    pub block_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            minor_version_max: 2,
            slots: 64,
            message_bytes_max: 2 << 20,
            lease: Duration::from_secs(30),
            grace: Duration::from_secs(5),
            read_bytes_max: 1 << 20,
            write_bytes_max: 1 << 20,
            page_entries: 64,
            block_bytes: 4096,
        }
    }
}

/// What a server may do and others do not.
#[derive(Clone, Copy, Debug)]
pub struct Quirks {
    /// What a silent client has is kept until another wants it.
    pub keeps_expired: bool,
    /// A client that was silent keeps its session, and is told of its loss there; otherwise it is forgotten.
    pub tells_of_loss: bool,
    /// An open by an owner that has the file open already is refused, if it denies something.
    pub denies_reopen: bool,
    /// Answers are kept for replays though nobody has asked for that.
    pub keeps_replies: bool,
    /// A replay of what was not kept is refused at its second operation, and not at the SEQUENCE.
    pub refuses_at_second: bool,
    /// Another call in the place of a replay is found out.
    pub finds_false_retries: bool,
    /// A replay of what is being carried out is answered with it, and otherwise with DELAY.
    pub joins_retries: bool,
    /// Nobody reads without a right in the time of grace.
    pub grace_for_anonymous: bool,
    /// A connection carries a session only after it was bound to it.
    pub needs_binding: bool,
    /// The grace ends when all have come back.
    pub lifts_grace: bool,
    /// An UNSTABLE write is as durable as any.
    pub is_stable: bool,
    /// Ranges can be freed.
    pub deallocates: bool,
    /// A file can share the content of another.
    pub clones: bool,
    /// It says where holes are.
    pub seeks: bool,
    /// Where there are no more data it says that there is nothing, and otherwise that the file ends.
    pub refuses_to_seek_nothing: bool,
    /// The verifier of an exclusive create is kept among the times of the file: whoever writes it has the server forget by whom
    /// it was made.
    pub forgets_makers: bool,
}

impl Default for Quirks {
    fn default() -> Self {
        Self {
            keeps_expired: false,
            tells_of_loss: false,
            denies_reopen: true,
            keeps_replies: false,
            refuses_at_second: false,
            finds_false_retries: false,
            joins_retries: false,
            grace_for_anonymous: false,
            needs_binding: false,
            lifts_grace: true,
            is_stable: false,
            deallocates: true,
            clones: false,
            seeks: true,
            refuses_to_seek_nothing: false,
            forgets_makers: false,
        }
    }
}

/// How often something goes wrong: once in so many times, 0 is never.
#[derive(Clone, Copy, Debug, Default)]
pub struct Mishaps {
    /// Calls that are carried out later, a WRITE in parts.
    pub slow_one_in: u64,
    /// How much later at most.
    pub slow_max: Duration,
    /// Operations that are answered with DELAY.
    pub delay_one_in: u64,
    /// Reads and writes that move less than they should.
    pub short_one_in: u64,
    /// Answers with another number of slots that the server would like.
    pub recall_one_in: u64,
    /// Answers that are followed by a call of the server.
    pub callback_one_in: u64,
    /// Operations before which the server's host loses its power.
    pub dies_one_in: u64,
    /// Calls at which it closes the connection.
    pub closes_one_in: u64,
    /// SEQUENCEs at which it has lost the session.
    pub forgets_one_in: u64,
    /// An answer is lost, though the connection is not.
    pub mutes_one_in: u64,
}

/// How often a server does what none may do: once in so many answers, 0 is never.
#[derive(Clone, Copy, Debug, Default)]
pub struct Hostility {
    /// Bits that are changed.
    pub garbage_one_in: u64,
    /// An answer to nothing.
    pub wrong_xid_one_in: u64,
    /// A record that is too long, or does not end.
    pub oversize_one_in: u64,
    /// The answer of another slot.
    pub wrong_slot_one_in: u64,
    /// An answer to a READ, whatever was asked.
    pub stray_data_one_in: u64,
    /// Directories without an end.
    pub endless_one_in: u64,
    /// Calls without an end.
    pub calls_one_in: u64,
    /// The same answer twice.
    pub doubled_one_in: u64,
    /// An operation that has failed for no reason.
    pub status_one_in: u64,
    /// A hole, or its end, that is anywhere.
    pub astray_one_in: u64,
}

impl Options {
    /// A server that does its worst within what is allowed. It is not hostile.
    pub fn draw(dice: &mut Dice) -> Self {
        Self {
            limits: Limits::draw(dice),
            quirks: Quirks::draw(dice),
            mishaps: Mishaps::draw(dice),
            hostility: Hostility::default(),
        }
    }
}

impl Limits {
    fn draw(dice: &mut Dice) -> Self {
        Self {
            minor_version_max: dice.pick(&[1, 2, 2]),
            slots: dice.pick(&[2, 3, 8, 64, 200]),
            message_bytes_max: dice.pick(&[36_864, 50_000, 2 << 20, 2 << 20]),
            lease: Duration::from_secs(dice.pick(&[1, 6, 20, 60])),
            grace: Duration::from_secs(dice.pick(&[0, 1, 3, 12])),
            read_bytes_max: dice.pick(&[4096, 65_536, 1 << 20]),
            write_bytes_max: dice.pick(&[4096, 65_536, 1 << 20]),
            page_entries: dice.pick(&[1, 2, 64]),
            block_bytes: dice.pick(&[512, 4096, 65_536]),
        }
    }
}

impl Quirks {
    fn draw(dice: &mut Dice) -> Self {
        let mut has = || dice.one_in(2);
        Self {
            keeps_expired: has(),
            tells_of_loss: has(),
            denies_reopen: has(),
            keeps_replies: has(),
            refuses_at_second: has(),
            finds_false_retries: has(),
            joins_retries: has(),
            grace_for_anonymous: has(),
            needs_binding: has(),
            lifts_grace: has(),
            is_stable: has() && has() && has(),
            deallocates: has(),
            clones: true,
            seeks: has(),
            refuses_to_seek_nothing: has(),
            forgets_makers: has(),
        }
    }
}

impl Mishaps {
    fn draw(dice: &mut Dice) -> Self {
        let slow_max = Duration::from_millis(dice.pick(&[1, 50, 2_000, 10_000]));
        let mut rate = |rates: &[u64]| dice.pick(rates);
        Self {
            slow_one_in: rate(&[0, 3, 20]),
            slow_max,
            delay_one_in: rate(&[0, 5, 50]),
            short_one_in: rate(&[0, 5, 50]),
            recall_one_in: rate(&[0, 20]),
            callback_one_in: rate(&[0, 10, 100]),
            dies_one_in: rate(&[0, 0, 200, 2_000]),
            closes_one_in: rate(&[0, 0, 100]),
            forgets_one_in: rate(&[0, 0, 300]),
            mutes_one_in: rate(&[0, 0, 0, 300]),
        }
    }
}

impl Hostility {
    /// A server that is up to something.
    pub fn draw(dice: &mut Dice) -> Self {
        let mut rate = || dice.pick(&[0, 0, 10, 50, 200]);
        Self {
            garbage_one_in: rate(),
            wrong_xid_one_in: rate(),
            oversize_one_in: rate(),
            wrong_slot_one_in: rate(),
            stray_data_one_in: rate(),
            endless_one_in: rate(),
            calls_one_in: rate(),
            doubled_one_in: rate(),
            status_one_in: rate(),
            astray_one_in: rate(),
        }
    }
}
