//! The server from its clients' side, over real sockets: prompt, slow, silent and too many.

#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

use std::io::Read as _;
use std::os::fd::AsFd as _;

use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use super::*;
use crate::api::inbox::{Calls, mailbox};
use crate::api::verbs::Verb;

/// A server, the end that its calls come out of, and the directory of its socket.
struct Fixture {
    calls: Calls,
    path: PathBuf,
    server: Server,
    _directory: tempfile::TempDir,
}

fn serve(limits: Limits) -> Fixture {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("api.sock");
    let (inbox, calls) = mailbox().unwrap();
    let server = Server::start(Socket::bind(&path).unwrap(), limits, inbox).unwrap();
    Fixture {
        calls,
        path,
        server,
        _directory: directory,
    }
}

/// No test waits longer than this for something that must happen.
const PATIENCE: Duration = Duration::from_secs(20);

impl Fixture {
    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    fn client(&self, request: &str) -> UnixStream {
        let mut stream = self.connect();
        stream.write_all(request.as_bytes()).unwrap();
        stream
    }

    fn call(&mut self) -> Call {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(call) = self.calls.take() {
                return call;
            }
            assert!(Instant::now() < deadline, "no call came");
            let mut poll = [rustix::event::PollFd::from_borrowed_fd(
                self.calls.as_fd(),
                rustix::event::PollFlags::IN,
            )];
            rustix::event::poll(
                &mut poll,
                Some(&Timespec {
                    tv_sec: 1,
                    tv_nsec: 0,
                }),
            )
            .unwrap();
        }
    }
}

/// Reads one response: status line, headers and body as text.
fn read_response(stream: &mut UnixStream) -> String {
    let mut text = Vec::new();
    let mut byte = [0];
    while !text.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte).unwrap();
        text.push(byte[0]);
    }
    let head = String::from_utf8(text).unwrap();
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("Content-Length: "));
    let mut body = vec![0; length.map_or(0, |length| length.parse().unwrap())];
    stream.read_exact(&mut body).unwrap();
    head + &String::from_utf8(body).unwrap()
}

const GET_VERSION: &str = "GET /version HTTP/1.1\r\n\r\n";

#[test]
fn a_verb_is_answered_by_whoever_takes_it() {
    let mut fixture = serve(Limits::default());
    let mut client = fixture.client(GET_VERSION);
    let call = fixture.call();
    assert_eq!(call.verb, Verb::GetVersion);
    call.reply.send(Ok(Data::json(&1)));
    let response = read_response(&mut client);
    assert!(response.starts_with("HTTP/1.1 200 "), "{response}");
    assert!(
        response.ends_with("\r\nContent-Type: application/json\r\nContent-Length: 1\r\n\r\n1"),
        "{response}"
    );
}

#[test]
fn requests_in_one_piece_are_answered_one_after_the_other() {
    let mut fixture = serve(Limits::default());
    let mut client = fixture.client(&format!("{GET_VERSION}GET /nope HTTP/1.1\r\n\r\n{GET_VERSION}"));
    let first = fixture.call();
    assert!(
        fixture.calls.take().is_none(),
        "the next request waits for the answer to this one"
    );
    first.reply.send(Ok(Data::json(&1)));
    fixture.call().reply.send(Ok(Data::Empty));
    assert!(read_response(&mut client).starts_with("HTTP/1.1 200 "));
    assert!(read_response(&mut client).starts_with("HTTP/1.1 400 "));
    assert!(read_response(&mut client).starts_with("HTTP/1.1 204 "));
}

#[test]
fn a_client_that_waits_before_its_body_is_told_to_go_on() {
    let mut fixture = serve(Limits::default());
    let mut client =
        fixture.client("PUT /entropy HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n");
    assert!(read_response(&mut client).starts_with("HTTP/1.1 100 "));
    client.write_all(b"{}").unwrap();
    fixture.call().reply.send(Ok(Data::Empty));
    assert!(read_response(&mut client).starts_with("HTTP/1.1 204 "));
}

#[test]
fn silent_and_slow_clients_delay_nobody() {
    let mut fixture = serve(Limits {
        request_ms_max: 60_000,
        ..Limits::default()
    });
    let _silent = fixture.connect();
    let _slow = fixture.client("PUT /entropy HTTP/1.1\r\nContent-Le");
    let _unanswered = fixture.client(GET_VERSION);
    let unanswered = fixture.call();
    let mut client = fixture.client(GET_VERSION);
    fixture.call().reply.send(Ok(Data::Empty));
    assert!(read_response(&mut client).starts_with("HTTP/1.1 204 "));
    unanswered.reply.send(Ok(Data::Empty));
}

#[test]
fn a_client_that_does_not_take_its_answer_delays_nobody_and_is_dropped() {
    let mut fixture = serve(Limits {
        request_ms_max: 200,
        ..Limits::default()
    });
    let big = Data::Body(crate::api::http::Content::Json, "x".repeat(8 << 20));
    let mut deaf = fixture.client(GET_VERSION);
    fixture.call().reply.send(Ok(big));
    let mut client = fixture.client(GET_VERSION);
    fixture.call().reply.send(Ok(Data::Empty));
    assert!(read_response(&mut client).starts_with("HTTP/1.1 204 "));
    std::thread::sleep(Duration::from_millis(400));
    let mut taken = Vec::new();
    let length = deaf.read_to_end(&mut taken).map_or(0, |length| length);
    assert!(length < 8 << 20, "the connection was cut");
}

#[test]
fn a_request_that_is_not_complete_in_time_is_refused() {
    let fixture = serve(Limits {
        request_ms_max: 50,
        ..Limits::default()
    });
    let mut client = fixture.client("PUT /entropy HTTP/1.1\r\nContent-Length: 2\r\n\r\n{");
    let response = read_response(&mut client);
    assert!(
        response.starts_with("HTTP/1.1 400 ") && response.contains("not complete after 50 ms"),
        "{response}"
    );
    assert!(response.contains("Connection: close"), "{response}");
    assert_eq!(client.read(&mut [0]).unwrap(), 0, "the connection is closed");
}

#[test]
fn a_body_that_is_too_large_is_refused_even_while_it_is_sent() {
    let fixture = serve(Limits {
        body_bytes_max: 1000,
        ..Limits::default()
    });
    let mut client = fixture.client("PUT /entropy HTTP/1.1\r\nContent-Length: 300000\r\n\r\n");
    let mut sender = client.try_clone().unwrap();
    let sending = std::thread::spawn(move || sender.write_all(&vec![b'x'; 300_000]));
    let response = read_response(&mut client);
    assert!(response.starts_with("HTTP/1.1 400 "), "{response}");
    assert!(
        response.contains("size 300000 is larger than the limit of 1000 allowed by server"),
        "{response}"
    );
    sending.join().unwrap().unwrap();
}

#[test]
fn a_client_that_leaves_before_its_answer_is_no_harm() {
    let mut fixture = serve(Limits::default());
    drop(fixture.client(GET_VERSION));
    fixture.call().reply.send(Ok(Data::Empty));
    let mut client = fixture.client(GET_VERSION);
    fixture.call().reply.send(Ok(Data::Empty));
    assert!(read_response(&mut client).starts_with("HTTP/1.1 204 "));
}

#[test]
fn a_verb_that_nobody_answers_is_refused_when_it_is_dropped() {
    let mut fixture = serve(Limits::default());
    let mut client = fixture.client(GET_VERSION);
    drop(fixture.call());
    let response = read_response(&mut client);
    assert!(
        response.contains("The microVM ended before it could answer."),
        "{response}"
    );
}

#[test]
fn a_deprecated_field_is_marked_in_the_answer() {
    let mut fixture = serve(Limits::default());
    let body = r#"{"cpu_template":"None"}"#;
    let head = format!(
        "PATCH /machine-config HTTP/1.1\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    let mut client = fixture.client(&(head + body));
    fixture.call().reply.send(Ok(Data::Empty));
    assert!(read_response(&mut client).contains("\r\nDeprecation: true\r\n"));
}

#[test]
fn one_client_too_many_takes_the_place_of_an_idle_one_or_is_refused() {
    let mut fixture = serve(Limits {
        connections_max: 2,
        ..Limits::default()
    });
    let mut idle = fixture.connect();
    let mut busy = fixture.client(GET_VERSION);
    let busy_call = fixture.call();
    let mut newcomer = fixture.client(GET_VERSION);
    let newcomer_call = fixture.call();
    assert_eq!(idle.read(&mut [0]).unwrap(), 0, "the idle client made room");

    let response = read_response(&mut fixture.connect());
    assert!(
        response.starts_with("HTTP/1.1 503 ") && response.contains("Too many open connections"),
        "{response}"
    );

    busy_call.reply.send(Ok(Data::Empty));
    newcomer_call.reply.send(Ok(Data::Empty));
    assert!(read_response(&mut busy).starts_with("HTTP/1.1 204 "));
    assert!(read_response(&mut newcomer).starts_with("HTTP/1.1 204 "));
}

#[test]
fn a_socket_that_cannot_be_had_says_what_to_do() {
    let fixture = serve(Limits::default());
    let error = Socket::bind(&fixture.path).unwrap_err();
    assert!(matches!(error, BindError::Served { .. }), "{error}");

    let directory = tempfile::tempdir().unwrap();
    let stale = directory.path().join("stale");
    drop(UnixListener::bind(&stale).unwrap());
    assert!(matches!(Socket::bind(&stale), Err(BindError::Exists { .. })));
    assert!(stale.exists(), "what is there is not ours to remove");

    let nowhere = directory.path().join("no/such/directory");
    assert!(matches!(Socket::bind(&nowhere), Err(BindError::Create { .. })));
}

#[test]
fn answers_that_are_there_reach_their_clients_at_the_end_and_nothing_is_left() {
    let mut fixture = serve(Limits::default());
    let mut client = fixture.client(GET_VERSION);
    fixture.call().reply.send(Ok(Data::Empty));
    let Fixture { server, path, .. } = fixture;
    drop(server);
    assert!(read_response(&mut client).starts_with("HTTP/1.1 204 "));
    assert!(!path.exists());
}

#[test]
fn whoever_watches_is_told_each_change_once_and_when_it_has_ended() {
    let mut fixture = serve(Limits::default());
    let mut watcher = fixture.client("GET /migration/events HTTP/1.1\r\n\r\n");
    for (line, is_last) in [(1, false), (1, false), (2, false), (2, true)] {
        let call = fixture.call();
        assert_eq!(call.verb, Verb::WatchMigration);
        call.reply.send(Ok(Data::line(&line, is_last)));
    }
    let mut said = String::new();
    watcher.read_to_string(&mut said).unwrap();
    let (head, body) = said.split_once("\r\n\r\n").unwrap();
    assert!(head.contains("Content-Type: application/x-ndjson"), "{head}");
    assert!(!head.contains("Content-Length"), "{head}");
    assert_eq!(body, "1\n2\n");
}

#[test]
fn a_watcher_that_reads_nothing_is_asked_for_nothing_and_is_gone_in_time() {
    let limits = Limits {
        request_ms_max: 200,
        ..Limits::default()
    };
    let mut fixture = serve(limits);
    let mut watcher = fixture.client("GET /migration/events HTTP/1.1\r\n\r\n");
    let more = "x".repeat(8 << 20);
    fixture.call().reply.send(Ok(Data::line(&more, false)));
    std::thread::sleep(Duration::from_millis(600));
    assert!(fixture.calls.take().is_none());
    let mut said = Vec::new();
    // It is cut off in the middle of the line.
    let _ = watcher.read_to_end(&mut said);
    assert!(said.len() < more.len());
}

#[test]
fn a_watcher_of_a_machine_that_ends_is_told_no_more() {
    let mut fixture = serve(Limits::default());
    let mut watcher = fixture.client("GET /migration/events HTTP/1.1\r\n\r\n");
    fixture.call().reply.send(Ok(Data::line(&1, false)));
    drop(fixture.call());
    let mut said = String::new();
    watcher.read_to_string(&mut said).unwrap();
    assert!(said.ends_with("\r\n\r\n1\n"), "{said}");
}
