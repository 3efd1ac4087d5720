//! The login that makes a connection a session (RFC 7143, 6.3 and 11.12), without I/O.
//!
//! ```text
//!           request            request                  request
//! Security ----------> … ----> Operational -----> … -----------> Done(Negotiated)
//!    |      response   |           |         response
//!    |                 |           |
//!    +-- status 1xx ---+-----------+---> Redirected: log in there
//!    +-- status 2xx, 3xx, what makes no sense: a LoginError, and the connection is to be closed
//! ```
//!
//! The owner sends what [`Login::request`] says, and gives what comes back to [`Login::response`], until that no longer
//! says to go on. A target that never ends the login is cut off after [`REQUESTS_MAX`]; the time is the owner's to
//! limit.

mod error;
mod parameters;
mod security;

use std::collections::HashSet;
use std::sync::Arc;

use super::chap::{Authentication, CHALLENGE_BYTES, Challenge};
use super::digest::DigestKind;
use super::name::IscsiName;
use super::pdu::{Isid, LoginRequest, LoginResponse, Serial, Stage, Tag, Transit, Window};
use super::portal::{Portal, TargetAddress};
use super::text::{NOT_UNDERSTOOD, Pair, Text, pairs};

pub use error::{LoginError, LoginFailure, StatusText};
use parameters::Parameters;
use security::Step;

/// Longest data segment of a login's PDUs, in bytes: nothing else is agreed on yet (13.12).
pub const LOGIN_SEGMENT_BYTES_MAX: u32 = 8192;
/// Longest text of one answer, which may come in several PDUs, in bytes.
pub const LOGIN_TEXT_BYTES_MAX: usize = 64 << 10;
/// Requests of one login: one that needs more does not end.
pub const REQUESTS_MAX: u32 = 32;
/// Keys that a target may offer and that nobody here knows.
const UNKNOWN_KEYS_MAX: usize = 32;
/// Bytes of chance that a login takes.
pub const RANDOM_BYTES: usize = 1 + CHALLENGE_BYTES;

/// What a login is for, and what it insists on.
#[derive(Clone, Debug)]
pub struct LoginPlan {
    /// Who logs in.
    pub initiator: IscsiName,
    /// With the initiator's name: who it is to reservations.
    pub isid: Isid,
    /// Where to.
    pub session: SessionType,
    /// How both sides prove who they are; `None`: not at all.
    pub authentication: Option<Authentication>,
    /// Insisted on, either way.
    pub header_digest: DigestKind,
    /// Insisted on, either way.
    pub data_digest: DigestKind,
    /// Longest data segment that the target may send, in bytes.
    pub max_recv_data_segment_length: u32,
}

/// What a session is for (13.21).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SessionType {
    /// To ask which targets there are.
    Discovery,
    /// To use this one.
    Normal(IscsiName),
}

impl SessionType {
    /// Whom it is to.
    pub fn target(&self) -> Option<&IscsiName> {
        match self {
            Self::Discovery => None,
            Self::Normal(target) => Some(target),
        }
    }
}

/// What a response came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Another request is to be sent.
    Continue,
    /// The session is there.
    Done(Negotiated),
    /// The target is somewhere else.
    Redirected(Redirection),
}

/// Where the target is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Redirection {
    /// Where to log in.
    pub portal: Portal,
    /// Whether the portal that said so is not to be asked again.
    pub is_permanent: bool,
}

/// What holds in the full feature phase, under its names in section 13. Lengths are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "RFC 7143, 13 says what each is")]
pub struct Negotiated {
    pub isid: Isid,
    pub tsih: u16,
    /// `TargetPortalGroupTag`, if the target said it.
    pub portal_group: Option<u16>,
    pub header_digest: DigestKind,
    pub data_digest: DigestKind,
    pub initial_r2t: bool,
    pub immediate_data: bool,
    pub max_burst_length: u32,
    pub first_burst_length: u32,
    /// Longest data segment that comes.
    pub max_recv_data_segment_length: u32,
    /// Longest data segment that may go.
    pub target_max_recv_data_segment_length: u32,
    pub max_outstanding_r2t: u32,
    /// `DefaultTime2Wait`, in seconds.
    pub time2wait: u32,
    /// The turn of the first command.
    pub cmd_sn: Serial,
    /// The status that comes next.
    pub exp_stat_sn: Serial,
    /// Which commands the target takes.
    pub window: Window,
}

/// A login that is going on.
#[derive(Debug)]
pub struct Login {
    plan: Arc<LoginPlan>,
    challenge: Challenge,
    stage: Stage,
    step: Step,
    /// Whether the step, or in the operational stage the offer, has been said.
    is_said: bool,
    /// The keys that the target is to be told of that we do not know them.
    unknown: Vec<String>,
    parameters: Parameters,
    /// The text of an answer that has not come to its end.
    gathered: Vec<u8>,
    asked: Transit,
    requests: u32,
    exp_stat_sn: Serial,
}

impl Login {
    /// The turn of a session's first command. All of a login's requests are immediate and leave it so.
    const CMD_SN: Serial = Serial(1);
    const TASK_TAG: Tag = Tag(0);
    const SUCCESS: u8 = 0;
    const REDIRECTION: u8 = 1;
    const MOVED_PERMANENTLY: u8 = 2;

    /// Begins a login. `random` is not used again: it becomes the question to the target.
    pub fn new(plan: &Arc<LoginPlan>, random: [u8; RANDOM_BYTES]) -> Self {
        let [identifier, value @ ..] = random;
        let stage = Stage::SecurityNegotiation;
        Self {
            plan: Arc::clone(plan),
            challenge: Challenge { identifier, value },
            stage,
            step: Step::Method,
            is_said: false,
            unknown: Vec::new(),
            parameters: Parameters::new(plan),
            gathered: Vec::new(),
            asked: Transit::Stay(stage),
            requests: 0,
            exp_stat_sn: Serial(0),
        }
    }

    /// The next request, and its data segment. Once for each response that says to go on, and once at the beginning.
    pub fn request(&mut self) -> (LoginRequest, Vec<u8>) {
        let mut text = Text::default();
        let transit = if self.gathered.is_empty() {
            self.asked = self.say(&mut text);
            self.asked
        } else {
            // An empty one fetches the rest (6.2), and takes back nothing that was asked.
            Transit::Stay(self.stage)
        };
        self.requests += 1;
        let request = LoginRequest {
            transit,
            version_max: 0,
            version_min: 0,
            isid: self.plan.isid,
            tsih: 0,
            initiator_task_tag: Self::TASK_TAG,
            cid: 0,
            cmd_sn: Self::CMD_SN,
            exp_stat_sn: self.exp_stat_sn,
        };
        (request, text.into_bytes())
    }

    /// Takes the response to the last request.
    ///
    /// # Errors
    ///
    /// There will be no session. The connection is to be closed.
    pub fn response(&mut self, response: &LoginResponse, data: &[u8]) -> Result<Progress, LoginError> {
        if response.initiator_task_tag != Self::TASK_TAG {
            return Err(LoginError::Protocol("it answers another request"));
        }
        self.exp_stat_sn = response.stat_sn.next();
        if self.gathered.len() + data.len() > LOGIN_TEXT_BYTES_MAX {
            return Err(LoginError::Protocol("it is too long"));
        }
        self.gathered.extend_from_slice(data);
        match response.status_class {
            Self::SUCCESS => {}
            Self::REDIRECTION => return self.redirected(response),
            _ => return Err(LoginError::of(response, &self.plan, &self.step)),
        }
        if response.version_active != 0 {
            return Err(LoginError::Protocol("it is of another version of iSCSI"));
        }
        if response.transit.stage() != self.stage {
            return Err(LoginError::Protocol("it is of another stage"));
        }
        let progress = self.advanced(response)?;
        if progress == Progress::Continue && self.requests >= REQUESTS_MAX {
            return Err(LoginError::Protocol("it asks for more and more"));
        }
        Ok(progress)
    }

    /// Says what is to be said now; returns where to.
    fn say(&mut self, text: &mut Text) -> Transit {
        let says_more = !std::mem::replace(&mut self.is_said, true);
        for key in self.unknown.drain(..) {
            text.put(&key, NOT_UNDERSTOOD);
        }
        if self.stage == Stage::LoginOperationalNegotiation {
            if says_more {
                Parameters::offer(&self.plan, text);
            }
            return Transit::Leave(self.stage, Stage::FullFeaturePhase);
        }
        if says_more {
            self.step.say(&self.plan, &self.challenge, text);
        }
        if self.step.is_last(&self.plan) {
            Transit::Leave(self.stage, Stage::LoginOperationalNegotiation)
        } else {
            Transit::Stay(self.stage)
        }
    }

    fn advanced(&mut self, response: &LoginResponse) -> Result<Progress, LoginError> {
        if matches!(response.transit, Transit::Unfinished(_)) {
            if self.gathered.is_empty() {
                return Err(LoginError::Protocol("it says that more follows, and nothing yet"));
            }
            return Ok(Progress::Continue);
        }
        let text = std::mem::take(&mut self.gathered);
        self.take(&pairs(&text)?)?;
        let Transit::Leave(_, next) = response.transit else {
            return Ok(Progress::Continue);
        };
        if self.asked != response.transit {
            return Err(LoginError::Protocol("it leaves the stage unasked"));
        }
        if next == Stage::FullFeaturePhase {
            return self.parameters.settle(&self.plan, response).map(Progress::Done);
        }
        self.stage = next;
        self.is_said = false;
        Ok(Progress::Continue)
    }

    fn take(&mut self, pairs: &[Pair<'_>]) -> Result<(), LoginError> {
        let mut keys = HashSet::new();
        for pair in pairs {
            if !keys.insert(pair.key) {
                return Err(LoginError::Protocol("it has a key twice"));
            }
            let is_known = security::is_key(pair.key) || self.parameters.take(pair)?;
            if is_known || parameters::is_refusal(pair.value) {
                continue;
            }
            if self.unknown.len() == UNKNOWN_KEYS_MAX {
                return Err(LoginError::Protocol("it offers too many keys that are not known"));
            }
            self.unknown.push(pair.key.to_owned());
        }
        if self.stage == Stage::SecurityNegotiation {
            let step = std::mem::replace(&mut self.step, Step::Method);
            let before = std::mem::discriminant(&step);
            self.step = step.after(pairs, &self.plan, &self.challenge)?;
            self.is_said &= std::mem::discriminant(&self.step) == before;
        }
        Ok(())
    }

    fn redirected(&self, response: &LoginResponse) -> Result<Progress, LoginError> {
        let pairs = pairs(&self.gathered)?;
        let address = pairs.iter().find(|pair| pair.key == "TargetAddress");
        let address = address.ok_or(LoginError::Protocol("it redirects without saying where to"))?;
        let address: TargetAddress = address.value.parse()?;
        Ok(Progress::Redirected(Redirection {
            portal: address.portal,
            is_permanent: response.status_detail == Self::MOVED_PERMANENTLY,
        }))
    }
}

#[cfg(test)]
mod tests;
