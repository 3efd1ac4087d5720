//! The decoder and the encoder from a client's side: requests whole, in pieces, and garbage.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test's panic is its failure"
)]

use proptest::prelude::*;

use super::*;

/// Everything that comes out of `pieces`.
fn decode(pieces: &[&[u8]]) -> Result<Vec<Event>, HttpError> {
    let mut decoder = Decoder::new(100);
    let mut events = Vec::new();
    for piece in pieces {
        decoder.feed(piece);
        while let Some(event) = decoder.next_event()? {
            events.push(event);
        }
    }
    Ok(events)
}

fn request(method: Method, path: &str, body: &str) -> Event {
    Event::Request(Request {
        method,
        path: path.to_owned(),
        body: body.as_bytes().to_vec(),
        keep_alive: true,
    })
}

#[test]
fn requests_come_out_in_order() {
    let bytes = b"GET / HTTP/1.1\r\n\r\nPUT /drives/a HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}\r\n\
                  DELETE http://localhost/a/b HTTP/1.1\r\nHost: x\r\n\r\nPATCH /vm HTTP/1.1\r\n";
    let expected = [
        request(Method::Get, "/", ""),
        request(Method::Put, "/drives/a", "{}"),
        request(Method::Delete, "/a/b", ""),
    ];
    assert_eq!(decode(&[bytes]).unwrap(), expected);
}

#[test]
fn a_client_that_waits_is_told_to_go_on() {
    let events = decode(&[
        b"PUT /a HTTP/1.1\r\nExpect: 100-continue\r\ncontent-length: 1\r\n\r\n",
        b"x",
    ])
    .unwrap();
    assert_eq!(events, [Event::Continue, request(Method::Put, "/a", "x")]);
}

#[test]
fn a_client_that_will_close_is_understood() {
    for (head, stays) in [
        ("GET / HTTP/1.0\r\n\r\n", true),
        ("GET / HTTP/1.1\r\n\r\n", true),
        ("GET / HTTP/1.0\r\nConnection: close\r\n\r\n", false),
        ("GET / HTTP/1.1\r\nConnection: Close\r\n\r\n", false),
    ] {
        let events = decode(&[head.as_bytes()]).unwrap();
        let [Event::Request(Request { keep_alive, .. })] = events.as_slice() else {
            panic!("{head}: {events:?}");
        };
        assert_eq!(*keep_alive, stays, "{head}");
    }
}

#[test]
fn what_is_not_served_is_refused_with_the_reason() {
    let long = format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(HEAD_BYTES_MAX));
    let many = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(HEADERS_MAX + 1));
    for (bytes, expected) in [
        ("nonsense\r\n\r\n", HttpError::Malformed),
        ("GET / HTTP/2.0\r\n\r\n", HttpError::Malformed),
        (
            "POST / HTTP/1.1\r\n\r\n",
            HttpError::Method {
                name: "POST".to_owned(),
            },
        ),
        (
            "PUT / HTTP/1.1\r\nContent-Length: 101\r\n\r\n",
            HttpError::BodyTooLong {
                bytes: 101,
                bytes_max: 100,
            },
        ),
        ("PUT / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", HttpError::Length),
        ("PUT / HTTP/1.1\r\nContent-Length: +1\r\n\r\n", HttpError::Length),
        (
            "PUT / HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n",
            HttpError::Length,
        ),
        (
            "PUT / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
            HttpError::Length,
        ),
        (
            "PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
            HttpError::TransferEncoding,
        ),
        (long.as_str(), HttpError::HeadTooLong),
        (many.as_str(), HttpError::TooManyHeaders),
    ] {
        assert_eq!(
            decode(&[bytes.as_bytes()]),
            Err(expected),
            "{}",
            bytes.get(..60).unwrap_or(bytes)
        );
    }
}

#[test]
fn a_head_without_end_is_refused_before_it_fills_memory() {
    let mut decoder = Decoder::new(100);
    decoder.feed(&[b'a'; HEAD_BYTES_MAX]);
    assert_eq!(decoder.next_event(), Ok(None));
    decoder.feed(b"a");
    assert_eq!(decoder.next_event(), Err(HttpError::HeadTooLong));
}

#[test]
fn a_response_reads_as_firecrackers() {
    let response = Response {
        status: Status::BadRequest,
        body: Some((Content::Json, "{}".to_owned())),
        deprecated: false,
    };
    let text = String::from_utf8(response.encode(true)).unwrap();
    assert_eq!(
        text,
        "HTTP/1.1 400 Bad Request\r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\
         Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
    );
    let response = Response {
        status: Status::NoContent,
        body: None,
        deprecated: true,
    };
    let text = String::from_utf8(response.encode(false)).unwrap();
    assert_eq!(
        text,
        "HTTP/1.1 204 No Content\r\nServer: Firecracker API\r\nConnection: close\r\nDeprecation: true\r\n\r\n"
    );
}

proptest! {
    #[test]
    fn how_bytes_are_cut_does_not_matter(
        bodies in prop::collection::vec(("[a-z]{0,100}", any::<bool>()), 1..6),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..20),
    ) {
        let mut bytes = Vec::new();
        for (body, expect) in &bodies {
            let expect = if *expect { "Expect: 100-continue\r\n" } else { "" };
            let head = format!("\r\nPUT /a HTTP/1.1\r\nContent-Length: {}\r\n{expect}\r\n", body.len());
            bytes.extend_from_slice(head.as_bytes());
            bytes.extend_from_slice(body.as_bytes());
        }
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len())).collect();
        cuts.extend([0, bytes.len()]);
        cuts.sort_unstable();
        let pieces: Vec<&[u8]> = cuts.array_windows::<2>().map(|[from, to]| &bytes[*from..*to]).collect();
        let whole = decode(&[&bytes]);
        prop_assert!(whole.is_ok());
        prop_assert_eq!(decode(&pieces), whole);
    }

    #[test]
    fn garbage_never_panics_and_is_bounded(pieces in prop::collection::vec(".{0,400}", 0..40)) {
        let mut decoder = Decoder::new(100);
        for piece in pieces {
            decoder.feed(piece.as_bytes());
            loop {
                match decoder.next_event() {
                    Ok(Some(_)) => {}
                    Ok(None) => break,
                    Err(_) => return Ok(()),
                }
            }
            prop_assert!(decoder.buffer.len() <= HEAD_BYTES_MAX);
        }
    }
}
