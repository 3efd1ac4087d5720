//! What a disposable guest begins with: an image as it is, or a directory or an archive of files made into one.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
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
        tar.arg("--extract")
            .arg("--numeric-owner")
            .arg("--file")
            .arg(path)
            .arg("--directory")
            .arg(&files);
        done(("tar", "tar"), path, tar, place, signals)?;
        files
    } else {
        return Ok(given.to_owned());
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
    let said = place.join("said");
    // `mke2fs` is where an ordinary user's PATH may not lead.
    let paths = std::env::var("PATH").unwrap_or_default();
    command
        .env("PATH", format!("{paths}:/usr/sbin:/sbin"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(fs::File::create(&said).map_err(no_program)?);
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
    let said = fs::read_to_string(&said).unwrap_or_default();
    Err(ImageError::Failed {
        program,
        path: path.to_owned(),
        said: last_lines(&said).join("; "),
    })
}
