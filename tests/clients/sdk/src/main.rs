//! Drives a monitor by `firecracker-rs-sdk`, as it was published: first as its own examples do, then through the rest.
//!
//! ```text
//! coracle-client-sdk bare MONITOR KERNEL DISK OTHER_DISK DIRECTORY [TAP]
//! coracle-client-sdk jailed JAILER MONITOR KERNEL DISK BASE_DIRECTORY ID UID GID
//! ```
//!
//! The client ends the process of an instance that it drops. Of its models `RateLimiter` is left out, whose `bandwidth` it
//! calls `banwidth`, and the metadata, which it has as one string.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use firecracker_rs_sdk::firecracker::FirecrackerOption;
use firecracker_rs_sdk::instance::Instance;
use firecracker_rs_sdk::jailer::JailerOption;
use firecracker_rs_sdk::models::*;

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

/// How long a process that was asked to end may take.
const SOON: Duration = Duration::from_secs(10);
const WORDS: &str = "do=hello do=tick:ms=50,count=100000";

fn main() -> Outcome {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["bare", monitor, kernel, disk, other, directory] => {
            bare(monitor, kernel, disk, other, directory, None)
        }
        ["bare", monitor, kernel, disk, other, directory, tap] => {
            bare(monitor, kernel, disk, other, directory, Some(tap))
        }
        ["jailed", jailer, monitor, kernel, disk, base, id, uid, gid] => {
            let mut option = JailerOption::new(jailer, monitor, id, gid.parse()?, uid.parse()?);
            option.chroot_base_dir(Some(base)).stdin("/dev/null");
            let mut firecracker = FirecrackerOption::new(monitor);
            firecracker.api_sock("/run/api.sock");
            let mut instance = option.firecracker_option(Some(&firecracker)).build()?;
            example(&mut instance, kernel, disk)
        }
        _ => Err(format!("not understood: {words:?}").into()),
    }
}

/// What the client's own examples do, without their waits.
fn example(instance: &mut Instance, kernel: &str, disk: &str) -> Outcome {
    instance.start_vmm()?;
    let version = instance.get_firecracker_version()?;
    expect(!version.firecracker_version.is_empty(), "a version")?;
    instance.put_machine_configuration(&machine())?;
    instance.put_guest_boot_source(&boot_source(kernel))?;
    instance.put_guest_drive_by_id(&drive(disk))?;
    instance.start()?;
    instance.pause()?;
    is(instance, InstanceState::Paused)?;
    instance.resume()?;
    is(instance, InstanceState::Running)?;
    instance.stop()?;
    Ok(())
}

fn bare(monitor: &str, kernel: &str, disk: &str, other: &str, directory: &str, tap: Option<&str>) -> Outcome {
    let place = |name: &str| Path::new(directory).join(name);
    let built = |name: &str| {
        let mut option = FirecrackerOption::new(monitor);
        option.api_sock(place(name)).id(name).stdin("/dev/null");
        option.build()
    };
    example(&mut built("example")?, kernel, disk)?;

    let mut instance = built("first")?;
    instance.start_vmm()?;
    is(&mut instance, InstanceState::NotStarted)?;
    configure(&mut instance, kernel, disk, &place, tap)?;
    instance.start()?;
    is(&mut instance, InstanceState::Running)?;
    expect(instance.start().is_err(), "a refusal of a second start")?;
    instance.patch_guest_drive_by_id(&PartialDrive {
        drive_id: "rootfs".into(),
        path_on_host: Some(other.into()),
        rate_limiter: None,
    })?;
    instance.patch_balloon(&BalloonUpdate { amount_mib: 2 })?;
    expect(instance.describe_balloon_config()?.amount_mib == 2, "2 MiB")?;
    expect(instance.describe_balloon_stats()?.target_mib == 2, "2 MiB")?;
    instance.patch_balloon_stats_interval(&BalloonStatsUpdate {
        stats_polling_interval_s: 2,
    })?;
    instance.create_sync_action(ActionType::FlushMetrics)?;
    let whole = instance.get_export_vm_config()?;
    let machine = whole.machine_config.ok_or("a machine")?;
    expect(machine.mem_size_mib == 64, "64 MiB")?;
    expect(whole.vsock.is_some_and(|vsock| vsock.guest_cid == 3), "CID 3")?;
    instance.pause()?;
    let (memory, state) = (place("memory"), place("state"));
    instance.create_snapshot(&SnapshotCreateParams {
        mem_file_path: memory.clone(),
        snapshot_path: state.clone(),
        snapshot_type: Some(SnapshotType::Full),
        version: None,
    })?;
    drop(instance);
    gone(&place("vsock"))?;

    let mut instance = built("second")?;
    instance.start_vmm()?;
    instance.load_snapshot(&SnapshotLoadParams {
        enable_diff_snapshots: None,
        mem_file_path: None,
        mem_backend: Some(MemoryBackend {
            backend_type: BackendType::File,
            backend_path: memory,
        }),
        resume_vm: Some(true),
        snapshot_path: state,
    })?;
    is(&mut instance, InstanceState::Running)?;
    instance.stop()?;
    Ok(())
}

fn configure(
    instance: &mut Instance,
    kernel: &str,
    disk: &str,
    place: &impl Fn(&str) -> PathBuf,
    tap: Option<&str>,
) -> Outcome {
    // Firecracker opens these, and does not make them.
    let (log, metrics) = (place("log"), place("metrics"));
    fs::write(&log, "")?;
    fs::write(&metrics, "")?;
    instance.put_logger(&Logger {
        level: Some(LogLevel::Info),
        log_path: log,
        show_level: Some(true),
        show_log_origin: None,
        module: None,
    })?;
    instance.put_metrics(&Metrics {
        metrics_path: metrics,
    })?;
    instance.put_machine_configuration(&machine())?;
    instance.patch_machine_configuration(&MachineConfiguration {
        mem_size_mib: 64,
        track_dirty_pages: Some(true),
        ..machine()
    })?;
    expect(instance.get_machine_configuration()?.mem_size_mib == 64, "64 MiB")?;
    instance.put_guest_boot_source(&boot_source(kernel))?;
    let none = instance.put_guest_boot_source(&boot_source("/nowhere"));
    expect(none.is_err(), "a refusal of a kernel that is not there")?;
    instance.put_guest_drive_by_id(&drive(disk))?;
    instance.put_entropy_device(&EntropyDevice { rate_limiter: None })?;
    instance.put_balloon(&Balloon {
        amount_mib: 1,
        deflate_on_oom: true,
        stats_polling_interval_s: Some(1),
    })?;
    instance.put_guest_vsock(&Vsock {
        guest_cid: 3,
        uds_path: place("vsock"),
        vsock_id: None,
    })?;
    let Some(tap) = tap else {
        println!("without a network: no tap was named");
        return Ok(());
    };
    instance.put_guest_network_interface_by_id(&NetworkInterface {
        guest_mac: Some("06:00:ac:10:00:02".into()),
        host_dev_name: tap.into(),
        iface_id: "eth0".into(),
        rx_rate_limiter: None,
        tx_rate_limiter: None,
    })?;
    instance.put_mmds_config(&MmdsConfig {
        version: Some(MmdsConfigVersion::V2),
        ipv4_address: None,
        network_interfaces: vec!["eth0".into()],
    })?;
    Ok(())
}

fn machine() -> MachineConfiguration {
    MachineConfiguration {
        cpu_template: None,
        smt: None,
        mem_size_mib: 96,
        track_dirty_pages: None,
        vcpu_count: 1,
        huge_pages: None,
    }
}

fn boot_source(kernel: &str) -> BootSource {
    BootSource {
        boot_args: Some(WORDS.into()),
        initrd_path: None,
        kernel_image_path: kernel.into(),
    }
}

fn drive(path: &str) -> Drive {
    Drive {
        drive_id: "rootfs".into(),
        partuuid: None,
        is_root_device: true,
        cache_type: None,
        is_read_only: false,
        path_on_host: path.into(),
        rate_limiter: None,
        io_engine: None,
        socket: None,
    }
}

fn is(instance: &mut Instance, state: InstanceState) -> Outcome {
    let found = instance.describe_instance()?.state;
    expect(found == state, &format!("{state:?}, and not {found:?}"))
}

/// Waits until the process that has made `path` has removed it.
fn gone(path: &Path) -> Outcome {
    let begun = Instant::now();
    while path.exists() {
        expect(begun.elapsed() < SOON, "an end")?;
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn expect(is_so: bool, what: &str) -> Outcome {
    if is_so {
        Ok(())
    } else {
        Err(format!("expected {what}").into())
    }
}
