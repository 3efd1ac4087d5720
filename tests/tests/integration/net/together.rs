//! Two guests on two hosts that talk to each other while their machines do not leave them alone.

use std::net::Ipv4Addr;
use std::thread;
use std::time::{Duration, Instant};

use coracle_tests::case::{Context, text};
use coracle_tests::certificates::Authority;
use coracle_tests::guest::Linux;
use coracle_tests::harness::hosts::{Host, Star};
use coracle_tests::harness::receiver::Receiver;
use coracle_tests::monitor::{Launch, Monitor};
use coracle_tests::seed::Seed;
use coracle_tests::{Outcome, ensure};
use serde_json::json;

use crate::snapshot::{Files, killed, saved};

const KIB: u32 = 8 << 10;
const KIB_IN_FULL: u32 = 1 << 20;
/// How long nothing may arrive; a machine that emulates the guest's kernel and does other things besides is slow.
const SOMETHING_WITHIN: Duration = Duration::from_secs(300);
/// How long the guests are left alone after each disturbance, at most.
const REST_MS: u32 = 1000;
const REST_MS_IN_FULL: u32 = 20_000;
/// How many of its 64 reports a guest has made when it is left alone.
const REPORTS_AT_REST: usize = 48;
const PAUSE_MS: u64 = 2000;

/// A guest, where it is, and what its earlier processes had on their consoles.
struct Guest<'a> {
    host: &'a Host,
    monitor: Monitor,
    address: Ipv4Addr,
    before: String,
    scratch: tempfile::TempDir,
}

/// What happens to a guest that goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Disturbance {
    Paused,
    Saved,
    Moved,
}

const ALL: [Disturbance; 3] = [Disturbance::Paused, Disturbance::Saved, Disturbance::Moved];

/// Each serves the other a stream and fetches one; there is a host more than guests, for who moves.
pub(super) fn fetch_from_each_other(context: &Context) -> Outcome {
    let directory = tempfile::tempdir()?;
    let star = Star::new(3)?;
    star.switch(&["tap0"])?;
    let authority = Authority::new(directory.path())?;
    let kib = context.count(KIB, KIB_IN_FULL);
    let [first, second, free] = star.clients.as_slice() else {
        return Err("there are three hosts".into());
    };
    let addresses = [Ipv4Addr::new(172, 16, 0, 2), Ipv4Addr::new(172, 16, 0, 3)];
    let [one, other] = addresses;
    let mut guests = [
        Guest::new(context, first, (one, other), kib)?,
        Guest::new(context, second, (other, one), kib)?,
    ];
    let mut free = free;
    let mut seed = context.seed.clone();
    let rest_ms = context.count(REST_MS, REST_MS_IN_FULL).into();
    let mut done = Vec::new();
    let mut last = (Instant::now(), 0);
    while !guests.iter().all(|guest| guest.says("checksum")) {
        thread::sleep(Duration::from_millis(seed.below(rest_ms)));
        let reports = guests.iter().map(Guest::reports).sum();
        if reports > last.1 {
            last = (Instant::now(), reports);
        }
        ensure!(
            last.0.elapsed() < SOMETHING_WITHIN,
            "nothing arrives after {done:?}: {}",
            consoles(&guests)
        );
        // In a sample each is disturbed once in each way; in full, for as long as it lasts.
        let number = done.len();
        if number == context.count(6, u32::MAX) as usize {
            continue;
        }
        let (Some(guest), Some(&how)) = (guests.get_mut(number / 3 % 2), ALL.get(number % 3)) else {
            continue;
        };
        // Who has nearly all may be gone before it is disturbed.
        if (1..REPORTS_AT_REST).contains(&guest.reports()) {
            done.push(how);
            let disturbed = guest.disturb(context, how, &mut free, (&authority, &mut seed));
            disturbed.map_err(|error| format!("the last of {done:?}: {}", text(&error)))?;
        }
    }
    ensure!(
        ALL.iter().all(|how| done.contains(how)),
        "they were too fast to be {ALL:?}: {done:?}"
    );
    let count = |how| done.iter().filter(|done| **done == how).count();
    println!(
        "{kib} KiB each way: paused {}, saved and loaded {}, moved {} times",
        count(Disturbance::Paused),
        count(Disturbance::Saved),
        count(Disturbance::Moved)
    );
    for (guest, from) in guests.into_iter().zip([other, one]) {
        guest.has_all_of(from, u64::from(kib) << 10)?;
    }
    Ok(())
}

fn consoles(guests: &[Guest<'_>]) -> String {
    guests.iter().map(Guest::console).collect()
}

impl<'a> Guest<'a> {
    fn new(
        context: &Context,
        host: &'a Host,
        (here, there): (Ipv4Addr, Ipv4Addr),
        kib: u32,
    ) -> Outcome<Self> {
        let scratch = tempfile::tempdir()?;
        let [_, _, _, last] = here.octets();
        let words = format!("tcp-exchange {here} {there} {kib}");
        let config = Linux::read(&context.environment)?
            .machine("smp", scratch.path(), &words)?
            .part(
                "network-interfaces",
                json!([{
                    "iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": format!("06:00:ac:10:00:{last:02x}")
                }]),
            )
            .config();
        let launch = Launch::new(&context.environment)?;
        let monitor = host.inside(|| launch.start())??;
        monitor.configure(&config)?;
        monitor.start_instance()?;
        Ok(Self {
            host,
            monitor,
            address: here,
            before: String::new(),
            scratch,
        })
    }

    fn console(&self) -> String {
        format!("{}{}", self.before, self.monitor.console.text())
    }

    fn says(&self, word: &str) -> bool {
        self.console().contains(word)
    }

    /// How many times it has said that more has arrived.
    fn reports(&self) -> usize {
        self.console().matches("KiB are here").count()
    }

    fn disturb(
        &mut self,
        context: &Context,
        how: Disturbance,
        free: &mut &'a Host,
        (authority, seed): (&Authority, &mut Seed),
    ) -> Outcome {
        match how {
            Disturbance::Paused => {
                self.monitor.set_state("Paused")?;
                thread::sleep(Duration::from_millis(seed.below(PAUSE_MS)));
                self.monitor.set_state("Resumed")
            }
            Disturbance::Saved => self.goes_on_from_a_snapshot(context),
            Disturbance::Moved => self.moves(context, free, authority),
        }
    }

    fn goes_on_from_a_snapshot(&mut self, context: &Context) -> Outcome {
        let files = Files::in_directory(self.scratch.path(), "test-together");
        saved(&self.monitor, &files, "Full")?;
        let launch = Launch::new(&context.environment)?;
        let next = self.host.inside(|| launch.start())??;
        let last = std::mem::replace(&mut self.monitor, next);
        self.before.push_str(&last.console.text());
        killed(last)?;
        self.monitor
            .must("PUT", "/snapshot/load", Some(&files.load("lazy")))?;
        Ok(())
    }

    fn moves(&mut self, context: &Context, free: &mut &'a Host, authority: &Authority) -> Outcome {
        let tls = |host: &Host| authority.host(&host.address.to_string());
        let receiver = Receiver::start(Launch::new(&context.environment)?, free, &tls(free)?)?;
        let body = json!({ "to": receiver.to(), "tls": tls(self.host)? });
        self.monitor.must("PUT", "/migration/send", Some(&body))?;
        let last = std::mem::replace(&mut self.monitor, receiver.received()?).wait(SOMETHING_WITHIN)?;
        self.before.push_str(&last.console);
        std::mem::swap(&mut self.host, free);
        last.expect(0)
    }

    /// It ends with all of the other's stream.
    fn has_all_of(self, from: Ipv4Addr, bytes: u64) -> Outcome {
        let ended = self.monitor.wait(SOMETHING_WITHIN)?;
        let said = format!("{}{}", self.before, ended.console);
        ended
            .expect(0)
            .map_err(|error| format!("{}: {}: {said}", self.address, text(&error)))?;
        // An address is in the order of the network, where the guest reads it as a number of its own.
        let mut stream = Seed::from(u64::from(u32::from_le_bytes(from.octets())));
        let sum = (0..bytes / 8).fold(0_u64, |sum, _| sum.rotate_left(1).wrapping_add(stream.draw()));
        let told = format!("{bytes} bytes, checksum {sum:x}, error 0");
        ensure!(
            said.contains(&told),
            "{}: {told} was not said: {said}",
            self.address
        );
        Ok(())
    }
}
