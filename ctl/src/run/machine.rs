//! The requests that configure a machine, made from the command line before anything is started.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Map, Value, json};
use thiserror::Error;

use super::RunArgs;
use super::command::{Disposable, Root};
use super::disk::{self, DiskError};
use super::net::{self, NetError};
use super::pmem::{self, PmemError, PmemSpec};
use super::vsock;
use super::{balloon, hotplug};
use crate::client::LONG_REQUEST_WAIT;

/// A CPU template longer than this would not fit into a request.
const TEMPLATE_BYTES_MAX: u64 = 1024 * 1024;
/// What the disk with the image is called, where there is one.
pub(super) const ROOT_ID: &str = "image";
/// A disposable guest's; only it sees that.
const GUEST_CID: u32 = 3;
/// What a Linux guest needs for a console on the serial line, and to end the monitor when it ends.
pub(super) const DEFAULT_CMDLINE: &str = "console=ttyS0 reboot=k panic=1";

/// One request that configures a part of the machine.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Step {
    /// What it sets, or does, for people: what cannot be set, or done, if it fails.
    pub(crate) part: String,
    /// The resource.
    pub(crate) path: String,
    /// What it is set to.
    pub(crate) body: Value,
    /// How long it may take.
    pub(crate) wait: Duration,
}

/// Why the command line describes no machine.
#[derive(Debug, Error)]
pub(crate) enum MachineError {
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    Net(#[from] NetError),
    #[error(transparent)]
    Pmem(#[from] PmemError),
    #[error("cannot read the CPU template {}", path.display())]
    ReadTemplate {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the CPU template {} is longer than {TEMPLATE_BYTES_MAX} bytes", .0.display())]
    LongTemplate(PathBuf),
    #[error("the CPU template {} is not JSON", path.display())]
    ParseTemplate {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
}

/// The requests that make a fresh monitor the machine that `args` describes, in their order.
///
/// # Errors
///
/// When disks contradict each other, or the CPU template cannot be read.
pub(super) fn steps(args: &RunArgs, made: Option<&Disposable>) -> Result<Vec<Step>, MachineError> {
    let mut steps = Vec::new();
    let mut step = |part: &str, path: &str, body| {
        steps.push(Step {
            part: part.to_owned(),
            path: path.to_owned(),
            body,
            wait: LONG_REQUEST_WAIT,
        });
    };
    let machine = json!({
        "vcpu_count": args.cpus,
        "mem_size_mib": args.memory.0,
        "track_dirty_pages": args.track_dirty_pages,
    });
    step("the number of vCPUs and the memory", "/machine-config", machine);
    if let Some(template) = &args.cpu_template {
        step("the CPU template", "/cpu-config", read_template(template)?);
    }
    step("the kernel", "/boot-source", boot_source(args, made));
    if let Some(made) = made {
        let (member, value) = match &made.root {
            Root::Image(base) => ("overlay", json!({ "base": base, "path": "memory" })),
            Root::Placeholder(path) => ("path_on_host", json!(path)),
        };
        let root = json!({ "drive_id": ROOT_ID, "is_root_device": false, member: value });
        step("the image", &format!("/drives/{ROOT_ID}"), root);
    }
    for (id, mut config) in disk::configs(&args.disk, args.pmem.iter().any(PmemSpec::is_root))? {
        if made.is_some() && id == ROOT_ID {
            return Err(DiskError::SameId(id).into());
        }
        if let (Some(_), Some(is_root)) = (made, config.get_mut("is_root_device")) {
            // The kernel begins with the RAM disk, and its agent with the image.
            *is_root = false.into();
        }
        step(&format!("the disk {id}"), &format!("/drives/{id}"), config);
    }
    for (id, config) in net::configs(&args.net)? {
        step(
            &format!("the network interface {id}"),
            &format!("/network-interfaces/{id}"),
            config,
        );
    }
    for (id, config) in pmem::configs(&args.pmem, made.is_none())? {
        step(
            &format!("the persistent memory {id}"),
            &format!("/pmem/{id}"),
            config,
        );
    }
    match (&args.vsock, made) {
        (_, Some(made)) => {
            let config = json!({ "guest_cid": GUEST_CID, "uds_path": made.vsock });
            step("the vsock device", "/vsock", config);
        }
        (Some(given), None) => step("the vsock device", "/vsock", vsock::config(given)),
        (None, None) => {}
    }
    if let Some(given) = &args.balloon {
        step("the balloon", "/balloon", balloon::config(given));
    }
    if let Some(given) = &args.hotplug_memory {
        step("memory that may come", "/hotplug/memory", hotplug::config(given));
    }
    if args.entropy {
        step("the entropy device", "/entropy", json!({}));
    }
    Ok(steps)
}

/// The request that lets a configured machine go.
pub(super) fn start() -> Step {
    Step {
        part: "start the machine".to_owned(),
        path: "/actions".to_owned(),
        body: json!({ "action_type": "InstanceStart" }),
        wait: LONG_REQUEST_WAIT,
    }
}

fn boot_source(args: &RunArgs, made: Option<&Disposable>) -> Value {
    let mut boot = Map::new();
    boot.insert("kernel_image_path".to_owned(), args.kernel.as_str().into());
    let made = made.map(|made| made.initrd.display().to_string());
    if let Some(initrd) = made.or_else(|| args.initrd.clone()) {
        boot.insert("initrd_path".to_owned(), initrd.into());
    }
    boot.insert("boot_args".to_owned(), args.cmdline.as_str().into());
    Value::Object(boot)
}

fn read_template(path: &Path) -> Result<Value, MachineError> {
    let read_error = |source| MachineError::ReadTemplate {
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(read_error)?;
    let mut bytes = Vec::new();
    let count = file
        .take(TEMPLATE_BYTES_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(read_error)?;
    if u64::try_from(count).is_ok_and(|count| count > TEMPLATE_BYTES_MAX) {
        return Err(MachineError::LongTemplate(path.to_owned()));
    }
    serde_json::from_slice(&bytes).map_err(|source| MachineError::ParseTemplate {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use clap::Parser;
    use coracle_vmm::config::Config;
    use coracle_vmm::end;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        run: RunArgs,
    }

    #[test]
    fn every_body_is_one_that_the_monitor_takes() {
        let place = tempfile::tempdir().unwrap();
        let file = |name: &str, bytes: &[u8]| {
            let path = place.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let (image, template) = (
            file("a.img", &[0; 4096]),
            file("cpu.json", b"{\"cpuid_modifiers\":[]}"),
        );
        let disk = |options: &str| format!("--disk={image}{options}");
        let line = Line::parse_from([
            "run".to_owned(),
            format!("--kernel={image}"),
            format!("--initrd={image}"),
            format!("--cpu-template={template}"),
            "--cpus=32".to_owned(),
            "--memory=2G".to_owned(),
            "--entropy".to_owned(),
            disk(",ro,root,sync,unsafe,partuuid=0eaa91a0-01"),
            disk(",async,writeback,id=data"),
        ]);
        let mut file_of_config = Map::new();
        for step in steps(&line.run, None).unwrap() {
            match step.path.strip_prefix("/drives/") {
                None => drop(file_of_config.insert(step.path.trim_start_matches('/').to_owned(), step.body)),
                Some(_) => {
                    let drives = file_of_config.entry("drives").or_insert_with(|| json!([]));
                    drives.as_array_mut().unwrap().push(step.body);
                }
            }
        }
        assert_eq!(file_of_config.len(), 5);
        let path = file(
            "config.json",
            Value::Object(file_of_config).to_string().as_bytes(),
        );
        let config = Config::from_file(Path::new(&path));
        assert!(config.is_ok(), "{config:?}");
    }

    #[test]
    fn the_statuses_that_are_explained_are_the_monitors() {
        let statuses = [
            end::EXIT_BAD_CONFIGURATION,
            end::EXIT_BAD_ARGUMENT,
            end::EXIT_TRIPLE_FAULT,
            end::EXIT_KVM_INTERNAL_ERROR,
            end::EXIT_KVM_ENTRY_FAILED,
            end::EXIT_KVM_RUN_FAILED,
            end::EXIT_MEMORY_LOST,
        ];
        assert!(
            statuses
                .iter()
                .all(|status| *status >= super::super::MONITOR_STATUS_MIN)
        );
    }
}
