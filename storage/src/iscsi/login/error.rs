//! Why a login fails, and whether another one could do better.

use crate::iscsi::chap::{Algorithm, Authentication};
use crate::iscsi::digest::DigestKind;
use crate::iscsi::name::IscsiName;
use crate::iscsi::pdu::LoginResponse;
use crate::iscsi::portal::PortalError;
use crate::iscsi::text::TextError;

use super::LoginPlan;
use super::security::Step;

/// Why a login failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LoginError {
    /// 0201 with a user, or 0200 to its proof.
    #[error(
        "the target refuses the CHAP user `{user}` or its secret: compare the file that `chap_secret_file` names with \
         the secret that the target has for that user{hint}"
    )]
    Secret {
        /// Who wanted to log in.
        user: String,
        /// What else it could be.
        hint: &'static str,
    },
    /// 0201 without one.
    #[error(
        "the target asks for CHAP: name the user before the host (iscsi://USER@HOST/…) and the file \
         with its secret by `chap_secret_file`"
    )]
    Anonymous,
    /// 0202.
    #[error(
        "the target has nothing for the initiator `{initiator}`: let the target accept that name, or give \
         another one by `initiator`"
    )]
    Forbidden {
        /// Who wanted to log in.
        initiator: IscsiName,
    },
    /// 0203.
    #[error(
        "there is no target `{target}` at this portal, or not for the initiator `{initiator}`: compare it with \
         those that a discovery lists (as `iscsi-ls iscsi://HOST` does)"
    )]
    NotFound {
        /// Who was looked for.
        target: String,
        /// Who wanted to log in.
        initiator: IscsiName,
    },
    /// 0204.
    #[error("the target `{target}` has been removed from this portal for good")]
    Removed {
        /// Who was looked for.
        target: String,
    },
    /// Another status of class 2.
    #[error("the target refuses the login: {0}")]
    Refused(StatusText),
    /// Class 3.
    #[error("the target cannot take a login now: {0}")]
    Unavailable(StatusText),
    /// A class that there is not.
    #[error("the target answers the login with a status of the unknown class {0}")]
    Class(u8),
    /// It was offered alone.
    #[error(
        "the target does not do CHAP: set a user and its secret there, or leave USER@ and `chap_secret_file` out"
    )]
    NoChap,
    /// None that was offered.
    #[error("the target does not do CHAP with {0}: let it, or choose another algorithm by `chap`")]
    NoAlgorithm(String),
    /// It could be anybody.
    #[error(
        "the target ended the login without proving that it knows the secret of `mutual_user`: set it there as the \
         target's (outgoing) user, for some targets let everybody in who does not ask"
    )]
    MutualMissing,
    /// It is somebody else.
    #[error(
        "the target is not who it should be: it has another name than `mutual_user` says, or not the secret in \
         the file that `mutual_secret_file` names"
    )]
    Impostor,
    /// It wants us to answer for it.
    #[error("the target answers a challenge with the same challenge, as one would that cannot answer it")]
    Reflected,
    /// It was offered alone.
    #[error(
        "the target does not take {key}={wanted}: set it there, or ask for `{option}={other}`",
        other = if *wanted == DigestKind::None { "crc32c" } else { "none" }
    )]
    Digest {
        /// As a login spells it.
        key: &'static str,
        /// As the URL spells it.
        option: &'static str,
        /// What was offered.
        wanted: DigestKind,
    },
    /// The text is none.
    #[error("the target's answer to the login cannot be read")]
    Text(#[from] TextError),
    /// A value that its key cannot have.
    #[error("the target's answer to the login has an impossible {0}")]
    Value(&'static str),
    /// It is redirected to nowhere.
    #[error("the target redirects the login to where none can go")]
    Redirection(#[from] PortalError),
    /// What the standard forbids.
    #[error("the target's answer to the login breaks the protocol: {0}")]
    Protocol(&'static str),
}

/// What may come of the next login.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoginFailure {
    /// The next one may succeed: the server has no room now, or its words were garbled.
    Passing,
    /// The target is not there. To who has never seen it that is a mistake; to who had it, it is a server that has
    /// restarted and is not set up again yet.
    Absent,
    /// As long as nobody changes something, none succeeds.
    Lasting,
}

impl LoginError {
    /// What may come of the next login.
    pub fn failure(&self) -> LoginFailure {
        match self {
            Self::Unavailable(_)
            | Self::Class(_)
            | Self::Text(_)
            | Self::Value(_)
            | Self::Redirection(_)
            | Self::Protocol(_) => LoginFailure::Passing,
            Self::NotFound { .. } | Self::Removed { .. } => LoginFailure::Absent,
            // An old session that the server has not seen die yet counts.
            Self::Refused(status) if status.0 == (2, TOO_MANY_CONNECTIONS) => LoginFailure::Passing,
            Self::Secret { .. }
            | Self::Anonymous
            | Self::Forbidden { .. }
            | Self::Refused(_)
            | Self::NoChap
            | Self::NoAlgorithm(_)
            | Self::MutualMissing
            | Self::Impostor
            | Self::Reflected
            | Self::Digest { .. } => LoginFailure::Lasting,
        }
    }

    /// What a status of class 2 or 3 means (RFC 7143, 11.13.5).
    pub(super) fn of(response: &LoginResponse, plan: &LoginPlan, step: &Step) -> Self {
        let status = (response.status_class, response.status_detail);
        let initiator = plan.initiator.clone();
        let target = plan.session.target().map_or("", IscsiName::as_str).to_owned();
        match status {
            (2, 1) => match &plan.authentication {
                Some(authentication) => Self::of_proof(authentication, step),
                None => Self::Anonymous,
            },
            (2, 0) if matches!(step, Step::Proof { .. }) => match &plan.authentication {
                Some(authentication) => Self::of_proof(authentication, step),
                None => Self::Refused(StatusText(status)),
            },
            (2, 2) => Self::Forbidden { initiator },
            (2, 3) => Self::NotFound { target, initiator },
            (2, 4) => Self::Removed { target },
            (2, _) => Self::Refused(StatusText(status)),
            (3, _) => Self::Unavailable(StatusText(status)),
            (class, _) => Self::Class(class),
        }
    }

    fn of_proof(authentication: &Authentication, step: &Step) -> Self {
        let hint = match step {
            Step::Proof {
                algorithm: Algorithm::Sha256,
                ..
            } => "; or it takes the number of SHA-256 for that of SHA-1, as tgtd does: try `chap=md5`",
            _ if authentication.is_mutual() => {
                "; or it has no (outgoing) user to prove itself with, which `mutual_user` asks for"
            }
            _ => "",
        };
        Self::Secret {
            user: authentication.user().to_owned(),
            hint,
        }
    }
}

const TOO_MANY_CONNECTIONS: u8 = 6;

/// A status class and its detail, in words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusText((u8, u8));

impl std::fmt::Display for StatusText {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (class, detail) = self.0;
        let text = match self.0 {
            (2, 5) => "it does not speak this version of iSCSI",
            (2, TOO_MANY_CONNECTIONS) => "too many connections",
            (2, 7) => "it misses a parameter",
            (2, 8) => "the connection cannot join the session",
            (2, 9) => "it has no sessions of this type",
            (2, 10) => "there is no such session",
            (2, 11) => "the request makes no sense to it",
            (3, 1) => "the service is unavailable",
            (3, 2) => "out of resources",
            _ => "it does not say why",
        };
        write!(f, "{text} (status {class:02x}{detail:02x})")
    }
}
