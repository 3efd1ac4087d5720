//! CHAP: a login proves that it knows a secret, and has the target prove the same (RFC 7143, 12.1.3; RFC 1994).

use std::fmt;
use std::hint::black_box;
use std::sync::Once;

use md5::Md5;
use sha2::{Digest, Sha256};

use crate::secret::Secret;

/// Longest name of a user, in bytes.
pub const USER_BYTES_MAX: usize = 255;
/// Size of the challenges made here, in bytes.
pub const CHALLENGE_BYTES: usize = 32;

/// A hash that both sides compute (the registry "PPP Authentication Algorithms").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    /// What every target has, but for those that may not.
    Md5,
    /// What those have. Some others take its number for that of SHA-1 (tgtd), and refuse the right response.
    Sha256,
}

impl Algorithm {
    /// In the order of the offer, of which a target takes the first that it has. The better one comes last, because a
    /// login that fails for a misunderstood number has no second try.
    pub const ALL: [Self; 2] = [Self::Md5, Self::Sha256];

    /// The number that stands for it in `CHAP_A`.
    pub const fn number(self) -> u8 {
        match self {
            Self::Md5 => 5,
            Self::Sha256 => 7,
        }
    }

    /// The response to a challenge: the hash of the identifier, the secret and the challenge.
    pub fn response(self, identifier: u8, secret: &Secret, challenge: &[u8]) -> Vec<u8> {
        match self {
            Self::Md5 => hash::<Md5>(identifier, secret, challenge),
            Self::Sha256 => hash::<Sha256>(identifier, secret, challenge),
        }
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Md5 => "md5",
            Self::Sha256 => "sha256",
        })
    }
}

/// A user and its secret.
#[derive(Clone, Debug)]
pub struct Credentials {
    /// `CHAP_N`.
    pub user: String,
    /// What only it and the other side know.
    pub secret: Secret,
}

/// What a login is to prove, and to have proved.
#[derive(Clone, Debug)]
pub struct Authentication {
    own: Credentials,
    target: Option<Credentials>,
    algorithm: Option<Algorithm>,
}

/// Why nobody should authenticate like that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AuthenticationError {
    /// Who knows one direction's secret knows the other's.
    #[error(
        "the target would prove itself with the same secret as we do: whoever has seen one could play both \
         (use another secret in `mutual_secret_file`, and on the target)"
    )]
    OneSecret,
}

impl Authentication {
    /// Proves `own`, and insists on a proof of `target` if there is one. With no `algorithm` the target chooses.
    ///
    /// # Errors
    ///
    /// Both have the same secret.
    pub fn new(
        own: Credentials,
        target: Option<Credentials>,
        algorithm: Option<Algorithm>,
    ) -> Result<Self, AuthenticationError> {
        let is_one_secret = |target: &Credentials| are_equal(own.secret.bytes(), target.secret.bytes());
        if target.as_ref().is_some_and(is_one_secret) {
            return Err(AuthenticationError::OneSecret);
        }
        warn_of_short_secrets([Some(&own), target.as_ref()]);
        Ok(Self {
            own,
            target,
            algorithm,
        })
    }

    /// Who logs in.
    pub fn user(&self) -> &str {
        &self.own.user
    }

    /// Whether the target has to prove itself.
    pub fn is_mutual(&self) -> bool {
        self.target.is_some()
    }

    /// What is offered, in its order.
    pub fn algorithms(&self) -> impl Iterator<Item = Algorithm> {
        let wanted = self.algorithm;
        Algorithm::ALL
            .into_iter()
            .filter(move |algorithm| wanted.is_none_or(|wanted| *algorithm == wanted))
    }

    /// What proves us.
    pub fn own_response(&self, algorithm: Algorithm, identifier: u8, challenge: &[u8]) -> Vec<u8> {
        algorithm.response(identifier, &self.own.secret, challenge)
    }

    /// Whether the target is who it should be. Without somebody to expect it is whoever it says.
    pub fn is_proof(&self, algorithm: Algorithm, challenge: &Challenge, user: &str, response: &[u8]) -> bool {
        self.target.as_ref().is_none_or(|target| {
            let expected = algorithm.response(challenge.identifier, &target.secret, &challenge.value);
            target.user == user && are_equal(&expected, response)
        })
    }
}

/// What a target is asked to answer.
#[derive(Clone, Copy, Debug)]
pub struct Challenge {
    /// `CHAP_I`.
    pub identifier: u8,
    /// `CHAP_C`.
    pub value: [u8; CHALLENGE_BYTES],
}

fn hash<D: Digest>(identifier: u8, secret: &Secret, challenge: &[u8]) -> Vec<u8> {
    D::new()
        .chain_update([identifier])
        .chain_update(secret.bytes())
        .chain_update(challenge)
        .finalize()
        .to_vec()
}

/// Compares in a time that does not tell where the difference is.
fn are_equal(one: &[u8], other: &[u8]) -> bool {
    let difference = one
        .iter()
        .zip(other)
        .fold(0, |difference, (a, b)| black_box(difference | (a ^ b)));
    one.len() == other.len() && difference == 0
}

fn warn_of_short_secrets(credentials: [Option<&Credentials>; 2]) {
    static WARNED: Once = Once::new();
    for credentials in credentials.into_iter().flatten() {
        if credentials.secret.bytes().len() < Secret::BYTES_MIN {
            WARNED.call_once(|| {
                log::warn!(
                    "the CHAP secret of `{}` has less than {} bytes: who hears a login can guess it, \
                     unless the connection is encrypted underneath",
                    credentials.user,
                    Secret::BYTES_MIN
                );
            });
        }
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

    use super::super::text::{Hexadecimal, binary};
    use super::*;

    fn credentials(user: &str, secret: &str) -> Credentials {
        Credentials {
            user: user.to_owned(),
            secret: Secret::new(secret.into()),
        }
    }

    /// Computed with `printf '\x17secret of twelve\x01\x02\x03' | md5sum`, and `sha256sum`.
    #[test]
    fn a_response_is_the_hash_that_others_compute() {
        let secret = Secret::new(b"secret of twelve".to_vec());
        for (algorithm, expected) in [
            (Algorithm::Md5, "0x7eff2cb876e15b7354379aff96456a72"),
            (
                Algorithm::Sha256,
                "0x945bb2e80914487013d3b3438a03e72241de218dd4ea2b838be596727565e585",
            ),
        ] {
            let response = algorithm.response(0x17, &secret, &[1, 2, 3]);
            assert_eq!(Hexadecimal(&response).to_string(), expected);
        }
    }

    #[test]
    fn only_who_knows_the_secret_and_has_the_name_is_the_target() {
        let both = Authentication::new(
            credentials("vm", "the secret of the vm"),
            Some(credentials("disk", "the secret of the disk")),
            None,
        )
        .unwrap();
        let challenge = Challenge {
            identifier: 9,
            value: [3; CHALLENGE_BYTES],
        };
        for algorithm in Algorithm::ALL {
            let right = algorithm.response(9, &Secret::new(b"the secret of the disk".to_vec()), &[3; 32]);
            assert!(both.is_proof(algorithm, &challenge, "disk", &right));
            assert!(!both.is_proof(algorithm, &challenge, "other", &right));
            assert!(!both.is_proof(algorithm, &challenge, "disk", right.split_last().unwrap().1));
            assert!(!both.is_proof(algorithm, &challenge, "disk", &[]));
            let own = both.own_response(algorithm, 9, &challenge.value);
            assert!(!both.is_proof(algorithm, &challenge, "disk", &own));
        }
    }

    #[test]
    fn one_secret_for_both_directions_is_refused() {
        let error = Authentication::new(
            credentials("vm", "one and the same"),
            Some(credentials("disk", "one and the same")),
            None,
        );
        assert_eq!(error.err(), Some(AuthenticationError::OneSecret));
    }

    #[test]
    fn all_algorithms_are_offered_and_a_wanted_one_alone() {
        let offered = |algorithm| {
            let one = Authentication::new(credentials("vm", "open sesame, please"), None, algorithm).unwrap();
            one.algorithms().map(Algorithm::number).collect::<Vec<_>>()
        };
        assert_eq!(offered(None), [5, 7]);
        assert_eq!(offered(Some(Algorithm::Md5)), [5]);
        assert_eq!(offered(Some(Algorithm::Sha256)), [7]);
    }

    #[test]
    fn nothing_prints_what_only_two_should_know() {
        let one = Authentication::new(credentials("vm", "open sesame, please"), None, None).unwrap();
        assert!(!format!("{one:?}").contains("sesame"));
    }

    #[test]
    fn bytes_are_equal_if_all_of_them_are() {
        assert!(are_equal(&binary("0x0102").unwrap(), &[1, 2]));
        assert!(!are_equal(&[1, 2], &[1, 3]));
        assert!(!are_equal(&[1, 2], &[1, 2, 0]));
        assert!(!are_equal(&[], &[0]));
        assert!(are_equal(&[], &[]));
    }
}
