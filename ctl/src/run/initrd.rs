//! An initial RAM disk with one program in it, as the kernel unpacks it (initramfs, `newc`).

use std::io::{self, Write};

const DIRECTORY: u32 = 0o040_755;
const DEVICE: u32 = 0o020_600;
const PROGRAM: u32 = 0o100_755;
/// The kernel reads a file in words of four bytes.
const ALIGNMENT: usize = 4;

/// Writes an archive in which `program` is `/init`.
///
/// # Errors
///
/// What `to` says, or when the program is too long for such an archive.
pub(super) fn write(program: &[u8], to: &mut impl Write) -> io::Result<()> {
    let file = |name, mode, device| File { name, mode, device };
    // A program begins with its standard input, output and error, or with /dev/null in their place.
    let files = [
        file("dev", DIRECTORY, (0, 0)),
        file("dev/console", DEVICE, (5, 1)),
        file("dev/null", DEVICE, (1, 3)),
        file("proc", DIRECTORY, (0, 0)),
        file("sys", DIRECTORY, (0, 0)),
    ];
    for (file, inode) in files.iter().zip(2..) {
        entry(inode, file, &[], to)?;
    }
    entry(1, &file("init", PROGRAM, (0, 0)), program, to)?;
    entry(0, &file("TRAILER!!!", 0, (0, 0)), &[], to)
}

struct File {
    name: &'static str,
    mode: u32,
    device: (u32, u32),
}

fn entry(inode: u32, file: &File, content: &[u8], to: &mut impl Write) -> io::Result<()> {
    let File { name, mode, device } = *file;
    let too_long = |_| io::Error::from(io::ErrorKind::FileTooLarge);
    let size = u32::try_from(content.len()).map_err(too_long)?;
    let name_bytes = u32::try_from(name.len() + 1).map_err(too_long)?;
    // Magic, then inode, mode, uid, gid, links, mtime, size, device and its own two numbers, length of the name, checksum.
    let fields = [
        inode, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name_bytes, 0,
    ];
    let mut head = String::from("070701");
    for field in fields {
        head.push_str(&format!("{field:08X}"));
    }
    head.push_str(name);
    head.push('\0');
    to.write_all(head.as_bytes())?;
    pad(head.len(), to)?;
    to.write_all(content)?;
    pad(content.len(), to)
}

fn pad(after: usize, to: &mut impl Write) -> io::Result<()> {
    let short = after.next_multiple_of(ALIGNMENT) - after;
    to.write_all([0; ALIGNMENT].get(..short).unwrap_or_default())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use super::*;

    #[test]
    fn entries_begin_at_multiples_of_four_and_say_their_sizes() {
        let mut archive = Vec::new();
        write(b"program", &mut archive).unwrap();
        assert_eq!(archive.len() % 4, 0);
        let text = String::from_utf8(archive).unwrap();
        let starts: Vec<usize> = text.match_indices("070701").map(|(at, _)| at).collect();
        assert_eq!(starts.len(), 7);
        assert!(starts.iter().all(|at| at % 4 == 0), "{starts:?}");
        let init = starts.get(5).map(|at| &text[*at..]).unwrap();
        assert_eq!(&init[14..22], "000081ED");
        assert_eq!(&init[54..62], "00000007");
        assert_eq!(&init[110..115], "init\0");
        assert_eq!(&init[116..124], "program\0");
        let console = starts.get(1).map(|at| &text[*at..]).unwrap();
        assert_eq!(&console[78..94], "0000000500000001");
        assert!(text.contains("TRAILER!!!"));
    }
}
