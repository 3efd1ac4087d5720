//! How a simulated target is made and how it behaves.

use crate::sim::dice::Dice;

/// All that can be chosen about a target. The default is polite, quick and complete in the way of tgtd 1.0.85.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Its name and where it says that it is.
    pub place: Place,
    /// What it answers to the login keys.
    pub limits: Limits,
    /// In which order and how soon it does what it was asked.
    pub pace: Pace,
    /// What is peculiar about its reservations and sessions.
    pub quirks: Quirks,
    /// What befalls well-behaved initiators.
    pub mishaps: Mishaps,
    /// What no target may do.
    pub hostility: Hostility,
}

/// Names that initiators use.
#[derive(Clone, Debug)]
pub struct Place {
    /// The iSCSI name.
    pub name: String,
    /// Where SendTargets says that it is: `address:port,group`.
    pub address: String,
}

impl Default for Place {
    fn default() -> Self {
        Self {
            name: "iqn.2026-01.test:t1".to_owned(),
            address: "127.0.0.1:3260,1".to_owned(),
        }
    }
}

/// What a target can take (RFC 7143, 13), and for which commands it has room.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// `MaxRecvDataSegmentLength` that it declares.
    pub max_recv_data_segment_bytes: u32,
    /// The largest `FirstBurstLength` that it agrees to.
    pub first_burst_bytes: u32,
    /// The largest `MaxBurstLength` that it agrees to.
    pub max_burst_bytes: u32,
    /// The largest `MaxOutstandingR2T` that it agrees to.
    pub max_outstanding_r2t: u32,
    /// Whether it insists on `InitialR2T=Yes`.
    pub initial_r2t: bool,
    /// Whether it agrees to `ImmediateData=Yes`.
    pub immediate_data: bool,
    /// How many commands of a session it takes at a time.
    pub commands_max: u32,
    /// Whether it agrees to CRC32C in `HeaderDigest`.
    pub header_digest: bool,
    /// Whether it agrees to CRC32C in `DataDigest`.
    pub data_digest: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_recv_data_segment_bytes: 8 << 10,
            first_burst_bytes: 64 << 10,
            max_burst_bytes: 256 << 10,
            max_outstanding_r2t: 1,
            initial_r2t: true,
            immediate_data: true,
            commands_max: 128,
            header_digest: true,
            data_digest: true,
        }
    }
}

impl Limits {
    fn draw(dice: &mut Dice) -> Self {
        let first_burst_bytes = dice.pick(&[512, 4096, 8192, 65536]);
        Self {
            max_recv_data_segment_bytes: dice.pick(&[512, 1024, 4096, 8192, 262_144]),
            first_burst_bytes,
            max_burst_bytes: first_burst_bytes.max(dice.pick(&[512, 4096, 16384, 262_144])),
            max_outstanding_r2t: dice.pick(&[1, 1, 2, 4]),
            initial_r2t: dice.one_in(2),
            immediate_data: !dice.one_in(3),
            commands_max: dice.pick(&[1, 2, 5, 32, 128]),
            header_digest: !dice.one_in(4),
            data_digest: !dice.one_in(4),
        }
    }
}

/// In which order a target works and answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pace {
    /// In the order of arrival, at once, in as few PDUs as can be.
    #[default]
    Prompt,
    /// In any order, in parts, at any later [`super::Connection::transmit`].
    Dice,
}

/// What differs between targets and is still allowed, or done by one that is in use. The default is tgtd's.
#[derive(Clone, Copy, Debug)]
pub struct Quirks {
    /// Who counts as registered.
    pub registrant: Registrant,
    /// What PREEMPT AND ABORT does.
    pub preempt_and_abort: Support,
    /// What COMPARE AND WRITE does, which page B0 speaks of in any case.
    pub compare_and_write: Support,
    /// Whether UNMAP and WRITE SAME are refused under a reservation as WRITE is. In tgtd they are not.
    pub fences_unmap: bool,
    /// Whether a WRITE may ask to be on the medium when it is acknowledged (DPOFUA). One that may not is refused.
    pub takes_fua: bool,
    /// Whether PREEMPT raises REGISTRATIONS PREEMPTED (SPC-4, 5.12.11.4). tgtd raises RESERVATIONS PREEMPTED.
    pub names_preempted_registrations: bool,
    /// Whether the end of a reservation is told its holder, if the type trusts no registrants, and nobody otherwise. By
    /// the standard it is told the other registrants, if the type trusts them.
    pub alarms_releaser: bool,
    /// Whether a login raises POWER ON OCCURRED on the new session.
    pub alarms_login: bool,
    /// Whether a login with the name and ISID of a session ends that session (RFC 7143, 6.3.5). In tgtd it lives on.
    pub reinstates: bool,
    /// Whether commands that arrived whole go on when their session ends.
    pub tasks_outlive_session: bool,
}

impl Default for Quirks {
    fn default() -> Self {
        Self {
            registrant: Registrant::Session,
            preempt_and_abort: Support::Missing,
            compare_and_write: Support::Missing,
            fences_unmap: false,
            takes_fua: true,
            names_preempted_registrations: false,
            alarms_releaser: true,
            alarms_login: true,
            reinstates: false,
            tasks_outlive_session: true,
        }
    }
}

impl Quirks {
    /// Those of a target as the standards describe it.
    pub fn none() -> Self {
        Self {
            registrant: Registrant::Port,
            preempt_and_abort: Support::Works,
            compare_and_write: Support::Works,
            fences_unmap: true,
            takes_fua: true,
            names_preempted_registrations: true,
            alarms_releaser: false,
            alarms_login: true,
            reinstates: true,
            tasks_outlive_session: false,
        }
    }

    fn draw(dice: &mut Dice) -> Self {
        let quirks = dice.pick(&[Self::default(), Self::default(), Self::none()]);
        Self {
            alarms_login: dice.one_in(2),
            fences_unmap: dice.one_in(2),
            takes_fua: !dice.one_in(3),
            ..quirks
        }
    }
}

/// Whom a target takes a registration to belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Registrant {
    /// One session: after a new login nobody is registered, and the old key stands for ever.
    Session,
    /// The initiator port, by name and ISID (SPC-4, 5.12): a new login finds its registration again.
    Port,
}

/// Whether a command is carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Support {
    /// It is refused with ILLEGAL REQUEST.
    Missing,
    /// It is.
    Works,
}

/// How often something happens that an initiator has to live with: once in so many occasions, 0 never.
#[derive(Clone, Copy, Debug, Default)]
pub struct Mishaps {
    /// Commands that are answered with BUSY.
    pub busy_one_in: u64,
    /// Commands that are answered with TASK SET FULL.
    pub task_set_full_one_in: u64,
    /// Commands that are answered with a UNIT ATTENTION that means nothing to them.
    pub attention_one_in: u64,
    /// Transmissions before which the target pings.
    pub ping_one_in: u64,
    /// Transmissions before which it asks for a logout.
    pub logout_request_one_in: u64,
    /// Transmissions before which it says that it drops the session, and does.
    pub session_drop_one_in: u64,
    /// Commands that are rejected, without being carried out.
    pub reject_one_in: u64,
    /// Commands that were let in and lie in a queue for long before anything is done about them.
    pub slow_one_in: u64,
    /// WRITEs on which the target ends the session without an answer: whatever it is that it cannot bear about them.
    pub poison_one_in: u64,
    /// Answers that leave the command window closed, which a later PDU opens again.
    pub closed_window_one_in: u64,
}

impl Mishaps {
    fn draw(dice: &mut Dice) -> Self {
        Self {
            busy_one_in: dice.pick(&[0, 0, 10, 50]),
            task_set_full_one_in: dice.pick(&[0, 0, 10, 50]),
            attention_one_in: dice.pick(&[0, 0, 20, 100]),
            ping_one_in: dice.pick(&[0, 20, 100]),
            logout_request_one_in: dice.pick(&[0, 0, 0, 500]),
            session_drop_one_in: dice.pick(&[0, 0, 0, 500]),
            reject_one_in: dice.pick(&[0, 0, 0, 200]),
            slow_one_in: dice.pick(&[0, 0, 0, 10]),
            poison_one_in: 0,
            closed_window_one_in: dice.pick(&[0, 5, 50]),
        }
    }
}

/// How often a target does what is forbidden: once in so many PDUs, 0 never.
#[derive(Clone, Copy, Debug, Default)]
pub struct Hostility {
    /// PDUs that are sent twice.
    pub duplicated_one_in: u64,
    /// PDUs that are sent later than those behind them.
    pub reordered_one_in: u64,
    /// PDUs with the tag of no task, or of another.
    pub wrong_tag_one_in: u64,
    /// PDUs with another StatSN.
    pub wrong_stat_sn_one_in: u64,
    /// Data-In at an offset where nothing was asked for.
    pub stray_data_one_in: u64,
    /// Data segments that are cut or lengthened, their header with them.
    pub resized_data_one_in: u64,
    /// R2Ts that ask for what lies beyond the transfer.
    pub r2t_beyond_one_in: u64,
    /// PDUs with bits changed anywhere in the header.
    pub garbage_one_in: u64,
    /// PDUs whose last bytes, or digest, are changed.
    pub wrong_digest_one_in: u64,
    /// Bytes between PDUs that are none.
    pub noise_one_in: u64,
    /// Login responses in the full feature phase.
    pub login_response_one_in: u64,
}

impl Hostility {
    /// A target that is up to something.
    pub fn draw(dice: &mut Dice) -> Self {
        let mut rate = || dice.pick(&[0, 0, 10, 50, 200]);
        Self {
            duplicated_one_in: rate(),
            reordered_one_in: rate(),
            wrong_tag_one_in: rate(),
            wrong_stat_sn_one_in: rate(),
            stray_data_one_in: rate(),
            resized_data_one_in: rate(),
            r2t_beyond_one_in: rate(),
            garbage_one_in: rate(),
            wrong_digest_one_in: rate(),
            noise_one_in: rate(),
            login_response_one_in: rate(),
        }
    }
}

impl Options {
    /// A target that does its worst within what is allowed. It is not hostile.
    pub fn draw(dice: &mut Dice) -> Self {
        Self {
            place: Place::default(),
            limits: Limits::draw(dice),
            pace: Pace::Dice,
            quirks: Quirks::draw(dice),
            mishaps: Mishaps::draw(dice),
            hostility: Hostility::default(),
        }
    }
}
