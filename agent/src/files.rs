//! Files and directories as a tar archive, and back.
//!
//! An archive may be hostile. It is unpacked into a directory of its own beside the place that it is for, out of which nothing in
//! it leads, and takes that place by a rename when it is whole: what is there before is as it was, or replaced.

use std::collections::BTreeMap;
use std::fs::{self, File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use tar::{Archive, Builder, Entry, EntryType, Header};
use thiserror::Error;

/// Why files could not be taken along.
#[derive(Debug, Error)]
pub enum FilesError {
    /// It is not there, or cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A socket, a device or the like.
    #[error("{} is neither a file nor a directory nor a link, and is not copied", .0.display())]
    Special(PathBuf),
    /// It grew shorter in the meantime.
    #[error("{} has become shorter while it was copied: try again when nobody writes it", .0.display())]
    Shrunk(PathBuf),
    /// The archive could not be passed on.
    #[error("cannot pass {} on", path.display())]
    Pass {
        /// The file whose turn it was.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There is no directory for it.
    #[error("there is no directory {} to copy into", .0.display())]
    NoDirectory(PathBuf),
    /// It has no name of its own.
    #[error("`{0}` is no name that a copy can have")]
    Name(String),
    /// It must not be replaced.
    #[error("{} is there and is no file that could be replaced: remove it, or name another place", .0.display())]
    InTheWay(PathBuf),
    /// Nothing, or something else, is in the archive.
    #[error("what came has no `{0}` in it")]
    Lacks(String),
    /// An archive that wants to write elsewhere, or has more than files, directories and links.
    #[error("what came has `{}` in it, which is not copied", .0.display())]
    Unwanted(PathBuf),
    /// The archive is damaged, or its place is full.
    #[error("cannot write {}", path.display())]
    Write {
        /// Where to.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What a copy of `path` is called, wherever it goes; links at its end lead to what is copied.
///
/// # Errors
///
/// When there is no such thing, or it has no name, such as `/`.
pub fn name_of(path: &Path) -> Result<String, FilesError> {
    // A name is what was typed; `.` and `..` are asked for theirs.
    let typed = path.file_name().map(ToOwned::to_owned);
    let name = match typed {
        Some(name) => Some(name),
        None => real(path)?.file_name().map(ToOwned::to_owned),
    };
    let name = name.and_then(|name| name.into_string().ok());
    name.ok_or_else(|| FilesError::Name(path.display().to_string()))
}

fn real(path: &Path) -> Result<PathBuf, FilesError> {
    fs::canonicalize(path).map_err(|source| FilesError::Read {
        path: path.to_owned(),
        source,
    })
}

/// Writes an archive of what is at `path`, in which it is called `name`.
///
/// # Errors
///
/// When something cannot be read or passed on, or is of a kind that cannot be copied.
pub fn pack(path: &Path, name: &str, to: impl Write) -> Result<(), FilesError> {
    let mut packer = Packer {
        archive: Builder::new(to),
    };
    packer.take(&real(path)?, Path::new(name))?;
    let pass = |source| FilesError::Pass {
        path: path.to_owned(),
        source,
    };
    let mut to = packer.archive.into_inner().map_err(pass)?;
    to.flush().map_err(pass)
}

struct Packer<W: Write> {
    archive: Builder<W>,
}

impl<W: Write> Packer<W> {
    fn take(&mut self, path: &Path, name: &Path) -> Result<(), FilesError> {
        let read = |source| FilesError::Read {
            path: path.to_owned(),
            source,
        };
        let metadata = fs::symlink_metadata(path).map_err(read)?;
        let kind = metadata.file_type();
        if kind.is_dir() {
            self.append(path, name, &metadata, (EntryType::Directory, 0), io::empty())?;
            let mut names = Vec::new();
            for entry in fs::read_dir(path).map_err(read)? {
                names.push(entry.map_err(read)?.file_name());
            }
            names.sort();
            for entry in names {
                self.take(&path.join(&entry), &name.join(&entry))?;
            }
            Ok(())
        } else if kind.is_file() {
            // What is like a file and never ends, as in /proc, is not waited for.
            let nonblocking = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or_default();
            let file = fs::OpenOptions::new()
                .read(true)
                .custom_flags(nonblocking)
                .open(path);
            let file = file.map_err(read)?;
            // Of this file as it is now: another may have its name since.
            let metadata = file.metadata().map_err(read)?;
            if metadata.len() == 0 {
                // Files of the kernel say so of themselves, and have something.
                let content = all_of(file).map_err(read)?;
                let bytes = u64::try_from(content.len()).unwrap_or_default();
                let size = (EntryType::Regular, bytes);
                return self.append(path, name, &metadata, size, content.as_slice());
            }
            let mut content = Content {
                left: metadata.len(),
                file,
            };
            let size = (EntryType::Regular, metadata.len());
            let appended = self.append(path, name, &metadata, size, &mut content);
            match appended {
                Err(FilesError::Pass { .. }) if content.has_shrunk() => {
                    Err(FilesError::Shrunk(path.to_owned()))
                }
                appended => appended,
            }
        } else if kind.is_symlink() {
            let target = fs::read_link(path).map_err(read)?;
            let mut header = header(&metadata, EntryType::Symlink, 0);
            let appended = self.archive.append_link(&mut header, name, target);
            appended.map_err(|source| FilesError::Pass {
                path: path.to_owned(),
                source,
            })
        } else {
            Err(FilesError::Special(path.to_owned()))
        }
    }

    fn append(
        &mut self,
        path: &Path,
        name: &Path,
        metadata: &Metadata,
        (kind, bytes): (EntryType, u64),
        content: impl Read,
    ) -> Result<(), FilesError> {
        let mut header = header(metadata, kind, bytes);
        let appended = self.archive.append_data(&mut header, name, content);
        appended.map_err(|source| FilesError::Pass {
            path: path.to_owned(),
            source,
        })
    }
}

fn header(metadata: &Metadata, kind: EntryType, bytes: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(bytes);
    header.set_mode(metadata.mode() & 0o777);
    header.set_mtime(u64::try_from(metadata.mtime()).unwrap_or_default());
    header
}

/// What is in a file that says it is empty.
fn all_of(file: File) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    match file.take(UNTOLD_BYTES_MAX + 1).read_to_end(&mut content) {
        Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
        _ => {}
    }
    if u64::try_from(content.len()).unwrap_or(u64::MAX) > UNTOLD_BYTES_MAX {
        return Err(io::Error::other(
            "it does not say how long it is, and is longer than 16 MiB",
        ));
    }
    Ok(content)
}

/// Exactly as many bytes of a file as its header says.
struct Content {
    file: File,
    left: u64,
}

impl Content {
    fn has_shrunk(&self) -> bool {
        self.left > 0 && self.file.metadata().is_ok_and(|now| now.is_file())
    }
}

impl Read for &mut Content {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let room = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let read = self.file.read(buffer.get_mut(..room).unwrap_or_default())?;
        if read == 0 && self.left > 0 && room > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= u64::try_from(read).unwrap_or_default();
        Ok(read)
    }
}

/// Unpacks an archive of a thing called `name` to `path`: into the directory that is there, or as what is not there, or is a
/// file, yet. Reads to the end of what comes, whose failure is one of the archive. Returns where it is now.
///
/// # Errors
///
/// When there is no room, no directory, or no such archive. Then what was there is there as before.
pub fn unpack(from: impl Read, path: &Path, name: &str) -> Result<PathBuf, FilesError> {
    if name.is_empty() || name == "." || name == ".." || name.contains('/') {
        return Err(FilesError::Name(name.to_owned()));
    }
    let is_directory = path.is_dir();
    let target = if is_directory {
        path.join(name)
    } else {
        path.to_owned()
    };
    let parent = match target.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    if !parent.is_dir() || (!is_directory && path.as_os_str().as_encoded_bytes().ends_with(b"/")) {
        return Err(FilesError::NoDirectory(path.to_owned()));
    }
    // What a rename would replace without a word: a directory by itself, and a device or the like by a file.
    match fs::symlink_metadata(&target).map(|metadata| metadata.file_type()) {
        Ok(kind) if !kind.is_file() && !kind.is_symlink() => return Err(FilesError::InTheWay(target)),
        _ => {}
    }
    let write = |source| FilesError::Write {
        path: target.clone(),
        source,
    };
    let draft = tempfile::Builder::new().prefix(".coracle-").tempdir_in(parent);
    let draft = draft.map_err(write)?;
    let mut archive = Archive::new(Plain::new(from));
    archive.set_preserve_mtime(true);
    let mut directories = BTreeMap::new();
    for entry in archive.entries().map_err(write)? {
        let mut entry = entry.map_err(write)?;
        directories.extend(unpack_one(&mut entry, draft.path(), name, &write)?);
    }
    // Who could not go on has ended its archive all the same, and says so behind it.
    io::copy(&mut archive.into_inner(), &mut io::sink()).map_err(write)?;
    let unpacked = draft.path().join(name);
    if fs::symlink_metadata(&unpacked).is_err() {
        return Err(FilesError::Lacks(name.to_owned()));
    }
    // Held until then, to which nobody else can put anything in its place.
    let top = match directories.contains_key(Path::new(name)) {
        true => {
            Some(open_directory(&File::open(draft.path()).map_err(write)?, Path::new(name)).map_err(write)?)
        }
        false => None,
    };
    fs::rename(&unpacked, &target).map_err(write)?;
    // Only now, the inner ones first: nothing can be made or moved in a directory that may not be written.
    if let Some(top) = top {
        for (directory, mode) in directories.iter().rev() {
            let within = directory.strip_prefix(name).unwrap_or(directory);
            let mode = fs::Permissions::from_mode(*mode);
            let set = match within == Path::new("") {
                true => top.set_permissions(mode),
                false => open_directory(&top, within).and_then(|inner| inner.set_permissions(mode)),
            };
            set.map_err(write)?;
        }
    }
    Ok(target)
}

/// A directory, and the mode that it is to have when all is in it.
fn unpack_one(
    entry: &mut Entry<'_, impl Read>,
    draft: &Path,
    name: &str,
    write: &impl Fn(io::Error) -> FilesError,
) -> Result<Option<(PathBuf, u32)>, FilesError> {
    let path = entry.path().map_err(write)?.into_owned();
    let mut steps = path.components();
    let is_within = steps.next() == Some(Component::Normal(name.as_ref()))
        && steps.all(|step| matches!(step, Component::Normal(_)));
    if !is_within {
        return Err(FilesError::Unwanted(path));
    }
    if !entry.header().entry_type().is_dir() {
        return match entry.unpack_in(draft).map_err(write)? {
            true => Ok(None),
            false => Err(FilesError::Unwanted(path)),
        };
    }
    let path: PathBuf = path.components().collect();
    let mode = entry.header().mode().map_err(write)? & 0o777;
    make_directory(draft, &path).map_err(write)?;
    Ok(Some((path, mode)))
}

/// Makes a directory below `draft`, to which no link leads, unless it is there.
fn make_directory(draft: &Path, directory: &Path) -> io::Result<()> {
    let mut within = File::open(draft)?;
    if let Some(parent) = directory.parent().filter(|parent| *parent != Path::new("")) {
        within = open_directory(&within, parent)?;
    }
    let name = directory.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    match rustix::fs::mkdirat(&within, name, Mode::RWXU) {
        Ok(()) => Ok(()),
        Err(Errno::EXIST) => open_directory(&within, Path::new(name)).map(drop),
        Err(errno) => Err(errno.into()),
    }
}

/// A directory below another, to which no link leads.
fn open_directory(within: &File, directory: &Path) -> io::Result<File> {
    let opened = rustix::fs::openat2(
        within,
        directory,
        OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS,
    )?;
    Ok(File::from(opened))
}

/// An archive as it comes, as long as it has nothing in it but files, directories and links, and names of a bearable length: the
/// library reads a name of any length into memory, and there are headers that mean another length than they say.
struct Plain<R> {
    from: R,
    /// What is left of the header that was read last.
    header: Vec<u8>,
    /// What is left of the content behind it.
    content: u64,
    /// No header comes any more.
    is_over: bool,
}

/// A path of the longest that Linux takes.
const NAME_BYTES_MAX: u64 = 4096 + 1;
const BLOCK_BYTES: u64 = 512;
/// How much is taken of a file that says it is empty.
const UNTOLD_BYTES_MAX: u64 = 16 << 20;

impl<R: Read> Plain<R> {
    fn new(from: R) -> Self {
        Self {
            from,
            header: Vec::new(),
            content: 0,
            is_over: false,
        }
    }

    /// Reads a header, and looks at it.
    fn next(&mut self) -> io::Result<()> {
        let mut block = Vec::new();
        let read = (&mut self.from).take(BLOCK_BYTES).read_to_end(&mut block)?;
        if (read as u64) < BLOCK_BYTES || block.iter().all(|byte| *byte == 0) {
            // The end; or it is cut off, which the reader tells.
            self.is_over = true;
            self.header = block;
            return Ok(());
        }
        let header = Header::from_byte_slice(&block);
        let bytes = header.entry_size()?;
        let kind = header.entry_type();
        let is_name = kind.is_gnu_longname() || kind.is_gnu_longlink();
        let is_plain = kind.is_file() || kind.is_dir() || kind.is_symlink() || kind.is_hard_link();
        if !(is_plain || is_name && bytes <= NAME_BYTES_MAX) {
            let what = format!(
                "there is something in it that is neither a file nor a directory nor a link (kind {:#x})",
                kind.as_byte()
            );
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        self.content = bytes
            .checked_next_multiple_of(BLOCK_BYTES)
            .ok_or(io::ErrorKind::InvalidData)?;
        self.header = block;
        Ok(())
    }
}

impl<R: Read> Read for Plain<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.header.is_empty() && self.content == 0 && !self.is_over {
            self.next()?;
        }
        if !self.header.is_empty() {
            let read = self.header.as_slice().read(buffer)?;
            self.header.drain(..read);
            return Ok(read);
        }
        if self.is_over {
            return self.from.read(buffer);
        }
        let room = usize::try_from(self.content)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let read = self.from.read(buffer.get_mut(..room).unwrap_or_default())?;
        self.content -= u64::try_from(read).unwrap_or_default();
        self.is_over |= read == 0 && room > 0;
        Ok(read)
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    use super::*;

    fn packed(path: &Path, name: &str) -> Result<Vec<u8>, FilesError> {
        let mut archive = Vec::new();
        pack(path, name, &mut archive).map(|()| archive)
    }

    #[test]
    fn a_tree_comes_out_as_it_went_in() {
        let place = tempfile::tempdir().unwrap();
        let from = place.path().join("from");
        fs::create_dir_all(from.join("closed/empty")).unwrap();
        fs::write(from.join("script"), "#!/bin/sh\n").unwrap();
        fs::set_permissions(from.join("script"), fs::Permissions::from_mode(0o750)).unwrap();
        fs::write(from.join("closed/large"), vec![5; 1 << 20]).unwrap();
        symlink("../nowhere", from.join("link")).unwrap();
        fs::set_permissions(from.join("closed"), fs::Permissions::from_mode(0o500)).unwrap();
        fs::set_permissions(&from, fs::Permissions::from_mode(0o555)).unwrap();
        let archive = packed(&from, "from").unwrap();

        let to = place.path().join("to");
        fs::create_dir(&to).unwrap();
        // Into a directory; and as what is not there yet.
        for (path, lands_at) in [
            (to.clone(), to.join("from")),
            (to.join("other"), to.join("other")),
        ] {
            assert_eq!(unpack(archive.as_slice(), &path, "from").unwrap(), lands_at);
            let mode = |name: &str| fs::metadata(lands_at.join(name)).unwrap().mode() & 0o7777;
            assert_eq!((mode("script"), mode("closed"), mode(".")), (0o750, 0o500, 0o555));
            assert_eq!(fs::read(lands_at.join("closed/large")).unwrap(), vec![5; 1 << 20]);
            assert!(lands_at.join("closed/empty").is_dir());
            assert_eq!(
                fs::read_link(lands_at.join("link")).unwrap(),
                Path::new("../nowhere")
            );
        }
        let again = unpack(archive.as_slice(), &to, "from");
        assert!(matches!(again, Err(FilesError::InTheWay(_))), "{again:?}");
        // A directory is no file's successor, and a file is replaced.
        fs::write(to.join("file"), "before").unwrap();
        assert!(unpack(archive.as_slice(), &to.join("file"), "from").is_err());
        assert_eq!(fs::read(to.join("file")).unwrap(), b"before");
        let script = packed(&from.join("script"), "script").unwrap();
        unpack(script.as_slice(), &to.join("file"), "script").unwrap();
        assert_eq!(fs::read(to.join("file")).unwrap(), b"#!/bin/sh\n");
        // What is no file is not replaced by one.
        let device = to.join("device");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &device,
            rustix::fs::FileType::Fifo,
            Mode::RUSR,
            0,
        )
        .unwrap();
        let replaced = unpack(script.as_slice(), &device, "script");
        assert!(matches!(replaced, Err(FilesError::InTheWay(_))), "{replaced:?}");
        fs::remove_file(device).unwrap();
        let left: Vec<_> = fs::read_dir(&to)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(left.len(), 3, "{left:?}");
    }

    /// Who sends has something else to say.
    struct Broken;

    impl Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::ErrorKind::ConnectionReset.into())
        }
    }

    #[test]
    fn what_cannot_be_copied_is_told() {
        let place = tempfile::tempdir().unwrap();
        let path = |name: &str| place.path().join(name);
        let _socket = UnixListener::bind(path("socket")).unwrap();
        assert!(matches!(packed(place.path(), "x"), Err(FilesError::Special(_))));
        assert!(matches!(packed(&path("none"), "x"), Err(FilesError::Read { .. })));
        fs::write(path("file"), "content").unwrap();
        let archive = packed(&path("file"), "file").unwrap();
        let failed = |to: &str, name: &str| unpack(archive.as_slice(), &path(to), name).unwrap_err();
        assert!(matches!(failed("no/where", "file"), FilesError::NoDirectory(_)));
        assert!(matches!(failed("copy/", "file"), FilesError::NoDirectory(_)));
        assert!(matches!(failed("copy", "other"), FilesError::Unwanted(_)));
        let empty = unpack([0; 1024].as_slice(), &path("copy"), "file");
        assert!(matches!(empty, Err(FilesError::Lacks(_))), "{empty:?}");
        assert!(matches!(failed("copy", "../file"), FilesError::Name(_)));
        let cut = archive.get(..600).unwrap();
        assert!(matches!(
            unpack(cut, &path("copy"), "file"),
            Err(FilesError::Write { .. })
        ));
        let broken = archive.as_slice().chain(Broken);
        assert!(matches!(
            unpack(broken, &path("copy"), "file"),
            Err(FilesError::Write { .. })
        ));
        assert!(!path("copy").exists());
        assert!(name_of(Path::new("/etc/..")).is_err());
        assert_eq!(name_of(&path("file/")).unwrap(), "file");
    }

    #[test]
    fn an_archive_that_leads_elsewhere_is_refused() {
        let place = tempfile::tempdir().unwrap();
        let outside = place.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("secret"), "secret").unwrap();
        fs::set_permissions(&outside, fs::Permissions::from_mode(0o755)).unwrap();
        let to = place.path().join("to");
        fs::create_dir(&to).unwrap();
        let entry =
            |archive: &mut Builder<Vec<u8>>, kind: EntryType, name: &str, link: &str, content: &str| {
                let mut header = Header::new_gnu();
                header.set_entry_type(kind);
                header.set_mode(0o4777);
                header.set_size(content.len() as u64);
                // As it is: the library's own writer refuses what leads elsewhere.
                let field = &mut header.as_old_mut().name;
                field
                    .get_mut(..name.len())
                    .unwrap()
                    .copy_from_slice(name.as_bytes());
                let field = &mut header.as_old_mut().linkname;
                field
                    .get_mut(..link.len())
                    .unwrap()
                    .copy_from_slice(link.as_bytes());
                header.set_cksum();
                archive.append(&header, content.as_bytes()).unwrap();
            };
        let refused = |entries: &[(EntryType, &str, &str, &str)]| {
            let mut archive = Builder::new(Vec::new());
            for (kind, name, link, content) in entries {
                entry(&mut archive, *kind, name, link, content);
            }
            let archive = archive.into_inner().unwrap();
            unpack(archive.as_slice(), &to, "x").is_err()
        };
        let file = EntryType::Regular;
        assert!(refused(&[(file, "../outside/a", "", "a")]));
        assert!(refused(&[
            (EntryType::Symlink, "x", "../../outside", ""),
            (file, "x/a", "", "a")
        ]));
        assert!(refused(&[
            (EntryType::Symlink, "x", "../../outside", ""),
            (EntryType::Directory, "x", "", "")
        ]));
        assert!(refused(&[(EntryType::Link, "x", "../../outside/secret", "")]));
        assert!(refused(&[(EntryType::Char, "x", "", "")]));
        assert!(refused(&[(EntryType::Fifo, "x", "", "")]));
        assert!(refused(&[
            (EntryType::Directory, "./", "", ""),
            (file, "x", "", "a")
        ]));
        assert!(refused(&[(file, "y", "", "a"), (file, "x", "", "a")]));
        assert!(refused(&[
            (EntryType::XHeader, "x", "", "30 size=1\n"),
            (file, "x", "", "a")
        ]));
        // A name without end.
        let long = "y".repeat(5000);
        assert!(refused(&[
            (EntryType::GNULongName, "x", "", &long),
            (file, "x", "", "a")
        ]));
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
        assert_eq!(fs::metadata(&outside).unwrap().mode() & 0o7777, 0o755);
        assert_eq!(fs::read_dir(&to).unwrap().count(), 0);
    }
}
