//! A guest that writes garbage into every register and ring never kills, stalls or grows the monitor.

use std::io::Write as _;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use coracle_tests::case::{Case, Context, text};
use coracle_tests::environment::Need;
use coracle_tests::guest::{Machine, blank_image};
use coracle_tests::harness::hosts::Star;
use coracle_tests::monitor::Launch;
use coracle_tests::{Outcome, ensure};
use serde_json::json;

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "garbage_for_a_disk_by_io_uring",
        need: Need::Kvm,
        run: |c| assault(c, "blk", "Async", ""),
    },
    Case {
        name: "garbage_for_a_disk_by_a_thread",
        need: Need::Kvm,
        run: |c| assault(c, "blk", "Sync", ""),
    },
    Case {
        name: "garbage_for_the_entropy_device",
        need: Need::Kvm,
        run: |c| assault(c, "rng", "Async", ""),
    },
    Case {
        name: "garbage_for_a_network_that_others_use",
        need: Need::KvmAndHosts,
        run: network,
    },
    Case {
        name: "garbage_for_a_socket_device_that_is_called",
        need: Need::Kvm,
        run: |c| assault(c, "vsock", "Async", ""),
    },
    Case {
        name: "garbage_for_a_balloon",
        need: Need::Kvm,
        run: |c| assault(c, "balloon", "Async", ""),
    },
    Case {
        name: "garbage_for_persistent_memory",
        need: Need::Kvm,
        run: |c| assault(c, "pmem", "Async", ""),
    },
    Case {
        name: "garbage_for_memory_that_comes",
        need: Need::Kvm,
        run: |c| assault(c, "memory", "Async", ""),
    },
    Case {
        name: "garbage_for_ports_and_a_disk",
        need: Need::Kvm,
        run: |c| assault(c, "blk", "Async", ",ports=1"),
    },
];

const HOST: Ipv4Addr = Ipv4Addr::new(172, 16, 0, 1);
const TAP: &str = "tap0";
const SOCKET: &str = "test-vsock";
/// What the guest's own writes make resident, and no more.
const GROWTH_KIB_MAX: u64 = 8 << 10;
const ANSWER_WITHIN: Duration = Duration::from_secs(2);

/// Assaults a device while the API is asked all the time.
pub(crate) fn assault(context: &Context, kind: &str, engine: &str, more: &str) -> Outcome {
    let seconds = context.count(5, 600);
    let seed = context.seed.clone().below(1 << 31);
    let what = format!("hostile:kind={kind},seconds={seconds},seed={seed}{more} by {engine}");
    let launch = Launch::new(&context.environment)?;
    let disk = launch.directory().join("test-disk");
    blank_image(&disk, 16)?;
    let words = format!("do=hello do=hostile:kind={kind},seconds={seconds},seed={seed}{more}");
    let machine = Machine::unikernel(&context.environment, &words)
        .drive(json!({ "drive_id": "d", "path_on_host": disk, "is_root_device": false, "io_engine": engine }))
        .part("entropy", json!({}));
    let socket = launch.directory().join(SOCKET);
    let machine = with_device(machine, kind, launch.directory())?;
    let monitor = launch.config(&machine.config())?.start()?;
    monitor
        .console
        .wait_for("hostile: seed=", Duration::from_secs(30))?;
    if kind == "memory" {
        monitor.must(
            "PATCH",
            "/hotplug/memory",
            Some(&json!({ "requested_size_mib": 64 })),
        )?;
    }
    thread::sleep(Duration::from_millis(500));
    let before = monitor.process().holdings()?;
    let deadline = Instant::now() + Duration::from_secs(u64::from(seconds) + 60);
    let mut slowest = Duration::ZERO;
    let mut last = before;
    while !monitor.console.text().contains("hostile: ok") {
        ensure!(
            Instant::now() < deadline,
            "{what}: no end; console:\n{}",
            monitor.console.text()
        );
        let start = Instant::now();
        if let Err(failed) = monitor.must("GET", "/vm/config", None) {
            // The guest ends by itself, or the monitor has been brought down: the status tells.
            return monitor
                .wait(ANSWER_WITHIN)?
                .expect(0)
                .map_err(|e| format!("{what}: {}; {}", text(&failed), text(&e)).into());
        }
        slowest = slowest.max(start.elapsed());
        if let Ok(now) = monitor.process().holdings() {
            last = now;
        }
        if kind == "vsock" {
            call(&socket);
        }
        thread::sleep(Duration::from_millis(50));
    }
    ensure!(slowest < ANSWER_WITHIN, "{what}: an answer took {slowest:?}");
    ensure!(
        last.descriptors <= before.descriptors + 1,
        "{what}: before {before:?}, after {last:?}"
    );
    ensure!(
        last.resident_kib < before.resident_kib + GROWTH_KIB_MAX,
        "{what}: before {before:?}, after {last:?}"
    );
    monitor
        .wait(Duration::from_secs(30))?
        .expect(0)
        .map_err(|e| format!("{what}: {}", text(&e)).into())
}

/// The same with a device of that `kind`, if it has none; files of it are in `directory`.
fn with_device(machine: Machine, kind: &str, directory: &Path) -> Outcome<Machine> {
    Ok(match kind {
        "net" => machine.part(
            "network-interfaces",
            json!([{ "iface_id": "eth0", "host_dev_name": TAP }]),
        ),
        "vsock" => machine.part("vsock", json!({ "guest_cid": 3, "uds_path": directory.join(SOCKET) })),
        "pmem" => {
            let file = directory.join("test-pmem");
            blank_image(&file, 2)?;
            machine.part("pmem", json!([{ "id": "p", "path_on_host": file }]))
        }
        "balloon" => machine.part(
            "balloon",
            json!({
                "amount_mib": 0, "deflate_on_oom": true, "stats_polling_interval_s": 1, "free_page_hinting": true,
                "free_page_reporting": true,
            }),
        ),
        "memory" => machine.part("memory-hotplug", json!({ "total_size_mib": 256 })),
        _ => machine,
    })
}

/// A call as a program of the host makes it, which may come to anything.
fn call(socket: &Path) {
    if let Ok(mut stream) = UnixStream::connect(socket) {
        let _ = stream.write_all(b"CONNECT 52\nand what comes behind it");
    }
}

fn network(context: &Context) -> Outcome {
    let star = Star::new(0)?;
    star.server.bridge(HOST.into(), &[TAP])?;
    let is_over = AtomicBool::new(false);
    star.server.inside(|| {
        let talker = UdpSocket::bind((HOST, 0))?;
        talker.set_broadcast(true)?;
        thread::scope(|scope| {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    for bytes in [1, 1400, 9000] {
                        // There may be no room for it.
                        let _ = talker.send_to(&vec![0xa5; bytes], (Ipv4Addr::BROADCAST, 9));
                    }
                    thread::sleep(Duration::from_micros(200));
                }
            });
            let done = assault(context, "net", "Async", "");
            is_over.store(true, Ordering::Relaxed);
            done
        })
    })?
}
