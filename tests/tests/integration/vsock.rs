//! Streams between programs of the host and of a real Linux.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use coracle_tests::case::{Case, Context};
use coracle_tests::environment::Need;
use coracle_tests::guest::{Linux, Machine};
use coracle_tests::harness::peer::{Part, Peer};
use coracle_tests::monitor::Launch;
use coracle_tests::{Outcome, ensure};
use serde_json::{Value, json};

use super::snapshot::{Files, killed, saved, started, with};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "linux_and_programs_of_its_host_exchange_a_mebibyte_each_way",
        need: Need::Kvm,
        run: exchanges,
    },
    Case {
        name: "streams_to_programs_of_the_host_arrive_whole_and_questions_are_answered",
        need: Need::Kvm,
        run: streams,
    },
    Case {
        name: "a_connection_is_reset_where_its_guest_goes_on_elsewhere_and_a_new_one_works",
        need: Need::Kvm,
        run: goes_on_elsewhere,
    },
    Case {
        name: "a_socket_that_cannot_be_had_is_an_error_that_says_what_to_do",
        need: Need::Nothing,
        run: what_cannot_be_had,
    },
];

/// A boot takes ten seconds where kernel code is emulated, and each packet milliseconds.
const END_WITHIN: Duration = Duration::from_secs(240);
const KIB: usize = 1024;

fn machine(context: &Context, directory: &Path, words: &str) -> Outcome<Machine> {
    let vsock = json!({ "guest_cid": 52, "uds_path": directory.join("test-v") });
    Ok(Linux::read(&context.environment)?
        .machine("smp", directory, words)?
        .read_only_root()
        .part("vsock", vsock))
}

/// What the guest sends, as its init makes it.
fn pattern() -> Vec<u8> {
    let byte = |at: u64| (at.wrapping_mul(2_654_435_761) >> 13).to_le_bytes()[0];
    (0..(KIB << 10) as u64).map(byte).collect()
}

/// Hears all that the guest sends until it ends its half, and only then sends it back.
fn answer(listener: &UnixListener) -> std::io::Result<Vec<u8>> {
    let (mut stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(END_WITHIN))?;
    let mut heard = Vec::new();
    stream.read_to_end(&mut heard)?;
    stream.write_all(&heard)?;
    Ok(heard)
}

/// A stream to port 800 of the guest.
fn call(path: &Path) -> Outcome<UnixStream> {
    let stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(END_WITHIN))?;
    (&stream).write_all(b"CONNECT 800\n")?;
    let mut line = Vec::new();
    // What comes behind the line is left there.
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        (&stream).read_exact(&mut byte)?;
        line.extend(byte);
    }
    let port = String::from_utf8(line)?;
    let port = port.strip_prefix("OK ").ok_or("the guest is not reached")?;
    ensure!(port.trim_end().parse::<u32>()? >= 1 << 30, "{port}");
    Ok(stream)
}

fn exchanges(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("test-v");
    let machine = machine(
        context,
        directory.path(),
        "vsock-send 700 1024 vsock-echo 800 1 exit 7",
    )?;
    let listener = UnixListener::bind(directory.path().join("test-v_700"))?;
    let answers = thread::spawn(move || answer(&listener));
    // Without an API the process reaches no more than its configuration names.
    let launch = Launch::new(&context.environment)?.without_api();
    let monitor = launch.config(&machine.config())?.spawn()?;
    monitor.console.wait_for("vsock-echo listens", END_WITHIN)?;
    let heard = answers.join().map_err(|_| "the program of the host panicked")??;
    ensure!(heard == pattern(), "{} bytes came, and others", heard.len());
    ensure!(
        monitor
            .console
            .text()
            .contains("vsock-send: 1048576 bytes came back, error 0"),
        "{}",
        monitor.console.text()
    );

    let mut seed = context.seed.clone();
    let content: Vec<u8> = (0..KIB << 7).flat_map(|_| seed.draw().to_le_bytes()).collect();
    let stream = call(&path)?;
    let (sender, sent) = (stream.try_clone()?, content.clone());
    let sends = thread::spawn(move || -> std::io::Result<()> {
        (&sender).write_all(&sent)?;
        sender.shutdown(Shutdown::Write)
    });
    let mut echo = Vec::new();
    (&stream).read_to_end(&mut echo)?;
    sends.join().map_err(|_| "the program of the host panicked")??;
    ensure!(echo == content, "{} bytes came back, and others", echo.len());
    monitor.wait(END_WITHIN)?.expect(7)?;
    ensure!(!path.exists(), "the socket is left over");
    Ok(())
}

fn streams(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let socket = directory.path().join("test-v");
    let mib = context.count(64, 4096);
    let bytes = usize::try_from(mib)? << 20;
    let parts = [Part::Takes, Part::Gives(bytes), Part::Answers];
    let peers: Vec<Peer> = (700..)
        .zip(parts)
        .map(|(port, part)| Peer::of_device(&socket, port, part))
        .collect::<Outcome<_>>()?;
    let words: Vec<String> = peers
        .iter()
        .zip(["role=send", "role=receive", "role=ask,count=500"])
        .map(|(peer, role)| format!("do=vsock:{role},port={},mib={mib}", peer.port()))
        .collect();
    let machine = Machine::unikernel(&context.environment, &words.join(" "))
        .part("vsock", json!({ "guest_cid": 3, "uds_path": socket }));
    let launch = Launch::new(&context.environment)?.without_api();
    let ended = launch.config(&machine.config())?.spawn()?.wait(END_WITHIN)?;
    let lines = ended.console.lines().filter(|line| line.starts_with("vsock: "));
    lines.for_each(|line| println!("{line}"));
    ended.expect(0)?;
    let told = format!("role=receive bytes={bytes} ");
    ensure!(ended.console.contains(&told), "{}", ended.console);
    let passed: Vec<usize> = peers.into_iter().map(Peer::ended).collect::<Outcome<_>>()?;
    ensure!(passed == [bytes, bytes, 500 * 64], "{passed:?}");
    Ok(())
}

/// The guest sends back what it is sent.
fn echoes(stream: &UnixStream, words: &str) -> Outcome {
    let mut stream = stream;
    stream.write_all(words.as_bytes())?;
    let mut line = String::new();
    BufReader::new(stream.take(words.len() as u64)).read_line(&mut line)?;
    ensure!(line == words, "{line}");
    Ok(())
}

fn goes_on_elsewhere(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let path = |name: &str| -> PathBuf { directory.path().join(name) };
    let machine = machine(context, directory.path(), "vsock-echo 800 2 exit 7")?;
    let first = started(context, &machine.config())?;
    first.console.wait_for("vsock-echo listens", END_WITHIN)?;
    let stream = call(&path("test-v"))?;
    echoes(&stream, "before\n")?;
    // Linux answers ECONNRESET to who waits in a read, and ENOTCONN to who begins one: the program is to be waiting again.
    thread::sleep(Duration::from_secs(1));
    let files = Files::in_directory(directory.path(), "test-vsock");
    saved(&first, &files, "Full")?;
    // Somebody else has the path: a clone beside its original.
    let second = Launch::new(&context.environment)?.start()?;
    let refused = |load: &Value, words: &str| -> Outcome {
        let answer = second.request("PUT", "/snapshot/load", Some(load))?;
        ensure!(answer.status == 400, "{answer:?}");
        ensure!(answer.fault().contains(words), "{answer:?}");
        Ok(())
    };
    refused(&files.load("lazy"), "a running process listens there")?;
    // The original goes on with its connection.
    first.set_state("Resumed")?;
    echoes(&stream, "still there\n")?;
    killed(first)?;
    refused(&files.load("lazy"), "remove it")?;
    let elsewhere = json!({ "uds_path": path("test-w") });
    let load = with(files.load("lazy"), "", "vsock_override", elsewhere);
    second.must("PUT", "/snapshot/load", Some(&load))?;
    let config = second.must("GET", "/vm/config", None)?.json()?;
    let expected = json!({ "guest_cid": 52, "uds_path": path("test-w") });
    ensure!(config.get("vsock") == Some(&expected), "{config}");
    // ECONNRESET, and not the end that a program of the host would have made.
    second
        .console
        .wait_for("vsock-echo: 7 bytes, error 104", END_WITHIN)?;
    let stream = call(&path("test-w"))?;
    echoes(&stream, "after\n")?;
    let metrics = second.must("GET", "/metrics", None)?.body;
    ensure!(metrics.contains("vsock"), "{metrics}");
    drop(stream);
    let ended = second.wait(END_WITHIN)?;
    ended.expect(7)?;
    ensure!(
        ended.console.contains("vsock-echo: 6 bytes, error 0"),
        "{}",
        ended.console
    );
    ensure!(!path("test-w").exists(), "the socket is left over");
    Ok(())
}

fn what_cannot_be_had(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let path = |name: &str| -> PathBuf { directory.path().join(name) };
    let monitor = Launch::new(&context.environment)?.start()?;
    let put = |cid: u32, path: &Path| {
        let vsock = json!({ "guest_cid": cid, "uds_path": path });
        monitor.request("PUT", "/vsock", Some(&vsock))
    };
    std::fs::write(path("file"), "")?;
    let listener = UnixListener::bind(path("served"))?;
    let long = path(&"v".repeat(108));
    for (cid, path, words) in [
        (3, path("file"), "remove it"),
        (3, path("served"), "a running process listens there"),
        (3, path("none/v"), "in a directory that exists"),
        (3, long, "at most 107 bytes"),
        (3, PathBuf::new(), "uds_path is empty"),
        (2, path("v"), "3 to 4294967294"),
    ] {
        let answer = put(cid, &path)?;
        ensure!(answer.status == 400, "{}: {answer:?}", path.display());
        ensure!(answer.fault().contains(words), "{}: {answer:?}", path.display());
    }
    drop(listener);
    ensure!(
        path("file").exists() && path("served").exists(),
        "they are not ours"
    );
    let none: Value = monitor.must("GET", "/vm/config", None)?.json()?;
    ensure!(none.get("vsock") == Some(&Value::Null), "{none}");

    let old = json!({ "vsock_id": "vsock0", "guest_cid": 3, "uds_path": path("v") });
    monitor.must("PUT", "/vsock", Some(&old))?;
    let config: Value = monitor.must("GET", "/vm/config", None)?.json()?;
    ensure!(config.get("vsock") == Some(&old), "{config}");
    // It is made when the machine starts.
    ensure!(!path("v").exists(), "there is no machine yet");
    Ok(())
}
