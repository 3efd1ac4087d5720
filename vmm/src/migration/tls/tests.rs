#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

use std::io::{BufRead, Read, Write};
use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::thread;

use super::super::stream::Stream;
use super::testing::Authority;
use super::*;

/// What both sides come to.
fn greeted(
    server: &TlsFiles,
    client: &TlsFiles,
    called: &str,
    caller: Option<&str>,
) -> (Result<(), TlsError>, Result<(), TlsError>) {
    let (server, client) = (Identity::read(server).unwrap(), Identity::read(client).unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::scope(|scope| {
        let listening = scope.spawn(|| {
            let (socket, _) = listener.accept().unwrap();
            let mut stream = server.accept(socket, caller)?;
            let mut bytes = [0; 5];
            stream.read_exact(&mut bytes).map_err(TlsError::Refused)?;
            assert_eq!(bytes, *b"hello");
            stream.write_all(b"ready").map_err(TlsError::Refused)
        });
        let calling = || {
            let socket = TcpStream::connect(address).unwrap();
            let mut stream = client.call(socket, called)?;
            stream.write_all(b"hello").map_err(TlsError::Refused)?;
            let mut bytes = [0; 5];
            stream.read_exact(&mut bytes).map_err(TlsError::Refused)?;
            assert_eq!(bytes, *b"ready");
            Ok(())
        };
        let called = calling();
        (listening.join().unwrap(), called)
    })
}

#[test]
fn hosts_of_one_authority_talk_and_others_do_not() {
    let directory = tempfile::tempdir().unwrap();
    let (ours, theirs) = (Authority::new(), Authority::new());
    let a = ours.host("host-a.test", &ours, directory.path());
    let b = ours.host("127.0.0.1", &ours, directory.path());
    let (at_b, at_a) = greeted(&b, &a, "127.0.0.1", Some("host-a.test"));
    at_b.unwrap();
    at_a.unwrap();
    let (at_b, at_a) = greeted(&b, &a, "127.0.0.2", None);
    assert!(at_b.is_err() && at_a.is_err(), "the target has another name");
    let (at_b, _) = greeted(&b, &a, "127.0.0.1", Some("host-c.test"));
    assert!(matches!(at_b, Err(TlsError::OtherName { .. })), "{at_b:?}");
    let strange = theirs.host("host-s.test", &ours, directory.path());
    let (at_b, at_s) = greeted(&b, &strange, "127.0.0.1", None);
    assert!(
        at_b.is_err() && at_s.is_err(),
        "the source is of another authority"
    );
    let strange = theirs.host("127.0.0.1", &ours, directory.path());
    let (at_s, at_a) = greeted(&strange, &a, "127.0.0.1", None);
    assert!(
        at_s.is_err() && at_a.is_err(),
        "the target is of another authority"
    );
}

#[test]
fn files_that_hold_something_else_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let files = authority.host("host-a.test", &authority, directory.path());
    let swapped = TlsFiles {
        certificate: files.key.clone(),
        ..files.clone()
    };
    let error = Identity::read(&swapped).unwrap_err().to_string();
    assert!(
        error.contains("host-a.test.key") && error.contains("no certificate"),
        "{error}"
    );
    let swapped = TlsFiles {
        key: files.certificate.clone(),
        ..files.clone()
    };
    let error = Identity::read(&swapped).unwrap_err().to_string();
    assert!(error.contains("no private key"), "{error}");
    let missing = TlsFiles {
        ca: "/nowhere".to_owned(),
        ..files
    };
    assert!(
        Identity::read(&missing)
            .unwrap_err()
            .to_string()
            .contains("`/nowhere`")
    );
}

#[test]
fn what_is_written_comes_in_pieces_and_whole_and_its_end_is_seen() {
    let directory = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let files = authority.host("127.0.0.1", &authority, directory.path());
    let identity = Identity::read(&files).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let long: Vec<u8> = (0..3_000_001_u32)
        .map(|n| n.to_le_bytes()[0] ^ n.to_le_bytes()[1])
        .collect();
    thread::scope(|scope| {
        let listening = scope.spawn(|| {
            let (socket, _) = listener.accept().unwrap();
            let mut stream = Stream::from(identity.accept(socket, None).unwrap());
            let mut came = Vec::new();
            while came.len() < long.len() {
                let piece = stream.fill_buf().unwrap();
                assert!(!piece.is_empty(), "it ended early");
                let len = piece.len().min(10_001);
                came.extend_from_slice(piece.get(..len).unwrap());
                stream.consume(len);
            }
            assert!(came == long);
            stream.write_all(b"got it").unwrap();
            stream.flush().unwrap();
            assert!(
                stream.fill_buf().unwrap().is_empty(),
                "more has come than was sent"
            );
        });
        let mut stream = Stream::from(
            identity
                .call(TcpStream::connect(address).unwrap(), "127.0.0.1")
                .unwrap(),
        );
        stream.write_all(&long).unwrap();
        stream.flush().unwrap();
        let mut answer = [0; 6];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(answer, *b"got it");
        stream.close();
        stream.flush().unwrap();
        listening.join().unwrap();
    });
}

#[test]
fn files_that_have_no_name_any_more_are_read_by_their_descriptors() {
    let directory = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let files = authority.host("127.0.0.1", &authority, directory.path());
    let opened = [&files.certificate, &files.key, &files.ca].map(|path| fs::File::open(path).unwrap());
    drop(directory);
    assert!(Identity::read(&files).is_err());
    let [certificate, key, ca] = opened
        .each_ref()
        .map(|file| format!("/dev/fd/{}", file.as_raw_fd()));
    let files = TlsFiles { certificate, key, ca };
    // Each migration reads them anew, from their beginnings.
    for _ in 0..2 {
        let (at_server, at_client) = greeted(&files, &files, "127.0.0.1", Some("127.0.0.1"));
        at_server.unwrap();
        at_client.unwrap();
    }
}
