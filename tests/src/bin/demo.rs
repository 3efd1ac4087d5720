//! Shows a newcomer a guest that moves between hosts (`make demo`): three hosts with a network of their own, a server whose image
//! is the guest's disk, a guest that counts aloud, migrations, and a target that is killed in the middle of one.

use std::process::Command;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use coracle_tests::case::text;
use coracle_tests::certificates::Authority;
use coracle_tests::environment::{Environment, Need};
use coracle_tests::guest::Machine;
use coracle_tests::harness::hosts::{Host, Star};
use coracle_tests::harness::nfs::server::{Plan, Server, url};
use coracle_tests::harness::receiver::Receiver;
use coracle_tests::monitor::{Launch, Monitor};
use coracle_tests::{Outcome, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};

fn main() {
    if let Err(error) = run() {
        println!("demo: {}", text(&error));
        std::process::exit(1);
    }
}

const MEMORY_MIB: u32 = 256;
const DISK_MIB: u64 = 16;
/// How far it counts, and how often it does.
const COUNT: u64 = 100;
const TICK_MS: u64 = 100;
/// How much is heard of it at each host.
const HEARD: u64 = 8;
const SOON: Duration = Duration::from_secs(60);
const PERIOD: Duration = Duration::from_millis(1);

/// The hosts, and what runs on them.
struct Stage {
    environment: Environment,
    star: Star,
    server: Server,
    tls: Vec<Value>,
}

/// The guest, wherever it is.
struct Guest {
    host: usize,
    monitor: Monitor,
    /// How much of the console was shown.
    shown: usize,
    /// The last number that was heard.
    last: Option<u64>,
    /// What is told at the end.
    summary: Vec<String>,
}

fn run() -> Outcome {
    let environment = Environment::read();
    environment.check()?;
    if let Some(lack) = environment.lacks(Need::KvmAndHosts) {
        return Err(format!("{lack}; the demonstration needs KVM, and root for networks of its own").into());
    }
    let certificates = tempfile::tempdir()?;
    let stage = Stage::new(environment, certificates.path())?;
    let mut guest = stage.start()?;
    guest.listen(HEARD)?;
    stage.migrate(&mut guest, 1)?;
    guest.listen(HEARD)?;
    stage.kill_target(&mut guest, 2)?;
    guest.listen(HEARD)?;
    stage.migrate(&mut guest, 2)?;
    stage.end(guest)
}

impl Stage {
    fn new(environment: Environment, certificates: &std::path::Path) -> Outcome<Self> {
        let star = Star::new(3)?;
        let server = Server::start_on(&star.server, Plan::image(DISK_MIB << 20))?;
        let authority = Authority::new(certificates)?;
        let tls = star.clients.iter();
        let tls = tls.map(|host| authority.host(&host.address.to_string()));
        let tls = tls.collect::<Outcome<_>>()?;
        note(
            "Three hosts, each a network namespace with an address of its own, and a fourth with an NFS server:",
        );
        for (number, host) in star.clients.iter().enumerate() {
            note(&format!("  {} {}", name(number), host.address));
        }
        let stage = Self {
            environment,
            star,
            server,
            tls,
        };
        note(&format!(
            "  the guest's disk is {}; nothing is mounted anywhere",
            stage.disk()
        ));
        Ok(stage)
    }

    /// The same for every host.
    fn disk(&self) -> String {
        let address = (self.star.server.address, self.server.address().port());
        url(address.into(), "export/image.raw")
    }

    fn host(&self, number: usize) -> Outcome<&Host> {
        Ok(self.star.clients.get(number).ok_or("there are three hosts")?)
    }

    fn tls(&self, number: usize) -> Outcome<&Value> {
        Ok(self.tls.get(number).ok_or("there are three hosts")?)
    }

    fn start(&self) -> Outcome<Guest> {
        let words = format!(
            "do=hello do=pattern-write:mib={DISK_MIB},seed=7 do=dirty:mib=192,ms=100,seed=3 do=tick:ms={TICK_MS},count={COUNT} \
             do=pattern-verify:mib={DISK_MIB},seed=7"
        );
        let config = Machine::unikernel(&self.environment, &words)
            .memory_mib(MEMORY_MIB)
            .disk("disk", std::path::Path::new(&self.disk()))
            .config();
        note(&format!(
            "A guest of {MEMORY_MIB} MiB starts on {}: it writes its disk, fills its memory, and counts aloud to {}.",
            name(0),
            COUNT - 1
        ));
        let launch = Launch::new(&self.environment)?;
        let monitor = self.host(0)?.inside(|| launch.start())??;
        monitor.configure(&config)?;
        monitor.start_instance()?;
        Ok(Guest {
            host: 0,
            monitor,
            shown: 0,
            last: None,
            summary: Vec::new(),
        })
    }

    fn receiver(&self, to: usize) -> Outcome<Receiver> {
        let launch = Launch::new(&self.environment)?;
        Receiver::start(launch, self.host(to)?, self.tls(to)?)
    }

    fn migrate(&self, guest: &mut Guest, to: usize) -> Outcome {
        let from = guest.host;
        note(&format!(
            "It goes from {} to {}, by TLS with certificates on both sides.",
            name(from),
            name(to)
        ));
        let receiver = self.receiver(to)?;
        let body = json!({ "to": receiver.to(), "tls": self.tls(from)? });
        let begun = Instant::now();
        guest.monitor.must("PUT", "/migration/send", Some(&body))?;
        let seconds = begun.elapsed().as_secs_f64();
        let next = receiver.received()?;
        guest.show();
        let last = guest.last;
        let ended = std::mem::replace(&mut guest.monitor, next).wait(SOON)?;
        ended.expect(0)?;
        // What it said while it was being sent.
        guest.last = numbers(&ended.console).max().or(last);
        guest.host = to;
        guest.shown = 0;
        let said = format!(
            "{} -> {}: {seconds:.2} s; the last number there was {}, and the source has ended with status 0",
            name(from),
            name(to),
            guest
                .last
                .map_or_else(|| "none".to_owned(), |last| last.to_string()),
        );
        note(&said);
        guest.summary.push(said);
        Ok(())
    }

    /// Begins to send the guest, and kills the target when some of its memory is there.
    fn kill_target(&self, guest: &mut Guest, to: usize) -> Outcome {
        let from = guest.host;
        note(&format!(
            "It is to go to {}, and that is killed (kill -9) in the middle of it.",
            name(to)
        ));
        let receiver = self.receiver(to)?;
        let body = json!({ "to": receiver.to(), "tls": self.tls(from)? }).to_string();
        let mut caller = guest.monitor.connect()?;
        let (sender, sent) = channel();
        let call = std::thread::spawn(move || {
            let answer = caller.request("PUT", "/migration/send", Some(&body));
            // Nobody listens once the demonstration is over.
            let _ = sender.send(answer);
        });
        let until = Instant::now() + SOON;
        let bytes = loop {
            let status = guest.monitor.must("GET", "/migration", None)?.json()?;
            let bytes = status.get("sent_bytes").and_then(Value::as_u64).unwrap_or(0);
            if bytes > 0 {
                break bytes;
            }
            ensure!(Instant::now() < until, "nothing is sent: {status}");
            std::thread::sleep(PERIOD);
        };
        receiver.monitor.signal(Signal::KILL)?;
        let answer = sent.recv_timeout(SOON)??;
        call.join().map_err(|_| "the caller panicked")?;
        ensure!(
            answer.status == 400,
            "the target had the guest before it was killed, {} MiB in: run it again",
            bytes >> 20
        );
        let said = format!(
            "{} -> {}: the target was killed after {} MiB, and the guest runs on at {}",
            name(from),
            name(to),
            bytes >> 20,
            name(from)
        );
        note(&said);
        note(&format!("  what the source says: {}", answer.fault()));
        guest.summary.push(said);
        Ok(())
    }

    fn end(&self, mut guest: Guest) -> Outcome {
        guest.listen(HEARD)?;
        let lease = self.host(guest.host)?.inside(|| {
            Command::new(&self.environment.coraclectl)
                .args(["lease", "show", &self.disk()])
                .output()
        })??;
        note("Who may write its disk, as the server's records say (`coraclectl lease show`):");
        for line in String::from_utf8_lossy(&lease.stdout).lines() {
            note(&format!("  {line}"));
        }
        note("It counts to its end, and compares its disk with what it wrote on the first host.");
        let Guest {
            monitor,
            host,
            last,
            summary,
            ..
        } = guest;
        let ended = monitor.wait(SOON)?;
        ended.expect(0)?;
        ensure!(
            ended.console.contains("pattern-verify: ok"),
            "its disk is not what it wrote: {}",
            ended.console
        );
        let all: Vec<u64> = numbers(&ended.console).collect();
        let expected = last.map_or(0, |last| last + 1);
        let goes_on = all.iter().copied().eq(all.first().copied().unwrap_or(0)..COUNT);
        ensure!(
            goes_on && all.first() <= Some(&expected),
            "numbers are missing: {all:?}"
        );
        note("");
        note("Summary");
        for line in summary {
            note(&format!("  {line}"));
        }
        note(&format!(
            "  it counted to {} without a gap, and ended at {} with status 0; its disk is what it wrote on {}",
            COUNT - 1,
            name(host),
            name(0)
        ));
        Ok(())
    }
}

impl Guest {
    /// Shows what it says until it has counted so much further.
    fn listen(&mut self, count: u64) -> Outcome {
        let goal = self.last.map_or(count, |last| last + count).min(COUNT - 1);
        let until = Instant::now() + SOON;
        while self.last.is_none_or(|last| last < goal) {
            ensure!(
                Instant::now() < until,
                "it does not count on: {}",
                self.monitor.console.text()
            );
            std::thread::sleep(Duration::from_millis(TICK_MS / 4));
            self.show();
        }
        Ok(())
    }

    /// Shows the whole lines that it has said since.
    fn show(&mut self) {
        let text = self.monitor.console.text();
        let new = text.get(self.shown..).unwrap_or_default();
        let whole = new.rfind('\n').map_or(0, |end| end + 1);
        for line in new.get(..whole).unwrap_or_default().lines() {
            println!("[{}] {}", name(self.host), line.trim_end());
        }
        self.shown += whole;
        self.last = numbers(&text).max().or(self.last);
    }
}

/// The numbers that the guest has said.
fn numbers(console: &str) -> impl Iterator<Item = u64> {
    let words = console.lines().filter_map(|line| line.strip_prefix("tick: n="));
    words.filter_map(|rest| rest.split(' ').next()?.parse().ok())
}

fn name(host: usize) -> String {
    format!("host-{}", char::from(b'a' + u8::try_from(host).unwrap_or(0)))
}

fn note(line: &str) {
    println!("{line}");
}
