//! The login of the initiator against that of the simulated target.

use std::sync::Arc;

use coracle_storage::iscsi::digest::DigestKind;
use coracle_storage::iscsi::login::{Login, LoginPlan, Negotiated, Progress, RANDOM_BYTES, SessionType};
use coracle_storage::iscsi::pdu::{BHS_BYTES, Bhs, Isid, TargetPdu};
use coracle_storage::sim::dice::Dice;
use coracle_storage::sim::target::options::Options;
use coracle_storage::sim::target::{Redirect, Target, Term};

use super::{target, with_seed};

fn plan(header_digest: DigestKind, data_digest: DigestKind) -> LoginPlan {
    LoginPlan {
        initiator: "iqn.2026-01.test:vm".parse().unwrap(),
        isid: Isid([0x80, 1, 2, 3, 4, 5]),
        session: SessionType::Normal("iqn.2026-01.test:t1".parse().unwrap()),
        authentication: None,
        header_digest,
        data_digest,
        max_recv_data_segment_length: 65536,
    }
}

/// Carries a login to its end; what it comes to, or why it does not.
fn log_in(target: &Target, plan: LoginPlan) -> Result<Progress, String> {
    let mut connection = target.connect();
    let mut login = Login::new(&Arc::new(plan), [7; RANDOM_BYTES]);
    loop {
        let (request, mut data) = login.request();
        let bhs = request
            .bhs()
            .with_data_segment(u32::try_from(data.len()).unwrap());
        data.resize(data.len().next_multiple_of(4), 0);
        connection.receive(&bhs.0);
        connection.receive(&data);
        let bytes = connection.transmit();
        let (bhs, data) = bytes.split_first_chunk::<BHS_BYTES>().unwrap();
        let TargetPdu::LoginResponse(response) = TargetPdu::parse(&Bhs(*bhs)).unwrap() else {
            panic!("a login is answered by one response");
        };
        let data_bytes = usize::try_from(Bhs(*bhs).data_segment_bytes()).unwrap();
        match login.response(&response, &data[..data_bytes]) {
            Ok(Progress::Continue) => {}
            ended => return ended.map_err(|error| error.to_string()),
        }
    }
}

fn negotiated(progress: Progress) -> Negotiated {
    match progress {
        Progress::Done(negotiated) => negotiated,
        other => panic!("a session was expected, not {other:?}"),
    }
}

#[test]
fn both_sides_come_to_the_same_whatever_the_target_can_take() {
    for seed in 0..300 {
        let mut dice = Dice::new(seed);
        let options = Options::draw(&mut dice);
        let limits = options.limits;
        let target = with_seed(options, seed);
        let kind = |has_crc: bool| {
            if has_crc {
                DigestKind::Crc32c
            } else {
                DigestKind::None
            }
        };
        let plan = plan(kind(limits.header_digest), kind(limits.data_digest));
        let agreed = negotiated(log_in(&target, plan).unwrap());
        assert_eq!(
            (
                agreed.initial_r2t,
                agreed.immediate_data,
                agreed.max_outstanding_r2t
            ),
            (
                limits.initial_r2t,
                limits.immediate_data,
                limits.max_outstanding_r2t
            ),
            "seed {seed}"
        );
        assert_eq!(
            (agreed.first_burst_length, agreed.max_burst_length),
            (limits.first_burst_bytes, limits.max_burst_bytes),
            "seed {seed}"
        );
        assert_eq!(
            agreed.target_max_recv_data_segment_length,
            limits.max_recv_data_segment_bytes
        );
        let room = agreed.window.max_cmd_sn.next().since(agreed.window.exp_cmd_sn);
        assert_eq!(room, Some(limits.commands_max));
        assert_eq!(target.complaints(), [""; 0]);
    }
}

#[test]
fn a_digest_that_the_target_has_not_ends_the_login() {
    let mut options = Options::default();
    options.limits.header_digest = false;
    let error = log_in(&target(options), plan(DigestKind::Crc32c, DigestKind::None)).unwrap_err();
    assert!(error.contains("digest") || error.contains("Digest"), "{error}");
}

#[test]
fn a_redirected_login_says_where_to() {
    let target = target(Options::default());
    target.redirect(Some(Redirect {
        address: "192.0.2.7:3261".to_owned(),
        term: Term::Permanently,
    }));
    let progress = log_in(&target, plan(DigestKind::None, DigestKind::None)).unwrap();
    let Progress::Redirected(redirection) = progress else {
        panic!("{progress:?}");
    };
    assert!(redirection.is_permanent);
    assert_eq!(redirection.portal.to_string(), "192.0.2.7:3261");
}
