//! Random bytes from the host's kernel.
#![expect(unsafe_code, reason = "getrandom is a plain system call")]

use std::io;

/// Fills all of `bytes` from the kernel's generator.
///
/// # Errors
///
/// When the kernel refuses, which only a seccomp filter without getrandom does.
pub fn fill(bytes: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
        // SAFETY: the pointer and the length are those of one exclusive slice.
        let count = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        match usize::try_from(count) {
            Ok(count) => done += count,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use super::*;

    #[test]
    fn the_whole_slice_is_filled_differently_each_time() {
        let (mut first, mut second) = ([0; 64], [0; 64]);
        fill(&mut first).unwrap();
        fill(&mut second).unwrap();
        assert_ne!(first, second);
        assert_ne!(first[48..], [0; 16]);
    }
}
