//! A monitor without a machine: it answers the API and then behaves as its id says.
//!
//! | id | behaviour |
//! |---|---|
//! | `exits-N` | answers `InstanceStart`, says that its guest exited and ends with status N |
//! | `vanishes-N` | ends with status N instead of answering `InstanceStart` |
//! | `dies` | writes to its log and ends with status 152, before it has an API |
//! | `refuses` | refuses its kernel, and says the same to its log |
//! | `refuses-to-start` | refuses to start |
//! | `echoes` | once started, copies its input to its output and ends with status 0 |
//! | `deaf` | runs; never shuts down when it is asked to |
//! | anything else | runs until it is asked to shut down, then ends with status 0 |

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;

use serde_json::{Value, json};

/// Where the requests are written, beside the socket.
pub(crate) const REQUESTS_NAME: &str = "requests";

/// Serves the API that `arguments` name until the machine ends.
pub(crate) fn behave(arguments: &[String]) -> ExitCode {
    let value = |flag| {
        let at = arguments
            .iter()
            .position(|argument| argument == flag)
            .expect("coraclectl passes the flag");
        arguments.get(at + 1).expect("the flag has a value").clone()
    };
    let (id, socket) = (value("--id"), PathBuf::from(value("--api-sock")));
    if id == "dies" {
        fs::write(value("--log-path"), "first line\nthe last words\n").expect("the log's directory is there");
        return ExitCode::from(152);
    }
    let listener = UnixListener::bind(&socket).expect("the socket's directory is there and empty");
    let requests = OpenOptions::new()
        .create(true)
        .append(true)
        .open(socket.with_file_name(REQUESTS_NAME));
    if id == "refuses" {
        fs::write(value("--log-path"), "no such kernel\n").expect("the log's directory is there");
    }
    let mut machine = Machine {
        id,
        state: "Not started",
        requests: requests.expect("as for the socket"),
    };
    loop {
        let (stream, _) = listener.accept().expect("the listener stays");
        if let Some(status) = machine.serve(&stream) {
            if machine.id.starts_with("exits-") {
                // A `run` that was killed does not read it.
                let _ = writeln!(io::stderr(), "coracle: the guest exited with status {status}");
            }
            return end(&socket, status);
        }
    }
}

fn end(socket: &Path, status: u8) -> ExitCode {
    fs::remove_file(socket).expect("the socket is ours");
    ExitCode::from(status)
}

struct Machine {
    id: String,
    state: &'static str,
    requests: File,
}

impl Machine {
    /// Answers the request on `stream`, if there is one; the status if it has ended the machine.
    fn serve(&mut self, stream: &UnixStream) -> Option<u8> {
        let (line, body) = request(stream)?;
        writeln!(self.requests, "{line} {body}").expect("the directory is there while the monitor runs");
        let number = |prefix| {
            self.id
                .strip_prefix(prefix)
                .and_then(|number| number.parse::<u8>().ok())
        };
        let (status, answer, end) = match (line.as_str(), body.as_str()) {
            ("PUT /boot-source", _) if self.id == "refuses" => {
                (400, json!({ "fault_message": "no such\u{1b} kernel" }), None)
            }
            ("PUT /actions", action) if self.id == "refuses-to-start" && action.contains("InstanceStart") => {
                (400, json!({ "fault_message": "no memory" }), None)
            }
            ("PUT /actions", action) if action.contains("InstanceStart") => {
                if let Some(status) = number("vanishes-") {
                    return Some(status);
                }
                self.state = "Running";
                if self.id == "echoes" {
                    thread::spawn(echo);
                }
                (204, Value::Null, number("exits-"))
            }
            ("PUT /actions", _) => (204, Value::Null, (self.id != "deaf").then_some(0)),
            ("PATCH /vm", wanted) => {
                self.state = if wanted.contains("Paused") {
                    "Paused"
                } else {
                    "Running"
                };
                (204, Value::Null, None)
            }
            ("GET /", _) => (
                200,
                json!({ "id": self.id, "state": self.state, "app_name": "Test" }),
                None,
            ),
            ("GET /machine-config", _) => (200, json!({ "vcpu_count": 2, "mem_size_mib": 256 }), None),
            ("GET /vm/config", _) => (200, json!({ "drives": [] }), None),
            (known, _) if known.starts_with("PUT /") && known != "PUT /nothing" => (204, Value::Null, None),
            _ => (400, json!({ "fault_message": "Invalid request" }), None),
        };
        respond(stream, status, &answer);
        end
    }
}

/// Copies every byte as it comes: Rust's own standard output would wait for the end of a line.
fn echo() {
    let output = io::stdout()
        .as_fd()
        .try_clone_to_owned()
        .expect("a descriptor is left");
    io::copy(&mut io::stdin(), &mut File::from(output)).expect("both are open");
    std::process::exit(0);
}

/// The request line without its version, and the body; `None` when the client only connects.
fn request(stream: &UnixStream) -> Option<(String, String)> {
    let mut reader = BufReader::new(stream);
    let (mut first, mut length) = (None, 0);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        let line = line.trim_end();
        if line.is_empty() {
            break;
        }
        if let Some(bytes) = line.strip_prefix("Content-Length: ") {
            length = bytes.parse().expect("coraclectl sends a number");
        }
        first.get_or_insert_with(|| line.trim_end_matches(" HTTP/1.1").to_owned());
    }
    let mut body = String::new();
    reader.take(length).read_to_string(&mut body).ok()?;
    Some((first?, body))
}

fn respond(mut stream: &UnixStream, status: u16, answer: &Value) {
    let body = if answer.is_null() {
        String::new()
    } else {
        answer.to_string()
    };
    let length = if body.is_empty() {
        String::new()
    } else {
        format!("Content-Length: {}\r\n", body.len())
    };
    // A client that was killed does not read its answer.
    let _ = write!(stream, "HTTP/1.1 {status} Status\r\n{length}\r\n{body}");
}
