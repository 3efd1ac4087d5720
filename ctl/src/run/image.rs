//! What a disposable guest begins with: an image as it is, or a directory or an archive of files made into one.

use std::fs;
use std::io::{self, Read as _, Seek as _};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::event::{PollFd, PollFlags};
use rustix::process::Pid;
use thiserror::Error;

use super::{last_lines, monitor};
use crate::deadline::wait_ready;
use crate::process::Process;
use crate::runtime_dir::remove_tree;
use crate::signals::Signals;

/// Ends of names of archives that `tar` reads.
const ARCHIVES: [&str; 7] = [
    ".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.zst", ".tar.bz2",
];
/// What a file system needs beside the files, and for what a command writes.
const ROOM_BYTES: u64 = 128 << 20;
/// What is heard at most of why a program has failed.
const SAID_BYTES_MAX: u64 = 1 << 20;
/// A file system with no more room than this is full.
const FULL_BYTES: u64 = 1 << 20;
/// What an image is a whole number of.
const SECTOR_BYTES: u64 = 512;
/// What one more file costs, whatever it holds.
const FILE_BYTES: u64 = 4096 + 512;
/// Inodes beside those of the files.
const SPARE_INODES: u64 = 16 << 10;

/// Why there is no image.
#[derive(Debug, Error)]
pub(crate) enum ImageError {
    #[error("cannot read the image {}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot run {program}, which makes an image of {}: install {package}", path.display())]
    NoProgram {
        program: &'static str,
        package: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "{} is no image: give a file system in a file or block device, a directory, or an archive whose name ends with .tar, \
         .tar.gz, .tgz or the like",
        .0.display()
    )]
    Kind(PathBuf),
    #[error(
        "the image {} has {bytes} bytes, which is no multiple of 512: truncate --size=%512 {}",
        path.display(),
        path.display()
    )]
    Size { path: PathBuf, bytes: u64 },
    #[error("it was interrupted by a signal")]
    Interrupted(i32),
    #[error("{program} has made no image of {}: {said}", path.display())]
    Failed {
        program: &'static str,
        path: PathBuf,
        said: String,
    },
}

/// The path of the image: `given`, or one that is made of it in `place`.
///
/// # Errors
///
/// When it cannot be read, or nothing can be made of it.
pub(super) fn prepare(given: &str, place: &Path, signals: &Signals) -> Result<String, ImageError> {
    if given.contains("://") {
        return Ok(given.to_owned());
    }
    let path = Path::new(given);
    let metadata = fs::metadata(path).map_err(|source| ImageError::Read {
        path: path.to_owned(),
        source,
    })?;
    let is_archive = || ARCHIVES.iter().any(|end| given.ends_with(end));
    let files = if metadata.is_dir() {
        path.to_owned()
    } else if metadata.is_file() && is_archive() {
        let files = place.join("files");
        fs::create_dir(&files).map_err(|source| ImageError::Read {
            path: files.clone(),
            source,
        })?;
        let mut tar = Command::new("tar");
        // A colon in the name is no host.
        tar.args(["--extract", "--force-local"])
            .arg("--numeric-owner")
            .arg("--file")
            .arg(path)
            .arg("--directory")
            .arg(&files);
        done(("tar", "tar"), path, tar, place, signals)?;
        files
    } else if metadata.is_file() {
        // The monitor would say so, but not before a warm snapshot is gone on from.
        let bytes = metadata.len();
        return match bytes > 0 && bytes.is_multiple_of(SECTOR_BYTES) {
            true => Ok(given.to_owned()),
            false if bytes == 0 => Err(ImageError::Kind(path.to_owned())),
            false => Err(ImageError::Size {
                path: path.to_owned(),
                bytes,
            }),
        };
    } else if metadata.file_type().is_block_device() {
        return Ok(given.to_owned());
    } else {
        return Err(ImageError::Kind(path.to_owned()));
    };
    let (bytes, count) = size(&files)?;
    let image = place.join("image.ext4");
    let mut mke2fs = Command::new("mke2fs");
    mke2fs
        .args([
            "-q",
            "-F",
            "-t",
            "ext4",
            "-m",
            "0",
            "-E",
            "root_owner=0:0,lazy_itable_init=1",
        ])
        .arg("-N")
        .arg((count + SPARE_INODES).to_string())
        .arg("-d")
        .arg(&files)
        .arg(&image)
        .arg(format!("{}k", (bytes + bytes / 8 + ROOM_BYTES) >> 10));
    done(("mke2fs", "e2fsprogs"), path, mke2fs, place, signals)?;
    if files != path {
        // The image has them now.
        let _ = remove_tree(&files);
    }
    Ok(image.display().to_string())
}

/// How much room files take, and how many there are.
fn size(files: &Path) -> Result<(u64, u64), ImageError> {
    let (mut bytes, mut count) = (0, 0);
    let mut directories = vec![files.to_owned()];
    while let Some(directory) = directories.pop() {
        let read = |source| ImageError::Read {
            path: directory.clone(),
            source,
        };
        for entry in fs::read_dir(&directory).map_err(read)? {
            let entry = entry.map_err(read)?;
            let metadata = entry.metadata().map_err(read)?;
            bytes += metadata.size() + FILE_BYTES;
            count += 1;
            if metadata.is_dir() {
                directories.push(entry.path());
            }
        }
    }
    Ok((bytes, count))
}

/// Runs a program to its end, or until a signal comes.
fn done(
    (program, package): (&'static str, &'static str),
    path: &Path,
    mut command: Command,
    place: &Path,
    signals: &Signals,
) -> Result<(), ImageError> {
    let no_program = |source| ImageError::NoProgram {
        program,
        package,
        path: path.to_owned(),
        source,
    };
    // In memory: the place may be full.
    let said = rustix::fs::memfd_create("said", rustix::fs::MemfdFlags::CLOEXEC);
    let mut said = fs::File::from(said.map_err(|errno| no_program(errno.into()))?);
    // `mke2fs` is where an ordinary user's PATH may not lead.
    let paths = std::env::var("PATH").unwrap_or_default();
    command
        .env("PATH", format!("{paths}:/usr/sbin:/sbin"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(said.try_clone().map_err(no_program)?);
    monitor::tie(&mut command);
    let mut child = command.spawn().map_err(no_program)?;
    let process = Process::open(Pid::from_child(&child)).map_err(no_program)?;
    let mut watched = [
        PollFd::new(&process, PollFlags::IN),
        PollFd::new(signals, PollFlags::IN),
    ];
    let waited = wait_ready(&mut watched, None);
    if let (Ok(_), Some(signal)) = (&waited, signals.take()) {
        // It is of no use any more, and its group has nobody else.
        let _ = child.kill().and_then(|()| child.wait());
        return Err(ImageError::Interrupted(signal));
    }
    let status = waited.and_then(|_| child.wait()).map_err(no_program)?;
    if status.success() {
        return Ok(());
    }
    let mut text = Vec::new();
    let read = said
        .rewind()
        .and_then(|()| said.take(SAID_BYTES_MAX).read_to_end(&mut text));
    read.map_err(no_program)?;
    let mut said = last_lines(&String::from_utf8_lossy(&text)).join("; ");
    if rustix::fs::statvfs(place).is_ok_and(|found| found.f_bavail * found.f_frsize < FULL_BYTES) {
        let place = place.display();
        said.push_str(&format!(
            "; there is no room left in {place}: set XDG_RUNTIME_DIR to a directory with more"
        ));
    }
    Err(ImageError::Failed {
        program,
        path: path.to_owned(),
        said,
    })
}
