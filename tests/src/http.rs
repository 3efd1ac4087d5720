//! A plain HTTP/1.1 client on a Unix socket: one connection, one request after the other.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use crate::Outcome;

/// No answer of a monitor takes longer.
pub const ANSWER_SECONDS_MAX: u64 = 20;
const ANSWER_BYTES_MAX: usize = 4 << 20;

/// A connection to an API socket.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    unread: Vec<u8>,
}

/// An answer: its status, its headers in lower case, its body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// Names in lower case, and values.
    pub headers: Vec<(String, String)>,
    /// The body, as text.
    pub body: String,
}

impl Connection {
    /// Connects to the socket.
    ///
    /// # Errors
    ///
    /// When nobody listens there.
    pub fn open(socket: &Path) -> Outcome<Self> {
        let stream = UnixStream::connect(socket)
            .map_err(|e| format!("cannot connect to {}: {e}", socket.display()))?;
        stream.set_read_timeout(Some(Duration::from_secs(ANSWER_SECONDS_MAX)))?;
        stream.set_write_timeout(Some(Duration::from_secs(ANSWER_SECONDS_MAX)))?;
        Ok(Self {
            stream,
            unread: Vec::new(),
        })
    }

    /// Sends a request with a JSON body, or with none, and waits for the answer.
    ///
    /// # Errors
    ///
    /// When the connection breaks, or what comes back is no HTTP.
    pub fn request(&mut self, method: &str, path: &str, body: Option<&str>) -> Outcome<Answer> {
        let mut head = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n");
        if let Some(body) = body {
            head.push_str("Content-Type: application/json\r\n");
            head.push_str(&format!("Content-Length: {}\r\n", body.len()));
        }
        head.push_str("\r\n");
        head.push_str(body.unwrap_or_default());
        // A server may answer and close before it has read all of a request that it refuses.
        let sent = self.send(head.as_bytes());
        let answer = self.answer();
        if answer.is_err() {
            sent?;
        }
        answer.map_err(|e| format!("{method} {path}: {}", e.message().unwrap_or_default()).into())
    }

    /// Sends bytes as they are.
    ///
    /// # Errors
    ///
    /// When the other side has closed the connection.
    pub fn send(&mut self, bytes: &[u8]) -> Outcome {
        Ok(self.stream.write_all(bytes)?)
    }

    /// Sends as much of the bytes as the other side takes in a moment.
    ///
    /// # Errors
    ///
    /// When the other side has closed the connection.
    pub fn send_some(&mut self, bytes: &[u8]) -> Outcome {
        self.stream.set_write_timeout(Some(Duration::from_millis(50)))?;
        match self.stream.write_all(bytes) {
            Err(e) if e.kind() != std::io::ErrorKind::WouldBlock => Err(e.into()),
            _ => Ok(()),
        }
    }

    /// Reads one answer.
    ///
    /// # Errors
    ///
    /// When the connection ends first, or what comes is no HTTP.
    pub fn answer(&mut self) -> Outcome<Answer> {
        loop {
            if let Some((answer, used)) = parse(&self.unread)? {
                self.unread.drain(..used);
                return Ok(answer);
            }
            if self.unread.len() > ANSWER_BYTES_MAX {
                return Err("the answer has no end".into());
            }
            let mut chunk = [0; 16384];
            match self.stream.read(&mut chunk) {
                Ok(0) => {
                    return Err(format!("closed after {:?}", String::from_utf8_lossy(&self.unread)).into());
                }
                Ok(count) => self.unread.extend(chunk.iter().take(count)),
                Err(e) => return Err(format!("no answer: {e}").into()),
            }
        }
    }

    /// Whether the other side has closed the connection, which is waited for.
    pub fn is_closed_within(&mut self, limit: Duration) -> bool {
        let mut byte = [0];
        self.stream.set_read_timeout(Some(limit)).is_ok()
            && match self.stream.read(&mut byte) {
                Ok(count) => count == 0,
                Err(e) => e.kind() == std::io::ErrorKind::ConnectionReset,
            }
    }
}

impl Answer {
    /// The value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(n, _)| n == name)
            .map(|(_, value)| value.as_str())
    }

    /// The body as JSON; `Null` when there is none.
    ///
    /// # Errors
    ///
    /// When it is no JSON.
    pub fn json(&self) -> Outcome<Value> {
        if self.body.is_empty() {
            return Ok(Value::Null);
        }
        Ok(serde_json::from_str(&self.body).map_err(|e| format!("{e} in {}", self.body))?)
    }

    /// The text of `fault_message`, or nothing.
    pub fn fault(&self) -> String {
        let fault = self
            .json()
            .ok()
            .and_then(|body| Some(body.get("fault_message")?.as_str()?.to_owned()));
        fault.unwrap_or_default()
    }
}

/// An answer at the start of the bytes and its length, or nothing while it is incomplete.
fn parse(bytes: &[u8]) -> Outcome<Option<(Answer, usize)>> {
    let mut headers = [httparse::EMPTY_HEADER; 32];
    let mut response = httparse::Response::new(&mut headers);
    let httparse::Status::Complete(head) = response.parse(bytes)? else {
        return Ok(None);
    };
    let headers: Vec<(String, String)> = response
        .headers
        .iter()
        .map(|h| {
            (
                h.name.to_ascii_lowercase(),
                String::from_utf8_lossy(h.value).trim().to_owned(),
            )
        })
        .collect();
    let length = headers
        .iter()
        .find(|(name, _)| name == "content-length")
        .map(|(_, value)| value.parse::<usize>());
    let length = length.transpose()?.unwrap_or(0);
    let Some(body) = bytes.get(head..head.saturating_add(length)) else {
        return Ok(None);
    };
    let status = response.code.unwrap_or_default();
    let body = String::from_utf8_lossy(body).into_owned();
    Ok(Some((
        Answer {
            status,
            headers,
            body,
        },
        head + length,
    )))
}
