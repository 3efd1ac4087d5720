//! An overlay file that somebody else has written, and requests to the image in it. An input is the file's
//! headers (as they are, or numbers of one whose checksum is right), some of its bitmap, and requests.

use std::fs::File;
use std::os::unix::fs::FileExt;

use coracle_storage::backend::Access;
use coracle_storage::blocking::Blocking;
use coracle_storage::lease::{Lock, Owner, Terms};
use coracle_storage::open::open;
use coracle_storage::overlay::file::OverlayFile;
use coracle_storage::overlay::format::{
    BITMAP_OFFSET_BYTES, BaseIdentity, DATA_OFFSET_BYTES, HEADER_BYTES, Header, State,
};
use coracle_storage::overlay::{Lifetime, Overlay};
use rustix::fs::{MemfdFlags, memfd_create};

use super::Input;

const BASE_BYTES: u64 = 64 << 10;
/// What is done with one image at most, and how much memory one request has.
const REQUESTS_MAX: usize = 16;
const TRANSFER_BYTES_MAX: usize = 64 << 10;

pub(crate) fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let file = memfd();
    let size_bytes = write_headers(&file, &mut input);
    let bits = u64::from(input.u16()) * 8;
    file.write_all_at(input.take(64), BITMAP_OFFSET_BYTES + bits)
        .expect("a memfd takes a few bytes");
    // As long as it says, or not.
    let len_bytes = DATA_OFFSET_BYTES.saturating_add(size_bytes & u64::from(input.u8()).wrapping_sub(1));
    if file.set_len(len_bytes).is_err() {
        return;
    }
    let Ok(file) = OverlayFile::of(file, "fuzz") else {
        return;
    };
    let bits = file
        .read_bits()
        .expect("a memfd can be read as far as it reaches");
    // Whoever opens it has compared the base with what the header says.
    if file.header().base.size_bytes != BASE_BYTES {
        return;
    }
    let base = memfd();
    base.set_len(BASE_BYTES).expect("a memfd can be sparse");
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&base));
    let owner = Owner::of_this_process("fuzz");
    let terms = Terms::new(Lock::None, &owner);
    let base = open(&path, Access::ReadOnly, &terms).expect("the base is an image");
    let (file, header) = file.into_parts();
    let overlay = Overlay::new(base.backend, file, header, &bits, Lifetime::Kept);
    let mut image = Blocking::new(Box::new(overlay)).expect("an overlay has two files");
    for _ in 0..REQUESTS_MAX {
        if input.is_empty() {
            break;
        }
        request(&mut image, &mut input);
    }
}

fn request(image: &mut Blocking, input: &mut Input<'_>) {
    let size_bytes = image.geometry().size_bytes;
    let operation = input.u8();
    let offset_bytes = input.u64() % (size_bytes + 2);
    let len = usize::from(input.u16());
    match operation % 6 {
        0 => drop(image.read_at(offset_bytes, &mut vec![0; len])),
        1 => {
            let written = vec![operation; len.min(TRANSFER_BYTES_MAX)];
            if image.write_at(offset_bytes, &written).is_ok() {
                let mut read = vec![0; written.len()];
                image
                    .read_at(offset_bytes, &mut read)
                    .expect("what could be written can be read");
                assert_eq!(read, written, "at {offset_bytes}");
            }
        }
        2 => drop(image.zero_at(offset_bytes, len as u64)),
        3 => drop(image.zero_at(offset_bytes, input.u64() % (size_bytes + 2))),
        4 => drop(image.flush()),
        _ => drop(image.grow(offset_bytes.wrapping_add(input.u64()))),
    }
    assert!(image.geometry().size_bytes >= size_bytes, "an image only grows");
}

/// Writes one header or two; returns the size that the last one says.
fn write_headers(file: &File, input: &mut Input<'_>) -> u64 {
    let write = |bytes: &[u8], offset_bytes| {
        file.write_all_at(bytes, offset_bytes)
            .expect("a memfd takes a few bytes");
    };
    let kind = input.u8();
    if kind == 0 {
        write(input.take(2 * HEADER_BYTES), 0);
        return u64::from(input.u16());
    }
    let mut size_bytes = 0;
    for _ in 0..1 + kind % 2 {
        // Numbers that are nearly right are the interesting ones.
        let sectors = input.u64() >> (input.u8() % 64);
        size_bytes = sectors.wrapping_mul(512);
        let path = input.take(16);
        let header = Header {
            sequence: u64::from(input.u8()).wrapping_sub(1),
            size_bytes,
            cluster_bytes: 1_u64.checked_shl(input.u8().into()).unwrap_or(3),
            base_shown_bytes: u64::from(input.u16()) * 512 % (BASE_BYTES + 1024),
            base: BaseIdentity {
                path: String::from_utf8_lossy(path).into_owned(),
                size_bytes: match input.u8() {
                    0 => input.u64(),
                    _ => BASE_BYTES,
                },
                fingerprint: 0,
            },
            state: State::Usable,
        };
        let mut bytes = header.encode().expect("the path is short");
        if kind & 4 != 0
            && let Some(byte) = bytes.get_mut(usize::from(input.u16()))
        {
            *byte ^= input.u8();
        }
        write(&bytes, header.offset_bytes());
    }
    size_bytes
}

fn memfd() -> File {
    memfd_create("fuzz", MemfdFlags::CLOEXEC)
        .expect("a descriptor is free: none leaks")
        .into()
}
