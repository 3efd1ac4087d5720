//! The rules of a configuration: what is kept, what is refused and with which words.

#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

use std::time::{Duration, Instant};

use super::*;

fn drive(json: &str) -> DriveConfig {
    serde_json::from_str(json).unwrap()
}

fn plain(id: &str) -> DriveConfig {
    drive(&format!(
        r#"{{"drive_id": "{id}", "path_on_host": "{id}.img", "is_root_device": false, "is_read_only": false}}"#
    ))
}

fn root(id: &str) -> DriveConfig {
    DriveConfig {
        is_root_device: true,
        ..plain(id)
    }
}

fn machine(json: &str) -> Result<Config, ConfigError> {
    let mut config = Config::default();
    config.set_machine(serde_json::from_str(json).unwrap())?;
    Ok(config)
}

#[test]
fn a_machine_has_firecrackers_defaults() {
    let json = serde_json::to_string(Config::default().machine()).unwrap();
    assert_eq!(
        json,
        r#"{"vcpu_count":1,"mem_size_mib":128,"smt":false,"track_dirty_pages":false,"huge_pages":"None"}"#
    );
}

#[test]
fn bounds_of_a_machine_are_held_and_named() {
    for (json, reason) in [
        (r#"{"vcpu_count": 0, "mem_size_mib": 128}"#, "choose 1 to 32"),
        (r#"{"vcpu_count": 33, "mem_size_mib": 128}"#, "choose 1 to 32"),
        (
            r#"{"vcpu_count": 3, "mem_size_mib": 128, "smt": true}"#,
            "1 or even",
        ),
        (r#"{"vcpu_count": 1, "mem_size_mib": 0}"#, "choose 1 to 1048576"),
        (
            r#"{"vcpu_count": 1, "mem_size_mib": 1048577}"#,
            "choose 1 to 1048576",
        ),
        (
            r#"{"vcpu_count": 1, "mem_size_mib": 3, "huge_pages": "2M"}"#,
            "multiple of 2",
        ),
        (
            r#"{"vcpu_count": 1, "mem_size_mib": 3, "huge_pages": "Transparent"}"#,
            "multiple of 2",
        ),
        (
            r#"{"vcpu_count": 1, "mem_size_mib": 3, "cpu_template": "T2S"}"#,
            "/cpu-config",
        ),
    ] {
        let error = machine(json).unwrap_err().to_string();
        assert!(error.contains(reason), "{json}: {error}");
    }
    for json in [
        r#"{"vcpu_count": 32, "mem_size_mib": 1}"#,
        r#"{"vcpu_count": 1, "mem_size_mib": 128, "smt": true}"#,
        r#"{"vcpu_count": 2, "mem_size_mib": 2, "smt": true, "huge_pages": "2M", "memory_backing": "memfd"}"#,
        r#"{"vcpu_count": 2, "mem_size_mib": 2, "huge_pages": "Transparent"}"#,
        r#"{"vcpu_count": 2, "mem_size_mib": 1048576, "cpu_template": "None"}"#,
    ] {
        machine(json).unwrap();
    }
}

#[test]
fn a_patch_of_a_machine_keeps_the_rules_of_the_whole() {
    let mut config = machine(r#"{"vcpu_count": 3, "mem_size_mib": 3}"#).unwrap();
    let before = config.clone();
    for json in [
        r#"{"smt": true}"#,
        r#"{"huge_pages": "2M"}"#,
        r#"{"vcpu_count": 64}"#,
    ] {
        config
            .patch_machine(&serde_json::from_str(json).unwrap())
            .unwrap_err();
        assert_eq!(config, before, "{json}");
    }
    config
        .patch_machine(&serde_json::from_str(r#"{"vcpu_count": 2, "smt": true}"#).unwrap())
        .unwrap();
    assert_eq!(
        (config.machine().vcpu_count, config.machine().mem_size_mib),
        (2, 3)
    );
}

#[test]
fn a_boot_source_is_checked_before_it_is_kept() {
    let set = |json: &str| Config::default().set_boot_source(serde_json::from_str(json).unwrap());
    let long = format!(
        r#"{{"kernel_image_path": "k", "boot_args": "{}"}}"#,
        "a".repeat(BOOT_ARGS_BYTES_MAX + 1)
    );
    for (json, reason) in [
        (r#"{"kernel_image_path": ""}"#, "is empty"),
        (
            r#"{"kernel_image_path": "k", "boot_args": "a\nb"}"#,
            "printable ASCII",
        ),
        (long.as_str(), "at most 2047"),
    ] {
        let error = set(json).unwrap_err().to_string();
        assert!(error.contains(reason), "{json}: {error}");
    }
    set(r#"{"kernel_image_path": "k", "boot_protocol": "linux64", "boot_args": ""}"#).unwrap();
}

#[test]
fn a_boot_source_whose_files_cannot_be_opened_is_found_out_by_probing() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = directory.path().join("kernel");
    let mut source = BootSource {
        kernel_image_path: kernel.to_str().unwrap().to_owned(),
        ..BootSource::default()
    };
    assert!(matches!(source.open(), Err(BootSourceError::Kernel { .. })));
    std::fs::write(&kernel, b"").unwrap();
    source.open().unwrap();
    for (path, reason) in [("/", "is a directory"), ("/dev/zero", "not a regular file")] {
        source.initrd_path = Some(path.to_owned());
        let Err(BootSourceError::Initrd { source, .. }) = source.open() else {
            panic!("{path} is taken for an initrd");
        };
        assert!(source.to_string().contains(reason), "{source}");
    }
    source.initrd_path = Some("/nonexistent/initrd".to_owned());
    assert!(matches!(source.open(), Err(BootSourceError::Initrd { .. })));
}

#[test]
fn the_root_drive_is_first_and_only_one() {
    let mut config = Config::default();
    config.insert_drive(plain("a")).unwrap();
    config.insert_drive(plain("b")).unwrap();
    config.insert_drive(root("r")).unwrap();
    let ids = |config: &Config| {
        config
            .drives()
            .iter()
            .map(|drive| drive.drive_id.clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(ids(&config), ["r", "a", "b"]);

    let error = config.insert_drive(root("a")).unwrap_err();
    assert!(matches!(error, ConfigError::SecondRoot { root_id } if root_id == "r"));
    assert_eq!(ids(&config), ["r", "a", "b"]);

    config.insert_drive(plain("r")).unwrap();
    config.insert_drive(root("b")).unwrap();
    assert_eq!(ids(&config), ["b", "r", "a"]);
}

#[test]
fn a_drive_that_breaks_a_rule_is_refused() {
    let mut config = Config::default();
    let no_root = DriveConfig {
        partuuid: Some("0eaa91a0-01".to_owned()),
        ..plain("a")
    };
    assert!(matches!(
        config.insert_drive(no_root),
        Err(ConfigError::PartuuidWithoutRoot { .. })
    ));
    let no_path = DriveConfig {
        path_on_host: Some(String::new()),
        ..plain("a")
    };
    assert!(matches!(
        config.insert_drive(no_path),
        Err(ConfigError::NoImage { .. })
    ));
    assert!(matches!(
        config.insert_drive(plain("a-b")),
        Err(ConfigError::Id(IdError::DeviceCharacter))
    ));
    for number in 0..DRIVES_MAX {
        config.insert_drive(plain(&number.to_string())).unwrap();
    }
    assert!(matches!(
        config.insert_drive(plain("more")),
        Err(ConfigError::TooManyDrives)
    ));
    config.insert_drive(plain("0")).unwrap();
}

#[test]
fn a_patch_of_a_drive_changes_what_it_names() {
    let mut config = Config::default();
    config.insert_drive(root("r")).unwrap();
    let patch = |json: &str| serde_json::from_str::<PartialDrive>(json).unwrap();
    let bucket = r#"{"size": 1, "refill_time": 2}"#;
    config
        .patch_drive(&patch(&format!(
            r#"{{"drive_id": "r", "rate_limiter": {{"ops": {bucket}}}}}"#
        )))
        .unwrap();
    config
        .patch_drive(&patch(&format!(
            r#"{{"drive_id": "r", "rate_limiter": {{"bandwidth": {bucket}}}}}"#
        )))
        .unwrap();
    config
        .patch_drive(&patch(r#"{"drive_id": "r", "path_on_host": "new.img"}"#))
        .unwrap();
    let drive = config.drives().first().unwrap();
    assert_eq!(drive.path_on_host.as_deref(), Some("new.img"));
    let limits = drive.rate_limiter.unwrap();
    assert!(limits.ops.is_some() && limits.bandwidth.is_some());
    assert!(matches!(
        config.patch_drive(&patch(r#"{"drive_id": "x"}"#)),
        Err(ConfigError::NoSuchDrive { .. })
    ));
}

#[test]
fn metrics_have_one_destination() {
    let mut config = Config::default();
    let metrics: MetricsConfig = serde_json::from_str(r#"{"metrics_path": "m"}"#).unwrap();
    config.set_metrics(metrics.clone()).unwrap();
    assert!(matches!(
        config.set_metrics(metrics),
        Err(ConfigError::SecondMetrics)
    ));
}

/// What `--config-file` makes of `json`: the configuration, or the chain of errors.
fn from_file(json: &str) -> Result<Config, String> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), json).unwrap();
    Config::from_file(file.path()).map_err(|error| {
        let cause = std::error::Error::source(&error).map(ToString::to_string);
        format!("{error}: {}", cause.unwrap_or_default())
    })
}

#[test]
fn a_config_file_sets_everything() {
    let template = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(template.path(), r#"{"cpuid_drop": ["0x7"]}"#).unwrap();
    let json = serde_json::json!({
        "boot-source": {"kernel_image_path": "vmlinux", "boot_args": "console=ttyS0"},
        "drives": [{"drive_id": "a", "path_on_host": "a.img", "is_root_device": true, "is_read_only": true}],
        "machine-config": {"vcpu_count": 2, "mem_size_mib": 64},
        "cpu-config": template.path(),
        "logger": {"level": "debug"},
        "metrics": {"metrics_path": "m"},
        "entropy": {},
        "serial": {"serial_out_path": "s"},
        "network-interfaces": [],
        "vsock": null
    });
    let config = from_file(&json.to_string()).unwrap();
    assert_eq!(config.boot_source().unwrap().boot_args(), "console=ttyS0");
    assert!(config.drives().first().unwrap().is_root_device);
    assert_eq!(config.machine().vcpu_count, 2);
    assert_eq!(config.cpu().unwrap().cpuid_drop, [Hex(7)]);
    assert_eq!(config.logger().unwrap().level, Some(Level::Debug));
    assert!(config.metrics().is_some() && config.entropy().is_some() && config.serial().is_some());
}

#[test]
fn what_get_vm_config_writes_can_be_read_back() {
    let mut config = Config::default();
    let kernel =
        r#"{"kernel_image_path": "k", "initrd_path": "i", "boot_args": "a", "boot_protocol": "pvh"}"#;
    config
        .set_boot_source(serde_json::from_str(kernel).unwrap())
        .unwrap();
    let fed_back = |config: &Config| {
        let json = serde_json::to_string(&FullConfig::from(config)).unwrap();
        assert_eq!(from_file(&json).unwrap(), *config, "{json}");
    };
    fed_back(&config);

    let machine = r#"{"vcpu_count": 2, "mem_size_mib": 64, "smt": true, "track_dirty_pages": true,
        "huge_pages": "Transparent", "memory_backing": "memfd"}"#;
    config
        .set_machine(serde_json::from_str(machine).unwrap())
        .unwrap();
    let mut limited = root("r");
    limited.rate_limiter =
        serde_json::from_str(r#"{"ops": {"size": 1, "one_time_burst": 2, "refill_time": 3}}"#).unwrap();
    config.insert_drive(limited).unwrap();
    config.insert_drive(plain("p")).unwrap();
    let overlay = r#"{"drive_id": "o", "is_root_device": false, "cache_type": "Writethrough",
        "overlay": {"base": "b", "path": "p", "keep": true}}"#;
    config.insert_drive(drive(overlay)).unwrap();
    let template = r#"{"kvm_capabilities": ["!69"], "cpuid_drop": ["0xd"],
        "msr_modifiers": [{"addr": "0x1", "bitmap": "0b1x"}],
        "cpuid_modifiers": [{"leaf": "0x1", "subleaf": "0x0", "flags": 0,
            "modifiers": [{"register": "eax", "bitmap": "0b0"}]}]}"#;
    config.set_cpu(serde_json::from_str(template).unwrap());
    config.set_entropy(EntropyConfig::default());
    config.set_serial(SerialConfig::default());
    config.set_logger(serde_json::from_str(r#"{"level": "warning", "show_level": true}"#).unwrap());
    config
        .set_metrics(serde_json::from_str(r#"{"metrics_path": "m", "properties": {"rack": "7"}}"#).unwrap())
        .unwrap();
    fed_back(&config);
}

#[test]
fn an_overlay_is_a_drive_whose_image_cannot_be_replaced() {
    let patch = |json: &str| serde_json::from_str::<PartialDrive>(json).unwrap();
    let mut config = Config::default();
    let overlay =
        r#"{"drive_id": "r", "is_root_device": true, "overlay": {"base": "b.img", "path": "memory"}}"#;
    config.insert_drive(drive(overlay)).unwrap();
    let error = config
        .patch_drive(&patch(r#"{"drive_id": "r", "path_on_host": "new.img"}"#))
        .unwrap_err();
    assert!(error.to_string().contains("`r` is an overlay"), "{error}");
    let limits = r#"{"drive_id": "r", "rate_limiter": {"ops": {"size": 1, "refill_time": 1}}}"#;
    config.patch_drive(&patch(limits)).unwrap();
}

#[test]
fn what_firecracker_answers_to_get_vm_config_can_be_read() {
    let json = serde_json::json!({
        "balloon": null,
        "drives": [{
            "drive_id": "rootfs", "partuuid": null, "is_root_device": true, "cache_type": "Unsafe",
            "is_read_only": false, "path_on_host": "r", "rate_limiter": null, "io_engine": "Sync", "socket": null
        }],
        "boot-source": {"kernel_image_path": "k", "initrd_path": null, "boot_args": null},
        "cpu-config": null,
        "logger": null,
        "machine-config": {
            "vcpu_count": 2, "mem_size_mib": 256, "smt": false, "track_dirty_pages": false, "huge_pages": "None"
        },
        "metrics": null,
        "mmds-config": null,
        "network-interfaces": [],
        "vsock": null,
        "entropy": null,
        "pmem": [],
        "memory-hotplug": null
    });
    let config = from_file(&json.to_string()).unwrap();
    assert_eq!((config.machine().vcpu_count, config.drives().len()), (2, 1));
}

#[test]
fn a_config_file_that_is_wrong_is_refused_with_the_reason() {
    let boot = r#""boot-source": {"kernel_image_path": "k"}"#;
    for (json, reason) in [
        ("{}".to_owned(), "missing field `boot-source`"),
        ("{".to_owned(), "EOF"),
        (format!("{{{boot}, {boot}}}"), "duplicate field `boot-source`"),
        (format!("{{{boot}, \"drive\": []}}"), "unknown field `drive`"),
        (
            format!("{{{boot}, \"vsock\": {{}}}}"),
            "missing field `guest_cid`",
        ),
        (
            format!("{{{boot}, \"network-interfaces\": [{{}}]}}"),
            "missing field `iface_id`",
        ),
        (
            format!("{{{boot}, \"cpu-config\": \"/nonexistent\"}}"),
            "cannot read `/nonexistent`",
        ),
        (
            format!("{{{boot}, \"cpu-config\": 7}}"),
            "a CPU template, or the path",
        ),
        (
            format!("{{{boot}, \"machine-config\": {{\"vcpu_count\": 0, \"mem_size_mib\": 1}}}}"),
            "choose 1 to 32",
        ),
        (
            format!("{{{boot}}}{}", " ".repeat(1 << 20)),
            "has more than 1048576 bytes",
        ),
    ] {
        let error = from_file(&json).unwrap_err();
        assert!(
            error.contains(reason),
            "{}: {error}",
            &json[..json.len().min(200)]
        );
    }
}

#[test]
fn the_records_of_two_images_have_two_names() {
    let mut config = Config::default();
    let at = |id: &str, at: &str| DriveConfig {
        lease_at: Some(at.to_owned()),
        ..plain(id)
    };
    config.insert_drive(at("a", "leases/a")).unwrap();
    let error = config.insert_drive(at("b", "leases/a")).unwrap_err();
    assert!(
        matches!(&error, ConfigError::SharedLeaseAt { other_id, .. } if other_id == "a"),
        "{error}"
    );
    config.insert_drive(at("a", "leases/a")).unwrap();
    config.insert_drive(at("b", "leases/b")).unwrap();
}

#[test]
fn a_writable_drive_is_not_shared() {
    let mut config = Config::default();
    let shared =
        drive(r#"{"drive_id": "a", "path_on_host": "a", "is_root_device": false, "lock": "shared"}"#);
    assert!(matches!(
        config.insert_drive(shared),
        Err(ConfigError::Drive(DriveError::Lock { .. }))
    ));
    assert!(config.drives().is_empty());
}

#[test]
fn what_is_for_images_of_a_network_is_refused_for_a_file_also_after_a_patch() {
    let mut config = Config::default();
    let report =
        r#"{"drive_id": "a", "is_root_device": false, "path_on_host": "PATH", "on_error": "report"}"#;
    let refused = config.insert_drive(drive(&report.replace("PATH", "a.img")));
    assert!(
        matches!(refused, Err(ConfigError::Drive(DriveError::Local { .. }))),
        "{refused:?}"
    );
    config
        .insert_drive(drive(&report.replace("PATH", "iscsi://host/iqn.a/1")))
        .unwrap();
    let before = config.clone();
    let patch = serde_json::from_str(r#"{"drive_id": "a", "path_on_host": "b.img"}"#).unwrap();
    let refused = config.patch_drive(&patch);
    assert!(
        matches!(refused, Err(ConfigError::Drive(DriveError::Local { .. }))),
        "{refused:?}"
    );
    assert_eq!(config, before);
}

#[test]
fn a_lease_is_taken_over_for_the_image_that_a_drive_begins_with() {
    let remote = |id: &str| DriveConfig {
        path_on_host: Some("iscsi://host/iqn.a/1".to_owned()),
        ..plain(id)
    };
    let mut config = Config::default();
    config.insert_drive(remote("a")).unwrap();
    config.take_over([("a".to_owned(), 7), ("b".to_owned(), 8)].into());
    assert_eq!(config.missing_heir(), Some("b"));
    config.insert_drive(remote("b")).unwrap();
    assert_eq!(config.missing_heir(), None);
    let keys = |config: &Config| -> Vec<_> { config.drives().iter().map(|drive| drive.takes_over).collect() };
    assert_eq!(keys(&config), [Some(7), Some(8)]);
    let patch = serde_json::from_str(r#"{"drive_id": "a", "path_on_host": "iscsi://host/iqn.a/2"}"#).unwrap();
    config.patch_drive(&patch).unwrap();
    assert_eq!(keys(&config), [None, Some(8)]);
}

#[test]
fn times_of_a_migration_that_no_clock_counts_are_as_long_as_one_does() {
    let tls = r#""tls": {"certificate": "c", "key": "k", "ca": "a"}"#;
    let send = |times: &str| -> MigrationSend {
        serde_json::from_str(&format!(r#"{{"to": "b:1", {tls}, {times}}}"#)).unwrap()
    };
    let receive = format!(r#"{{"listen": "b:1", {tls}, "postcopy_wait_s": {}}}"#, u64::MAX);
    let receive: MigrationReceive = serde_json::from_str(&receive).unwrap();
    let longest = send(&format!(r#""timeout_s": {0}, "postcopy_wait_s": {0}"#, u64::MAX));
    for time in [
        longest.timeout(),
        longest.postcopy_wait(),
        receive.postcopy_wait(),
    ] {
        assert!(Instant::now().checked_add(time * 2).is_some(), "{time:?}");
        assert!(time > Duration::from_hours(24 * 365), "{time:?}");
    }
    let short = send(r#""timeout_s": 7, "postcopy_wait_s": 8"#);
    let times = [short.timeout(), short.postcopy_wait()];
    assert_eq!(times, [7, 8].map(Duration::from_secs));
}
