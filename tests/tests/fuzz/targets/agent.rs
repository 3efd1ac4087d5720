//! What a guest's agent says to its host, what a host says to an agent, and the archives that both unpack.

use coracle_agent::files;
use coracle_agent::wire::{Decoder, ToGuest, ToHost};

/// Frames, in pieces whose length the first byte says.
pub(crate) fn run_frames(data: &[u8]) {
    let Some((piece, mut data)) = data.split_first() else {
        return;
    };
    let mut decoder = Decoder::default();
    while !data.is_empty() {
        let (mut now, later) = data.split_at(data.len().min(usize::from(*piece).max(1)));
        data = later;
        while !now.is_empty() {
            decoder.fill(&mut now).expect("memory is read without an error");
            loop {
                match decoder.take() {
                    Err(_) => return,
                    Ok(None) => break,
                    Ok(Some(frame)) => {
                        let _understood = (ToGuest::decode(&frame).is_ok(), ToHost::decode(&frame).is_ok());
                    }
                }
            }
        }
    }
}

/// An archive, beside which nothing may be made or changed.
pub(crate) fn run_archive(data: &[u8]) {
    let place = tempfile::tempdir().expect("a directory can be made");
    let to = place.path().join("to");
    std::fs::create_dir(&to).expect("a directory can be made");
    let unpacked = files::unpack(data, &to.join("x"), "x");
    let left = |path| std::fs::read_dir(path).expect("it can be listed").count();
    assert_eq!(left(place.path()), 1, "something was made outside");
    assert_eq!(left(&to), usize::from(unpacked.is_ok()), "something is left");
}
