//! The login phase of a connection (RFC 7143, 6), without authentication.

use super::negotiation::{Negotiated, SessionKind, pairs, segment};
use super::options::{Options, Pace};
use super::{Redirect, Term};
use crate::iscsi::pdu::{LoginRequest, LoginResponse, Serial, Stage, Transit, Window};
use crate::sim::dice::Dice;

/// A login under way.
///
/// ```text
///   security ──► operational ──► full feature      each step when the initiator asks for it,
///       └────────────────────────────►             and the target has nothing more to say
/// ```
#[derive(Debug)]
pub(super) struct Login {
    negotiated: Negotiated,
    /// Text whose rest is still to come.
    text: Vec<u8>,
    has_begun: bool,
    has_dawdled: bool,
}

/// The answer to a request.
#[derive(Debug)]
pub(super) struct LoginAnswer {
    /// Complete but for StatSN and TSIH.
    pub(super) response: LoginResponse,
    pub(super) text: Vec<u8>,
    pub(super) outcome: LoginOutcome,
}

/// Where a login is after an answer.
#[derive(Debug)]
pub(super) enum LoginOutcome {
    GoesOn,
    Done(Negotiated),
    Refused,
}

/// Status classes and details (RFC 7143, 11.13.5).
const SUCCESS: (u8, u8) = (0, 0);
const MOVED_TEMPORARILY: (u8, u8) = (1, 1);
const MOVED_PERMANENTLY: (u8, u8) = (1, 2);
const INITIATOR_ERROR: (u8, u8) = (2, 0);
const AUTHENTICATION_FAILURE: (u8, u8) = (2, 1);
const NOT_FOUND: (u8, u8) = (2, 3);
const MISSING_PARAMETER: (u8, u8) = (2, 7);
const SESSION_DOES_NOT_EXIST: (u8, u8) = (2, 10);

impl Login {
    pub(super) fn new() -> Self {
        Self {
            negotiated: Negotiated::new(),
            text: Vec::new(),
            has_begun: false,
            has_dawdled: false,
        }
    }

    /// Answers a request.
    pub(super) fn answer(
        &mut self,
        request: &LoginRequest,
        data: &[u8],
        options: &Options,
        redirect: Option<&Redirect>,
        dice: &mut Dice,
    ) -> LoginAnswer {
        self.text.extend_from_slice(data);
        if let Transit::Unfinished(stage) = request.transit {
            return answered(request, Transit::Stay(stage), SUCCESS, &[], LoginOutcome::GoesOn);
        }
        let offered = pairs(&std::mem::take(&mut self.text));
        let stage = request.transit.stage();
        let mut answers = Vec::new();
        if stage == Stage::LoginOperationalNegotiation {
            answers.extend(self.negotiated.declaration(options));
        }
        for (key, value) in &offered {
            let answer = self.negotiated.answer(key, value, options);
            answers.extend(answer.map(|answer| (key.clone(), answer)));
        }
        let is_first = !std::mem::replace(&mut self.has_begun, true);
        if is_first {
            if let Some(redirect) = redirect {
                return redirected(request, redirect);
            }
            if let Some(status) = self.objection(request, options) {
                return answered(request, Transit::Stay(stage), status, &[], LoginOutcome::Refused);
            }
            answers.push(("TargetPortalGroupTag".to_owned(), "1".to_owned()));
        }
        if self.negotiated.refuses_none {
            let transit = Transit::Stay(stage);
            return answered(
                request,
                transit,
                AUTHENTICATION_FAILURE,
                &[],
                LoginOutcome::Refused,
            );
        }
        // A target may have its reasons not to go on yet; the initiator asks again.
        let dawdles = options.pace == Pace::Dice && !self.has_dawdled && dice.one_in(4);
        let transit = match request.transit {
            Transit::Leave(..) if dawdles => {
                self.has_dawdled = true;
                Transit::Stay(stage)
            }
            transit => transit,
        };
        let outcome = match transit {
            Transit::Leave(_, Stage::FullFeaturePhase) => LoginOutcome::Done(self.negotiated.clone()),
            _ => LoginOutcome::GoesOn,
        };
        answered(request, transit, SUCCESS, &answers, outcome)
    }

    /// Why the first request begins no session here.
    fn objection(&self, request: &LoginRequest, options: &Options) -> Option<(u8, u8)> {
        if request.version_min != 0 {
            return Some(INITIATOR_ERROR);
        }
        if request.tsih != 0 {
            return Some(SESSION_DOES_NOT_EXIST);
        }
        let is_normal = self.negotiated.kind == SessionKind::Normal;
        match (&self.negotiated.initiator, &self.negotiated.target) {
            (None, _) => Some(MISSING_PARAMETER),
            (_, None) if is_normal => Some(MISSING_PARAMETER),
            (_, Some(target)) if *target != options.place.name => Some(NOT_FOUND),
            _ => None,
        }
    }
}

fn redirected(request: &LoginRequest, redirect: &Redirect) -> LoginAnswer {
    let status = match redirect.term {
        Term::Temporarily => MOVED_TEMPORARILY,
        Term::Permanently => MOVED_PERMANENTLY,
    };
    let address = [("TargetAddress".to_owned(), redirect.address.clone())];
    let transit = Transit::Stay(request.transit.stage());
    answered(request, transit, status, &address, LoginOutcome::Refused)
}

fn answered(
    request: &LoginRequest,
    transit: Transit,
    (status_class, status_detail): (u8, u8),
    text: &[(String, String)],
    outcome: LoginOutcome,
) -> LoginAnswer {
    LoginAnswer {
        response: LoginResponse {
            transit,
            version_max: 0,
            version_active: 0,
            isid: request.isid,
            tsih: request.tsih,
            initiator_task_tag: request.initiator_task_tag,
            stat_sn: Serial(0),
            window: Window {
                exp_cmd_sn: request.cmd_sn,
                max_cmd_sn: request.cmd_sn,
            },
            status_class,
            status_detail,
        },
        text: segment(text),
        outcome,
    }
}
