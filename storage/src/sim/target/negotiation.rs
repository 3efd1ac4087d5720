//! The text keys of a login (RFC 7143, 13), and what they come to.

use super::options::Options;

/// What holds for a session.
#[derive(Clone, Debug)]
pub(super) struct Negotiated {
    pub(super) initiator: Option<String>,
    pub(super) target: Option<String>,
    pub(super) kind: SessionKind,
    pub(super) digests: Digests,
    /// What the initiator takes.
    pub(super) max_recv_data_segment_bytes: u32,
    pub(super) first_burst_bytes: u32,
    pub(super) max_burst_bytes: u32,
    pub(super) max_outstanding_r2t: u32,
    pub(super) initial_r2t: bool,
    pub(super) immediate_data: bool,
    /// Whether the initiator can authenticate itself in a way that the target demands.
    pub(super) refuses_none: bool,
    declared: bool,
}

/// Which parts of PDUs have a CRC32C.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Digests {
    pub(super) header: bool,
    pub(super) data: bool,
}

/// What a session is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SessionKind {
    Normal,
    Discovery,
}

impl Negotiated {
    /// What holds if nobody says anything.
    pub(super) fn new() -> Self {
        Self {
            initiator: None,
            target: None,
            kind: SessionKind::Normal,
            digests: Digests::default(),
            max_recv_data_segment_bytes: 8192,
            first_burst_bytes: 65_536,
            max_burst_bytes: 262_144,
            max_outstanding_r2t: 1,
            initial_r2t: true,
            immediate_data: true,
            refuses_none: false,
            declared: false,
        }
    }

    /// What the target takes, said once and before anything else of the operational stage.
    pub(super) fn declaration(&mut self, options: &Options) -> Option<(String, String)> {
        let is_news = !std::mem::replace(&mut self.declared, true);
        let bytes = options.limits.max_recv_data_segment_bytes;
        is_news.then(|| ("MaxRecvDataSegmentLength".to_owned(), bytes.to_string()))
    }

    /// Takes what the initiator says of a key; what it is answered, if it is.
    pub(super) fn answer(&mut self, key: &str, value: &str, options: &Options) -> Option<String> {
        let limits = &options.limits;
        let number = || value.parse::<u32>().ok();
        let is_yes = value == "Yes";
        let text = match key {
            "InitiatorName" => return self.declare(|it| it.initiator = Some(value.to_owned())),
            "TargetName" => return self.declare(|it| it.target = Some(value.to_owned())),
            "InitiatorAlias" => return None,
            "SessionType" => {
                let is_discovery = value == "Discovery";
                return self.declare(|it| {
                    it.kind = if is_discovery {
                        SessionKind::Discovery
                    } else {
                        SessionKind::Normal
                    }
                });
            }
            "MaxRecvDataSegmentLength" => {
                let bytes = number().filter(|bytes| (512..1 << 24).contains(bytes));
                return self.declare(|it| it.max_recv_data_segment_bytes = bytes.unwrap_or(8192));
            }
            "AuthMethod" => {
                self.refuses_none = !value.split(',').any(|method| method == "None");
                "None".to_owned()
            }
            "HeaderDigest" => choose_digest(value, limits.header_digest, &mut self.digests.header),
            "DataDigest" => choose_digest(value, limits.data_digest, &mut self.digests.data),
            "InitialR2T" => {
                self.initial_r2t = limits.initial_r2t || is_yes;
                yes_or_no(self.initial_r2t)
            }
            "ImmediateData" => {
                self.immediate_data = limits.immediate_data && is_yes;
                yes_or_no(self.immediate_data)
            }
            "FirstBurstLength" => least(&mut self.first_burst_bytes, number()?, limits.first_burst_bytes),
            "MaxBurstLength" => least(&mut self.max_burst_bytes, number()?, limits.max_burst_bytes),
            "MaxOutstandingR2T" => least(
                &mut self.max_outstanding_r2t,
                number()?,
                limits.max_outstanding_r2t,
            ),
            "MaxConnections" => "1".to_owned(),
            "ErrorRecoveryLevel" | "DefaultTime2Retain" => "0".to_owned(),
            "DefaultTime2Wait" => number()?.max(2).to_string(),
            "DataPDUInOrder" | "DataSequenceInOrder" => "Yes".to_owned(),
            "IFMarker" | "OFMarker" => "No".to_owned(),
            "iSCSIProtocolLevel" => "1".to_owned(),
            "TaskReporting" => "RFC3720".to_owned(),
            _ => "NotUnderstood".to_owned(),
        };
        Some(text)
    }

    fn declare(&mut self, declare: impl FnOnce(&mut Self)) -> Option<String> {
        declare(self);
        None
    }
}

/// The first of a list that the target has.
fn choose_digest(offered: &str, has_crc: bool, chosen: &mut bool) -> String {
    let known = |digest: &&str| *digest == "None" || (*digest == "CRC32C" && has_crc);
    let Some(digest) = offered.split(',').find(known) else {
        return "Reject".to_owned();
    };
    *chosen = digest == "CRC32C";
    digest.to_owned()
}

fn least(agreed: &mut u32, theirs: u32, ours: u32) -> String {
    *agreed = theirs.min(ours);
    agreed.to_string()
}

fn yes_or_no(value: bool) -> String {
    if value { "Yes" } else { "No" }.to_owned()
}

/// The pairs of a data segment of text (RFC 7143, 6.1).
pub(super) fn pairs(segment: &[u8]) -> Vec<(String, String)> {
    let texts = segment.split(|byte| *byte == 0).map(String::from_utf8_lossy);
    let pair = |text: std::borrow::Cow<'_, str>| {
        let (key, value) = text.split_once('=')?;
        Some((key.to_owned(), value.to_owned()))
    };
    texts.filter_map(pair).collect()
}

/// The data segment of such pairs.
pub(super) fn segment(pairs: &[(String, String)]) -> Vec<u8> {
    let text = |(key, value): &(String, String)| format!("{key}={value}\0").into_bytes();
    pairs.iter().flat_map(text).collect()
}
