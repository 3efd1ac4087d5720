//! One connection: who calls is told what this is, says what it wants, and gets it.

use std::error::Error;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::path::Path;

use coracle_agent::files;
use coracle_agent::wire::{DATA_BYTES, Decoder, Encode, Request, ToGuest, ToHost, VERSION};

use crate::{boot, command};

/// Nothing was begun, for a reason of ours: no command gives this as readily as 1.
const STATUS_FAILED: u8 = 125;

/// A connection: of a vsock device, or in a test.
pub(super) trait Stream: Read + Write + AsFd {}

impl<S: Read + Write + AsFd> Stream for S {}

/// Tells who calls why nothing is done for it.
pub(super) fn refuse(stream: &mut impl Stream, status: u8, why: &str) {
    let told = ToHost::Hello(VERSION)
        .write(stream)
        .and_then(|()| ToHost::Failed(status, why).write(stream));
    // Whoever is gone needs no answer.
    let _ = told.map(|()| part(stream));
}

/// What was not read when a stream closes has it reset, and the last words with it.
fn part(stream: &mut impl Stream) {
    let _ = rustix::net::shutdown(&*stream, rustix::net::Shutdown::Write);
    let _ = io::copy(stream, &mut io::sink());
}

/// Serves who calls, until it is content or gone.
pub(super) fn serve(mut stream: impl Stream) {
    // Whoever is gone needs no answer.
    if attend(&mut stream).is_ok() {
        part(&mut stream);
    }
}

fn attend(stream: &mut impl Stream) -> io::Result<()> {
    ToHost::Hello(VERSION).write(stream)?;
    let mut decoder = Decoder::default();
    let request = loop {
        match decoder
            .take()
            .map(|frame| frame.map(|frame| ToGuest::decode(&frame)))
        {
            Ok(Some(Ok(ToGuest::Request(request)))) => break request,
            Ok(Some(Ok(_))) => return fail(stream, "something else has come before a request"),
            Ok(Some(Err(error))) | Err(error) => return fail(stream, &joined(&error)),
            Ok(None) => {}
        }
        if decoder.fill(stream)? == 0 {
            return Ok(());
        }
    };
    match request {
        Request::Exec(exec) => command::run(&exec, stream, decoder),
        Request::Root(root) => match boot::enter(&root) {
            Ok(()) => ToHost::End.write(stream),
            Err(error) => fail(stream, &joined(&error)),
        },
        Request::Sync => {
            rustix::fs::sync();
            ToHost::End.write(stream)
        }
        Request::Bring { path, name } => {
            ToHost::Started.write(stream)?;
            let mut archive = Archive {
                stream,
                decoder,
                left: Vec::new(),
                is_over: false,
            };
            match files::unpack(&mut archive, Path::new(&path), &name) {
                Ok(_) => ToHost::End.write(stream),
                Err(error) => fail(stream, &joined(&error)),
            }
        }
        Request::Fetch { path, name } => {
            ToHost::Started.write(stream)?;
            match files::pack(
                Path::new(&path),
                &name,
                io::BufWriter::with_capacity(DATA_BYTES, Sent(stream)),
            ) {
                Ok(()) => ToHost::End.write(stream),
                Err(error) => fail(stream, &joined(&error)),
            }
        }
    }
}

/// Says why it cannot be done.
pub(super) fn fail(stream: &mut impl Write, why: &str) -> io::Result<()> {
    ToHost::Failed(STATUS_FAILED, why).write(stream)
}

/// What `error` says, with every cause.
pub(super) fn joined(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let causes = std::iter::successors(error.source(), |&cause| cause.source());
    for cause in causes {
        text.push_str(": ");
        text.push_str(&cause.to_string());
    }
    text
}

/// An archive that comes in frames.
struct Archive<'a, S> {
    stream: &'a mut S,
    decoder: Decoder,
    /// Of the last frame, what was not read yet.
    left: Vec<u8>,
    is_over: bool,
}

impl<S: Read> Read for Archive<'_, S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.left.is_empty() && !self.is_over {
            let Some(frame) = self.decoder.take().map_err(io::Error::other)? else {
                if self.decoder.fill(self.stream)? == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                continue;
            };
            match ToGuest::decode(&frame).map_err(io::Error::other)? {
                ToGuest::Data(bytes) => self.left.extend(bytes),
                ToGuest::End => self.is_over = true,
                _ => {
                    return Err(io::Error::other(
                        "something else has come in the middle of an archive",
                    ));
                }
            }
        }
        let read = self.left.as_slice().read(buffer)?;
        self.left.drain(..read);
        Ok(read)
    }
}

/// What is written here goes out in frames.
struct Sent<'a, S>(&'a mut S);

impl<S: Write> Write for Sent<'_, S> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let piece = bytes.get(..bytes.len().min(DATA_BYTES)).unwrap_or_default();
        ToHost::Data(piece).write(self.0)?;
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::thread::{self, JoinHandle};
    use std::time::{Duration, Instant};

    use coracle_agent::wire::{Exec, Exit, Size, WINDOW_BYTES};

    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    /// Who calls.
    struct Caller {
        stream: UnixStream,
        decoder: Decoder,
        agent: JoinHandle<()>,
    }

    /// What was heard until the end.
    #[derive(Debug, Default, PartialEq)]
    struct Heard {
        output: String,
        errors: String,
        data: Vec<u8>,
        taken: u32,
        end: Option<Exit>,
        failed: Option<(u8, String)>,
    }

    impl Caller {
        fn asks(request: Request) -> Self {
            let (stream, served) = UnixStream::pair().unwrap();
            stream.set_read_timeout(Some(SOON)).unwrap();
            let mut caller = Self {
                stream,
                decoder: Decoder::default(),
                agent: thread::spawn(move || serve(served)),
            };
            caller.says(&ToGuest::Request(request));
            caller
        }

        fn runs(words: &[&str]) -> Self {
            let exec = Exec {
                command: words.iter().map(|&word| word.to_owned()).collect(),
                ..Exec::default()
            };
            Self::asks(Request::Exec(exec))
        }

        fn says(&mut self, message: &ToGuest<'_>) {
            message.write(&mut self.stream).unwrap();
        }

        /// Listens until `is_enough` says so, or all is over.
        fn hears(&mut self, is_enough: impl Fn(&Heard) -> bool) -> Heard {
            let mut heard = Heard::default();
            loop {
                while let Some(frame) = self.decoder.take().unwrap() {
                    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
                    match ToHost::decode(&frame).unwrap() {
                        ToHost::Hello(version) => assert_eq!(version, VERSION),
                        ToHost::Started => {}
                        ToHost::Taken(bytes) => heard.taken += bytes,
                        ToHost::Output(bytes) => heard.output += &text(bytes),
                        ToHost::Errors(bytes) => heard.errors += &text(bytes),
                        ToHost::Data(bytes) => heard.data.extend(bytes),
                        ToHost::End => heard.end = Some(Exit::Code(0)),
                        ToHost::Exited(exit) => heard.end = Some(exit),
                        ToHost::Failed(status, why) => heard.failed = Some((status, why.to_owned())),
                    }
                    if is_enough(&heard) {
                        return heard;
                    }
                }
                if self.decoder.fill(&mut self.stream).unwrap() == 0 {
                    return heard;
                }
            }
        }

        fn hears_all(mut self) -> Heard {
            let heard = self.hears(|_| false);
            drop(self.stream);
            self.agent.join().unwrap();
            heard
        }
    }

    fn failed(heard: &Heard) -> (u8, &str) {
        let failed = heard.failed.as_ref();
        failed.map_or((0, "it has not failed"), |(status, why)| (*status, why))
    }

    #[test]
    fn a_command_has_its_input_its_outputs_and_its_status() {
        let mut caller = Caller::runs(&["sh", "-c", "cat; echo wrong >&2; exit 7"]);
        caller.says(&ToGuest::Data(b"first "));
        caller.says(&ToGuest::Data(b"second"));
        caller.says(&ToGuest::End);
        let heard = caller.hears_all();
        assert_eq!(
            (heard.output.as_str(), heard.errors.as_str()),
            ("first second", "wrong\n")
        );
        assert_eq!((heard.end, heard.taken), (Some(Exit::Code(7)), 12));

        let exec = Exec {
            command: vec![
                "sh".to_owned(),
                "-c".to_owned(),
                "echo $A; pwd; kill -9 $$".to_owned(),
            ],
            environment: vec![("A".to_owned(), "b=c".to_owned())],
            directory: Some("/usr".to_owned()),
            terminal: None,
        };
        let heard = Caller::asks(Request::Exec(exec.clone())).hears_all();
        assert_eq!(
            (heard.output.as_str(), heard.end),
            ("b=c\n/usr\n", Some(Exit::Signal(9)))
        );

        let nowhere = Exec {
            directory: Some("/no/where".to_owned()),
            ..exec
        };
        let heard = Caller::asks(Request::Exec(nowhere)).hears_all();
        assert!(failed(&heard).1.contains("no directory /no/where"), "{heard:?}");
        let heard = Caller::runs(&["no-such-program"]).hears_all();
        assert!(
            matches!(failed(&heard), (127, why) if why.contains("cannot run no-such-program")),
            "{heard:?}"
        );
        let heard = Caller::runs(&["/etc"]).hears_all();
        assert_eq!(failed(&heard).0, 126, "{heard:?}");
        let heard = Caller::runs(&[]).hears_all();
        assert!(failed(&heard).1.contains("no command"), "{heard:?}");
    }

    #[test]
    fn what_a_command_leaves_running_is_not_waited_for() {
        let begun = Instant::now();
        let heard = Caller::runs(&["sh", "-c", "sleep 30 & echo left"]).hears_all();
        assert_eq!(
            (heard.output.as_str(), heard.end),
            ("left\n", Some(Exit::Code(0)))
        );
        assert!(begun.elapsed() < SOON);
        // Also one that never stops to write.
        let noisy = Caller::runs(&["sh", "-c", "yes & echo $!; exit 3"]).hears_all();
        assert_eq!(noisy.end, Some(Exit::Code(3)));
        let noise = noisy.output.lines().find_map(|line| line.parse().ok());
        let noise = noise.and_then(rustix::process::Pid::from_raw).unwrap();
        rustix::process::kill_process(noise, rustix::process::Signal::KILL).unwrap();
        let much = Caller::runs(&["head", "-c", "3000000", "/dev/zero"]).hears_all();
        assert_eq!((much.output.len(), much.end), (3_000_000, Some(Exit::Code(0))));
    }

    #[test]
    fn a_signal_reaches_a_command_that_reads_nothing() {
        let mut caller = Caller::runs(&["sleep", "100"]);
        caller.says(&ToGuest::Data(&vec![0; WINDOW_BYTES / 2]));
        caller.says(&ToGuest::Data(&vec![0; WINDOW_BYTES / 2]));
        caller.says(&ToGuest::Signal(15));
        let heard = caller.hears_all();
        assert_eq!(heard.end, Some(Exit::Signal(15)));

        // More than it may send is refused, and the command ends.
        let mut caller = Caller::runs(&["sleep", "100"]);
        for _ in 0..4 {
            caller.says(&ToGuest::Data(&vec![0; WINDOW_BYTES]));
        }
        assert!(failed(&caller.hears_all()).1.contains("more of standard input"));
    }

    #[test]
    fn a_command_that_closes_its_input_is_sent_no_more_of_it_and_goes_on() {
        let mut caller = Caller::runs(&["sh", "-c", "exec 0<&-; echo closed; exec sleep 1000"]);
        caller.hears(|heard| heard.output == "closed\n");
        caller.says(&ToGuest::Data(&vec![0; WINDOW_BYTES]));
        caller.hears(|heard| usize::try_from(heard.taken).unwrap() == WINDOW_BYTES);
        caller.says(&ToGuest::Signal(15));
        assert_eq!(caller.hears_all().end, Some(Exit::Signal(15)));
    }

    #[test]
    fn a_command_whose_caller_is_gone_is_killed_with_what_it_has_started() {
        let mut caller = Caller::runs(&["sh", "-c", "sleep 1000 & echo $!; wait"]);
        let heard = caller.hears(|heard| heard.output.ends_with('\n'));
        let Caller { stream, agent, .. } = caller;
        drop(stream);
        agent.join().unwrap();
        let begun = Instant::now();
        let process = format!("/proc/{}/status", heard.output.trim());
        let is_there = || std::fs::read_to_string(&process).is_ok_and(|status| !status.contains("State:\tZ"));
        while is_there() {
            assert!(begun.elapsed() < SOON, "{process}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn a_command_on_a_terminal_has_its_size_and_hangs_up() {
        let exec = Exec {
            command: vec![
                "sh".to_owned(),
                "-c".to_owned(),
                "tty; stty size; read line; stty size; exit 4".to_owned(),
            ],
            terminal: Some(Size {
                rows: 31,
                columns: 97,
            }),
            ..Exec::default()
        };
        let mut caller = Caller::asks(Request::Exec(exec));
        let heard = caller.hears(|heard| heard.output.contains("31 97"));
        assert!(heard.output.starts_with("/dev/pts/"), "{heard:?}");
        caller.says(&ToGuest::Resize(Size {
            rows: 40,
            columns: 120,
        }));
        caller.says(&ToGuest::Data(b"go on\n"));
        let heard = caller.hears_all();
        assert!(heard.output.contains("40 120"), "{heard:?}");
        assert_eq!(heard.end, Some(Exit::Code(4)));
    }

    #[test]
    fn files_are_fetched_and_brought() {
        let place = tempfile::tempdir().unwrap();
        let path = |name: &str| place.path().join(name).display().to_string();
        std::fs::write(path("from"), vec![3; 100_000]).unwrap();
        let fetched = Caller::asks(Request::Fetch {
            path: path("from"),
            name: "from".to_owned(),
        })
        .hears_all();
        assert_eq!(fetched.end, Some(Exit::Code(0)));

        let mut caller = Caller::asks(Request::Bring {
            path: path("to"),
            name: "from".to_owned(),
        });
        for piece in fetched.data.chunks(DATA_BYTES) {
            caller.says(&ToGuest::Data(piece));
        }
        caller.says(&ToGuest::End);
        assert_eq!(caller.hears_all().end, Some(Exit::Code(0)));
        assert_eq!(std::fs::read(path("to")).unwrap(), vec![3; 100_000]);

        let heard = Caller::asks(Request::Fetch {
            path: path("none"),
            name: "none".to_owned(),
        })
        .hears_all();
        assert!(failed(&heard).1.contains("none: No such file"), "{heard:?}");
        // Its end is cut off: nothing is there.
        let caller = Caller::asks(Request::Bring {
            path: path("cut"),
            name: "from".to_owned(),
        });
        let mut stream = caller.stream.try_clone().unwrap();
        ToGuest::Data(fetched.data.get(..600).unwrap_or_default())
            .write(&mut stream)
            .unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let heard = caller.hears_all();
        assert!(failed(&heard).1.contains("cannot write"), "{heard:?}");
        assert!(!place.path().join("cut").exists());
    }

    #[test]
    fn who_asks_for_nothing_is_told() {
        let (mut stream, served) = UnixStream::pair().unwrap();
        let agent = thread::spawn(move || serve(served));
        ToGuest::End.write(&mut stream).unwrap();
        let caller = Caller {
            stream,
            decoder: Decoder::default(),
            agent,
        };
        assert!(failed(&caller.hears_all()).1.contains("before a request"));
    }
}
