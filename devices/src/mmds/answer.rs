//! One request of a guest, and what it is answered.

use std::sync::atomic::Ordering::Relaxed;

use super::store::{Format, Found, Mmds, MmdsVersion};
use super::token::TTL_S_MAX;

/// Most headers of a request.
const HEADERS_MAX: usize = 32;
const TOKEN_PATH: &str = "/latest/api/token";
const TOKEN_HEADERS: [&str; 2] = ["X-metadata-token", "X-aws-ec2-metadata-token"];
const TTL_HEADERS: [&str; 2] = [
    "X-metadata-token-ttl-seconds",
    "X-aws-ec2-metadata-token-ttl-seconds",
];

/// What the bytes of a connection come to.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// A request has begun, and is not complete.
    Incomplete,
    /// It is, and is answered so.
    Response {
        /// How many bytes it was.
        consumed: usize,
        /// What is sent.
        bytes: Vec<u8>,
        /// Nothing more is answered on this connection.
        is_last: bool,
    },
}

/// A response before it is bytes.
struct Response {
    status: &'static str,
    format: Format,
    /// A line of its own, with its end.
    extra: String,
    body: String,
}

impl Response {
    fn plain(status: &'static str, body: impl Into<String>) -> Self {
        Self {
            status,
            format: Format::Imds,
            extra: String::new(),
            body: body.into(),
        }
    }

    fn bytes(&self, is_last: bool) -> Vec<u8> {
        let Self {
            status,
            format,
            extra,
            body,
        } = self;
        let kind = match format {
            Format::Json => "application/json",
            Format::Imds => "text/plain",
        };
        let connection = if is_last { "close" } else { "keep-alive" };
        let length = body.len();
        format!(
            "HTTP/1.1 {status}\r\nServer: Coracle\r\nConnection: {connection}\r\nContent-Type: {kind}\r\n{extra}Content-Length: \
             {length}\r\n\r\n{body}"
        )
        .into_bytes()
    }
}

/// Answers the first request of `bytes`, if all of it is there. It never looks at more than one.
pub fn answer(mmds: &Mmds, bytes: &[u8]) -> Answer {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut request = httparse::Request::new(&mut headers);
    let head_bytes = match request.parse(bytes) {
        Ok(httparse::Status::Complete(head_bytes)) => head_bytes,
        Ok(httparse::Status::Partial) => return Answer::Incomplete,
        Err(error) => {
            mmds.counts.requests.fetch_add(1, Relaxed);
            let refused = Response::plain("400 Bad Request", format!("The request is malformed: {error}."));
            return last(bytes.len(), &refused);
        }
    };
    let head = Head(request);
    let body_bytes = match head.body_bytes() {
        Ok(body_bytes) => body_bytes,
        Err(refused) => {
            mmds.counts.requests.fetch_add(1, Relaxed);
            return last(bytes.len(), &refused);
        }
    };
    // What a body says is of no interest, but it is no request either.
    let consumed = head_bytes.saturating_add(body_bytes);
    if consumed > bytes.len() {
        return Answer::Incomplete;
    }
    mmds.counts.requests.fetch_add(1, Relaxed);
    let is_last = !head.keeps_alive();
    Answer::Response {
        consumed,
        bytes: respond(mmds, &head).bytes(is_last),
        is_last,
    }
}

fn last(consumed: usize, response: &Response) -> Answer {
    Answer::Response {
        consumed,
        bytes: response.bytes(true),
        is_last: true,
    }
}

/// A complete head.
struct Head<'h, 'b>(httparse::Request<'h, 'b>);

impl Head<'_, '_> {
    fn header(&self, names: &[&str]) -> Option<&str> {
        let found = self
            .0
            .headers
            .iter()
            .find(|header| names.iter().any(|name| header.name.eq_ignore_ascii_case(name)));
        found.and_then(|header| std::str::from_utf8(header.value).ok())
    }

    fn has(&self, name: &str) -> bool {
        self.0
            .headers
            .iter()
            .any(|header| header.name.eq_ignore_ascii_case(name))
    }

    fn body_bytes(&self) -> Result<usize, Response> {
        if self.has("Transfer-Encoding") {
            return Err(Response::plain(
                "501 Not Implemented",
                "A body in chunks is not read.",
            ));
        }
        if !self.has("Content-Length") {
            return Ok(0);
        }
        let length = self
            .header(&["Content-Length"])
            .and_then(|text| text.parse().ok());
        length.ok_or_else(|| Response::plain("400 Bad Request", "Content-Length is no length."))
    }

    fn keeps_alive(&self) -> bool {
        let wish = self.header(&["Connection"]).unwrap_or_default();
        match self.0.version {
            Some(1) => !wish.eq_ignore_ascii_case("close"),
            _ => wish.eq_ignore_ascii_case("keep-alive"),
        }
    }

    /// The path alone, also of a URL with everything (RFC 9112, 3.2.2).
    fn path(&self) -> &str {
        let target = self.0.path.unwrap_or_default();
        let path = match target.split_once("://") {
            Some((scheme, rest)) if !scheme.contains('/') => rest.find('/').and_then(|at| rest.get(at..)),
            _ => Some(target),
        };
        let path = path.unwrap_or("/");
        path.split_once('?').map_or(path, |(path, _)| path)
    }

    fn accepted(&self) -> Format {
        let accept = self.header(&["Accept"]).unwrap_or_default();
        let accepts_json = accept
            .split([',', ';'])
            .any(|kind| kind.trim().eq_ignore_ascii_case("application/json"));
        if accepts_json { Format::Json } else { Format::Imds }
    }
}

fn respond(mmds: &Mmds, head: &Head<'_, '_>) -> Response {
    if !head.path().starts_with('/') {
        return Response::plain("400 Bad Request", "That is no path.");
    }
    match head.0.method {
        Some("GET") => get(mmds, head),
        Some("PUT") => put(mmds, head),
        _ => Response {
            extra: "Allow: GET, PUT\r\n".to_owned(),
            ..Response::plain("405 Method Not Allowed", "Only GET and PUT are answered.")
        },
    }
}

fn get(mmds: &Mmds, head: &Head<'_, '_>) -> Response {
    let token = head.header(&TOKEN_HEADERS);
    let refused = match token {
        Some(token) if mmds.knows_token(token) => None,
        Some(_) => {
            mmds.counts.invalid_tokens.fetch_add(1, Relaxed);
            Some("The session token is none of this service, or has ended: ask for another.".to_owned())
        }
        None => {
            mmds.counts.no_tokens.fetch_add(1, Relaxed);
            let [ours, _] = TOKEN_HEADERS;
            Some(format!(
                "A session token is needed: ask for one by PUT {TOKEN_PATH}, and send it as `{ours}`."
            ))
        }
    };
    if let (Some(words), MmdsVersion::V2) = (refused, mmds.version()) {
        return Response::plain("401 Unauthorized", words);
    }
    let format = mmds.format(head.accepted());
    match mmds.find(head.path(), format) {
        Found::Text(body) => Response {
            format,
            ..Response::plain("200 OK", body)
        },
        Found::Nothing => not_found(head),
        Found::Unsupported => Response::plain(
            "501 Not Implemented",
            "Only strings and objects can be had as text: ask for it as application/json.",
        ),
    }
}

fn put(mmds: &Mmds, head: &Head<'_, '_>) -> Response {
    // Somebody else has asked, by a proxy that can be had to send what it is told.
    if head.has("X-Forwarded-For") {
        return Response::plain(
            "400 Bad Request",
            "A token is given to whoever asks for itself only: X-Forwarded-For is refused.",
        );
    }
    let parts = head.path().split('/').filter(|part| !part.is_empty());
    if !parts.eq(TOKEN_PATH.split('/').filter(|part| !part.is_empty())) {
        return not_found(head);
    }
    let [ours, _] = TTL_HEADERS;
    let Some(ttl) = head.header(&TTL_HEADERS) else {
        let words =
            format!("Say how many seconds the token is to be good for, as `{ours}`: 1 to {TTL_S_MAX}.");
        return Response::plain("400 Bad Request", words);
    };
    let made = ttl.trim().parse().ok().and_then(|ttl_s| {
        let token = mmds.make_token(ttl_s)?;
        Some((ttl_s, token))
    });
    match made {
        Some((ttl_s, token)) => Response {
            extra: format!("{ours}: {ttl_s}\r\n"),
            ..Response::plain("200 OK", token)
        },
        None => Response::plain(
            "400 Bad Request",
            format!("A token is good for 1 to {TTL_S_MAX} seconds."),
        ),
    }
}

fn not_found(head: &Head<'_, '_>) -> Response {
    Response::plain("404 Not Found", format!("Resource not found: {}.", head.path()))
}
