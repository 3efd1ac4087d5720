//! The config file, and what the monitor makes of a configuration before it opens anything.
//!
//! An input is the file; behind a NUL, the CPU template that the file may name.

use std::path::Path;
use std::time::{Duration, Instant};

use coracle_storage::lease::{NetworkTerms, OnError};
use coracle_storage::limit::{RateLimiter, RateLimiterConfig};
use coracle_storage::open::is_remote;
use coracle_vmm::api::{Data, Fault};
use coracle_vmm::arch::x86_64::boot::cmdline::{BYTES_MAX, Cmdline, Root, RootAccess, RootDevice};
use coracle_vmm::arch::x86_64::layout::VirtioWindow;
use coracle_vmm::config::{Config, ConfigFileError, FullConfig};

use super::processor;

pub(crate) fn run(data: &[u8]) {
    let end = data.iter().position(|byte| *byte == 0).unwrap_or(data.len());
    let (text, template) = data.split_at(end);
    let template = template.get(1..).unwrap_or_default();
    match parse(text, template) {
        Ok(config) => check(&config),
        Err(error) => assert!(!Fault::from_error(&error).message.is_empty()),
    }
}

fn parse(text: &[u8], template: &[u8]) -> Result<Config, ConfigFileError> {
    Config::from_json(text, Path::new("config.json"), |_| Ok(template.to_vec()))
}

/// Holds what is promised of a configuration that was taken.
pub(super) fn check(config: &Config) {
    if config.boot_source().is_some() {
        let Data::Body(_, text) = Data::json(&FullConfig::from(config)) else {
            panic!("JSON is a body");
        };
        let again = parse(text.as_bytes(), &[]).expect("what GET /vm/config writes can be read");
        assert_eq!(again, *config, "{text}");
    }
    if let Some(cpu) = config.cpu() {
        processor::check(cpu);
    }
    check_limits(config);
    check_networks(config);
    check_command_line(config);
}

/// Any limit lets requests pass at some time, and says when.
fn check_limits(config: &Config) {
    let drives = config.drives().iter().filter_map(|drive| drive.rate_limiter);
    let entropy = config.entropy().and_then(|entropy| entropy.rate_limiter);
    let serial = config.serial().and_then(|serial| serial.rate_limiter);
    let serial = serial.map(|bandwidth| RateLimiterConfig {
        bandwidth: Some(bandwidth),
        ops: None,
    });
    for limits in drives.chain(entropy).chain(serial) {
        let mut now = Instant::now();
        let mut limiter = RateLimiter::new(&limits, now);
        for bytes in [1, 0, 4096, u64::MAX, 1, 1 << 32] {
            if let Err(ready_at) = limiter.admit(bytes, now) {
                assert!(ready_at > now);
                // Beyond that the wait is "for ever", and time may well have an end before.
                now = ready_at.min(now + Duration::from_secs(1 << 30));
                let _ = limiter.admit(bytes, now);
            }
        }
    }
}

/// What was taken of a drive's server makes sense, whatever was changed since.
fn check_networks(config: &Config) {
    for drive in config.drives() {
        let terms = drive.network().expect("it was checked when it was taken");
        assert_eq!(terms.on_error == OnError::Report, terms.timeout.is_some());
        let path = drive.image_path().expect("it was checked, too");
        assert!(is_remote(path) || terms == NetworkTerms::default());
    }
}

fn check_command_line(config: &Config) {
    let Some(source) = config.boot_source() else {
        return;
    };
    let root = config.drives().first().map(|drive| Root {
        device: match &drive.partuuid {
            Some(partuuid) => RootDevice::Partition(partuuid),
            None => RootDevice::Pmem(config.pmem().len()),
        },
        access: RootAccess::ReadWrite,
    });
    let devices: Vec<_> = (0..4).filter_map(VirtioWindow::of_device).collect();
    if let Ok(line) = Cmdline::compose(Some(source.boot_args()), root, &devices) {
        assert!(line.as_c_str().to_bytes_with_nul().len() <= BYTES_MAX);
    }
}
