//! HTTP/1.1 as bytes: requests out of what a client sent, and responses as what it will get. No I/O.
//!
//! ```text
//! head ──complete──► body ──complete──► Request, then head again
//!   └── malformed, too long, refused framing ──► HttpError, and nothing more from this client
//! ```

use std::fmt::Write as _;

/// Longest request line and headers together, in bytes.
pub const HEAD_BYTES_MAX: usize = 8 * 1024;

/// Longest body of a request unless the command line says otherwise, in bytes.
pub const BODY_BYTES_MAX_DEFAULT: usize = 51_200;

/// Most headers of a request.
const HEADERS_MAX: usize = 64;

/// End of a head.
const HEAD_END: &[u8] = b"\r\n\r\n";

/// The methods that the API knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Ask.
    Get,
    /// Set.
    Put,
    /// Change.
    Patch,
    /// Remove.
    Delete,
}

impl Method {
    /// The method as it is written in a request.
    pub fn name(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Put => "PUT",
            Self::Patch => "PATCH",
            Self::Delete => "DELETE",
        }
    }

    fn parse(name: &str) -> Option<Self> {
        [Self::Get, Self::Put, Self::Patch, Self::Delete]
            .into_iter()
            .find(|method| method.name() == name)
    }
}

/// One complete request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// What to do.
    pub method: Method,
    /// To what: an absolute path, with whatever the client appended to it.
    pub path: String,
    /// With what; may be empty.
    pub body: Vec<u8>,
    /// Whether the client wants the connection to stay open.
    pub keep_alive: bool,
}

/// What comes out of a [`Decoder`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The client waits for [`CONTINUE`] before it sends the body.
    Continue,
    /// A request is complete.
    Request(Request),
}

/// What a client gets on [`Event::Continue`].
pub const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// Makes requests of bytes, however those are cut into pieces. After an error it is of no more use.
#[derive(Debug)]
pub struct Decoder {
    body_bytes_max: usize,
    buffer: Vec<u8>,
    /// Length of the beginning of `buffer` in which no head ends.
    searched: usize,
    /// The request whose body is awaited, and the length of that body.
    pending: Option<(Request, usize)>,
}

impl Decoder {
    /// A decoder at the beginning of a connection, which refuses bodies longer than `body_bytes_max`.
    pub fn new(body_bytes_max: usize) -> Self {
        Self {
            body_bytes_max,
            buffer: Vec::new(),
            searched: 0,
            pending: None,
        }
    }

    /// Takes bytes in. Call [`Self::next_event`] until it gives none before the next bytes: the
    /// memory used is then bounded by one request and one piece.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// Whether a request has begun and is not complete.
    pub fn is_in_request(&self) -> bool {
        self.pending.is_some() || !self.buffer.is_empty()
    }

    /// The next event, if the bytes so far make one.
    ///
    /// # Errors
    ///
    /// The bytes are no request, or one that is refused; where the next one begins is not known.
    pub fn next_event(&mut self) -> Result<Option<Event>, HttpError> {
        if self.pending.is_none() {
            let Some(expects_continue) = self.take_head()? else {
                return Ok(None);
            };
            if expects_continue {
                return Ok(Some(Event::Continue));
            }
        }
        match self.pending.take() {
            Some((mut request, body_bytes)) if self.buffer.len() >= body_bytes => {
                request.body = self.buffer.drain(..body_bytes).collect();
                Ok(Some(Event::Request(request)))
            }
            pending => {
                self.pending = pending;
                Ok(None)
            }
        }
    }

    /// Moves a complete head from `buffer` to `pending`; gives whether the client waits to be told
    /// to go on, or `None` if the head is not complete.
    fn take_head(&mut self) -> Result<Option<bool>, HttpError> {
        // Empty lines before a request are to be ignored (RFC 9112, section 2.2).
        let empty = self
            .buffer
            .iter()
            .take_while(|byte| matches!(byte, b'\r' | b'\n'))
            .count();
        if self.searched == 0 {
            self.buffer.drain(..empty);
        }
        let from = self.searched.saturating_sub(HEAD_END.len() - 1);
        let unsearched = self.buffer.get(from..).unwrap_or_default();
        let Some(at) = unsearched
            .windows(HEAD_END.len())
            .position(|window| window == HEAD_END)
        else {
            self.searched = self.buffer.len();
            return if self.searched > HEAD_BYTES_MAX {
                Err(HttpError::HeadTooLong)
            } else {
                Ok(None)
            };
        };
        let head_bytes = from + at + HEAD_END.len();
        if head_bytes > HEAD_BYTES_MAX {
            return Err(HttpError::HeadTooLong);
        }
        let head: Vec<u8> = self.buffer.drain(..head_bytes).collect();
        self.searched = 0;
        let head = parse_head(&head)?;
        if head.body_bytes > self.body_bytes_max as u64 {
            return Err(HttpError::BodyTooLong {
                bytes: head.body_bytes,
                bytes_max: self.body_bytes_max,
            });
        }
        let body_bytes =
            usize::try_from(head.body_bytes).expect("the length is at most body_bytes_max, a usize");
        self.pending = Some((head.request, body_bytes));
        Ok(Some(head.expects_continue && body_bytes > 0))
    }
}

/// What a head says.
struct Head {
    request: Request,
    body_bytes: u64,
    expects_continue: bool,
}

fn parse_head(head: &[u8]) -> Result<Head, HttpError> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut parsed = httparse::Request::new(&mut headers);
    match parsed.parse(head) {
        Ok(httparse::Status::Complete(length)) if length == head.len() => {}
        Ok(_) => return Err(HttpError::Malformed),
        Err(httparse::Error::TooManyHeaders) => return Err(HttpError::TooManyHeaders),
        Err(_) => return Err(HttpError::Malformed),
    }
    let (Some(method), Some(target)) = (parsed.method, parsed.path) else {
        return Err(HttpError::Malformed);
    };
    let method = Method::parse(method).ok_or_else(|| HttpError::Method {
        name: method.to_owned(),
    })?;
    // Of HTTP/1.0, too: there are clients that speak it and keep their connection, since Firecracker does.
    let mut keep_alive = true;
    let mut expects_continue = false;
    let mut body_bytes = None;
    for header in parsed.headers.iter() {
        let value = header.value.trim_ascii();
        if header.name.eq_ignore_ascii_case("content-length") {
            let bytes = parse_length(value)?;
            if body_bytes.is_some_and(|other| other != bytes) {
                return Err(HttpError::Length);
            }
            body_bytes = Some(bytes);
        } else if header.name.eq_ignore_ascii_case("transfer-encoding") {
            return Err(HttpError::TransferEncoding);
        } else if header.name.eq_ignore_ascii_case("expect") {
            expects_continue = value.eq_ignore_ascii_case(b"100-continue");
        } else if header.name.eq_ignore_ascii_case("connection") {
            keep_alive &= !value.eq_ignore_ascii_case(b"close");
        }
    }
    Ok(Head {
        request: Request {
            method,
            path: absolute_path(target).to_owned(),
            body: Vec::new(),
            keep_alive,
        },
        body_bytes: body_bytes.unwrap_or(0),
        expects_continue,
    })
}

fn parse_length(value: &[u8]) -> Result<u64, HttpError> {
    let text = std::str::from_utf8(value).map_err(|_| HttpError::Length)?;
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(HttpError::Length);
    }
    text.parse().map_err(|_| HttpError::Length)
}

/// The path of a request's target, which a client of a proxy may have sent with scheme and host.
fn absolute_path(target: &str) -> &str {
    match target.strip_prefix("http://") {
        Some(rest) => rest.find('/').and_then(|at| rest.get(at..)).unwrap_or("/"),
        None => target,
    }
}

/// Why a client's bytes are no request that is served.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HttpError {
    /// Not HTTP/1.
    #[error("Invalid request: this is not HTTP/1.1.")]
    Malformed,
    /// Request line and headers too long.
    #[error("Invalid request: the request line and headers have more than {HEAD_BYTES_MAX} bytes.")]
    HeadTooLong,
    /// Too many headers.
    #[error("Invalid request: there are more than {HEADERS_MAX} headers.")]
    TooManyHeaders,
    /// A method that the API does not have.
    #[error("Invalid HTTP Method: `{name}`; use GET, PUT, PATCH or DELETE.")]
    Method {
        /// As sent.
        name: String,
    },
    /// No length, or two.
    #[error("Invalid request: Content-Length must be one decimal number.")]
    Length,
    /// A body without a length.
    #[error("Invalid request: Transfer-Encoding is not supported; send a Content-Length.")]
    TransferEncoding,
    /// Body too long.
    #[error(
        "Request payload with size {bytes} is larger than the limit of {bytes_max} allowed by server; \
         --http-api-max-payload-size raises it."
    )]
    BodyTooLong {
        /// As announced.
        bytes: u64,
        /// What is allowed.
        bytes_max: usize,
    },
    /// Request not complete in time.
    #[error("Invalid request: it was not complete after {ms_max} ms.")]
    TooSlow {
        /// What is allowed.
        ms_max: u64,
    },
}

/// The statuses that the API answers with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Here it is.
    Ok,
    /// Done.
    NoContent,
    /// Refused, and why.
    BadRequest,
    /// Too many clients at once.
    ServiceUnavailable,
}

impl Status {
    /// The number of the status.
    pub fn code(self) -> u16 {
        match self {
            Self::Ok => 200,
            Self::NoContent => 204,
            Self::BadRequest => 400,
            Self::ServiceUnavailable => 503,
        }
    }

    fn reason(self) -> &'static str {
        match self {
            Self::Ok => "OK",
            Self::NoContent => "No Content",
            Self::BadRequest => "Bad Request",
            Self::ServiceUnavailable => "Service Unavailable",
        }
    }
}

/// What a body is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// JSON.
    Json,
    /// A JSON value in each line.
    JsonLines,
    /// The Prometheus text exposition format.
    Prometheus,
}

impl Content {
    /// The media type.
    pub fn media_type(self) -> &'static str {
        match self {
            Self::Json => "application/json",
            Self::JsonLines => "application/x-ndjson",
            Self::Prometheus => "text/plain; version=0.0.4",
        }
    }
}

/// One response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// How it went.
    pub status: Status,
    /// What to say; absent with [`Status::NoContent`].
    pub body: Option<(Content, String)>,
    /// Whether the request used something that Firecracker has deprecated.
    pub deprecated: bool,
}

/// The head of a response whose body ends when the connection does (RFC 9112, section 6.3).
pub fn encode_open(content: Content) -> Vec<u8> {
    format!(
        "HTTP/1.1 200 OK\r\nServer: {SERVER}\r\nConnection: close\r\nContent-Type: {}\r\n\r\n",
        content.media_type()
    )
    .into_bytes()
}

/// Clients of Firecracker may look at the name.
const SERVER: &str = "Firecracker API";

impl Response {
    /// The response as bytes; `keep_alive` says whether the connection stays open.
    pub fn encode(&self, keep_alive: bool) -> Vec<u8> {
        let mut text = format!("HTTP/1.1 {} {}\r\n", self.status.code(), self.status.reason());
        let connection = if keep_alive { "keep-alive" } else { "close" };
        let mut put = |line: std::fmt::Arguments<'_>| {
            text.write_fmt(line).expect("writing to a String cannot fail");
        };
        put(format_args!("Server: {SERVER}\r\nConnection: {connection}\r\n"));
        if self.deprecated {
            put(format_args!("Deprecation: true\r\n"));
        }
        match &self.body {
            Some((content, body)) => put(format_args!(
                "Content-Type: {}\r\nContent-Length: {}\r\n\r\n{body}",
                content.media_type(),
                body.len()
            )),
            None => put(format_args!("\r\n")),
        }
        text.into_bytes()
    }
}

#[cfg(test)]
mod tests;
