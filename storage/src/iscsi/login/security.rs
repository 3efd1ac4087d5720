//! The keys of the stage in which both sides prove who they are (RFC 7143, 12).

use super::parameters::is_refusal;
use super::{LoginError, LoginPlan};
use crate::iscsi::chap::{Algorithm, Authentication, Challenge};
use crate::iscsi::text::{self, Hexadecimal, Pair, Text};

/// How far the proofs are.
///
/// ```text
/// Method --AuthMethod=CHAP--> Algorithm --CHAP_A, _I, _C--> Proof --CHAP_N, _R--> Proven
///    `------AuthMethod=None (nobody is to be proven)----------------------------------^
/// ```
#[derive(Clone, Debug)]
pub(super) enum Step {
    /// To say, or said: how we would prove ourselves.
    Method,
    /// By which hash.
    Algorithm,
    /// The proof, and the question for the target's.
    Proof {
        algorithm: Algorithm,
        identifier: u8,
        challenge: Vec<u8>,
    },
    /// There is no more to prove.
    Proven,
}

impl Step {
    /// Whether the stage can end with what is said in this step.
    pub(super) fn is_last(&self, plan: &LoginPlan) -> bool {
        match self {
            Self::Method => plan.authentication.is_none(),
            Self::Algorithm => false,
            Self::Proof { .. } | Self::Proven => true,
        }
    }

    /// Says what the step has to say.
    pub(super) fn say(&self, plan: &LoginPlan, own: &Challenge, text: &mut Text) {
        match (self, &plan.authentication) {
            (Self::Method, authentication) => {
                text.put("InitiatorName", &plan.initiator);
                match plan.session.target() {
                    Some(target) => {
                        text.put("SessionType", "Normal");
                        text.put("TargetName", target);
                    }
                    None => text.put("SessionType", "Discovery"),
                }
                let method = authentication.as_ref().map_or("None", |_| "CHAP");
                text.put("AuthMethod", method);
            }
            (Self::Algorithm, Some(authentication)) => {
                let numbers = authentication.algorithms().map(|it| it.number().to_string());
                text.put("CHAP_A", numbers.collect::<Vec<_>>().join(","));
            }
            (
                Self::Proof {
                    algorithm,
                    identifier,
                    challenge,
                },
                Some(authentication),
            ) => {
                let response = authentication.own_response(*algorithm, *identifier, challenge);
                text.put("CHAP_N", authentication.user());
                text.put("CHAP_R", Hexadecimal(&response));
                if authentication.is_mutual() {
                    text.put("CHAP_I", own.identifier);
                    text.put("CHAP_C", Hexadecimal(&own.value));
                }
            }
            (Self::Algorithm | Self::Proof { .. } | Self::Proven, _) => {}
        }
    }

    /// The step that the target's answer leads to; this one, if it says nothing that leads on.
    pub(super) fn after(
        self,
        pairs: &[Pair<'_>],
        plan: &LoginPlan,
        own: &Challenge,
    ) -> Result<Self, LoginError> {
        let value = |key| pairs.iter().find(|pair| pair.key == key).map(|pair| pair.value);
        match (self, &plan.authentication) {
            (Self::Method, None) => match value("AuthMethod") {
                Some("None") => Ok(Self::Proven),
                None => Ok(Self::Method),
                Some(_) => Err(LoginError::Anonymous),
            },
            (Self::Method, Some(_)) => match value("AuthMethod") {
                Some("CHAP") => Ok(Self::Algorithm),
                Some("None" | "Reject" | "NotUnderstood") => Err(LoginError::NoChap),
                Some(_) => Err(LoginError::Value("AuthMethod")),
                None => Ok(Self::Method),
            },
            (Self::Algorithm, Some(authentication)) => {
                if value("CHAP_A").is_none() {
                    return Ok(Self::Algorithm);
                }
                challenged(value, authentication, own)
            }
            (Self::Proof { algorithm, .. }, Some(authentication)) if authentication.is_mutual() => {
                match (value("CHAP_N"), value("CHAP_R")) {
                    (Some(user), Some(response)) => {
                        let response = text::binary(response).ok_or(LoginError::Value("CHAP_R"))?;
                        if authentication.is_proof(algorithm, own, user, &response) {
                            Ok(Self::Proven)
                        } else {
                            Err(LoginError::Impostor)
                        }
                    }
                    // It had its turn.
                    _ => Err(LoginError::MutualMissing),
                }
            }
            // Whether the proof was good shows when the target lets us into the next stage.
            (Self::Algorithm | Self::Proof { .. } | Self::Proven, _) => Ok(Self::Proven),
        }
    }
}

/// Whether a key is one of this stage.
pub(super) fn is_key(key: &str) -> bool {
    ["AuthMethod", "CHAP_A", "CHAP_I", "CHAP_C", "CHAP_N", "CHAP_R"].contains(&key)
}

fn challenged<'a>(
    value: impl Fn(&'static str) -> Option<&'a str>,
    authentication: &Authentication,
    own: &Challenge,
) -> Result<Step, LoginError> {
    let of = |key| value(key).ok_or(LoginError::Value(key));
    let chosen = of("CHAP_A")?;
    let algorithm = authentication
        .algorithms()
        .find(|algorithm| text::number(chosen) == Some(algorithm.number().into()));
    let algorithm = algorithm.ok_or_else(|| {
        if !is_refusal(chosen) {
            return LoginError::Value("CHAP_A");
        }
        let offered = authentication.algorithms().map(|it| it.to_string());
        LoginError::NoAlgorithm(offered.collect::<Vec<_>>().join(" or "))
    })?;
    let identifier = text::number(of("CHAP_I")?).and_then(|number| u8::try_from(number).ok());
    let challenge = text::binary(of("CHAP_C")?).ok_or(LoginError::Value("CHAP_C"))?;
    if challenge == own.value {
        return Err(LoginError::Reflected);
    }
    Ok(Step::Proof {
        algorithm,
        identifier: identifier.ok_or(LoginError::Value("CHAP_I"))?,
        challenge,
    })
}
