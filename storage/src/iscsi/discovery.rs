//! Which targets there are: the exchange of `SendTargets` in a discovery session (RFC 7143, appendix C).

use super::pdu::{Lun, Serial, Tag, TextRequest, TextResponse};
use super::portal::{PortalError, TargetAddress};
use super::text::{Pair, Text, TextError, pairs};

/// Longest list of targets, in bytes.
pub const LIST_BYTES_MAX: usize = 1 << 20;
/// Requests of one exchange: 1 MiB comes in 128 pieces of the length that a login leaves unless it says otherwise.
pub const REQUESTS_MAX: u32 = 256;

/// A target, and where it listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Its name, as it was told: whether it is a good one shows when it is used.
    pub name: String,
    /// In the order that they were told. None: where the discovery was.
    pub addresses: Vec<TargetAddress>,
}

/// Why there is no list.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DiscoveryError {
    /// The text is none.
    #[error("the list of targets cannot be read")]
    Text(#[from] TextError),
    /// An address is none.
    #[error("the list of targets has an address that is none")]
    Address(#[from] PortalError),
    /// What the standard forbids.
    #[error("the list of targets breaks the protocol: {0}")]
    Protocol(&'static str),
}

/// An exchange that is going on.
#[derive(Debug)]
pub struct SendTargets {
    gathered: Vec<u8>,
    lun: Lun,
    transfer_tag: Tag,
    requests: u32,
}

impl SendTargets {
    const TASK_TAG: Tag = Tag(1);

    /// Begins an exchange.
    pub fn new() -> Self {
        Self {
            gathered: Vec::new(),
            lun: Lun::default(),
            transfer_tag: Tag::RESERVED,
            requests: 0,
        }
    }

    /// The next request, and its data segment. Once at the beginning, and once for each response without a list.
    pub fn request(&mut self, cmd_sn: Serial, exp_stat_sn: Serial) -> (TextRequest, Vec<u8>) {
        let mut text = Text::default();
        if self.requests == 0 {
            text.put("SendTargets", "All");
        }
        self.requests += 1;
        let request = TextRequest {
            immediate: true,
            is_final: true,
            is_continued: false,
            lun: self.lun,
            initiator_task_tag: Self::TASK_TAG,
            target_transfer_tag: self.transfer_tag,
            cmd_sn,
            exp_stat_sn,
        };
        (request, text.into_bytes())
    }

    /// Takes the response to the last request. Returns the list, when it is whole.
    ///
    /// # Errors
    ///
    /// There will be no list.
    pub fn response(
        &mut self,
        response: &TextResponse,
        data: &[u8],
    ) -> Result<Option<Vec<Found>>, DiscoveryError> {
        if response.initiator_task_tag != Self::TASK_TAG {
            return Err(DiscoveryError::Protocol("it answers another request"));
        }
        if self.gathered.len() + data.len() > LIST_BYTES_MAX {
            return Err(DiscoveryError::Protocol("it is too long"));
        }
        self.gathered.extend_from_slice(data);
        if response.is_final && !response.is_continued {
            return Ok(Some(found(&pairs(&self.gathered)?)?));
        }
        if response.target_transfer_tag == Tag::RESERVED {
            return Err(DiscoveryError::Protocol(
                "it does not end, and does not say how to go on",
            ));
        }
        if self.requests >= REQUESTS_MAX {
            return Err(DiscoveryError::Protocol("it does not end"));
        }
        self.lun = response.lun;
        self.transfer_tag = response.target_transfer_tag;
        Ok(None)
    }
}

impl Default for SendTargets {
    fn default() -> Self {
        Self::new()
    }
}

fn found(pairs: &[Pair<'_>]) -> Result<Vec<Found>, DiscoveryError> {
    let mut list: Vec<Found> = Vec::new();
    for pair in pairs {
        match (pair.key, list.last_mut()) {
            // It is going to be shown.
            ("TargetName", _) if pair.value.contains(char::is_control) => {
                return Err(DiscoveryError::Protocol("a name has control characters"));
            }
            ("TargetName", _) => list.push(Found {
                name: pair.value.to_owned(),
                addresses: Vec::new(),
            }),
            ("TargetAddress", Some(target)) => target.addresses.push(pair.value.parse()?),
            ("TargetAddress", None) => return Err(DiscoveryError::Protocol("an address is of no target")),
            // An alias, or something that a vendor likes to say.
            _ => {}
        }
    }
    Ok(list)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

    use super::super::pdu::Window;
    use super::*;

    fn response(is_final: bool, transfer_tag: Tag) -> TextResponse {
        TextResponse {
            is_final,
            is_continued: !is_final,
            lun: Lun::new(3).unwrap(),
            initiator_task_tag: Tag(1),
            target_transfer_tag: transfer_tag,
            stat_sn: Serial(5),
            window: Window::default(),
        }
    }

    #[test]
    fn a_list_in_pieces_is_fetched_and_read_as_one() {
        let mut it = SendTargets::new();
        let (request, text) = it.request(Serial(1), Serial(4));
        assert_eq!(text, b"SendTargets=All\0");
        assert_eq!(request.target_transfer_tag, Tag::RESERVED);
        let piece = b"TargetName=iqn.2026-11.org:a\0TargetAddress=10.0.0.1:3260,1\0TargetAddress=[::1]";
        assert_eq!(it.response(&response(false, Tag(9)), piece), Ok(None));
        let (request, text) = it.request(Serial(1), Serial(5));
        assert_eq!(
            (request.target_transfer_tag, request.lun.number()),
            (Tag(9), Some(3))
        );
        assert!(text.is_empty());
        let rest = b":3261,2\0TargetName=iqn.2026-11.org:b\0TargetAlias=bee\0";
        let list = it
            .response(&response(true, Tag::RESERVED), rest)
            .unwrap()
            .unwrap();
        assert_eq!(
            list.iter().map(|it| it.name.as_str()).collect::<Vec<_>>(),
            ["iqn.2026-11.org:a", "iqn.2026-11.org:b"]
        );
        let addresses = &list.first().unwrap().addresses;
        let expected = ["10.0.0.1,1", "[::1]:3261,2"].map(|text| text.parse::<TargetAddress>().unwrap());
        assert_eq!(*addresses, expected);
    }

    #[test]
    fn a_portal_without_targets_has_an_empty_list() {
        let list = SendTargets::new().response(&response(true, Tag::RESERVED), b"");
        assert_eq!(list, Ok(Some(Vec::new())));
    }

    #[test]
    fn a_list_without_end_is_refused() {
        let mut it = SendTargets::new();
        it.request(Serial(1), Serial(1));
        let error = it.response(&response(false, Tag::RESERVED), b"");
        assert!(matches!(error, Err(DiscoveryError::Protocol(_))));
        let error = it.response(&response(false, Tag(1)), &[b'A'; LIST_BYTES_MAX + 1]);
        assert!(matches!(error, Err(DiscoveryError::Protocol(_))));
        let responses = (0..).find(|_| {
            it.request(Serial(1), Serial(1));
            it.response(&response(false, Tag(1)), b"").is_err()
        });
        assert_eq!(responses, Some(REQUESTS_MAX - 2));
    }

    #[test]
    fn nonsense_is_no_list() {
        for text in [
            "TargetAddress=10.0.0.1\0",
            "TargetName=a\0TargetAddress=:\0",
            "TargetName\0",
            "TargetName=\x1b[2J\0",
        ] {
            let list = SendTargets::new().response(&response(true, Tag::RESERVED), text.as_bytes());
            assert!(list.is_err(), "{text}");
        }
        let other = TextResponse {
            initiator_task_tag: Tag(2),
            ..response(true, Tag::RESERVED)
        };
        assert!(SendTargets::new().response(&other, b"").is_err());
    }
}
