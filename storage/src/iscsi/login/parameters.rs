//! What a login agrees on for its session (RFC 7143, 13).

use super::{Login, LoginError, LoginPlan, Negotiated};
use crate::iscsi::digest::DigestKind;
use crate::iscsi::pdu::{DATA_SEGMENT_BYTES_MAX, LoginResponse};
use crate::iscsi::text::{self, NOT_UNDERSTOOD, Pair, Text};

/// As much as goes by one R2T at most, in bytes. A request of a guest is rarely longer.
const MAX_BURST_LENGTH: u32 = 1 << 20;
/// As much as goes unasked at most, in bytes.
const FIRST_BURST_LENGTH: u32 = 256 << 10;
/// R2Ts of one command that may be open.
const MAX_OUTSTANDING_R2T: u32 = 16;
/// Seconds. The session knows itself when to come back, and no task outlives its connection at recovery level 0.
const TIME2WAIT: u32 = 0;
const TIME2RETAIN: u32 = 0;

/// Least that a length may be.
const LENGTH_BYTES_MIN: u32 = 512;
const SECONDS_MAX: u32 = 3600;

/// What is agreed so far. It begins with what holds if a target passes over a key.
#[derive(Clone, Copy, Debug)]
pub(super) struct Parameters {
    header_digest: Offered,
    data_digest: Offered,
    portal_group: Option<u16>,
    initial_r2t: bool,
    immediate_data: bool,
    max_burst_length: u32,
    first_burst_length: u32,
    target_max_recv_data_segment_length: u32,
    max_outstanding_r2t: u32,
    time2wait: u32,
}

impl Parameters {
    pub(super) fn new(plan: &LoginPlan) -> Self {
        Self {
            header_digest: Offered::new("HeaderDigest", "header_digest", plan.header_digest),
            data_digest: Offered::new("DataDigest", "data_digest", plan.data_digest),
            portal_group: None,
            initial_r2t: true,
            immediate_data: true,
            max_burst_length: 262_144,
            first_burst_length: 65_536,
            target_max_recv_data_segment_length: 8192,
            max_outstanding_r2t: 1,
            time2wait: 2,
        }
    }

    /// What is offered. A discovery session transfers no data, and says nothing of it.
    pub(super) fn offer(plan: &LoginPlan, text: &mut Text) {
        text.put("HeaderDigest", plan.header_digest);
        text.put("DataDigest", plan.data_digest);
        text.put("MaxRecvDataSegmentLength", plan.max_recv_data_segment_length);
        text.put("ErrorRecoveryLevel", 0);
        text.put("DefaultTime2Wait", TIME2WAIT);
        text.put("DefaultTime2Retain", TIME2RETAIN);
        if plan.session.target().is_none() {
            return;
        }
        text.put("MaxConnections", 1);
        text.put("InitialR2T", text::yes(false));
        text.put("ImmediateData", text::yes(true));
        text.put("MaxBurstLength", MAX_BURST_LENGTH);
        text.put("FirstBurstLength", FIRST_BURST_LENGTH);
        text.put("MaxOutstandingR2T", MAX_OUTSTANDING_R2T);
        text.put("DataPDUInOrder", text::yes(true));
        text.put("DataSequenceInOrder", text::yes(true));
    }

    /// Takes the target's answer to an offer, or what it declares. Returns whether the key is known.
    pub(super) fn take(&mut self, pair: &Pair<'_>) -> Result<bool, LoginError> {
        match pair.key {
            "HeaderDigest" => self.header_digest.take(pair.value)?,
            "DataDigest" => self.data_digest.take(pair.value)?,
            // It has not agreed, and what holds without agreement is set already.
            _ if is_refusal(pair.value) => {}
            "TargetPortalGroupTag" => {
                self.portal_group = u16::try_from(number("TargetPortalGroupTag", pair, 0, 65_535)?).ok();
            }
            "TargetAlias" | "TargetAddress" => {}
            "MaxRecvDataSegmentLength" => {
                self.target_max_recv_data_segment_length = length("MaxRecvDataSegmentLength", pair)?;
            }
            "MaxBurstLength" => {
                self.max_burst_length = length("MaxBurstLength", pair)?.min(MAX_BURST_LENGTH);
            }
            "FirstBurstLength" => {
                self.first_burst_length = length("FirstBurstLength", pair)?.min(FIRST_BURST_LENGTH);
            }
            "InitialR2T" => self.initial_r2t = boolean("InitialR2T", pair)?,
            "ImmediateData" => self.immediate_data = boolean("ImmediateData", pair)?,
            "MaxOutstandingR2T" => {
                let outstanding = number("MaxOutstandingR2T", pair, 1, 65_535)?;
                self.max_outstanding_r2t = outstanding.min(MAX_OUTSTANDING_R2T);
            }
            "DefaultTime2Wait" => {
                // The longer one holds (13.15), and ours is none.
                self.time2wait = number("DefaultTime2Wait", pair, 0, SECONDS_MAX)?;
            }
            "DefaultTime2Retain" => drop(number("DefaultTime2Retain", pair, 0, SECONDS_MAX)?),
            "MaxConnections" => drop(number("MaxConnections", pair, 1, 65_535)?),
            "ErrorRecoveryLevel" => drop(number("ErrorRecoveryLevel", pair, 0, 0)?),
            "DataPDUInOrder" => in_order("DataPDUInOrder", pair)?,
            "DataSequenceInOrder" => in_order("DataSequenceInOrder", pair)?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// What holds from now on, with the last response of the login.
    ///
    /// # Errors
    ///
    /// A digest that was asked for was passed over.
    pub(super) fn settle(&self, plan: &LoginPlan, last: &LoginResponse) -> Result<Negotiated, LoginError> {
        for digest in [self.header_digest, self.data_digest] {
            if !digest.is_agreed {
                return Err(digest.refused());
            }
        }
        Ok(Negotiated {
            isid: plan.isid,
            tsih: last.tsih,
            portal_group: self.portal_group,
            header_digest: plan.header_digest,
            data_digest: plan.data_digest,
            initial_r2t: self.initial_r2t,
            immediate_data: self.immediate_data,
            max_burst_length: self.max_burst_length,
            // What goes unasked is part of the first burst (13.14).
            first_burst_length: self.first_burst_length.min(self.max_burst_length),
            max_recv_data_segment_length: plan.max_recv_data_segment_length,
            target_max_recv_data_segment_length: self.target_max_recv_data_segment_length,
            max_outstanding_r2t: self.max_outstanding_r2t,
            time2wait: self.time2wait,
            cmd_sn: Login::CMD_SN,
            exp_stat_sn: last.stat_sn.next(),
            window: last.window,
        })
    }
}

/// A digest, and whether the target has agreed to it.
#[derive(Clone, Copy, Debug)]
struct Offered {
    key: &'static str,
    option: &'static str,
    wanted: DigestKind,
    is_agreed: bool,
}

impl Offered {
    fn new(key: &'static str, option: &'static str, wanted: DigestKind) -> Self {
        Self {
            key,
            option,
            wanted,
            // None is what holds without agreement.
            is_agreed: wanted == DigestKind::None,
        }
    }

    fn take(&mut self, value: &str) -> Result<(), LoginError> {
        let is_taken = value == self.wanted.to_string();
        let is_absent = self.wanted == DigestKind::None && is_refusal(value);
        self.is_agreed = is_taken || is_absent;
        if self.is_agreed {
            Ok(())
        } else {
            Err(self.refused())
        }
    }

    fn refused(&self) -> LoginError {
        LoginError::Digest {
            key: self.key,
            option: self.option,
            wanted: self.wanted,
        }
    }
}

/// Whether a value says that there is none (6.2).
pub(super) fn is_refusal(value: &str) -> bool {
    [NOT_UNDERSTOOD, "Irrelevant", "Reject"].contains(&value)
}

fn number(key: &'static str, pair: &Pair<'_>, min: u32, max: u32) -> Result<u32, LoginError> {
    text::number(pair.value)
        .and_then(|number| u32::try_from(number).ok())
        .filter(|number| (min..=max).contains(number))
        .ok_or(LoginError::Value(key))
}

fn length(key: &'static str, pair: &Pair<'_>) -> Result<u32, LoginError> {
    number(key, pair, LENGTH_BYTES_MIN, DATA_SEGMENT_BYTES_MAX)
}

fn boolean(key: &'static str, pair: &Pair<'_>) -> Result<bool, LoginError> {
    text::boolean(pair.value).ok_or(LoginError::Value(key))
}

fn in_order(key: &'static str, pair: &Pair<'_>) -> Result<(), LoginError> {
    match boolean(key, pair)? {
        true => Ok(()),
        // Either side can have it so (13.18, 13.19), and we have asked for it.
        false => Err(LoginError::Value(key)),
    }
}
