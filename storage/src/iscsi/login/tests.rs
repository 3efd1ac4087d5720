#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

use super::*;
use crate::iscsi::chap::{Algorithm, Credentials};
use crate::iscsi::text::{Hexadecimal, binary};
use crate::secret::Secret;

const RANDOM: [u8; RANDOM_BYTES] = [0x5a; RANDOM_BYTES];

fn plan() -> LoginPlan {
    LoginPlan {
        initiator: "iqn.2026-11.org.example:vm".parse().unwrap(),
        isid: Isid([0x80, 1, 2, 3, 4, 5]),
        session: SessionType::Normal("iqn.2026-11.org.example:disk".parse().unwrap()),
        authentication: None,
        header_digest: DigestKind::None,
        data_digest: DigestKind::None,
        max_recv_data_segment_length: 262_144,
    }
}

fn credentials(user: &str) -> Credentials {
    Credentials {
        user: user.to_owned(),
        secret: Secret::new(format!("the secret of {user}").into_bytes()),
    }
}

fn with_chap(target: Option<&str>, algorithm: Option<Algorithm>) -> LoginPlan {
    let target = target.map(credentials);
    LoginPlan {
        authentication: Some(Authentication::new(credentials("vm"), target, algorithm).unwrap()),
        ..plan()
    }
}

/// A login, and what both sides have said.
struct Exchange {
    login: Login,
    request: LoginRequest,
    said: String,
}

fn begun(plan: LoginPlan) -> Exchange {
    let mut login = Login::new(&Arc::new(plan), RANDOM);
    let (request, text) = login.request();
    let said = String::from_utf8(text).unwrap();
    Exchange { login, request, said }
}

fn response(transit: Transit) -> LoginResponse {
    LoginResponse {
        transit,
        version_max: 0,
        version_active: 0,
        isid: Isid([0x80, 1, 2, 3, 4, 5]),
        tsih: 7,
        initiator_task_tag: Tag(0),
        stat_sn: Serial(100),
        window: Window {
            exp_cmd_sn: Serial(1),
            max_cmd_sn: Serial(128),
        },
        status_class: 0,
        status_detail: 0,
    }
}

impl Exchange {
    fn value(&self, key: &str) -> Option<&str> {
        self.said
            .split('\0')
            .find_map(|pair| pair.strip_prefix(key)?.strip_prefix('='))
    }

    fn answer(&mut self, transit: Transit, text: &str) -> Result<Progress, LoginError> {
        let text = text.replace(' ', "\0");
        let progress = self.login.response(&response(transit), text.as_bytes())?;
        if progress == Progress::Continue {
            let (request, text) = self.login.request();
            self.request = request;
            self.said = String::from_utf8(text).unwrap();
        }
        Ok(progress)
    }

    fn goes_on(&mut self, transit: Transit, text: &str) {
        assert_eq!(self.answer(transit, text), Ok(Progress::Continue));
    }

    fn refused(&mut self, transit: Transit, text: &str) -> LoginError {
        self.answer(transit, text).unwrap_err()
    }

    fn done(&mut self, text: &str) -> Negotiated {
        match self.answer(TO_FULL, text) {
            Ok(Progress::Done(negotiated)) => negotiated,
            other => panic!("{other:?}"),
        }
    }

    /// The target's side of CHAP, up to the initiator's proof, which is checked.
    fn challenged(&mut self, algorithm: Algorithm) {
        self.goes_on(SECURITY, "AuthMethod=CHAP TargetPortalGroupTag=1 ");
        let number = algorithm.number();
        self.goes_on(
            SECURITY,
            &format!("CHAP_A={number} CHAP_I=9 CHAP_C=0x0102030405060708 "),
        );
        let expected = algorithm.response(9, &credentials("vm").secret, &[1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(self.value("CHAP_N"), Some("vm"));
        assert_eq!(binary(self.value("CHAP_R").unwrap()), Some(expected));
        assert_eq!(self.request.transit, TO_OPERATIONAL);
    }

    /// What the target `disk` says to the challenge.
    fn proof(&self, algorithm: Algorithm, secret: &str) -> String {
        let identifier = self.value("CHAP_I").unwrap().parse().unwrap();
        let challenge = binary(self.value("CHAP_C").unwrap()).unwrap();
        let proof = algorithm.response(identifier, &Secret::new(secret.into()), &challenge);
        format!("CHAP_N=disk CHAP_R={} ", Hexadecimal(&proof))
    }
}

const SECURITY: Transit = Transit::Stay(Stage::SecurityNegotiation);
const OPERATIONAL: Transit = Transit::Stay(Stage::LoginOperationalNegotiation);
const TO_OPERATIONAL: Transit =
    Transit::Leave(Stage::SecurityNegotiation, Stage::LoginOperationalNegotiation);
const TO_FULL: Transit = Transit::Leave(Stage::LoginOperationalNegotiation, Stage::FullFeaturePhase);

#[test]
fn a_login_ends_with_what_both_sides_can_do() {
    let mut it = begun(plan());
    assert_eq!(it.request.transit, TO_OPERATIONAL);
    assert_eq!(
        it.said,
        "InitiatorName=iqn.2026-11.org.example:vm\0SessionType=Normal\0\
         TargetName=iqn.2026-11.org.example:disk\0AuthMethod=None\0"
    );
    it.goes_on(TO_OPERATIONAL, "AuthMethod=None TargetPortalGroupTag=1 ");
    assert_eq!(it.request.transit, TO_FULL);
    assert_eq!(it.request.exp_stat_sn, Serial(101));
    assert_eq!(it.value("MaxRecvDataSegmentLength"), Some("262144"));
    assert_eq!(it.value("InitialR2T"), Some("No"));
    let negotiated = it.done(
        "HeaderDigest=None DataDigest=None MaxRecvDataSegmentLength=8192 InitialR2T=No ImmediateData=Yes \
         MaxBurstLength=262144 FirstBurstLength=65536 MaxOutstandingR2T=1 DefaultTime2Wait=2 ",
    );
    let expected = Negotiated {
        isid: Isid([0x80, 1, 2, 3, 4, 5]),
        tsih: 7,
        portal_group: Some(1),
        header_digest: DigestKind::None,
        data_digest: DigestKind::None,
        initial_r2t: false,
        immediate_data: true,
        max_burst_length: 262_144,
        first_burst_length: 65_536,
        max_recv_data_segment_length: 262_144,
        target_max_recv_data_segment_length: 8192,
        max_outstanding_r2t: 1,
        time2wait: 2,
        cmd_sn: Serial(1),
        exp_stat_sn: Serial(101),
        window: Window {
            exp_cmd_sn: Serial(1),
            max_cmd_sn: Serial(128),
        },
    };
    assert_eq!(negotiated, expected);
}

#[test]
fn what_a_target_passes_over_is_as_the_standard_has_it() {
    let mut it = begun(plan());
    it.goes_on(TO_OPERATIONAL, "");
    let negotiated = it.done("MaxBurstLength=NotUnderstood HeaderDigest=Irrelevant ");
    assert!(negotiated.initial_r2t && negotiated.immediate_data);
    assert_eq!(negotiated.max_burst_length, 262_144);
    assert_eq!(negotiated.first_burst_length, 65_536);
    assert_eq!(negotiated.target_max_recv_data_segment_length, 8192);
    assert_eq!(negotiated.max_outstanding_r2t, 1);
}

#[test]
fn a_target_never_gets_more_than_was_offered_to_it() {
    let mut it = begun(plan());
    it.goes_on(TO_OPERATIONAL, "");
    let negotiated = it.done(
        "MaxBurstLength=16777215 FirstBurstLength=16777215 MaxOutstandingR2T=65535 \
         MaxRecvDataSegmentLength=16777215 ",
    );
    assert_eq!(negotiated.max_burst_length, 1 << 20);
    assert_eq!(negotiated.first_burst_length, 256 << 10);
    assert_eq!(negotiated.max_outstanding_r2t, 16);
}

#[test]
fn the_first_burst_is_no_longer_than_any() {
    let mut it = begun(plan());
    it.goes_on(TO_OPERATIONAL, "");
    let negotiated = it.done("MaxBurstLength=4096 FirstBurstLength=65536 ");
    assert_eq!(negotiated.first_burst_length, 4096);
}

#[test]
fn values_that_a_key_cannot_have_are_refused() {
    for (text, key) in [
        ("MaxRecvDataSegmentLength=511", "MaxRecvDataSegmentLength"),
        ("MaxRecvDataSegmentLength=16777216", "MaxRecvDataSegmentLength"),
        ("MaxBurstLength=lots", "MaxBurstLength"),
        ("InitialR2T=Perhaps", "InitialR2T"),
        ("MaxOutstandingR2T=0", "MaxOutstandingR2T"),
        ("ErrorRecoveryLevel=1", "ErrorRecoveryLevel"),
        ("DataPDUInOrder=No", "DataPDUInOrder"),
        ("TargetPortalGroupTag=65536", "TargetPortalGroupTag"),
    ] {
        let mut it = begun(plan());
        it.goes_on(TO_OPERATIONAL, "");
        assert_eq!(it.refused(TO_FULL, text), LoginError::Value(key), "{text}");
    }
}

#[test]
fn a_digest_is_had_as_it_was_asked_for_or_not_at_all() {
    let digests = LoginPlan {
        header_digest: DigestKind::Crc32c,
        ..plan()
    };
    let mut it = begun(digests.clone());
    it.goes_on(TO_OPERATIONAL, "");
    assert_eq!(it.value("HeaderDigest"), Some("CRC32C"));
    assert_eq!(it.value("DataDigest"), Some("None"));
    let negotiated = it.done("HeaderDigest=CRC32C ");
    assert_eq!(negotiated.header_digest, DigestKind::Crc32c);
    assert_eq!(negotiated.data_digest, DigestKind::None);
    for text in ["HeaderDigest=None ", "HeaderDigest=Reject ", ""] {
        let mut it = begun(digests.clone());
        it.goes_on(TO_OPERATIONAL, "");
        let error = it.refused(TO_FULL, text);
        assert!(error.to_string().contains("`header_digest=none`"), "{error}");
        assert_eq!(error.failure(), LoginFailure::Lasting);
    }
    let mut it = begun(plan());
    it.goes_on(TO_OPERATIONAL, "");
    let error = it.refused(TO_FULL, "DataDigest=CRC32C ");
    assert!(error.to_string().contains("`data_digest=crc32c`"), "{error}");
}

#[test]
fn a_user_proves_itself_by_either_hash() {
    for algorithm in Algorithm::ALL {
        let mut it = begun(with_chap(None, None));
        assert_eq!(it.request.transit, SECURITY);
        assert_eq!(it.value("AuthMethod"), Some("CHAP"));
        it.challenged(algorithm);
        assert_eq!(it.value("CHAP_C"), None);
        it.goes_on(TO_OPERATIONAL, "");
        assert_eq!(it.done("").portal_group, Some(1));
    }
}

#[test]
fn a_target_that_has_to_prove_itself_is_let_go_on_if_it_does() {
    for algorithm in Algorithm::ALL {
        let mut it = begun(with_chap(Some("disk"), None));
        it.challenged(algorithm);
        let proof = it.proof(algorithm, "the secret of disk");
        it.goes_on(TO_OPERATIONAL, &proof);
        it.done("");
    }
}

#[test]
fn a_target_that_ends_the_login_without_its_proof_is_refused() {
    for text in ["", "CHAP_N=disk ", "CHAP_R=0x00 "] {
        for transit in [TO_OPERATIONAL, SECURITY] {
            let mut it = begun(with_chap(Some("disk"), None));
            it.challenged(Algorithm::Md5);
            let error = it.refused(transit, text);
            assert_eq!(error, LoginError::MutualMissing);
            assert_eq!(error.failure(), LoginFailure::Lasting);
        }
    }
}

#[test]
fn a_target_that_is_somebody_else_is_refused() {
    let mut it = begun(with_chap(Some("disk"), None));
    it.challenged(Algorithm::Md5);
    let proof = it.proof(Algorithm::Md5, "the secret of vm");
    assert_eq!(it.refused(TO_OPERATIONAL, &proof), LoginError::Impostor);
    let mut it = begun(with_chap(Some("other"), None));
    it.challenged(Algorithm::Md5);
    let proof = it.proof(Algorithm::Md5, "the secret of other");
    assert_eq!(it.refused(TO_OPERATIONAL, &proof), LoginError::Impostor);
}

#[test]
fn a_challenge_that_comes_back_is_not_answered() {
    let mut it = begun(with_chap(Some("disk"), None));
    it.goes_on(SECURITY, "AuthMethod=CHAP ");
    let own = Hexadecimal(&[0x5a; CHALLENGE_BYTES]).to_string();
    let error = it.refused(SECURITY, &format!("CHAP_A=5 CHAP_I=1 CHAP_C={own} "));
    assert_eq!(error, LoginError::Reflected);
}

#[test]
fn no_target_skips_the_proofs() {
    let mut it = begun(with_chap(Some("disk"), None));
    let error = it.refused(TO_OPERATIONAL, "AuthMethod=CHAP ");
    assert!(matches!(error, LoginError::Protocol(_)));
    for text in ["AuthMethod=None ", "AuthMethod=Reject "] {
        let mut it = begun(with_chap(None, None));
        assert_eq!(it.refused(TO_OPERATIONAL, text), LoginError::NoChap);
    }
    let mut it = begun(with_chap(None, Some(Algorithm::Sha256)));
    it.goes_on(SECURITY, "AuthMethod=CHAP ");
    assert_eq!(it.value("CHAP_A"), Some("7"));
    let error = it.refused(SECURITY, "CHAP_A=Reject ");
    assert_eq!(error, LoginError::NoAlgorithm("sha256".to_owned()));
    let mut it = begun(with_chap(None, Some(Algorithm::Sha256)));
    it.goes_on(SECURITY, "AuthMethod=CHAP ");
    let error = it.refused(SECURITY, "CHAP_A=5 CHAP_I=1 CHAP_C=0x01 ");
    assert_eq!(error, LoginError::Value("CHAP_A"));
}

#[test]
fn a_refusal_says_what_to_do_and_whether_to_come_again() {
    for (status, with_user, words, failure) in [
        ((2, 1), true, "`vm`", LoginFailure::Lasting),
        ((2, 1), false, "USER@", LoginFailure::Lasting),
        ((2, 2), false, "iqn.2026-11.org.example:vm", LoginFailure::Lasting),
        (
            (2, 3),
            false,
            "iqn.2026-11.org.example:disk",
            LoginFailure::Absent,
        ),
        (
            (2, 4),
            false,
            "iqn.2026-11.org.example:disk",
            LoginFailure::Absent,
        ),
        ((2, 6), false, "too many connections", LoginFailure::Passing),
        ((2, 5), false, "(status 0205)", LoginFailure::Lasting),
        ((3, 1), false, "unavailable", LoginFailure::Passing),
        ((3, 99), false, "(status 0363)", LoginFailure::Passing),
        ((9, 0), false, "class 9", LoginFailure::Passing),
    ] {
        let mut it = begun(if with_user { with_chap(None, None) } else { plan() });
        let refusal = LoginResponse {
            status_class: status.0,
            status_detail: status.1,
            ..response(SECURITY)
        };
        let error = it.login.response(&refusal, b"").unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
        assert_eq!(error.failure(), failure, "{error}");
        assert!(!error.to_string().contains("the secret of"), "{error}");
    }
}

#[test]
fn a_refused_proof_says_what_else_it_could_be() {
    for (target, algorithm, detail, hint) in [
        (None, Algorithm::Md5, 1, ""),
        (None, Algorithm::Md5, 0, ""),
        (None, Algorithm::Sha256, 0, "`chap=md5`"),
        (Some("disk"), Algorithm::Md5, 1, "`mutual_user`"),
    ] {
        let mut it = begun(with_chap(target, None));
        it.challenged(algorithm);
        let refusal = LoginResponse {
            status_class: 2,
            status_detail: detail,
            ..response(SECURITY)
        };
        let error = it.login.response(&refusal, b"").unwrap_err();
        assert!(matches!(error, LoginError::Secret { .. }), "{error}");
        assert!(error.to_string().contains(hint), "{error}");
    }
}

#[test]
fn a_redirection_says_where_to_and_for_how_long() {
    for (status_detail, is_permanent) in [(1, false), (2, true)] {
        let redirection = LoginResponse {
            status_class: 1,
            status_detail,
            ..response(SECURITY)
        };
        let mut it = begun(plan());
        let progress = it.login.response(&redirection, b"TargetAddress=[::1]:3261,1\0");
        let portal = "[::1]:3261".parse().unwrap();
        let expected = Redirection { portal, is_permanent };
        assert_eq!(progress, Ok(Progress::Redirected(expected)));
        let mut it = begun(plan());
        let error = it.login.response(&redirection, b"TargetAddress=\0").unwrap_err();
        assert!(matches!(error, LoginError::Redirection(_)));
        let mut it = begun(plan());
        let error = it.login.response(&redirection, b"").unwrap_err();
        assert!(matches!(error, LoginError::Protocol(_)));
    }
}

#[test]
fn an_answer_in_pieces_is_fetched_and_read_as_one() {
    let mut it = begun(plan());
    it.goes_on(TO_OPERATIONAL, "");
    it.goes_on(
        Transit::Unfinished(Stage::LoginOperationalNegotiation),
        "InitialR2T=No MaxBurst",
    );
    assert_eq!(it.request.transit, OPERATIONAL);
    assert_eq!(it.said, "");
    let negotiated = it.done("Length=8192 ");
    assert!(!negotiated.initial_r2t);
    assert_eq!(negotiated.max_burst_length, 8192);
}

#[test]
fn an_answer_in_too_many_pieces_is_refused() {
    let piece = "A".repeat(8192);
    let mut it = begun(plan());
    let error = (0..=LOGIN_TEXT_BYTES_MAX / piece.len()).find_map(|_| {
        it.answer(Transit::Unfinished(Stage::SecurityNegotiation), &piece)
            .err()
    });
    assert_eq!(error, Some(LoginError::Protocol("it is too long")));
    let mut it = begun(plan());
    let error = it.refused(Transit::Unfinished(Stage::SecurityNegotiation), "");
    assert!(matches!(error, LoginError::Protocol(_)));
}

#[test]
fn a_target_that_never_ends_the_login_is_cut_off() {
    let mut it = begun(plan());
    let answered = (0..).find_map(|answered| Some((answered, it.answer(SECURITY, "").err()?)));
    let (answered, error) = answered.unwrap();
    assert_eq!(answered + 1, REQUESTS_MAX);
    assert!(matches!(error, LoginError::Protocol(_)));
}

#[test]
fn a_key_that_nobody_knows_is_answered_once() {
    let mut it = begun(plan());
    it.goes_on(TO_OPERATIONAL, "X-org.example.Speed=11 TargetAlias=disk ");
    assert_eq!(it.value("X-org.example.Speed"), Some("NotUnderstood"));
    assert_eq!(it.value("TargetAlias"), None);
    it.goes_on(OPERATIONAL, "iSCSIProtocolLevel=2 X-other=Reject ");
    assert_eq!(it.said, "iSCSIProtocolLevel=NotUnderstood\0");
    it.done("");
    let mut it = begun(plan());
    let many: String = (0..=UNKNOWN_KEYS_MAX).map(|n| format!("X-{n}=1 ")).collect();
    assert!(matches!(
        it.refused(TO_OPERATIONAL, &many),
        LoginError::Protocol(_)
    ));
}

#[test]
fn what_breaks_the_protocol_is_refused() {
    let protocol = |response: LoginResponse, text: &str| {
        let mut it = begun(plan());
        let error = it.login.response(&response, text.as_bytes()).unwrap_err();
        assert!(matches!(error, LoginError::Protocol(_)), "{error}");
        assert_eq!(error.failure(), LoginFailure::Passing);
    };
    protocol(response(OPERATIONAL), "");
    protocol(response(TO_FULL), "");
    let early = Transit::Leave(Stage::SecurityNegotiation, Stage::FullFeaturePhase);
    protocol(response(early), "");
    protocol(response(SECURITY), "AuthMethod=None\0AuthMethod=None\0");
    let other = LoginResponse {
        initiator_task_tag: Tag(1),
        ..response(SECURITY)
    };
    protocol(other, "");
    let later = LoginResponse {
        version_active: 1,
        ..response(SECURITY)
    };
    protocol(later, "");
}

#[test]
fn a_discovery_session_names_no_target_and_offers_no_transfers() {
    let mut it = begun(LoginPlan {
        session: SessionType::Discovery,
        ..plan()
    });
    assert_eq!(it.value("SessionType"), Some("Discovery"));
    assert_eq!(it.value("TargetName"), None);
    it.goes_on(TO_OPERATIONAL, "AuthMethod=None ");
    assert_eq!(it.value("InitialR2T"), None);
    it.done("HeaderDigest=None ");
}
