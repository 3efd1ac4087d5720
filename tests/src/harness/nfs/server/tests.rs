//! A server is shown by what libnfs and QEMU see of it.

use std::os::unix::fs::FileExt;

use super::*;
use crate::case::text;
use crate::harness::hosts::Star;
use crate::harness::nfs::second_client;

const MIB: u64 = 1 << 20;
const IMAGE: &str = "export/image.raw";
const SOON: Duration = Duration::from_secs(20);

fn start(plan: Plan) -> Server {
    Server::start(plan).expect("ganesha is there: tests/tools/need ganesha.nfsd ganesha-vfs")
}

fn fill(server: &Server, path: &str, byte: u8) {
    let image = std::fs::File::options().write(true).open(server.path(path));
    let content = vec![byte; 64 << 10];
    image
        .and_then(|image| image.write_all_at(&content, 0))
        .expect("it is there");
}

fn first_byte(server: &Server, path: &str) -> Outcome<u8> {
    let content = second_client::read(&server.url(path))?;
    Ok(content.first().copied().ok_or("it is empty")?)
}

/// The first byte as soon as it can be read: nobody opens anything in a grace period.
fn first_byte_at_last(server: &Server) -> u8 {
    let deadline = Instant::now() + SOON;
    loop {
        match first_byte(server, IMAGE) {
            Ok(byte) => return byte,
            Err(e) => assert!(Instant::now() < deadline, "{}: {}", text(&e), server.log()),
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn what_is_in_the_image_is_served_and_survives_a_kill() {
    let mut server = start(Plan::image(MIB));
    fill(&server, IMAGE, 7);
    assert_eq!(first_byte(&server, IMAGE).expect("it serves"), 7);
    let address = server.address();
    server.kill().expect("it lives");
    assert!(first_byte(&server, IMAGE).is_err(), "a dead server serves");
    assert!(server.kill().is_err() && server.process().is_err());
    server.restart().expect("its port is still its own");
    assert_eq!(server.address(), address);
    assert!(server.restart().is_err(), "it is not dead");
    assert_eq!(first_byte_at_last(&server), 7);
}

#[test]
fn who_had_a_session_is_remembered_over_a_restart_until_he_is_forgotten() {
    let mut server = start(Plan::image(MIB).grace_seconds(5));
    first_byte(&server, IMAGE).expect("it serves");
    let in_grace_since = |server: &mut Server| {
        let said = server.log().len();
        server.restart().expect("its port is its own");
        let log = server.log().split_off(said);
        log.contains("IN GRACE, duration 5") && !log.contains("NOT IN GRACE")
    };
    server.kill().expect("it lives");
    assert!(in_grace_since(&mut server), "{}", server.log());
    server.kill().expect("it lives");
    server.forget_clients().expect("it is dead");
    assert!(!in_grace_since(&mut server), "{}", server.log());
    assert!(server.forget_clients().is_err(), "it lives");
    first_byte(&server, IMAGE).expect("it serves at once");
}

#[test]
fn a_stopped_server_says_nothing_until_it_goes_on() {
    let server = start(Plan::image(MIB));
    server.stop().expect("it lives");
    std::thread::scope(|scope| {
        let read = scope.spawn(|| first_byte(&server, IMAGE));
        std::thread::sleep(Duration::from_millis(500));
        assert!(!read.is_finished(), "a stopped server answers");
        server.go_on().expect("it lives");
        read.join().expect("no panic").expect("it goes on");
    });
}

#[test]
fn many_servers_at_a_time_do_not_meet() {
    let servers: Vec<Server> = std::thread::scope(|scope| {
        let starts: Vec<_> = (1..=4)
            .map(|number| scope.spawn(move || start(Plan::image(number * MIB))))
            .collect();
        starts
            .into_iter()
            .map(|start| start.join().expect("no panic"))
            .collect()
    });
    for (number, server) in (1..).zip(&servers) {
        let content = second_client::read(&server.url(IMAGE)).expect("it serves");
        assert_eq!(content.len() as u64, number * MIB);
    }
}

#[test]
fn nothing_is_left_of_a_server_whose_owner_panics() {
    let seen = std::sync::Mutex::new(None);
    let ended = std::panic::catch_unwind(|| {
        let server = start(Plan::image(MIB));
        let process = server.process().expect("it lives");
        *seen.lock().expect("nobody else has it") = Some((process, server.directory.path().to_owned()));
        panic!("in the middle of a test");
    });
    assert!(ended.is_err());
    let (process, directory) = seen.into_inner().expect("a value").expect("it was set");
    assert!(!process.is_there() && !directory.exists());
}

#[test]
fn each_export_is_what_it_was_asked_to_be() {
    let plan = Plan::image(MIB)
        .export(Export::new("deep/golden").image("base.raw", MIB).read_only())
        .export(Export::new("closed").image("image.raw", MIB).squash(Squash::All));
    let server = start(plan);
    for path in [IMAGE, "deep/golden/base.raw", "closed/image.raw"] {
        fill(&server, path, 9);
        assert_eq!(first_byte(&server, path).expect("it serves"), 9, "{path}");
    }
    let closed = server.path("closed/image.raw");
    let own = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    std::fs::set_permissions(closed, own).expect("it is ours");
    let refused = first_byte(&server, "closed/image.raw").expect_err("nobody may read it");
    assert!(text(&refused).contains("ACCES"), "{}", text(&refused));
    let lacking = first_byte(&server, "lacking/image.raw").expect_err("there is no such export");
    assert!(text(&lacking).contains("NOENT"), "{}", text(&lacking));
    let file = server.directory.path().join("ganesha.conf");
    assert!(is_copied(&file, &server.url("export/new.raw")), "it is writable");
    assert!(!is_copied(&file, &server.url("deep/golden/new.raw")), "it is not");
}

/// Whether libnfs can make a copy of a file there.
fn is_copied(file: &Path, url: &str) -> bool {
    let address = url.strip_prefix("nfs://").expect("an URL");
    let (place, path) = address.split_once('/').expect("a path");
    let (host, port) = place.split_once(':').expect("a port");
    let there = format!("nfs://{host}/{path}?version=4&nfsport={port}");
    let done = Command::new("timeout")
        .args(["20", "nfs-cp"])
        .args([file.as_os_str(), there.as_ref()])
        .output();
    done.expect("libnfs is there").status.success()
}

#[test]
fn a_server_speaks_the_minor_versions_that_it_was_told() {
    // libnfs speaks minor version 0.
    let server = start(Plan::image(MIB).minor_versions(&[1, 2]));
    let refused = first_byte(&server, IMAGE).expect_err("there is no minor version 0");
    assert!(text(&refused).contains("MINOR_VERS"), "{}", text(&refused));
    assert!(
        Server::start(Plan::image(MIB).with_v3()).is_err(),
        "rpcbind needs a host"
    );
}

#[test]
fn qemu_reads_and_writes_by_version_3_on_a_host_of_its_own() {
    if let Some(reason) = crate::harness::hosts::Host::refused() {
        panic!("{reason}");
    }
    let star = Star::new(1).expect("hosts are to be had");
    let client = star.clients.first().expect("there is one");
    for versions in [&[][..], &[1]] {
        let plan = Plan::image(MIB).with_v3().minor_versions(versions);
        let mut server = Server::start_on(&star.server, plan).expect("rpcbind is there");
        let url = url_by_rpcbind(Star::server_address(0), IMAGE);
        let qemu_io = |command: &str| {
            let mut qemu = Command::new("timeout");
            qemu.args(["20", "qemu-io", "-f", "raw", &url, "-c", command]);
            let done = client
                .inside(|| qemu.output())
                .expect("a host")
                .expect("QEMU is there");
            (
                done.status.success(),
                String::from_utf8_lossy(&done.stdout).into_owned(),
            )
        };
        let (is_done, said) = qemu_io("write -P 5 0 64k");
        assert!(is_done, "{said}{}", server.log());
        let image = std::fs::read(server.path(IMAGE)).expect("a file");
        assert!(image.starts_with(&[5; 64 << 10]));
        server.kill().expect("it lives");
        server.restart().expect("its ports are its own");
        let (is_done, said) = qemu_io("read -P 5 0 64k");
        assert!(is_done && !said.contains("verification failed"), "{said}");
        let registry = server.registry.as_ref().map(Daemon::process).expect("it has one");
        drop(server);
        assert!(!registry.is_there(), "rpcbind outlives its server");
    }
}
