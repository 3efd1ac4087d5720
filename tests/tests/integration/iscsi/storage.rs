//! A target as the tests of every network need it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use coracle_tests::Outcome;
use coracle_tests::harness::iscsi::protocol::Iscsi;
use coracle_tests::harness::iscsi::target::{Plan, Target, url};
use coracle_tests::harness::proxy::{Damage, Proxy, Step, Then};
use coracle_tests::monitor::Monitor;
use coracle_tests::seed::Seed;
use serde_json::{Value, json};

use crate::network::{Server, Stepped, with};

/// A target, and what an URL must say to use it.
pub(super) struct Storage {
    target: Target,
    options: &'static str,
    lock: &'static str,
}

const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// All of a write comes with its command, so that a volatile cache can hold it.
const IMMEDIATE_BYTES: u32 = 262_144;

impl Server for Storage {
    fn with_image(bytes: u64) -> Outcome<Self> {
        Ok(Self {
            target: Target::start(Plan::disk(bytes))?,
            options: "",
            lock: "exclusive",
        })
    }

    fn address(&self) -> SocketAddr {
        self.target.address()
    }

    fn drive(&self, way: SocketAddr, lease: &Path) -> Value {
        let drive = super::drive(&format!("{}{}", url(way, 1), self.options), lease);
        with(drive, "lock", json!(self.lock))
    }

    fn image(&self) -> Outcome<PathBuf> {
        self.target.image(1)
    }

    fn kill(&mut self) -> Outcome {
        self.target.kill()
    }

    fn restart(&mut self) -> Outcome {
        self.target.restart()
    }

    fn stop(&self) -> Outcome {
        self.target.stop()
    }

    fn go_on(&self) -> Outcome {
        self.target.go_on()
    }
}

impl Stepped for Storage {
    const IDLE_MS: u64 = 300;

    fn for_cell(fault: &str, step: Step, bytes: u64, seed: &mut Seed) -> Outcome<Self> {
        let digests = fault == "wrong digest" || seed.below(2) == 0;
        // Often enough that an idle session has a message for every trap.
        let plan = Plan::disk(bytes).immediate_bytes(IMMEDIATE_BYTES);
        let plan = plan.key("nop_interval", "1").key("nop_count", "120");
        Ok(Self {
            target: Target::start(if digests { plan.digests() } else { plan })?,
            options: if digests {
                "?header_digest=crc32c&data_digest=crc32c"
            } else {
                ""
            },
            // tgtd lets strangers unmap what is reserved, so a leased disk never does it there.
            lock: if step == Step::Unmap { "none" } else { "exclusive" },
        })
    }

    fn proxy(&self, mode: &str, seed: Seed) -> Outcome<Proxy> {
        let server = self.target.address();
        match mode {
            "volatile" => Proxy::volatile(HERE, server, seed, Iscsi::default()),
            _ => Proxy::knowing(HERE, server, seed, Iscsi::default()),
        }
    }

    fn begin_again(&mut self, step: Step, proxy: &Proxy) -> Outcome {
        match step {
            Step::Login | Step::Reservation => proxy.cut(),
            _ => Ok(()),
        }
    }

    fn damage(fault: &str, step: Step, seed: &mut Seed) -> Option<Then> {
        match fault {
            "wrong digest" => Some(wrong_sum(step, seed)),
            "wrong length" => Some(wrong_length(step, seed)),
            "odd answer" => Some(odd_answer(step, seed)),
            _ => None,
        }
    }

    fn suffer(&mut self, _: &str, _: &Proxy, _: &Monitor) -> Outcome {
        Ok(())
    }

    fn recovered(&self, _: Step, _: Duration) -> Outcome {
        Ok(())
    }
}

fn wrong_sum(step: Step, seed: &mut Seed) -> Then {
    let of_data = step == Step::Read && seed.below(2) == 0;
    Then::Damage(if of_data {
        Damage::DataSum
    } else {
        Damage::HeaderSum
    })
}

fn wrong_length(step: Step, seed: &mut Seed) -> Then {
    // Only these are answered with data.
    let has_data = matches!(step, Step::Login | Step::Read);
    let is_short = has_data && seed.below(2) == 0;
    Then::Damage(if is_short {
        Damage::Truncated
    } else {
        Damage::Oversized
    })
}

fn odd_answer(step: Step, seed: &mut Seed) -> Then {
    let number = Then::Damage(Damage::Number);
    // The target's own pings, which is all that an idle session hears of one that pings so often, have none.
    let number = if step == Step::Idle { Then::Twice } else { number };
    let all = [Then::Damage(Damage::Tag), number, Then::Twice];
    seed.pick(&all).copied().unwrap_or(Then::Twice)
}
