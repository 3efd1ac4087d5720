//! When the guest is to stand still for the rest of its memory, and how far it is slowed down until then.

use std::time::{Duration, Instant};

use super::send::SILENCE_MAX;
use crate::config::{MigrationMode, OnTimeout};
use crate::kvm::share::{FULL, LEAST};
use crate::snapshot::memory::PAGE_BYTES;

/// What was asked for.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// How long the guest may stand still.
    pub downtime: Duration,
    /// What of it goes to anything but memory: saving and restoring the state, flushing and handing over the disks.
    pub standstill: Duration,
    /// Whether the guest may be slowed down.
    pub mode: MigrationMode,
    /// When it is enough.
    pub deadline: Instant,
    /// What is done then.
    pub on_timeout: OnTimeout,
    /// Whether the guest may go on at the target before all of its memory is there.
    pub postcopy: bool,
}

/// One round, as it went.
#[derive(Clone, Copy, Debug)]
pub struct Round {
    /// What went over the connection.
    pub sent_bytes: u64,
    /// How long that took, until the target had it.
    pub took: Duration,
    /// Pages that were sent.
    pub sent_pages: u64,
    /// Pages that the guest has written meanwhile.
    pub left_pages: u64,
    /// What was sent of disks that go along, in bytes.
    pub sent_disk_bytes: u64,
    /// What the guest has written of them meanwhile, in bytes.
    pub left_disk_bytes: u64,
}

impl Round {
    fn sent_content_bytes(&self) -> u64 {
        self.sent_pages * PAGE_BYTES as u64 + self.sent_disk_bytes
    }

    /// What the guest has written meanwhile.
    pub fn left_bytes(&self) -> u64 {
        self.left_pages * PAGE_BYTES as u64 + self.left_disk_bytes
    }
}

/// What comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The guest stands still, and the rest is sent.
    Last,
    /// Another round, while the guest runs for so many thousandths of the time.
    Again {
        /// As many.
        run_permille: u32,
    },
    /// The guest goes on at the target, and the rest is fetched from here.
    PostCopy,
    /// The guest writes faster than its memory is sent.
    GiveUp,
}

/// Judges round after round.
#[derive(Debug)]
pub struct Judge {
    terms: Terms,
    rounds: u32,
    bytes_per_s: f64,
    run_permille: u32,
    /// How long all rounds took, and the first of them.
    took: Duration,
    first_took: Duration,
}

/// Most rounds before the last.
const ROUNDS_MAX: u32 = 30;
/// How much of what the memory takes all of it may take where post-copy is allowed, by what is known before: twice as much, less
/// what is not known, the hand-over and pages that are asked for out of turn.
const PERCENT_MAX: u32 = 180;
/// A round of fewer bytes says nothing of how fast the connection is.
const TELLING_BYTES: u64 = 1 << 20;

impl Judge {
    /// One that knows nothing yet.
    pub fn new(terms: Terms) -> Self {
        Self {
            terms,
            rounds: 0,
            bytes_per_s: 0.0,
            run_permille: FULL,
            took: Duration::ZERO,
            first_took: Duration::ZERO,
        }
    }

    /// How fast memory is sent.
    pub fn bytes_per_s(&self) -> u64 {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "an estimate"
        )]
        let whole = self.bytes_per_s as u64;
        whole
    }

    /// How long the guest would stand still if so many bytes of memory and disks were sent then.
    pub fn downtime(&self, left_bytes: u64) -> Duration {
        let seconds = (left_bytes as f64 / self.bytes_per_s.max(1.0)).min(1e6);
        Duration::from_secs_f64(seconds) + self.terms.standstill
    }

    /// How long the guest may really stand still before it runs on here, if that is limited: the rest may take longer than it was
    /// predicted to, and whoever is silent is waited for.
    pub fn standstill_max(&self) -> Option<Duration> {
        match self.terms.on_timeout {
            OnTimeout::Abort => Some(self.downtime_max().saturating_mul(2).saturating_add(SILENCE_MAX)),
            OnTimeout::Stop => None,
        }
    }

    fn downtime_max(&self) -> Duration {
        self.terms.downtime.max(self.terms.standstill * 2)
    }

    /// Judges what comes after `round`, at the time `now`.
    pub fn judge(&mut self, round: Round, now: Instant) -> Verdict {
        self.rounds += 1;
        self.took += round.took;
        if self.rounds == 1 {
            self.first_took = round.took;
        }
        if self.rounds == 1 || round.sent_bytes >= TELLING_BYTES {
            self.bytes_per_s = round.sent_bytes as f64 / round.took.as_secs_f64().max(1e-6);
        }
        let downtime_max = self.downtime_max();
        if self.downtime(round.left_bytes()) <= downtime_max {
            return Verdict::Last;
        }
        // What is left of disks goes while the guest stands still in any case.
        if self.terms.postcopy
            && self.downtime(round.left_disk_bytes) <= downtime_max
            && (self.rounds >= ROUNDS_MAX || now >= self.terms.deadline || self.is_too_long(round))
        {
            return Verdict::PostCopy;
        }
        if self.rounds >= ROUNDS_MAX || now >= self.terms.deadline {
            return match self.terms.on_timeout {
                OnTimeout::Abort => Verdict::GiveUp,
                OnTimeout::Stop => Verdict::Last,
            };
        }
        // Rounds that become shorter by a quarter each time come to an end by themselves.
        if self.terms.mode == MigrationMode::Auto && round.left_bytes() > round.sent_content_bytes() / 4 * 3 {
            self.slow_down(round);
        }
        Verdict::Again {
            run_permille: self.run_permille,
        }
    }

    /// Whether another round might be one too many: post-copy sends what is left at the time once, so that all is over after
    /// [`PERCENT_MAX`] of what the memory takes, as long as it begins while that is still so. A guest that is slowed down may
    /// write as much as before in the next round: it may have written all that it writes at all.
    fn is_too_long(&self, round: Round) -> bool {
        let left = self
            .downtime(round.left_bytes())
            .saturating_sub(self.terms.standstill);
        self.terms.mode == MigrationMode::Auto && self.took + left * 2 > self.first_took * PERCENT_MAX / 100
    }

    /// The guest is to write half as fast as its memory is sent. How fast it really writes is not known where it has written all
    /// that it writes at all within a round: then the step is larger, and may not be the last.
    fn slow_down(&mut self, round: Round) {
        let written_per_s = round.left_bytes() as f64 / round.took.as_secs_f64().max(1e-6);
        let step = if round.left_bytes() > round.sent_content_bytes() / 10 * 9 {
            0.25
        } else {
            0.5
        };
        let share = f64::from(self.run_permille) * (self.bytes_per_s / written_per_s / 2.0).min(step);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "within 0 and 1000"
        )]
        let permille = share as u32;
        self.run_permille = permille.max(LEAST);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINK_BYTES_PER_S: f64 = 100e6;
    const PAGES_PER_MIB: u64 = 256;

    fn terms(mode: MigrationMode, on_timeout: OnTimeout) -> Terms {
        Terms {
            downtime: Duration::from_millis(50),
            standstill: Duration::from_millis(5),
            mode,
            deadline: Instant::now() + Duration::from_mins(5),
            on_timeout,
            postcopy: false,
        }
    }

    /// Sends a memory of which the guest writes a part again and again, and says how it ended, how long it took, and how long the
    /// guest then stands still.
    fn sent(terms: Terms, memory_mib: u64, part_mib: u64, writes_per_s: f64) -> (Verdict, f64, f64) {
        let begun = Instant::now();
        let mut judge = Judge::new(terms);
        let (mut pages, mut seconds, mut share) = (memory_mib * PAGES_PER_MIB, 0.0, 1.0);
        loop {
            let bytes = pages * PAGE_BYTES as u64;
            let took = bytes as f64 / LINK_BYTES_PER_S;
            let written =
                (writes_per_s * share * took / PAGE_BYTES as f64).min((part_mib * PAGES_PER_MIB) as f64);
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "small numbers"
            )]
            let left_pages = written as u64;
            seconds += took;
            let round = Round {
                sent_bytes: bytes,
                took: Duration::from_secs_f64(took),
                sent_pages: pages,
                left_pages,
                sent_disk_bytes: 0,
                left_disk_bytes: 0,
            };
            pages = left_pages;
            match judge.judge(round, begun + Duration::from_secs_f64(seconds)) {
                Verdict::Again { run_permille } => share = f64::from(run_permille) / 1000.0,
                verdict => {
                    return (
                        verdict,
                        seconds,
                        judge.downtime(left_pages * PAGE_BYTES as u64).as_secs_f64(),
                    );
                }
            }
        }
    }

    #[test]
    fn a_guest_that_writes_four_times_as_fast_as_is_sent_is_slowed_down_until_it_can_be_sent() {
        let terms = terms(MigrationMode::Auto, OnTimeout::Abort);
        let (verdict, seconds, downtime) = sent(terms, 512, 64, 4.0 * LINK_BYTES_PER_S);
        assert_eq!(verdict, Verdict::Last);
        let of_memory = 512.0 * 1048576.0 / LINK_BYTES_PER_S;
        assert!(
            seconds < 2.0 * of_memory,
            "{seconds} s, and {of_memory} s for the memory"
        );
        assert!(downtime <= 0.050, "{downtime}");
    }

    #[test]
    fn however_fast_a_guest_writes_all_is_over_after_twice_what_its_memory_takes_if_it_may_go_on_without() {
        let of_memory = 512.0 * 1048576.0 / LINK_BYTES_PER_S;
        for part_mib in [16, 64, 128, 256, 384, 512] {
            for times in [0.3, 0.7, 1.0, 4.0, 100.0] {
                let terms = Terms {
                    postcopy: true,
                    ..terms(MigrationMode::Auto, OnTimeout::Abort)
                };
                let (verdict, seconds, rest) = sent(terms, 512, part_mib, times * LINK_BYTES_PER_S);
                assert!(
                    matches!(verdict, Verdict::Last | Verdict::PostCopy),
                    "{verdict:?}"
                );
                assert!(
                    seconds + rest <= 2.0 * of_memory + 0.1,
                    "{part_mib} MiB {times} times: {seconds} s and {rest} s, and {of_memory} s for the memory"
                );
            }
        }
    }

    #[test]
    fn a_guest_that_is_not_to_be_slowed_down_goes_on_without_its_memory_when_the_time_is_over() {
        let terms = Terms {
            postcopy: true,
            ..terms(MigrationMode::Precopy, OnTimeout::Abort)
        };
        let (verdict, seconds, _) = sent(terms, 512, 64, 4.0 * LINK_BYTES_PER_S);
        assert_eq!(verdict, Verdict::PostCopy);
        // It had all of its rounds.
        assert!(seconds > 20.0, "{seconds}");
    }

    #[test]
    fn a_guest_that_is_not_to_be_slowed_down_stays_or_stands_still_for_as_long_as_it_takes() {
        let fast = 4.0 * LINK_BYTES_PER_S;
        let (verdict, ..) = sent(terms(MigrationMode::Precopy, OnTimeout::Abort), 512, 64, fast);
        assert_eq!(verdict, Verdict::GiveUp);
        let (verdict, _, downtime) = sent(terms(MigrationMode::Precopy, OnTimeout::Stop), 512, 64, fast);
        assert_eq!(verdict, Verdict::Last);
        assert!(downtime > 0.5, "{downtime}");
    }

    #[test]
    fn a_guest_that_writes_half_as_fast_as_is_sent_keeps_its_speed() {
        let mut judge = Judge::new(terms(MigrationMode::Auto, OnTimeout::Abort));
        let round = Round {
            sent_bytes: 512 << 20,
            took: Duration::from_secs(5),
            sent_pages: 512 * PAGES_PER_MIB,
            left_pages: 250 * PAGES_PER_MIB,
            sent_disk_bytes: 0,
            left_disk_bytes: 0,
        };
        let verdict = judge.judge(round, Instant::now());
        assert_eq!(verdict, Verdict::Again { run_permille: FULL });
    }

    #[test]
    fn a_round_of_a_few_pages_says_nothing_of_the_connection() {
        let mut judge = Judge::new(terms(MigrationMode::Auto, OnTimeout::Abort));
        let round = |sent_pages: u64, ms| Round {
            sent_bytes: sent_pages * PAGE_BYTES as u64,
            took: Duration::from_millis(ms),
            sent_pages,
            left_pages: 100 * PAGES_PER_MIB,
            sent_disk_bytes: 0,
            left_disk_bytes: 0,
        };
        judge.judge(round(100 * PAGES_PER_MIB, 1000), Instant::now());
        let before = judge.bytes_per_s();
        judge.judge(round(1, 100), Instant::now());
        assert_eq!(judge.bytes_per_s(), before);
    }

    #[test]
    fn what_is_left_of_disks_is_a_part_of_the_standstill_and_cannot_be_fetched_later() {
        let round = |left_disk_mib: u64| Round {
            sent_bytes: 100 << 20,
            took: Duration::from_secs(1),
            sent_pages: 100 * PAGES_PER_MIB,
            left_pages: 0,
            sent_disk_bytes: 0,
            left_disk_bytes: left_disk_mib << 20,
        };
        let judged = |left_disk_mib, postcopy| {
            let mut judge = Judge::new(Terms {
                postcopy,
                ..terms(MigrationMode::Auto, OnTimeout::Abort)
            });
            judge.judge(round(left_disk_mib), Instant::now())
        };
        // 45 ms at 100 MiB per second.
        assert_eq!(judged(4, false), Verdict::Last);
        assert_eq!(judged(6, false), Verdict::Again { run_permille: FULL });
        assert_eq!(judged(90, false), Verdict::Again { run_permille: 500 });
        assert_eq!(judged(90, true), Verdict::Again { run_permille: 500 });
        let mut judge = Judge::new(Terms {
            postcopy: true,
            ..terms(MigrationMode::Auto, OnTimeout::Abort)
        });
        let memory = Round {
            left_pages: 90 * PAGES_PER_MIB,
            ..round(1)
        };
        assert_eq!(judge.judge(memory, Instant::now()), Verdict::PostCopy);
    }
}
