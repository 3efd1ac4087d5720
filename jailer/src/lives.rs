//! What one life of a monitor leaves to the next: which it was, so that the next one has its leases.
//!
//! A monitor that finds `CORACLE_INCARNATION_FD` in its environment writes there who it is in the records of its leases, 32 hex
//! digits, and closes it. Once it has ended for certain, the next one finds that in `CORACLE_REAPED`, after those before it, and
//! may take what is recorded as theirs. A program that knows neither goes on as without.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsRawFd as _, OwnedFd};

use rustix::fs::OFlags;
use rustix::io::FdFlags;
use rustix::pipe::{PipeFlags, pipe_with};

/// Hex digits of an incarnation.
const DIGITS: usize = 32;
/// So many lives are remembered; one may have ended before it had a lease, and its predecessor's is still there.
const LIVES_MAX: usize = 64;

/// Lives of monitors that this process has reaped.
#[derive(Debug, Default)]
pub(crate) struct Lives(Vec<String>);

/// The end of a pipe on which a monitor says which life it is.
#[derive(Debug)]
pub(crate) struct Introduction(File);

impl Lives {
    /// Makes the pipe for the next life. The other end is for [`Self::words`].
    ///
    /// # Errors
    ///
    /// When there are no descriptors left.
    pub(crate) fn expect() -> io::Result<(Introduction, OwnedFd)> {
        let (hears, tells) = pipe_with(PipeFlags::CLOEXEC)?;
        // Whoever has inherited the other end may keep it open.
        rustix::fs::fcntl_setfl(&hears, OFlags::NONBLOCK)?;
        Ok((Introduction(hears.into()), tells))
    }

    /// The environment of the next life, which is to be this process; without a descriptor there is none after it.
    ///
    /// # Errors
    ///
    /// When the descriptor cannot be left to it.
    pub(crate) fn words(&self, tells: Option<&OwnedFd>) -> io::Result<Vec<(&'static str, String)>> {
        let Some(tells) = tells else {
            return Ok(Vec::new());
        };
        rustix::io::fcntl_setfd(tells, FdFlags::empty())?;
        let mut words = vec![("CORACLE_INCARNATION_FD", tells.as_raw_fd().to_string())];
        if !self.0.is_empty() {
            words.push(("CORACLE_REAPED", self.0.join(",")));
        }
        Ok(words)
    }

    /// A life has ended for certain.
    pub(crate) fn bury(&mut self, mut introduction: Introduction) {
        let mut said = [0; DIGITS];
        if introduction.0.read_exact(&mut said).is_err() {
            return;
        }
        // Whatever ran in the jail may have written it.
        let is_one = said.iter().all(u8::is_ascii_hexdigit);
        if let Some(life) = String::from_utf8(said.to_vec()).ok().filter(|_| is_one) {
            if self.0.len() == LIVES_MAX {
                self.0.remove(0);
            }
            self.0.push(life);
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use std::io::Write as _;

    use super::*;

    /// Buries a life that has said this.
    fn said(lives: &mut Lives, text: &str) {
        let (introduction, tells) = Lives::expect().unwrap();
        File::from(tells).write_all(text.as_bytes()).unwrap();
        lives.bury(introduction);
    }

    fn reaped(lives: &Lives) -> Option<String> {
        let (_introduction, tells) = Lives::expect().unwrap();
        let words = lives.words(Some(&tells)).unwrap();
        words
            .into_iter()
            .find_map(|(name, word)| (name == "CORACLE_REAPED").then_some(word))
    }

    #[test]
    fn the_last_lives_are_told_and_what_is_none_is_not() {
        let mut lives = Lives::default();
        assert_eq!(reaped(&lives), None);
        for none in [
            "",
            "0123456789abcdef",
            "0123456789abcdef0123456789abcde,",
            "0123456789abcdef0123456789abcd\0f",
        ] {
            said(&mut lives, none);
            assert_eq!(reaped(&lives), None, "{none:?}");
        }
        let (first, second) = ("0".repeat(32), "f".repeat(32));
        said(&mut lives, &first);
        said(&mut lives, &format!("{second}\n"));
        assert_eq!(reaped(&lives), Some(format!("{first},{second}")));
        for _ in 1..LIVES_MAX {
            said(&mut lives, &second);
        }
        let told = reaped(&lives).unwrap();
        assert!(!told.contains(&first) && told.split(',').count() == LIVES_MAX);
    }

    #[test]
    fn a_life_that_has_said_nothing_and_left_its_end_open_is_not_waited_for() {
        let mut lives = Lives::default();
        let (introduction, _tells) = Lives::expect().unwrap();
        lives.bury(introduction);
        assert_eq!(reaped(&lives), None);
    }
}
