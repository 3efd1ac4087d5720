//! The frames.
//!
//! ```text
//! frame = kind (1 byte) | length (4 bytes, little-endian) | payload
//!
//! coraclectl                              agent
//!            <-------------------------- Hello
//! Request -------------------------------->
//!            <-------------------------- Started
//!
//! a command:
//! Data, End (standard input) ------------->
//!            <-------------------------- Taken (so much of it)
//!            <-------------------------- Output, Errors
//! Signal, Resize ------------------------->
//!            <-------------------------- Exited
//!
//! a root, and what is written to its disk:
//!            <-------------------------- End
//!
//! files that are brought:               files that are fetched:
//! Data, End ------------------------------>   <------------- Data, End
//!            <-------------------------- End
//!
//!            <-------------------------- Failed (instead of any of these; then it is over)
//! ```
//!
//! Of standard input no more than [`WINDOW_BYTES`] are on the way that are not [`ToHost::Taken`], so that a command that does
//! not read stands in the way of no signal.

use std::io::{self, Read, Write};
use std::str::Utf8Error;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The vsock port on which the agent listens, unless it was told another; one that only root can have.
pub const PORT: u32 = 1023;
/// The version of what is described here.
pub const VERSION: u32 = 2;
/// The longest payload: a request may have all the arguments that a command may have.
pub const PAYLOAD_BYTES_MAX: usize = 1 << 20;
/// How much data one frame carries at most when it is sent.
pub const DATA_BYTES: usize = 32 << 10;
/// How many random bytes a guest is given.
pub const SEED_BYTES: usize = 32;
/// How much of standard input may be on its way.
pub const WINDOW_BYTES: usize = 64 << 10;

const HEAD_BYTES: usize = 5;

/// What an agent is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Run a command.
    Exec(Exec),
    /// Mount a disk and go on in it, if the agent is the first process of its guest.
    Root(Root),
    /// Write all that was written to its disks.
    Sync,
    /// Take files, as a tar archive, of which the first thing has the name `name`.
    Bring {
        /// Where to: a directory in which it will have its name, or what it will be called.
        path: String,
        /// What it is called where it comes from.
        name: String,
    },
    /// Send what is there as a tar archive, in which it has the name `name`.
    Fetch {
        /// A file or a directory.
        path: String,
        /// What it is called where it goes.
        name: String,
    },
}

/// What a guest begins with.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Root {
    /// The device of the disk.
    pub device: String,
    /// Whether other guests remember the same: then it has to have random numbers of its own.
    pub is_one_of_many: bool,
    /// Random bytes for that.
    pub seed: [u8; SEED_BYTES],
    /// What time it is, in nanoseconds since 1970: a guest that goes on from a snapshot, or has no clock of its own, does not
    /// know.
    pub unix_ns: u64,
}

/// A command to run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exec {
    /// The program, which is looked for in PATH, and its arguments.
    pub command: Vec<String>,
    /// Variables, beside those that the agent has itself.
    #[serde(default)]
    pub environment: Vec<(String, String)>,
    /// Where it runs, if not in `/`.
    #[serde(default)]
    pub directory: Option<String>,
    /// The terminal that it is given, if it is.
    #[serde(default)]
    pub terminal: Option<Size>,
}

/// How large a terminal is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Lines.
    pub rows: u16,
    /// Characters of a line.
    pub columns: u16,
}

/// How a command has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// By itself, with a status.
    Code(u8),
    /// By a signal.
    Signal(u8),
}

/// What `coraclectl` sends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToGuest<'a> {
    /// What it wants.
    Request(Request),
    /// Standard input, or an archive.
    Data(&'a [u8]),
    /// The end of that.
    End,
    /// A signal for the command and those that it has started.
    Signal(u8),
    /// The terminal has another size now.
    Resize(Size),
}

/// What an agent sends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToHost<'a> {
    /// It is one, of this version.
    Hello(u32),
    /// The request has been begun.
    Started,
    /// The command has read so many bytes of standard input, or will never read them.
    Taken(u32),
    /// Standard output.
    Output(&'a [u8]),
    /// Standard error.
    Errors(&'a [u8]),
    /// An archive.
    Data(&'a [u8]),
    /// The end of that, or all of what was brought is there.
    End,
    /// The command has ended, and this was all.
    Exited(Exit),
    /// It cannot be done: the status that a shell would give, and why.
    Failed(u8, &'a str),
}

/// Why what came is no frame.
#[derive(Debug, Error)]
pub enum WireError {
    /// Nobody that speaks this is so long-winded.
    #[error("a frame of {0} bytes: more than {PAYLOAD_BYTES_MAX} is no frame")]
    TooLong(u32),
    /// Of a newer version, or of something else.
    #[error("a frame of kind {0}, which is not known")]
    Kind(u8),
    /// The payload has another length.
    #[error("a frame of kind {0} with a payload that it cannot have")]
    Payload(u8),
    /// It is no request.
    #[error("a request that cannot be understood")]
    Request(#[from] serde_json::Error),
    /// It is no text.
    #[error("a reason that is no text")]
    Text(#[from] Utf8Error),
}

const REQUEST: u8 = 1;
const DATA: u8 = 2;
const END: u8 = 3;
const SIGNAL: u8 = 4;
const RESIZE: u8 = 5;
const HELLO: u8 = 16;
const STARTED: u8 = 17;
const TAKEN: u8 = 18;
const OUTPUT: u8 = 19;
const ERRORS: u8 = 20;
const EXITED: u8 = 21;
const FAILED: u8 = 22;

const BY_ITSELF: u8 = 0;
const BY_SIGNAL: u8 = 1;

/// A message that can be sent.
pub trait Encode {
    /// Appends its frame.
    fn encode(&self, to: &mut Vec<u8>);

    /// Writes its frame at once.
    ///
    /// # Errors
    ///
    /// What the stream says.
    fn write(&self, to: &mut impl Write) -> io::Result<()>
    where
        Self: Sized,
    {
        let mut frame = Vec::new();
        self.encode(&mut frame);
        to.write_all(&frame)
    }
}

impl Encode for ToGuest<'_> {
    fn encode(&self, to: &mut Vec<u8>) {
        match self {
            Self::Request(request) => {
                let text = serde_json::to_vec(request).expect("a request is text, numbers and lists");
                frame(REQUEST, &text, to);
            }
            Self::Data(bytes) => frame(DATA, bytes, to),
            Self::End => frame(END, &[], to),
            Self::Signal(number) => frame(SIGNAL, &[*number], to),
            Self::Resize(size) => {
                let [a, b] = size.rows.to_le_bytes();
                let [c, d] = size.columns.to_le_bytes();
                frame(RESIZE, &[a, b, c, d], to);
            }
        }
    }
}

impl Encode for ToHost<'_> {
    fn encode(&self, to: &mut Vec<u8>) {
        match self {
            Self::Hello(version) => frame(HELLO, &version.to_le_bytes(), to),
            Self::Started => frame(STARTED, &[], to),
            Self::Taken(bytes) => frame(TAKEN, &bytes.to_le_bytes(), to),
            Self::Output(bytes) => frame(OUTPUT, bytes, to),
            Self::Errors(bytes) => frame(ERRORS, bytes, to),
            Self::Data(bytes) => frame(DATA, bytes, to),
            Self::End => frame(END, &[], to),
            Self::Exited(Exit::Code(code)) => frame(EXITED, &[BY_ITSELF, *code], to),
            Self::Exited(Exit::Signal(number)) => frame(EXITED, &[BY_SIGNAL, *number], to),
            Self::Failed(status, why) => {
                let payload = [&[*status], why.as_bytes()].concat();
                frame(FAILED, &payload, to);
            }
        }
    }
}

fn frame(kind: u8, payload: &[u8], to: &mut Vec<u8>) {
    let length = u32::try_from(payload.len()).expect("payloads are short");
    to.push(kind);
    to.extend(length.to_le_bytes());
    to.extend(payload);
}

impl<'a> ToGuest<'a> {
    /// What a frame says.
    ///
    /// # Errors
    ///
    /// When it says nothing that is known.
    pub fn decode(frame: &Frame<'a>) -> Result<Self, WireError> {
        let &Frame { kind, payload } = frame;
        Ok(match (kind, payload) {
            (REQUEST, text) => Self::Request(serde_json::from_slice(text)?),
            (DATA, bytes) => Self::Data(bytes),
            (END, []) => Self::End,
            (SIGNAL, [number]) => Self::Signal(*number),
            (RESIZE, &[a, b, c, d]) => Self::Resize(Size {
                rows: u16::from_le_bytes([a, b]),
                columns: u16::from_le_bytes([c, d]),
            }),
            (END | SIGNAL | RESIZE, _) => return Err(WireError::Payload(kind)),
            _ => return Err(WireError::Kind(kind)),
        })
    }
}

impl<'a> ToHost<'a> {
    /// What a frame says.
    ///
    /// # Errors
    ///
    /// When it says nothing that is known.
    pub fn decode(frame: &Frame<'a>) -> Result<Self, WireError> {
        let &Frame { kind, payload } = frame;
        Ok(match (kind, payload) {
            (HELLO, &[a, b, c, d]) => Self::Hello(u32::from_le_bytes([a, b, c, d])),
            (STARTED, []) => Self::Started,
            (TAKEN, &[a, b, c, d]) => Self::Taken(u32::from_le_bytes([a, b, c, d])),
            (OUTPUT, bytes) => Self::Output(bytes),
            (ERRORS, bytes) => Self::Errors(bytes),
            (DATA, bytes) => Self::Data(bytes),
            (END, []) => Self::End,
            (EXITED, &[BY_ITSELF, code]) => Self::Exited(Exit::Code(code)),
            (EXITED, &[BY_SIGNAL, number]) => Self::Exited(Exit::Signal(number)),
            (FAILED, [status, why @ ..]) => Self::Failed(*status, std::str::from_utf8(why)?),
            (HELLO | STARTED | TAKEN | END | EXITED | FAILED, _) => return Err(WireError::Payload(kind)),
            _ => return Err(WireError::Kind(kind)),
        })
    }
}

/// One frame as it came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    kind: u8,
    payload: &'a [u8],
}

/// Frames out of what comes from a stream, piece by piece.
#[derive(Debug, Default)]
pub struct Decoder {
    bytes: Vec<u8>,
    /// Where the next frame begins.
    at: usize,
}

impl Decoder {
    /// Reads once; 0 at the end of the stream.
    ///
    /// # Errors
    ///
    /// What the stream says.
    pub fn fill(&mut self, from: &mut impl Read) -> io::Result<usize> {
        self.bytes.drain(..self.at);
        self.at = 0;
        let before = self.bytes.len();
        self.bytes.resize(before + HEAD_BYTES + DATA_BYTES, 0);
        let read = from.read(self.bytes.get_mut(before..).unwrap_or_default());
        self.bytes.truncate(before + *read.as_ref().unwrap_or(&0));
        read
    }

    /// The next frame, if all of it has come.
    ///
    /// # Errors
    ///
    /// When it is longer than any.
    pub fn take(&mut self) -> Result<Option<Frame<'_>>, WireError> {
        let waiting = self.bytes.get(self.at..).unwrap_or_default();
        let Some((&[kind, a, b, c, d], rest)) = waiting.split_first_chunk::<HEAD_BYTES>() else {
            return Ok(None);
        };
        let length = u32::from_le_bytes([a, b, c, d]);
        let bytes = usize::try_from(length).unwrap_or(usize::MAX);
        if bytes > PAYLOAD_BYTES_MAX {
            return Err(WireError::TooLong(length));
        }
        let Some(payload) = rest.get(..bytes) else {
            return Ok(None);
        };
        self.at += HEAD_BYTES + bytes;
        Ok(Some(Frame { kind, payload }))
    }

    /// Whether the stream has ended within a frame.
    pub fn is_within(&self) -> bool {
        self.at < self.bytes.len()
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn requests() -> [Request; 5] {
        [
            Request::Exec(Exec {
                command: vec!["sh".to_owned(), "-c".to_owned(), "exit 3".to_owned()],
                environment: vec![("A".to_owned(), "=".to_owned())],
                directory: Some("/tmp".to_owned()),
                terminal: Some(Size {
                    rows: 24,
                    columns: 80,
                }),
            }),
            Request::Root(Root {
                device: "/dev/vda".to_owned(),
                is_one_of_many: true,
                seed: [0xa5; SEED_BYTES],
                unix_ns: u64::MAX,
            }),
            Request::Sync,
            Request::Bring {
                path: "/a".to_owned(),
                name: "b".to_owned(),
            },
            Request::Fetch {
                path: "/a".to_owned(),
                name: "b".to_owned(),
            },
        ]
    }

    /// All messages in pieces of so many bytes: each comes out as it went in.
    fn comes_out<M: Encode + PartialEq + std::fmt::Debug>(
        messages: &[M],
        piece: usize,
        decode: impl Fn(&Frame<'_>, &M) -> bool,
    ) {
        let mut bytes = Vec::new();
        messages.iter().for_each(|message| message.encode(&mut bytes));
        let mut decoder = Decoder::default();
        let mut left = messages.iter();
        for mut piece in bytes.chunks(piece) {
            while !piece.is_empty() {
                decoder.fill(&mut piece).unwrap();
                while let Some(frame) = decoder.take().unwrap() {
                    let message = left.next().unwrap();
                    assert!(decode(&frame, message), "{message:?}");
                }
            }
        }
        assert!(left.next().is_none() && !decoder.is_within());
    }

    #[test]
    fn each_message_comes_out_as_it_went_in_however_it_is_cut() {
        let data = vec![7; DATA_BYTES];
        let mut to_guest: Vec<ToGuest<'_>> = requests().map(ToGuest::Request).into();
        to_guest.extend([
            ToGuest::Data(&data),
            ToGuest::End,
            ToGuest::Signal(15),
            ToGuest::Resize(Size {
                rows: 300,
                columns: 1,
            }),
        ]);
        let to_host = [
            ToHost::Hello(VERSION),
            ToHost::Started,
            ToHost::Taken(70_000),
            ToHost::Output(&data),
            ToHost::Errors(b"e"),
            ToHost::Data(&[]),
            ToHost::End,
            ToHost::Exited(Exit::Code(200)),
            ToHost::Exited(Exit::Signal(9)),
            ToHost::Failed(127, "no such file"),
        ];
        for piece in [1, 4, 5, 7, 4096, usize::MAX] {
            comes_out(&to_guest, piece, |frame, sent| {
                ToGuest::decode(frame).is_ok_and(|come| come == *sent)
            });
            comes_out(&to_host, piece, |frame, sent| {
                ToHost::decode(frame).is_ok_and(|come| come == *sent)
            });
        }
    }

    #[test]
    fn what_is_none_of_them_is_told() {
        let said = |bytes: &[u8]| {
            let mut decoder = Decoder::default();
            decoder.fill(&mut &bytes[..]).unwrap();
            let frame = match decoder.take() {
                Err(error) => return error.to_string(),
                Ok(frame) => frame.unwrap(),
            };
            let (guest, host) = (ToGuest::decode(&frame), ToHost::decode(&frame));
            format!("{} / {}", guest.unwrap_err(), host.unwrap_err())
        };
        assert!(said(&[1, 1, 0, 16, 0]).contains("more than 1048576 is no frame"));
        assert!(said(&[99, 0, 0, 0, 0]).contains("kind 99, which is not known"));
        assert!(said(&[END, 1, 0, 0, 0, 0]).contains("kind 3 with a payload"));
        assert!(said(&[REQUEST, 2, 0, 0, 0, b'{', b'}']).contains("cannot be understood"));
        assert!(said(&[FAILED, 2, 0, 0, 0, 1, 0xff]).contains("no text"));
    }

    proptest! {
        /// Whatever comes, in whatever pieces: it ends, and takes no more room than a frame and a piece.
        #[test]
        fn nothing_takes_more_room_than_a_frame(pieces: Vec<Vec<u8>>) {
            let mut decoder = Decoder::default();
            'all: for piece in &pieces {
                let mut piece = piece.as_slice();
                while !piece.is_empty() {
                    decoder.fill(&mut piece).unwrap();
                    loop {
                        match decoder.take() {
                            Err(_) => break 'all,
                            Ok(None) => break,
                            Ok(Some(frame)) => {
                                let _understood = (ToGuest::decode(&frame).is_ok(), ToHost::decode(&frame).is_ok());
                            }
                        }
                    }
                }
            }
            prop_assert!(decoder.bytes.capacity() < 2 * (PAYLOAD_BYTES_MAX + HEAD_BYTES + DATA_BYTES));
        }
    }
}
