//! What an iSCSI target or an initiator may send, and what a user may write instead of a URL.

use std::sync::Arc;

use coracle_storage::iscsi::chap::{Algorithm, Authentication, Credentials};
use coracle_storage::iscsi::digest::DigestKind;
use coracle_storage::iscsi::discovery::SendTargets;
use coracle_storage::iscsi::login::{
    LOGIN_SEGMENT_BYTES_MAX, Login, LoginPlan, Negotiated, Progress, RANDOM_BYTES, REQUESTS_MAX, SessionType,
};
use coracle_storage::iscsi::pdu::{
    BHS_BYTES, Bhs, InitiatorPdu, Isid, LoginResponse, Lun, Serial, Stage, Tag, TargetPdu, TextResponse,
    Transit, Window,
};
use coracle_storage::iscsi::text::{self, Hexadecimal, Text, pairs};
use coracle_storage::iscsi::url::IscsiUrl;
use coracle_storage::secret::Secret;

use super::Input;

/// Headers, one behind the other.
pub(crate) fn run_pdu(data: &[u8]) {
    for header in data.chunks(BHS_BYTES) {
        let mut bhs = Bhs::default();
        bhs.0
            .get_mut(..header.len())
            .expect("a chunk is no longer than a header")
            .copy_from_slice(header);
        let from_target = TargetPdu::parse(&bhs);
        let from_initiator = InitiatorPdu::parse(&bhs);
        assert!(
            from_target.is_err() || from_initiator.is_err(),
            "{bhs:?} goes both ways"
        );
        if let Ok(pdu) = from_target {
            assert_eq!(TargetPdu::parse(&pdu.bhs()), Ok(pdu));
            assert_eq!(pdu.bhs().opcode(), bhs.opcode());
            let _ = (pdu.window(), pdu.status_number());
        }
        if let Ok(pdu) = from_initiator {
            assert_eq!(InitiatorPdu::parse(&pdu.bhs()), Ok(pdu));
            assert_eq!(pdu.bhs().opcode(), bhs.opcode());
        }
        assert!(bhs.ahs_bytes() <= 4 * 255);
        assert_eq!(bhs.with_data_segment(bhs.data_segment_bytes()), bhs);
    }
}

/// A text; and the same as a list of targets, in two pieces.
pub(crate) fn run_text(data: &[u8]) {
    if let Ok(read) = pairs(data) {
        let mut text = Text::default();
        for pair in &read {
            text.put(pair.key, pair.value);
            let _ = (
                text::number(pair.value),
                text::boolean(pair.value),
                text::list(pair.value).count(),
            );
            if let Some(bytes) = text::binary(pair.value) {
                assert_eq!(text::binary(&Hexadecimal(&bytes).to_string()), Some(bytes));
            }
        }
        assert_eq!(
            pairs(&text.into_bytes()),
            Ok(read),
            "a text is read as it is written"
        );
    }
    let mut exchange = SendTargets::new();
    let (one, other) = data.split_at(data.len() / 2);
    for (is_final, piece) in [(false, one), (true, other)] {
        let (request, _) = exchange.request(Serial(0), Serial(0));
        let response = TextResponse {
            is_final,
            is_continued: !is_final,
            lun: Lun::default(),
            initiator_task_tag: request.initiator_task_tag,
            target_transfer_tag: Tag(0),
            stat_sn: Serial(0),
            window: Window::default(),
        };
        if exchange.response(&response, piece).is_err() {
            return;
        }
    }
}

const OWN_SECRET: &str = "what the initiator knows";
const TARGET_SECRET: &str = "what the target knows";

/// A login: what it insists on, and the target's responses to it.
pub(crate) fn run_login(data: &[u8]) {
    let mut input = Input::new(data);
    let plan = Arc::new(plan(input.u8()));
    let mut login = Login::new(&plan, [0x5a; RANDOM_BYTES]);
    let mut has_proof = false;
    for requests in 1.. {
        assert!(requests <= REQUESTS_MAX, "a login ends");
        let (request, text) = login.request();
        assert!(
            text.len() <= LOGIN_SEGMENT_BYTES_MAX as usize,
            "a target takes no longer one"
        );
        let said = String::from_utf8(text).expect("we write text");
        assert!(!tells_a_secret(&said, data), "{said}");
        if input.is_empty() {
            return;
        }
        let kind = input.u8();
        let mut text = match kind & 3 {
            // No search finds a hash: the target that knows its secret.
            0 => proof(&said).unwrap_or_default(),
            _ => String::new(),
        }
        .into_bytes();
        has_proof |= !text.is_empty();
        let response = match kind & 4 {
            0 => usual_response(request.transit, kind),
            _ => any_response(&mut input),
        };
        let len = usize::from(input.u8());
        text.extend_from_slice(input.take(len));
        let Some(response) = response else {
            return;
        };
        match login.response(&response, &text) {
            Ok(Progress::Continue) => {}
            Ok(Progress::Done(negotiated)) => {
                let is_mutual = plan
                    .authentication
                    .as_ref()
                    .is_some_and(Authentication::is_mutual);
                assert!(has_proof || !is_mutual, "nobody is let in without a proof");
                return check(&negotiated, &plan);
            }
            Ok(Progress::Redirected(_)) => return,
            Err(error) => {
                let text = format!("{error} {error:?} {:?}", error.failure());
                assert!(!tells_a_secret(&text, data), "{text}");
                return;
            }
        }
    }
}

/// Whether a secret is in what is said or shown, unless the target has said it first.
fn tells_a_secret(text: &str, data: &[u8]) -> bool {
    let secrets = [OWN_SECRET, TARGET_SECRET];
    secrets.iter().any(|secret| {
        let is_known = data
            .windows(secret.len())
            .any(|window| window == secret.as_bytes());
        text.contains(secret) && !is_known
    })
}

fn plan(bits: u8) -> LoginPlan {
    let credentials = |user: &str, secret: &str| Credentials {
        user: user.to_owned(),
        secret: Secret::new(secret.into()),
    };
    let digest = |bit| {
        if bits & bit == 0 {
            DigestKind::None
        } else {
            DigestKind::Crc32c
        }
    };
    let target = (bits & 2 != 0).then(|| credentials("target", TARGET_SECRET));
    let algorithm = (bits & 4 != 0).then_some(Algorithm::Sha256);
    let authentication = (bits & 1 != 0).then(|| {
        Authentication::new(credentials("vm", OWN_SECRET), target, algorithm).expect("the secrets differ")
    });
    let name = |text: &str| text.parse().expect("it is a name");
    LoginPlan {
        initiator: name("iqn.2026-11.org.example:vm"),
        isid: Isid([0x80, 0, 0, 0, 0, 1]),
        session: match bits & 8 {
            0 => SessionType::Normal(name("iqn.2026-11.org.example:disk")),
            _ => SessionType::Discovery,
        },
        authentication,
        header_digest: digest(16),
        data_digest: digest(32),
        max_recv_data_segment_length: 262_144,
    }
}

/// What the target that is meant says to a challenge.
fn proof(said: &str) -> Option<String> {
    let value = |key: &str| {
        let mut pairs = said.split('\0').filter_map(|pair| pair.split_once('='));
        pairs.find(|(it, _)| *it == key).map(|(_, value)| value)
    };
    let identifier = value("CHAP_I")?.parse().ok()?;
    let challenge = text::binary(value("CHAP_C")?)?;
    let algorithm = match value("CHAP_R")?.len() {
        34 => Algorithm::Md5,
        _ => Algorithm::Sha256,
    };
    let response = algorithm.response(identifier, &Secret::new(TARGET_SECRET.into()), &challenge);
    Some(format!("CHAP_N=target\0CHAP_R={}\0", Hexadecimal(&response)))
}

/// A response that goes where the initiator wants to, or says that more follows.
fn usual_response(asked: Transit, kind: u8) -> Option<LoginResponse> {
    let transit = match kind & 0x30 {
        0x10 => Transit::Unfinished(asked.stage()),
        0x20 => Transit::Stay(asked.stage()),
        _ => asked,
    };
    Some(LoginResponse {
        transit,
        version_max: 0,
        version_active: 0,
        isid: Isid([0x80, 0, 0, 0, 0, 1]),
        tsih: 1,
        initiator_task_tag: Tag(0),
        stat_sn: Serial(u32::MAX),
        window: Window::default(),
        status_class: 0,
        status_detail: 0,
    })
}

/// Whatever can be a login response.
fn any_response(input: &mut Input<'_>) -> Option<LoginResponse> {
    let [flags, version, tag, class, detail] = [(); 5].map(|()| input.u8());
    let usual = usual_response(Transit::Stay(Stage::SecurityNegotiation), 0)?;
    let mut bhs = LoginResponse {
        version_active: version,
        initiator_task_tag: Tag(tag.into()),
        status_class: class,
        status_detail: detail,
        ..usual
    }
    .bhs();
    *bhs.0.get_mut(1)? = flags;
    match TargetPdu::parse(&bhs) {
        Ok(TargetPdu::LoginResponse(response)) => Some(response),
        Ok(other) => panic!("{other:?} is no login response"),
        Err(_) => None,
    }
}

fn check(negotiated: &Negotiated, plan: &LoginPlan) {
    assert_eq!(negotiated.header_digest, plan.header_digest);
    assert_eq!(negotiated.data_digest, plan.data_digest);
    assert!(negotiated.first_burst_length <= negotiated.max_burst_length);
    assert!(negotiated.max_burst_length <= 1 << 20);
    assert!((1..=16).contains(&negotiated.max_outstanding_r2t));
    assert!(negotiated.target_max_recv_data_segment_length >= 512);
}

/// What stands where a path or a URL is expected.
pub(crate) fn run_url(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else {
        return;
    };
    match text.parse::<IscsiUrl>() {
        Ok(url) => {
            assert!(IscsiUrl::is_url(text));
            let canonical = url.to_string();
            assert_eq!(canonical.parse().as_ref(), Ok(&url), "{canonical}");
            assert!(!url.portals.is_empty());
            assert!(url.image.lun.number().is_some());
        }
        Err(error) => drop(error.to_string()),
    }
}
