//! `coraclectl cp`: files into a guest, and out of it.

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::Args;
use coracle_agent::files::{self, FilesError};
use coracle_agent::wire::{DATA_BYTES, Request, ToGuest, ToHost};
use serde_json::json;
use thiserror::Error;

use super::link::{Link, LinkArgs, LinkError};
use crate::disk::Progress;
use crate::output::{Format, OutputError, path_text, print_json};
use crate::signals::{Signals, SignalsError};

/// Copy files or directories into a guest, or out of it
///
/// The guest has to run coracle-agent, and the machine to have a vsock device. One of the two paths is the guest's: VM:PATH, or
/// :PATH with --vm. Into a directory that is there, a copy goes by its name; a file that is there is replaced when all of a copy
/// has come; a directory that is there is not.
#[derive(Debug, Args)]
#[command(after_help = "\
  coraclectl cp ./build web:/srv/build
  coraclectl cp web:/var/log/messages .")]
pub(crate) struct CopyArgs {
    #[command(flatten)]
    link: LinkArgs,
    /// The machine of a path that begins with a colon: its name, or the path of its API socket
    #[arg(long, value_name = "VM")]
    vm: Option<String>,
    /// What is copied
    from: Place,
    /// Where to
    to: Place,
}

/// A path, and whose.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    /// Of this host.
    Here(PathBuf),
    /// Of a guest; without a name, of that which --vm names.
    There { vm: Option<String>, path: String },
}

impl FromStr for Place {
    type Err = std::convert::Infallible;

    /// A path of this host with a colon in it begins with `/` or `.`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let here = || Self::Here(PathBuf::from(text));
        if text.starts_with(['/', '.']) {
            return Ok(here());
        }
        Ok(match text.split_once(':') {
            Some((vm, path)) => Self::There {
                vm: (!vm.is_empty()).then(|| vm.to_owned()),
                path: path.to_owned(),
            },
            None => here(),
        })
    }
}

/// Why nothing was copied.
#[derive(Debug, Error)]
pub(crate) enum CopyError {
    #[error(
        "one of the two paths is the guest's, as in `coraclectl cp file web:/tmp`: begin a path of this host with / or ./"
    )]
    Places,
    #[error("which machine? Name it before the colon, or with --vm")]
    NoMachine,
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Signals(#[from] SignalsError),
    #[error(transparent)]
    Files(#[from] FilesError),
    #[error("the guest's agent: {0}")]
    Refused(String),
    #[error("the guest's agent has ended the copy in its middle")]
    OutOfTurn,
    #[error(transparent)]
    Output(#[from] OutputError),
}

/// Copies, and says what there is now, to programs.
///
/// # Errors
///
/// When it cannot be done. Then what was there is there as before.
pub(crate) fn copy(args: &CopyArgs, format: Format) -> Result<(), CopyError> {
    let signals = Signals::watch()?;
    let open = |vm: &Option<String>| {
        let vm = vm.as_ref().or(args.vm.as_ref()).ok_or(CopyError::NoMachine)?;
        Ok::<Link, CopyError>(Link::open(vm, &args.link, &signals)?)
    };
    let (copied, bytes) = match (&args.from, &args.to) {
        (Place::Here(from), Place::There { vm, path }) => {
            let name = files::name_of(from)?;
            // What is not there needs no guest.
            from.metadata().map_err(|source| FilesError::Read {
                path: from.clone(),
                source,
            })?;
            bring(open(vm)?, &signals, from, path, &name)?
        }
        (Place::There { vm, path }, Place::Here(to)) => {
            let name = Path::new(path).file_name().and_then(|name| name.to_str());
            let name = name.ok_or_else(|| FilesError::Name(path.clone()))?;
            fetch(open(vm)?, &signals, path, to, name)?
        }
        _ => return Err(CopyError::Places),
    };
    if format == Format::Json {
        print_json(&json!({ "copied": copied, "bytes": bytes }))?;
    }
    Ok(())
}

fn bring(
    link: Link,
    signals: &Signals,
    from: &Path,
    to: &str,
    name: &str,
) -> Result<(String, u64), CopyError> {
    let request = Request::Bring {
        path: to.to_owned(),
        name: name.to_owned(),
    };
    link.send(&ToGuest::Request(request), signals)?;
    let mut sent = Sent {
        link,
        signals,
        bytes: 0,
        progress: Progress::of_bytes("copying"),
        ended: None,
    };
    let packed = files::pack(from, name, io::BufWriter::with_capacity(DATA_BYTES, &mut sent));
    if let Some(ended) = sent.ended.take() {
        return Err(ended);
    }
    packed?;
    sent.link.send(&ToGuest::End, signals)?;
    loop {
        match sent.link.take()? {
            Some(ToHost::End) => return Ok((to.to_owned(), sent.bytes)),
            Some(ToHost::Started) => {}
            Some(message) => return Err(ended_by(&message)),
            None => sent.link.listen(signals)?,
        }
    }
}

/// What a message means that ends a copy.
fn ended_by(message: &ToHost<'_>) -> CopyError {
    match message {
        ToHost::Failed(_, why) => CopyError::Refused((*why).to_owned()),
        _ => CopyError::OutOfTurn,
    }
}

/// What is written here goes to the agent, unless that has something to say.
struct Sent<'a> {
    link: Link,
    signals: &'a Signals,
    bytes: u64,
    progress: Progress,
    ended: Option<CopyError>,
}

impl Sent<'_> {
    fn pass(&mut self, piece: &[u8]) -> Result<(), CopyError> {
        if self.ended.is_some() {
            return Err(LinkError::Closed.into());
        }
        if let Some(signal) = self.signals.take() {
            return Err(LinkError::Interrupted(signal).into());
        }
        while self.link.has_more().map_err(LinkError::from)? {
            self.link.fill()?;
            while let Some(message) = self.link.take()? {
                if message != ToHost::Started {
                    return Err(ended_by(&message));
                }
            }
        }
        Ok(self.link.send(&ToGuest::Data(piece), self.signals)?)
    }
}

impl Write for &mut Sent<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let piece = bytes.get(..bytes.len().min(DATA_BYTES)).unwrap_or_default();
        if let Err(error) = self.pass(piece) {
            // What is written after that, as when the archive is dropped, is told nothing new.
            self.ended.get_or_insert(error);
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let more = u64::try_from(piece.len()).unwrap_or_default();
        self.bytes += more;
        self.progress.add(more);
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Fetches what is at `from` in the guest, which is called `name`; returns where it is now, and how many bytes came.
///
/// # Errors
///
/// When it is not there, or has no place here.
pub(crate) fn fetch(
    link: Link,
    signals: &Signals,
    from: &str,
    to: &Path,
    name: &str,
) -> Result<(String, u64), CopyError> {
    let request = Request::Fetch {
        path: from.to_owned(),
        name: name.to_owned(),
    };
    link.send(&ToGuest::Request(request), signals)?;
    let mut come = Come {
        link,
        signals,
        left: Vec::new(),
        bytes: 0,
        progress: Progress::of_bytes("copying"),
        is_over: false,
        ended: None,
    };
    let unpacked = files::unpack(&mut come, to, name);
    if let Some(ended) = come.ended.take() {
        return Err(ended);
    }
    Ok((path_text(&unpacked?), come.bytes))
}

/// An archive that comes from the agent.
struct Come<'a> {
    link: Link,
    signals: &'a Signals,
    left: Vec<u8>,
    bytes: u64,
    progress: Progress,
    is_over: bool,
    ended: Option<CopyError>,
}

impl Come<'_> {
    fn listen(&mut self) -> Result<(), CopyError> {
        let more = match self.link.take()? {
            Some(ToHost::Data(bytes)) => {
                self.left.extend(bytes);
                bytes.len()
            }
            Some(ToHost::End) => {
                self.is_over = true;
                0
            }
            Some(ToHost::Started) => 0,
            Some(message) => return Err(ended_by(&message)),
            None => {
                self.link.listen(self.signals)?;
                0
            }
        };
        let more = u64::try_from(more).unwrap_or_default();
        self.bytes += more;
        self.progress.add(more);
        Ok(())
    }
}

impl Read for Come<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.left.is_empty() && !self.is_over {
            if let Err(error) = self.listen() {
                self.ended = Some(error);
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        let read = self.left.as_slice().read(buffer)?;
        self.left.drain(..read);
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_of_the_guest_that_stands_before_its_colon() {
        let place = |text: &str| text.parse::<Place>().unwrap_or_else(|never| match never {});
        let there = |vm: Option<&str>, path: &str| Place::There {
            vm: vm.map(ToOwned::to_owned),
            path: path.to_owned(),
        };
        assert_eq!(place("web:/a:b"), there(Some("web"), "/a:b"));
        assert_eq!(place(":a"), there(None, "a"));
        for here in ["a", "/a:b", "./a:b", "../a:b", "."] {
            assert_eq!(place(here), Place::Here(PathBuf::from(here)));
        }
    }
}
