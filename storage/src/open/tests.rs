#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

use super::*;
use crate::lease::Owner;

fn opened(path: &str, access: Access) -> Result<Image, OpenError> {
    let owner = Owner::of_this_process("vm");
    let lock = match access {
        Access::ReadOnly => Lock::Shared,
        Access::ReadWrite => Lock::Exclusive,
    };
    open(path, access, &Terms::new(lock, &owner))
}

fn refused(path: &str) -> OpenError {
    opened(path, Access::ReadWrite)
        .err()
        .expect("the image is refused")
}

fn file_of(size_bytes: u64) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(size_bytes).unwrap();
    file
}

fn path_of(file: &tempfile::NamedTempFile) -> &str {
    file.path().to_str().unwrap()
}

#[test]
fn a_file_of_whole_sectors_is_opened_with_its_size() {
    let file = file_of(3 * 512);
    let image = opened(path_of(&file), Access::ReadOnly).unwrap().backend;
    assert_eq!(image.geometry().size_bytes, 3 * 512);
    assert_eq!(image.geometry().access, Access::ReadOnly);
}

#[test]
fn an_image_smaller_than_a_sector_is_refused_with_the_remedy() {
    let file = file_of(511);
    let error = refused(path_of(&file));
    assert!(matches!(error, OpenError::TooSmall { size_bytes: 511, .. }));
    assert!(error.to_string().contains("truncate -s 64M"));
}

#[test]
fn an_image_with_part_of_a_sector_at_its_end_is_refused_with_the_remedy() {
    let file = file_of(513);
    let error = refused(path_of(&file));
    assert!(matches!(error, OpenError::PartialSector { size_bytes: 513, .. }));
    assert!(
        error
            .to_string()
            .contains(&format!("truncate -s %512 {}", path_of(&file)))
    );
}

#[test]
fn a_url_says_that_its_scheme_is_not_built_in() {
    let url = "nbd://server/a.img";
    let error = refused(url);
    assert!(matches!(error, OpenError::Scheme { .. }), "{error}");
    assert!(error.to_string().contains(url));
    assert!(matches!(refused("/tmp/odd://name"), OpenError::Missing { .. }));
}

#[test]
fn what_is_no_image_is_refused_by_what_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().to_str().unwrap();
    assert!(matches!(
        refused(path),
        OpenError::NotAnImage {
            kind: "a directory",
            ..
        }
    ));
    let fifo = directory.path().join("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        0,
    )
    .unwrap();
    assert!(matches!(
        refused(fifo.to_str().unwrap()),
        OpenError::NotAnImage { kind: "a FIFO", .. }
    ));
    assert!(matches!(
        refused("/dev/null"),
        OpenError::NotAnImage {
            kind: "a character device",
            ..
        }
    ));
    assert!(matches!(
        refused(&format!("{path}/absent")),
        OpenError::Missing { .. }
    ));
}

#[test]
fn an_opened_image_may_block_so_that_io_uring_hands_slow_operations_over() {
    let file = file_of(512);
    let image = opened(path_of(&file), Access::ReadWrite).unwrap().backend;
    let fd = image.files().first().unwrap().fd;
    let flags = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap();
    let flags = flags
        .lines()
        .find_map(|line| line.strip_prefix("flags:"))
        .unwrap();
    let flags = i32::from_str_radix(flags.trim(), 8).unwrap();
    assert_eq!(flags & libc::O_NONBLOCK, 0);
}
