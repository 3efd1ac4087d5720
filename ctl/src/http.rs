//! The head of an HTTP/1.1 response, parsed from the bytes that have arrived so far (RFC 9112).

use thiserror::Error;

/// More than this is not a monitor's answer.
pub(crate) const HEAD_BYTES_MAX: usize = 16 * 1024;
/// The longest body that is read: a whole configuration or all metrics, with room to spare.
pub(crate) const BODY_BYTES_MAX: usize = 4 * 1024 * 1024;
const HEADERS_MAX: usize = 64;

/// What the head of a response says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    /// The status code, 200 to 999.
    pub(crate) status: u16,
    /// How the body ends.
    pub(crate) body: Body,
    /// Where the body begins in the bytes that were parsed.
    pub(crate) head_bytes: usize,
}

/// How the body of a response ends (RFC 9112, section 6.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Body {
    /// After this many bytes, [`BODY_BYTES_MAX`] at most.
    Bytes(usize),
    /// When the server closes the connection.
    UntilClose,
}

/// Why bytes are not the head of a response that this client can use.
#[derive(Debug, Error)]
pub(crate) enum HeadError {
    #[error("the answer is not HTTP")]
    NotHttp(#[source] httparse::Error),
    #[error("the head of the answer is longer than {HEAD_BYTES_MAX} bytes")]
    TooLong,
    #[error("the answer has the interim status {0}, which nobody asked for")]
    Interim(u16),
    #[error("the answer has an unusable Content-Length: {0:?}")]
    ContentLength(String),
    #[error("the body of the answer would be {0} bytes, and {BODY_BYTES_MAX} is the limit")]
    BodyTooLong(u64),
    #[error("the answer has a Transfer-Encoding, which Firecracker's API does not use")]
    TransferEncoding,
}

/// Parses the head at the start of `bytes`; `None` asks for more of them.
///
/// # Errors
///
/// When no further byte can make this a head that the client accepts.
pub(crate) fn parse_head(bytes: &[u8]) -> Result<Option<Head>, HeadError> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut response = httparse::Response::new(&mut headers);
    let head_bytes = match response.parse(bytes).map_err(HeadError::NotHttp)? {
        httparse::Status::Complete(head_bytes) if head_bytes <= HEAD_BYTES_MAX => head_bytes,
        httparse::Status::Partial if bytes.len() < HEAD_BYTES_MAX => return Ok(None),
        _ => return Err(HeadError::TooLong),
    };
    let status = response.code.expect("a complete head has a status code");
    if status < 200 {
        return Err(HeadError::Interim(status));
    }
    let body = match body_length(response.headers)? {
        _ if status == 204 || status == 304 => Body::Bytes(0),
        Some(bytes) => Body::Bytes(bytes),
        None => Body::UntilClose,
    };
    Ok(Some(Head {
        status,
        body,
        head_bytes,
    }))
}

fn body_length(headers: &[httparse::Header<'_>]) -> Result<Option<usize>, HeadError> {
    let mut length = None;
    for header in headers {
        if header.name.eq_ignore_ascii_case("transfer-encoding") {
            return Err(HeadError::TransferEncoding);
        }
        if !header.name.eq_ignore_ascii_case("content-length") {
            continue;
        }
        let bytes = content_length(header.value)?;
        if length.replace(bytes).is_some_and(|earlier| earlier != bytes) {
            return Err(HeadError::ContentLength("two that differ".to_owned()));
        }
    }
    Ok(length)
}

fn content_length(value: &[u8]) -> Result<usize, HeadError> {
    let text = String::from_utf8_lossy(value);
    let digits = text.trim();
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(HeadError::ContentLength(digits.to_owned()));
    }
    let bytes: u64 = digits
        .parse()
        .map_err(|_| HeadError::ContentLength(digits.to_owned()))?;
    match usize::try_from(bytes) {
        Ok(length) if length <= BODY_BYTES_MAX => Ok(length),
        _ => Err(HeadError::BodyTooLong(bytes)),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\nServer: x\r\nContent-Length: 2\r\n\r\n{}";

    #[test]
    fn every_cut_of_a_head_asks_for_more() {
        let head = parse_head(ANSWER).unwrap().unwrap();
        assert_eq!(
            head,
            Head {
                status: 200,
                body: Body::Bytes(2),
                head_bytes: ANSWER.len() - 2
            }
        );
        for (cut, _) in ANSWER.iter().enumerate().take(head.head_bytes) {
            let (start, _) = ANSWER.split_at(cut);
            assert_eq!(parse_head(start).unwrap(), None, "cut at {cut}");
        }
    }

    #[test]
    fn a_status_without_content_needs_no_length() {
        let head = parse_head(b"HTTP/1.1 204 No Content\r\nServer: x\r\n\r\n")
            .unwrap()
            .unwrap();
        assert_eq!((head.status, head.body), (204, Body::Bytes(0)));
    }

    #[test]
    fn a_body_without_length_ends_with_the_connection() {
        let head = parse_head(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap().unwrap();
        assert_eq!((head.status, head.body), (400, Body::UntilClose));
    }

    #[test]
    fn heads_that_cannot_be_used_are_refused_by_name() {
        let refused = |text: &str| parse_head(text.as_bytes()).unwrap_err();
        assert!(matches!(
            refused("SSH-2.0-OpenSSH_9.2\r\n"),
            HeadError::NotHttp(_)
        ));
        assert!(matches!(
            refused("HTTP/1.1 100 Continue\r\n\r\n"),
            HeadError::Interim(100)
        ));
        let with = |header: &str| refused(&format!("HTTP/1.1 200 OK\r\n{header}\r\n\r\n"));
        assert!(matches!(with("Content-Length: -1"), HeadError::ContentLength(_)));
        assert!(matches!(with("Content-Length: +1"), HeadError::ContentLength(_)));
        assert!(matches!(
            with("Content-Length: 1\r\ncontent-length: 2"),
            HeadError::ContentLength(_)
        ));
        assert!(matches!(
            with("Content-Length: 99999999999999999999"),
            HeadError::ContentLength(_)
        ));
        assert!(matches!(
            with("Content-Length: 4194305"),
            HeadError::BodyTooLong(4_194_305)
        ));
        assert!(matches!(
            with("Transfer-Encoding: chunked"),
            HeadError::TransferEncoding
        ));
    }

    #[test]
    fn a_head_that_never_ends_is_refused() {
        let endless = format!("HTTP/1.1 200 OK\r\nX: {}", "y".repeat(HEAD_BYTES_MAX));
        assert!(matches!(parse_head(endless.as_bytes()), Err(HeadError::TooLong)));
    }

    proptest! {
        #[test]
        fn no_bytes_panic_the_parser(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            if let Ok(Some(head)) = parse_head(&bytes) {
                prop_assert!(head.head_bytes <= bytes.len());
            }
        }

        #[test]
        fn no_damage_to_an_answer_panics_the_parser(at in 0..ANSWER.len(), byte in any::<u8>()) {
            let mut bytes = ANSWER.to_vec();
            *bytes.get_mut(at).unwrap() = byte;
            if let Ok(Some(head)) = parse_head(&bytes) {
                prop_assert!(head.head_bytes <= bytes.len());
            }
        }
    }
}
