//! A monitor from its API's side, while the disk of its machine hangs, or is lost.

#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::channel;
use std::thread::{self, JoinHandle};

use coracle_devices::virtio::blk::Disk;
use coracle_storage::backend::{Access, Backend, Discard, Geometry, Step};
use coracle_storage::engine::Engine;
use coracle_storage::reactor::{Event, ImageFile, Submit};
use coracle_storage::request::Request;

use super::*;
use crate::api::mailbox;
use crate::api::server::{Limits, Socket};
use crate::arch::x86_64::testing::vm;
use crate::kvm::vcpu::install_kick_handler;
use crate::machine::testing;

/// Storage far away: something is in flight while it hangs, and it may be lost.
#[derive(Default)]
struct Remote {
    hangs: AtomicBool,
    loss: OnceLock<&'static str>,
}

#[derive(Clone, Default)]
struct Fake(Arc<Remote>);

impl Fake {
    fn hangs(&self, hangs: bool) {
        self.0.hangs.store(hangs, Ordering::SeqCst);
    }
}

impl Backend for Fake {
    fn geometry(&self) -> Geometry {
        Geometry {
            size_bytes: 1 << 20,
            logical_block_bytes: 512,
            physical_block_bytes: 512,
            access: Access::ReadWrite,
            discard: Discard::Ignored,
        }
    }

    fn files(&self) -> Vec<ImageFile> {
        Vec::new()
    }

    fn start(&mut self, request: Request, _: &mut dyn Submit) -> Step {
        // What is begun while it hangs has no end.
        if self.0.hangs.load(Ordering::SeqCst) {
            return Step::Pending;
        }
        Step::Busy(request)
    }

    fn resume(&mut self, _: Event, _: &mut dyn Submit) -> Step {
        Step::Pending
    }

    fn fork(&self) -> Option<Box<dyn Backend>> {
        None
    }

    fn in_flight(&self) -> usize {
        self.0.hangs.load(Ordering::SeqCst).into()
    }

    fn alarm(&self) -> Option<Instant> {
        // The worker looks at its image that often.
        Some(Instant::now() + Duration::from_millis(1))
    }

    fn loss(&self) -> Option<&str> {
        self.0.loss.get().copied()
    }
}

/// A monitor that runs a machine on a fake disk, on a thread of its own.
struct Rig {
    disk: Fake,
    socket: PathBuf,
    ending: Ending,
    thread: JoinHandle<End>,
    _place: tempfile::TempDir,
}

/// What an API client got: the status and the body.
type Got = (u16, String);

impl Rig {
    /// `None` where there is no KVM; then it was said which `test` did not run.
    fn new(test: &str) -> Option<Self> {
        vm(test, 0)?;
        install_kick_handler().unwrap();
        let place = tempfile::tempdir().unwrap();
        let (disk, socket) = (Fake::default(), place.path().join("api.sock"));
        let (ready, is_ready) = channel();
        let (image, path) = (disk.clone(), socket.clone());
        let thread = thread::spawn(move || {
            let (config, _files) = testing::config();
            let disk = Disk::new("d", Box::new(image), 1, Engine::Sync).unwrap();
            let plan = testing::plan(&config, disk);
            let stop = StopSignals::take_over().unwrap();
            let mut monitor = Monitor::new("test".to_owned(), config, stop, Registry::default()).unwrap();
            let (inbox, calls) = mailbox().unwrap();
            let server = Server::start(Socket::bind(&path).unwrap(), Limits::default(), inbox).unwrap();
            monitor.answer(calls, &server, StartTimes::default());
            monitor.run(plan).unwrap();
            let Guest::Running(machine) = &monitor.guest else {
                panic!("a machine that was run runs");
            };
            machine.start_driver();
            ready.send(monitor.ending.clone()).unwrap();
            let end = monitor.serve().unwrap();
            monitor.retire();
            end
        });
        Some(Self {
            disk,
            socket,
            ending: is_ready.recv().unwrap(),
            thread,
            _place: place,
        })
    }

    fn get(&self, path: &str) -> Got {
        call(&self.socket, "GET", path, "")
    }

    fn set_state(&self, state: &str) -> Got {
        call(
            &self.socket,
            "PATCH",
            "/vm",
            &format!(r#"{{"state": "{state}"}}"#),
        )
    }

    /// The same, by a client that waits on a thread of its own.
    fn asks(&self, path: &'static str, body: String) -> JoinHandle<Got> {
        let socket = self.socket.clone();
        let asked = thread::spawn(move || call(&socket, "PATCH", path, &body));
        // It has been posted when it is refused to another.
        let limit = Instant::now() + Duration::from_secs(10);
        while self.set_state("Resumed").0 == 204 {
            assert!(Instant::now() < limit, "it was never begun");
            thread::sleep(Duration::from_millis(1));
        }
        asked
    }

    fn pauses(&self) -> JoinHandle<Got> {
        self.asks("/vm", r#"{"state": "Paused"}"#.to_owned())
    }

    /// Holds that whoever only looks is answered at once; that is half of the times, on a host that others use too.
    fn only_looks(&self) {
        let mut took: Vec<Duration> = ["/", "/vm/config", "/metrics", "/machine-config", "/version"]
            .iter()
            .cycle()
            .take(50)
            .map(|path| {
                let begun = Instant::now();
                assert_eq!(self.get(path).0, 200, "GET {path}");
                begun.elapsed()
            })
            .collect();
        took.sort();
        let median = took.get(took.len() / 2).copied().unwrap();
        assert!(median < Duration::from_millis(5), "{took:?}");
    }

    fn wait_for(&self, path: &str, part: &str) -> String {
        let limit = Instant::now() + Duration::from_secs(10);
        loop {
            let (_, body) = self.get(path);
            if body.contains(part) {
                return body;
            }
            assert!(Instant::now() < limit, "no {part} in {body}");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Ends the process, as a signal does; says how long that took.
    fn end(self) -> Duration {
        let begun = Instant::now();
        self.ending.announce(End::PowerOff);
        assert_eq!(self.thread.join().unwrap(), End::PowerOff);
        begun.elapsed()
    }
}

fn call(socket: &std::path::Path, method: &str, path: &str, body: &str) -> Got {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let length = body.len();
    let request =
        format!("{method} {path} HTTP/1.1\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}");
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
    let body = answer.split_once("\r\n\r\n").unwrap().1;
    (status, body.to_owned())
}

#[test]
fn a_pause_that_waits_for_a_disk_holds_up_nobody_else() {
    let Some(rig) = Rig::new("a_pause_that_waits_for_a_disk_holds_up_nobody_else") else {
        return;
    };
    rig.disk.hangs(true);
    let paused = rig.pauses();
    rig.only_looks();
    assert!(rig.get("/").1.contains(r#""state":"Running""#));
    for (path, body) in [
        ("/vm", r#"{"state": "Resumed"}"#),
        ("/vm", r#"{"state": "Paused"}"#),
        ("/drives/d", r#"{"drive_id": "d", "size_bytes": 2097152}"#),
    ] {
        let (status, body) = call(&rig.socket, "PATCH", path, body);
        assert_eq!(status, 400);
        assert!(body.contains("a pause is under way"), "{body}");
    }
    assert!(!paused.is_finished());
    rig.disk.hangs(false);
    assert_eq!(paused.join().unwrap().0, 204);
    assert!(rig.get("/").1.contains(r#""state":"Paused""#));
    assert_eq!(rig.set_state("Resumed").0, 204);
    assert!(rig.end() < Duration::from_secs(5));
}

#[test]
fn a_pause_that_a_disk_does_not_let_happen_is_refused_and_the_guest_runs() {
    let Some(rig) = Rig::new("a_pause_that_a_disk_does_not_let_happen_is_refused_and_the_guest_runs") else {
        return;
    };
    rig.disk.hangs(true);
    let begun = Instant::now();
    let (status, body) = rig.pauses().join().unwrap();
    assert_eq!(status, 400);
    assert!(body.contains("did not complete within 10000 ms"), "{body}");
    let took = begun.elapsed();
    assert!((10..12).contains(&took.as_secs()), "{took:?}");
    assert!(rig.get("/").1.contains(r#""state":"Running""#));
    rig.disk.hangs(false);
    assert_eq!(rig.set_state("Paused").0, 204);
    rig.end();
}

#[test]
fn a_drive_that_waits_for_its_disk_takes_its_next_image_when_it_can() {
    let Some(rig) = Rig::new("a_drive_that_waits_for_its_disk_takes_its_next_image_when_it_can") else {
        return;
    };
    let next = tempfile::NamedTempFile::new().unwrap();
    next.as_file().set_len(4 << 20).unwrap();
    let next = next.path().display();
    rig.disk.hangs(true);
    let patched = rig.asks(
        "/drives/d",
        format!(r#"{{"drive_id": "d", "path_on_host": "{next}"}}"#),
    );
    rig.only_looks();
    let (status, body) = rig.set_state("Paused");
    assert_eq!(status, 400);
    assert!(body.contains("a change of a drive is under way"), "{body}");
    assert!(!patched.is_finished());
    rig.disk.hangs(false);
    let (status, body) = patched.join().unwrap();
    assert_eq!(status, 204, "{body}");
    assert!(rig.get("/vm/config").1.contains(&next.to_string()));
    assert_eq!(rig.set_state("Paused").0, 204);
    // Also while the guest stands still, and to a size that is grown before anything else happens.
    let (status, body) = call(
        &rig.socket,
        "PATCH",
        "/drives/d",
        r#"{"drive_id": "d", "size_bytes": 8388608}"#,
    );
    assert_eq!(status, 204, "{body}");
    rig.end();
}

#[test]
fn a_snapshot_that_waits_for_a_disk_is_given_up_at_once_and_leaves_nothing() {
    let Some(rig) = Rig::new("a_snapshot_that_waits_for_a_disk_is_given_up_at_once_and_leaves_nothing")
    else {
        return;
    };
    assert_eq!(rig.set_state("Paused").0, 204);
    let folder = tempfile::tempdir().unwrap();
    let (state, memory) = (folder.path().join("state"), folder.path().join("memory"));
    let body = format!(
        r#"{{"snapshot_path": "{}", "mem_file_path": "{}"}}"#,
        state.display(),
        memory.display()
    );
    rig.disk.hangs(true);
    let socket = rig.socket.clone();
    let made = thread::spawn(move || call(&socket, "PUT", "/snapshot/create", &body));
    rig.wait_for("/snapshot", "Creating");
    let begun = Instant::now();
    let cancelled = call(&rig.socket, "PATCH", "/snapshot", r#"{"state": "Cancelled"}"#);
    assert_eq!(cancelled.0, 204, "{cancelled:?}");
    let (status, body) = made.join().unwrap();
    assert_eq!(status, 400);
    assert!(body.contains("the snapshot was cancelled"), "{body}");
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(5), "{took:?}");
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 0);
    assert!(rig.get("/snapshot").1.contains("Idle"));
    rig.disk.hangs(false);
    assert_eq!(rig.set_state("Resumed").0, 204);
    rig.end();
}

#[test]
fn a_machine_whose_disk_is_lost_stands_still_for_good_and_says_who_has_it() {
    for was_paused in [false, true] {
        let Some(rig) = Rig::new("a_machine_whose_disk_is_lost_stands_still_for_good_and_says_who_has_it")
        else {
            return;
        };
        if was_paused {
            assert_eq!(rig.set_state("Paused").0, 204);
        }
        rig.disk.hangs(true);
        rig.disk.0.loss.set("its lease is host-b's").unwrap();
        let told = rig.wait_for("/", r#""reason":"drive `d` is lost: its lease is host-b's""#);
        if !was_paused {
            rig.wait_for("/", r#""state":"Paused""#);
        } else {
            assert!(told.contains(r#""state":"Paused""#), "{told}");
        }
        assert!(rig.get("/metrics").1.contains("coracle_block_lost{id=\"d\"} 1\n"));
        for (path, body) in [
            ("/vm", r#"{"state": "Resumed"}"#),
            ("/drives/d", r#"{"drive_id": "d", "path_on_host": "/nowhere"}"#),
            ("/drives/d", r#"{"drive_id": "d", "size_bytes": 2097152}"#),
        ] {
            let (status, body) = call(&rig.socket, "PATCH", path, body);
            assert_eq!(status, 400, "{body}");
            assert!(body.contains("its lease is host-b's"), "{body}");
        }
        assert_eq!(rig.set_state("Paused").0, 204, "it is");
        let took = rig.end();
        assert!(took < Duration::from_secs(2), "{took:?}");
    }
}

#[test]
fn a_pause_during_which_a_disk_is_lost_ends_with_the_guest_standing_still() {
    let Some(rig) = Rig::new("a_pause_during_which_a_disk_is_lost_ends_with_the_guest_standing_still") else {
        return;
    };
    rig.disk.hangs(true);
    let paused = rig.pauses();
    rig.disk.0.loss.set("its lease is host-b's").unwrap();
    assert_eq!(paused.join().unwrap().0, 204);
    rig.wait_for("/", r#""state":"Paused""#);
    assert_eq!(rig.set_state("Resumed").0, 400);
    rig.end();
}

#[test]
fn a_process_ends_during_a_pause_within_the_limit_of_the_pause() {
    let Some(rig) = Rig::new("a_process_ends_during_a_pause_within_the_limit_of_the_pause") else {
        return;
    };
    rig.disk.hangs(true);
    let paused = rig.pauses();
    let took = rig.end();
    assert!(took < Duration::from_secs(13), "{took:?}");
    let (status, body) = paused.join().unwrap();
    assert_eq!(status, 400);
    assert!(body.contains("ended before it could answer"), "{body}");
}

#[test]
fn a_machine_with_images_elsewhere_starts_beside_the_api_and_a_failure_ends_the_process() {
    let (mut config, _files) = testing::config();
    let mut drive = config.drives().first().unwrap().clone();
    drive.path_on_host = Some("nowhere://host/a".to_owned());
    config.insert_drive(drive).unwrap();
    let stop = StopSignals::take_over().unwrap();
    let mut monitor = Monitor::new("test".to_owned(), config, stop, Registry::default()).unwrap();
    monitor.apply_and_start().unwrap();
    // Unless the thread was faster than this one, others are told to wait.
    if monitor.operation.is_some() {
        let refused = monitor.take_on(Verb::Start).err().unwrap();
        assert!(
            refused.message.contains("a start is under way"),
            "{}",
            refused.message
        );
        assert!(monitor.take_on(Verb::GetConfig).is_ok());
    }
    let end = monitor.serve().unwrap();
    assert_eq!(end.status(), 152);
    assert!(
        end.to_string()
            .contains("`nowhere://` is not built into this version"),
        "{end}"
    );
    monitor.retire();
}
