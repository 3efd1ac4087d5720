//! The client against servers that answer well, badly, slowly or never.

#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::JoinHandle;

use super::*;

/// The limit of a request that is meant to run into it.
const SHORT_WAIT: Duration = Duration::from_millis(200);
/// The limit of a request that is not.
const AMPLE_WAIT: Duration = Duration::from_secs(20);

/// A server that gives one connection to `serve`.
struct Server {
    _place: tempfile::TempDir,
    socket: PathBuf,
    thread: JoinHandle<()>,
}

impl Server {
    fn new(serve: impl FnOnce(UnixStream) + Send + 'static) -> Self {
        let place = tempfile::tempdir().unwrap();
        let socket = place.path().join("api.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let thread = std::thread::spawn(move || serve(listener.accept().unwrap().0));
        Self {
            _place: place,
            socket,
            thread,
        }
    }

    fn answering(answer: &'static [u8]) -> Self {
        Self::new(move |mut stream| {
            read_request(&mut stream);
            // A client that refuses the answer has closed the connection.
            let _ = stream.write_all(answer);
        })
    }

    fn asked(self, request: Request<'_>) -> Result<Response, ClientError> {
        let answer = Client::new(&self.socket).ask(request);
        self.thread.join().unwrap();
        answer
    }
}

fn read_request(stream: &mut UnixStream) -> String {
    let mut request = Vec::new();
    let mut chunk = [0; 1024];
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        let count = stream.read(&mut chunk).unwrap();
        assert!(count > 0, "the client closed in the middle of its request");
        request.extend(chunk.iter().take(count));
    }
    String::from_utf8(request).unwrap()
}

fn get(wait: Duration) -> Request<'static> {
    Request::get("/").within(wait)
}

#[test]
fn a_request_says_what_it_sends_and_an_answer_is_read_whole() {
    let (sent, received) = std::sync::mpsc::channel();
    let server = Server::new(move |mut stream| {
        sent.send(read_request(&mut stream)).unwrap();
        for part in ["HTTP/1.1 200 OK\r\nContent-", "Length: 7\r\n\r\n{\"a\"", ":1}"] {
            stream.write_all(part.as_bytes()).unwrap();
            std::thread::sleep(Duration::from_millis(5));
        }
    });
    let request = Request {
        method: "PUT",
        path: "/x",
        body: Some("{}"),
        wait: AMPLE_WAIT,
    };
    let answer = server.asked(request).unwrap();
    assert_eq!(
        answer,
        Response {
            status: 200,
            body: b"{\"a\":1}".to_vec()
        }
    );
    let request = received.recv().unwrap();
    assert!(request.starts_with("PUT /x HTTP/1.1\r\n"), "{request}");
    assert!(
        request.contains("\r\nContent-Length: 2\r\n") && request.ends_with("\r\n\r\n{}"),
        "{request}"
    );
}

#[test]
fn an_answer_without_length_is_read_to_its_end() {
    let server = Server::answering(b"HTTP/1.1 200 OK\r\n\r\nall of it");
    assert_eq!(server.asked(get(AMPLE_WAIT)).unwrap().body, b"all of it");
}

#[test]
fn a_refusal_names_the_request_and_the_fault() {
    let server =
        Server::answering(b"HTTP/1.1 400 No\r\nContent-Length: 27\r\n\r\n{\"fault_message\":\"no disk\"}");
    let error = Client::new(&server.socket).call(get(AMPLE_WAIT)).unwrap_err();
    server.thread.join().unwrap();
    assert_eq!(error.to_string(), "GET / was refused with status 400: no disk");
}

#[test]
fn a_silent_server_is_left_in_time() {
    let server = Server::new(|mut stream| {
        // Until the client hangs up.
        let _ = stream.read_to_end(&mut Vec::new());
    });
    let error = server.asked(get(SHORT_WAIT)).unwrap_err();
    assert!(matches!(error, ClientError::TimedOut { .. }), "{error}");
    assert!(error.to_string().contains("within 0.2 s: try again"), "{error}");
}

#[test]
fn a_server_that_sends_a_byte_at_a_time_is_left_in_time() {
    let server = Server::new(|mut stream| {
        for byte in b"HTTP/1.1 200 OK\r\nX: ".iter().chain(std::iter::repeat(&b'y')) {
            if stream.write_all(&[*byte]).is_err() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    let error = server.asked(get(SHORT_WAIT)).unwrap_err();
    assert!(matches!(error, ClientError::TimedOut { .. }), "{error}");
}

#[test]
fn a_server_that_reads_nothing_is_left_in_time() {
    let (done, wait) = std::sync::mpsc::channel::<()>();
    let server = Server::new(move |_stream| {
        // Holds the connection open until the client has given up.
        let _ = wait.recv();
    });
    let body = "x".repeat(8 * 1024 * 1024);
    let request = Request {
        method: "PUT",
        path: "/",
        body: Some(&body),
        wait: SHORT_WAIT,
    };
    let error = Client::new(&server.socket).ask(request).unwrap_err();
    drop(done);
    server.thread.join().unwrap();
    assert!(matches!(error, ClientError::TimedOut { .. }), "{error}");
}

#[test]
fn a_server_whose_backlog_is_full_is_left_in_time() {
    let place = tempfile::tempdir().unwrap();
    let socket = place.path().join("api.sock");
    let listener = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    rustix::net::bind(&listener, &SocketAddrUnix::new(&socket).unwrap()).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let _first = UnixStream::connect(&socket).unwrap();
    let error = Client::new(&socket).ask(get(SHORT_WAIT)).unwrap_err();
    assert!(matches!(error, ClientError::TimedOut { .. }), "{error}");
}

#[test]
fn an_answer_that_is_cut_is_no_answer() {
    for answer in [
        &b""[..],
        b"HTTP/1.1 200",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort",
    ] {
        let error = Server::answering(answer).asked(get(AMPLE_WAIT)).unwrap_err();
        assert!(matches!(error, ClientError::Closed { .. }), "{error}");
    }
}

#[test]
fn what_is_not_http_is_said_to_be_no_api() {
    for answer in [&b"SSH-2.0-x\r\n"[..], &[0xff; 4096], &[b'\n'; 32 * 1024]] {
        let error = Server::answering(answer).asked(get(AMPLE_WAIT)).unwrap_err();
        assert!(matches!(error, ClientError::NotAnApi { .. }), "{error}");
    }
}

#[test]
fn an_endless_body_is_cut_off() {
    let server = Server::new(|mut stream| {
        read_request(&mut stream);
        stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").unwrap();
        while stream.write_all(&[b'x'; 64 * 1024]).is_ok() {}
    });
    let error = server.asked(get(AMPLE_WAIT)).unwrap_err();
    assert!(matches!(error, ClientError::BodyTooLong { .. }), "{error}");
}

#[test]
fn a_server_that_refuses_before_it_has_read_the_body_is_heard() {
    let server = Server::new(|mut stream| {
        stream
            .write_all(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
            .unwrap();
        stream.shutdown(std::net::Shutdown::Read).unwrap();
        // Closed by the client once it has read the answer.
        std::thread::sleep(SHORT_WAIT);
    });
    let body = "x".repeat(8 * 1024 * 1024);
    let request = Request {
        method: "PUT",
        path: "/",
        body: Some(&body),
        wait: AMPLE_WAIT,
    };
    assert_eq!(server.asked(request).unwrap().status, 413);
}

#[test]
fn a_ringing_bell_ends_the_wait() {
    let bell = rustix::event::eventfd(1, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    let server = Server::new(|mut stream| {
        let _ = stream.read_to_end(&mut Vec::new());
    });
    let client = Client::new(&server.socket).interrupted_by(bell.as_fd());
    let error = client.ask(get(AMPLE_WAIT)).unwrap_err();
    assert!(matches!(error, ClientError::Interrupted { .. }), "{error}");
    drop(client);
    server.thread.join().unwrap();
}

#[test]
fn a_socket_without_a_monitor_is_told_from_none() {
    let place = tempfile::tempdir().unwrap();
    let socket = place.path().join("api.sock");
    let missing = Client::new(&socket).ask(get(AMPLE_WAIT)).unwrap_err();
    assert!(matches!(missing, ClientError::NoSocket { .. }), "{missing}");
    drop(UnixListener::bind(&socket).unwrap());
    let dead = Client::new(&socket).ask(get(AMPLE_WAIT)).unwrap_err();
    assert!(matches!(dead, ClientError::NobodyListens { .. }), "{dead}");
    let long = Client::new(Path::new(&"/x".repeat(100)))
        .ask(get(AMPLE_WAIT))
        .unwrap_err();
    assert!(matches!(long, ClientError::Connect { .. }), "{long}");
}

#[test]
fn the_peer_is_the_process_that_listens() {
    let server = Server::new(drop);
    assert_eq!(
        Client::new(&server.socket).peer(AMPLE_WAIT).unwrap(),
        rustix::process::getpid()
    );
    server.thread.join().unwrap();
}
